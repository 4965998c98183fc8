"""Random bytes for what reads files and command lines: only one-sentence errors are right.

    python tests/fuzz.py checkpoint -runs=100000      # or batch, pickle, command

Further options are libFuzzer's. Needs atheris (`make fuzz` installs it);
tests/test_fuzz.py gives the same functions hypothesis's inputs.
"""
import atexit
import contextlib
import io
import os
import shutil
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
if __name__ == "__main__":
    import atheris
    watched = atheris.instrument_imports(include=["pegasus", "sample", "vae"])
else:
    watched = contextlib.nullcontext()
with watched:
    import sample
    from pegasus import checkpoint, cli
    from pegasus.cli import UserError
    from pegasus.data import cifar10, classes
    from pegasus.drawing import sampler
    from pegasus.models import variants
    from pegasus.training import config as training_config
    from pegasus.training.config import TrainConfig

MEMORY = "/dev/shm" if os.path.isdir("/dev/shm") else None  # where files are fast
INPUT = Path(tempfile.mkdtemp(dir=MEMORY)) / "input"
atexit.register(shutil.rmtree, INPUT.parent, ignore_errors=True)
FLAGS = [cli.flag_of(name) for name in TrainConfig.__dataclass_fields__]
WORDS = [
    *FLAGS, *(f"--no-{flag[2:]}" for flag in FLAGS), "mlp", "conv", "gaussian", "nan",
    "-inf", "1e999", "9" * 400, "-1", "0", "8x8x4", "128", "1x1x1", "horse,bird",
    "float32", "--help", "--", "-h", "=", "%s",
]


def batch(data: bytes) -> None:
    """Read the input as a batch file: images and labels are those of its records."""
    INPUT.write_bytes(data)
    with contextlib.suppress(UserError):
        images, labels = cifar10.read(INPUT)
        firsts = range(0, len(data), cifar10.RECORD)
        pixels = b"".join(data[i + 1 : i + cifar10.RECORD] for i in firsts)
        assert len(images) == len(labels) == len(data) / cifar10.RECORD
        assert images.numpy().tobytes() == pixels
        assert labels.tolist() == [data[i] for i in firsts]


def read_checkpoint(data: bytes) -> None:
    """Read the input as a checkpoint."""
    INPUT.write_bytes(data)
    with contextlib.suppress(UserError):
        sampler.load(INPUT)


def pickle(data: bytes) -> None:
    """Read the input as the pickle inside an archive whose check sums are right."""
    members = {
        "data.pkl": data,
        "version": b"3\n",
        "byteorder": b"little",
        "data/0": bytes(12),
    }
    with zipfile.ZipFile(INPUT, "w") as archive:
        for name, content in members.items():
            archive.writestr(f"a/{name}", content)
    with contextlib.suppress(UserError):
        sampler.load(INPUT)


def words_of(data: bytes) -> list[str]:
    """Return a command line made of bytes.

    Bytes below 128 stand for words of ours; others begin a word of the input's own, up to
    the end of its line.
    """
    words = []
    while data:
        if data[0] < 128:
            words.append(WORDS[data[0] % len(WORDS)])
            data = data[1:]
        else:
            word, _, data = data[1:].partition(b"\n")
            words.append(word.replace(b"\0", b"").decode(errors="surrogateescape"))
    return words


@contextlib.contextmanager
def refusals(output: io.StringIO) -> Iterator[None]:
    """Let refusals pass, and collect what is printed."""
    with contextlib.suppress(UserError, SystemExit):
        with contextlib.redirect_stderr(output), contextlib.redirect_stdout(output):
            yield


def command(data: bytes) -> None:
    """Read the input as a command line of train.py and of sample.py."""
    words = words_of(data)
    output = io.StringIO()
    with refusals(output):
        config, given = cli.parse(TrainConfig, words, "")
        config = training_config.resume_config(config, given, None)
        cli.check(config)
        classes.parse(config.classes or classes.PAIR, cifar10.CLASSES)
        variants.latent_shape(config.latent)
    with refusals(output):
        config, _ = cli.parse(sampler.SampleConfig, words, "")
        cli.check(config)
        sample.check_sheet(config)
        sample.check_pixels(config, 32, config.scale or 4)
    assert "Traceback" not in output.getvalue()


TARGETS: dict[str, Callable[[bytes], None]] = {
    "batch": batch,
    "checkpoint": read_checkpoint,
    "pickle": pickle,
    "command": command,
}


def seeds() -> dict[str, list[bytes]]:
    """Return good inputs to begin with."""
    history = [{"epoch": 1, "loss": 0.5}]
    weights = {"w": torch.arange(3.0)}
    state = {"model": weights, "history": history, "config": {"arch": "mlp"}}
    checkpoint.save(INPUT, state)
    whole = INPUT.read_bytes()
    with zipfile.ZipFile(INPUT) as archive:
        names = [name for name in archive.namelist() if name.endswith("data.pkl")]
        inner = archive.read(names[0])
    commands = [bytes(range(0, 128, 3)), b"\x02\x80mlp\n", b"\xff--epochs=3\n"]
    return {
        "batch": [bytes([7] * 3073), bytes(3073 * 2), bytes([10] * 3073), b"x"],
        "checkpoint": [whole],
        "pickle": [inner],
        "command": commands,
    }


def main() -> None:
    name = sys.argv.pop(1) if sys.argv[1:] else ""
    if name not in TARGETS:
        wanted = ", ".join(TARGETS)
        sys.exit(f"tests/fuzz.py: got {name!r}, wanted one of {wanted}")
    corpus = Path(tempfile.mkdtemp())
    for i, seed in enumerate(seeds()[name]):
        (corpus / str(i)).write_bytes(seed)
    torch.set_num_threads(1)
    argv = [sys.argv[0], str(corpus), "-max_len=7000", *sys.argv[1:]]
    atheris.Setup(argv, TARGETS[name])
    atheris.Fuzz()


if __name__ == "__main__":
    main()
