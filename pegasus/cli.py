"""Command lines: options made of a dataclass, errors told in one sentence.

Scripts import this before torch, so that a missing package is one sentence too.
"""
import argparse
import dataclasses
import re
import signal
import sys
import types
from collections.abc import Callable
from math import inf, isfinite
from typing import TypeVar

from pegasus import streams

streams.prepare()
OLDEST = {"numpy": (1, 26), "PIL": (10, 4), "torch": (2, 10)}  # packages' versions
ADVICE = "use .venv/bin/python, which `make build` makes"

try:
    import numpy
    import PIL
    import torch
except ModuleNotFoundError as error:
    print(f"{sys.argv[0]}: {sys.executable} has no {error.name}; {ADVICE}", file=sys.stderr)
    sys.exit(2)
except KeyboardInterrupt:  # importing torch takes a second or more
    sys.exit(130)

try:
    import reparam  # noqa: F401
except ImportError as error:  # PEGASUS_SIMD names an instruction set that is none
    print(f"{sys.argv[0]}: {error}", file=sys.stderr)
    sys.exit(2)

T = TypeVar("T")


def check_versions() -> None:
    """Exit with a sentence where a package is older than what this was tried with."""
    for package in (numpy, PIL, torch):
        oldest = OLDEST[package.__name__]
        numbers = [int(text) for text in re.findall(r"\d+", package.__version__)[:2]]
        if tuple(numbers) < oldest:
            name = f"{package.__name__} {package.__version__}"
            wanted = ".".join(map(str, oldest))
            print(
                f"{sys.argv[0]}: {sys.executable} has {name}, wanted {wanted} or later; "
                f"{ADVICE}",
                file=sys.stderr,
            )
            sys.exit(2)


check_versions()


class UserError(Exception):
    """Something the user can mend.

    The text says what, where, what was got, what was wanted and what to do.
    """


def option(default: object, text: str, **checks: object) -> object:
    """Return a field of an options dataclass.

    text: its help. checks: `choices`, `least` (>=), `most` (<=), `above` (>),
    `metavar`, `nargs`, `positional`.
    """
    return dataclasses.field(default=default, metadata={"text": text, **checks})


def option_type(field: dataclasses.Field) -> type:
    """Return an option's type: of `float | None` it is float."""
    if isinstance(field.type, types.UnionType):
        return field.type.__args__[0]
    return field.type


def wanted_number(kind: type, least: float = -inf, above: float = -inf, most: float = inf) -> str:
    """Describe which numbers an option takes, as in "a whole number, 1 or more"."""
    texts = ["a whole number" if kind is int else "a number"]
    if least > -inf:
        texts.append(f"{least} or more")
    if above > -inf:
        texts.append(f"above {above}")
    if most < inf:
        texts.append(f"at most {most}")
    elif kind is int:
        texts.append("below 2^63")
    return ", ".join(texts)


def in_range(value: float, least: float = -inf, above: float = -inf, most: float = inf) -> bool:
    """Return whether a number is finite, fits into 64 bits and lies in a range."""
    if isinstance(value, int):
        fits = -(2**63) <= value < 2**63
    else:
        fits = isfinite(value)
    return fits and value >= least and value > above and value <= most


def number(kind: type, **limits: float) -> Callable[[str], int | float]:
    """Return a converter for argparse that takes numbers in a range only.

    limits: `least` (>=), `above` (>), `most` (<=).
    """
    wanted = wanted_number(kind, **limits)

    def convert(text: str) -> int | float:
        try:
            value = kind(text)
        except ValueError:
            message = f"got {text!r:.60}, wanted {wanted}"
            raise argparse.ArgumentTypeError(message) from None
        if not in_range(value, **limits):
            raise argparse.ArgumentTypeError(f"got {text:.60}, wanted {wanted}")
        return value

    return convert


def text_option(text: str) -> str:
    """Convert for argparse: take only what can be written down again in UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError:
        message = f"got {text!r:.60}, wanted UTF-8"
        raise argparse.ArgumentTypeError(message) from None
    return text


class Parser(argparse.ArgumentParser):
    """An argparse parser whose errors are one line on stderr, exit status 2."""

    def error(self, message: str) -> None:
        self.exit(2, f"{self.prog}: {message}; {self.prog} --help lists the options\n")


def limits(field: dataclasses.Field) -> dict[str, float]:
    """Return the range of an option that is a number."""
    names = ("least", "above", "most")
    return {name: field.metadata[name] for name in names if name in field.metadata}


def add_option(parser: argparse.ArgumentParser, field: dataclasses.Field) -> None:
    """Add a field of an options dataclass to a parser, as its metadata says."""
    meta = field.metadata
    kind = option_type(field)
    settings = {}
    if kind is str:
        settings["type"] = text_option
    if kind in (int, float):
        settings["type"] = number(kind, **limits(field))
    if kind is bool:
        settings["action"] = argparse.BooleanOptionalAction
    for name in ("choices", "metavar", "nargs"):
        if name in meta:
            settings[name] = meta[name]
    if meta.get("positional"):
        parser.add_argument(field.name, help=meta["text"], **settings)
        return
    text = meta["text"]
    if field.default not in (None, False, ""):
        text += f" (default: {field.default})"
    flag = flag_of(field.name)
    parser.add_argument(flag, dest=field.name, default=argparse.SUPPRESS, help=text, **settings)


def flag_of(name: str) -> str:
    """Return an option's flag; `from_` stands for --from, which Python reserves."""
    return "--" + name.rstrip("_").replace("_", "-")


def parse(
    config_class: type[T], argv: list[str] | None, description: str
) -> tuple[T, set[str]]:
    """Return an options dataclass of a command line, and the options given there.

    Misspelt options and values out of range exit with status 2 and one sentence.
    """
    parser = Parser(
        description=description,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    for field in dataclasses.fields(config_class):
        add_option(parser, field)
    given = vars(parser.parse_args(argv))
    empty = [name for name, value in given.items() if value == []]  # of several "--"
    if empty:
        parser.error(f"argument {empty[0]}: got nothing, wanted a value")
    return config_class(**given), set(given)


def check(config: object) -> None:
    """Check options out of a file as the command line would. Raises ValueError."""
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        kind = option_type(field)
        if value is None and isinstance(field.type, types.UnionType):
            continue
        if kind is float and type(value) is int and in_range(value):
            value = float(value)
        fits = type(value) is kind
        if fits and kind in (int, float):
            fits = in_range(value, **limits(field))
        if fits and "choices" in field.metadata:
            fits = value in field.metadata["choices"]
        if not fits:
            raise ValueError(f"{flag_of(field.name)} {value!r:.60}")


def out_of_memory(error: Exception) -> bool:
    """Return whether an error says that there is no memory left."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    text = str(error)
    return "can't allocate memory" in text or "MPS backend out of memory" in text


def brief(error: object) -> str:
    """Return an error's text on one line of at most 200 characters."""
    text = " ".join(str(error).split())
    if not text:
        return type(error).__name__
    return text if len(text) <= 200 else text[:200] + "..."


def sentence(error: Exception) -> str:
    """Return what to tell the user of an error; raise it again if it is a bug."""
    if isinstance(error, UserError):
        return str(error)
    if isinstance(error, OSError):
        return f"{error.filename or 'stdout'}: {error.strerror or error}"
    if isinstance(error, torch.OutOfMemoryError):
        return (
            f"the GPU's memory is full ({brief(error)}); "
            "make room, or set CUDA_VISIBLE_DEVICES= for the CPU"
        )
    if out_of_memory(error):
        return f"memory is full ({brief(error)}); ask for less"
    raise error


def leave(signum: int, _frame: object) -> None:
    """End as Ctrl-C does, so that files that are half written go."""
    sys.exit(128 + signum)


def run(main: Callable[[], int | None]) -> None:
    """Run a script's main and exit with its status.

    An error that the user can mend becomes one sentence and exit status 2.
    """
    for name in ("SIGTERM", "SIGHUP"):  # not every system has both
        signum = getattr(signal, name, None)
        if signum and signal.getsignal(signum) == signal.SIG_DFL:
            signal.signal(signum, leave)
    try:
        status = main()
        print(end="", flush=True)  # or a reader that has left is noticed too late
        sys.exit(status)
    except BrokenPipeError:
        streams.silence()
        sys.exit(141)
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception as error:
        if isinstance(error, OSError) and not error.filename:
            streams.silence()  # or what stdout did not take is tried again
        print(f"{sys.argv[0]}: {sentence(error)}", file=sys.stderr)
        sys.exit(2)
