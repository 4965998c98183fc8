"""Save atomically, load safely: a checkpoint is the old one or the new one, never half.

    python -m pegasus.checkpoint runs/pegasus/last.pt small.pt   # what drawing needs

Loading runs no code that a file may hold.
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

from pegasus import cli, files
from pegasus.cli import UserError, option

import torch
from torch import Tensor

FORMAT = 9
TRAINING = ("optimizers", "velocity", "history", "totals", "skipped")  # not for drawing
MISMATCHES = (AttributeError, IndexError, KeyError, TypeError, ValueError, RuntimeError)


@dataclass(frozen=True)
class CompactConfig:
    """Options of this script."""
    checkpoint: str = option(
        "", "a checkpoint with a learned prior, as `make train` writes", positional=True
    )
    out: str = option("", "the smaller one to write", positional=True)


def save(path: Path, state: dict) -> None:
    """Write a dict of plain types and finite tensors.

    Until the very end `path` stays as it was. Raises UserError.
    """
    kept = "what was saved before is still there"
    if bad := not_finite(state):
        raise UserError(f"{path}: not saved, {bad} holds NaN or infinity; {kept}")
    with files.replace_file(path, kept) as temporary, open(temporary, "wb") as file:
        try:
            torch.save(state | {"format": FORMAT}, file)
        except RuntimeError as error:  # torch's own for a failed write
            raise error.__context__ or error from None  # the OSError before it says why
        file.flush()
        os.fsync(file.fileno())
    sync_folder(path.resolve().parent)


def sync_folder(folder: Path) -> None:
    """Bring a folder's new names to the disk, where the file system can."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def read_archive(path: Path) -> object:
    """Return what torch.save wrote, on the CPU; check the sums of all its parts."""
    with zipfile.ZipFile(path) as archive:
        size = sum(member.file_size for member in archive.infolist())
        if size > path.stat().st_size:
            raise zipfile.BadZipFile("its parts are larger than the file")
        if damaged := archive.testzip():
            raise zipfile.BadZipFile(f"damaged at {damaged}")
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # torch warns of nothing that `save` wrote
        return torch.load(path, map_location="cpu", weights_only=True)


def load(path: Path) -> dict:
    """Return what `save` wrote, on the CPU. Raises UserError for anything else and for damage."""
    try:
        state = read_archive(path)
        bad = not_finite(state)
    except FileNotFoundError:
        wanted = "wanted a checkpoint, as `make train` writes to runs/"
        raise UserError(f"{path}: no such file; {wanted}") from None
    except OSError as error:
        reason = error.strerror or error
        raise UserError(f"{path}: can't be read ({reason})") from None
    except (zipfile.BadZipFile, NotImplementedError) as error:
        reason = cli.brief(error)
        message = f"{path}: not a checkpoint, or no whole one ({reason}); use another copy"
        raise UserError(message) from None
    except Exception:  # a file can hold anything, and make readers raise as much
        message = "not a checkpoint of this project, or one that would run code; not loaded"
        raise UserError(f"{path}: {message}") from None
    check_format(path, state)
    if bad:
        raise UserError(
            f"{path}: {bad} holds NaN or infinity; use an earlier copy, "
            "or train again with a lower --lr"
        )
    return state


def check_format(path: Path, state: object) -> None:
    """Raise UserError unless it is a checkpoint of this format."""
    if not isinstance(state, dict) or type(state.get("format")) is not int:
        raise UserError(f"{path}: not a checkpoint of this project")
    if state["format"] != FORMAT:
        raise UserError(
            f"{path}: checkpoint format {state['format']}, this program reads {FORMAT}; "
            "use the version that wrote it"
        )


def not_finite(state: object, name: str = "") -> str:
    """Return where in nested dicts and lists a tensor with NaN or infinity is, or "".

    As in `model/encoder.1.bias`.
    """
    if isinstance(state, Tensor):
        bad = state.is_floating_point() and not state.isfinite().all()
        return name if bad else ""
    items = []
    if isinstance(state, dict):
        items = state.items()
    elif isinstance(state, list | tuple):
        items = enumerate(state)
    for key, item in items:
        if bad := not_finite(item, f"{name}/{key}".lstrip("/")):
            return bad
    return ""


@contextlib.contextmanager
def explain_mismatch(path: Path | None) -> Iterator[None]:
    """Explain, as a UserError, errors of a state that does not fit this program.

    Without a file to name they pass as they are.
    """
    try:
        yield
    except MISMATCHES as error:
        device_failed = isinstance(error, torch.AcceleratorError)
        if path is None or cli.out_of_memory(error) or device_failed:
            raise
        reason = cli.brief(error)
        advice = "use the code that made it, or train in another --run"
        message = f"{path}: a checkpoint of another network or version ({reason}); {advice}"
        raise UserError(message) from None


def digest(tensors: dict[str, Tensor], config: dict) -> str:
    """Return a fingerprint of a model, 16 hexadecimal digits.

    Equal tensors and configurations give equal ones: it is taken over sorted names,
    types, shapes and bytes and canonical JSON, never over a file.
    """
    total = hashlib.sha256(json.dumps(config, sort_keys=True).encode())
    for name, tensor in sorted(tensors.items()):
        total.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        flat = tensor.detach().cpu().reshape(-1)
        total.update(flat.view(torch.uint8).numpy().tobytes())
    return total.hexdigest()[:16]


def to_dtype(tensors: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """Return tensors with those of floats in another type."""
    return {
        name: tensor.to(dtype) if tensor.is_floating_point() else tensor
        for name, tensor in tensors.items()
    }


def compact(state: dict) -> dict:
    """Return a state for drawing alone: a sixth of the size, weights in bfloat16.

    Without this machine's paths.
    """
    kept = {key: value for key, value in state.items() if key not in TRAINING}
    kept["densities"] = {}
    kept["model"] = to_dtype(state["model"], torch.bfloat16)
    kept["prior"] = to_dtype(state["prior"], torch.bfloat16)
    kept["config"] = state["config"] | {"data": "auto", "run": ""}
    kept["data"] = state["data"] | {"folder": "auto"}
    return kept


def main(argv: list[str] | None = None) -> None:
    config, _ = cli.parse(CompactConfig, argv, __doc__)
    source = Path(config.checkpoint)
    out = Path(config.out)
    state = load(source)
    if files.is_same(source, out):
        raise UserError(
            f"{out}: is the checkpoint itself, which could not be resumed any more; "
            "choose another name"
        )
    if state.get("phase") != "prior":
        raise UserError(
            f"{source}: has no learned prior, so drawing needs nearly all of it; "
            "use it as it is"
        )
    with explain_mismatch(source):
        state = compact(state)
    save(out, state)
    print(f"{out}: {out.stat().st_size / 2**20:.1f} MiB")


if __name__ == "__main__":
    cli.run(main)
