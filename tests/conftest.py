"""What the tests share: small batches on disk, and scripts called as from the command line."""
import contextlib
import functools
import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # small work, and a busy neighbour makes two threads slower than one
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import options
import drawn
import judge
import prior
import vae

import pytest
import torch
from PIL import Image

if torch.cuda.is_available():
    torch.cuda.init()  # before `on_the_cpu` hides it
    torch.cuda.device_count()  # which torch then keeps
judge.EPOCHS = 1  # any judge will do, but for the test that it learns
ROOT = Path(__file__).parent.parent
SMALL = (16, 16), (16, 16, 8)  # channels of the convolutional network and of the prior's, numbers of its condition
CLAIMS = os.environ.get("PEGASUS_CLAIMS", "")  # a folder, where processes share the tests as tests/run.py starts them


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Shared tests begin at the end of the alphabet, where the longest files are, so that all end together."""
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


@pytest.fixture(scope="session")
def batches(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of six batches with 240 horses, birds and airplanes to train on and 60 to test."""
    folder = tmp_path_factory.mktemp("data") / "small"
    drawn.write(folder, train=240, test=60)
    return folder


@pytest.fixture(scope="module")
def small_network() -> Iterator[None]:
    """A tenth of the work, where it does not matter how well a run draws."""
    whole = vae.conv.__defaults__, prior.Velocity.__init__.__defaults__
    vae.conv.__defaults__, prior.Velocity.__init__.__defaults__ = SMALL
    yield
    vae.conv.__defaults__, prior.Velocity.__init__.__defaults__ = whole


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
    monkeypatch.setenv("no_proxy", "*")


@pytest.fixture(autouse=True, scope="session")
def on_the_cpu() -> Iterator[None]:
    """Runs are made where a run's bits are always the same, those that tests share too, unless a test asks for a GPU.
    """
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(torch.cuda, "is_available", lambda: False)
        patched.setenv("CUDA_VISIBLE_DEVICES", "")
        yield


@pytest.fixture(autouse=True)
def own_float_state() -> Iterator[None]:
    """Training flushes denormals to zero; the next test does not."""
    yield
    torch.set_flush_denormal(False)


@pytest.fixture
def complaint(capsys: pytest.CaptureFixture) -> Callable[..., str]:
    """Call a script's main that must fail: exit status 2 and a sentence at the end of stderr, which is returned."""
    def call(main: Callable, *argv: object) -> str:
        capsys.readouterr()
        with pytest.raises(SystemExit) as left:
            options.run(lambda: main([str(a) for a in argv]))
        lines = capsys.readouterr().err.strip().splitlines()
        assert left.value.code == 2
        assert "Traceback" not in "".join(lines)
        assert lines, "no sentence on stderr"
        return lines[-1]
    return call
