"""The state of a run: how far it is, what it has learned, when it is saved."""
import math
import time
from dataclasses import asdict
from pathlib import Path

from pegasus import checkpoint, device, streams
from pegasus.cli import UserError
from pegasus.data.datasets import Dataset
from pegasus.drawing import sampler
from pegasus.models import classifier, composites, labels, variants
from pegasus.models.composites import Composites
from pegasus.models.flow_prior import FlowPrior
from pegasus.training import progress, run_dir
from pegasus.training.accelerate import accelerate
from pegasus.training.config import TrainConfig, first_stage_epochs
from pegasus.training.distributed import Workers
from pegasus.training.guard import StepGuard
from pegasus.training.stages import AutoencoderStage, PriorStage, Stage

import torch
from torch.optim import Optimizer

EPOCHS_PER_PASS = 3  # of the prior over its pictures: then all epochs take as long


class SaveTimer:
    """Says when to save: as asked, else after 1 to 10 minutes.

    The cost of saving is at most 0.5 % of a long run.
    """

    def __init__(self, seconds: float | None):
        self.seconds = seconds
        self.begun = time.monotonic()
        self.last = self.begun
        self.cost = 0.0  # seconds that the last save took

    def is_due(self) -> bool:
        now = time.monotonic()
        pause = self.seconds
        if pause is None:
            # 200: saving takes 0.5 %; at first more, since somebody may be watching
            pause = min(200 * self.cost, (now - self.begun) / 3)
            pause = min(max(60.0, pause), 600.0)
        return now - self.last >= pause

    def saved(self, cost: float = 0.0) -> None:
        self.last = time.monotonic()
        self.cost = cost


class Run:
    """Networks, position and history of a run."""

    def __init__(self, config: TrainConfig, data: Dataset):
        torch.manual_seed(config.seed)
        self.config = config
        self.data = data
        self.preview = run_dir.preview_data(data)
        self.photographs = len(data.images)
        self.composites = 0  # pictures that the prior learns from beside them
        self.best_composites = data.images[:0].clone()  # some, to show
        self.model = variants.build(asdict(config)).to(config.device)
        self.prior = None
        if config.prior == "learned":
            names = labels.names(data.classes)
            self.prior = FlowPrior(self.model.latent_shape, len(names)).to(config.device)
            accelerate(self.prior)
        accelerate(self.model)
        self.in_prior = False  # whether its stage has begun
        self.epoch = 0
        self.step = 0  # of the epoch that is under way
        self.history = []  # rows of log.csv
        self.guard = StepGuard(config.device)
        self.timer = SaveTimer(config.save_seconds)

    @property
    def folder(self) -> Path:
        return Path(self.config.run)

    @property
    def last_path(self) -> Path:
        return self.folder / "last.pt"

    @property
    def image_count(self) -> int:
        """Images that an epoch of this stage takes."""
        if self.in_prior:
            return max(1, (self.photographs + self.composites) // EPOCHS_PER_PASS)
        return self.photographs

    @property
    def steps_per_epoch(self) -> int:
        return math.ceil(self.image_count / self.config.batch_size)

    @property
    def steps_done(self) -> int:
        """Steps that are done, were all epochs as long as those of this stage."""
        return self.epoch * self.steps_per_epoch + self.step

    @property
    def images_done(self) -> int:
        """Images of all epochs that are done."""
        return self.epoch * self.image_count + self.epoch_images

    @property
    def epoch_images(self) -> int:
        """Images of the epoch under way that are done."""
        return min(self.step * self.config.batch_size, self.image_count)

    def restore(self, state: dict) -> None:
        """Go on from a checkpoint.

        What does not fit raises one of the errors that `checkpoint.explain_mismatch` knows.
        """
        self.model.load_state_dict(state["model"])
        self.epoch = state["epochs_done"]
        self.step = state["step"]
        self.in_prior = state["phase"] == PriorStage.name
        self.composites = int(state["composites"])
        self.history = state["history"]
        for row in self.history:
            progress.check_row(row)
        if len(self.history) != self.epoch or self.step not in range(self.steps_per_epoch):
            raise ValueError(
                f"{self.epoch} epochs and {self.step} steps do not fit a history of "
                f"{len(self.history)}"
            )
        if self.prior is not None:
            self.prior.load_drawing_state(state["prior"], state["velocity"])
        self.guard.load(state["totals"], state["skipped"])
        sampler.from_state(state, self.model, self.prior)  # checks what it draws from

    def next_stage(self, workers: Workers) -> Stage:
        """Return the stage of the epoch under way."""
        config = self.config
        due = first_stage_epochs(config) <= self.epoch < config.epochs
        if self.prior is None or not (self.in_prior or due):
            return AutoencoderStage(config, self.data, self.model, workers)
        made = self.make_composites()
        if self.in_prior and len(made.images) != self.composites:
            raise UserError(
                f"{self.folder}: it was begun with {self.composites} composites, and here "
                f"the same photographs give {len(made.images)}; go on with the version that "
                "began it, or --overwrite"
            )
        self.in_prior = True
        self.composites = len(made.images)
        self.best_composites = made.images[: 8 * run_dir.SHOWN : 8].clone()
        stage = PriorStage(config, self.data, made, self.model, self.prior, workers)
        self.data = self.preview  # frees the other photographs
        device.trim_memory()
        return stage

    def make_composites(self) -> Composites:
        """Make the Pegasi that a prior learns from, or say that a first class gives none."""
        data = self.data
        made = composites.none(data.images)
        if len(data.classes) < 2:
            return made
        first = data.classes[0]
        if classifier.knows(first):
            streams.show("making Pegasi of photographs, for the prior to learn from")
            judge = classifier.load(classifier.CHOOSING)
            accelerate(judge)
            made = composites.make(data.images, data.labels, data.classes, judge)
            streams.show("")
        if len(made.images) == 0:
            streams.say(
                f"judge {classifier.CHOOSING} does not know {first}, or not with wings, so "
                "there is nothing to learn them from: Pegasi will be between both classes, "
                "hardly with wings"
            )
        return made

    def state(self, stage: Stage, optimizers: list[Optimizer]) -> dict:
        """Return all that a resume and sample.py need: tensors and plain types."""
        data = self.data
        state = {
            "config": asdict(self.config),
            "classes": list(data.classes),
            "data": {"name": data.name, "digest": data.digest, "folder": data.folder},
            "model": self.model.state_dict(),
            "prior": None,
            "velocity": None,
            "optimizers": [optimizer.state_dict()["state"] for optimizer in optimizers],
            "phase": stage.name,
            "epoch": self.epoch + self.step / self.steps_per_epoch,
            "epochs_done": self.epoch,
            "step": self.step,
            "totals": self.guard.totals,
            "skipped": self.guard.skipped,
            "history": self.history,
            "densities": stage.fit_gaussians(),
            "composites": self.composites,
        }
        if self.prior is not None:
            state["prior"] = self.prior.drawing_state()
            state["velocity"] = self.prior.velocity.state_dict()
        return state

    def save(self, stage: Stage, optimizers: list[Optimizer]) -> None:
        """Write a checkpoint and the pictures of its model."""
        begun = time.monotonic()
        state = self.state(stage, optimizers)
        checkpoint.save(self.last_path, state)
        pictures = (self.preview, self.best_composites)
        run_dir.draw_pictures(self.folder, state, self.model, self.prior, *pictures)
        device.trim_memory()
        self.timer.saved(time.monotonic() - begun)

    def end_epoch(self, stage_name: str, values: dict[str, float], leads: bool) -> None:
        """Add a row to the history and to log.csv; begin the next epoch.

        values: columns of the log. leads: whether this process writes the log.
        """
        row = {"epoch": self.epoch + 1, "phase": stage_name, **values}
        row["skipped"] = self.guard.end_epoch()
        row["data"] = self.data.name
        self.history.append(row)
        if leads:
            progress.append_csv(self.folder / "log.csv", progress.LOG_COLUMNS, row)
        self.epoch += 1
        self.step = 0
