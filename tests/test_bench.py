from pegasus import bench

import pytest
import torch
from conftest import ROOT


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
