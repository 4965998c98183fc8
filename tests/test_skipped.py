"""Steps without a finite gradient, and how often a run saves."""
import os
import subprocess
import sys

import phases
import reparam
import train

import pytest
import torch
from conftest import ROOT
from test_damage import equal
from test_faults import KILLS, command, fails  # noqa: F401
from test_group import free_port
from test_train import rows, same


@pytest.fixture
def spoil(monkeypatch):
    """Make one number of the gradient NaN in some steps, counted from the start of a run; losses stay finite."""
    def at(steps: set[int]) -> None:
        backward, marked = phases.Autoencoder.backward, {reparam.derive_seed(0, step, phases.NOISE) for step in steps}

        def spoilt(self, rows, mirrored, batch, first, seeds, progress):
            sums = backward(self, rows, mirrored, batch, first, seeds, progress)
            if seeds.item() in marked:
                list(self.optimizer.trained.parameters())[2].grad.view(-1)[7] = torch.nan
            return sums
        monkeypatch.setattr(phases.Autoencoder, "backward", spoilt)
    return at


def test_a_step_without_a_finite_gradient_is_skipped(batches, tmp_path, spoil, monkeypatch):
    """It leaves no trace in weights, moments and totals; a resume in the middle of the epoch counts it too."""
    spoil({2, 9, 10})
    seen, step = [], train.Training.train_step

    def watched(self, *args):
        step(self, *args)
        moments = [m[key].clone() for m in self.optimizer.state for key in ("step", "exp_avg", "exp_avg_sq")]
        seen.append([*(p.detach().clone() for p in self.optimizer.trained.parameters()), self.totals.clone(), *moments])
        if len(seen) == 10:
            self.asked = 15
    with monkeypatch.context() as patched:
        patched.setattr(train.Training, "train_step", watched)
        assert train.main(command(tmp_path / "broken", batches, 4)) == 143
    assert [i + 1 for i in range(10) if equal(seen[i], seen[i + 1])] == [2, 9, 10]
    train.main(command(tmp_path / "broken", batches, 4))
    train.main(command(tmp_path / "whole", batches, 4))
    same(tmp_path / "whole", tmp_path / "broken")
    assert [row["skipped"] for row in rows(tmp_path / "whole" / "log.csv")] == ["1", "0", "2", "0"]


def test_an_epochs_loss_is_that_of_the_steps_taken(batches, tmp_path, spoil):
    """One step an epoch, then the same step in two halves with the second skipped: the first half's mean."""
    spoil({1})
    train.main([*command(tmp_path / "half", batches, 1), "--batch-size", "96"])
    order, data = phases.epoch_order(0, 0, 192), train.source.load(str(batches), "horse,bird")
    torch.manual_seed(0)
    mirrored = phases.coins(0, 0, 192)[:96]
    x = phases.gather(data.images, order[:96], mirrored)
    with torch.no_grad():
        terms = train.vae.VAE("mlp")(x, torch.tensor(reparam.derive_seed(0, 0, phases.NOISE)))
    loss = (terms.sse + terms.rate).mean().item()
    assert float(rows(tmp_path / "half" / "log.csv")[0]["train_loss"]) == pytest.approx(loss, rel=1e-2)


def test_ten_in_a_row_stop_a_run(batches, tmp_path, spoil, fails):  # noqa: F811
    run = tmp_path / "run"
    argv = [*command(run, batches, 1), "--batch-size", 10]
    train.main([str(a) for a in argv])
    before = (run / "last.pt").read_bytes()
    spoil(set(range(26, 99)))
    fails(train.main, [*argv, "--epochs", 9], str(run), "not finite in 10 steps in a row, from epoch 2, step 7 on",
          "saved last is still there", "lower --lr")
    assert (run / "last.pt").read_bytes() == before


def test_a_run_saved_just_before_it_gave_up_goes_on(batches, tmp_path, spoil, monkeypatch, fails):  # noqa: F811
    """Between the tenth bad step and the next look at their number a checkpoint may be written."""
    argv, backward = [*command(tmp_path / "run", batches, 2), "--batch-size", 10], phases.Autoencoder.backward
    monkeypatch.setattr(train.Training, "pause", lambda self: 0.0 if self.skipped[2] > 10 else 99.0)
    spoil(set(range(26, 40)))
    fails(train.main, argv, "not finite in 10 steps in a row")
    assert train.checkpoint.load(tmp_path / "run" / "last.pt")["skipped"][2] > 10
    monkeypatch.setattr(phases.Autoencoder, "backward", backward)
    assert train.main([str(a) for a in argv]) == 0
    assert [row["skipped"] for row in rows(tmp_path / "run" / "log.csv")] == ["0", "13"]


def test_nine_in_a_row_do_not(batches, tmp_path, spoil):
    spoil(set(range(1, 10)))
    assert train.main([*command(tmp_path / "run", batches, 1), "--batch-size", "10"]) == 0
    assert rows(tmp_path / "run" / "log.csv")[0]["skipped"] == "9"


def test_saving_takes_a_small_part_of_the_time(batches, tmp_path, monkeypatch):
    """By default; an interval that was asked for stays."""
    chosen = train.recipe.resolve(train.Options(arch="mlp", run=str(tmp_path)))
    training = train.Training(chosen, train.source.load(str(batches), "horse,bird"), None, train.Group("cpu"))
    now = train.time.monotonic()
    monkeypatch.setattr(train.time, "monotonic", lambda: now)  # the test itself takes time
    for cost, minutes, pause in ((0.1, 100, 60), (2, 100, 400), (99, 100, 600), (99, 1, 60), (2, 10, 200)):
        training.cost, training.begun = cost, now - 60 * minutes
        assert training.pause() == pytest.approx(pause, rel=1e-9)
    training.options = train.replace(chosen, save_seconds=0.5)
    assert training.pause() == 0.5


WORKER = """
import os, options, phases, torch, train
backward = phases.Autoencoder.backward
marked = [phases.reparam.derive_seed(0, step, phases.NOISE) for step in (1, 6)]
def spoilt(self, rows, mirrored, batch, first, seeds, progress):
    sums = backward(self, rows, mirrored, batch, first, seeds, progress)
    if seeds.item() in marked and os.environ["RANK"] == "1":
        list(self.optimizer.trained.parameters())[2].grad.view(-1)[7] = torch.nan
    return sums
phases.Autoencoder.backward = spoilt
options.run(train.main)
"""


@pytest.mark.skipif(KILLS < 30, reason="takes two processes: make faults")
def test_all_processes_skip_the_same_steps(batches, tmp_path, spoil):
    """One of two has a NaN; the curve is that of one process alone with the same step spoilt."""
    (tmp_path / "worker.py").write_text(WORKER)
    argv = [*command(tmp_path / "two", batches, 3), "--precision", "float32"]
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port",
                           str(free_port()), "--", tmp_path / "worker.py", *argv], cwd=ROOT,
                          env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    spoil({1, 6})
    train.main([*command(tmp_path / "one", batches, 3), "--precision", "float32"])
    one, two = rows(tmp_path / "one" / "log.csv"), rows(tmp_path / "two" / "log.csv")
    assert [row["skipped"] for row in two] == [row["skipped"] for row in one] == ["1", "1", "0"]
    for a, b in zip(one, two, strict=True):
        assert float(b["test_loss"]) == pytest.approx(float(a["test_loss"]), rel=1e-4)
