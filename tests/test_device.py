"""Where tensors lie when there is a GPU.

Whole runs on a simulated one, which refuses to mix places, and on a real one.
"""
import functools
from collections.abc import Callable
from pathlib import Path

import reparam
import train
from pegasus import checkpoint, device
from pegasus.cli import UserError
from pegasus.drawing.sampler import SampleConfig
from pegasus.training import cuda_graph, run_dir

import pytest
import simulated
import torch
from conftest import rows
from torch import Tensor


@pytest.fixture
def few(small_network: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let runs show few pictures: what is computed where is the same for many."""
    monkeypatch.setattr(run_dir, "SampleConfig", functools.partial(SampleConfig, n=4, steps=2))


@pytest.fixture
def arguments(batches: Path, tmp_path: Path) -> list[str]:
    places = ["--data", str(batches), "--run", str(tmp_path / "run")]
    return [*places, "--batch-size", "36", "--threads", "1"]


# ---- where, and in which precision ----


def test_auto_is_cuda_where_there_is_one(monkeypatch):
    assert [device.resolve_device(name) for name in ("auto", "cpu")] == ["cpu", "cpu"]
    with pytest.raises(UserError, match="--device: got cuda"):
        device.resolve_device("cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    names = [device.resolve_device(name) for name in ("auto", "cpu", "cuda")]
    assert names == ["cuda", "cpu", "cuda"]


def test_mps_is_taken_where_it_is_asked_for_and_there(monkeypatch):
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    with pytest.raises(UserError, match="--device: got mps"):
        device.resolve_device("mps")
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert [device.resolve_device(name) for name in ("auto", "mps")] == ["cpu", "mps"]
    assert device.fastest_precision("mps") == "float32"
    assert device.widest_float("mps") == torch.float32  # it has no float64
    assert not device.has_graphs("mps")


def test_products_have_the_precision_that_was_asked_for():
    x = torch.ones(2, 2)
    for precision in ("float32", "bfloat16"):
        with device.autocast("cpu", precision):
            assert (x @ x).dtype == getattr(torch, precision)


def test_numbers_go_to_a_device():
    numbers = device.to_device([0.5, 2.0], "cpu")
    assert numbers.dtype == torch.float32
    assert numbers.tolist() == [0.5, 2.0]
    big = device.to_device([2**62 + 1], "cpu")
    assert big.item() == 2**62 + 1


# ---- a captured step ----


def accumulate(total: Tensor, x: Tensor, nothing: None, y: Tensor) -> Tensor:
    assert nothing is None
    return total.add_((x * y).sum(0))


def test_a_step_runs_again_with_what_it_is_given(monkeypatch):
    """Captured kernels read one place each, where calls put their values first."""
    captured = []

    def capture(function: Callable) -> Callable:
        captured.append(function)
        return function

    monkeypatch.setattr(cuda_graph, "capture", capture)
    total = torch.zeros(2)
    replay = cuda_graph.Replay(functools.partial(accumulate, total), 4)
    inputs = torch.arange(64.0).view(8, 4, 2)
    for number, x in enumerate(inputs):
        assert replay(x, None, torch.tensor(2.0)) is total
        assert len(captured) == (number >= cuda_graph.WARM_UP)
    assert total.equal(2 * inputs.sum((0, 1)))
    assert inputs.equal(torch.arange(64.0).view(8, 4, 2))


def test_a_step_of_another_size_runs_kernel_by_kernel(monkeypatch):
    """An epoch's last step, which does not count as a call to be captured."""
    captured = []
    monkeypatch.setattr(cuda_graph, "capture", lambda function: captured.append(1) or function)
    total = torch.zeros(2)
    replay = cuda_graph.Replay(functools.partial(accumulate, total), 4)
    for _ in range(cuda_graph.WARM_UP + 2):
        replay(torch.ones(3, 2), None, torch.tensor(1.0))
    assert not captured
    for _ in range(cuda_graph.WARM_UP + 2):
        replay(torch.ones(4, 2), None, torch.tensor(1.0))
    replay(torch.ones(1, 2), None, torch.tensor(1.0))
    assert captured == [1]
    assert total.equal(torch.full((2,), 5.0 * (3 + 4) + 1))


# ---- a simulated GPU ----


def test_a_simulated_gpu_refuses_a_tensor_that_lies_elsewhere(monkeypatch):
    with simulated.gpu(monkeypatch):
        there = torch.ones(3, device="meta")
        assert (there + 1).cpu().tolist() == [2, 2, 2]
        with pytest.raises(RuntimeError, match="same device"):
            there + torch.ones(3)


@pytest.mark.parametrize(
    "network",
    ["", "--prior normal --latent 8x8x4", "--arch mlp --prior conditional",
     "--arch mlp --flow 2"],
)
@pytest.mark.parametrize("has_float64", [True, False])
def test_a_run_keeps_its_tensors_on_the_gpu_and_resumes_there(
    few, arguments, network, has_float64, monkeypatch
):
    with simulated.gpu(monkeypatch, has_float64):
        assert train.main([*arguments, *network.split(), "--epochs", "2"]) == 0
        argv = [*arguments, "--resume", "--epochs", "3"]
        assert train.main(argv) == 0


def losses(arguments: list[str], place: str, tmp_path: Path) -> list[float]:
    """Return the test losses of two epochs, one of them the flow prior's."""
    options = ["--epochs", "2", "--overwrite", "--precision", "float32"]
    assert train.main([*arguments, *options, "--device", place]) == 0
    return [float(row["test_loss"]) for row in rows(tmp_path / "run" / "log.csv")]


def test_gpu_and_cpu_follow_one_curve(few, arguments, tmp_path, monkeypatch):
    wanted = losses(arguments, "cpu", tmp_path)
    with simulated.gpu(monkeypatch):
        got = losses(arguments, "auto", tmp_path)
    assert got == pytest.approx(wanted, rel=1e-4)


def test_a_run_moves_from_the_gpu_to_the_cpu(few, arguments, monkeypatch):
    """Its moments come along."""
    argv = [*arguments, "--prior", "normal", "--latent", "8x8x2"]
    with simulated.gpu(monkeypatch):
        assert train.main([*argv, "--epochs", "1"]) == 0
    resume = [*arguments, "--resume", "--device", "cpu", "--epochs", "2"]
    assert train.main(resume) == 0


@pytest.mark.skipif(reparam.extension is None, reason="there is only the reference")
def test_gpu_tensors_go_to_the_reference_where_there_are_no_cuda_kernels(
    monkeypatch, capsys
):
    class Lean:
        cuda_architectures = ""

    monkeypatch.setattr(reparam, "extension", Lean)
    monkeypatch.setattr(reparam, "silent", False)
    monkeypatch.setattr(reparam, "forward_op", None)
    inputs = (torch.ones(2, 3), torch.zeros(2, 3), torch.tensor(7))
    wanted = reparam.reference(*inputs)
    with simulated.gpu(monkeypatch):
        there = [tensor.to("meta") for tensor in inputs]
        got = [tensor.cpu() for tensor in reparam.reparameterize_kl(*there)]
    for a, b in zip(got, wanted, strict=True):
        assert a.equal(b)
    said = capsys.readouterr().err
    assert "no kernels for meta, so its slower PyTorch reference is used" in said


# ---- a real GPU ----

needs_a_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")


@needs_a_gpu
def test_a_real_gpu_follows_the_same_curve(few, arguments, tmp_path, monkeypatch):
    wanted = losses(arguments, "cpu", tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    got = losses(arguments, "cuda", tmp_path)
    assert got == pytest.approx(wanted, rel=1e-2)  # its float32 products are TF32's


@needs_a_gpu
@pytest.mark.parametrize("step", [5, 8])  # of the autoencoder's 6, and of the prior's
def test_a_run_on_a_real_gpu_goes_on_to_the_same_bits(
    few, arguments, tmp_path, monkeypatch, stop_at, step
):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    command = [*arguments, "--epochs", "3"]
    assert train.main([*command, "--run", str(tmp_path / "whole")]) == 0
    stop_at(step)
    assert train.main(command) == 128 + 15
    stop_at(None)
    assert train.main([*command, "--resume"]) == 0
    one, two = (checkpoint.load(tmp_path / name / "last.pt") for name in ("whole", "run"))
    for part in ("model", "prior", "velocity"):
        for name, tensor in one[part].items():
            assert tensor.equal(two[part][name]), (part, name)
    logs = [(tmp_path / name / "log.csv").read_bytes() for name in ("whole", "run")]
    assert logs[0] == logs[1]
