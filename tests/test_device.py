"""Where tensors lie when there is a GPU: whole runs on a simulated one, which refuses to mix places; and on a real one.
"""
import functools
from pathlib import Path

import checkpoint
import compose
import reparam
import replay
import sample
import train

import pytest
import simulated
import torch


@pytest.fixture
def few(small_network: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs show few pictures by small networks, since what a place computes is the same for many."""
    chosen = functools.partial(sample.Options, n=4, steps=2)
    monkeypatch.setattr(sample, "Options", chosen)
    monkeypatch.setattr(sample.draw.__wrapped__, "__defaults__", (chosen(),))
    monkeypatch.setattr(compose, "preview", functools.partial(compose.preview, n=4))
    monkeypatch.setattr(compose, "prepare", functools.partial(compose.prepare, draws=12, horses=2, birds=2))


@pytest.fixture
def arguments(batches: Path, tmp_path: Path) -> list[str]:
    return ["--data", str(batches), "--run", str(tmp_path / "run"), "--batch-size", "36", "--threads", "1"]


def test_simulated_gpu_refuses_a_tensor_that_lies_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    with simulated.gpu(monkeypatch):
        there = torch.ones(3, device="meta")
        assert (there + 1).cpu().tolist() == [2, 2, 2]
        with pytest.raises(RuntimeError, match="same device"):
            there + torch.ones(3)


@pytest.mark.parametrize("network", ["", "--prior normal --latent 8x8x4", "--arch mlp --prior conditional",
                                     "--arch mlp --flow 2"])
def test_a_run_keeps_its_tensors_on_the_gpu_and_resumes_there(
        few: None, arguments: list[str], network: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with simulated.gpu(monkeypatch):
        assert train.main([*arguments, *network.split(), "--epochs", "2"]) == 0
        assert train.main([*arguments, "--resume", "--epochs", "3", "--no-judge"]) == 0


def losses(arguments: list[str], place: str, tmp_path: Path) -> list[float]:
    """The test losses of two epochs, one of them the learned prior's."""
    train.main([*arguments, "--epochs", "2", "--no-judge", "--overwrite", "--precision", "float32", "--device", place])
    return [float(row.split(",")[5]) for row in (tmp_path / "run" / "log.csv").read_text().splitlines()[1:]]


def test_gpu_and_cpu_follow_one_curve(few: None, arguments: list[str], tmp_path: Path,
                                      monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = losses(arguments, "cpu", tmp_path)
    with simulated.gpu(monkeypatch):
        assert losses(arguments, "auto", tmp_path) == pytest.approx(wanted, rel=1e-4)


def test_a_step_runs_again_with_what_it_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its captured kernels read one place each, where every call puts its own values first; None stays None."""
    captured, total = [], torch.zeros(2)
    monkeypatch.setattr(replay, "capture", lambda function: captured.append(function) or function)
    step, again = lambda x, nothing, y: total.add_(x * y if nothing is None else nothing), replay.Replay()
    inputs = torch.arange(16.0).view(8, 2)
    for number, x in enumerate(inputs):
        assert again(step, x, None, torch.tensor(2.0)) is total
        assert len(captured) == (number >= replay.WARM_UP)
    assert total.equal(2 * inputs.sum(0))
    assert inputs.equal(torch.arange(16.0).view(8, 2))


needs_a_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")


@needs_a_gpu
def test_a_real_gpu_follows_the_same_curve(few: None, arguments: list[str], tmp_path: Path,
                                           monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = losses(arguments, "cpu", tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert losses(arguments, "cuda", tmp_path) == pytest.approx(wanted, rel=1e-2)  # its float32 products are TF32's


@needs_a_gpu
@pytest.mark.parametrize("step", [5, 9])  # of the autoencoder's 6, the last of 12 pictures, and of the prior's
def test_a_run_on_a_real_gpu_goes_on_to_the_same_bits(few: None, arguments: list[str], tmp_path: Path, step: int,
                                                      monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    ours, command = train.Training.train_step, [*arguments, "--epochs", "3", "--no-judge"]

    def stopping(self: train.Training, *args: object) -> None:
        ours(self, *args)
        if self.epoch * self.steps + self.step == step:
            self.stop = 15
    assert train.main([*command, "--run", str(tmp_path / "whole")]) == 0
    with monkeypatch.context() as patched:
        patched.setattr(train.Training, "train_step", stopping)
        assert train.main(command) == 128 + 15
    assert train.main([*command, "--resume"]) == 0
    one, two = (checkpoint.load(tmp_path / name / "last.pt") for name in ("whole", "run"))
    for part in ("model", "prior", "velocity"):
        assert all(tensor.equal(two[part][name]) for name, tensor in one[part].items()), part
    assert (tmp_path / "whole" / "log.csv").read_bytes() == (tmp_path / "run" / "log.csv").read_bytes()


@pytest.mark.skipif(reparam.extension is None, reason="without the extension there is only the reference")
def test_gpu_tensors_go_to_the_reference_where_the_extension_has_no_cuda_kernels(
        monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    class Lean:
        cuda_architectures = ""

    monkeypatch.setattr(reparam, "extension", Lean)
    monkeypatch.setattr(reparam, "silent", False)
    monkeypatch.setattr(reparam, "forward_op", None)
    wanted = reparam.reference(torch.ones(2, 3), torch.zeros(2, 3), torch.tensor(7))
    with simulated.gpu(monkeypatch):
        place = [each.to("meta") for each in (torch.ones(2, 3), torch.zeros(2, 3), torch.tensor(7))]
        got = [each.cpu() for each in reparam.reparameterize_kl(*place)]
    assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))
    assert "no kernels for meta, so its slower PyTorch reference is used" in capsys.readouterr().err
