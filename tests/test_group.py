"""Processes that train together, as torchrun starts them."""
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import recipe
import train

import torch
from conftest import ROOT, SMALL
from test_train import rows, trained


def curves(folder: Path) -> list[list[float]]:
    return [[float(row[key] or 0) for key in train.log.COLUMNS[2:-1]] for row in rows(folder / "log.csv")]


# train.py with small networks, and without pictures, which would take most of the time
LEAN = f"""
import folder, options, prior, train, vae
folder.draw = lambda *about: None
vae.conv.__defaults__, prior.Velocity.__init__.__defaults__ = {SMALL}
options.run(train.main)
"""


def workers(n: int, folder: Path, batches: Path, *argv: object) -> subprocess.Popen:
    """Start n processes that train together in float32, on batches of 38: uneven shares, and 2 rows in the last."""
    lean = folder.with_suffix(".py")
    lean.write_text(LEAN)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--local-addr", "127.0.0.1",
               "--nproc-per-node", n, "--max-restarts", 1, "--", lean, "--run", folder, "--data", batches,
               "--batch-size", 38, "--arch", "conv", "--latent", "8x8x2", "--precision", "float32", "--threads", 1,
               "--no-judge", *argv]
    return subprocess.Popen([str(c) for c in command], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                            text=True, env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": "."})


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def test_any_number_of_processes_follows_the_same_curve(batches, tmp_path):
    """In both phases; also where the last step leaves the first of three without a row."""
    for process in [workers(n, tmp_path / str(n), batches, "--epochs", 2) for n in (1, 2, 3)]:
        output = process.communicate(timeout=240)[0]
        assert process.returncode == 0, output
    for n in (2, 3):
        torch.testing.assert_close(curves(tmp_path / str(n)), curves(tmp_path / "1"), rtol=1e-4, atol=0)


def test_more_processes_than_gpus_are_refused(complaint, monkeypatch, tmp_path):
    for name, value in (("RANK", "2"), ("LOCAL_RANK", "2"), ("WORLD_SIZE", "3")):
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(recipe, "device", lambda chosen: "cuda")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    said = complaint(train.main, "--run", tmp_path / "r")
    assert "process 3 of this machine has no GPU to itself" in said and "--nproc-per-node 2" in said


def test_leaving_ends_the_threads_of_the_group():
    """One that still lets go of a tensor while Python closes aborts the process."""
    code = """if True:
        import os, torch, group
        workers = group.Group("cpu")
        workers.join("gloo")
        workers.total(torch.ones(3))
        torch.optim.Adam([torch.zeros(3, requires_grad=True)])
        def threads():
            print(*(open(f"/proc/self/task/{task}/comm").read().strip() for task in os.listdir("/proc/self/task")))
        threads()
        workers.size = 2
        workers.leave()
        threads()"""
    env = os.environ | {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    said = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=env, capture_output=True, text=True).stdout
    before, after = (line for line in said.splitlines() if "python" in line)
    assert len(after.split()) < len(before.split()) and "gloo" not in after  # torch 2.10 gives them no name


def test_what_fails_in_the_first_process_fails_alike_in_the_others():
    code = """if True:
        import group
        workers = group.Group("cpu")
        try:
            workers.first(lambda: 1 / 0)
        except ZeroDivisionError:
            print("alike")
        workers.leave()"""
    env = os.environ | {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    both = [subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, env=env | {"RANK": str(rank)}, text=True,
                             stdout=subprocess.PIPE) for rank in range(2)]
    said = [process.communicate(timeout=120)[0].splitlines(keepends=True) for process in both]
    own = [[line for line in lines if not line.startswith("[Gloo] ")] for lines in said]  # which torch 2.10 prints
    assert own == [["alike\n"]] * 2


def test_a_lost_worker_is_replaced_and_the_curve_stays(batches, tmp_path):
    whole = workers(2, tmp_path / "whole", batches, "--epochs", 4, "--prior", "normal")
    broken = workers(2, tmp_path / "broken", batches, "--epochs", 4, "--prior", "normal", "--save-seconds", 0.1)
    log = tmp_path / "broken" / "log.csv"
    while not (log.exists() and len(log.read_text().splitlines()) > 1 and (log.parent / "last.pt").exists()):
        assert broken.poll() is None
        time.sleep(0.01)
    children = Path(f"/proc/{broken.pid}/task/{broken.pid}/children").read_text().split()
    os.kill(int(children[-1]), signal.SIGKILL)
    assert whole.communicate(timeout=240)[0]
    output = broken.communicate(timeout=240)[0]
    assert broken.returncode == 0, output
    assert "exitcode: -9" in output
    torch.testing.assert_close(curves(tmp_path / "broken"), curves(tmp_path / "whole"), rtol=1e-4, atol=0)


def test_a_restart_goes_on_with_the_run_of_its_own_torchrun(batches, tmp_path, monkeypatch, complaint):
    """And not with one that its first start refused or was to overwrite."""
    argv = ["--run", tmp_path / "r", "--data", batches, "--epochs", 1]
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "first")
    trained(*argv[1:2], *argv[2:])
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    trained(tmp_path / "r", "--data", batches, "--epochs", 2, "--overwrite")
    assert [row["epoch"] for row in rows(tmp_path / "r" / "log.csv")] == ["1", "2"]
    before = (tmp_path / "r" / "last.pt").stat().st_mtime_ns
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "second")
    assert "holds a run" in complaint(train.main, *argv)
    assert (tmp_path / "r" / "last.pt").stat().st_mtime_ns == before
    trained(tmp_path / "r", "--data", batches, "--epochs", 1, "--overwrite")
    assert [row["epoch"] for row in rows(tmp_path / "r" / "log.csv")] == ["1"]
