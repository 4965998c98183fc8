"""Save atomically, load safely: a checkpoint is either the old one or the new one, and never runs code.

    python checkpoint.py runs/pegasus/last.pt small.pt     # what drawing needs, weights in bfloat16
"""
import contextlib
import hashlib
import json
import os
import warnings
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import options
from options import Fault, option

import torch
from torch import Tensor

OLDEST, FORMAT = 3, 6  # 3 knew no channels innermost, 4 kept Adam's settings too, 5 the state of torch's generator
TRAINING = ("optimizer", "velocity", "history", "rng", "totals", "skipped", "densities")  # what drawing can do without


@dataclass(frozen=True)
class Options:
    checkpoint: str = option("", "a checkpoint with a learned prior, as `make train` writes to runs/", positional=True)
    out: str = option("", "the smaller one to write", positional=True)


def save(path: Path, state: dict) -> None:
    """Write a dict of plain types and finite tensors; until the very end `path` stays as it was. Raises Fault."""
    bad = not_finite(state)
    if bad:
        raise Fault(f"{path}: not saved, {bad} holds NaN or infinity; what was saved before is still there")
    with options.replacing(path, "what was saved before is still there") as beside, open(beside, "wb") as file:
        try:
            torch.save(state | {"format": FORMAT}, file)
        except RuntimeError as error:  # torch's own for a failed write; the OSError before it says why
            raise error.__context__ or error from None
        file.flush()
        os.fsync(file.fileno())
    with contextlib.suppress(OSError):  # which not every file system can do
        folder = os.open(path.resolve().parent, os.O_RDONLY)
        try:
            os.fsync(folder)  # the new name is on the disk too
        finally:
            os.close(folder)


def load(path: Path) -> dict:
    """Read what `save` wrote, on the CPU. Raises Fault for anything else, and for damage to what it holds."""
    try:
        with zipfile.ZipFile(path) as archive:
            if sum(member.file_size for member in archive.infolist()) > path.stat().st_size:
                raise zipfile.BadZipFile("its parts are larger than the file")
            if damaged := archive.testzip():
                raise zipfile.BadZipFile(f"damaged at {damaged}")
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # torch warns of nothing in a file that `save` wrote
            state = torch.load(path, map_location="cpu", weights_only=True)
        bad = not_finite(state)
    except FileNotFoundError:
        raise Fault(f"{path}: no such file; wanted a checkpoint, as `make train` writes to runs/") from None
    except OSError as error:
        raise Fault(f"{path}: can't be read ({error.strerror or error})") from None
    except (zipfile.BadZipFile, NotImplementedError) as error:
        raise Fault(f"{path}: not a checkpoint, or no whole one ({options.brief(error)}); use another copy") from None
    except Exception:  # a file can hold anything, and make the readers of archives and pickles raise as much
        raise Fault(f"{path}: not a checkpoint of this project, or one that would run code; not loaded") from None
    if not isinstance(state, dict) or type(state.get("format")) is not int:
        raise Fault(f"{path}: not a checkpoint of this project")
    if not OLDEST <= state["format"] <= FORMAT:
        raise Fault(f"{path}: checkpoint format {state['format']}, this program reads {OLDEST} to {FORMAT}; "
                    "use the version that wrote it")
    if bad:
        raise Fault(f"{path}: {bad} holds NaN or infinity; use an earlier copy, or train again with a lower --lr")
    return state


def not_finite(state: object, name: str = "") -> str:
    """Where in nested dicts and lists the first tensor with NaN or infinity is, as in `model/encoder.1.bias`, or ""."""
    if isinstance(state, Tensor):
        return name if state.is_floating_point() and not state.isfinite().all() else ""
    items = state.items() if isinstance(state, dict) else enumerate(state) if isinstance(state, list | tuple) else ()
    return next(filter(None, (not_finite(item, f"{name}/{key}".lstrip("/")) for key, item in items)), "")


@contextlib.contextmanager
def fitting(path: Path | None) -> Iterator[None]:
    """Make a Fault of the errors of a state that does not fit this program; with no file to name let them pass."""
    try:
        yield
    except (AttributeError, IndexError, KeyError, TypeError, ValueError, RuntimeError) as error:
        if path is None or options.full(error) or isinstance(error, torch.AcceleratorError):
            raise
        reason = options.brief(error)
        raise Fault(f"{path}: a checkpoint of another version ({reason}); train again, or use that version") from None


def digest(tensors: dict[str, Tensor], config: dict) -> str:
    """A fingerprint of a model, 16 hexadecimal digits: equal tensors and configurations give equal ones.

    Taken over sorted names, types, shapes and bytes and canonical JSON, never over a file, whose bytes may differ.
    """
    total = hashlib.sha256(json.dumps(config, sort_keys=True).encode())
    for name, tensor in sorted(tensors.items()):
        total.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        total.update(tensor.detach().cpu().reshape(-1).view(torch.uint8).numpy().tobytes())
    return total.hexdigest()[:16]


def small(state: dict) -> dict:
    """A state without what only training needs and this machine's paths, weights in bfloat16: a sixth of the size."""
    kept = {key: value for key, value in state.items() if key not in TRAINING}
    halves = {part: {name: tensor.bfloat16() if tensor.is_floating_point() else tensor
                     for name, tensor in state[part].items()} for part in ("model", "prior")}
    here = {"config": state["config"] | {"data": "auto", "run": ""}, "data": state["data"] | {"folder": "auto"}}
    return kept | halves | here | {"densities": {}}


def main(argv: list[str] | None = None) -> None:
    chosen, _ = options.parse(Options, argv, __doc__)
    state = load(Path(chosen.checkpoint))
    if Path(chosen.out).exists() and os.path.samefile(chosen.checkpoint, chosen.out):
        raise Fault(f"{chosen.out}: is the checkpoint itself, which could not be resumed any more; choose another name")
    if state.get("phase") != "prior":
        raise Fault(f"{chosen.checkpoint}: has no learned prior, so drawing needs nearly all of it; use it as it is")
    with fitting(Path(chosen.checkpoint)):
        state = small(state)
    save(Path(chosen.out), state)
    print(f"{chosen.out}: {Path(chosen.out).stat().st_size / 2**20:.1f} MiB")


if __name__ == "__main__":
    options.run(main)
