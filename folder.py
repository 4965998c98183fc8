"""A run's folder: who works there, what is there to go on with, and what is written when a run begins."""
import contextlib
import errno
import fcntl
import json
import os
import socket
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path

import options
import checkpoint
import compose
import log
import pictures
import prior
import recipe
import sample
import source
import vae
from options import Fault
from recipe import Options

import torch

JOB = "TORCHELASTIC_RUN_ID"  # of a torchrun, the same at all its restarts


@contextlib.contextmanager
def lock(folder: Path) -> Iterator[None]:
    """Make a run's folder and keep every other process from training there inside a `with`. Raises Fault.

    The kernel frees the lock of a process that dies, however it dies; the file `lock` only says who has it.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = os.open(folder / "lock", os.O_RDWR | os.O_CREAT, 0o666)
    except OSError as error:
        raise Fault(f"{folder}: can't be written ({error.strerror}); choose another --run") from None
    with os.fdopen(file, "r+b", buffering=0) as held:  # closing it frees the lock
        try:
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if not os.path.samestat(os.fstat(file), os.stat(folder / "lock")):
                raise FileNotFoundError  # between the two its holder took the file along, and somebody made another
        except (BlockingIOError, FileNotFoundError):
            holder = held.read(200).decode(errors="replace") or "another process"
            raise Fault(f"{folder}: {holder} trains there; wait for it, or choose another --run") from None
        except OSError as error:
            if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):  # a file system without locks
                raise
            print(f"{folder}: no locks on this file system; start no second run there", file=sys.stderr)
        with contextlib.suppress(OSError):  # a full disk: the lock holds without a word
            held.truncate(0)
            held.write(f"process {os.getpid()} on {socket.gethostname()}, since {time.ctime()}".encode())
        try:
            yield
        finally:
            with contextlib.suppress(OSError):
                (folder / "lock").unlink()  # while it is still locked


def open_run(chosen: Options) -> dict | None:
    """The state of the run in a folder to go on with, or None to begin. Raises Fault."""
    folder = Path(chosen.run)
    last = folder / "last.pt"
    if chosen.resume and not chosen.overwrite:
        state = checkpoint.load(last) if last.exists() else None
        if state is not None and "optimizer" not in state:
            raise Fault(f"{last}: a small checkpoint, which only draws; --overwrite begins anew, --run names another")
        return state
    if not chosen.overwrite and (last.exists() or (folder / "log.csv").exists()):
        raise Fault(f"{folder} holds a run; --resume goes on with it, --overwrite begins anew, --run names another")
    return None


def same_job(folder: Path) -> bool:
    """Whether this torchrun was at work on a run before it lost a process."""
    with contextlib.suppress(OSError, ValueError, TypeError, KeyError):
        return json.loads((folder / "config.json").read_text())["torchrun"] == os.environ[JOB]
    return False


def describe(chosen: Options, data: source.Pictures, images: int, history: list[dict]) -> None:
    """Print what is trained; write config.json, and log.csv anew from the history so that no row stands there twice.

    images: how many there are to train on, of which `data` may be those that are shown.
    """
    folder = Path(chosen.run)
    if chosen.overwrite:  # only now, when nothing speaks against the new run any more
        (folder / "last.pt").unlink(missing_ok=True)
    about = {"torch": torch.__version__, "data": data.name, "digest": data.digest, "torchrun": os.environ.get(JOB)}
    with options.replacing(folder / "config.json") as beside:
        beside.write_text(json.dumps(asdict(chosen) | about, indent=2) + "\n")
    log.write(folder / "log.csv", log.COLUMNS, history)
    if not history:
        log.write(folder / "speed.csv", log.SPEED, [])
    if chosen.prior == "learned":
        part = recipe.split(chosen)
        print(f"{part} epochs for the autoencoder, {chosen.epochs - part} for the prior of its latents")
    print(f"{images:,} pictures ({', '.join(data.classes)}) from {data.name}, {chosen.arch}, "
          f"{chosen.precision}, {chosen.threads} threads, {chosen.device}; to {chosen.run}"
          + (f", where {len(history)} epochs are done" if history else ""), flush=True)


def shown(data: source.Pictures) -> source.Pictures:
    """The few of the data that `draw` looks at."""
    few = torch.cat([(data.labels == i).nonzero()[:compose.CANDIDATES, 0] for i in (0, 1)])
    some = torch.arange(32) % len(data.test_images)  # again from the start where there are fewer
    return replace(data, images=data.images[few], labels=data.labels[few], test_images=data.test_images[some])


@torch.no_grad()
def draw(folder: Path, state: dict, model: vae.VAE, learned: prior.Learned | None, data: source.Pictures) -> None:
    """A run's pictures: curves, reconstructions (each under its test photograph), samples and Pegasi. Raises Fault.

    data: as `shown` gives them.
    """
    found = sample.trained(state, model, learned)
    about = found.about | {"seed": 0}
    if state["history"]:
        words = f"{pictures.DRAWN if data.name == 'drawn' else data.name}: {', '.join(data.classes)}"
        pictures.save(pictures.curves(state["history"], words), folder / "curves.png", about)
    x = vae.from_bytes(data.test_images.to(model.variance.device)).view(-1, 8, *vae.IMAGE)
    pairs = torch.stack([x, model.reconstruct(x.flatten(0, 1)).view(x.shape)], 1).flatten(0, 2)
    sheets = {"reconstructions": (pairs, {key: value for key, value in about.items() if key != "prior"}),
              "samples": (sample.draw(found, sample.Options(mode="prior")), about)}
    waits = state["epoch"] < state["config"]["epochs"] or state["config"]["judge"]  # for the parts of Pegasi
    if len(data.classes) > 1 and "prior" in about and waits and not state["bank"]:
        joined = compose.preview(model, found.learned, data.images, data.labels)
        sheets["pegasus"] = joined, about | {"prior": sample.JOINED}
    elif len(data.classes) > 1:
        sheets["pegasus"] = sample.draw(found), about
    for name, (images, said) in sheets.items():
        pictures.save(sample.page(images, said), folder / f"{name}.png", said | {"mode": name})
