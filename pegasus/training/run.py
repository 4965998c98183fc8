"""The state of a run: how far it is, what it has learned, when it is saved."""
import math
import time
from dataclasses import asdict
from pathlib import Path

from pegasus import checkpoint, device
from pegasus.data.datasets import Dataset
from pegasus.drawing import sampler
from pegasus.models import variants
from pegasus.models.flow_prior import FlowPrior
from pegasus.training import progress, run_dir
from pegasus.training.accelerate import accelerate
from pegasus.training.config import TrainConfig, first_stage_epochs
from pegasus.training.distributed import Workers
from pegasus.training.guard import StepGuard
from pegasus.training.stages import AutoencoderStage, PriorStage, Stage

import torch
from torch.optim import Optimizer


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
        self.image_count = len(data.images)
        self.model = variants.build(asdict(config)).to(config.device)
        self.prior = None
        if config.prior == "learned":
            prior = FlowPrior(self.model.latent_shape, len(data.classes))
            self.prior = prior.to(config.device)
            accelerate(self.prior)
        accelerate(self.model)
        self.epoch = 0
        self.step = 0  # of the epoch that is under way
        self.history = []  # rows of log.csv
        self.guard = StepGuard(config.device)
        self.timer = SaveTimer(config.save_seconds)
        self.parts = None  # of Pegasi, drawn when the run ends

    @property
    def folder(self) -> Path:
        return Path(self.config.run)

    @property
    def last_path(self) -> Path:
        return self.folder / "last.pt"

    @property
    def steps_per_epoch(self) -> int:
        return math.ceil(self.image_count / self.config.batch_size)

    @property
    def steps_done(self) -> int:
        """Steps of the whole run that are done."""
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
        if self.epoch == self.config.epochs:  # else they are drawn again at the end
            self.parts = state["bank"]
        sampler.from_state(state, self.model, self.prior)  # checks what it draws from

    def next_stage(self, workers: Workers, state: dict | None = None) -> Stage:
        """Return the stage of the epoch under way, or of a checkpoint's state."""
        config = self.config
        begun = state is not None and state["phase"] == "prior"
        due = first_stage_epochs(config) <= self.epoch < config.epochs
        if self.prior is not None and (begun or due):
            stage = PriorStage(config, self.data, self.model, self.prior, workers)
            self.data = self.preview  # frees the other photographs
        else:
            stage = AutoencoderStage(config, self.data, self.model, workers)
        device.trim_memory()
        return stage

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
            "bank": self.parts,
        }
        if self.prior is not None:
            state["prior"] = self.prior.drawing_state()
            state["velocity"] = self.prior.velocity.state_dict()
        return state

    def save(self, stage: Stage, optimizers: list[Optimizer]) -> dict:
        """Write checkpoint and pictures; return the checkpoint's state."""
        begun = time.monotonic()
        state = self.state(stage, optimizers)
        self.write(state)
        self.timer.saved(time.monotonic() - begun)
        return state

    def write(self, state: dict) -> None:
        """Write a checkpoint and the pictures of its model."""
        checkpoint.save(self.last_path, state)
        run_dir.draw_pictures(self.folder, state, self.model, self.prior, self.preview)
        device.trim_memory()

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
