"""What every script shares: options made from a dataclass, faults told in one sentence, files written whole.

Scripts import this first, before torch and what needs it, so that a missing package is told in one sentence.
"""
import argparse
import contextlib
import dataclasses
import math
import os
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NoReturn, TypeVar

try:
    import numpy  # noqa: F401
    import PIL  # noqa: F401
    import torch
except ModuleNotFoundError as error:
    print(f"{sys.argv[0]}: {sys.executable} has no {error.name}; use .venv/bin/python, which `make build` makes",
          file=sys.stderr)
    sys.exit(2)
except KeyboardInterrupt:  # importing torch takes a second or more
    sys.exit(130)

try:
    import reparam  # noqa: F401
except ImportError as error:  # PEGASUS_SIMD names no instruction set of the extension's
    print(f"{sys.argv[0]}: {error}", file=sys.stderr)
    sys.exit(2)

T = TypeVar("T")


class Fault(Exception):
    """Something the user can mend. The text says what, where, what was got, what was wanted and what to do."""


def option(default: object, text: str, **checks: object) -> object:
    """A field of an options dataclass. Checks: `choices`, `least` (>=), `most` (<=), `above` (>), `metavar`,
    `nargs`, `positional`."""
    return dataclasses.field(default=default, metadata={"text": text, **checks})


def number(kind: type, least: float = -math.inf, above: float = -math.inf, most: float = math.inf) -> Callable:
    """A converter for argparse that takes finite numbers in a range only; whole ones have 64 bits where they end up."""
    limits = ((f"{least} or more", least > -math.inf), (f"above {above}", above > -math.inf),
              (f"at most {most}", most < math.inf), ("below 2^63", kind is int and most == math.inf))
    wanted = ", ".join(["a whole number" if kind is int else "a number", *(text for text, said in limits if said)])

    def convert(text: str) -> int | float:
        try:
            value = kind(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"got {text!r:.60}, wanted {wanted}") from None
        finite = -2**63 <= value < 2**63 if kind is int else math.isfinite(value)
        if not (finite and value >= least and value > above and value <= most):
            raise argparse.ArgumentTypeError(f"got {text:.60}, wanted {wanted}")
        return value
    return convert


def words(text: str) -> str:
    """A converter for argparse that takes what can be written down again in UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise argparse.ArgumentTypeError(f"got {text!r:.60}, wanted UTF-8") from None
    return text


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> None:
        self.exit(2, f"{self.prog}: {message}; {self.prog} --help lists the options\n")


def add(parser: argparse.ArgumentParser, field: dataclasses.Field) -> None:
    """Add one field of an options dataclass to a parser, as its metadata says."""
    meta, settings = field.metadata, {}
    kind = field.type.__args__[0] if isinstance(field.type, types.UnionType) else field.type  # X | None is X
    if kind is str:
        settings["type"] = words
    if kind in (int, float):
        settings["type"] = number(kind, **{key: meta[key] for key in ("least", "above", "most") if key in meta})
    if kind is bool:
        settings["action"] = argparse.BooleanOptionalAction
    settings |= {key: meta[key] for key in ("choices", "metavar", "nargs") if key in meta}
    if meta.get("positional"):
        parser.add_argument(field.name, help=meta["text"], **settings)
        return
    text = meta["text"] + ("" if str(field.default) in ("None", "False", "") else f" (default: {field.default})")
    flag = "--" + field.name.rstrip("_").replace("_", "-")  # `from_`: what Python keeps for itself
    parser.add_argument(flag, dest=field.name, default=argparse.SUPPRESS, help=text, **settings)


def parse(kind: type[T], argv: list[str] | None, description: str,
          refuse: Callable[[str], NoReturn] | None = None) -> tuple[T, set[str]]:
    """An options dataclass from a command line, and the names of the options given there.

    Misspelt options and values out of range exit with status 2 and one sentence, or call `refuse`.
    """
    parser = Parser(description=description, allow_abbrev=False, add_help=not refuse,
                    formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = refuse or parser.error
    for field in dataclasses.fields(kind):
        add(parser, field)
    given = vars(parser.parse_args(argv))
    return kind(**given), set(given)


def stored(kind: type[T], values: dict[str, object]) -> T:
    """An options dataclass of values out of a file, held to what a command line may give. Raises ValueError."""
    def refuse(message: str) -> NoReturn:
        raise ValueError(message)
    flags = {f"--{name.replace('_', '-')}": value for name, value in values.items() if value is not None}
    switches = [flag if value else f"--no-{flag[2:]}" for flag, value in flags.items() if isinstance(value, bool)]
    others = [f"{flag}={value}" for flag, value in flags.items() if not isinstance(value, bool)]
    return parse(kind, switches + others, "", refuse)[0]


def full(error: Exception) -> bool:
    """Whether it says that there is no memory left."""
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in str(error)


@contextlib.contextmanager
def writing(path: Path, advice: str) -> Iterator[None]:
    """What goes wrong when a file is written, as a Fault."""
    try:
        yield
    except OSError as error:
        raise Fault(f"{path}: can't be written ({error.strerror or error}); {advice}") from None


def behind(path: Path) -> Path:
    """The file behind a name, through links, which need not be there. Raises OSError where there is something else."""
    path = Path(os.path.realpath(path))
    if path.exists() and not path.is_file():
        raise OSError("it is no file")
    return path


@contextlib.contextmanager
def replacing(path: Path, advice: str = "choose another place") -> Iterator[Path]:
    """A name to write to that becomes `path` at the end; until then `path` stays as it was. Raises Fault."""
    with writing(path, advice):
        path = behind(path)
        beside = Path(f"{path}.part")
        try:
            yield beside
            os.replace(beside, path)
        finally:
            with contextlib.suppress(OSError):
                beside.unlink()


def show(line: str, last: bool = False) -> None:
    """Rewrite the last line of the terminal, where stderr is one."""
    if sys.stderr.isatty():
        print(f"\r{line}", end="\033[K" + "\n" * last, file=sys.stderr, flush=True)


def brief(error: object) -> str:
    """An error's text on one line of bounded length."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 200 else text[:200] + "..."


def hush() -> None:
    """Let what is printed from now on go nowhere, since nobody reads it."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def run(main: Callable[[], int | None]) -> None:
    """Run a script's main; a Fault or a failing file becomes one sentence and exit status 2."""
    try:
        status = main()
        print(end="", flush=True)  # or a reader that has left is noticed too late
        sys.exit(status)
    except Fault as fault:
        sentence = str(fault)
    except BrokenPipeError:  # whoever read what this prints has left
        hush()
        sys.exit(141)
    except OSError as error:
        sentence = f"{error.filename or 'file'}: {error.strerror or error}"
    except torch.OutOfMemoryError as error:
        sentence = f"the GPU's memory is full ({brief(error)}); make room, or set CUDA_VISIBLE_DEVICES= for the CPU"
    except (MemoryError, RuntimeError) as error:
        if not full(error):
            raise
        sentence = f"memory is full ({brief(error)}); ask for less"
    except KeyboardInterrupt:
        sys.exit(130)
    print(f"{sys.argv[0]}: {sentence}", file=sys.stderr)
    sys.exit(2)
