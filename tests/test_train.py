"""The whole thing through its command lines, on small batches."""
import copy
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import reparam
import train
import vae
from pegasus import checkpoint, device
from pegasus.data import cifar10, datasets, synthetic
from pegasus.drawing import sampler
from pegasus.training import config as training_config
from pegasus.training import progress, signals, stages
from pegasus.training.adam import SkippingAdam
from pegasus.training.config import TrainConfig

import pytest
import torch
from conftest import PICTURES, ROOT, SMALL, png, rows, same
from torch import nn
from torch.optim import Adam


def train_mlp(folder: Path, *argv: object) -> int:
    command = ("--run", folder, "--batch-size", 50, "--arch", "mlp", *argv)
    return train.main([str(word) for word in command])


@pytest.fixture(scope="module")
def run(batches, tmp_path_factory) -> Path:
    """An unbroken run of 4 epochs."""
    folder = tmp_path_factory.mktemp("run") / "a"
    argv = ("--data", batches, "--epochs", 4, "--flip", "--schedule", "onecycle")
    assert train_mlp(folder, *argv) == 0
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_runs_folder(run, batches):
    names = {"last.pt", "log.csv", "speed.csv", "config.json", *PICTURES}
    assert {path.name for path in run.iterdir()} == names
    table = rows(run / "log.csv")
    assert list(table[0]) == list(progress.LOG_COLUMNS)
    assert [row["epoch"] for row in table] == ["1", "2", "3", "4"]
    assert float(table[3]["train_loss"]) < float(table[0]["train_loss"])
    for row in table:
        parts = float(row["test_rate"]) + float(row["test_distortion"])
        assert float(row["test_loss"]) == pytest.approx(parts, rel=1e-6)
        assert row["test_sse"] == row["test_distortion"]
        assert 5 < float(row["bits_per_dim"]) < 9
        assert row["data"] == batches.name
    speeds = rows(run / "speed.csv")
    assert list(speeds[0]) == list(progress.SPEED_COLUMNS)
    assert [row["epoch"] for row in speeds] == ["1", "2", "3", "4"]
    config = json.loads((run / "config.json").read_text())
    assert config["schedule"] == "onecycle"


def test_the_logged_test_loss_is_that_of_the_checkpoint(run, batches):
    """Computed again from the file, one image at a time."""
    model = sampler.load(run / "last.pt").model
    images, _ = cifar10.load(batches, ("horse", "bird"), cifar10.TEST)
    seed = torch.tensor(reparam.derive_seed(0, 0, stages.TEST))
    sse = []
    with torch.no_grad():
        for i, image in enumerate(images):
            sse.append(model(image[None] / 255, seed, i).sse)
    logged = float(rows(run / "log.csv")[-1]["test_sse"])
    rounding = 1e-3 if device.supports_bfloat16("cpu") else 1e-4
    assert torch.cat(sse).mean().item() == pytest.approx(logged, rel=rounding)


def test_a_checkpoint_says_what_it_is_of(run, batches):
    state = checkpoint.load(run / "last.pt")
    assert state["format"] == checkpoint.FORMAT == 9
    assert state["classes"] == ["horse", "bird"]
    assert state["data"]["folder"] == str(batches)
    position = [state[key] for key in ("phase", "epoch", "epochs_done", "step")]
    assert position == ["autoencoder", 4, 4, 0]
    assert len(state["history"]) == 4


def test_the_same_seed_gives_the_same_run_and_another_another(run, batches, tmp_path):
    argv = ("--data", batches, "--epochs", 4, "--flip", "--schedule", "onecycle")
    train_mlp(tmp_path / "again", *argv)
    same(run, tmp_path / "again")
    train_mlp(tmp_path / "other", *argv, "--seed", 1)
    other = (tmp_path / "other" / "log.csv").read_text()
    assert (run / "log.csv").read_text() != other


# train.py in steps that take a while on any machine, and without pictures, which do too
STEADY = """
import time, train
from pegasus import cli
from pegasus.training import run_dir
run_dir.draw_pictures = lambda *about: None
inputs = train.step_inputs
train.step_inputs = lambda *given: (time.sleep(0.02), inputs(*given))[1]
cli.run(train.main)
"""
LONG = ("--epochs", 24, "--flip", "--resume")


def start(folder: Path, batches: Path, *argv: object) -> subprocess.Popen:
    """Start a process that trains for long and saves twice a second."""
    places = ("--run", folder, "--data", batches)
    options = ("--batch-size", 50, "--arch", "mlp", "--save-seconds", 0.5, *LONG, *argv)
    command = [sys.executable, "-c", STEADY, *places, *options]
    settings = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen([str(word) for word in command], cwd=ROOT, **settings)


def log_lines(folder: Path) -> int:
    log = folder / "log.csv"
    return len(log.read_text().splitlines()) if log.exists() else 0


def interrupt(folder: Path, batches: Path, signum: int) -> int:
    """Train until there are three more rows in the log, send a signal; return the status."""
    wanted = max(log_lines(folder), 1) + 3
    process = start(folder, batches)
    while process.poll() is None:
        if log_lines(folder) >= wanted and (folder / "last.pt").exists():
            break
        time.sleep(0.005)
    process.send_signal(signum)
    process.communicate(timeout=60)
    done = checkpoint.load(folder / "last.pt")["epochs_done"]
    assert done < 24, "the run was over before the signal"
    return process.returncode


def test_interrupted_and_killed_runs_end_with_the_same_bits(batches, tmp_path):
    for signum, status in ((signal.SIGINT, 130), (signal.SIGKILL, -9)):
        assert interrupt(tmp_path / "broken", batches, signum) == status
    for name in ("broken", "whole"):
        assert train_mlp(tmp_path / name, "--data", batches, *LONG) == 0
    same(tmp_path / "whole", tmp_path / "broken")


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_the_first_signal_is_noted_and_the_second_ends_the_process(monkeypatch, signum):
    """Terminals hang up twice: the second SIGHUP is ignored."""
    monkeypatch.setattr(signal, "getsignal", lambda signum: signal.SIG_DFL)  # also under nohup
    stop = signals.StopSignal()
    monkeypatch.undo()
    stop.listen()
    assert stop.asked == 0
    signal.raise_signal(signum)
    assert stop.asked == signum
    hangup = signum == signal.SIGHUP
    assert signal.getsignal(signum) == (signal.SIG_IGN if hangup else signal.SIG_DFL)
    stop.release()
    assert signal.getsignal(signal.SIGINT) == signal.default_int_handler
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGHUP])
def test_signals_that_were_ignored_stay_ignored(signum):
    """As a script has it for what it starts in the background, and nohup."""
    signal.signal(signum, signal.SIG_IGN)
    stop = signals.StopSignal()
    stop.listen()
    signal.raise_signal(signum)
    stop.release()
    assert stop.asked == 0
    assert signal.getsignal(signum) == signal.SIG_IGN


def test_a_run_needs_a_name(complaint):
    assert "--run: got nothing" in complaint(train.main, "--run", "")


def test_a_run_that_nobody_reads_saves_and_stops(batches, tmp_path):
    """As `train.py | head -1` leaves it."""
    process = start(tmp_path / "r", batches, "--epochs", 99)
    process.stdout.readline()
    process.stdout.close()
    assert process.wait(timeout=120) == 143
    state = checkpoint.load(tmp_path / "r" / "last.pt")
    assert 0 < state["epochs_done"] < 99
    reads, writes = os.pipe()
    os.close(reads)
    out = tmp_path / "o.png"
    command = [sys.executable, "sample.py", tmp_path / "r" / "last.pt", out, "--n", "1"]
    env = os.environ | {"PYTHONUNBUFFERED": "", "PEGASUS_EXTENSION": "0"}
    settings = {"stdout": writes, "stderr": subprocess.PIPE, "text": True}
    done = subprocess.run(command, cwd=ROOT, env=env, **settings)
    os.close(writes)
    assert (done.returncode, done.stderr) == (141, "")
    assert out.exists()


PLAIN = f"""
import train
from pegasus import cli
from pegasus.training import accelerate
{SMALL}
assert not accelerate.available
cli.run(train.main)
"""


def test_a_run_without_the_extension(batches, tmp_path, small_network):
    """It warns of nothing that was asked for, and follows the same curve."""
    options = ["--data", str(batches), "--latent", "8x8x2", "--epochs", "2"]
    options += ["--batch-size", "50", "--precision", "float32"]
    command = [sys.executable, "-c", PLAIN, "--run", str(tmp_path / "plain"), *options]
    env = os.environ | {"PEGASUS_EXTENSION": "0"}
    settings = {"capture_output": True, "text": True, "timeout": 120}
    done = subprocess.run(command, cwd=ROOT, env=env, **settings)
    assert (done.returncode, done.stderr) == (0, "")
    train.main(["--run", str(tmp_path / "fast"), *options])
    losses = []
    for name in ("plain", "fast"):
        table = rows(tmp_path / name / "log.csv")
        losses.append([float(row["test_loss"]) for row in table])
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)


def test_more_epochs_train_on(batches, tmp_path):
    long = tmp_path / "long"
    train_mlp(long, "--data", batches, "--epochs", 3)
    train_mlp(tmp_path / "steps", "--data", batches, "--epochs", 2)
    train_mlp(tmp_path / "steps", "--resume", "--epochs", 3)  # data as in the checkpoint
    same(long, tmp_path / "steps")
    before = (long / "log.csv").read_bytes()
    assert train_mlp(long, "--resume") == 0  # nothing left to do
    assert (long / "log.csv").read_bytes() == before


def test_whether_pictures_are_centered_reaches_the_runs_model(
    run, batches, tmp_path, complaint
):
    """And is kept when the run goes on, and counts in the model's fingerprint."""
    plain = tmp_path / "plain"
    train_mlp(plain, "--data", batches, "--epochs", 1, "--no-center")
    assert "--center: got True" in complaint(train.main, "--run", plain, "--resume", "--center")
    assert train_mlp(plain, "--resume", "--epochs", 2) == 0
    for folder, is_centered in ((run, True), (plain, False)):
        assert checkpoint.load(folder / "last.pt")["config"]["center"] == is_centered
        assert json.loads((folder / "config.json").read_text())["center"] == is_centered
        assert sampler.load(folder / "last.pt").model.center == 0.5 * is_centered
    state = checkpoint.load(plain / "last.pt")
    state["config"]["center"] = True
    checkpoint.save(tmp_path / "other.pt", state)
    other = sampler.load(tmp_path / "other.pt")
    assert other.about["model"] != sampler.load(plain / "last.pt").about["model"]


def test_what_a_resume_refuses(run, batches, tmp_path, complaint):
    def refused(*argv: object) -> str:
        return complaint(train.main, "--run", run, *argv)

    before = contents(run)
    assert "holds a run; --resume" in refused("--data", batches)
    assert "--lr: got 0.5" in refused("--resume", "--lr", 0.5)
    assert "--flip: got False" in refused("--resume", "--no-flip")
    assert "--center: got False" in refused("--resume", "--no-center")
    assert "--epochs: got 3" in refused("--resume", "--epochs", 3)
    synthetic.write(tmp_path / "other", train=50, test=20, seed=5)
    assert "is not what" in refused("--resume", "--data", tmp_path / "other")
    assert contents(run) == before


def test_few_test_pictures(tmp_path):
    """Fewer than a sheet of reconstructions shows."""
    synthetic.write(tmp_path / "few", train=50, test=5)
    folder = tmp_path / "r"
    assert train_mlp(folder, "--data", tmp_path / "few", "--epochs", 1) == 0
    size = png(folder / "samples.png")[0]
    assert png(folder / "reconstructions.png")[0] == size


def test_overwrite_begins_anew(batches, tmp_path):
    train_mlp(tmp_path, "--data", batches, "--epochs", 2)
    train_mlp(tmp_path, "--data", batches, "--epochs", 1, "--overwrite", "--seed", 2)
    assert len(rows(tmp_path / "log.csv")) == 1
    assert len(rows(tmp_path / "speed.csv")) == 1


def test_beta_weighs_the_rate_in_what_is_trained_and_logged(batches, tmp_path):
    rates = []
    for beta in (0.25, 4.0):
        folder = tmp_path / str(beta)
        train_mlp(folder, "--data", batches, "--epochs", 1, "--beta", beta)
        row = {}
        for name, value in rows(folder / "log.csv")[0].items():
            if name.startswith(("train_", "test_")):
                row[name] = float(value)
        for part in ("train", "test"):
            wanted = row[f"{part}_distortion"] + beta * row[f"{part}_rate"]
            assert row[f"{part}_loss"] == pytest.approx(wanted, rel=1e-6)
        rates.append(row["test_rate"])
    assert rates[0] > rates[1]


@pytest.mark.parametrize(
    "wrong",
    [
        ("--data", "/nowhere"),
        ("--latent", "foo"),
        ("--classes", "unicorn"),
        ("--arch", "mlp", "--latent", "8x8x8"),
        ("--prior", "learned", "--flow", 1),
    ],
)
def test_overwrite_takes_nothing_where_the_new_run_is_refused(
    run, batches, complaint, wrong
):
    before = contents(run)
    argv = ("--run", run, "--data", batches, "--overwrite", *wrong)
    assert wrong[-2] in complaint(train.main, *argv)
    assert contents(run) == before


def test_a_folder_that_cannot_be_written(batches, tmp_path, complaint):
    file = tmp_path / "file"
    file.write_text("in the way")
    for folder in (file, file / "run", Path("/proc/run")):
        argv = ("--data", batches, "--run", folder)
        assert str(folder) in complaint(train.main, *argv)
    assert file.read_text() == "in the way"


def test_a_diverging_run_stops_and_says_so(batches, tmp_path, complaint):
    argv = ("--data", batches, "--run", tmp_path / "r", "--arch", "mlp", "--lr", 1e9)
    sentence = complaint(train.main, *argv)
    assert "no longer finite in epoch" in sentence
    assert "lower --lr" in sentence


def test_without_network_and_data_the_synthetic_set_is_announced_everywhere(
    batches, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    Path("data").mkdir()
    Path("data/synthetic").symlink_to(batches)
    monkeypatch.setattr(datasets.Path, "resolve", lambda path: path)
    train_mlp(tmp_path / "r", "--epochs", 1)
    assert "SYNTHETIC DATA" in capsys.readouterr().err
    state = checkpoint.load(tmp_path / "r" / "last.pt")
    assert state["data"]["name"] == "synthetic"
    assert rows(tmp_path / "r" / "log.csv")[0]["data"] == "synthetic"
    for name in PICTURES:
        assert png(tmp_path / "r" / name)[1]["data"] == "synthetic"


def test_learning_rates():
    shares = [p / 100 for p in range(101)]
    constant = [training_config.learning_rate("constant", 0.5, p) for p in shares]
    assert set(constant) == {0.5}
    rates = [training_config.learning_rate("onecycle", 0.5, p) for p in shares]
    assert rates[0] == pytest.approx(0.02)
    assert max(rates) == rates[10] == pytest.approx(0.5)
    assert rates[100] == pytest.approx(0, abs=1e-9)
    assert rates[:11] == sorted(rates[:11])
    assert rates[10:] == sorted(rates[10:], reverse=True)


# ---- the optimizer ----


def make_network() -> nn.Module:
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 16, 3), nn.SiLU(), nn.Flatten(), nn.Linear(64, 5)]
    return nn.Sequential(*layers).to(memory_format=torch.channels_last)


def backward(network: nn.Module, number: int) -> None:
    """Leave the gradients of another batch for each number."""
    generator = torch.Generator().manual_seed(number)
    x = torch.randn(8, 3, 4, 4, generator=generator)
    network.zero_grad()
    network(x).square().mean().backward()


def step(network: nn.Module, optimizer: Adam, number: int) -> None:
    backward(network, number)
    optimizer.found_inf = torch.zeros(())
    optimizer.step()


def moments(optimizer: Adam) -> dict:
    return copy.deepcopy(optimizer.state_dict()["state"])


def fused_adam(network: nn.Module) -> Adam:
    return Adam(network.parameters(), lr=0.01, fused=True)


@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format])
def test_adam_goes_on_from_moments_of_another_layout(layout):
    """As a run begun without the step's kernels does with them, and the other way round."""
    network = make_network()
    whole = fused_adam(network)
    step(network, whole, 0)
    state = moments(whole)
    for part in state.values():
        for name in ("exp_avg", "exp_avg_sq"):
            if part[name].dim() == 4:
                part[name] = part[name].contiguous(memory_format=layout)
    twin = copy.deepcopy(network)
    resumed = fused_adam(twin)
    train.restore_optimizers([resumed], [state])
    for p, part in resumed.state.items():
        assert part["exp_avg"].stride() == part["exp_avg_sq"].stride() == p.stride()
    step(network, whole, 1)
    step(twin, resumed, 1)
    pairs = zip(network.parameters(), twin.parameters(), strict=True)
    assert all(p.equal(q) for p, q in pairs)
    assert moments(resumed)[0]["step"] == 2


def test_adam_goes_on_from_before_its_first_step():
    network = make_network()
    optimizer = fused_adam(network)
    train.restore_optimizers([optimizer], [moments(fused_adam(make_network()))])
    assert not optimizer.state
    step(network, optimizer, 0)
    assert moments(optimizer)[0]["step"] == 1


def test_a_weight_without_a_gradient_is_named(batches, tmp_path, monkeypatch, complaint):
    def build(latent: tuple, size: int) -> tuple[nn.Module, nn.Module]:
        encoder, decoder = vae.build_mlp(latent, size)
        idle = nn.Identity()
        idle.register_parameter("weight", nn.Parameter(torch.zeros(1)))
        return encoder, decoder.append(idle)

    monkeypatch.setitem(vae.NETWORKS, "mlp", build)
    argv = ("--run", tmp_path / "run", "--data", batches, "--arch", "mlp", "--epochs", 1)
    assert "decoder.4.weight has no gradient" in complaint(train.main, *argv)


def test_moments_of_another_network_are_refused():
    network = make_network()
    optimizer = fused_adam(network)
    step(network, optimizer, 0)
    state = moments(optimizer)
    with pytest.raises(ValueError, match="differ in shape"):
        train.restore_optimizers([fused_adam(nn.Linear(3, 2))], [state])
    del state[2]
    with pytest.raises(checkpoint.MISMATCHES):
        train.restore_optimizers([fused_adam(make_network())], [state])


def test_gradients_are_divided_by_their_scale():
    """Adam (Kingma and Ba 2015) written out, from gradients a quarter as long."""
    network = make_network()
    weight = network[3].weight
    before = weight.detach().clone()
    optimizer = fused_adam(network)
    backward(network, 0)
    gradient = weight.grad / 4
    optimizer.found_inf = torch.zeros(())
    optimizer.grad_scale = torch.tensor(4.0)
    optimizer.step()
    torch.testing.assert_close(optimizer.state[weight]["exp_avg"], 0.1 * gradient)
    square = optimizer.state[weight]["exp_avg_sq"]
    torch.testing.assert_close(square, 0.001 * gradient.square())
    wanted = before - 0.01 * gradient / (gradient.abs() + 1e-8)
    torch.testing.assert_close(weight.detach(), wanted)


def test_adam_without_a_kernel_of_its_own_skips_and_clips_like_torchs():
    networks = [nn.Linear(3, 2) for _ in range(2)]
    networks[1].load_state_dict(networks[0].state_dict())
    parameters = [list(network.parameters()) for network in networks]
    optimizers = [Adam(parameters[0], fused=True), SkippingAdam(parameters[1])]
    for number in range(5):
        x = torch.randn(4, 3, generator=torch.Generator().manual_seed(number))
        steps = []
        for network, optimizer in zip(networks, optimizers, strict=True):
            network.zero_grad()
            network(x).square().sum().backward()
            skip = torch.tensor(float(number % 2 == 0))  # the first one, too
            divisor = torch.tensor(3.0) if number < 2 else None
            steps.append(train.update_weights([optimizer], torch.tensor(0.1), skip, divisor))
        assert steps[0] == steps[1] == (number + 1) // 2
        for one, other in zip(*parameters, strict=True):
            torch.testing.assert_close(one, other)


def test_how_far_gradients_are_clipped():
    assert train.clip_divisor(torch.tensor(5.0), None) is None
    assert train.clip_divisor(torch.tensor(5.0), 2.0).item() == 2.5
    assert train.clip_divisor(torch.tensor(0.5), 2.0).item() == 1.0


def test_adam_stays_on_the_gpu_where_steps_are_captured():
    stage = stages.AutoencoderStage.__new__(stages.AutoencoderStage)
    stage.network = nn.Linear(2, 2)
    for where, capturable in (("cpu", False), ("cuda", True)):
        stage.config = TrainConfig(device=where)
        (adam,) = train.make_optimizers(stage)  # no weight is large enough for Muon
        group = adam.param_groups[0]
        assert (group["fused"], group["capturable"]) == (True, capturable)
