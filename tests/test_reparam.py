"""reparam.py's contract, with the extension or without: known answers, values, gradients, errors."""
import importlib.util
import math
import sys

import reparam

import pytest
import torch

KNOWN = [  # Random123's test vectors: counter, key, block
    ([0, 0, 0, 0], [0, 0], [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
    ([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
    ([0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344], [0xA4093822, 0x299F31D0],
     [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1]),
]


def inputs(rows: int, columns: int, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(rows * 1000 + columns)
    mu, logvar = (torch.randn(rows, columns, generator=generator).to(dtype) for _ in range(2))
    return mu, logvar, torch.tensor(-5)


@pytest.mark.parametrize(("counter", "key", "block"), KNOWN)
def test_philox_gives_the_known_answers(counter, key, block):
    assert reparam.philox(counter, key) == block
    assert [int(w) for w in reparam.philox([torch.tensor(c) for c in counter], key)] == block


def test_the_layout_of_the_counter():
    seed, row = (0x299F31D0 << 32) | 0xA4093822, (0x03707344 << 32) | 0x13198A2E
    words = reparam.words(2, 3, torch.tensor(seed), row)
    assert words.shape == (2, 3, 4)
    for r in range(2):
        for g in range(3):
            counter = [g, 0, (row + r) & reparam.MASK, (row + r) >> 32]
            assert words[r, g].tolist() == reparam.philox(counter, [0xA4093822, 0x299F31D0])


def test_a_negative_seed_is_its_64_bits():
    block = reparam.philox([0, 0, 0, 0], [0xFFFFFFFB, 0xFFFFFFFF])
    assert reparam.words(1, 1, torch.tensor(-5)).flatten().tolist() == block


def test_derived_seeds_differ_and_fit():
    seeds = {reparam.derive_seed(run, step, purpose) for run in range(5) for step in range(50) for purpose in range(4)}
    assert len(seeds) == 1000
    assert all(-(2**63) <= s < 2**63 for s in seeds) and min(seeds) < 0 < max(seeds)
    assert reparam.derive_seed(0, 1, 0) != reparam.derive_seed(1, 0, 0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_extreme_words(dtype):
    words = torch.tensor([[0, 0, 1, 2**31], [2**32 - 1, 2**30, 2**32 - 1, 2**32 - 1]])
    eps = reparam.normals_from_words(words, dtype).to(torch.float64)
    largest = math.sqrt(64 * math.log(2))  # of u = 2^-32: 6.66
    second = math.sqrt(62 * math.log(2))
    wanted = torch.tensor([[largest, 0, -second, 0], [0, 0, 0, 0]], dtype=torch.float64)
    torch.testing.assert_close(eps, wanted, rtol=0, atol=2e-6)


def test_even_words_go_evenly_around_the_circle():
    points = reparam.direction((torch.arange(4096) << 20) + 2**19, torch.float64)
    angles = torch.atan2(points[:, 1], points[:, 0]).sort().values
    torch.testing.assert_close(points.norm(dim=1), torch.ones(4096, dtype=torch.float64), rtol=0, atol=1e-12)
    torch.testing.assert_close(angles.diff(), torch.full((4095,), math.pi / 2048, dtype=torch.float64))


def test_the_formulas():
    mu, logvar, seed = inputs(3, 5, torch.float64)
    z, kl = reparam.reparameterize_kl(mu, logvar, seed)
    eps = reparam.normals_from_words(reparam.words(3, 2, seed), torch.float64).flatten(1)[:, :5]
    torch.testing.assert_close(z, mu + torch.exp(logvar / 2) * eps)
    normal = torch.distributions.Normal
    wanted = torch.distributions.kl_divergence(normal(mu, (logvar / 2).exp()), normal(0.0, 1.0)).sum(1)
    torch.testing.assert_close(kl, wanted)


def test_a_diagonal_prior_by_change_of_variables():
    mu, logvar, seed = inputs(4, 6, torch.float64)
    mean, scale = torch.randn(6, dtype=torch.float64), torch.rand(6, dtype=torch.float64) + 0.5
    z, kl = reparam.reparameterize_kl((mu - mean) / scale, logvar - 2 * scale.log(), seed)
    normal = torch.distributions.Normal
    torch.testing.assert_close(
        kl, torch.distributions.kl_divergence(normal(mu, (logvar / 2).exp()), normal(mean, scale)).sum(1))
    torch.testing.assert_close(mean + scale * z, reparam.reparameterize_kl(mu, logvar, seed)[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(0, 8), (3, 0), (0, 0), (1, 1), (5, 7), (2, 130)])
def test_shapes_and_dtypes(shape, dtype):
    mu, logvar, seed = inputs(*shape, dtype)
    mu.requires_grad_()
    z, kl = reparam.reparameterize_kl(mu, logvar, seed)
    assert z.shape == shape and z.dtype == dtype and z.requires_grad
    assert kl.shape == shape[:1] and kl.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    (z.float().sum() + kl.sum()).backward()
    assert mu.grad.shape == shape and mu.grad.dtype == dtype


@pytest.mark.parametrize("start", [0, 2**32 - 3, 2**40])
def test_rows_computed_apart_equal_the_whole(start):
    mu, logvar, seed = inputs(8, 33)
    z, kl = reparam.reparameterize_kl(mu, logvar, seed, start)
    parts = [reparam.reparameterize_kl(mu[a:b], logvar[a:b], seed, start + a) for a, b in ((0, 3), (3, 4), (4, 8))]
    assert torch.equal(z, torch.cat([p[0] for p in parts]))
    assert torch.equal(kl, torch.cat([p[1] for p in parts]))


def test_gradcheck():
    mu, logvar, seed = inputs(3, 7, torch.float64)
    assert torch.autograd.gradcheck(lambda m, v: reparam.reparameterize_kl(m, v, seed, 2),
                                    (mu.requires_grad_(), logvar.requires_grad_()))


@pytest.mark.parametrize(("change", "error", "message"), [
    (dict(mu=torch.zeros(3)), ValueError, r"mu: got shape \(3,\), wanted two dimensions \(B, D\)"),
    (dict(mu=torch.zeros(2, 4, dtype=torch.int32)), TypeError, "mu: got torch.int32, wanted one of torch.float32"),
    (dict(logvar=torch.zeros(2, 5)), ValueError, r"logvar: got shape \(2, 5\), wanted mu's \(2, 4\)"),
    (dict(logvar=torch.zeros(2, 4).double()), ValueError, "logvar: got dtype torch.float64, wanted mu's torch.float32"),
    (dict(logvar=torch.zeros(2, 4, device="meta")), ValueError, "logvar: got device meta, wanted mu's cpu"),
    (dict(seed=torch.tensor(1.0)), ValueError, "seed: got torch.float32 of 1 elements on cpu, wanted torch.int64 of"),
    (dict(seed=torch.tensor([1, 2])), ValueError, "seed: got torch.int64 of 2 elements on cpu"),
])
@pytest.mark.parametrize("grad", [False, True])
def test_errors_name_the_argument(change, error, message, grad):
    arguments = dict(mu=torch.zeros(2, 4), logvar=torch.zeros(2, 4), seed=torch.tensor(1)) | change
    if grad and arguments["logvar"].is_floating_point():
        arguments["logvar"] = arguments["logvar"].clone().requires_grad_()
    with pytest.raises(error, match=message):
        reparam.reparameterize_kl(**arguments)


@pytest.mark.parametrize(("setting", "module", "reason", "said"), [
    ("1", None, "the extension is not built", 1), ("0", None, "", 0),
    ("1", "raise ImportError('libcudart.so.13: gone')", "can't be loaded (libcudart.so.13: gone)", 1)])
def test_a_missing_extension_is_said_once(setting, module, reason, said, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("PEGASUS_EXTENSION", setting)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "pegasus_op", raising=False)
    if module:
        (tmp_path / "pegasus_op.py").write_text(module)
    else:
        monkeypatch.setitem(sys.modules, "pegasus_op", None)  # an import of it fails as if it were not there
    spec = importlib.util.spec_from_file_location("another", reparam.__file__)
    another = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(another)
    assert capsys.readouterr().err == ""
    for _ in range(2):
        another.reparameterize_kl(torch.zeros(2, 2), torch.zeros(2, 2), torch.tensor(1))
    told = capsys.readouterr().err
    assert told.count("build_ext --inplace") == told.count("\n") == said
    assert reason in told
