"""Steps without a finite gradient, and how often a run saves."""
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import reparam
import train
import vae
from pegasus import checkpoint
from pegasus.cli import UserError
from pegasus.data import datasets
from pegasus.training import guard, stages
from pegasus.training import run as training_run
from pegasus.training.distributed import Workers
from pegasus.training.guard import StepGuard
from pegasus.training.run import Run, SaveTimer

import pytest
import torch
from conftest import ROOT, equal, rows, same
from test_distributed import free_port

KILLS = int(os.environ.get("KILLS", 3))
SPOIL = """
import os, torch, train
from pegasus import cli
from pegasus.training.distributed import Workers

def spoil(steps):
    now = []
    step_inputs = train.step_inputs
    sum_gradients = Workers.sum_gradients

    def noting(run, stage):
        now[:] = [run.steps_done]
        return step_inputs(run, stage)

    def spoilt(workers, parameters):
        if now[0] in steps and os.environ.get("RANK") in (None, "1"):
            parameters[2].grad.view(-1)[7] = torch.nan
        sum_gradients(workers, parameters)

    train.step_inputs = noting
    Workers.sum_gradients = spoilt
"""


def command(folder: Path, batches: Path, epochs: int, *argv: str) -> list[str]:
    """Return options of a run of 4 steps an epoch, that goes on if it has begun."""
    places = ["--run", str(folder), "--data", str(batches), "--epochs", str(epochs)]
    options = ["--batch-size", "50", "--arch", "mlp", "--flip", "--resume"]
    return [*places, *options, *argv]


@pytest.fixture
def spoil(monkeypatch) -> Callable[[set[int]], None]:
    """Make one number of the gradient NaN in some steps, counted from a run's start.

    Losses stay finite.
    """
    monkeypatch.setattr(train, "step_inputs", train.step_inputs)  # to be put back
    monkeypatch.setattr(Workers, "sum_gradients", Workers.sum_gradients)
    namespace = {}
    exec(SPOIL, namespace)
    return namespace["spoil"]


@pytest.fixture
def watch(monkeypatch) -> list[list[torch.Tensor]]:
    """Weights, moments and sums after each step from now on."""
    seen = []
    check = StepGuard.check
    train_stage = train.train_stage
    optimizers = []

    def noting(run: Run, stage: object, used: list, *args: object) -> None:
        optimizers[:] = used
        train_stage(run, stage, used, *args)

    def watching(self: StepGuard, *args: object) -> None:
        state = [self.totals.clone()]
        for optimizer in optimizers:
            for p, moments in optimizer.state.items():
                state += [p.detach().clone(), *(m.clone() for m in moments.values())]
        seen.append(state)
        check(self, *args)

    monkeypatch.setattr(train, "train_stage", noting)
    monkeypatch.setattr(StepGuard, "check", watching)
    return seen


def test_a_step_without_a_finite_gradient_leaves_no_trace(batches, tmp_path, spoil, watch):
    """In weights, moments and sums."""
    spoil({2, 9, 10})
    train.main(command(tmp_path, batches, 4))
    unchanged = [i for i in range(1, 16) if equal(watch[i - 1], watch[i])]
    assert unchanged == [2, 9, 10]
    skipped = [row["skipped"] for row in rows(tmp_path / "log.csv")]
    assert skipped == ["1", "0", "2", "0"]


def test_a_resume_in_the_middle_of_an_epoch_counts_skipped_steps_too(
    batches, tmp_path, spoil, stop_at
):
    spoil({2, 9, 10})
    stop_at(10)
    assert train.main(command(tmp_path / "broken", batches, 4)) == 143
    stop_at(None)
    train.main(command(tmp_path / "broken", batches, 4))
    train.main(command(tmp_path / "whole", batches, 4))
    same(tmp_path / "whole", tmp_path / "broken")


def test_an_epochs_loss_is_that_of_the_steps_taken(batches, tmp_path, spoil):
    """Two steps an epoch, the second of them skipped: the first half's mean."""
    spoil({1})
    train.main(command(tmp_path, batches, 1, "--batch-size", "96"))
    order = stages.epoch_order(0, 0, 192)[:96]
    mirrored = stages.epoch_flips(0, 0, 192)[:96]
    data = datasets.load(str(batches), "horse,bird")
    x = stages.gather(data.images, order, mirrored)
    torch.manual_seed(0)
    seed = torch.tensor(reparam.derive_seed(0, 0, stages.NOISE))
    with torch.no_grad():
        terms = vae.VAE("mlp")(x, seed)
    loss = (terms.sse + terms.rate).mean().item()
    logged = float(rows(tmp_path / "log.csv")[0]["train_loss"])
    assert logged == pytest.approx(loss, rel=1e-2)


def test_ten_in_a_row_stop_a_run(batches, tmp_path, spoil, complaint):
    argv = ("--batch-size", "10")
    train.main(command(tmp_path, batches, 1, *argv))
    before = (tmp_path / "last.pt").read_bytes()
    spoil(set(range(26, 99)))
    sentence = complaint(train.main, *command(tmp_path, batches, 9, *argv))
    assert str(tmp_path) in sentence
    assert "not finite in 10 steps in a row, from epoch 2, step 7 on" in sentence
    assert "saved last is still there" in sentence
    assert "lower --lr" in sentence
    assert (tmp_path / "last.pt").read_bytes() == before


def test_a_run_saved_just_before_it_gave_up_goes_on(
    batches, tmp_path, spoil, monkeypatch, complaint
):
    """A checkpoint may be written between the tenth bad step and the next look at them."""
    guards = []
    load = StepGuard.__init__

    def noting(self: StepGuard, *args: object) -> None:
        guards[:] = [self]
        load(self, *args)

    monkeypatch.setattr(StepGuard, "__init__", noting)
    monkeypatch.setattr(SaveTimer, "is_due", lambda self: guards[0].skipped[2] > 10)
    argv = command(tmp_path, batches, 2, "--batch-size", "10")
    bad = set(range(26, 40))
    spoil(bad)
    assert "not finite in 10 steps in a row" in complaint(train.main, *argv)
    assert checkpoint.load(tmp_path / "last.pt")["skipped"][2] > 10
    bad.clear()
    assert train.main(argv) == 0
    skipped = [row["skipped"] for row in rows(tmp_path / "log.csv")]
    assert skipped == ["0", "13"]


def test_nine_in_a_row_do_not(batches, tmp_path, spoil):
    spoil(set(range(1, 10)))
    assert train.main(command(tmp_path, batches, 1, "--batch-size", "10")) == 0
    assert rows(tmp_path / "log.csv")[0]["skipped"] == "9"


# ---- the guard alone ----


def count(step_guard: StepGuard, norm: float, loss: float = 2.0) -> float:
    sums = torch.tensor([loss, 1.0, 0.5])
    return step_guard.record(torch.tensor(norm), sums, 10).item()


def test_sums_and_means_are_of_the_steps_taken():
    step_guard = StepGuard("cpu")
    finite = [(1.0, 2.0), (3.0, 6.0)]
    bad = [(float("inf"), 2.0), (float("nan"), 2.0), (1.0, float("nan"))]
    assert [count(step_guard, *step) for step in (*finite, *bad)] == [0, 0, 1, 1, 1]
    assert step_guard.means(50) == pytest.approx([8 / 20, 2 / 20, 1 / 20])
    assert step_guard.skipped.tolist() == [3, 30, 3]
    assert count(step_guard, 1.0) == 0
    assert step_guard.skipped.tolist() == [3, 30, 0]
    assert step_guard.end_epoch() == 3
    assert step_guard.skipped.tolist() == [0, 0, 0]
    assert not step_guard.totals.any()


def test_after_ten_bad_steps_none_is_taken_until_somebody_looks():
    step_guard = StepGuard("cpu")
    for _ in range(guard.PATIENCE):
        assert count(step_guard, float("nan")) == 1
    assert count(step_guard, 1.0) == 1
    step_guard.check(19, 20, "runs/a", "--lr")  # looks only now and then
    with pytest.raises(UserError, match="from epoch 1, step 10 on.*lower --prior-lr"):
        step_guard.check(20, 20, "runs/a", "--prior-lr")
    resumed = StepGuard("cpu")
    resumed.load(step_guard.totals, step_guard.skipped)
    assert count(resumed, 1.0) == 0
    assert resumed.skipped.tolist() == [11, 110, 0]


# ---- when to save ----


@pytest.mark.parametrize(
    ("seconds", "cost", "minutes", "pause"),
    [
        (None, 0.1, 100, 60),
        (None, 2, 100, 400),
        (None, 99, 100, 600),
        (None, 99, 1, 60),  # at first often
        (None, 2, 10, 200),
        (0.5, 99, 100, 0.5),  # what was asked for stays
    ],
)
def test_saving_takes_a_small_part_of_the_time(monkeypatch, seconds, cost, minutes, pause):
    now = 1e6
    monkeypatch.setattr(training_run.time, "monotonic", lambda: now)
    timer = SaveTimer(seconds)
    timer.saved(cost)
    timer.begun = now - 60 * minutes
    timer.last = now - pause * 0.999
    assert not timer.is_due()
    timer.last = now - pause * 1.001
    assert timer.is_due()
    timer.saved()
    assert not timer.is_due()


# ---- several processes ----


@pytest.mark.skipif(KILLS < 30, reason="takes two processes: make faults")
def test_all_processes_skip_the_same_steps(batches, tmp_path, spoil):
    """One of two has a NaN; the curve is one process's with the same step spoilt."""
    worker = tmp_path / "worker.py"
    worker.write_text(SPOIL + "\nspoil({1, 6})\ncli.run(train.main)\n")
    argv = command(tmp_path / "two", batches, 3, "--precision", "float32")
    torchrun = ["-m", "torch.distributed.run", "--nproc-per-node", "2"]
    port = ["--master-port", str(free_port())]
    full = [sys.executable, *torchrun, *port, "--", str(worker), *argv]
    settings = {"capture_output": True, "text": True, "timeout": 200}
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(full, cwd=ROOT, env=env, **settings)
    assert done.returncode == 0, done.stderr
    spoil({1, 6})
    train.main(command(tmp_path / "one", batches, 3, "--precision", "float32"))
    one = rows(tmp_path / "one" / "log.csv")
    two = rows(tmp_path / "two" / "log.csv")
    for table in (one, two):
        assert [row["skipped"] for row in table] == ["1", "1", "0"]
    losses = [[float(row["test_loss"]) for row in table] for table in (one, two)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
