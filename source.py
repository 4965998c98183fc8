"""Where the pictures come from: a folder, the download, or drawn by drawn.py."""
import hashlib
import os
import sys
from dataclasses import dataclass
from pathlib import Path

import cifar10
import drawn
from options import Fault

from torch import Tensor

DATA = Path("data")
BANNER = """
**********************************************************************
  DRAWN DATA: CIFAR-10 can't be had here, so this run uses horses and
  birds drawn by drawn.py. Its pictures are of drawings, not photographs.
  {reason}
**********************************************************************
"""


@dataclass(frozen=True)
class Pictures:
    """Training and test pictures: uint8 (n, 3, 32, 32), with positions in `classes` as labels, int64 (n,)."""
    images: Tensor
    labels: Tensor
    test_images: Tensor
    test_labels: Tensor
    classes: tuple[str, ...]
    folder: str
    name: str    # "drawn", or the last part of the folder's path: what logs and pictures say
    digest: str  # SHA-256 of all of the above tensors


def locate(data: str) -> Path:
    """The folder of batches behind `--data`: cifar10, drawn, or a folder. Raises Fault.

    auto: $CIFAR10_DIR, else data/cifar-10-batches-bin, else the download, else (nothing answers) the drawn set.
    """
    if data == "auto" and os.environ.get("CIFAR10_DIR"):
        return Path(os.environ["CIFAR10_DIR"])
    if data in ("auto", "cifar10"):
        folder = DATA / cifar10.FOLDER
        try:
            return cifar10.download(DATA) if cifar10.missing(folder) else folder
        except cifar10.Unreachable as reason:
            if data == "cifar10":
                raise
            if folder.is_dir():  # begun by hand: say what it lacks, rather than train on something else
                return folder
            print(BANNER.format(reason=reason), file=sys.stderr, flush=True)
            data = "drawn"
    folder = DATA / "drawn" if data == "drawn" else Path(data)
    if data == "drawn" and not folder.exists():
        print(f"drawing 12,000 pictures, 2,000 of them to test, into {folder}: a minute or less", file=sys.stderr,
              flush=True)
        try:
            drawn.write(folder)
        except Fault:
            if cifar10.missing(folder):  # else another process drew them meanwhile
                raise
    if not folder.is_dir():
        raise Fault(f"--data: no folder {data}; wanted auto, cifar10, drawn or a folder of CIFAR-10's binary batches")
    return folder


def load(data: str, classes: str, known: dict[str, str] | None = None) -> Pictures:
    """All pictures of some classes. Raises Fault for whatever is wrong with them.

    known: a checkpoint's `folder`, which "auto" then means unless it was moved, and the `digest` that it must have.
    """
    names = tuple(cifar10.CLASSES[i] for i in cifar10.class_indices(classes))  # before anything is downloaded
    if known and data == "auto" and (os.path.isdir(known["folder"]) or Path(known["folder"]).name != cifar10.FOLDER):
        data = known["folder"]
    folder = locate(data)
    train, test = cifar10.load(folder, classes, cifar10.TRAIN), cifar10.load(folder, classes, cifar10.TEST)
    digest = hashlib.sha256()
    for tensor in (*train, *test):
        digest.update(tensor.numpy())
    if known and digest.hexdigest() != known["digest"]:
        raise Fault(f"--data: {folder.resolve()} is not what the checkpoint was trained on ({known['folder']}); give "
                    "that folder, or begin another run")
    name = folder.resolve().name.encode(errors="replace").decode()  # a name may be no UTF-8, which files have to be
    return Pictures(*train, *test, names, str(folder.resolve()), name, digest.hexdigest())
