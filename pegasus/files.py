"""Files that are written whole or not at all."""
import contextlib
import os
import secrets
import time
from collections.abc import Iterator
from pathlib import Path

from pegasus.cli import UserError

PREFIX = ".pegasus-"  # of files that are being written
STALE = 600  # seconds after which nobody writes them any more


@contextlib.contextmanager
def writing(path: Path, advice: str) -> Iterator[None]:
    """Turn what goes wrong when a file is written into a UserError."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or error
        raise UserError(f"{path}: can't be written ({reason}); {advice}") from None


def real_file(path: Path) -> Path:
    """Follow links to the file behind a name, which need not exist.

    Raises OSError where something else than a file is there.
    """
    path = Path(os.path.realpath(path))
    if path.exists() and not path.is_file():
        raise OSError("it is no file")
    return path


def is_same(path: Path, other: Path) -> bool:
    """Return whether two names are one file's, which need not exist."""
    if path.exists() and other.exists():
        return os.path.samefile(path, other)
    return os.path.realpath(path) == os.path.realpath(other)


def temporary_name(path: Path) -> Path:
    """Return a name beside a file's that no other process uses."""
    return path.parent / f"{PREFIX}{path.name[:100]}-{secrets.token_hex(8)}.part"


def sweep(folder: Path) -> None:
    """Remove what processes that were killed had not finished writing."""
    with contextlib.suppress(OSError):
        for path in folder.glob(f"{PREFIX}*.part"):
            if time.time() - path.stat().st_mtime > STALE:
                path.unlink()


@contextlib.contextmanager
def replace_file(path: Path, advice: str = "choose another place") -> Iterator[Path]:
    """Give a temporary name to write to, which becomes `path` at the end.

    Until then `path` stays as it was; its permissions stay anyway. Raises UserError.
    """
    with writing(path, advice):
        path = real_file(path)
        temporary = temporary_name(path)
        try:
            yield temporary
            if path.exists():
                temporary.chmod(path.stat().st_mode)
            os.replace(temporary, path)
        finally:
            with contextlib.suppress(OSError):
                temporary.unlink()
