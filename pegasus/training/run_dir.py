"""A run's folder: who works there, what is there to go on with, what is written there."""
import contextlib
import errno
import json
import os
import socket
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import BinaryIO

import vae
from pegasus import checkpoint, files, streams
from pegasus.cli import UserError
from pegasus.data import datasets
from pegasus.data.datasets import Dataset
from pegasus.drawing import plots, sampler
from pegasus.drawing.sampler import SampleConfig, Sampler
from pegasus.models.flow_prior import FlowPrior
from pegasus.training import progress
from pegasus.training.config import TrainConfig, first_stage_epochs
from vae import VAE

import torch
from torch import Tensor

try:
    import fcntl
except ImportError:  # not on every system
    fcntl = None

JOB = "TORCHELASTIC_RUN_ID"  # of a torchrun, the same at all its restarts
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)
SHOWN = 64  # images on a sheet
YOUNG = 0.2  # of the prior's epochs: before, it draws no Pegasi


@contextlib.contextmanager
def lock(folder: Path) -> Iterator[None]:
    """Make a run's folder and keep other processes from training there.

    The kernel frees the lock of a process that dies; the file `lock` only says who has
    it. Raises UserError.
    """
    with files.writing(folder, "choose another --run"):
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(folder / "lock", os.O_RDWR | os.O_CREAT, 0o666)
    with os.fdopen(descriptor, "r+b", buffering=0) as file:  # closing it frees the lock
        take_lock(folder, file)
        files.sweep(folder)
        with contextlib.suppress(OSError):  # a full disk: the lock holds without a word
            file.truncate(0)
            holder = f"process {os.getpid()} on {socket.gethostname()}, since {time.ctime()}"
            file.write(holder.encode())
        try:
            yield
        finally:
            with contextlib.suppress(OSError):
                (folder / "lock").unlink()  # while it is still locked


def take_lock(folder: Path, file: BinaryIO) -> None:
    """Lock an open file of a folder. Raises UserError where another process has it."""
    if fcntl is None:
        return
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if not os.path.samestat(os.fstat(file.fileno()), os.stat(folder / "lock")):
            raise FileNotFoundError  # its holder removed it, and somebody made another
    except (BlockingIOError, FileNotFoundError):
        holder = file.read(200).decode(errors="replace") or "another process"
        advice = "wait for it, or choose another --run"
        raise UserError(f"{folder}: {holder} trains there; {advice}") from None
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
        warning = "no locks on this file system; start no second run there"
        streams.say(f"{folder}: {warning}")


def read_state(config: TrainConfig) -> dict | None:
    """Return the state of the run to go on with, or None to begin. Raises UserError."""
    folder = Path(config.run)
    last = folder / "last.pt"
    if config.overwrite:
        return None
    if config.resume:
        state = checkpoint.load(last) if last.exists() else None
        if state is not None and "optimizers" not in state:
            raise UserError(
                f"{last}: a small checkpoint, which only draws; --overwrite begins anew, "
                "--run names another"
            )
        return state
    if last.exists() or (folder / "log.csv").exists():
        raise UserError(
            f"{folder} holds a run; --resume goes on with it, --overwrite begins anew, "
            "--run names another"
        )
    return None


def same_job(folder: Path) -> bool:
    """Return whether this torchrun was at work on a run before it lost a process."""
    with contextlib.suppress(OSError, ValueError, TypeError, KeyError):
        about = json.loads((folder / "config.json").read_text())
        return about["torchrun"] == os.environ[JOB]
    return False


def prepare(config: TrainConfig, data: Dataset, history: list[dict]) -> None:
    """Write config.json, and log.csv anew from the history: no row stands there twice.

    With --overwrite the old checkpoint goes; without a history speed.csv begins anew.
    """
    folder = Path(config.run)
    if config.overwrite:  # only now, when nothing speaks against the new run any more
        (folder / "last.pt").unlink(missing_ok=True)
    about = asdict(config) | {
        "torch": torch.__version__,
        "data": data.name,
        "digest": data.digest,
        "torchrun": os.environ.get(JOB),
    }
    with files.replace_file(folder / "config.json") as temporary:
        temporary.write_text(json.dumps(about, indent=2) + "\n")
    progress.write_csv(folder / "log.csv", progress.LOG_COLUMNS, history)
    if not history:
        progress.write_csv(folder / "speed.csv", progress.SPEED_COLUMNS, [])


def describe(config: TrainConfig, data: Dataset, images: int, epochs_done: int) -> str:
    """Return what is trained, in a line or two."""
    lines = []
    if config.prior == "learned":
        first = first_stage_epochs(config)
        rest = config.epochs - first
        lines.append(f"epochs: {first} for the autoencoder, {rest} for the prior of its latents")
    where = f"to {config.run}"
    if epochs_done:
        where += f", where {epochs_done} of {config.epochs} epochs are done"
    lines.append(
        f"{images:,} pictures ({', '.join(data.classes)}) from {data.name}, "
        f"{config.size} x {config.size}, {config.arch}, {config.precision}, "
        f"{config.threads} threads, {config.device}; {where}"
    )
    return "\n".join(lines)


def preview_data(data: Dataset) -> Dataset:
    """Return the few of the data that a run's pictures show: test pictures."""
    # again from the start where there are fewer
    test = torch.arange(SHOWN // 2) % len(data.test_images)
    return replace(
        data,
        images=data.images[:0].clone(),
        labels=data.labels[:0].clone(),
        test_images=data.test_images[test],
        test_labels=data.test_labels[test],
    )


@torch.no_grad()
def draw_pictures(
    folder: Path,
    state: dict,
    model: VAE,
    prior: FlowPrior | None,
    preview: Dataset,
    best_composites: Tensor,
) -> None:
    """Draw a run's curves, reconstructions, samples and Pegasi. Raises UserError.

    best_composites: bytes, to show until the prior draws its own Pegasi.
    """
    source = sampler.from_state(state, model, prior)
    about = source.about | {"seed": 0}
    if state["history"]:
        name = plots.SYNTHETIC if datasets.is_synthetic(preview.name) else preview.name
        caption = f"{name}: {', '.join(preview.classes)}"
        plots.save(plots.curves(state["history"], caption), folder / "curves.png", about)
    # reconstructions do not come from the prior: no caption about it
    without_prior = {key: value for key, value in about.items() if key != "prior"}
    pairs = reconstruction_pairs(model, preview)
    save_sheet(folder, "reconstructions", pairs, without_prior)
    samples = sampler.sample(source, SampleConfig(mode="prior"))
    save_sheet(folder, "samples", samples, about)
    if len(preview.classes) > 1:
        draw_pegasi(folder, state, source, best_composites, about)


def is_young(state: dict) -> bool:
    """Return whether a run's prior is still to learn what a Pegasus is."""
    config = TrainConfig(**state["config"])
    first = first_stage_epochs(config)
    return state["epoch"] < first + YOUNG * (config.epochs - first)


def draw_pegasi(
    folder: Path, state: dict, source: Sampler, best_composites: Tensor, about: dict
) -> None:
    """Draw Pegasi, or rebuild composites while the prior is young."""
    if len(best_composites) and is_young(state):
        x = vae.from_bytes(best_composites.to(source.model.variance.device))
        images = source.model.reconstruct(x)
        about = about | {"prior": sampler.PREVIEW}
    else:
        images = sampler.sample(source, SampleConfig())
    save_sheet(folder, "pegasus", images, about)


def reconstruction_pairs(model: VAE, preview: Dataset) -> Tensor:
    """Return rows of eight test photographs, each row above its reconstructions."""
    x = vae.from_bytes(preview.test_images.to(model.variance.device))
    pairs = torch.stack([x, model.reconstruct(x)])
    return pairs.unflatten(1, (-1, 8)).transpose(0, 1).flatten(0, 2)


def save_sheet(folder: Path, name: str, images: Tensor, about: dict) -> None:
    sheet = sampler.page(images, about)
    plots.save(sheet, folder / f"{name}.png", about | {"mode": name})
