"""Real kills, full disks, locks and damage. `make faults` runs it with 30 kills and 200 flips in a run's checkpoint."""
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
from pathlib import Path

import checkpoint
import folder
import sample
import train

import pytest
from conftest import ROOT
from test_train import rows, same

KILLS, FLIPS = int(os.environ.get("KILLS", 3)), int(os.environ.get("FLIPS", 10))
# A trainer that takes a quarter of a second to write a checkpoint, so that some kills fall into one.
SLOW = """
import io, sys, time, torch, options, train
save = torch.save
def slowly(state, file):
    save(state, whole := io.BytesIO())
    size = len(whole.getvalue()) // 9
    for first in range(0, len(whole.getvalue()), size):
        file.write(whole.getvalue()[first:first + size])
        file.flush()
        time.sleep(0.025)
step = train.Training.train_step
train.Training.train_step = lambda *given: (time.sleep(0.01), step(*given))
torch.save = slowly
options.run(train.main)
"""
HOLD = """
import folder, pathlib, time
with folder.lock(pathlib.Path({!r})):
    print("held", flush=True)
    time.sleep(99)
"""


def command(place: Path, batches: Path, epochs: int, *argv: object) -> list[str]:
    return [str(a) for a in ("--run", place, "--data", batches, "--batch-size", 50, "--arch", "mlp", "--flip",
                             "--threads", 1, "--resume", "--epochs", epochs, *argv)]


def one_sentence(capsys: pytest.CaptureFixture, *words: str) -> None:
    """What was written on stderr is one line with these words in it."""
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1, lines
    assert all(word in lines[0] for word in words), lines[0]


@pytest.fixture(scope="module")
def whole(batches, tmp_path_factory) -> Path:
    """An unbroken run of 4 epochs."""
    place = tmp_path_factory.mktemp("whole") / "run"
    assert train.main(command(place, batches, 4)) == 0
    return place


@pytest.fixture
def fails(capsys):
    """Run a script's main to its end with status 2 and one sentence with some words in it on stderr."""
    def call(main, argv: list, *words: str) -> None:
        capsys.readouterr()
        with pytest.raises(SystemExit) as left:
            train.options.run(lambda: main([str(a) for a in argv]))
        assert left.value.code == 2
        one_sentence(capsys, *words)
    return call


WHEN = ("inside a save", "after a save", "at any time")


def kill(place: Path, batches: Path, epochs: int, rng: random.Random, when: str) -> bool:
    """Start or resume a run and kill it at a random moment; whether it was inside a save.

    That is 0 to 1 s after it has the lock, 0 to 0.5 s after a save of its own, or within 0.1 s of a save's beginning
    where there is an older checkpoint.
    """
    process = subprocess.Popen([sys.executable, "-c", SLOW, *command(place, batches, epochs, "--save-seconds", 0.1)],
                               cwd=ROOT, stdout=subprocess.DEVNULL)
    lock, part, last = place / "lock", place / "last.pt.part", place / "last.pt"
    part.unlink(missing_ok=True)
    before = last.stat().st_ino if last.exists() else 0
    ready = {"inside a save": lambda: last.exists() and part.exists(), "at any time": lambda: True,
             "after a save": lambda: last.exists() and last.stat().st_ino != before}[when]
    while not (lock.exists() and f"process {process.pid} " in lock.read_text() and ready()):
        assert process.poll() is None, "the run was over before the kill"
        time.sleep(0.002)
    time.sleep(rng.uniform(0, {"inside a save": 0.1, "after a save": 0.5, "at any time": 1}[when]))
    process.kill()
    assert process.wait() == -signal.SIGKILL, "the run was over before the kill"
    return part.exists()


def test_killed_runs_end_with_the_same_bits(batches, tmp_path):
    """The checkpoint is whole after each kill, each save is of at least a step, and its progress stays."""
    epochs, rng, broken = 4 * KILLS, random.Random(5), tmp_path / "broken"
    inside, done = 0, [0.0]
    for i in range(KILLS):
        inside += kill(broken, batches, epochs, rng, WHEN[i % 3])
        done.append(checkpoint.load(broken / "last.pt")["epoch"])
    assert train.main(command(broken, batches, epochs)) == 0
    assert train.main(command(tmp_path / "whole", batches, epochs)) == 0
    same(tmp_path / "whole", broken)
    assert inside >= KILLS // 3
    assert done == sorted(done)
    assert done[1] > 0
    assert all(after > before for when, before, after in zip(itertools.cycle(WHEN), done, done[1:], strict=False)
               if when == "after a save")
    print(f"{KILLS} kills, {inside} inside a save, the last after {done[-1]:.1f} of {epochs} epochs: the same bits")


def full(monkeypatch, place: Path, name: str) -> None:
    """Once a run has begun, there is no room for one of its files: it is /dev/full."""
    describe = folder.describe

    def filled(*args):
        describe(*args)
        (place / name).unlink(missing_ok=True)
        (place / name).symlink_to("/dev/full")
    monkeypatch.setattr(folder, "describe", filled)


@pytest.mark.parametrize("name", ["last.pt.part", "log.csv", "samples.png.part"])
def test_a_full_disk(whole, batches, tmp_path, monkeypatch, fails, name):
    place = tmp_path / "run"
    train.main(command(place, batches, 2))
    before = checkpoint.load(place / "last.pt")
    with monkeypatch.context() as patched:
        full(patched, place, name)
        fails(train.main, command(place, batches, 4), name.removesuffix(".part"), "No space left on device")
    assert checkpoint.load(place / "last.pt")["epochs_done"] >= before["epochs_done"]
    for link in place.iterdir():
        if link.is_symlink():
            link.unlink()
    assert train.main(command(place, batches, 4)) == 0
    same(whole, place)


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 64 MiB, and a function that gives it another size."""
    place = tmp_path / "disk"
    place.mkdir()

    def mount(options: str) -> int:
        return subprocess.run(["mount", "-t", "tmpfs", "-o", options, "none", place], capture_output=True).returncode

    if mount("size=64m"):
        pytest.skip("may not mount a small disk")
    yield place, lambda size: mount(f"remount,size={size}")
    subprocess.run(["umount", place], check=True)


def test_a_disk_that_fills_up(whole, batches, small_disk, fails):
    """It holds one checkpoint of 39 MiB and no second one beside it."""
    place, resize = small_disk
    argv = command(place / "run", batches, 4, "--save-seconds", 0)
    fails(train.main, argv, "last.pt: can't be written (No space left on device); what was saved before is still there")
    assert not (place / "run" / "last.pt.part").exists()
    assert checkpoint.load(place / "run" / "last.pt")["step"] > 0
    assert resize("200m") == 0
    assert train.main(command(place / "run", batches, 4)) == 0
    same(whole, place / "run")


@pytest.fixture
def nobodys(batches, whole):
    """A folder that everybody reaches, the unbroken run's log, and this process without root's right to write."""
    place = Path(tempfile.mkdtemp())
    subprocess.run(["cp", "-r", batches, place / "data"], check=True)
    (place / "run").mkdir()
    root, log = os.geteuid() == 0, rows(whole / "log.csv")
    if root:
        if subprocess.run(["chown", "-R", "65534", place]).returncode:
            pytest.skip("root may not give files away here")
        os.seteuid(65534)
    yield place, log
    (place / "run").chmod(0o755)
    if root:
        os.seteuid(0)
    subprocess.run(["rm", "-r", place], check=True)


def test_a_folder_that_may_not_be_written(nobodys, monkeypatch, fails):
    """Before a run, during it and after it; a checkpoint there can still be drawn from."""
    place, log = nobodys
    run, data, describe = place / "run", place / "data", folder.describe
    run.chmod(0o555)
    fails(train.main, command(run, data, 4), f"{run}: can't be written (Permission denied)")
    fails(train.main, command(run / "more", data, 4), f"{run / 'more'}: can't be written")
    run.chmod(0o755)
    train.main(command(run, data, 2))
    with monkeypatch.context() as patched:
        patched.setattr(folder, "describe", lambda *args: (describe(*args), run.chmod(0o555)))
        fails(train.main, command(run, data, 4), "last.pt: can't be written (Permission denied)")
    before = {p.name: p.read_bytes() for p in run.iterdir() if p.name not in ("lock", "log.csv", "speed.csv")}
    fails(train.main, command(run, data, 4), "can't be written")
    sample.main([str(run / "last.pt"), str(place / "out.png"), "--n", "1"])
    assert {name: (run / name).read_bytes() for name in before} == before
    run.chmod(0o755)
    train.main(command(run, data, 4))
    assert rows(run / "log.csv") == [row | {"data": "data"} for row in log]


def test_a_folder_that_another_process_uses(whole, batches, tmp_path, fails):
    """The second is told who has it; a killed holder's lock is free."""
    place = tmp_path / "run"
    place.mkdir()
    (place / "lock").write_text("somebody else, long dead; " * 5)
    holder = subprocess.Popen([sys.executable, "-c", HOLD.format(str(place))], cwd=ROOT, stdout=subprocess.PIPE)
    holder.stdout.readline()
    for argv in (command(place, batches, 4), command(place, batches, 4, "--overwrite")):
        fails(train.main, argv, f"{place}: process {holder.pid} on {os.uname().nodename}, since ", "another --run")
    assert [p.name for p in place.iterdir()] == ["lock"]
    holder.kill()
    holder.communicate()
    assert (place / "lock").read_text().startswith(f"process {holder.pid} ")
    assert "somebody" not in (place / "lock").read_text()
    assert train.main(command(place, batches, 4)) == 0
    assert not (place / "lock").exists()
    same(whole, place)


@pytest.mark.parametrize("another", [False, True])
def test_a_lock_that_goes_with_its_holder(tmp_path, monkeypatch, another):
    """Between opening and locking, the last holder leaves and takes the file along; somebody may make another."""
    flock = fcntl.flock

    def late(file, how):
        (tmp_path / "lock").unlink()
        if another:
            (tmp_path / "lock").touch()
        flock(file, how)
    with monkeypatch.context() as patch, pytest.raises(train.Fault, match="another process trains there"):
        patch.setattr(fcntl, "flock", late)
        folder.lock(tmp_path).__enter__()
    with folder.lock(tmp_path), pytest.raises(train.Fault, match=f"process {os.getpid()} "), folder.lock(tmp_path):
        pass
    assert not (tmp_path / "lock").exists()


def test_a_file_system_without_locks(tmp_path, monkeypatch, capsys):
    def unknown(*_):
        raise OSError(errno.ENOLCK, "No locks available")
    monkeypatch.setattr(fcntl, "flock", unknown)
    with folder.lock(tmp_path):
        one_sentence(capsys, "no locks on this file system")
