"""Download CIFAR-10's binary batches and check them.

    python -m pegasus.data.download data    # makes data/cifar-10-batches-bin

$PEGASUS_CIFAR10_URL names another address; size and SHA-256 stay.
"""
import contextlib
import hashlib
import http.client
import os
import tarfile
import tempfile
import urllib.error
import urllib.request
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from pegasus import cli, streams
from pegasus.cli import UserError
from pegasus.data import cifar10
from pegasus.files import writing

URL = "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz"
SIZE = 170_052_171  # bytes of the archive
SHA256 = "c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd"
BATCH_SIZE = 10_000 * cifar10.RECORD  # bytes of each batch file
CHUNK = 1 << 20
BY_HAND = (
    f"download {URL} yourself, unpack it, "
    f"and give the folder {cifar10.FOLDER} as --data or CIFAR10_DIR"
)
# What urllib raises where a server fails; ValueError: the address is none.
NETWORK_ERRORS = (OSError, http.client.HTTPException, ValueError)


class Unreachable(UserError):
    """The server gave no answer in HTTP."""


def reason(error: Exception) -> str:
    """Return why the network failed, on one line."""
    return cli.brief(getattr(error, "reason", error) or "no answer")


def connect(url: str, timeout: float, by_hand: str = BY_HAND) -> http.client.HTTPResponse:
    """Ask for an address. Raises Unreachable where no answer in HTTP arrives.

    Raises UserError for an answer other than "200 OK". by_hand: what to do instead.
    """
    try:
        return urllib.request.urlopen(url, timeout=timeout)
    except urllib.error.HTTPError as error:
        error.close()
        answer = f"{error.code} {cli.brief(error.reason)}"
        raise UserError(
            f"{url}: the server answered {answer}; try again later, or {by_hand}"
        ) from None
    except NETWORK_ERRORS as error:
        raise Unreachable(
            f"{url}: can't be reached ({reason(error)}); try again, or {by_hand}"
        ) from None


@contextlib.contextmanager
def arriving(url: str, by_hand: str = BY_HAND) -> Iterator[None]:
    """Turn what goes wrong while bytes of an archive arrive into a UserError."""
    try:
        yield
    except (*NETWORK_ERRORS, tarfile.TarError, EOFError, zlib.error) as error:
        raise UserError(
            f"{url}: broke off ({reason(error)}); nothing was kept; try again, or {by_hand}"
        ) from None


def fetch(url: str, file: BinaryIO, timeout: float) -> int:
    """Write what is behind an address to a file and return the number of bytes.

    Stops soon after SIZE bytes: what is longer is not the archive.
    """
    received = 0
    with connect(url, timeout) as response:
        while received <= SIZE:
            with arriving(url):
                chunk = response.read(CHUNK)
            if not chunk:
                break
            received += file.write(chunk)
            progress = f"{received / 1e6:6.1f} of {SIZE / 1e6:.1f} MB"
            streams.show(progress, last=received == SIZE)
    return received


def check_archive(file: BinaryIO, received: int, url: str) -> None:
    """Hold a file of `received` bytes to the archive's size and SHA-256."""
    file.seek(0)  # this writes what is buffered, too
    if received != SIZE:
        got = f"more than {SIZE:,}" if received > SIZE else f"{received:,}"
        raise UserError(
            f"{url}: got {got} bytes beginning {file.read(12)!r}, wanted {SIZE:,}; "
            f"nothing was kept; {BY_HAND}"
        )
    digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != SHA256:
        raise UserError(
            f"{url}: SHA-256 is {digest}, wanted {SHA256}; nothing was kept; {BY_HAND}"
        )


def read_member(tar: tarfile.TarFile, name: str, archive: Path) -> bytes:
    """Read one batch file of an archive."""
    member = tar.getmember(f"{cifar10.FOLDER}/{name}")
    if not member.isfile() or member.size != BATCH_SIZE:
        raise UserError(
            f"{archive}: {member.name} is not a file of {BATCH_SIZE:,} bytes; {BY_HAND}"
        )
    return tar.extractfile(member).read()


def read_archive(archive: Path) -> dict[str, bytes]:
    """Read the six batches of an archive, by name; no other member is touched."""
    names = cifar10.TRAIN + cifar10.TEST
    try:
        with tarfile.open(archive, "r:gz") as tar:
            return {name: read_member(tar, name, archive) for name in names}
    except (tarfile.TarError, KeyError, EOFError, zlib.error) as error:
        raise UserError(f"{archive}: not CIFAR-10's archive ({error}); {BY_HAND}") from None


def write_batches(batches: dict[str, bytes], folder: Path) -> None:
    """Write batch files into a folder, each whole or not at all.

    Another process may write the same files, so each has a temporary folder.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with writing(folder, "choose another place"):
        with tempfile.TemporaryDirectory(dir=folder) as temporary:
            for name, data in batches.items():
                path = Path(temporary, name)
                path.write_bytes(data)
                path.replace(folder / name)


def download(parent: Path, timeout: float = 8.0) -> Path:
    """Download CIFAR-10 into `parent`/cifar-10-batches-bin and return that folder.

    timeout: seconds without a byte after which the server counts as gone.
    An interrupted download leaves no batch behind. Raises UserError.
    """
    url = os.environ.get("PEGASUS_CIFAR10_URL", URL)
    folder = parent / cifar10.FOLDER
    streams.say(f"downloading {SIZE / 1e6:.0f} MB from {url} to {folder}")
    parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=parent, prefix="cifar-10-", suffix=".part") as file:
        received = fetch(url, file, timeout)
        check_archive(file, received, url)
        batches = read_archive(Path(file.name))
    write_batches(batches, folder)
    return folder


def complete_folder(parent: Path) -> Path:
    """Return `parent`/cifar-10-batches-bin, downloaded where it lacks a file. Raises UserError."""
    folder = parent / cifar10.FOLDER
    return download(parent) if cifar10.missing_files(folder) else folder


def main(argv: list[str] | None = None) -> None:
    """Download to the folder that the command line names, and print where to."""
    parser = cli.Parser(description="Download CIFAR-10's binary batches and check them.")
    parser.add_argument("folder", help="the folder to download to, as in `data`")
    print(complete_folder(Path(parser.parse_args(argv).folder)))


if __name__ == "__main__":
    cli.run(main)
