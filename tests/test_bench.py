from pegasus import bench
from pegasus.training import accelerate

import pytest
import torch
from conftest import ROOT
from torch import nn


@pytest.mark.parametrize(
    "arguments",
    [
        ("op", "--shapes", "12"),
        ("op", "--shapes", "axb"),
        ("op", "--threads", 0),
        ("op", "--seconds", 0),
    ],
)
def test_what_bench_refuses(complaint, arguments):
    assert f"argument {arguments[1]}: got" in complaint(bench.main, *arguments)


@pytest.mark.parametrize("value", ["0", "1"])
def test_huge_pages_are_told_beside_the_figures(monkeypatch, value):
    """They are torch's, for eager operators too: the op asks for none of its own."""
    monkeypatch.setenv("THP_MEM_ALLOC_ENABLE", value)
    assert ("huge pages" in bench.machine("cpu")) == (value == "1")
    assert not any("madvise" in path.read_text() for path in ROOT.glob("csrc/*/*"))


def test_the_op_is_checked_and_timed(monkeypatch, capsys):
    """With an uncompiled stand-in for torch.compile, which takes half a minute."""
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    arguments = ["--shapes", "32x8", "--dtypes", "float32", "--threads", "1"]
    bench.main(["op", *arguments, "--seconds", "0.01"])
    said = capsys.readouterr().out
    for name in ("forward and backward", "clone", "op", "eager", "compiled", "32x8"):
        assert name in said

    def wrong(mu, logvar, seed):
        z, kl = bench.reparam.reference(mu, logvar, seed)
        return z, kl + 0.01

    monkeypatch.setattr(bench.reparam, "reparameterize_kl", wrong)
    with pytest.raises(AssertionError):
        bench.main(["op", *arguments])


def test_the_kernels_of_a_step_are_timed(capsys):
    bench.main(["step", "--rounds", "1"])
    said = capsys.readouterr().out
    for name in ("autoencoder", "prior", "torch's", "channels innermost", "Winograd's", "both"):
        assert name in said


def test_kernels_are_timed_one_by_one():
    body = nn.Sequential(nn.GroupNorm(2, 64), nn.SiLU(), nn.Conv2d(64, 64, 3, padding=1))
    networks = bench.step_networks(nn.Sequential(body)).values()
    fused = [type(network[0]) is not nn.Sequential for network in networks]
    winograd = [type(network[0][2]) is not nn.Conv2d for network in networks]
    built = accelerate.available
    assert fused == [False, False, False, built]
    if torch.backends.mkl.is_available():
        assert winograd == [False, False, built, built]
