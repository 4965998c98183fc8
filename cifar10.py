"""CIFAR-10's binary batches: read, write, download.

    python cifar10.py data        # downloads and checks data/cifar-10-batches-bin

A batch is a run of records of 3,073 bytes: one label, then 1,024 red, 1,024 green and 1,024 blue bytes, row by row.
Krizhevsky, Learning Multiple Layers of Features from Tiny Images (2009).
"""
import contextlib
import hashlib
import http.client
import os
import sys
import tarfile
import tempfile
import urllib.error
import urllib.request
import zlib
from collections.abc import Iterator
from pathlib import Path

import options
from options import Fault

import numpy as np
import torch
from torch import Tensor

CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
FOLDER = "cifar-10-batches-bin"
TRAIN = tuple(f"data_batch_{i}.bin" for i in range(1, 6))
TEST = ("test_batch.bin",)
RECORD = 3073
URL = "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz"
SIZE = 170_052_171
SHA256 = "c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd"
BATCH_SIZE = 10_000 * RECORD
BY_HAND = f"download {URL} yourself, unpack it, and give the folder {FOLDER} as --data or CIFAR10_DIR"


class Unreachable(Fault):
    """The download's server gave no answer in HTTP."""


def read(path: Path) -> tuple[Tensor, Tensor]:
    """One batch file as images, uint8 (n, 3, 32, 32), and labels, int64 (n,). Raises Fault for wrong size or label."""
    data = np.fromfile(path, np.uint8)
    if len(data) == 0 or len(data) % RECORD:
        raise Fault(f"{path}: {len(data):,} bytes, wanted a whole number of {RECORD}-byte records; get the file again")
    records = torch.from_numpy(data).view(-1, RECORD)
    labels = records[:, 0].long()
    wrong = (labels >= len(CLASSES)).nonzero()
    if len(wrong):
        i = int(wrong[0])
        raise Fault(f"{path}: record {i} has label {int(labels[i])}, wanted 0 to 9; is this a CIFAR-10 binary batch?")
    return records[:, 1:].unflatten(1, (3, 32, 32)), labels


def write(path: Path, images: Tensor | np.ndarray, labels: Tensor | np.ndarray) -> None:
    """Write images (n, 3, 32, 32) and labels (n,), both 0 to 255, as one batch file."""
    records = np.concatenate([np.asarray(labels).reshape(-1, 1), np.asarray(images).reshape(-1, RECORD - 1)], 1)
    records.astype(np.uint8).tofile(path)


def class_indices(names: str) -> list[int]:
    """CIFAR-10's label of each class in a comma-separated list, in the order given."""
    chosen = [name.strip() for name in names.split(",") if name.strip()]
    unknown = [name for name in chosen if name not in CLASSES]
    if unknown or not chosen or len(set(chosen)) < len(chosen):
        wanted = f"wanted one or more different ones of {', '.join(CLASSES)}, separated by commas"
        raise Fault(f"--classes: got {names!r}, {wanted}")
    return [CLASSES.index(name) for name in chosen]


def missing(folder: Path) -> list[str]:
    """The batch files that a folder lacks."""
    return [name for name in TRAIN + TEST if not (folder / name).is_file()]


def collect(folder: Path, files: tuple[str, ...], position: Tensor) -> tuple[Tensor, Tensor]:
    """Images and labels of some batch files, uint8 (n, 3, 32, 32) and (n,); `position` (10,) maps CIFAR-10's labels.

    Where it is -1 the image is left out. Raises Fault for a damaged file.
    """
    most = sum((folder / name).stat().st_size for name in files) // RECORD
    whole, labels, n = torch.empty(most, 3, 32, 32, dtype=torch.uint8), [], 0  # what is never written takes no memory
    for name in files:
        images, named = read(folder / name)
        keep = (position[named] >= 0).nonzero()[:, 0]
        torch.index_select(images, 0, keep, out=whole[n:n + len(keep)])
        labels.append(position[named[keep]])
        n += len(keep)
    return whole[:n], torch.cat(labels)


class Photographs:
    """All images of some batch files, read from there whenever they are asked for: of CIFAR-10 they are 154 MB."""

    def __init__(self, folder: Path, files: tuple[str, ...]):
        """Raises Fault for a damaged file."""
        self.paths = [folder / name for name in files]
        parts = [read(path)[1] for path in self.paths]
        self.labels = torch.cat(parts)  # int64 (n,)
        self.first = np.cumsum([0, *map(len, parts)])  # row of each file

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, rows: Tensor) -> Tensor:
        """Some of them, uint8 (m, 3, 32, 32)."""
        at, found = rows.numpy(), np.empty((len(rows), RECORD - 1), np.uint8)
        for path, first, last in zip(self.paths, self.first, self.first[1:], strict=False):
            here = (at >= first) & (at < last)
            found[here] = np.memmap(path, mode="r").reshape(-1, RECORD)[at[here] - first, 1:]
        return torch.from_numpy(found).view(-1, 3, 32, 32)


def load(folder: Path, classes: str, files: tuple[str, ...]) -> tuple[Tensor, Tensor]:
    """The images of some classes in some batch files, uint8 (n, 3, 32, 32), and int64 (n,) positions in `classes`.

    Raises Fault for missing or damaged files, unknown classes and classes without a single image.
    """
    wanted = class_indices(classes)
    lacking = missing(folder)
    if lacking:
        raise Fault(f"{folder}: no {', '.join(lacking)}; wanted CIFAR-10's six binary batches; {BY_HAND}")
    position = torch.full((len(CLASSES),), -1).index_copy(0, torch.tensor(wanted), torch.arange(len(wanted)))
    images, labels = collect(folder, files, position)
    empty = [CLASSES[c] for i, c in enumerate(wanted) if not (labels == i).any()]
    if empty:
        raise Fault(f"{folder}: no picture of {', '.join(empty)} in {', '.join(files)}; choose other --classes")
    return images, labels


def chunks(url: str, timeout: float) -> Iterator[bytes]:
    """The bytes behind an address, a MiB at a time. Raises Unreachable where no answer in HTTP arrives."""
    begun = False
    try:
        with urllib.request.urlopen(url, timeout=timeout) as response:
            begun = True
            while chunk := response.read(1 << 20):
                yield chunk
    except urllib.error.HTTPError as error:
        error.close()
        answer = options.brief(error.reason)
        raise Fault(f"{url}: the server answered {error.code} {answer}; try again later, or {BY_HAND}") from None
    except (OSError, http.client.HTTPException, ValueError) as error:  # ValueError: an address that is none
        reason = options.brief(getattr(error, "reason", error) or "no answer")
        kind, what = (Fault, "broke off") if begun else (Unreachable, "can't be reached")
        raise kind(f"{url}: {what} ({reason}); try again, or {BY_HAND}") from None


def fetch(url: str, file, timeout: float) -> None:
    """Stream the archive into an open file and hold it to its size and SHA-256."""
    received = 0
    with contextlib.closing(chunks(url, timeout)) as arriving:
        while received <= SIZE and (chunk := next(arriving, b"")):
            received += file.write(chunk)
            options.show(f"{received / 1e6:6.1f} of {SIZE / 1e6:.1f} MB", received == SIZE)
    file.seek(0)  # which writes what is left
    if received != SIZE:
        got = f"more than {SIZE:,}" if received > SIZE else f"{received:,}"
        raise Fault(f"{url}: got {got} bytes beginning {file.read(12)!r}, wanted {SIZE:,}; nothing was kept; {BY_HAND}")
    if (found := hashlib.file_digest(file, "sha256").hexdigest()) != SHA256:
        raise Fault(f"{url}: SHA-256 is {found}, wanted {SHA256}; nothing was kept; {BY_HAND}")


def unpack(archive: Path, folder: Path) -> None:
    """Write the six batches of the archive, taken by name, into a folder; no other member is touched."""
    members = {}
    try:
        with tarfile.open(archive, "r:gz") as tar:
            for name in TRAIN + TEST:
                member = tar.getmember(f"{FOLDER}/{name}")
                if not member.isfile() or member.size != BATCH_SIZE:
                    raise Fault(f"{archive}: {member.name} is not a file of {BATCH_SIZE:,} bytes; {BY_HAND}")
                members[name] = tar.extractfile(member).read()
    except (tarfile.TarError, KeyError, EOFError, zlib.error) as error:
        raise Fault(f"{archive}: not CIFAR-10's archive ({error}); {BY_HAND}") from None
    folder.mkdir(parents=True, exist_ok=True)
    with options.writing(folder, "choose another place"), tempfile.TemporaryDirectory(dir=folder) as beside:
        for name, data in members.items():
            Path(beside, name).write_bytes(data)  # a place of its own: another process may be at the same files
            os.replace(Path(beside, name), folder / name)


def download(parent: Path, timeout: float = 8.0) -> Path:
    """Download CIFAR-10 into `parent`/cifar-10-batches-bin and return that folder. Timeout: seconds without a byte.

    $PEGASUS_CIFAR10_URL names another address; size and digest stay. An interrupted download leaves no batch behind.
    """
    url = os.environ.get("PEGASUS_CIFAR10_URL", URL)
    print(f"downloading {SIZE / 1e6:.0f} MB from {url} to {parent / FOLDER}", file=sys.stderr, flush=True)
    parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=parent, prefix="cifar-10-", suffix=".part") as file:
        fetch(url, file, timeout)
        unpack(Path(file.name), parent / FOLDER)
    return parent / FOLDER


def main() -> None:
    parser = options.Parser(description="Download CIFAR-10's binary batches, and check them.")
    parser.add_argument("folder", help="what to download to, as in `python cifar10.py data`")
    print(download(Path(parser.parse_args().folder)))


if __name__ == "__main__":
    options.run(main)
