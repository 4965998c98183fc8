"""STL-10's binary files: read them, and download those that have labels.

    python -m pegasus.data.stl10 data    # makes data/stl10_binary

An image file is a run of images of 27,648 bytes: 9,216 red, green and blue ones each,
column by column. A label file has a byte, 1 to 10, for each. The archive has 100,000
images without labels behind these, which are not downloaded.

Coates, Lee and Ng, An Analysis of Single Layer Networks in Unsupervised Feature Learning
(2011). $PEGASUS_STL10_URL names another address; sizes and MD5 sums stay.
"""
import hashlib
import os
import tarfile
import tempfile
from collections.abc import Iterator
from pathlib import Path

from pegasus import cli, streams
from pegasus.cli import UserError
from pegasus.data import cifar10
from pegasus.data.download import CHUNK, arriving, connect
from pegasus.files import writing

import numpy as np
import torch
from torch import Tensor

CLASSES = (
    "airplane", "bird", "car", "cat", "deer",
    "dog", "horse", "monkey", "ship", "truck",
)
PARTS = ("train", "test")
SIDE = 96
FOLDER = "stl10_binary"
URL = "http://ai.stanford.edu/~acoates/stl10/stl10_binary.tar.gz"
FILES = {  # bytes and MD5, in the archive's order
    "test_X.bin": (221_184_000, "7f263ba9f9e0b06b93213547f721ac82"),
    "test_y.bin": (8_000, "36f9794fa4beb8a2c72628de14fa638e"),
    "train_X.bin": (138_240_000, "918c2871b30a85fa023e0c44e0bee87f"),
    "train_y.bin": (5_000, "5a34089d4802c674881badbb80307741"),
}
BY_HAND = f"download {URL} yourself, unpack it, and give the folder {FOLDER} as --data"


# ---- the files ----


def missing_files(folder: Path) -> list[str]:
    """Return the names of the four files that a folder lacks."""
    return [name for name in FILES if not (folder / name).is_file()]


def read(folder: Path, part: str) -> tuple[Tensor, Tensor]:
    """Read "train" or "test": images, uint8 (n, 3, 96, 96), and labels from 0, (n,).

    Raises UserError for files that do not fit each other or are none of STL-10's.
    """
    path = folder / f"{part}_X.bin"
    label_path = folder / f"{part}_y.bin"
    labels = torch.from_numpy(np.fromfile(label_path, np.uint8)).long()
    size = path.stat().st_size
    if not len(labels) or size != len(labels) * 3 * SIDE * SIDE:
        raise UserError(
            f"{path}: got {size:,} bytes for {len(labels):,} labels, wanted "
            f"{3 * SIDE * SIDE:,} for each; get the files again"
        )
    cifar10.check_labels(label_path, labels, first=1, what="STL-10")
    columns = np.fromfile(path, np.uint8).reshape(-1, 3, SIDE, SIDE)
    return torch.from_numpy(columns).mT.contiguous(), labels - 1


def load(folder: Path, names: tuple[str, ...], part: str) -> tuple[Tensor, Tensor]:
    """Load some classes of "train" or "test": images, uint8 (n, 3, 96, 96), labels, (n,).

    A label is a position in `names`. Raises UserError.
    """
    missing = missing_files(folder)
    if missing:
        raise UserError(f"{folder}: no {', '.join(missing)}; {BY_HAND}")
    indices = [CLASSES.index(name) for name in names]
    images, labels = cifar10.select(*read(folder, part), indices)
    cifar10.check_counts(folder, labels, names, f"in {part}_X.bin")
    return images, labels


# ---- the download ----


def chunks(tar: tarfile.TarFile, member: tarfile.TarInfo, url: str) -> Iterator[bytes]:
    """Iterate over the bytes of an archive's member, as they arrive."""
    source = tar.extractfile(member)
    while True:
        with arriving(url, BY_HAND):
            chunk = source.read(CHUNK)
        if not chunk:
            return
        yield chunk


def extract(tar: tarfile.TarFile, member: tarfile.TarInfo, path: Path, url: str) -> None:
    """Write a member of the archive to a file. Raises UserError where it is another one."""
    size, digest = FILES[path.name]
    if not member.isfile() or member.size != size:
        raise UserError(
            f"{url}: {path.name} is no file of {size:,} bytes, but of {member.size:,}; "
            f"nothing was kept; {BY_HAND}"
        )
    md5 = hashlib.md5(usedforsecurity=False)
    with open(path, "wb") as file:
        for chunk in chunks(tar, member, url):
            md5.update(chunk)
            file.write(chunk)
            streams.show(f"{path.name} {file.tell() / 1e6:6.1f} of {size / 1e6:.1f} MB")
    if md5.hexdigest() != digest:
        raise UserError(
            f"{url}: {path.name} has MD5 {md5.hexdigest()}, wanted {digest}; "
            f"nothing was kept; {BY_HAND}"
        )


def extract_all(tar: tarfile.TarFile, folder: Path, url: str) -> None:
    """Write the four files of an archive into a folder, and read no further."""
    wanted = set(FILES)
    while wanted:
        with arriving(url, BY_HAND):
            member = tar.next()
        if member is None:
            missing = ", ".join(sorted(wanted))
            raise UserError(f"{url}: no {missing} in it; nothing was kept; {BY_HAND}")
        name = Path(member.name).name
        if name in wanted:
            extract(tar, member, folder / name, url)
            wanted.remove(name)


def download(parent: Path, timeout: float = 8.0) -> Path:
    """Download four files into `parent`/stl10_binary and return that folder.

    timeout: seconds without a byte after which the server counts as gone. An interrupted
    download leaves nothing behind. Raises UserError.
    """
    url = os.environ.get("PEGASUS_STL10_URL", URL)
    folder = parent / FOLDER
    streams.say(f"downloading 360 MB, less as they are packed, from {url} to {folder}")
    parent.mkdir(parents=True, exist_ok=True)
    with writing(folder, "choose another place"):
        with tempfile.TemporaryDirectory(dir=parent, prefix="stl-10-") as temporary:
            with connect(url, timeout, BY_HAND) as response:
                with arriving(url, BY_HAND):
                    tar = tarfile.open(fileobj=response, mode="r|gz")
                extract_all(tar, Path(temporary), url)
            streams.show("")
            folder.mkdir(exist_ok=True)
            for name in FILES:
                Path(temporary, name).replace(folder / name)
    return folder


def complete_folder(parent: Path) -> Path:
    """Return `parent`/stl10_binary, downloaded where it lacks a file. Raises UserError."""
    folder = parent / FOLDER
    return download(parent) if missing_files(folder) else folder


def main(argv: list[str] | None = None) -> None:
    """Download to the folder that the command line names, and print where to."""
    parser = cli.Parser(description="Download STL-10's pictures that have labels.")
    parser.add_argument("folder", help="the folder to download to, as in `data`")
    print(complete_folder(Path(parser.parse_args(argv).folder)))


if __name__ == "__main__":
    cli.run(main)
