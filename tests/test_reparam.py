"""reparam.py, with the extension or without: known answers, values, gradients, errors."""
import importlib.util
import math
import sys

import reparam

import pytest
import torch

KNOWN = [  # Random123's test vectors: counter, key, block
    (
        [0, 0, 0, 0],
        [0, 0],
        [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8],
    ),
    (
        [0xFFFFFFFF] * 4,
        [0xFFFFFFFF] * 2,
        [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD],
    ),
    (
        [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
        [0xA4093822, 0x299F31D0],
        [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
    ),
]


def inputs(rows: int, columns: int, dtype: torch.dtype = torch.float32) -> tuple:
    """mu, logvar, seed."""
    generator = torch.Generator().manual_seed(rows * 1000 + columns)
    mu = torch.randn(rows, columns, generator=generator).to(dtype)
    logvar = torch.randn(rows, columns, generator=generator).to(dtype)
    return mu, logvar, torch.tensor(-5)


def kl_divergence(mu, logvar, mean, scale) -> torch.Tensor:
    """torch's, from N(mu, exp(logvar)) to N(mean, scale^2), summed per row."""
    posterior = torch.distributions.Normal(mu, (logvar / 2).exp())
    prior = torch.distributions.Normal(mean, scale)
    return torch.distributions.kl_divergence(posterior, prior).sum(1)


@pytest.mark.parametrize("counter,key,block", KNOWN)
def test_philox_gives_the_known_answers(counter, key, block):
    assert reparam.philox(counter, key) == block
    tensors = [torch.tensor(word) for word in counter]
    assert [int(word) for word in reparam.philox(tensors, key)] == block


def test_the_layout_of_the_counter():
    seed = (0x299F31D0 << 32) | 0xA4093822
    row = (0x03707344 << 32) | 0x13198A2E
    words = reparam.words(2, 3, torch.tensor(seed), row)
    assert words.shape == (2, 3, 4)
    for r in range(2):
        for g in range(3):
            counter = [g, 0, (row + r) & reparam.MASK, (row + r) >> 32]
            block = reparam.philox(counter, [0xA4093822, 0x299F31D0])
            assert words[r, g].tolist() == block


def test_a_negative_seed_is_its_64_bits():
    block = reparam.philox([0, 0, 0, 0], [0xFFFFFFFB, 0xFFFFFFFF])
    assert reparam.words(1, 1, torch.tensor(-5)).flatten().tolist() == block


def test_derived_seeds_differ_and_fit():
    seeds = {
        reparam.derive_seed(run, step, purpose)
        for run in range(5)
        for step in range(50)
        for purpose in range(4)
    }
    assert len(seeds) == 1000
    assert all(-(2**63) <= seed < 2**63 for seed in seeds)
    assert min(seeds) < 0 < max(seeds)
    assert reparam.derive_seed(0, 1, 0) != reparam.derive_seed(1, 0, 0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_extreme_words(dtype):
    high = 2**32 - 1
    words = torch.tensor([[0, 0, 1, 2**31], [high, 2**30, high, high]])
    eps = reparam.normals_from_words(words, dtype).to(torch.float64)
    largest = math.sqrt(64 * math.log(2))  # of u = 2^-32: 6.66
    second = math.sqrt(62 * math.log(2))
    wanted = torch.tensor([[largest, 0, -second, 0], [0, 0, 0, 0]], dtype=torch.float64)
    torch.testing.assert_close(eps, wanted, rtol=0, atol=2e-6)


def test_even_words_go_evenly_around_the_circle():
    points = reparam.direction((torch.arange(4096) << 20) + 2**19, torch.float64)
    radii = points.norm(dim=1)
    torch.testing.assert_close(radii, torch.ones_like(radii), rtol=0, atol=1e-12)
    steps = torch.atan2(points[:, 1], points[:, 0]).sort().values.diff()
    torch.testing.assert_close(steps, torch.full_like(steps, math.pi / 2048))


def test_the_formulas():
    mu, logvar, seed = inputs(3, 5, torch.float64)
    z, kl = reparam.reparameterize_kl(mu, logvar, seed)
    words = reparam.words(3, 2, seed)
    eps = reparam.normals_from_words(words, torch.float64).flatten(1)[:, :5]
    torch.testing.assert_close(z, mu + torch.exp(logvar / 2) * eps)
    torch.testing.assert_close(kl, kl_divergence(mu, logvar, 0.0, 1.0))


def test_a_diagonal_prior_by_change_of_variables():
    mu, logvar, seed = inputs(4, 6, torch.float64)
    mean = torch.randn(6, dtype=torch.float64)
    scale = torch.rand(6, dtype=torch.float64) + 0.5
    scaled = (mu - mean) / scale
    z, kl = reparam.reparameterize_kl(scaled, logvar - 2 * scale.log(), seed)
    torch.testing.assert_close(kl, kl_divergence(mu, logvar, mean, scale))
    wanted, _ = reparam.reparameterize_kl(mu, logvar, seed)
    torch.testing.assert_close(mean + scale * z, wanted)


@pytest.mark.parametrize("dtype", reparam.DTYPES)
@pytest.mark.parametrize("shape", [(0, 8), (3, 0), (0, 0), (1, 1), (5, 7), (2, 130)])
def test_shapes_and_dtypes(shape, dtype):
    mu, logvar, seed = inputs(*shape, dtype)
    mu.requires_grad_()
    z, kl = reparam.reparameterize_kl(mu, logvar, seed)
    assert z.shape == shape and z.dtype == dtype and z.requires_grad
    assert kl.shape == shape[:1]
    assert kl.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    (z.float().sum() + kl.sum()).backward()
    assert mu.grad.shape == shape and mu.grad.dtype == dtype


@pytest.mark.parametrize("start", [0, 2**32 - 3, 2**40])
def test_rows_computed_apart_equal_the_whole(start):
    mu, logvar, seed = inputs(8, 33)
    z, kl = reparam.reparameterize_kl(mu, logvar, seed, start)
    parts = []
    for a, b in ((0, 3), (3, 4), (4, 8)):
        parts.append(reparam.reparameterize_kl(mu[a:b], logvar[a:b], seed, start + a))
    assert torch.equal(z, torch.cat([part[0] for part in parts]))
    assert torch.equal(kl, torch.cat([part[1] for part in parts]))


def test_gradcheck():
    mu, logvar, seed = inputs(3, 7, torch.float64)
    mu.requires_grad_()
    logvar.requires_grad_()

    def function(mu, logvar):
        return reparam.reparameterize_kl(mu, logvar, seed, 2)

    assert torch.autograd.gradcheck(function, (mu, logvar))


def meta(*shape: int) -> torch.Tensor:
    return torch.zeros(*shape, device="meta")


@pytest.mark.parametrize("name,value,error,message", [
    ("mu", torch.zeros(3), ValueError, r"got shape \(3,\), wanted two dimensions \(B, D\)"),
    ("mu", torch.zeros(2, 4).int(), TypeError, "got torch.int32, wanted one of torch.float32"),
    ("logvar", torch.zeros(2, 5), ValueError, r"got shape \(2, 5\), wanted mu's \(2, 4\)"),
    ("logvar", torch.zeros(2, 4).double(), ValueError,
     "got dtype torch.float64, wanted mu's torch.float32"),
    ("logvar", meta(2, 4), ValueError, "got device meta, wanted mu's cpu"),
    ("seed", torch.tensor(1.0), ValueError,
     "got torch.float32 of 1 elements on cpu, wanted torch.int64 of"),
    ("seed", torch.tensor([1, 2]), ValueError, "got torch.int64 of 2 elements on cpu"),
    ("seed", meta(1).long(), ValueError, "got torch.int64 of 1 elements on meta"),
])
@pytest.mark.parametrize("grad", [False, True])
def test_errors_name_the_argument(name, value, error, message, grad):
    arguments = {
        "mu": torch.zeros(2, 4),
        "logvar": torch.zeros(2, 4),
        "seed": torch.tensor(1),
        name: value,
    }
    if grad:
        arguments["logvar"] = arguments["logvar"].clone().requires_grad_()
    with pytest.raises(error, match=f"{name}: {message}"):
        reparam.reparameterize_kl(**arguments)


@pytest.mark.parametrize("setting,module,reason,times", [
    ("1", None, "the extension is not built", 1),
    ("0", None, "", 0),
    ("1", "raise ImportError('no libcudart.so')", "can't be loaded (no libcudart.so)", 1),
])
def test_a_missing_extension_is_said_once(
    setting, module, reason, times, tmp_path, monkeypatch, capsys
):
    monkeypatch.setenv("PEGASUS_EXTENSION", setting)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "pegasus_op", raising=False)
    if module:
        (tmp_path / "pegasus_op.py").write_text(module)
    else:  # importing it fails as if it were not there
        monkeypatch.setitem(sys.modules, "pegasus_op", None)
    spec = importlib.util.spec_from_file_location("another", reparam.__file__)
    another = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(another)
    assert capsys.readouterr().err == ""
    for _ in range(2):
        another.reparameterize_kl(torch.zeros(2, 2), torch.zeros(2, 2), torch.tensor(1))
    text = capsys.readouterr().err
    assert text.count("build_ext --inplace") == text.count("\n") == times
    assert reason in text
