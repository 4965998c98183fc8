"""reparam.py, with the extension or without: known answers, values, gradients, errors."""
import importlib.util
import math
import sys
import warnings

import reparam

import numpy
import pytest
import torch
from torch.distributions import Normal
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

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
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # numpy warns of an overflow
        same = reparam.derive_seed(numpy.int64(-3), numpy.int64(7), 2)
    assert same == reparam.derive_seed(-3, 7, 2)
    wrong = {"seed": (0.5, 1, 2), "step": (0, None, 2), "purpose": (0, 1, "a")}
    for name, arguments in wrong.items():
        with pytest.raises(TypeError, match=f"{name}: got"):
            reparam.derive_seed(*arguments)


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
    words = (torch.arange(4096) << 20) + 2**19
    points = torch.stack(reparam.direction(words, torch.float64), -1)
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
    ("mu", [[1.0]], TypeError, "got list, wanted a tensor"),
    ("logvar", 0.0, TypeError, "got float, wanted a tensor"),
    ("seed", None, TypeError, "got NoneType, wanted an int"),
    ("seed", numpy.array(1), TypeError, "got numpy.ndarray, wanted an int"),
    ("seed", True, TypeError, "got bool, wanted an int"),
    ("seed", 2**63, ValueError, r"got 9223372036854775808, wanted -2\^63 to 2\^63 - 1"),
    ("row_offset", 1.5, TypeError, "got float, wanted an int"),
    ("row_offset", -1, ValueError, "got -1, wanted 0 to"),
    ("row_offset", 2**63 - 2, ValueError, "got 9223372036854775806, wanted 0 to"),
    ("mu", torch.zeros(3), ValueError, r"got shape \(3,\), wanted two dimensions \(B, D\)"),
    ("mu", torch.zeros(2, 4).int(), TypeError, "got torch.int32, wanted one of torch.float32"),
    ("logvar", torch.zeros(2, 5), ValueError, r"got shape \(2, 5\), wanted mu's \(2, 4\)"),
    ("logvar", torch.zeros(2, 4).int(), TypeError, "got torch.int32, wanted one of"),
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
    if grad and isinstance(arguments["logvar"], torch.Tensor) and name != "logvar":
        arguments["logvar"] = arguments["logvar"].clone().requires_grad_()
    with pytest.raises(error, match=f"{name}: {message}"):
        reparam.reparameterize_kl(**arguments)


def test_an_int_is_a_seed_and_the_kl_can_be_left_out():
    mu, logvar, seed = inputs(3, 9)
    z, _ = reparam.reparameterize_kl(mu, logvar, seed, 2)
    assert torch.equal(reparam.reparameterize_kl(mu, logvar, -5, 2)[0], z)
    assert torch.equal(reparam.reparameterize(mu, logvar, -5, 2), z)
    mu.requires_grad_()
    logvar.requires_grad_()
    gradients = []
    for function in (reparam.reparameterize, lambda *x: reparam.reparameterize_kl(*x)[0]):
        gradients.append(torch.autograd.grad(function(mu, logvar, 4).sum(), (mu, logvar)))
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("dtypes,wanted", [
    ((torch.bfloat16, torch.float32), torch.float32),  # as autocast gives them
    ((torch.float64, torch.float16), torch.float64),
    ((torch.bfloat16, torch.float16), torch.float32),
])
def test_of_two_dtypes_the_wider_is_taken(dtypes, wanted):
    mu, logvar, seed = inputs(3, 9)
    mu = mu.to(dtypes[0]).requires_grad_()
    logvar = logvar.to(dtypes[1]).requires_grad_()
    z, kl = reparam.reparameterize_kl(mu, logvar, seed)
    assert z.dtype == wanted
    assert torch.equal(z, reparam.reparameterize(mu.to(wanted), logvar.to(wanted), seed))
    (z.sum() + kl.sum()).backward()
    assert (mu.grad.dtype, logvar.grad.dtype) == dtypes


def test_the_kl_keeps_its_digits_near_collapse_and_in_long_rows():
    for logvar in (1e-3, -1e-4, 1e-6, 0.3, -0.69, 0.7, -3.0):
        v = torch.full((1, 262144), logvar)
        m = torch.zeros_like(v)
        _, kl = reparam.reparameterize_kl(m, v, 1)
        exact = torch.tensor(logvar).double()  # float32's logvar
        wanted = (torch.expm1(exact) - exact) / 2 * v.numel()
        # what is left of float32's expm1 in the reference, or of the extension's polynomial
        tolerance = 2e-6 if reparam.extension else 2e-6 + 1.2e-7 / abs(logvar)
        assert kl.item() == pytest.approx(wanted.item(), rel=tolerance)
        assert kl.item() >= 0


class Count(TorchDispatchMode):
    """Counts torch's operators."""

    def __init__(self):
        super().__init__()
        self.calls = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.calls += 1
        return function(*args, **(kwargs or {}))


def test_the_reference_takes_as_many_operators_for_any_shape():
    """A loop over rows or blocks would be slow, and gives the same values."""
    calls = []
    for size in (16, 256):
        zeros = torch.zeros(size, size)
        with Count() as count:
            reparam.reference(zeros, zeros, torch.tensor(3))
        calls.append(count.calls)
    assert calls[0] == calls[1]


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_a_traced_model_can_be_saved_and_draws_the_same(tmp_path):
    mu = torch.randn(3, 5, requires_grad=True)
    logvar = torch.randn(3, 5, requires_grad=True)

    def posterior(mu, logvar):
        return reparam.reparameterize_kl(2 * mu, logvar, 3)

    torch.jit.save(torch.jit.trace(posterior, (mu, logvar)), str(tmp_path / "traced.pt"))
    traced = torch.jit.load(str(tmp_path / "traced.pt"))
    for got, wanted in zip(traced(mu, logvar), posterior(mu, logvar), strict=True):
        torch.testing.assert_close(got, wanted)
        of_trace = torch.autograd.grad(got.sum(), (mu, logvar), retain_graph=True)
        torch.testing.assert_close(
            of_trace, torch.autograd.grad(wanted.sum(), (mu, logvar), retain_graph=True)
        )


def test_a_long_row_is_the_noise_of_its_columns():
    """Of three segments and a rest, a row alone and with others."""
    mu, logvar, seed = inputs(3, 3 * 8192 + 77)
    z, kl = reparam.reparameterize_kl(mu, logvar, seed, 5)
    wanted, wanted_kl = reparam.reference(mu, logvar, seed, 5)
    torch.testing.assert_close(z, wanted, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(kl, wanted_kl)
    alone, alone_kl = reparam.reparameterize_kl(mu[1:2], logvar[1:2], seed, 6)
    assert torch.equal(alone, z[1:2]) and torch.equal(alone_kl, kl[1:2])


@pytest.fixture
def posterior() -> reparam.DiagonalGaussian:
    """Of two halves of an encoder's output, float64."""
    generator = torch.Generator().manual_seed(0)
    output = torch.randn(3, 8, 5, 2, generator=generator, dtype=torch.float64)
    return reparam.DiagonalGaussian(*output.requires_grad_().chunk(2, 1))


def test_a_diagonal_gaussian_is_torchs(posterior):
    wanted = Normal(posterior.mu, (posterior.logvar / 2).exp())
    assert torch.equal(posterior.mode(), wanted.mode)
    torch.testing.assert_close(posterior.stddev, wanted.stddev)
    kl = torch.distributions.kl_divergence(wanted, Normal(0.0, 1.0))
    torch.testing.assert_close(posterior.kl("none"), kl)
    torch.testing.assert_close(posterior.kl(), kl.sum((1, 2, 3)))
    z, fused = posterior.rsample_kl(3)
    torch.testing.assert_close(fused, kl.sum((1, 2, 3)))
    assert z.shape == posterior.mu.shape and torch.equal(z, posterior.rsample(3))
    torch.testing.assert_close(posterior.log_prob(z), wanted.log_prob(z).sum((1, 2, 3)))
    some = torch.stack([z, 2 * z])
    torch.testing.assert_close(posterior.log_prob(some), wanted.log_prob(some).sum((2, 3, 4)))
    for bad in (z[:1], z.flatten(1), z[:, :1]):
        with pytest.raises(ValueError, match="z: got shape .*, wanted mu's "):
            posterior.log_prob(bad)
    with pytest.raises(ValueError, match="reduction: got 'mean', wanted 'sum' or 'none'"):
        posterior.kl("mean")
    for mu, error in ((torch.zeros(3), ValueError), ([1.0], TypeError)):
        with pytest.raises(error, match="mu: got "):
            reparam.DiagonalGaussian(mu, torch.zeros(3))


def test_a_diagonal_gaussian_has_gradients_and_copies_nothing(posterior):
    z, kl = posterior.rsample_kl(3)
    base = posterior.mu._base
    gradients = [torch.autograd.grad(z.sum() + kl.sum(), base)[0]]
    flat = [x.flatten(1) for x in (posterior.mu, posterior.logvar)]
    assert all(x.data_ptr() == y.data_ptr() for x, y in zip(flat, base.chunk(2, 1), strict=True))
    z, _ = reparam.reference(*flat, torch.tensor(3))
    gradients.append(torch.autograd.grad(z.sum() + posterior.kl().sum(), base)[0])
    torch.testing.assert_close(*gradients)


def test_the_module_never_repeats_noise_and_goes_on_from_a_checkpoint():
    mu, logvar, _ = inputs(2, 8)
    module = reparam.Reparameterize(seed=3)
    samples = [module(mu, logvar)[0] for _ in range(4)]
    other = reparam.Reparameterize(seed=4)
    samples += [other(mu, logvar)[0] for _ in range(4)]
    assert len({z.numpy().tobytes() for z in samples}) == 8
    grid = module(mu.view(2, 2, 4), logvar.view(2, 2, 4))[0]
    assert grid.shape == (2, 2, 4)
    later = reparam.Reparameterize(seed=3)
    later.load_state_dict(module.state_dict())
    assert torch.equal(later(mu, logvar)[0], module(mu, logvar)[0])
    for wrong in (1.0, "a", None, torch.tensor(1)):
        with pytest.raises(TypeError, match="seed: got .*, wanted an int"):
            reparam.Reparameterize(wrong)
    with pytest.raises(ValueError, match="seed: got 1180591620717411303424, wanted"):
        reparam.Reparameterize(2**70)


def test_default_dtypes_change_nothing():
    wanted = reparam.normals(2, 5, 7)
    torch.set_default_dtype(torch.float64)
    try:
        got = reparam.normals(2, 5, 7)
    finally:
        torch.set_default_dtype(torch.float32)
    assert got.dtype == torch.float32 and torch.equal(got, wanted)


@pytest.mark.parametrize("end", [torch.sin, torch.Tensor.contiguous])
def test_checkpointed_blocks_draw_the_same_noise(end):
    """Computed anew by the op's own backward, where the op is the block's end."""
    mu, logvar, _ = inputs(4, 6, torch.float64)
    mu.requires_grad_()

    def block(mu: torch.Tensor) -> torch.Tensor:
        return end(reparam.reparameterize(mu * 2, logvar * mu, 5))

    recomputed = checkpoint(block, mu, use_reentrant=False).sum()
    gradients = [torch.autograd.grad(loss, mu) for loss in (recomputed, block(mu).sum())]
    torch.testing.assert_close(*gradients, rtol=0, atol=0)


def test_under_autocast():
    layer = torch.nn.Linear(6, 8)
    with torch.autocast("cpu", torch.bfloat16):
        mu = layer(torch.ones(3, 6))
        logvar = mu.float().clamp(-1, 1)  # as many VAEs do
        z, kl = reparam.reparameterize_kl(mu, logvar, 5)
    assert mu.dtype == torch.bfloat16 and z.dtype == kl.dtype == torch.float32
    (z.sum() + kl.sum()).backward()
    assert layer.weight.grad.isfinite().all()


class Noise(torch.utils.data.Dataset):
    """Normals of its own for each item."""

    def __len__(self) -> int:
        return 6

    def __getitem__(self, i: int) -> torch.Tensor:
        return reparam.normals(1, 300, 3, i)[0]


@pytest.mark.filterwarnings("ignore")  # of forks and threads
def test_workers_of_a_data_loader_draw_the_same():
    wanted = reparam.normals(6, 300, 3)
    loader = torch.utils.data.DataLoader(Noise(), batch_size=2, num_workers=2)
    assert torch.equal(torch.cat(list(loader)), wanted)


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
