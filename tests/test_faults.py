"""Real kills, full disks, locks and damage; `make faults` runs it with 30 kills."""
import errno
import fcntl
import itertools
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import sample
import train
from pegasus import checkpoint, cli, files
from pegasus.cli import UserError
from pegasus.training import run_dir

import pytest
from conftest import ROOT, rows, same

KILLS = int(os.environ.get("KILLS", 3))
FLIPS = int(os.environ.get("FLIPS", 10))
# A trainer that takes a quarter of a second to write a checkpoint, so that some kills fall
# into one, and 10 ms a step. torch's optimizers import torch._dynamo, which takes seconds:
# once a run has its lock, kills are to fall into its work.
SLOW = """
import io, time
from pegasus import cli
import train
import torch._dynamo

save = torch.save

def slow_save(state, file):
    whole = io.BytesIO()
    save(state, whole)
    data = whole.getvalue()
    size = len(data) // 9
    for first in range(0, len(data), size):
        file.write(data[first:first + size])
        file.flush()
        time.sleep(0.025)

step_inputs = train.step_inputs

def slow_step_inputs(run, stage):
    time.sleep(0.01)
    return step_inputs(run, stage)

train.step_inputs = slow_step_inputs
torch.save = slow_save
cli.run(train.main)
"""
HOLD = """
import pathlib, time
from pegasus.training import run_dir
with run_dir.lock(pathlib.Path({!r})):
    print("held", flush=True)
    time.sleep(99)
"""


def command(folder: Path, batches: Path, epochs: int, *argv: object) -> list[str]:
    """Return the options of a short run of the paper's network."""
    options = ["--run", folder, "--data", batches, "--batch-size", 50, "--arch", "mlp"]
    options += ["--flip", "--threads", 1, "--resume", "--epochs", epochs, *argv]
    return [str(option) for option in options]


def one_sentence(capsys: pytest.CaptureFixture, *words: str) -> None:
    """Check that stderr holds one line with these words in it."""
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1, lines
    assert all(word in lines[0] for word in words), lines[0]


@pytest.fixture(scope="module")
def whole(batches: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of an unbroken run of 4 epochs."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    assert train.main(command(folder, batches, 4)) == 0
    return folder


@pytest.fixture
def fails(capsys: pytest.CaptureFixture) -> Callable[..., None]:
    """Run a script's main that must end with status 2 and one sentence with some words."""
    def call(main: Callable, argv: list, *words: str) -> None:
        capsys.readouterr()
        with pytest.raises(SystemExit) as left:
            cli.run(lambda: main([str(arg) for arg in argv]))
        assert left.value.code == 2
        one_sentence(capsys, *words)
    return call


INSIDE_A_SAVE = "inside a save"
AFTER_A_SAVE = "after a save"
ANY_TIME = "at any time"
WHEN = (INSIDE_A_SAVE, AFTER_A_SAVE, ANY_TIME)
DELAYS = {INSIDE_A_SAVE: 0.1, AFTER_A_SAVE: 0.5, ANY_TIME: 2.0}  # seconds, at most


def inode(path: Path) -> int:
    """Return a file's inode number, 0 where there is none."""
    return path.stat().st_ino if path.exists() else 0


def half_written(folder: Path) -> list[Path]:
    """Return the files that a checkpoint is being written to."""
    return list(folder.glob(".pegasus-last.pt-*.part"))


def ready_to_kill(folder: Path, process_id: int, when: str, last_inode: int) -> bool:
    """Return whether a trainer has the lock and is where it is to be killed.

    last_inode: of last.pt before the trainer was started.
    """
    lock = folder / "lock"
    if not (lock.exists() and f"process {process_id} " in lock.read_text()):
        return False
    now = inode(folder / "last.pt")
    if when == INSIDE_A_SAVE:
        return now != 0 and bool(half_written(folder))
    if when == AFTER_A_SAVE:
        return now not in (0, last_inode)
    return True


def kill(folder: Path, batches: Path, epochs: int, rng: random.Random, when: str) -> bool:
    """Start or resume a run and kill it at a random moment.

    That is 0 to 2 s after it has the lock, 0 to 0.5 s after a save of its own, or within
    0.1 s of a save's beginning where there is an older checkpoint. Returns whether it was
    inside a save.
    """
    argv = command(folder, batches, epochs, "--save-seconds", 0.1)
    for path in half_written(folder):
        path.unlink()
    last_inode = inode(folder / "last.pt")
    process = subprocess.Popen(
        [sys.executable, "-c", SLOW, *argv], cwd=ROOT, stdout=subprocess.DEVNULL
    )
    while not ready_to_kill(folder, process.pid, when, last_inode):
        assert process.poll() is None, "the run was over before the kill"
        time.sleep(0.002)
    time.sleep(rng.uniform(0, DELAYS[when]))
    process.kill()
    assert process.wait() == -signal.SIGKILL, "the run was over before the kill"
    return bool(half_written(folder))


def test_killed_runs_end_with_the_same_bits(batches, tmp_path):
    """The checkpoint is whole after each kill; progress never goes back.

    A run that was killed after a save of its own has got on.
    """
    epochs = 4 * KILLS
    rng = random.Random(5)
    broken = tmp_path / "broken"
    inside = 0
    done = [0.0]
    for _, when in zip(range(KILLS), itertools.cycle(WHEN), strict=False):
        inside += kill(broken, batches, epochs, rng, when)
        done.append(checkpoint.load(broken / "last.pt")["epoch"])
        assert done[-1] >= done[-2]
        if when == AFTER_A_SAVE:
            assert done[-1] > done[-2]
    assert train.main(command(broken, batches, epochs)) == 0
    assert train.main(command(tmp_path / "whole", batches, epochs)) == 0
    same(tmp_path / "whole", broken)
    assert inside >= KILLS // 3
    assert done[1] > 0
    where = f"the last after {done[-1]:.1f} of {epochs} epochs"
    print(f"{KILLS} kills, {inside} inside a save, {where}: the same bits")


def after_prepare(monkeypatch: pytest.MonkeyPatch, change: Callable[[], object]) -> None:
    """Do something once a run has begun and written its config.json and log.csv."""
    prepare = run_dir.prepare

    def prepare_and_change(*args: object) -> None:
        prepare(*args)
        change()

    monkeypatch.setattr(run_dir, "prepare", prepare_and_change)


@pytest.mark.parametrize("name", ["last.pt", "log.csv", "samples.png"])
def test_a_full_disk(whole, batches, tmp_path, monkeypatch, fails, name):
    """There is no room for one of a run's files: it is /dev/full."""
    folder = tmp_path / "run"
    train.main(command(folder, batches, 2))
    before = checkpoint.load(folder / "last.pt")

    full = folder / "full"
    full.symlink_to("/dev/full")
    temporary_name = files.temporary_name

    def fill() -> None:
        if name == "log.csv":  # rows are appended to it
            (folder / name).unlink()
            (folder / name).symlink_to("/dev/full")

    def name_to_write(path: Path) -> Path:
        return full if path.name == name else temporary_name(path)

    with monkeypatch.context() as patched:
        after_prepare(patched, fill)
        if name != "log.csv":
            patched.setattr(files, "temporary_name", name_to_write)
        fails(train.main, command(folder, batches, 4), name, "No space left on device")
    assert checkpoint.load(folder / "last.pt")["epochs_done"] >= before["epochs_done"]
    for path in folder.iterdir():
        if path.is_symlink():
            path.unlink()
    assert train.main(command(folder, batches, 4)) == 0
    same(whole, folder)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[tuple[Path, Callable[[str], int]]]:
    """A file system of 64 MiB, and a function that gives it another size."""
    folder = tmp_path / "disk"
    folder.mkdir()

    def mount(options: str) -> int:
        argv = ["mount", "-t", "tmpfs", "-o", options, "none", folder]
        return subprocess.run(argv, capture_output=True).returncode

    if mount("size=64m"):
        pytest.skip("may not mount a small disk")
    yield folder, lambda size: mount(f"remount,size={size}")
    subprocess.run(["umount", folder], check=True)


def test_a_disk_that_fills_up(whole, batches, small_disk, fails):
    """It holds one checkpoint of 39 MiB and no second one beside it."""
    folder, resize = small_disk
    run = folder / "run"
    argv = command(run, batches, 4, "--save-seconds", 0)
    reason = "last.pt: can't be written (No space left on device)"
    fails(train.main, argv, f"{reason}; what was saved before is still there")
    assert not half_written(run)
    assert checkpoint.load(run / "last.pt")["step"] > 0
    assert resize("200m") == 0
    assert train.main(command(run, batches, 4)) == 0
    same(whole, run)


@pytest.fixture
def as_nobody(batches: Path, whole: Path) -> Iterator[tuple[Path, list[dict]]]:
    """A folder that everybody reaches, and the unbroken run's log.

    This process has no longer root's right to write everywhere.
    """
    folder = Path(tempfile.mkdtemp())
    subprocess.run(["cp", "-r", batches, folder / "data"], check=True)
    (folder / "run").mkdir()
    log = rows(whole / "log.csv")
    is_root = os.geteuid() == 0
    if is_root:
        if subprocess.run(["chown", "-R", "65534", folder]).returncode:
            pytest.skip("root may not give files away here")
        os.seteuid(65534)
    yield folder, log
    (folder / "run").chmod(0o755)
    if is_root:
        os.seteuid(0)
    subprocess.run(["rm", "-r", folder], check=True)


def test_a_folder_that_may_not_be_written(as_nobody, monkeypatch, fails):
    """Before a run, during it and after it; a checkpoint there can still be drawn from."""
    folder, log = as_nobody
    run = folder / "run"
    data = folder / "data"
    run.chmod(0o555)
    sentence = f"{run}: can't be written (Permission denied)"
    fails(train.main, command(run, data, 4), sentence)
    sentence = f"{run / 'more'}: can't be written"
    fails(train.main, command(run / "more", data, 4), sentence)
    run.chmod(0o755)
    train.main(command(run, data, 2))
    with monkeypatch.context() as patched:
        after_prepare(patched, lambda: run.chmod(0o555))
        sentence = "last.pt: can't be written (Permission denied)"
        fails(train.main, command(run, data, 4), sentence)
    before = {}
    for path in run.iterdir():
        if path.name not in ("lock", "log.csv", "speed.csv"):
            before[path.name] = path.read_bytes()
    fails(train.main, command(run, data, 4), "can't be written")
    sample.main([str(run / "last.pt"), str(folder / "out.png"), "--n", "1"])
    assert {name: (run / name).read_bytes() for name in before} == before
    run.chmod(0o755)
    train.main(command(run, data, 4))
    assert rows(run / "log.csv") == [row | {"data": "data"} for row in log]


def test_a_folder_that_another_process_uses(whole, batches, tmp_path, fails):
    """The second is told who has it; a killed holder's lock is free."""
    folder = tmp_path / "run"
    folder.mkdir()
    lock = folder / "lock"
    lock.write_text("somebody else, long dead; " * 5)
    script = HOLD.format(str(folder))
    holder = subprocess.Popen(
        [sys.executable, "-c", script], cwd=ROOT, stdout=subprocess.PIPE
    )
    holder.stdout.readline()
    sentence = f"{folder}: process {holder.pid} on {os.uname().nodename}, since "
    for more in ((), ("--overwrite",)):
        fails(train.main, command(folder, batches, 4, *more), sentence, "another --run")
    assert [path.name for path in folder.iterdir()] == ["lock"]
    holder.kill()
    holder.communicate()
    assert lock.read_text().startswith(f"process {holder.pid} ")
    assert "somebody" not in lock.read_text()
    assert train.main(command(folder, batches, 4)) == 0
    assert not lock.exists()
    same(whole, folder)


@pytest.mark.parametrize("another", [False, True])
def test_a_lock_that_goes_with_its_holder(tmp_path, monkeypatch, another):
    """Between opening and locking the last holder removes the file.

    another: somebody then makes a new one.
    """
    flock = fcntl.flock

    def late(file: object, how: int) -> None:
        (tmp_path / "lock").unlink()
        if another:
            (tmp_path / "lock").touch()
        flock(file, how)

    with monkeypatch.context() as patched:
        patched.setattr(fcntl, "flock", late)
        with pytest.raises(UserError, match="another process trains there"):
            run_dir.lock(tmp_path).__enter__()
    with run_dir.lock(tmp_path):
        with pytest.raises(UserError, match=f"process {os.getpid()} "):
            run_dir.lock(tmp_path).__enter__()
    assert not (tmp_path / "lock").exists()


def test_a_file_system_without_locks(tmp_path, monkeypatch, capsys):
    def fail(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", fail)
    with run_dir.lock(tmp_path):
        one_sentence(capsys, "no locks on this file system")
