"""Random bytes for whatever reads a file or a command line; anything but a sentence is a crash.

    python tests/fuzz.py checkpoint -runs=100000      # or batch, pickle, command; then libFuzzer's options

Needs atheris (`make fuzz` installs it); tests/test_fuzz.py gives the same functions hypothesis's inputs.
"""
import atexit
import contextlib
import io
import os
import shutil
import sys
import tempfile
import zipfile
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
if __name__ == "__main__":
    import atheris
    watched = atheris.instrument_imports(include=["checkpoint", "cifar10", "options", "recipe", "vae", "sample"])
else:
    watched = contextlib.nullcontext()
with watched:
    import options
    import checkpoint
    import cifar10
    import recipe
    import sample
    import vae
    from options import Fault

PLACE = Path(tempfile.mkdtemp(dir="/dev/shm" if os.path.isdir("/dev/shm") else None)) / "input"
atexit.register(shutil.rmtree, PLACE.parent, ignore_errors=True)
FIELDS = [f"--{name.replace('_', '-')}" for name in recipe.Options.__dataclass_fields__]
WORDS = [*FIELDS, *(f"--no-{name[2:]}" for name in FIELDS), "mlp", "conv", "gaussian", "nan", "-inf", "1e999",
         "9" * 400, "-1", "0", "8x8x4", "128", "1x1x1", "horse,bird", "float32", "--help", "--", "-h", "=", "%s"]


def batch(data: bytes) -> None:
    """A file of records: a label byte of the input for each of its whole records, and what is left."""
    PLACE.write_bytes(data)
    with contextlib.suppress(Fault):
        images, labels = cifar10.read(PLACE)
        assert len(images) == len(labels) == len(data) / cifar10.RECORD
        assert images.numpy().tobytes() == b"".join(data[i + 1:i + 3073] for i in range(0, len(data), 3073))


def read_checkpoint(data: bytes) -> None:
    """The input as a checkpoint."""
    PLACE.write_bytes(data)
    with contextlib.suppress(Fault):
        sample.load(PLACE)


def pickle(data: bytes) -> None:
    """The input as the pickle inside an archive whose check sums are right."""
    with zipfile.ZipFile(PLACE, "w") as archive:
        for name, content in (("data.pkl", data), ("version", b"3\n"), ("byteorder", b"little"), ("data/0", bytes(12))):
            archive.writestr(f"a/{name}", content)
    with contextlib.suppress(Fault):
        sample.load(PLACE)


def command(data: bytes) -> None:
    """Bytes below 128 stand for words of ours, others begin a word of the input's own, ended by a line end."""
    words, rest = [], data
    while rest:
        if rest[0] < 128:
            words.append(WORDS[rest[0] % len(WORDS)])
            rest = rest[1:]
        else:
            word, _, rest = rest[1:].partition(b"\n")
            words.append(word.replace(b"\0", b"").decode(errors="surrogateescape"))
    said = io.StringIO()
    for kind in (recipe.Options, sample.Options):
        with contextlib.suppress(Fault, SystemExit), contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
            chosen, given = options.parse(kind, words, "")
            if kind is recipe.Options:
                chosen = recipe.settle(chosen, given, None)
                cifar10.class_indices(chosen.classes)
                vae.latent_shape(chosen.latent)
            else:
                sample.check_sheet(chosen, chosen.scale)
    assert "Traceback" not in said.getvalue()


TARGETS = {"batch": batch, "checkpoint": read_checkpoint, "pickle": pickle, "command": command}


def seeds() -> dict[str, list[bytes]]:
    """Good inputs to begin with."""
    state = {"model": {"w": torch.arange(3.0)}, "history": [{"epoch": 1, "loss": 0.5}], "config": {"arch": "mlp"}}
    checkpoint.save(PLACE, state)
    whole = PLACE.read_bytes()
    with zipfile.ZipFile(PLACE) as archive:
        inner = archive.read(next(name for name in archive.namelist() if name.endswith("data.pkl")))
    return {"batch": [bytes([7] * 3073), bytes(3073 * 2), bytes([10] * 3073), b"x"], "checkpoint": [whole],
            "pickle": [inner], "command": [bytes(range(0, 128, 3)), b"\x02\x80mlp\n", b"\xff--epochs=3\n"]}


def main() -> None:
    name = sys.argv.pop(1) if sys.argv[1:] else ""
    if name not in TARGETS:
        sys.exit(f"tests/fuzz.py: got {name!r}, wanted one of {', '.join(TARGETS)}")
    corpus = Path(tempfile.mkdtemp())
    for i, seed in enumerate(seeds()[name]):
        (corpus / str(i)).write_bytes(seed)
    torch.set_num_threads(1)
    atheris.Setup([sys.argv[0], str(corpus), "-max_len=7000", *sys.argv[1:]], TARGETS[name])
    atheris.Fuzz()


if __name__ == "__main__":
    main()
