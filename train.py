"""Train a variational autoencoder on CIFAR-10's horses and birds.

    python train.py                                        # the paper's recipe, 300 epochs, to runs/pegasus
    python train.py --resume                               # goes on where that stopped, to the same bits
    python train.py --run runs/other --schedule onecycle --lr 2e-3 --flip

A run's folder holds last.pt, log.csv (nats and squared error an image), speed.csv, config.json and pictures.
"""
import json
import math
import signal
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import options
import checkpoint
import log
import pictures
import reparam
import sample
import source
import vae
from options import Fault, option

import torch
from torch import Tensor

ORDER, FLIP, NOISE, TEST = range(4)  # purposes of the seeds derived from the run's
COLUMNS = ("epoch", "train_loss", "train_rate", "train_distortion", "test_loss", "test_rate", "test_distortion",
           "test_sse", "data")
FREE = {"epochs", "run", "resume", "overwrite", "threads", "device", "save_seconds"}  # may change on resume


@dataclass(frozen=True)
class Options:
    data: str = option("auto", "auto ($CIFAR10_DIR, data/cifar-10-batches-bin, the download, else drawn pictures), "
                       "cifar10 (the download), drawn, or a folder of CIFAR-10's binary batches")
    classes: str = option("horse,bird", "CIFAR-10 classes, separated by commas; the first two make the Pegasus")
    arch: str = option("mlp", "network; mlp is the paper's", choices=tuple(vae.NETWORKS))
    likelihood: str = option("mse", "distortion; mse is the paper's squared error", choices=tuple(vae.LIKELIHOODS))
    latent: int = option(128, "latent dimensions", least=1)
    beta: float = option(1.0, "weight of the rate in the loss", least=0.0)
    schedule: str = option("constant", "learning rate over the run", choices=("constant", "onecycle"))
    epochs: int = option(300, "passes over the training pictures", least=1)
    batch_size: int = option(128, "pictures a step", least=1)
    lr: float = option(1e-3, "Adam's learning rate, under onecycle its peak", above=0.0)
    flip: bool = option(False, "mirror half of the pictures")
    seed: int = option(0, "decides everything random")
    run: str = option("runs/pegasus", "folder of the run")
    resume: bool = option(False, "go on with the run in the folder, or start it")
    overwrite: bool = option(False, "begin anew in a folder that holds a run")
    threads: int = option(0, "CPU threads; 0 is one a core", least=0)
    precision: str = option("auto", "of matrix products; auto is bfloat16 where the processor computes with it",
                            choices=("auto", "float32", "bfloat16"))
    device: str = option("auto", "auto is cuda where there is one", choices=("auto", "cpu", "cuda"))
    save_seconds: float = option(60.0, "seconds between checkpoints", least=0.0)


def resolve(chosen: Options) -> Options:
    """Options with every `auto` decided for this machine."""
    device = chosen.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    elif device == "cuda" and not torch.cuda.is_available():
        raise Fault("--device: got cuda, but torch finds no CUDA device; use --device cpu")
    fast = torch.cuda.is_bf16_supported() if device == "cuda" else torch.ops.mkldnn._is_mkldnn_bf16_supported()
    precision = ("bfloat16" if fast else "float32") if chosen.precision == "auto" else chosen.precision
    return replace(chosen, device=device, precision=precision, threads=chosen.threads or torch.get_num_threads())


def settle(chosen: Options, given: set[str], state: dict | None) -> Options:
    """The options of this start: on resume the run's own, except those that may change. Raises Fault for others."""
    if state is None:
        return resolve(chosen)
    stored = state["config"]
    for name in sorted(given - FREE - {"data"}):
        got = getattr(chosen, name)
        if got not in (stored[name], "auto"):
            flag = name.replace("_", "-")
            raise Fault(f"--{flag}: got {got}, but the run in {chosen.run} has {stored[name]}; leave it, use another "
                        "--run, or --overwrite")
    free = {name: getattr(chosen, name) for name in FREE & (given | {"run", "resume", "overwrite"})}
    return resolve(replace(Options(**stored), **free, **({"data": chosen.data} if chosen.data != "auto" else {})))


def learning_rate(chosen: Options, progress: float) -> float:
    """The learning rate when `progress`, 0 to 1, of the run is done.

    onecycle: a tenth of the run up from a 25th of the peak, then half a cosine down (Smith and Topin 2018).
    """
    if chosen.schedule == "constant":
        return chosen.lr
    if progress < 0.1:
        return chosen.lr * (0.04 + 0.96 * progress / 0.1)
    return chosen.lr * (0.5 + 0.5 * math.cos(math.pi * (progress - 0.1) / 0.9))


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

    def __init__(self, chosen: Options, data: source.Pictures, state: dict | None):
        self.options, self.folder, self.data = chosen, Path(chosen.run), data
        self.images, self.labels = data.images.to(chosen.device), data.labels.to(chosen.device)
        self.test_images = data.test_images.to(chosen.device)
        torch.manual_seed(chosen.seed)
        self.model = vae.VAE(chosen.arch, chosen.likelihood, chosen.latent).to(chosen.device)
        self.optimizer = torch.optim.Adam(self.model.parameters(), chosen.lr, fused=True)
        self.epoch, self.step, self.history = 0, 0, []  # step: of the epoch that is under way
        self.totals = torch.zeros(3, dtype=torch.float64, device=chosen.device)  # of that epoch so far
        self.stop, self.saved = 0, time.monotonic()  # the signal that asks to leave; when last.pt was written
        self.steps = math.ceil(len(self.images) / chosen.batch_size)  # an epoch
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
                "totals": self.totals, "history": self.history, "rng": torch.get_rng_state(), "means": self.means()}

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.options.device, torch.bfloat16, enabled=self.options.precision == "bfloat16")

    def means(self) -> Tensor:
        with self.autocast():
            return vae.class_means(self.model, self.images, self.labels, len(self.data.classes)).cpu()

    def seed(self, step: int, purpose: int) -> Tensor:
        return torch.tensor(reparam.derive_seed(self.options.seed, step, purpose), device=self.options.device)

    def train_step(self, x: Tensor) -> None:
        """One step of Adam on a batch (B, 3, 32, 32), added to the epoch's totals."""
        done = self.epoch * self.steps + self.step
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.options, done / (self.options.epochs * self.steps))
        with self.autocast():
            terms = self.model(x, self.seed(done, NOISE))
        loss = (terms.distortion + self.options.beta * terms.rate).mean()
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.totals += torch.stack([term.detach().sum() for term in terms])
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
            self.train_step(gather(self.images, order[part], None if mirrored is None else mirrored[part]))
            done = min(part.stop, n)
            progress.show(self.epoch + 1, done, lambda done=done: self.numbers(done))

    @torch.no_grad()
    def test(self, batch_size: int = 500) -> list[float]:
        """Mean distortion, rate and squared error of the test pictures, with the same noise every time."""
        total, first = torch.zeros(3, dtype=torch.float64, device=self.options.device), 0
        for part in self.test_images.split(batch_size):
            with self.autocast():
                terms = self.model(vae.from_bytes(part), self.seed(0, TEST), first)
            total, first = total + torch.stack([term.sum() for term in terms]), first + len(part)
        return (total / first).tolist()

    def end_epoch(self, progress: log.Progress) -> None:
        """Test, add a row to the history and to log.csv, begin the next epoch."""
        train, test = self.numbers(len(self.images)), self.test()
        values = (*train.values(), test[0] + self.options.beta * test[1], test[1], test[0], test[2])
        if not math.isfinite(sum(values)):
            raise Fault(f"{self.folder}: the loss is no longer finite in epoch {self.epoch + 1}; what was saved last "
                        "is still there; begin again with a lower --lr")
        row = dict(zip(COLUMNS, (self.epoch + 1, *values, self.data.name), strict=True))
        self.history.append(row)
        log.write(self.folder / "log.csv", COLUMNS, [row], "a")
        self.epoch, self.step = self.epoch + 1, 0
        self.totals.zero_()
        progress.end_epoch(self.epoch, train | {"test loss": values[3]})

    def save(self) -> None:
        """Checkpoint and pictures."""
        state = self.state()
        checkpoint.save(self.folder / "last.pt", state)
        self.draw(sample.trained(state, self.model))
        self.saved = time.monotonic()

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
        sheets = {"reconstructions": pairs, "samples": sample.draw(found, "prior")}
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
        progress = log.Progress(self.options.epochs, len(self.images), begun, self.folder / "speed.csv")
        while self.epoch < self.options.epochs and not self.stop:
            self.train_epoch(progress)
            if self.step == self.steps:
                self.end_epoch(progress)
        self.save()
        left = f"stopped in epoch {self.epoch + 1}; --resume goes on" if self.stop else f"{self.epoch} epochs done"
        print(f"{left}: {self.folder}/last.pt and pictures")
        return 128 + self.stop if self.stop else 0

    def ask_to_stop(self, signum: int, _frame: object) -> None:
        self.stop = signum
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
    state = open_run(chosen)
    chosen = settle(chosen, given, state)
    torch.set_num_threads(chosen.threads)
    torch.set_flush_denormal(True)  # numbers below 1e-38 can cost 5 to 40 times as long
    stored = state["data"]["folder"] if state and chosen.data == "auto" else chosen.data
    data = source.load(stored, chosen.classes)
    if state:
        check_resume(state, chosen, data)
    training = Training(chosen, data, state)
    write_run(training)
    print(f"{len(data.images):,} pictures ({', '.join(data.classes)}) from {data.name}, {chosen.arch}, "
          f"{chosen.precision}, {chosen.threads} threads, {chosen.device}; to {chosen.run}")
    return training.train()


if __name__ == "__main__":
    options.run(main)
