"""Pictures of any kind: one that a person names, and folders of them, a class each.

    photos/horse/*.jpg  photos/bird/*.png ...           # a tenth is kept to test
    photos/train/horse/...  photos/test/horse/... ...   # as they are

A picture is whatever Pillow reads: turned as its EXIF data say, what is transparent made
white, its middle square made as large as asked for. A folder is read once: `pegasus-32.npz`
in it, for 32 pixels a side, keeps the pixels until a file is added, removed or changed.
"""
import functools
import hashlib
import itertools
import json
import os
import warnings
from pathlib import Path
from typing import NamedTuple

from pegasus import cli, files, streams
from pegasus.cli import UserError
from pegasus.data import cifar10, classes

import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps
from torch import Tensor

CACHE = "pegasus-{size}.npz"
VERSION = b"1"  # of how a picture is read
SPLITS = {"train", "test"}
TESTED = 10  # one of so many pictures of a class is kept to test
SHOWN = 5  # of the files left out that are named
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


class NoPicture(UserError):
    """A file whose content is no picture that can be used."""


@functools.cache
def formats() -> list[str]:
    """Return what Pillow reads without starting another program on a file."""
    Image.init()
    return [name for name in Image.ID if name != "EPS"]


def read(path: Path, size: int = 32) -> Tensor:
    """Read a picture's middle square as bytes (3, size, size).

    Raises NoPicture, and UserError for a file that can't be read at all.
    """
    try:
        with warnings.catch_warnings(action="ignore"):  # of a large picture
            with Image.open(path, formats=formats()) as image:
                image.draft("RGB", (4 * size, 4 * size))  # of a JPEG no more detail
                square = crop_square(image, size)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; wanted a picture") from None
    except MemoryError:
        raise
    except Image.DecompressionBombError:
        most = 2 * Image.MAX_IMAGE_PIXELS
        raise NoPicture(f"{path}: wanted at most {most:,} pixels; make it smaller") from None
    except Exception as error:  # a file can hold anything, and readers raise as much
        if isinstance(error, OSError) and error.errno:  # the system's, not Pillow's
            raise UserError(f"{path}: can't be read ({error.strerror})") from None
        reason = cli.brief(error)
        raise NoPicture(f"{path}: not a picture that can be read ({reason})") from None
    return torch.from_numpy(np.asarray(square).copy()).permute(2, 0, 1)


# ---- folders of them ----

Labelled = tuple[Tensor, Tensor]  # images and labels


class File(NamedTuple):
    """A file of a class. part: "train", "test", or "" where it is to be decided."""
    path: Path
    name: str
    part: str


class Pictures(NamedTuple):
    """Bytes (n, 3, size, size), the classes' names, (n,), and what is kept to test, (n,).

    left_out: files that are no pictures, (m,). Arrays of numpy.
    """
    images: np.ndarray
    names: np.ndarray
    is_test: np.ndarray
    left_out: np.ndarray


def folders(folder: Path) -> dict[str, Path]:
    """Return the folders in a folder by name, without hidden ones. Raises UserError."""
    try:
        found = [path for path in sorted(folder.iterdir()) if path.is_dir()]
    except OSError as error:
        raise UserError(f"{folder}: can't be read ({error.strerror})") from None
    return {path.name: path for path in found if not path.name.startswith(".")}


def parts(folder: Path) -> dict[str, dict[str, Path]]:
    """Return the folders of classes by name, of each part of the data.

    Raises UserError for one that can't be a class.
    """
    found = {"": folders(folder)}
    if set(found[""]) == SPLITS:
        found = {part: folders(place) for part, place in found[""].items()}
    for path in [place for part in found.values() for place in part.values()]:
        if not classes.is_name(path.name):
            raise UserError(
                f"{path}: this can't be a class's name; rename the folder to something "
                f"without commas that is none of {', '.join(sorted(classes.TAKEN))}"
            )
    return found


def refuse(error: OSError) -> None:
    """Raise UserError for a folder that can't be read."""
    if error.filename:
        raise UserError(f"{error.filename}: can't be read ({error.strerror})")


def list_files(found: dict[str, dict[str, Path]], names: tuple[str, ...]) -> list[File]:
    """Return all files of some classes, hidden ones left out."""
    listed = []
    for part, name in itertools.product(found, names):
        top = found[part].get(name)
        for place, inner, files_there in os.walk(top or "", onerror=refuse):
            inner[:] = sorted(folder for folder in inner if not folder.startswith("."))
            paths = [Path(place, file) for file in sorted(files_there) if file[0] != "."]
            listed += [File(path, name, part) for path in paths if path.is_file()]
    return listed


def chance(file: File) -> bytes:
    """Return what decides whether a file is kept to test, of its name alone."""
    return hashlib.sha256(os.fsencode(file.path.name)).digest()


def is_test(kept: list[File]) -> list[bool]:
    """Return which files are kept to test: as their folders say, else a tenth a class."""
    tested = {file for file in kept if file.part == "test"}
    for name in {file.name for file in kept if not file.part}:
        of_class = sorted((file for file in kept if file.name == name), key=chance)
        tested |= set(of_class[: max(1, len(of_class) // TESTED)])
    return [file in tested for file in kept]


def printable(text: str) -> str:
    """Return text in which nothing moves a terminal's cursor."""
    return "".join(letter if letter.isprintable() else "?" for letter in text)


def read_all(listed: list[File], size: int) -> Pictures:
    """Read files; what is no picture is left out. Raises UserError."""
    images = np.empty((len(listed), 3, size, size), np.uint8)
    kept = []
    left_out = []
    for number, file in enumerate(listed):
        if number % 100 == 0:
            streams.show(f"reading picture {number:,} of {len(listed):,}")
        try:
            images[len(kept)] = read(file.path, size).numpy()
            kept.append(file)
        except NoPicture as error:
            left_out.append(printable(str(error)))
    streams.show("")
    names = np.array([file.name for file in kept], dtype=str)
    tested = np.array(is_test(kept), dtype=bool)
    return Pictures(images[: len(kept)], names, tested, np.array(left_out, dtype=str))


def report(folder: Path, pictures: Pictures) -> None:
    """Say what was left out. Raises UserError where that is more than half, or all."""
    count = len(pictures.left_out)
    total = len(pictures.images) + count
    if not total:
        raise UserError(f"{folder}: no file in its folders; wanted one of pictures for each class")
    if count > total / 2:
        raise UserError(
            f"{folder}: {count:,} of {total:,} files are no pictures, as "
            f"{pictures.left_out[0]}; wanted a folder of pictures for each class"
        )
    if count:
        some = [f"left out of {folder}, {count:,} of {total:,} files:"]
        some += [f"  {text}" for text in pictures.left_out[:SHOWN]]
        some += [f"  and {count - SHOWN:,} more"] if count > SHOWN else []
        streams.say("\n".join(some))


# ---- what was read, kept in one file ----


def fingerprint(folder: Path, listed: list[File]) -> str:
    """Return a digest of the names, sizes and times of change of a folder's files."""
    digest = hashlib.sha256(VERSION)
    for path, name, part in listed:
        stat = path.stat()
        inside = os.fsencode(path.relative_to(folder)).hex()
        line = [inside, name, part, stat.st_size, stat.st_mtime_ns]
        digest.update(json.dumps(line).encode())
    return digest.hexdigest()


def load_cache(path: Path, key: str) -> Pictures | None:
    """Return what was kept, or None where it is damaged or of other files."""
    try:
        with open(path, "rb") as file, np.load(file, allow_pickle=False) as kept:
            if str(kept["key"]) == key:
                return Pictures(*(kept[name] for name in Pictures._fields))
    except Exception:  # a damaged file can raise anything
        pass
    return None


def save_cache(path: Path, key: str, pictures: Pictures) -> None:
    """Keep what was read, where the folder can be written to."""
    advice = "its pictures are read again at each start"
    try:
        with files.replace_file(path, advice) as temporary, open(temporary, "wb") as file:
            np.savez(file, key=np.array(key), **pictures._asdict())
    except UserError as error:
        streams.say(str(error))


def read_folder(folder: Path, listed: list[File], size: int) -> Pictures:
    """Return a folder's pictures, from what was kept of them if nothing has changed."""
    path = folder / CACHE.format(size=size)
    key = fingerprint(folder, listed)
    kept = load_cache(path, key)
    pictures = read_all(listed, size) if kept is None else kept
    report(folder, pictures)
    if kept is None:
        files.sweep(folder)
        save_cache(path, key, pictures)
    return pictures


def load(
    folder: Path, names: str | None, size: int = 32
) -> tuple[tuple[str, ...], Labelled, Labelled]:
    """Load some classes of a folder of pictures, to train on and to test.

    names: of classes, separated by commas; by default horse,bird, or all where these are
    not there. Returns the names, and twice images, uint8 (n, 3, size, size), with labels,
    (n,), positions among the names. Raises UserError.
    """
    found = parts(folder)
    known = tuple(sorted({name for part in found.values() for name in part}))
    if names is None:
        names = classes.PAIR if {"horse", "bird"} <= set(known) else ",".join(known)
    chosen = classes.parse(names, known)
    pictures = read_folder(folder, list_files(found, chosen), size)
    images = torch.from_numpy(pictures.images)
    labels = torch.tensor([chosen.index(name) for name in pictures.names], dtype=torch.int64)
    for_test = torch.from_numpy(pictures.is_test)
    for rows, purpose in ((~for_test, "to train on"), (for_test, "to test")):
        cifar10.check_counts(folder, labels[rows], chosen, purpose)
    train = (images[~for_test], labels[~for_test])
    return chosen, train, (images[for_test], labels[for_test])
