"""Save atomically, load safely: a checkpoint is either the old one or the new one, and never runs code."""
import hashlib
import json
import os
import pickle
import zipfile
from pathlib import Path

import options
from options import Fault

import torch
from torch import Tensor

FORMAT = 1


def save(path: Path, state: dict) -> None:
    """Write a dict of plain types and tensors; until the very end `path` stays as it was. Raises Fault."""
    with options.replacing(path, "what was saved before is still there") as beside, open(beside, "wb") as file:
        torch.save(state | {"format": FORMAT}, file)  # a file of ours: torch's own reports a full disk as a riddle
        file.flush()
        os.fsync(file.fileno())
    folder = os.open(path.parent, os.O_RDONLY)
    os.fsync(folder)  # the new name is on the disk too
    os.close(folder)


def load(path: Path) -> dict:
    """Read what `save` wrote, on the CPU. Raises Fault for anything else, and for a single damaged byte."""
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
    except FileNotFoundError:
        raise Fault(f"{path}: no such file; wanted a checkpoint, as `make train` writes to runs/") from None
    except OSError as error:
        raise Fault(f"{path}: can't be read ({error.strerror or error})") from None
    except (zipfile.BadZipFile, NotImplementedError, RuntimeError) as error:
        raise Fault(f"{path}: not a checkpoint, or one cut short ({error})") from None
    if damaged:
        raise Fault(f"{path}: damaged at {damaged}; use another copy, or train again")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, KeyError, ValueError):
        raise Fault(f"{path}: not a checkpoint of this project, or one that would run code; not loaded") from None
    if not isinstance(state, dict) or "format" not in state:
        raise Fault(f"{path}: not a checkpoint of this project")
    if state["format"] != FORMAT:
        raise Fault(f"{path}: checkpoint format {state['format']}, this program reads {FORMAT}; use a matching version")
    return state


def digest(tensors: dict[str, Tensor], config: dict) -> str:
    """A fingerprint of a model, 16 hexadecimal digits: equal tensors and configurations give equal ones.

    Taken over sorted names, types, shapes and bytes and canonical JSON, never over a file, whose bytes may differ.
    """
    total = hashlib.sha256(json.dumps(config, sort_keys=True).encode())
    for name, tensor in sorted(tensors.items()):
        total.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        total.update(tensor.detach().cpu().reshape(-1).view(torch.uint8).numpy().tobytes())
    return total.hexdigest()[:16]
