"""Faster layers against torch's: values, gradients, weights; bits that depend on nothing else."""
import copy
from concurrent.futures import ThreadPoolExecutor

import vae
from pegasus.models import classifier
from pegasus.models.flow_prior import FlowPrior, ModulatedNorm, Velocity
from pegasus.training import accelerate as acceleration
from pegasus.training.accelerate import (
    FastModulatedNorm,
    NormSiLUSequential,
    WinogradConv2d,
    accelerate,
    silu_group_norm,
)

import pytest
import torch
from conftest import IMAGE_SHAPE
from torch import Tensor, nn

built = pytest.mark.skipif(not acceleration.available, reason="pegasus_step is not built")
any_batch = pytest.mark.skipif(
    not torch.backends.mkl.is_available(), reason="products may depend on their size"
)
STEPS = {torch.float32: 2e-5, torch.bfloat16: 1e-2}


def make_images(channels: int, size: int, n: int = 3) -> Tensor:
    """Return values whose mean is far from zero, as after a convolution's bias.

    It is another in each channel.
    """
    generator = torch.Generator().manual_seed(channels + size)
    x = torch.randn(n, channels, size, size + 1, generator=generator)
    return x + 5 * torch.randn(channels, 1, 1, generator=generator)


def affine(*shape: int) -> list[Tensor]:
    """Return a scale and a shift."""
    generator = torch.Generator().manual_seed(shape[-1])
    return [torch.randn(shape, generator=generator) for _ in range(2)]


def values_and_gradients(
    function: object, inputs: list[Tensor], weights: list[Tensor], dy: Tensor
) -> list[Tensor]:
    """Return a function's output, and gradients of inputs and weights for dy."""
    y = function(*inputs)
    return [y, *torch.autograd.grad(y, [*inputs, *weights], dy.to(y.dtype))]


def doubles(tensors: list[Tensor]) -> list[Tensor]:
    return [tensor.detach().double().requires_grad_() for tensor in tensors]


def assert_near(got: list[Tensor], wanted: list[Tensor], step: float) -> None:
    """Compare with float64, relative to each tensor's largest value."""
    for a, b in zip(got, wanted, strict=True):
        largest = b.abs().max().item()
        torch.testing.assert_close(a.double(), b, rtol=step, atol=step * largest)


# ---- group norm and SiLU ----


def formula(x: Tensor, groups: int, weight: Tensor, bias: Tensor) -> Tensor:
    parts = x.unflatten(1, (groups, -1))
    mean = parts.mean((2, 3, 4), keepdim=True)
    variance = parts.var((2, 3, 4), unbiased=False, keepdim=True)
    u = ((parts - mean) / (variance + 1e-5).sqrt()).flatten(1, 2)
    u = u * weight[..., None, None] + bias[..., None, None]
    return u * u.sigmoid()


@built
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [(), (3,)])
@pytest.mark.parametrize(
    ("channels", "size", "groups"), [(16, 1, 2), (64, 5, 8), (96, 4, 8), (160, 4, 8)]
)
def test_silu_behind_a_group_norm(channels, size, groups, rows, dtype):
    """Images share a scale and a shift, or each has its own."""
    x = make_images(channels, size).to(dtype)
    inputs = [x, *affine(*rows, channels)]
    inputs = [tensor.requires_grad_() for tensor in inputs]
    dy = torch.randn(x.shape).to(dtype)
    got = values_and_gradients(
        lambda x, weight, bias: silu_group_norm(x, groups, weight, bias, 1e-5), inputs, [], dy
    )
    wanted = values_and_gradients(
        lambda x, weight, bias: formula(x, groups, weight, bias), doubles(inputs), [], dy
    )
    assert [tensor.dtype for tensor in got] == [dtype, dtype, torch.float32, torch.float32]
    assert_near(got, wanted, STEPS[dtype])


@built
def test_normalized_images_do_not_depend_on_those_beside_them():
    x = make_images(64, 4, 9).bfloat16()
    weight, bias = affine(9, 64)
    whole = silu_group_norm(x, 8, weight, bias, 1e-5)
    part = silu_group_norm(x[2:5], 8, weight[2:5], bias[2:5], 1e-5)
    assert whole[2:5].equal(part)
    assert whole.is_contiguous(memory_format=torch.channels_last)


@built
@pytest.mark.parametrize(
    ("channels", "dtype"),
    [(32, torch.float32), (32, torch.bfloat16), (24, torch.float32), (32, torch.float64)],
)
def test_a_sequence_computes_what_nn_sequential_does(channels, dtype):
    """Also with layers in another order, and where 24 channels and float64 are torch's."""
    torch.manual_seed(0)
    layers = [nn.GroupNorm(8, channels), nn.SiLU(), nn.Conv2d(channels, 16, 1), nn.SiLU()]
    layers += [nn.GroupNorm(4, 16), nn.SiLU(), nn.GroupNorm(2, 16)]
    nn.init.normal_(layers[0].weight)
    plain = nn.Sequential(*layers).to(dtype)
    x = make_images(channels, 4).to(dtype)
    step = 1e-4 if dtype == torch.float32 else 2e-2
    got = NormSiLUSequential(*plain)(x)
    torch.testing.assert_close(got, plain(x), rtol=step, atol=step)
    assert got.dtype == dtype


@built
@pytest.mark.parametrize("channels", [32, 24])
def test_a_fast_modulated_norm_is_the_modulated_norm(channels):
    x = make_images(channels, 4)
    inputs = [x, *affine(3, channels)]
    inputs = [tensor.requires_grad_() for tensor in inputs]
    dy = torch.randn(x.shape)
    got = values_and_gradients(FastModulatedNorm(), inputs, [], dy)
    wanted = values_and_gradients(ModulatedNorm(), doubles(inputs), [], dy)
    assert_near(got, wanted, 2e-5)


# ---- convolutions ----


def copied(layer: nn.Conv2d) -> nn.Conv2d:
    """Return torch's convolution with the weights of another one."""
    sizes = (layer.in_channels, layer.out_channels)
    plain = nn.Conv2d(*sizes, 3, padding=1, bias=layer.bias is not None)
    plain.load_state_dict(layer.state_dict())
    return plain


@built
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(
    ("n", "before", "after", "rows", "columns"),
    [
        (3, 16, 48, 4, 12),
        (1, 64, 64, 16, 16),
        (9, 96, 160, 4, 4),
        (2, 16, 16, 6, 4),  # torch's work
        (2, 12, 16, 4, 4),
    ],
)
def test_convolutions_in_tiles(n, before, after, rows, columns, bias, monkeypatch):
    """Values and gradients, block by block of two images at most."""
    two_images = 2 * 36 * rows * columns // 16 * max(before, after)
    monkeypatch.setattr(acceleration, "BLOCK", two_images)
    layer = WinogradConv2d(before, after, 3, padding=1, bias=bias)
    layer.to(memory_format=torch.channels_last)
    plain = copied(layer).double()
    x = torch.randn(n, before, rows, columns, requires_grad=True)
    dy = torch.randn(n, after, rows, columns)
    got = values_and_gradients(layer, [x], list(layer.parameters()), dy)
    wanted = values_and_gradients(plain, doubles([x]), list(plain.parameters()), dy)
    for a, b in zip(got, wanted, strict=True):
        assert (a - b).norm() < 1e-5 * b.norm()


@built
def test_convolutions_of_other_types_are_torchs():
    layer = WinogradConv2d(16, 16, 3, padding=1)
    x = torch.randn(2, 16, 4, 4)
    plain = copied(layer)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
        assert y.equal(plain(x))
    assert y.dtype == torch.bfloat16
    assert layer.double()(x.double()).equal(plain.double()(x.double()))


@built
def test_a_convolution_of_no_images():
    layer = WinogradConv2d(16, 16, 3, padding=1)
    assert layer(torch.zeros(0, 16, 4, 4)).shape == (0, 16, 4, 4)


@built
@any_batch
@pytest.mark.parametrize("size", [4, 16])
def test_a_convolution_of_an_image_does_not_depend_on_those_beside_it(size):
    layer = WinogradConv2d(64, 48, 3, padding=1)
    x = torch.randn(40, 64, size, size)
    assert layer(x)[7:8].equal(layer(x[7:8]))


@built
def test_threads_have_scratch_memory_of_their_own():
    layers = [WinogradConv2d(c, 32, 3, padding=1) for c in (16, 48)]
    inputs = [torch.randn(4, c, 8, 8) for c in (16, 48)]
    wanted = [layer(x) for layer, x in zip(layers, inputs, strict=True)]

    def often(number: int) -> bool:
        layer = layers[number]
        x = inputs[number]
        return all(layer(x).equal(wanted[number]) for _ in range(50))

    with ThreadPoolExecutor(2) as pool:
        assert all(pool.map(often, [0, 1]))


@built
def test_a_layer_is_the_same_in_other_modes():
    """What a thread keeps must not be of the mode in which it was first asked for."""
    layer = WinogradConv2d(16, 16, 3, padding=1)
    x = torch.randn(2, 16, 4, 4)
    wanted = copied(layer)(x)
    for mode in (torch.inference_mode, torch.no_grad, torch.inference_mode):
        with mode():
            torch.testing.assert_close(layer(x), wanted)
        layer(x).sum().backward()
    torch.set_default_dtype(torch.float64)
    try:
        torch.testing.assert_close(layer(x), wanted)
    finally:
        torch.set_default_dtype(torch.float32)


@built
def test_flushing_of_denormals_does_not_reach_products():
    """They are to be the same in every thread."""
    generator = torch.Generator().manual_seed(3)
    x = 1e-17 * torch.randn(8, 16, 8, 8, generator=generator)
    x = x.contiguous(memory_format=torch.channels_last)
    weight = 1e-20 * torch.randn(16, 16, 3, 3, generator=generator)
    weight = weight.contiguous(memory_format=torch.channels_last)
    outputs = []
    for flush in (False, True):
        y = torch.empty_like(x)
        torch.set_flush_denormal(flush)
        torch.ops.pegasus_step.winograd(x, weight, torch.zeros(0), y, 8)
        torch.set_flush_denormal(False)
        outputs.append(y)
    assert outputs[0].equal(outputs[1])


# ---- whole networks ----


def make_velocity() -> Velocity:
    torch.manual_seed(1)
    velocity = Velocity((8, 8, 8), 4)
    for p in velocity.parameters():  # some begin at zero
        if p.dim() > 1:
            nn.init.normal_(p, std=0.05)
    return velocity


def make_vae() -> vae.VAE:
    torch.manual_seed(1)
    return vae.VAE("conv", "gaussian", (8, 8, 8))


def run_velocity(velocity: nn.Module) -> Tensor:
    generator = torch.Generator().manual_seed(2)
    z = torch.randn(5, 512, generator=generator)
    t = torch.rand(5, generator=generator)
    return velocity(z, t, torch.tensor([0, 1, 2, 3, 4]))


def run_vae(model: nn.Module) -> Tensor:
    x = torch.rand(5, *IMAGE_SHAPE, generator=torch.Generator().manual_seed(2))
    return torch.stack(model(x, torch.tensor(7)))


NETWORKS = [(make_vae, run_vae), (make_velocity, run_velocity)]


@pytest.mark.parametrize(("make", "run"), NETWORKS)
def test_an_accelerated_network_keeps_its_weights(make, run):
    """The same parameters under the same names; twice is as good as once."""
    network = make()
    before = dict(network.named_parameters())
    keys = list(network.state_dict())
    state = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    for _ in range(2):
        accelerate(network)
        assert list(network.state_dict()) == keys
        after = dict(network.named_parameters())
        assert list(after) == list(before)
        assert all(after[name] is p for name, p in before.items())
        assert all(t.equal(state[name]) for name, t in network.state_dict().items())
    swapped = [layer for layer in network.modules() if type(layer) is NormSiLUSequential]
    assert bool(swapped) == acceleration.available
    make().load_state_dict(network.state_dict())


@pytest.mark.parametrize(("make", "run"), NETWORKS)
def test_an_accelerated_network_computes_what_the_plain_one_does(make, run):
    """Outputs and gradients, to rounding."""
    plain = make()
    fast = copy.deepcopy(plain)
    accelerate(fast)
    results = []
    for network in (plain, fast):
        y = run(network)
        y.square().mean().backward()
        results.append([y.detach(), *(p.grad for p in network.parameters())])
    for a, b in zip(*results, strict=True):
        assert (a - b).norm() < 2e-4 * b.norm()


@pytest.mark.parametrize(("make", "run"), NETWORKS)
def test_an_accelerated_network_in_bfloat16(make, run):
    plain = make()
    fast = copy.deepcopy(plain)
    accelerate(fast)
    with torch.autocast("cpu", torch.bfloat16):
        got = run(fast)
        got.square().mean().backward()
        wanted = run(plain)
    assert (got - wanted).norm() < 0.03 * wanted.norm()
    assert all(p.grad.isfinite().all() for p in fast.parameters())


@built
def test_which_layers_are_swapped():
    """3 x 3 convolutions of 64 channels to 64, sequences, modulated norms."""
    model = make_vae()
    accelerate(model)
    convolutions = [layer for layer in model.modules() if isinstance(layer, nn.Conv2d)]
    for layer in convolutions:
        sizes = (layer.kernel_size, layer.in_channels, layer.out_channels)
        fits = sizes == ((3, 3), 64, 64) and torch.backends.mkl.is_available()
        assert isinstance(layer, WinogradConv2d) == fits
    assert len(convolutions) > 10
    prior = FlowPrior((8, 8, 8), 7)
    accelerate(prior)
    assert type(prior.ema.middle[0].modulate) is FastModulatedNorm
    assert not any(p.requires_grad for p in prior.ema.parameters())
    assert all(p.requires_grad for p in prior.velocity.parameters())


def test_without_the_extension_a_network_stays_as_it_is(monkeypatch):
    monkeypatch.setattr(acceleration, "available", False)
    model = make_vae()
    before = [type(layer) for layer in model.modules()]
    accelerate(model)
    assert [type(layer) for layer in model.modules()] == before


def test_on_another_device_a_network_stays_as_it_is():
    model = make_vae().to("meta")
    accelerate(model)
    assert not any(isinstance(layer, WinogradConv2d) for layer in model.modules())


def test_the_classifier_can_be_accelerated():
    torch.manual_seed(0)
    plain = classifier.Classifier()
    fast = copy.deepcopy(plain)
    accelerate(fast)
    images = torch.rand(3, *IMAGE_SHAPE)
    for a, b in zip(*(classifier.classify(c, images) for c in (plain, fast)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)
