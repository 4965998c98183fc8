"""CIFAR-10's binary batches: read them and write them.

A batch file is a run of records of 3,073 bytes: one label, then 1,024 red, 1,024
green and 1,024 blue bytes, row by row. Images of all files are kept in memory as
uint8 (n, 3, 32, 32), labels as int64 (n,).

Krizhevsky, Learning Multiple Layers of Features from Tiny Images (2009).
"""
from collections.abc import Iterable
from pathlib import Path

from pegasus.cli import UserError

import numpy as np
import torch
from torch import Tensor

CLASSES = (
    "airplane", "automobile", "bird", "cat", "deer",
    "dog", "frog", "horse", "ship", "truck",
)
FOLDER = "cifar-10-batches-bin"
TRAIN = tuple(f"data_batch_{i}.bin" for i in range(1, 6))
TEST = ("test_batch.bin",)
PARTS = (TRAIN, TEST)
RECORD = 3073  # bytes
DOWNLOAD = "python -m pegasus.data.download data"


def read(path: Path) -> tuple[Tensor, Tensor]:
    """Read a batch file: images, uint8 (n, 3, 32, 32), and labels, int64 (n,).

    Raises UserError for a wrong size or label.
    """
    data = np.fromfile(path, np.uint8)
    if len(data) == 0 or len(data) % RECORD:
        raise UserError(
            f"{path}: {len(data):,} bytes, wanted a whole number of "
            f"{RECORD}-byte records; get the file again"
        )
    records = torch.from_numpy(data).view(-1, RECORD)
    labels = records[:, 0].long()
    check_labels(path, labels)
    return records[:, 1:].unflatten(1, (3, 32, 32)), labels


def check_labels(
    path: Path, labels: Tensor, first: int = 0, what: str = "a CIFAR-10 binary batch"
) -> None:
    """Raise UserError where one of a file's labels is not of ten, `first` and those after."""
    wrong = ((labels < first) | (labels > first + 9)).nonzero()
    if len(wrong):
        i = int(wrong[0])
        raise UserError(
            f"{path}: record {i} has label {int(labels[i])}, wanted {first} to {first + 9}; "
            f"is this {what}?"
        )


def write(path: Path, images: Tensor | np.ndarray, labels: Tensor | np.ndarray) -> None:
    """Write images (n, 3, 32, 32) and labels (n,), both 0 to 255, as a batch file."""
    pixels = np.asarray(images).reshape(-1, RECORD - 1)
    column = np.asarray(labels).reshape(-1, 1)
    records = np.concatenate([column, pixels], 1)
    records.astype(np.uint8).tofile(path)


def missing_files(folder: Path) -> list[str]:
    """Return the names of the batch files that a folder lacks."""
    return [name for name in TRAIN + TEST if not (folder / name).is_file()]


def check_files(folder: Path) -> None:
    """Raise UserError where a folder lacks one of the six batch files."""
    missing = missing_files(folder)
    if len(missing) == 6:
        raise UserError(
            f"{folder}: holds neither CIFAR-10's six binary batches nor, to train on, a folder "
            "of pictures for each class, as cat/1.jpg; give such a folder as --data or "
            f"CIFAR10_DIR, or get CIFAR-10 by `{DOWNLOAD}`"
        )
    if missing:
        raise UserError(
            f"{folder}: no {', '.join(missing)} of CIFAR-10's six binary batches; give their "
            f"folder as --data or CIFAR10_DIR, or get CIFAR-10 by `{DOWNLOAD}`"
        )


def select(images: Tensor, labels: Tensor, indices: list[int]) -> tuple[Tensor, Tensor]:
    """Keep images whose label is one of `indices`; new labels are positions there."""
    positions = torch.full_like(labels, -1)
    for position, index in enumerate(indices):
        positions[labels == index] = position
    kept = positions >= 0
    return images[kept], positions[kept]


def check_counts(folder: Path, labels: Tensor, names: tuple[str, ...], where: str) -> None:
    """Raise UserError for classes without a single picture. labels: positions in names."""
    counts = labels.bincount(minlength=len(names))
    empty = [name for name, n in zip(names, counts, strict=True) if n == 0]
    if empty:
        raise UserError(
            f"{folder}: no picture of {', '.join(empty)} {where}; choose other --classes"
        )


def join(batches: Iterable[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Join pairs of images and labels to one pair."""
    images, labels = zip(*batches, strict=True)
    return torch.cat(images), torch.cat(labels)


def load_all(folder: Path, files: tuple[str, ...]) -> tuple[Tensor, Tensor]:
    """Load some batch files: images, uint8 (n, 3, 32, 32), CIFAR-10's labels, (n,).

    Raises UserError for missing or damaged files.
    """
    check_files(folder)
    return join(read(folder / name) for name in files)


def load(
    folder: Path, classes: tuple[str, ...], files: tuple[str, ...]
) -> tuple[Tensor, Tensor]:
    """Load some classes of batch files: images, uint8 (n, 3, 32, 32), labels, (n,).

    A label is a position in `classes`. Raises UserError for missing or damaged files and
    for classes without a single image.
    """
    indices = [CLASSES.index(name) for name in classes]
    check_files(folder)
    images, labels = join(select(*read(folder / name), indices) for name in files)
    check_counts(folder, labels, classes, "in " + ", ".join(files))
    return images, labels
