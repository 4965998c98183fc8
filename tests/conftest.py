"""What the tests share: small batches on disk, and scripts called as from the command line."""
import contextlib
import csv
import functools
import os

# small work, and a busy neighbour makes two threads slower than one
os.environ.setdefault("OMP_NUM_THREADS", "1")
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import vae
from pegasus import checkpoint, cli
from pegasus.data import synthetic
from pegasus.models import classifier, flow_prior
from pegasus.training.guard import StepGuard

import pytest
import torch
from PIL import Image

if torch.cuda.is_available():
    torch.cuda.init()  # before `on_the_cpu` hides it
    torch.cuda.device_count()  # which torch then keeps
classifier.EPOCHS = 1  # any classifier will do, but for the test that it learns
# what a script starts in the background ignores SIGINT, under nohup SIGHUP, and so would trainers
for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
    if signal.getsignal(signum) == signal.SIG_IGN:
        interrupt = signum == signal.SIGINT
        signal.signal(signum, signal.default_int_handler if interrupt else signal.SIG_DFL)
ROOT = Path(__file__).parent.parent
# a folder, where processes share the tests as tests/run.py starts them
CLAIMS = os.environ.get("PEGASUS_CLAIMS", "")
SMALL = """
import vae
from pegasus.models import flow_prior
vae.CHANNELS = flow_prior.CHANNELS = (16, 16)
flow_prior.CONDITION = 8
"""  # `small_network` for a process of its own
IMAGE_SHAPE = (3, 32, 32)  # where no size is asked for
IMAGE_VALUES = 3072
PICTURES = ("curves.png", "samples.png", "reconstructions.png", "pegasus.png")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin at the end of the alphabet, where long files are, so that all end together."""
    if CLAIMS:
        items.sort(key=lambda item: item.path.name, reverse=True)


@functools.cache
def claimed(name: str) -> bool:
    """Whether a file of tests is this process's, which claims it where nobody has."""
    with contextlib.suppress(FileExistsError):
        os.mkdir(Path(CLAIMS) / name)
        return True
    return False


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_protocol(item: pytest.Item) -> bool | None:
    """Leave to others what they claimed: True tells pytest that there is nothing left to do."""
    return True if CLAIMS and not claimed(item.path.name) else None


def png(path: Path) -> tuple[tuple[int, int], dict[str, str]]:
    """A picture's size and what it says of itself."""
    with Image.open(path) as picture:
        return picture.size, picture.text


def rows(path: Path) -> list[dict[str, str]]:
    """Read a CSV file of a run."""
    return list(csv.DictReader(path.read_text().splitlines()))


def equal(a: object, b: object) -> bool:
    """Return whether two states are the same: types, keys, every bit of every tensor."""
    if type(a) is not type(b):
        return False
    if isinstance(a, torch.Tensor):
        if a.dtype != b.dtype or a.shape != b.shape:
            return False
        first = a.contiguous().view(-1).view(torch.uint8)
        return first.equal(b.contiguous().view(-1).view(torch.uint8))
    if isinstance(a, dict):
        return list(a) == list(b) and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(equal, a, b))
    return a == b


def same(a: Path, b: Path) -> None:
    """Assert that two runs have the same weights, moments, log and pictures to the bit."""
    one = checkpoint.load(a / "last.pt")
    two = checkpoint.load(b / "last.pt")
    for key in ("model", "prior", "velocity", "optimizers", "totals", "history"):
        assert equal(one[key], two[key]), key
    for name in ("log.csv", *PICTURES):
        assert (a / name).read_bytes() == (b / name).read_bytes(), name


@pytest.fixture(scope="session")
def batches(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of six batches: 240 horses, birds and airplanes to train on, 60 to test."""
    folder = tmp_path_factory.mktemp("data") / "small"
    synthetic.write(folder, train=240, test=60)
    return folder


@pytest.fixture(scope="module")
def small_network() -> Iterator[None]:
    """A tenth of the work, where it does not matter how well a run draws."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(vae, "CHANNELS", (16, 16))
        patched.setattr(flow_prior, "CHANNELS", (16, 16))
        patched.setattr(flow_prior, "CONDITION", 8)
        yield


@pytest.fixture
def own_batches(batches: Path, tmp_path: Path) -> Path:
    """A copy of the batches that a test may damage."""
    return Path(shutil.copytree(batches, tmp_path / "own"))


@pytest.fixture(autouse=True)
def no_data_from_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests read and download what they name, nothing else."""
    monkeypatch.setenv("REAL_CIFAR10_DIR", os.environ.get("CIFAR10_DIR", ""))
    monkeypatch.delenv("CIFAR10_DIR", raising=False)
    monkeypatch.setenv("PEGASUS_CIFAR10_URL", "http://127.0.0.1:9/nothing-listens-here")
    monkeypatch.setenv("PEGASUS_STL10_URL", "http://127.0.0.1:9/nothing-listens-here")
    monkeypatch.setenv("no_proxy", "*")


@pytest.fixture(autouse=True, scope="session")
def on_the_cpu() -> Iterator[None]:
    """Run where a run's bits are always the same, unless a test asks for a GPU."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(torch.cuda, "is_available", lambda: False)
        patched.setenv("CUDA_VISIBLE_DEVICES", "")
        yield


@pytest.fixture(autouse=True)
def own_process_state() -> Iterator[None]:
    """Training flushes denormals to zero and listens to signals; the next test does not."""
    signals = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    handlers = [signal.getsignal(number) for number in signals]
    yield
    torch.set_flush_denormal(False)
    for number, handler in zip(signals, handlers, strict=True):
        signal.signal(number, handler)


@pytest.fixture
def stop_at(monkeypatch: pytest.MonkeyPatch) -> Callable[[int | None], None]:
    """Let runs get SIGTERM after a step, counted as Run.steps_done, or no more."""
    check = StepGuard.check

    def at(step: int | None) -> None:
        def stopping(self: StepGuard, done: int, *args: object) -> None:
            check(self, done, *args)
            if done == step:
                signal.raise_signal(signal.SIGTERM)

        monkeypatch.setattr(StepGuard, "check", stopping)

    return at


@pytest.fixture
def complaint(capsys: pytest.CaptureFixture) -> Callable[..., str]:
    """Call a script's main that must fail; return the sentence at the end of stderr."""
    def call(main: Callable, *argv: object) -> str:
        capsys.readouterr()
        with pytest.raises(SystemExit) as left:
            cli.run(lambda: main([str(a) for a in argv]))
        lines = capsys.readouterr().err.strip().splitlines()
        assert left.value.code == 2
        assert "Traceback" not in "".join(lines)
        assert lines, "no sentence on stderr"
        return lines[-1]
    return call
