"""Pictures of any kind: one that a person names, and folders of them, a class each.

    photos/horse/*.jpg  photos/bird/*.png ...           # a tenth is kept to test
    photos/train/horse/...  photos/test/horse/... ...   # as they are

A picture is whatever Pillow reads: turned as its EXIF data say, what is transparent made
white, its middle square made as large as asked for. A folder is read once: `pegasus-32.npz`
in it, for 32 pixels a side, keeps the pixels until a file is added, removed or changed.
"""
import hashlib
import json
import os
import sys
import warnings
import zipfile
from pathlib import Path
from typing import NamedTuple

from pegasus import cli, files, streams
from pegasus.cli import UserError
from pegasus.data import cifar10

import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps
from torch import Tensor

CACHE = "pegasus-{size}.npz"
SPLITS = {"train", "test"}
TESTED = 10  # one of so many pictures of a class is kept to test
SHOWN = 5  # of the files left out that are named
TAKEN = {"any", "morph", "pegasus", "prior"}  # names that mean something else
TURNS = {  # of EXIF's orientations
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


# ---- one picture ----


def upright(image: Image.Image) -> Image.Image:
    """Turn a picture as its EXIF data say, where that can be read.

    ImageOps.exif_transpose would write all of the data again, which may be broken.
    """
    try:
        turn = TURNS.get(image.getexif().get(ExifTags.Base.Orientation))
    except Exception:  # anything can stand there
        turn = None
    return image if turn is None else image.transpose(turn)


def crop_square(image: Image.Image, size: int) -> Image.Image:
    """Return a picture's middle square, size x size, RGB, what is transparent white.

    Raises ValueError for pixels whose white is unknown.
    """
    if image.mode in ("I", "F"):
        raise ValueError("its pixels have 32 bits; save it with 8 or 16")
    if image.mode.startswith("I;16"):  # which Pillow would cut off at 255
        image = image.convert("I").point(lambda value: value / 256).convert("L")
    image = upright(image)
    if image.has_transparency_data:
        paper = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(paper, image.convert("RGBA"))
    return ImageOps.fit(image.convert("RGB"), (size, size))


def read(path: Path, size: int = 32) -> Tensor:
    """Read a picture's middle square as bytes (3, size, size). Raises UserError."""
    try:
        with warnings.catch_warnings(action="ignore"):  # of a large picture
            with Image.open(path) as image:
                image.draft("RGB", (4 * size, 4 * size))  # of a JPEG no more detail
                square = crop_square(image, size)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; wanted a picture") from None
    except Image.DecompressionBombError:
        most = 2 * Image.MAX_IMAGE_PIXELS
        raise UserError(
            f"{path}: wanted at most {most:,} pixels; make it smaller"
        ) from None
    except Exception as error:  # a file can hold anything, and readers raise as much
        reason = cli.brief(error)
        raise UserError(f"{path}: not a picture that can be read ({reason})") from None
    return torch.from_numpy(np.asarray(square).copy()).permute(2, 0, 1)


# ---- folders of them ----

Labelled = tuple[Tensor, Tensor]  # images and labels


class File(NamedTuple):
    """A file of a class, and whether it is kept to test."""
    path: Path
    name: str
    is_test: bool


class Pictures(NamedTuple):
    """Bytes (n, 3, size, size), the classes' names, (n,), and what is kept to test, (n,).

    left_out: files that are no pictures, (m,). Arrays of numpy.
    """
    images: np.ndarray
    names: np.ndarray
    is_test: np.ndarray
    left_out: np.ndarray


def is_class_name(name: object) -> bool:
    """Return whether a class may have a name: it stands in lists, options and captions."""
    if not isinstance(name, str) or not name.isprintable() or name.strip() != name:
        return False
    coat = name.startswith(("white ", "dark "))
    return bool(name) and "," not in name and name not in TAKEN and not coat


def visible(folder: Path) -> list[Path]:
    """Return what is in a folder, by name, without hidden things. Raises UserError."""
    try:
        return sorted(path for path in folder.iterdir() if not path.name.startswith("."))
    except OSError as error:
        raise UserError(f"{folder}: can't be read ({error.strerror})") from None


def class_folders(folder: Path) -> list[Path]:
    """Return the folders in a folder. Raises UserError where one can't be a class."""
    folders = [path for path in visible(folder) if path.is_dir()]
    for path in folders:
        if not is_class_name(path.name):
            raise UserError(f"{path}: no class can have this name; rename the folder")
    return folders


def files_below(folder: Path) -> list[Path]:
    """Return all files in a folder and in folders there."""
    found = []
    for path in visible(folder):
        if path.is_dir():
            found += files_below(path)
        elif path.is_file():
            found.append(path)
    return found


def chance(path: Path) -> bytes:
    """Return what decides whether a file is kept to test, of its name alone."""
    return hashlib.sha256(os.fsencode(path.name)).digest()


def split(folder: Path) -> list[File]:
    """Return a class's files, a tenth of them kept to test."""
    paths = files_below(folder)
    kept = set(sorted(paths, key=chance)[: max(1, len(paths) // TESTED)])
    return [File(path, folder.name, path in kept) for path in paths]


def list_files(folder: Path) -> list[File]:
    """Return the files of all classes in a folder. Raises UserError."""
    places = {path.name: path for path in visible(folder) if path.is_dir()}
    if set(places) != SPLITS:
        return [file for place in class_folders(folder) for file in split(place)]
    listed = []
    for part, place in places.items():
        for inner in class_folders(place):
            paths = files_below(inner)
            listed += [File(path, inner.name, part == "test") for path in paths]
    return listed


def read_all(listed: list[File], size: int) -> Pictures:
    """Read files; what is no picture is left out."""
    images = np.empty((len(listed), 3, size, size), np.uint8)
    kept = []
    left_out = []
    for number, file in enumerate(listed):
        if number % 100 == 0:
            streams.show(f"reading picture {number:,} of {len(listed):,}")
        try:
            images[len(kept)] = read(file.path, size).numpy()
            kept.append(file)
        except UserError as error:
            left_out.append(str(error))
    streams.show("")
    names = np.array([file.name for file in kept], dtype=str)
    is_test = np.array([file.is_test for file in kept], dtype=bool)
    return Pictures(images[: len(kept)], names, is_test, np.array(left_out, dtype=str))


# ---- what was read, kept in one file ----


def fingerprint(folder: Path, listed: list[File]) -> str:
    """Return a digest of the names, sizes and times of change of a folder's files."""
    digest = hashlib.sha256()
    for path, name, is_test in listed:
        stat = path.stat()
        inside = os.fsencode(path.relative_to(folder)).hex()
        line = [inside, name, is_test, stat.st_size, stat.st_mtime_ns]
        digest.update(json.dumps(line).encode())
    return digest.hexdigest()


def load_cache(path: Path, key: str) -> Pictures | None:
    """Return what was kept, or None where it is damaged or of other files."""
    try:
        with open(path, "rb") as file, np.load(file, allow_pickle=False) as kept:
            if str(kept["key"]) == key:
                return Pictures(*(kept[name] for name in Pictures._fields))
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        pass
    return None


def save_cache(path: Path, key: str, pictures: Pictures) -> None:
    """Keep what was read, where the folder can be written to."""
    try:
        with files.replace_file(path) as temporary, open(temporary, "wb") as file:
            np.savez(file, key=np.array(key), **pictures._asdict())
    except UserError as error:
        print(f"{error}; its pictures are read again at each start", file=sys.stderr)


def report(folder: Path, pictures: Pictures) -> None:
    """Say what was left out. Raises UserError where that is more than half, or all."""
    count = len(pictures.left_out)
    total = len(pictures.images) + count
    if not total or count > total / 2:
        first = f", as {pictures.left_out[0]}" if count else ""
        raise UserError(
            f"{folder}: {count:,} of {total:,} files are no pictures{first}; wanted CIFAR-10's "
            "six binary batches, or a folder of pictures for each class"
        )
    if count:
        print(f"left out of {folder}, {count:,} of {total:,} files:", file=sys.stderr)
        for text in pictures.left_out[:SHOWN]:
            print(f"  {text}", file=sys.stderr)
        if count > SHOWN:
            print(f"  and {count - SHOWN:,} more", file=sys.stderr)


def read_folder(folder: Path, size: int) -> Pictures:
    """Return a folder's pictures, from what was kept of them if nothing has changed."""
    listed = list_files(folder)
    path = folder / CACHE.format(size=size)
    key = fingerprint(folder, listed)
    pictures = load_cache(path, key)
    if pictures is None:
        pictures = read_all(listed, size)
        report(folder, pictures)
        save_cache(path, key, pictures)
    else:
        report(folder, pictures)
    return pictures


def load(
    folder: Path, classes: str | None, size: int = 32
) -> tuple[str, Labelled, Labelled]:
    """Load some classes of a folder of pictures, to train on and to test.

    classes: names, separated by commas; by default horse,bird, or all where these are not
    there. Returns the names, and twice images, uint8 (n, 3, size, size), with labels, (n,),
    positions among the names. Raises UserError.
    """
    pictures = read_folder(folder, size)
    known = tuple(str(name) for name in np.unique(pictures.names))
    if classes is None:
        classes = cifar10.PAIR if {"horse", "bird"} <= set(known) else ",".join(known)
    indices = cifar10.class_indices(classes, known)
    images = torch.from_numpy(pictures.images)
    labels = torch.from_numpy(np.searchsorted(known, pictures.names))
    parts = []
    for is_test in (False, True):
        rows = torch.from_numpy(pictures.is_test == is_test)
        part = cifar10.select(images[rows], labels[rows], indices)
        names = [known[i] for i in indices]
        cifar10.check_counts(folder, part[1], names, "to test" if is_test else "to train on")
        parts.append(part)
    return classes, *parts
