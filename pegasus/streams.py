"""Standard streams that may be closed, full, no terminal, or not in UTF-8."""
import contextlib
import errno
import os
import signal
import sys
from typing import TextIO

GONE = (errno.EPIPE, errno.EIO)  # nobody reads a pipe any more, a terminal was closed


def prepare() -> None:
    """Give closed streams a place to go to, and let any character be printed.

    Otherwise a file that is opened later would get the descriptor of a closed stream, and
    what libraries print.
    """
    descriptor = os.open(os.devnull, os.O_RDWR)
    while descriptor <= 2:
        descriptor = os.open(os.devnull, os.O_RDWR)
    os.close(descriptor)
    if sys.stdin is None:
        sys.stdin = open(os.devnull)
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w"))
        stream = getattr(sys, name)
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


def say(text: str) -> None:
    """Print a line on stderr at once, in the first of several processes."""
    several = os.environ.get("WORLD_SIZE", "")  # by torchrun; others set RANK alone
    if not several or os.environ.get("RANK", "0") in ("", "0"):
        print(text, file=sys.stderr, flush=True)


def is_terminal(stream: TextIO) -> bool:
    """Return whether lines of a stream can be rewritten."""
    return stream.isatty() and os.environ.get("TERM") != "dumb"


def show(line: str, last: bool = False) -> None:
    """Rewrite the last line of the terminal, where stderr is one."""
    if is_terminal(sys.stderr):
        end = "\033[K\n" if last else "\033[K"
        print(f"\r{line}", end=end, file=sys.stderr, flush=True)


def silence() -> None:
    """Let what is printed from now on go nowhere."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def print_or_stop(line: str, end: str = "\n") -> None:
    """Print at once; where that fails raise SIGTERM, at which a run saves and stops."""
    try:
        print(line, end=end, flush=True)
    except OSError as error:
        silence()
        if error.errno not in GONE:
            with contextlib.suppress(OSError):
                text = f"stdout: can't be written ({error.strerror}); saving, then stopping"
                print(text, file=sys.stderr, flush=True)
        signal.raise_signal(signal.SIGTERM)
