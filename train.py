"""Train a variational autoencoder on CIFAR-10's horses and birds.

    python train.py                               # a convolutional network, 300 epochs, to runs/pegasus
    python train.py --resume                      # goes on where that stopped, to the same bits
    python train.py --run runs/paper --arch mlp   # the paper's recipe

A run's folder holds last.pt, log.csv (nats and squared error an image), speed.csv, config.json and pictures.
"""
import json
import math
import signal
import time
from dataclasses import asdict, replace
from pathlib import Path

import options
import checkpoint
import density
import judge
import log
import pictures
import recipe
import reparam
import sample
import source
import vae
from options import Fault
from group import Group
from recipe import Options

import torch
from torch import Tensor

ORDER, FLIP, NOISE, TEST = range(4)  # purposes of the seeds derived from the run's
COLUMNS = ("epoch", "train_loss", "train_rate", "train_distortion", "test_loss", "test_rate", "test_distortion",
           "test_sse", "bits_per_dim", "data")


def epoch_order(seed: int, epoch: int, n: int) -> Tensor:
    """The permutation of n pictures, a function of (seed, epoch) alone."""
    return torch.randperm(n, generator=torch.Generator().manual_seed(reparam.derive_seed(seed, epoch, ORDER)))


def coins(seed: int, epoch: int, n: int) -> Tensor:
    """n fair coins, bool (n,): whether the epoch's k-th picture is mirrored."""
    return reparam.words(n, 1, torch.tensor(reparam.derive_seed(seed, epoch, FLIP)))[:, 0, 0] % 2 == 1


def gather(images: Tensor, rows: Tensor, mirrored: Tensor | None) -> Tensor:
    """Some images (n, 3, 32, 32) of bytes as a batch in [0, 1], some of them mirrored."""
    x = images.flatten(1).index_select(0, rows).view(-1, *vae.IMAGE)
    if mirrored is not None:
        x = torch.where(mirrored[:, None, None, None], x.flip(3), x)
    return vae.from_bytes(x)


class Training:
    """A run: model, optimizer, how far it is, and its folder."""

    def __init__(self, chosen: Options, data: source.Pictures, state: dict | None, workers: Group):
        self.options, self.folder, self.data, self.workers = chosen, Path(chosen.run), data, workers
        self.images, self.labels = data.images.to(chosen.device), data.labels.to(chosen.device)
        self.test_images = data.test_images.to(chosen.device)
        torch.manual_seed(chosen.seed)
        self.model = vae.VAE(chosen.arch, chosen.likelihood, chosen.latent, chosen.flow).to(chosen.device)
        self.parameters = list(self.model.parameters())
        self.optimizer = torch.optim.Adam(self.parameters, chosen.lr, fused=True)
        self.epoch, self.step, self.history = 0, 0, []  # step: of the epoch that is under way
        self.totals = torch.zeros(3, dtype=torch.float64, device=chosen.device)  # of that epoch so far
        self.asked, self.stop = 0, 0  # the signal that asks this process to leave; once all of them know, to all
        self.saved, self.refit, self.fitted = time.monotonic(), 0.0, {}  # when; the densities last fitted
        self.steps = math.ceil(len(self.images) / chosen.batch_size)  # an epoch
        self.judge = state.get("judge") if state else None  # its state: trained beforehand, and only carried along
        if state:
            self.restore(state)

    def restore(self, state: dict) -> None:
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.epoch, self.step, self.history = state["epochs_done"], state["step"], state["history"]
        self.totals = state["totals"].to(self.options.device)
        torch.set_rng_state(state["rng"])

    def state(self) -> dict:
        """All that a resume and `sample.py` need, as plain types."""
        data = {"name": self.data.name, "digest": self.data.digest, "folder": self.data.folder}
        return {"config": asdict(self.options), "classes": list(self.data.classes), "data": data,
                "model": self.model.state_dict(), "optimizer": self.optimizer.state_dict(),
                "epoch": self.epoch + self.step / self.steps, "epochs_done": self.epoch, "step": self.step,
                "totals": self.totals, "history": self.history, "rng": torch.get_rng_state(),
                "densities": self.densities(), "judge": self.judge}

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.options.device, torch.bfloat16, enabled=self.options.precision == "bfloat16")

    def densities(self) -> dict[str, list[Tensor]]:
        """The classes' latents: at the end of the model as it is, before that anew when it costs 1 % of the time."""
        begun = time.monotonic()
        if self.stop or self.epoch == self.options.epochs or begun >= self.refit:
            with self.autocast():
                self.fitted = density.fit_classes(self.model, self.images, self.labels, self.data.classes)
            self.refit = time.monotonic() + 100 * (time.monotonic() - begun)
        return self.fitted

    def seed(self, step: int, purpose: int) -> Tensor:
        return torch.tensor(reparam.derive_seed(self.options.seed, step, purpose), device=self.options.device)

    def backward(self, x: Tensor, batch: int, first: int, step: int) -> Tensor:
        """Gradients from this process's images (b, 3, 32, 32), rows `first` on of a batch of so many rows.

        Returns their sums of distortion, rate and squared error. The squared error of all processes sets the
        variance, else they would train another objective.
        """
        with self.autocast():
            # convolutions take no empty batch: a process without rows computes one and counts none
            terms = self.model(x if len(x) else x.new_zeros(1, *vae.IMAGE), self.seed(step, NOISE), first)
        terms = vae.Terms(*(term[:len(x)] for term in terms))
        shared = torch.stack([terms.sse.detach().sum(), terms.sse.new_tensor(self.asked > 0)])
        sse, asked = self.workers.total(shared)
        if self.workers.size == 1:  # without looking at `asked`, for which a GPU would have to finish first
            self.stop = self.asked
        elif asked > 0:
            self.stop = self.asked or signal.SIGTERM
        distortion = self.model.distortion(terms.sse, sse / (batch * vae.PIXELS))
        ((distortion + self.options.beta * terms.rate).sum() / batch).backward()
        return torch.stack([distortion.detach().sum(), terms.rate.detach().sum(), terms.sse.detach().sum()])

    def train_step(self, rows: Tensor, mirrored: Tensor | None) -> None:
        """One step of Adam on some rows of the images, added to the epoch's totals."""
        done = self.epoch * self.steps + self.step
        for settings in self.optimizer.param_groups:
            settings["lr"] = recipe.learning_rate(self.options, done / (self.options.epochs * self.steps))
        share = self.workers.share(len(rows))
        x = gather(self.images, rows[share], None if mirrored is None else mirrored[share])
        self.optimizer.zero_grad()
        sums = self.backward(x, len(rows), share.start, done)
        self.workers.total_gradients(self.parameters)
        self.optimizer.step()
        self.totals += self.workers.total(sums)
        self.step += 1

    def numbers(self, images: int) -> dict[str, float]:
        """What the progress line shows of the epoch's first so many images."""
        distortion, rate, _ = (self.totals / images).tolist()
        return {"loss": distortion + self.options.beta * rate, "rate": rate, "distortion": distortion}

    def train_epoch(self, progress: log.Progress) -> None:
        """The rest of the epoch that is under way; leaves early when a signal asks for it."""
        chosen, n = self.options, len(self.images)
        order = epoch_order(chosen.seed, self.epoch, n).to(chosen.device)
        mirrored = coins(chosen.seed, self.epoch, n).to(chosen.device) if chosen.flip else None
        while self.step < self.steps and not self.stop:
            if time.monotonic() - self.saved >= chosen.save_seconds:
                self.save()
            part = slice(self.step * chosen.batch_size, (self.step + 1) * chosen.batch_size)
            self.train_step(order[part], None if mirrored is None else mirrored[part])
            done = min(part.stop, n)
            progress.show(self.epoch + 1, done, lambda done=done: self.numbers(done))

    @torch.no_grad()
    def test(self, batch_size: int = 500) -> tuple[float, ...]:
        """Mean distortion, rate, squared error and bits/dim of the test pictures, with the same noise every time."""
        share, totals = self.workers.share(len(self.test_images)), torch.zeros_like(self.totals[:2])
        for first in range(share.start, share.stop, batch_size):
            part = self.test_images[first:min(first + batch_size, share.stop)]
            with self.autocast():
                terms = self.model(vae.from_bytes(part), self.seed(0, TEST), first)
            totals += torch.stack([terms.rate.sum(), terms.sse.sum()])
        rate, sse = self.workers.total(totals) / len(self.test_images)
        variance = self.model.variance.double()
        numbers = self.model.distortion(sse, variance), rate, sse, vae.bits_per_dim(sse, rate, variance)
        return tuple(number.item() for number in numbers)

    def end_epoch(self, progress: log.Progress) -> None:
        """Measure the variance, test, add a row to the history and to log.csv, begin the next epoch."""
        train = self.numbers(len(self.images))
        self.model.variance.copy_(self.totals[2] / (len(self.images) * vae.PIXELS))
        distortion, rate, sse, bits = self.test()
        values = (*train.values(), distortion + self.options.beta * rate, rate, distortion, sse, bits)
        if not math.isfinite(sum(values)):
            raise Fault(f"{self.folder}: the loss is no longer finite in epoch {self.epoch + 1}; what was saved last "
                        "is still there; begin again with a lower --lr")
        row = dict(zip(COLUMNS, (self.epoch + 1, *values, self.data.name), strict=True))
        self.history.append(row)
        if self.workers.leads:
            log.write(self.folder / "log.csv", COLUMNS, [row], "a")
        self.epoch, self.step = self.epoch + 1, 0
        self.totals.zero_()
        progress.end_epoch(self.epoch, train | {"test loss": values[3], "bits/dim": bits})

    def save(self) -> None:
        """Checkpoint and pictures."""
        self.saved = time.monotonic()
        if self.workers.leads:
            state = self.state()
            checkpoint.save(self.folder / "last.pt", state)
            self.draw(sample.trained(state, self.model))

    @torch.no_grad()
    def draw(self, found: sample.Trained) -> None:
        """The run's pictures: curves, samples, reconstructions (each under its test photograph) and Pegasi."""
        about = found.about | {"seed": 0}
        if self.history:
            words = f"{self.data.name}: {', '.join(self.data.classes)}"
            words = f"{pictures.DRAWN}: {', '.join(self.data.classes)}" if self.data.name == "drawn" else words
            pictures.save(pictures.curves(self.history, words), self.folder / "curves.png", about)
        x = vae.from_bytes(self.test_images[:32]).view(-1, 8, *vae.IMAGE)
        pairs = torch.stack([x, self.model.reconstruct(x.flatten(0, 1)).view(x.shape)], 1).flatten(0, 2)
        sheets = {"reconstructions": pairs, "samples": sample.draw(found, sample.Options(mode="prior"))}
        if len(self.data.classes) > 1:
            sheets["pegasus"] = sample.draw(found)
        for name, images in sheets.items():
            sheet_about = about | {"mode": name}
            pictures.save(sample.page(images, sheet_about), self.folder / f"{name}.png", sheet_about)

    def train(self) -> int:
        """All epochs that are left. Returns the exit status: 0, or 128 plus the signal that stopped it."""
        for signum in (signal.SIGINT, signal.SIGTERM):
            signal.signal(signum, self.ask_to_stop)
        begun = self.epoch * len(self.images) + self.step * self.options.batch_size
        progress = log.Progress(self.options.epochs, len(self.images), begun, self.folder / "speed.csv",
                                quiet=not self.workers.leads)
        while self.epoch < self.options.epochs and not self.stop:
            self.train_epoch(progress)
            if self.step == self.steps:
                self.end_epoch(progress)
        self.save()
        if self.workers.leads:
            left = f"stopped in epoch {self.epoch + 1}; --resume goes on" if self.stop else f"{self.epoch} epochs done"
            print(f"{left}: {self.folder}/last.pt and pictures")
        return 128 + self.stop if self.stop else 0

    def ask_to_stop(self, signum: int, _frame: object) -> None:
        self.asked = signum
        signal.signal(signum, signal.SIG_DFL)  # a second one is not asked twice


def open_run(chosen: Options) -> dict | None:
    """Make the run's folder; the state of the run in it to go on with, or None to begin. Raises Fault."""
    folder = Path(chosen.run)
    folder.mkdir(parents=True, exist_ok=True)
    last = folder / "last.pt"
    if chosen.resume and not chosen.overwrite:
        return checkpoint.load(last) if last.exists() else None
    if not chosen.overwrite and (last.exists() or (folder / "log.csv").exists()):
        raise Fault(f"{folder} holds a run; --resume goes on with it, --overwrite begins anew, --run names another")
    last.unlink(missing_ok=True)
    return None


def check_resume(state: dict, chosen: Options, data: source.Pictures) -> None:
    """Raise Fault where a run can't go on as asked."""
    if data.digest != state["data"]["digest"]:
        raise Fault(f"--data: {data.folder} is not what {chosen.run} was trained on ({state['data']['folder']}); "
                    "give that folder, or another --run")
    done = state["epochs_done"]
    if chosen.epochs < done:
        raise Fault(f"--epochs: got {chosen.epochs}, but {chosen.run} has done {done}; ask for {done} or more, "
                    "--overwrite, or another --run")


def write_run(training: Training) -> None:
    """config.json and the logs as they stand: log.csv anew from the history, so that no row stands there twice."""
    about = {"torch": torch.__version__, "data": training.data.name, "digest": training.data.digest}
    (training.folder / "config.json").write_text(json.dumps(asdict(training.options) | about, indent=2) + "\n")
    log.write(training.folder / "log.csv", COLUMNS, training.history)
    if not training.history:
        log.write(training.folder / "speed.csv", log.SPEED, [])


def main(argv: list[str] | None = None) -> int:
    chosen, given = options.parse(Options, argv, __doc__)
    workers = Group(recipe.device(chosen))
    if workers.restarts:
        chosen = replace(chosen, resume=True, overwrite=False)
    state = workers.first(lambda: open_run(chosen))
    chosen = recipe.settle(chosen, given, state)
    torch.set_num_threads(chosen.threads)
    torch.set_flush_denormal(True)  # numbers below 1e-38 can cost 5 to 40 times as long
    stored = state["data"]["folder"] if state and chosen.data == "auto" else chosen.data
    data = workers.first(lambda: source.load(stored, chosen.classes))
    if state:
        check_resume(state, chosen, data)
    training = Training(chosen, data, state, workers)
    if workers.leads:
        if chosen.judge and not training.judge:
            training.judge = judge.get(Path(data.folder), 0, chosen.device, chosen.precision)
        write_run(training)
        print(f"{len(data.images):,} pictures ({', '.join(data.classes)}) from {data.name}, {chosen.arch}, "
              f"{chosen.precision}, {chosen.threads} threads, {chosen.device}; to {chosen.run}")
    status = training.train()
    workers.leave()
    return status


if __name__ == "__main__":
    options.run(main)
