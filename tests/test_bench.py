from pegasus import bench

import pytest
import torch


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
