"""The training step's kernels against PyTorch: values, gradients, bits."""
import copy

import fused
import group
import reparam

import pytest
import torch
from torch import nn

built = pytest.mark.skipif(reparam.extension is None, reason="the extension is not built, or PEGASUS_EXTENSION=0")


def expected(x, groups, weight, bias):
    """float64, as the formula has it."""
    parts = x.double().unflatten(1, (groups, -1))
    mean, variance = parts.mean((2, 3, 4), keepdim=True), parts.var((2, 3, 4), unbiased=False, keepdim=True)
    u = ((parts - mean) / (variance + 1e-5).sqrt()).flatten(1, 2)
    u = u * weight.double()[..., None, None] + bias.double()[..., None, None]
    return u * u.sigmoid()


def images(channels: int, size: int, dtype: torch.dtype, n: int = 3) -> torch.Tensor:
    """Values whose mean is far from zero, different in each channel, as after a convolution's bias."""
    generator = torch.Generator().manual_seed(channels + size)
    return (torch.randn(n, channels, size, size + 1, generator=generator)
            + 5 * torch.randn(channels, 1, 1, generator=generator)).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("channels,size,groups", [(16, 1, 2), (64, 5, 8), (96, 4, 8), (160, 4, 8), (24, 4, 3)])
def test_silu_behind_a_group_norm(channels, size, groups, own, dtype):
    """own: each image has its own weight and bias. 24 channels and float64 are PyTorch's work."""
    x = images(channels, size, dtype)
    affine = [torch.randn((3, channels) if own else (channels,)).to(torch.promote_types(dtype, torch.float32))
              for _ in range(2)]
    dy = torch.randn(x.shape).to(dtype)
    inputs = [t.clone().requires_grad_() for t in (x, *affine)]
    got = [fused.silu_group_norm(inputs[0], groups, *inputs[1:])]
    got += torch.autograd.grad(got[0], inputs, dy)
    doubles = [t.double().requires_grad_() for t in (x, *affine)]
    wanted = [expected(doubles[0], groups, *doubles[1:])]
    wanted += torch.autograd.grad(wanted[0], doubles, dy.double())
    step = {torch.float32: 2e-5, torch.bfloat16: 1e-2, torch.float64: 1e-10}[dtype]
    for g, w, like in zip(got, wanted, (x, *inputs), strict=True):
        assert g.dtype == like.dtype
        torch.testing.assert_close(g.double(), w, rtol=step, atol=step * w.abs().max().item())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("shape", [(5, 3, 32, 32), (2, 3, 4, 4), (3, 1, 5, 5)])
def test_squared_error(shape, dtype):
    logits, x = (10 * torch.randn(shape)).to(dtype).requires_grad_(), torch.rand(shape)
    logits.data.view(-1)[:4] = torch.tensor([100.0, -100.0, 0.0, 800.0])
    dsse, double = torch.randn(shape[0]), logits.detach().double().requires_grad_()
    wanted = (x.double() - double.sigmoid()).square().flatten(1).sum(1)
    got = fused.squared_error(logits, x)
    torch.testing.assert_close(got.double(), wanted, rtol=1e-5, atol=1e-5)
    gradient, = torch.autograd.grad(got, logits, dsse)
    step = 1e-2 if dtype == torch.bfloat16 else 1e-5
    torch.testing.assert_close(gradient.double(), torch.autograd.grad(wanted, double, dsse.double())[0], rtol=step,
                               atol=1e-6)
    assert gradient.dtype == dtype


@built
def test_images_do_not_depend_on_those_beside_them():
    x = images(64, 4, torch.bfloat16, 9)
    weight, bias = torch.randn(2, 9, 64)
    whole = fused.silu_group_norm(x, 8, weight, bias)
    assert whole[2:5].equal(fused.silu_group_norm(x[2:5], 8, weight[2:5], bias[2:5]))
    assert whole.is_contiguous(memory_format=torch.channels_last)


def test_a_sequence_computes_what_nn_sequential_does():
    layers = [nn.GroupNorm(8, 32), nn.SiLU(), nn.Conv2d(32, 16, 1), nn.SiLU(), nn.GroupNorm(4, 16), nn.SiLU()]
    nn.init.normal_(layers[0].weight)
    x = images(32, 4, torch.float32)
    torch.testing.assert_close(fused.Sequence(*layers)(x), nn.Sequential(*layers)(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("ours,theirs", [(fused.Shrink, nn.Conv2d), (fused.Grow, nn.ConvTranspose2d)])
@pytest.mark.parametrize("k", [1, 2, 3])
def test_convolutions_that_are_matrix_products(ours, theirs, k):
    layer, other = ours(5, 7, k, k), theirs(5, 7, k, k)
    other.load_state_dict(layer.state_dict())
    x, outputs = torch.randn(2, 5, 2 * k, 4 * k, requires_grad=True), []
    for each in (layer, other):
        y = each(x)
        outputs.append([y, *torch.autograd.grad(y.square().sum(), (x, each.weight, each.bias))])
    for got, wanted in zip(*outputs, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("n,before,after,rows,columns", [(3, 16, 48, 4, 12), (1, 64, 64, 16, 16), (9, 96, 160, 4, 4),
                                                         (2, 16, 16, 6, 4), (2, 12, 16, 4, 4)])
def test_convolutions_in_tiles(n, before, after, rows, columns, bias, monkeypatch):
    """Values and gradients, block by block of two pictures at most; the last two sizes are PyTorch's work."""
    monkeypatch.setattr(fused, "BLOCK", 2 * 36 * rows * columns // 16 * max(before, after))
    layer = fused.Convolution(before, after, bias).to(memory_format=torch.channels_last)
    other = nn.Conv2d(before, after, 3, padding=1, bias=bias).double()
    other.load_state_dict(layer.state_dict())
    x, dy = torch.randn(n, before, rows, columns, requires_grad=True), torch.randn(n, after, rows, columns)
    double, outputs = x.detach().double().requires_grad_(), []
    for each, inputs in ((layer, x), (other, double)):
        y = each(inputs)
        outputs.append([y, *torch.autograd.grad(y, (inputs, *each.parameters()), dy.to(y.dtype))])
    for got, wanted in zip(*outputs, strict=True):
        assert (got - wanted).norm() < 1e-5 * wanted.norm()


def test_convolutions_of_other_types_are_torchs():
    layer, x = fused.Convolution(16, 16), torch.randn(2, 16, 4, 4)
    other = nn.Conv2d(16, 16, 3, padding=1)
    other.load_state_dict(layer.state_dict())
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(x).equal(other(x)) and layer(x).dtype == torch.bfloat16
    assert layer.double()(x.double()).equal(other.double()(x.double()))


@built
@pytest.mark.skipif(not torch.backends.mkl.is_available(), reason="other libraries' products may depend on their size")
def test_a_convolution_of_an_image_does_not_depend_on_those_beside_it():
    layer = fused.Convolution(64, 48)
    for size in (4, 16):
        x = torch.randn(40, 64, size, size)
        assert layer(x)[7:8].equal(layer(x[7:8]))


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 16, 3), nn.GroupNorm(4, 16), nn.SiLU(), nn.Flatten(), nn.Linear(64, 5),
                         nn.Linear(5, 1)).to(memory_format=torch.channels_last)


def backward(trained: nn.Module, step: int) -> None:
    x = torch.randn(8, 3, 4, 4, generator=torch.Generator().manual_seed(step))
    with torch.autocast("cpu", torch.bfloat16, enabled=next(trained.parameters()).dtype == torch.bfloat16):
        trained(x).float().square().mean().backward()


@pytest.mark.parametrize("bfloat16", [False, True])
def test_adam_is_torchs(bfloat16):
    """From the same gradients, with clipping and a step that is not taken, and to the same names in its state."""
    model = network()
    ours, theirs = fused.Adam(model, bfloat16), copy.deepcopy(model)
    other = torch.optim.Adam(theirs.parameters(), fused=True)
    for step in range(6):
        ours.zero_grad()
        backward(ours.trained, step)
        for p, trained in zip(theirs.parameters(), ours.trained.parameters(), strict=True):
            p.grad = trained.grad.float().clone()  # which torch's step scales in place
        norm = torch.nn.utils.get_total_norm([p.grad for p in theirs.parameters()])
        torch.testing.assert_close(ours.norm(), norm, rtol=1e-5, atol=0)
        ours.lr = other.param_groups[0]["lr"] = 0.01 / (1 + step)
        for optimizer in (ours, other):
            optimizer.found_inf = torch.tensor(float(step == 3))
            if step == 4:
                optimizer.grad_scale = torch.tensor(3.0)
            optimizer.step()
        for p, trained, wanted in zip(model.parameters(), ours.trained.parameters(), theirs.parameters(), strict=True):
            torch.testing.assert_close(p, wanted, rtol=2e-6, atol=2e-7)
            assert trained.equal(p.to(trained.dtype))
    states = ours.state_dict()["state"], other.state_dict()["state"]
    assert [set(s) for s in states[0].values()] == [set(s) for s in states[1].values()]
    assert all(s["step"] == 5 for s in (*states[0].values(), *states[1].values()))


def test_adam_goes_on_from_torchs_before_its_first_step():
    ours = fused.Adam(network(), False)
    ours.load_state_dict(torch.optim.Adam(network().parameters(), fused=True).state_dict())
    assert not any(moment.any() for moments in ours.state for moment in moments.values())
    with pytest.raises(ValueError, match="differ in shape"):
        ours.load_state_dict(fused.Adam(nn.Linear(3, 2), False).state_dict())


def test_adam_goes_on_from_moments_of_another_layout():
    model = network()
    whole = fused.Adam(model, False)
    backward(whole.trained, 0)
    whole.found_inf = torch.zeros(())
    whole.step()
    state = whole.state_dict()
    state["state"] = {i: {k: v.contiguous() for k, v in s.items()} for i, s in state["state"].items()}
    twin = copy.deepcopy(model)
    twin.zero_grad()
    resumed = fused.Adam(twin, False)
    resumed.load_state_dict(copy.deepcopy(state))
    for optimizer in (whole, resumed):
        optimizer.zero_grad()
        backward(optimizer.trained, 1)
        optimizer.found_inf = torch.zeros(())
        optimizer.step()
    assert all(p.equal(q) for p, q in zip(model.parameters(), twin.parameters(), strict=True))


@pytest.mark.parametrize("bfloat16", [False, True])
def test_gradients_of_all_processes_keep_the_weights_layout(bfloat16, monkeypatch):
    """torch's own Adam on a CPU takes it for granted; the sum is float32's."""
    monkeypatch.setattr(group.Group, "total", lambda self, tensor: tensor.mul_(2))
    workers, optimizer = group.Group("cpu"), fused.Adam(network(), bfloat16)
    backward(optimizer.trained, 0)
    weights, workers.size = list(optimizer.trained.parameters()), 2
    wanted = [2 * p.grad.float() for p in weights]
    workers.total_gradients(weights)
    assert all(p.grad.stride() == p.stride() and p.grad.dtype == p.dtype for p in weights)
    assert all(p.grad.float().equal(w) for p, w in zip(weights, wanted, strict=True))


@built
def test_the_bfloat16_copy_shares_what_multiplies_no_matrices():
    model = network()
    half = fused.bfloat16_copy(model)
    kept = [name for name, p in half.named_parameters() if p is dict(model.named_parameters())[name]]
    assert kept == ["1.weight", "1.bias"]
    assert {p.dtype for name, p in half.named_parameters() if name not in kept} == {torch.bfloat16}


@built
def test_scratch_is_used_again_in_other_modes():
    """What a thread keeps must not be a tensor of the mode in which it was first asked for."""
    layer, x = fused.Convolution(16, 16), torch.randn(2, 16, 4, 4)
    with torch.no_grad():
        wanted = torch.nn.functional.conv2d(x, layer.weight, layer.bias, padding=1)
    for mode in (torch.inference_mode, torch.no_grad, torch.inference_mode):
        vars(fused.SCRATCH).clear()
        with mode():
            torch.testing.assert_close(layer(x), wanted)
        layer(x).sum().backward()
    vars(fused.SCRATCH).clear()
    torch.set_default_dtype(torch.float64)
    try:
        torch.testing.assert_close(layer(x), wanted)
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("layer", [fused.Shrink(32, 96, 1), fused.Shrink(32, 48, 2, 2), fused.Grow(32, 16, 2, 2)])
def test_no_row_has_a_copy_of_the_weight(layer):
    """In whatever layout a picture comes: torch's linear falls back on such products where rows are not adjacent."""
    for layout in (torch.contiguous_format, torch.channels_last):
        x = torch.randn(8, 32, 4, 4).to(memory_format=layout)
        activities = [torch.profiler.ProfilerActivity.CPU]
        with torch.no_grad(), torch.profiler.profile(activities=activities, acc_events=True) as seen:
            layer(x)
        names = {event.key for event in seen.key_averages()}
        assert "aten::addmm" in names or "aten::mm" in names
        assert "aten::bmm" not in names


@built
def test_defaults_of_the_process_do_not_reach_a_step():
    """Neither its default dtype, nor whether it flushes denormals: the products are to be the same in every thread."""
    generator = torch.Generator().manual_seed(3)
    x = (1e-17 * torch.randn(8, 16, 8, 8, generator=generator)).contiguous(memory_format=torch.channels_last)
    kernels, y = 1e-20 * torch.randn(36, 16, 16, generator=generator), []
    optimizer = fused.Adam(fused.Convolution(16, 16), bfloat16=False)
    for _, weight in optimizer.pairs:
        weight.grad = torch.ones_like(weight)
    for flush in (False, True):
        torch.set_flush_denormal(flush)
        y.append(torch.empty_like(x))
        torch.ops.pegasus.winograd(x, kernels, torch.zeros(0), y[-1], 8)
        torch.set_flush_denormal(False)
    assert y[0].equal(y[1])
    torch.set_default_dtype(torch.float64)
    try:
        assert optimizer.norm().item() == pytest.approx((16 * 16 * 9 + 16)**0.5)
    finally:
        torch.set_default_dtype(torch.float32)
