"""Train a variational autoencoder on CIFAR-10's horses and birds.

    python train.py                               # a convolutional network, 300 epochs, to runs/pegasus
    python train.py --resume                      # goes on where that stopped, to the same bits
    python train.py --run runs/paper --arch mlp   # the paper's recipe

A run's folder holds last.pt, log.csv (nats and squared error an image), speed.csv, config.json and pictures.
"""
import contextlib
import math
import signal
import time
from dataclasses import asdict, replace
from pathlib import Path

import options
import checkpoint
import compose
import density
import folder
import judge
import log
import phases
import prior
import recipe
import replay
import sample
import source
import vae
from options import Fault
from group import Group
from recipe import Options

import torch
from torch import Tensor

PATIENCE = 10  # steps skipped in a row before a run stops
NOHUP = signal.getsignal(signal.SIGHUP) != signal.SIG_DFL
STOP = [signal.SIGINT, signal.SIGTERM] + ([] if NOHUP else [signal.SIGHUP])


class Training:
    """A run: model, optimizer, how far it is, and its folder."""

    def __init__(self, chosen: Options, data: source.Pictures, state: dict | None, workers: Group):
        self.options, self.folder, self.data, self.workers = chosen, Path(chosen.run), data, workers
        self.images, self.shown = len(data.images), folder.shown(data)
        torch.manual_seed(chosen.seed)
        self.model = vae.build(asdict(chosen)).to(chosen.device)
        learned = chosen.prior == "learned"
        self.learned = prior.Learned(self.model.shape, len(data.classes)).to(chosen.device) if learned else None
        self.epoch, self.step, self.history = 0, 0, []  # step: of the epoch that is under way
        self.totals = torch.zeros(phases.SUMS, dtype=torch.float64, device=chosen.device)  # of that epoch so far
        self.ahead = False  # whether a step was taken since the last save: a run killed again and again gets on
        self.asked, self.stop = 0, 0  # the signal that this process got; the one at which all have agreed to stop
        self.skipped = torch.zeros(3, dtype=torch.int64, device=chosen.device)  # steps, their images; steps in a row
        self.begun, self.saved, self.cost = time.monotonic(), time.monotonic(), 0.0  # cost: seconds that saving took
        self.refit, self.fitted, self.fitted_at = 0.0, {}, None  # densities: time of the next fit; the last; its place
        self.steps = math.ceil(self.images / chosen.batch_size)  # an epoch
        self.judge = state and state["judge"]  # its state; None until it is trained, when the run ends
        self.bank = None  # parts of Pegasi, drawn by the finished prior, and drawn anew once it has learned more
        if state:
            self.restore(state)
        else:
            self.enter()

    def enter(self, begun: bool = False) -> None:
        """Begin the phase of `self.epoch`; begun: the prior's had begun when the run was saved."""
        chosen, self.replay = self.options, None  # the graph of the last phase's step holds a GPU's memory
        if self.learned and (begun or recipe.split(chosen) <= self.epoch < chosen.epochs):
            self.densities(now=True)
            self.phase = phases.Prior(chosen, self.data, self.model, self.learned, self.workers)
            self.data = self.shown  # frees the other photographs: the prior trains on their posteriors
        else:
            self.phase = phases.Autoencoder(chosen, self.data, self.model, self.workers)
        self.optimizer = self.phase.optimizer
        if chosen.device != "cpu" and self.workers.size == 1 and self.images >= chosen.batch_size:
            self.replay = replay.Replay()
        phases.trim()

    def restore(self, state: dict) -> None:
        """Go on from there; what does not fit raises one of the errors that `checkpoint.fitting` knows."""
        self.model.load_state_dict(state["model"])
        self.epoch, self.step, self.history = state["epochs_done"], state["step"], state["history"]
        known = all(set(row) <= set(log.COLUMNS) for row in self.history)
        if not known or len(self.history) != self.epoch or self.step not in range(self.steps):
            raise ValueError(f"{self.epoch} epochs and {self.step} steps do not fit a history of {len(self.history)}")
        if self.learned:
            self.learned.load(state["prior"], state["velocity"])
        self.bank = state["bank"] if self.epoch == self.options.epochs else None
        self.enter(state["phase"] == "prior")
        if state["phase"] == self.phase.name:
            self.optimizer.load_state_dict(state["optimizer"])
        self.totals.copy_(state["totals"])
        self.skipped.copy_(state["skipped"])
        self.skipped[2] %= PATIENCE  # or, saved just before it gave up, a run would never take a step again
        sample.trained(state, self.model, self.learned)  # for its checks: the next save draws from the same

    def state(self) -> dict:
        """All that a resume and `sample.py` need, as plain types."""
        data = {"name": self.data.name, "digest": self.data.digest, "folder": self.data.folder}
        return {"config": asdict(self.options), "classes": list(self.data.classes), "data": data,
                "model": self.model.state_dict(), "optimizer": self.optimizer.state_dict(),
                "epoch": self.epoch + self.step / self.steps, "epochs_done": self.epoch, "step": self.step,
                "phase": self.phase.name, "prior": self.learned.drawing() if self.learned else None,
                "velocity": self.learned.velocity.state_dict() if self.learned else None,
                "totals": self.totals, "skipped": self.skipped, "history": self.history,
                "densities": self.densities(), "judge": self.judge, "bank": self.bank}

    def densities(self, now: bool = False) -> dict[str, list[Tensor]]:
        """Gaussians of the classes' latents: fitted anew if `now`, stopping or done, else for 0.5 % of the time."""
        begun, place = time.monotonic(), min((self.epoch, self.step), (recipe.split(self.options), 0))
        if place != self.fitted_at and (now or self.stop or self.epoch == self.options.epochs or begun >= self.refit):
            with phases.autocast(self.options):
                self.fitted = density.fit_classes(self.model, self.data.images, self.data.labels, self.data.classes)
            phases.trim()
            self.fitted_at, self.refit = place, time.monotonic() + 200 * (time.monotonic() - begun)
        return self.fitted

    def train_step(self, rows: Tensor, mirrored: Tensor | None) -> None:
        """One step of Adam on some rows of the images, added to the epoch's totals. Raises Fault when none is taken."""
        done, phase = self.epoch * self.steps + self.step, self.phase
        seeds = phases.purpose_seeds(self.options, done, *phase.purposes)
        inputs = rows, mirrored, seeds, phases.pace(phase, done, self.steps)
        whole = len(rows) == self.options.batch_size
        sums = self.replay(self.compute, *inputs) if self.replay and whole else self.compute(*inputs)
        if self.workers.size == 1:  # without looking at the flag, for which a GPU would have to finish first
            self.stop = self.asked
        elif sums[-1] > 0:
            self.stop = self.asked or signal.SIGTERM
        self.step, self.ahead = self.step + 1, True
        if (self.step % PATIENCE == 0 or self.step == self.steps) and (in_a_row := int(self.skipped[2])) >= PATIENCE:
            epoch, step = (i + 1 for i in divmod(self.epoch * self.steps + self.step - in_a_row, self.steps))
            raise Fault(f"{self.folder}: gradient or loss not finite in {PATIENCE} steps in a row, from epoch {epoch}, "
                        f"step {step} on; what was saved last is still there; begin again with a lower {phase.flag}")

    def compute(self, rows: Tensor, mirrored: Tensor | None, seeds: Tensor, scalars: Tensor) -> Tensor:
        """The device's part of a step; scalars: as `phases.pace`. Returns sums and how many processes want to stop."""
        phase, share = self.phase, self.workers.share(len(rows))
        self.optimizer.lr, progress = scalars
        self.optimizer.zero_grad()
        mirrored = None if mirrored is None else mirrored[share]
        sums = phase.backward(rows[share], mirrored, len(rows), share.start, seeds, progress)
        sums = self.workers.total(torch.cat([sums, sums.new_full((1,), self.asked > 0)]))
        self.workers.total_gradients([trained for _, trained in self.optimizer.pairs])
        self.update(sums[:-1], len(rows))
        if phase.name == "prior":
            self.learned.update_average(self.optimizer.steps)
        return sums

    def update(self, sums: Tensor, images: int) -> None:
        """Adam's step and the epoch's totals: neither where the gradient's norm or the loss is not finite.

        Decided on the device, so that nothing waits for it, and from what all processes share, so that all do the
        same. After PATIENCE such steps in a row none is taken any more, so that `train_step` may look late.
        """
        norm = self.optimizer.norm()
        bad = ~(norm + sums.sum()).isfinite() | (self.skipped[2] >= PATIENCE)
        self.optimizer.found_inf = bad.float()  # fused Adam then leaves weights, moments and its count of steps alone
        if self.phase.max_norm:  # fused Adam divides gradients by its grad_scale
            self.optimizer.grad_scale = (norm / self.phase.max_norm).clamp(min=1.0)
        self.optimizer.step()
        self.totals += torch.where(bad, 0, sums)
        self.skipped[:2] += torch.stack([bad, bad * images])
        self.skipped[2].add_(1).mul_(bad)

    def means(self, images: int) -> list[float]:
        """Means over the epoch's first `images` images, without those of skipped steps."""
        return (self.totals / (images - self.skipped[1])).tolist()

    def train_epoch(self, progress: log.Progress) -> None:
        """The rest of the epoch that is under way; leaves early when a signal asks for it."""
        chosen, n = self.options, self.images
        order = phases.epoch_order(chosen.seed, self.epoch, n).to(chosen.device)
        mirrored = phases.coins(chosen.seed, self.epoch, n).to(chosen.device) if chosen.flip else None
        while self.step < self.steps and not self.stop:
            if self.ahead and time.monotonic() - self.saved >= self.pause():
                self.save()
            part = slice(self.step * chosen.batch_size, (self.step + 1) * chosen.batch_size)
            self.train_step(order[part], None if mirrored is None else mirrored[part])
            done = min(part.stop, n)
            progress.show(self.epoch + 1, done, lambda done=done: self.phase.metrics(self.means(done)))

    def end_epoch(self, progress: log.Progress) -> None:
        """Test, add a row to the history and to log.csv, begin the next epoch."""
        means = self.means(self.images)
        values = self.phase.end_epoch(means)
        if not math.isfinite(sum(values.values())):
            raise Fault(f"{self.folder}: the loss is no longer finite in epoch {self.epoch + 1}; what was saved last "
                        f"is still there; begin again with a lower {self.phase.flag}")
        row = {"epoch": self.epoch + 1, "phase": self.phase.name, **values, "skipped": int(self.skipped[0]),
               "data": self.data.name}
        self.history.append(row)
        if self.workers.leads:
            log.write(self.folder / "log.csv", log.COLUMNS, [row], "a")
        self.epoch, self.step = self.epoch + 1, 0
        self.totals.zero_()
        self.skipped[:2] = 0
        extra = {"bits/dim": values["bits_per_dim"]} if "bits_per_dim" in values else {}
        progress.end_epoch(self.epoch, self.phase.metrics(means) | {"test loss": values["test_loss"]} | extra)

    def pause(self) -> float:
        """Seconds between checkpoints: as asked, else 1 to 10 minutes, such that saving takes 0.5 % of a long run."""
        seldom = min(200 * self.cost, (time.monotonic() - self.begun) / 3)  # at first somebody may be watching
        return min(max(60.0, seldom), 600.0) if self.options.save_seconds is None else self.options.save_seconds

    def save(self) -> None:
        """Checkpoint and pictures."""
        if self.workers.leads:
            state, begun = self.state(), time.monotonic()
            checkpoint.save(self.folder / "last.pt", state)
            folder.draw(self.folder, state, self.model, self.learned, self.shown)
            self.cost = time.monotonic() - begun
            phases.trim()
        self.saved, self.ahead = time.monotonic(), False

    def train_phase(self) -> None:
        """The epochs that are left of a phase; leaves early when a signal asks for it."""
        last, images, chosen = self.phase.first + self.phase.epochs, self.images, self.options
        later = 0.0  # seconds that the phase after this one takes, by a few of its steps
        if self.learned and self.phase.name == "autoencoder" and self.workers.leads:
            step = prior.step_seconds(self.learned.velocity, min(chosen.batch_size, images), phases.autocast(chosen),
                                      captured=self.replay is not None)
            later = (chosen.epochs - last) * self.steps * step
        progress = log.Progress(last, chosen.epochs, images, self.epoch * images + self.step * chosen.batch_size,
                                later, self.folder / "speed.csv", quiet=not self.workers.leads)
        while self.epoch < last and not self.stop:
            self.train_epoch(progress)
            if self.step == self.steps:
                self.end_epoch(progress)

    def train(self) -> int:
        """All epochs that are left. Returns the exit status: 0, or 128 plus the signal that stopped it."""
        for signum in STOP:
            signal.signal(signum, self.ask_to_stop)
        while self.epoch < self.options.epochs and not self.stop:
            self.train_phase()
            if self.epoch < self.options.epochs and not self.stop:
                self.enter()
        self.save()
        if self.workers.leads:
            print(f"{self.epoch} epochs done{', then stopped; --resume goes on' if self.stop else ''}: "
                  f"{self.folder}/last.pt and pictures")
        return 128 + self.stop if self.stop else 0

    def add(self) -> None:
        """Put judge and parts for Pegasi into the checkpoint of a finished run, which draws without them already."""
        for signum in STOP:
            signal.signal(signum, signal.default_int_handler if signum == signal.SIGINT else signal.SIG_DFL)
        self.phase, self.replay, self.data = type(self.phase), None, self.shown  # its name is enough; frees memory
        self.optimizer.zero_grad()
        phases.trim()
        if self.options.judge and not self.judge:
            self.judge = judge.get(Path(self.data.folder), 0, self.options.device, self.options.precision)
            self.save()
        if self.options.judge and self.phase.name == "prior" and len(self.data.classes) > 1 and not self.bank:
            print("drawing the parts of Pegasi, a minute or several; cut off, --resume does it", flush=True)
            self.bank = compose.prepare(self.model, self.learned, judge.from_state(self.judge), self.data.classes)
            self.save()

    def ask_to_stop(self, signum: int, _frame: object) -> None:
        self.asked = signum  # a second SIGINT or SIGTERM ends the process at once; but terminals hang up twice
        signal.signal(signum, signal.SIG_IGN if signum == signal.SIGHUP else signal.SIG_DFL)


def begin(chosen: Options, given: set[str], workers: Group) -> Training:
    """The run that is asked for, begun or about to go on. Raises Fault."""
    torch.set_flush_denormal(True)  # denormals take 5 to 40 times as long; threads inherit it from who starts them
    state = workers.first(lambda: folder.open_run(chosen))
    last = Path(chosen.run) / "last.pt" if state else None
    with checkpoint.fitting(last):
        known = state and {key: str(state["data"][key]) for key in ("folder", "digest")}
        chosen = recipe.settle(chosen, given, state)
    torch.set_num_threads(chosen.threads)
    torch.backends.cudnn.deterministic = True  # a resumed run is to have the same bits
    data = workers.first(lambda: source.load(chosen.data, chosen.classes, known))
    with checkpoint.fitting(last):
        return Training(chosen, data, state, workers)


def main(argv: list[str] | None = None) -> int:
    chosen, given = options.parse(Options, argv, __doc__)
    workers = Group(recipe.device(chosen))
    if workers.restarts and folder.same_job(Path(chosen.run)):
        chosen = replace(chosen, resume=True, overwrite=False)
    with folder.lock(Path(chosen.run)) if workers.leads else contextlib.nullcontext():
        try:  # a process that ends without leaving its group may abort, and hide why
            training = begin(chosen, given, workers)
            if workers.leads:
                folder.describe(training.options, training.data, training.images, training.history)
            status = training.train()
        finally:
            workers.leave()
        if workers.leads and status == 0 and not training.asked:
            training.add()
    return status


if __name__ == "__main__":
    options.run(main)
