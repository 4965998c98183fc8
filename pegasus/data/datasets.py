"""What --data means: a folder of one of three kinds, a download, the synthetic set."""
import hashlib
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import vae
from pegasus import streams
from pegasus.cli import UserError
from pegasus.data import cifar10, classes, download, pictures, stl10, synthetic
from pegasus.data.pictures import Labelled

import torch
from torch import Tensor

DATA = Path("data")
KEYWORDS = ("auto", "cifar10", "stl10", "synthetic")  # that --data takes
BANNER = """
**********************************************************************
  SYNTHETIC DATA: CIFAR-10 can't be had here, so this run uses horses
  and birds that pegasus/data/synthetic.py draws. Its pictures are of
  drawings, not photographs.
  {reason}
**********************************************************************
"""


@dataclass(frozen=True)
class Dataset:
    """Training and test images, uint8 (n, 3, size, size), and labels, int64 (n,).

    A label is a position in `classes`.
    """

    images: Tensor
    labels: Tensor
    test_images: Tensor
    test_labels: Tensor
    classes: tuple[str, ...]
    folder: str
    name: str  # "synthetic", or the folder's: what logs and pictures say
    digest: str  # SHA-256 of the four tensors


def is_synthetic(name: str) -> bool:
    """Return whether a folder's name is one of drawn pictures."""
    return re.fullmatch(r"synthetic(-\d+)?", name) is not None


def synthetic_folder(size: int) -> Path:
    """Return data/synthetic, or synthetic-64 and the like, drawn if there is none.

    Raises UserError.
    """
    folder = DATA / ("synthetic" if size == 32 else f"synthetic-{size}")
    if folder.exists():
        return folder
    streams.say(
        "drawing 12,000 pictures, 2,000 of them to test, "
        f"into {folder}: a minute, or some where they are large"
    )
    try:
        synthetic.write(folder, side=size)
    except UserError:
        if not folder.exists():  # else another process drew it meanwhile
            raise
    return folder


def automatic_folder(size: int) -> Path:
    """Return the first that there is: see `locate` for "auto"."""
    if os.environ.get("CIFAR10_DIR"):
        return Path(os.environ["CIFAR10_DIR"])
    try:
        return download.complete_folder(DATA)
    except download.Unreachable as reason:
        folder = DATA / cifar10.FOLDER
        if folder.is_dir():  # begun by hand: let `load` say which files it lacks
            return folder
        streams.say(BANNER.format(reason=reason))
        return synthetic_folder(size)


def locate(data: str, size: int = 32) -> Path:
    """Return the folder that `--data` means. Raises UserError.

    data: "cifar10", "stl10", "synthetic", a folder, or "auto": $CIFAR10_DIR, else
    data/cifar-10-batches-bin, else the download, else, where nothing answers,
    the synthetic set. size: pixels of a side, of the latter.
    """
    if data == "auto":
        return automatic_folder(size)
    if data == "cifar10":
        return download.complete_folder(DATA)
    if data == "stl10":
        return stl10.complete_folder(DATA)
    if data == "synthetic":
        return synthetic_folder(size)
    folder = Path(data)
    if not data or not folder.is_dir():
        raise UserError(
            f"--data: no folder {data}; wanted {', '.join(KEYWORDS)}, a folder of "
            "CIFAR-10's or STL-10's binary files, or one with a folder of pictures for each "
            "class"
        )
    return folder


def resolve_auto(folder: str) -> str:
    """Return what "auto" means where a checkpoint was trained on a folder.

    That folder, unless it was CIFAR-10's and has been moved.
    """
    if not os.path.isdir(folder) and Path(folder).name == cifar10.FOLDER:
        return "auto"
    return folder


def sha256(tensors: Iterable[Tensor]) -> str:
    """Return the SHA-256 of all bytes of some tensors."""
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(tensor.numpy())
    return digest.hexdigest()


def reader(folder: Path) -> ModuleType:
    """Return the module that reads a folder, by the files and folders in it."""
    if len(stl10.missing_files(folder)) < 4:
        return stl10
    is_cifar10 = len(cifar10.missing_files(folder)) < 6
    return pictures if not is_cifar10 and pictures.folders(folder) else cifar10


def resize(images: Tensor, size: int) -> Tensor:
    """Return byte images (n, 3, h, w) made larger or smaller."""
    if images.shape[-1] == size:
        return images
    batches = [vae.resize(vae.from_bytes(batch), size) for batch in images.split(500)]
    return torch.cat([vae.to_bytes(batch) for batch in batches])


def load_parts(
    data: str, names: str | None, size: int
) -> tuple[Path, tuple[str, ...], Labelled, Labelled]:
    """Return the folder that `--data` means, its classes, and what is to train and test on."""
    own = data == "auto" and os.environ.get("CIFAR10_DIR")  # of whatever kind
    if names is not None and data in KEYWORDS and not own:  # before a download
        classes.parse(names, stl10.CLASSES if data == "stl10" else cifar10.CLASSES)
    folder = locate(data, size)
    source = reader(folder)
    if source is pictures:
        return folder, *pictures.load(folder, names, size)
    chosen = classes.parse(classes.PAIR if names is None else names, source.CLASSES)
    loaded = []
    for part in source.PARTS:
        images, labels = source.load(folder, chosen, part)
        loaded.append((resize(images, size), labels))
    return folder, chosen, *loaded


def load(
    data: str,
    names: str | None,
    expected: dict[str, str] | None = None,
    size: int = 32,
    must_match: bool = True,
) -> Dataset:
    """Load all pictures of some classes.

    data: what `--data` says. names: of classes, separated by commas; by default horse,bird,
    or all of a folder of pictures without these. expected: a checkpoint's `folder`, which
    "auto" then means, and `digest`, which must be the same; without must_match a
    difference is only told. size: pixels of a side. Raises UserError for whatever is wrong
    with them.
    """
    if expected and data == "auto":
        data = resolve_auto(expected["folder"])
    folder, chosen, train, test = load_parts(data, names, size)
    digest = sha256((*train, *test))
    folder = folder.resolve()
    if expected and digest != expected["digest"]:
        differs = f"{folder} is not what the checkpoint was trained on"
        if must_match:
            raise UserError(
                f"--data: {differs} ({expected['folder']}); give that folder, or begin "
                "another run"
            )
        streams.say(f"{differs}, as where CIFAR-10 was packed anew; figures are of this one")
    name = folder.name.encode(errors="replace").decode()  # logs are UTF-8
    return Dataset(*train, *test, chosen, str(folder), name, digest)
