"""The whole thing through its command lines, on small batches."""
import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import checkpoint
import phases
import recipe
import reparam
import sample
import train

import pytest
import torch
from conftest import ROOT, png

PICTURES = ("curves.png", "samples.png", "reconstructions.png", "pegasus.png")


def trained(folder: Path, *argv: object) -> int:
    return train.main([str(a) for a in ("--run", folder, "--batch-size", 50, "--arch", "mlp", *argv)])


@pytest.fixture(scope="module")
def run(batches, tmp_path_factory) -> Path:
    """An unbroken run of 4 epochs."""
    folder = tmp_path_factory.mktemp("run") / "a"
    assert trained(folder, "--data", batches, "--epochs", 4, "--flip", "--schedule", "onecycle") == 0
    return folder


def rows(path: Path) -> list[dict]:
    return list(csv.DictReader(path.read_text().splitlines()))


def same(a: Path, b: Path) -> None:
    """Weights, optimizer, log and pictures are the same to the bit."""
    one, two = checkpoint.load(a / "last.pt"), checkpoint.load(b / "last.pt")
    for key in one["model"]:
        assert one["model"][key].equal(two["model"][key]), key
    for i, moments in one["optimizer"]["state"].items():
        assert all(moments[k].equal(two["optimizer"]["state"][i][k]) for k in moments)
    for name in ("log.csv", *PICTURES):
        assert (a / name).read_bytes() == (b / name).read_bytes(), name


def test_a_runs_folder(run, batches):
    names = {"last.pt", "log.csv", "speed.csv", "config.json", *PICTURES}
    assert {p.name for p in run.iterdir()} == names
    table = rows(run / "log.csv")
    assert list(table[0]) == list(train.log.COLUMNS)
    assert [row["epoch"] for row in table] == ["1", "2", "3", "4"]
    assert float(table[3]["train_loss"]) < float(table[0]["train_loss"])
    for row in table:
        parts = float(row["test_rate"]) + float(row["test_distortion"])
        assert float(row["test_loss"]) == pytest.approx(parts, rel=1e-6)
        assert row["test_sse"] == row["test_distortion"]
        assert 5 < float(row["bits_per_dim"]) < 9
        assert row["data"] == batches.name
    assert [row["epoch"] for row in rows(run / "speed.csv")] == ["1", "2", "3", "4"]
    assert json.loads((run / "config.json").read_text())["schedule"] == "onecycle"


def test_the_logged_test_loss_is_that_of_the_checkpoint(run, batches):
    """Computed again from the file, one image at a time."""
    found = sample.load(run / "last.pt")
    images, _ = train.source.cifar10.load(batches, "horse,bird", train.source.cifar10.TEST)
    seed = torch.tensor(reparam.derive_seed(0, 0, phases.TEST))
    with torch.no_grad():
        sse = [found.model(image[None] / 255, seed, i).sse for i, image in enumerate(images)]
    logged = rows(run / "log.csv")[-1]["test_sse"]
    assert torch.cat(sse).mean().item() == pytest.approx(float(logged), rel=1e-4)


def test_the_same_seed_gives_the_same_run_and_another_another(run, batches, tmp_path):
    argv = ("--data", batches, "--epochs", 4, "--flip", "--schedule", "onecycle")
    trained(tmp_path / "again", *argv)
    same(run, tmp_path / "again")
    trained(tmp_path / "other", *argv, "--seed", 1)
    assert (run / "log.csv").read_text() != (tmp_path / "other" / "log.csv").read_text()


# train.py in steps that take a while on any machine
STEADY = """
import time, options, train
step = train.Training.train_step
train.Training.train_step = lambda *given: (time.sleep(0.02), step(*given))
options.run(train.main)
"""


def start(folder: Path, batches: Path, *argv: object, script: tuple = ("-c", STEADY)) -> subprocess.Popen:
    command = [sys.executable, *script, "--run", folder, "--data", batches, "--batch-size", 50, "--resume",
               "--arch", "mlp", "--flip", "--epochs", 24, "--save-seconds", 0.5, "--no-judge", *argv]
    return subprocess.Popen([str(c) for c in command], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                            text=True)


def interrupted(folder: Path, batches: Path, signum: int) -> int:
    """Train until there are some rows in the log, send a signal, return the exit status."""
    process, log = start(folder, batches), folder / "log.csv"
    before = len(log.read_text().splitlines()) if log.exists() else 1
    while process.poll() is None and not (log.exists() and len(log.read_text().splitlines()) >= before + 3
                                          and (folder / "last.pt").exists()):
        time.sleep(0.005)
    process.send_signal(signum)
    process.communicate(timeout=60)
    assert (folder / "last.pt").exists()
    assert checkpoint.load(folder / "last.pt")["epochs_done"] < 24, "the run was over before the signal"
    return process.returncode


def test_interrupted_and_killed_runs_end_with_the_same_bits(batches, tmp_path):
    seldom = ("--save-seconds", 60)
    whole = start(tmp_path / "whole", batches, *seldom, script=("train.py",))
    for signum, status in ((signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGKILL, -9), (signal.SIGHUP, 129)):
        if signum == signal.SIGHUP and signal.getsignal(signum) == signal.SIG_IGN:  # tests under nohup
            continue
        assert interrupted(tmp_path / "broken", batches, signum) == status
    process = start(tmp_path / "broken", batches, *seldom, script=("train.py",))
    for each in (whole, process):
        output = each.communicate(timeout=120)[0]
        assert each.returncode == 0, output
    same(tmp_path / "whole", tmp_path / "broken")


def test_a_run_that_nobody_reads_saves_and_stops(batches, tmp_path):
    """As `train.py | head -1` leaves it; drawing is done by then."""
    process = start(tmp_path / "r", batches, "--epochs", 99)
    process.stdout.readline()
    process.stdout.close()
    assert process.wait(timeout=120) == 143
    state = checkpoint.load(tmp_path / "r" / "last.pt")
    assert 0 < state["epochs_done"] < 99
    reads, writes = os.pipe()
    os.close(reads)
    done = subprocess.run([sys.executable, "sample.py", tmp_path / "r" / "last.pt", tmp_path / "o.png", "--n", "1"],
                          cwd=ROOT, stdout=writes, stderr=subprocess.PIPE, text=True,
                          env=os.environ | {"PYTHONUNBUFFERED": "", "PEGASUS_EXTENSION": "0"})
    os.close(writes)
    assert (done.returncode, done.stderr) == (141, "") and (tmp_path / "o.png").exists()


def test_more_epochs_train_on(batches, tmp_path):
    trained(tmp_path / "long", "--data", batches, "--epochs", 3)
    trained(tmp_path / "steps", "--data", batches, "--epochs", 2)
    trained(tmp_path / "steps", "--resume", "--epochs", 3)  # the data is where the checkpoint says
    same(tmp_path / "long", tmp_path / "steps")
    before = (tmp_path / "long" / "log.csv").read_bytes()
    assert trained(tmp_path / "long", "--resume") == 0  # nothing left to do
    assert (tmp_path / "long" / "log.csv").read_bytes() == before


def test_what_a_resume_refuses(run, batches, tmp_path, complaint):
    def fault(*argv):
        return complaint(train.main, "--run", run, *argv)

    before = {p.name: p.read_bytes() for p in run.iterdir()}
    assert "holds a run; --resume" in fault("--data", batches)
    assert "--lr: got 0.5" in fault("--resume", "--lr", 0.5)
    assert "--flip: got False" in fault("--resume", "--no-flip")
    assert "--epochs: got 3" in fault("--resume", "--epochs", 3)
    train.source.drawn.write(tmp_path / "other", train=50, test=20, seed=5)
    assert "is not what" in fault("--resume", "--data", tmp_path / "other")
    assert {p.name: p.read_bytes() for p in run.iterdir()} == before


def test_few_test_pictures(tmp_path):
    """Fewer than a sheet of reconstructions shows."""
    train.source.drawn.write(tmp_path / "few", train=50, test=5)
    assert trained(tmp_path / "r", "--data", tmp_path / "few", "--epochs", 1) == 0
    assert png(tmp_path / "r" / "reconstructions.png")[0] == png(tmp_path / "r" / "samples.png")[0]


def test_overwrite_begins_anew(batches, tmp_path):
    trained(tmp_path / "r", "--data", batches, "--epochs", 2)
    trained(tmp_path / "r", "--data", batches, "--epochs", 1, "--overwrite", "--seed", 2)
    assert len((tmp_path / "r" / "log.csv").read_text().splitlines()) == 2


def test_beta_weighs_the_rate_in_what_is_trained_and_logged(batches, tmp_path):
    rates = []
    for beta in (0.25, 4.0):
        trained(tmp_path / str(beta), "--data", batches, "--epochs", 1, "--beta", beta)
        row = rows(tmp_path / str(beta) / "log.csv")[0]
        for part in ("train", "test"):
            loss, rate, distortion = (float(row[f"{part}_{name}"]) for name in ("loss", "rate", "distortion"))
            assert loss == pytest.approx(distortion + beta * rate, rel=1e-6)
        rates.append(rate)
    assert rates[0] > rates[1]


@pytest.mark.parametrize("wrong", [("--data", "/nowhere"), ("--latent", "foo"), ("--classes", "unicorn"),
                                   ("--arch", "mlp", "--latent", "8x8x8"), ("--prior", "learned", "--flow", 1)])
def test_overwrite_takes_nothing_where_the_new_run_is_refused(run, batches, complaint, wrong):
    before = {p.name: p.read_bytes() for p in run.iterdir()}
    assert wrong[-2] in complaint(train.main, "--run", run, "--data", batches, "--overwrite", *wrong)
    assert {p.name: p.read_bytes() for p in run.iterdir()} == before


def test_a_folder_that_cannot_be_written(batches, tmp_path, complaint):
    (tmp_path / "file").write_text("in the way")
    for folder in (tmp_path / "file", tmp_path / "file" / "run", Path("/proc/run")):
        assert str(folder) in complaint(train.main, "--data", batches, "--run", folder)
    assert (tmp_path / "file").read_text() == "in the way"


def test_a_diverging_run_stops_and_says_so(batches, tmp_path, complaint):
    sentence = complaint(train.main, "--data", batches, "--run", tmp_path / "r", "--arch", "mlp", "--lr", 1e9)
    assert "no longer finite in epoch" in sentence
    assert "lower --lr" in sentence


def test_without_network_and_data_the_drawn_set_is_announced_everywhere(batches, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "drawn").symlink_to(batches)
    monkeypatch.setattr(train.source.Path, "resolve", lambda path: path)
    trained(tmp_path / "r", "--epochs", 1, "--no-judge")
    assert "DRAWN DATA" in capsys.readouterr().err
    assert checkpoint.load(tmp_path / "r" / "last.pt")["data"]["name"] == "drawn"
    assert (tmp_path / "r" / "log.csv").read_text().splitlines()[1].endswith(",drawn")
    for name in PICTURES:
        assert png(tmp_path / "r" / name)[1]["data"] == "drawn"


def test_learning_rates():
    assert {recipe.learning_rate("constant", 0.5, p) for p in (0, 0.3, 1)} == {0.5}
    rates = [recipe.learning_rate("onecycle", 0.5, p / 100) for p in range(101)]
    assert rates[0] == pytest.approx(0.02)
    assert max(rates) == rates[10] == pytest.approx(0.5)
    assert rates[100] == pytest.approx(0, abs=1e-9)
    assert rates[:11] == sorted(rates[:11])
    assert rates[10:] == sorted(rates[10:], reverse=True)


def test_orders_and_coins_are_functions_of_seed_and_epoch():
    order = phases.epoch_order(3, 7, 1000)
    assert order.equal(phases.epoch_order(3, 7, 1000))
    assert order.sort().values.equal(torch.arange(1000))
    assert not order.equal(phases.epoch_order(3, 8, 1000))
    assert not order.equal(phases.epoch_order(4, 7, 1000))
    coins = phases.coins(3, 7, 10_000)
    assert 4800 < coins.sum() < 5200
    assert coins[:500].equal(phases.coins(3, 7, 500))
    assert not coins.equal(phases.coins(3, 8, 10_000))


def test_gather_mirrors_and_scales():
    images = torch.randint(0, 256, (5, 3, 32, 32), dtype=torch.uint8)
    x = phases.gather(images, torch.tensor([4, 0]), torch.tensor([True, False]))
    assert x.equal(torch.stack([images[4].flip(2), images[0]]) / 255)
    assert phases.gather(images, torch.tensor([1]), None).equal(images[1:2] / 255)
