"""Processes that train together, as torchrun starts them."""
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import train
from pegasus import device
from pegasus.training import distributed, progress, run_dir
from pegasus.training.distributed import Workers

import pytest
import torch
from conftest import ROOT, SMALL, rows
from torch import nn

# train.py with small networks, and without pictures, which would take most of the time
LEAN = f"""
import train
from pegasus import cli
from pegasus.training import run_dir
{SMALL}
run_dir.draw_pictures = lambda *about: None
cli.run(train.main)
"""


def curves(folder: Path) -> list[list[float]]:
    """Return the numbers of a run's log."""
    table = []
    for row in rows(folder / "log.csv"):
        table.append([float(row[key] or 0) for key in progress.LOG_COLUMNS[2:-1]])
    return table


def options(folder: Path, batches: Path, *argv: object) -> list[str]:
    """Return options of a run in float32.

    Batches of 38 give uneven shares, and 2 rows in the autoencoder's last.
    """
    places = ["--run", folder, "--data", batches, "--threads", 1]
    model = ["--arch", "conv", "--latent", "8x8x2", "--precision", "float32"]
    return [str(word) for word in ("--batch-size", 38, *places, *model, *argv)]


def start(n: int, folder: Path, batches: Path, *argv: object) -> subprocess.Popen:
    """Start n processes that train together."""
    lean = folder.with_suffix(".py")
    lean.write_text(LEAN)
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--local-addr", "127.0.0.1"]
    counts = ["--nproc-per-node", str(n), "--max-restarts", "1"]
    command = [sys.executable, *torchrun, *counts, "--", str(lean)]
    command += options(folder, batches, *argv)
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": "."}
    settings = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen(command, cwd=ROOT, env=env, **settings)


@pytest.fixture
def train_alone(batches, small_network, monkeypatch) -> Callable[..., list[list[float]]]:
    """Train in one process; return the curve."""
    monkeypatch.setattr(run_dir, "draw_pictures", lambda *about: None)

    def run(folder: Path, *argv: object) -> list[list[float]]:
        assert train.main(options(folder, batches, *argv)) == 0
        return curves(folder)

    return run


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def train_mlp(folder: Path, batches: Path, *argv: object) -> int:
    command = ("--run", folder, "--data", batches, "--arch", "mlp", *argv)
    return train.main([str(word) for word in command])


def test_three_processes_follow_the_curve_of_one(batches, tmp_path, train_alone):
    """In both stages; also where a last step leaves the first of them without a row."""
    process = start(3, tmp_path / "three", batches, "--epochs", 2)
    alone = train_alone(tmp_path / "alone", "--epochs", 2)
    output = process.communicate(timeout=240)[0]
    assert process.returncode == 0, output
    three = curves(tmp_path / "three")
    torch.testing.assert_close(three, alone, rtol=1e-4, atol=0)


def test_more_processes_than_gpus_are_refused(complaint, monkeypatch, tmp_path):
    place = {"RANK": "2", "LOCAL_RANK": "2", "WORLD_SIZE": "3"}
    for name, value in (place | {"MASTER_ADDR": "localhost", "MASTER_PORT": "1"}).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(device, "resolve_device", lambda name: "cuda")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    said = complaint(train.main, "--run", tmp_path / "r")
    assert "process 3 of this machine has no GPU to itself" in said
    assert "--nproc-per-node 2" in said


def run_python(code: str, rank: int, port: int) -> subprocess.Popen:
    """Start one of two processes of a group that run some code."""
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    place = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    env = os.environ | place | address
    settings = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    command = [sys.executable, "-c", code]
    return subprocess.Popen(command, cwd=ROOT, env=env, **settings)


def test_what_processes_do_together():
    """They sum, look for the largest number, and fail alike where the first one fails.

    Leaving ends the threads of the group: one that still lets go of a tensor while
    Python closes aborts the process.
    """
    code = """if True:
        import os, torch
        from pegasus.training.distributed import Workers
        def threads():
            tasks = os.listdir("/proc/self/task")
            return [open(f"/proc/self/task/{task}/comm").read().strip() for task in tasks]
        workers = Workers("cpu")
        print(workers.sum_(torch.tensor([1.0, workers.rank])).tolist())
        print(workers.max(15 * workers.rank, "cpu"), workers.max(0, "cpu"))
        rows = workers.share(5)
        print(list(range(5))[rows] == [[0, 1], [2, 3, 4]][workers.rank])
        p = torch.ones(2, 3, requires_grad=True)
        if workers.leads:  # the other one has no rows, and no gradient
            (2 * p).sum().backward()
            torch.optim.Adam([p])  # keeps what it finds of a group
        workers.sum_gradients([p])
        print(p.grad.tolist())
        try:
            workers.leader_first(lambda: 1 / 0)
        except ZeroDivisionError:
            print("alike")
        before = threads()
        workers.leave()
        after = threads()
        print(len(after) < len(before), "gloo" in " ".join(after))"""
    port = free_port()
    both = [run_python(code, rank, port) for rank in range(2)]
    wanted = ["[2.0, 1.0]", "15 0", "True", "[[2.0, 2.0, 2.0], [2.0, 2.0, 2.0]]", "alike"]
    for process in both:
        said, errors = process.communicate(timeout=120)
        # torch 2.10 prints such lines, and gives its threads no name
        lines = [line for line in said.splitlines() if not line.startswith("[Gloo] ")]
        assert lines == [*wanted, "True False"], errors
        assert process.returncode == 0


def test_alone_a_process_is_a_group_of_one(monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    workers = Workers("cpu")
    assert (workers.rank, workers.size, workers.leads) == (0, 1, True)
    tensor = torch.ones(3)
    assert workers.sum_(tensor) is tensor
    assert workers.max(15, "cuda") == 15  # without asking a GPU
    assert workers.leader_first(lambda: 7) == 7
    assert workers.share(5) == slice(0, 5)
    workers.leave()


@pytest.mark.parametrize("place", [
    {"RANK": "1"},
    {"WORLD_SIZE": "2"},
    {"RANK": "0", "WORLD_SIZE": "2"},
    {"RANK": "x", "WORLD_SIZE": "2", "LOCAL_RANK": "0"},
    {"RANK": "2", "WORLD_SIZE": "2", "LOCAL_RANK": "2"},
])
def test_half_a_launcher_is_refused(complaint, monkeypatch, tmp_path, place):
    for name in distributed.VARIABLES:
        monkeypatch.delenv(name, raising=False)
    if "LOCAL_RANK" in place:
        place = place | {"MASTER_ADDR": "localhost", "MASTER_PORT": "1"}
    for name, value in place.items():
        monkeypatch.setenv(name, value)
    said = complaint(train.main, "--run", tmp_path / "r")
    assert "as torchrun sets them" in said and f"RANK={place.get('RANK', '')}," in said
    assert not (tmp_path / "r").exists()


def test_empty_variables_are_none(monkeypatch):
    monkeypatch.setenv("RANK", "")
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert distributed.rank_and_size() == (0, 1)


@pytest.mark.parametrize("size", [1, 2, 3, 7])
@pytest.mark.parametrize("n", [0, 1, 2, 50, 192])
def test_shares_are_contiguous_and_cover_all_rows(size, n):
    workers = Workers("cpu")
    workers.size = size
    rows_of = []
    for rank in range(size):
        workers.rank = rank
        rows_of += range(n)[workers.share(n)]
    assert rows_of == list(range(n))


def test_gradients_of_all_processes_keep_the_weights_layout(monkeypatch):
    """torch's own Adam on a CPU takes it for granted; the sum is float32's."""
    network = nn.Sequential(nn.Conv2d(3, 16, 3), nn.Flatten(), nn.Linear(64, 5))
    network.to(memory_format=torch.channels_last)
    network(torch.randn(8, 3, 4, 4)).square().mean().backward()
    weights = list(network.parameters())
    weights[-1].grad = None
    wanted = [2 * p.grad.clone() for p in weights[:-1]]
    workers = Workers("cpu")
    workers.size = 2
    monkeypatch.setattr(workers, "sum_", lambda tensor: tensor.mul_(2))
    workers.sum_gradients(weights)
    assert all(p.grad.stride() == p.stride() for p in weights)
    for p, gradient in zip(weights, wanted, strict=False):
        assert p.grad.equal(gradient)
    assert weights[-1].grad.equal(torch.zeros(5))


def test_a_lost_worker_is_replaced_and_the_curve_stays(batches, tmp_path, train_alone):
    argv = ("--epochs", 4, "--prior", "normal")
    folder = tmp_path / "broken"
    broken = start(2, folder, batches, *argv, "--save-seconds", 0.1)
    while not (folder / "last.pt").exists() or not rows(folder / "log.csv"):
        assert broken.poll() is None
        time.sleep(0.01)
    children = Path(f"/proc/{broken.pid}/task/{broken.pid}/children").read_text().split()
    os.kill(int(children[-1]), signal.SIGKILL)
    alone = train_alone(tmp_path / "alone", *argv)
    output = broken.communicate(timeout=240)[0]
    assert broken.returncode == 0, output
    assert "exitcode: -9" in output
    torch.testing.assert_close(curves(folder), alone, rtol=1e-4, atol=0)


def test_a_restart_goes_on_with_the_run_of_its_own_torchrun(
    batches, tmp_path, monkeypatch, complaint
):
    """And not with one that its first start refused or was to overwrite."""
    folder = tmp_path / "r"

    def epochs() -> list[str]:
        return [row["epoch"] for row in rows(folder / "log.csv")]

    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "first")
    train_mlp(folder, batches, "--epochs", 1)
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    train_mlp(folder, batches, "--epochs", 2, "--overwrite")
    assert epochs() == ["1", "2"]
    before = (folder / "last.pt").stat().st_mtime_ns
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "second")
    argv = ("--run", folder, "--data", batches, "--epochs", 1)
    assert "holds a run" in complaint(train.main, *argv)
    assert (folder / "last.pt").stat().st_mtime_ns == before
    train_mlp(folder, batches, "--epochs", 1, "--overwrite")
    assert epochs() == ["1"]
