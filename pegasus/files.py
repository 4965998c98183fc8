"""Files that are written whole or not at all."""
import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from pegasus.cli import UserError


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


@contextlib.contextmanager
def replace_file(path: Path, advice: str = "choose another place") -> Iterator[Path]:
    """Give a temporary name to write to, which becomes `path` at the end.

    Until then `path` stays as it was. Raises UserError.
    """
    with writing(path, advice):
        path = real_file(path)
        temporary = Path(f"{path}.part")
        try:
            yield temporary
            os.replace(temporary, path)
        finally:
            with contextlib.suppress(OSError):
                temporary.unlink()
