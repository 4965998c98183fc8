"""The flow prior: its solver on known fields, its network, a toy mixture to recover."""
import math
from types import SimpleNamespace

import reparam
from pegasus.models import flow_prior
from pegasus.models.flow_prior import FlowPrior, Velocity
from pegasus.training.config import TrainConfig
from pegasus.training.distributed import Workers
from pegasus.training.stages import Batch, PriorStage

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

pytestmark = pytest.mark.usefixtures("small_network")
SHAPE = (2, 8, 8)


def make_velocity() -> Velocity:
    torch.manual_seed(0)
    return Velocity(SHAPE, 3)


def shake(velocity: Velocity) -> Velocity:
    """Give weights to the layers that begin at zero."""
    for block in (*velocity.down, *velocity.middle, *velocity.up):
        nn.init.normal_(block.last.weight, std=0.3)
    nn.init.normal_(velocity.leave[-1].weight)
    return velocity


def even(steps: int) -> list[float]:
    return [i / steps for i in range(steps + 1)]


def test_a_new_velocity_leaves_noise_as_it_was():
    """It takes latents for N(0, I), so that all the way leads back."""
    z = torch.randn(5, 128)
    field = flow_prior.guided_velocity(make_velocity(), 3, {0: 2.0, 1: 0.5})
    with torch.no_grad():
        end = flow_prior.integrate(field, z, even(400))
    torch.testing.assert_close(end, z, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("t", [0.0, 0.2, 0.5, 0.9, 1.0])
@pytest.mark.parametrize(("mean", "variance"), [(0.0, 1.0), (0.7, 0.3)])
def test_the_direction_is_what_is_expected_of_z(t, mean, variance):
    """A least-squares fit of z_1 - z_0 to z_t, z_1 ~ N(mean, variance)."""
    z0, z1 = torch.randn(2, 10**6, dtype=torch.float64, generator=torch.manual_seed(0))
    z1 = mean + variance**0.5 * z1
    z = (1 - t) * z0 + t * z1
    v = z1 - z0
    slope = ((z - z.mean()) * v).mean() / z.var()
    fit = v.mean() + slope * (z - z.mean())
    got = flow_prior.direction(z[:, None], torch.tensor([[t]]), mean, variance)
    torch.testing.assert_close(got[:, 0], fit, atol=0.03, rtol=0)


def test_times_are_spread_evenly_and_each_rows_its_own():
    """One in each of `size` parts of equal chance; a part of the rows has the same."""
    seed = torch.tensor(3)
    t = flow_prior.even_times(64, 64, seed, 0)
    u = (t.logit() / 0.6).sigmoid()[:, 0].double()
    assert sorted((u * 64).floor().int().tolist()) == list(range(64))
    assert (u.diff() % 1).allclose(torch.tensor(1 / 64).double(), atol=1e-5)
    parts = [flow_prior.even_times(n, 64, seed, first) for n, first in ((40, 0), (24, 40))]
    torch.testing.assert_close(torch.cat(parts), t)
    assert not flow_prior.even_times(64, 64, seed + 1, 0).allclose(t)


def test_the_solver_is_of_second_order():
    """dz/dt = z cos(6 t) has the solution z exp(sin(6 t) / 6).

    Halving the step quarters the error.
    """
    exact = math.exp(math.sin(6) / 6)
    one = torch.ones(1, 1, dtype=torch.float64)
    errors = []
    for steps in (200, 400, 800):
        z = flow_prior.integrate(lambda z, t: z * math.cos(6 * t), one, even(steps))
        errors.append(abs(z.item() - exact))
    for coarse, fine in zip(errors, errors[1:], strict=False):
        assert 3.5 < coarse / fine < 4.5


def test_the_solver_takes_steps_of_any_length():
    times = [0, 0.01, 0.05, 0.2, 0.3, 0.31, 0.5, 0.8, 1]
    zero = torch.zeros(1, 1)
    z = flow_prior.integrate(lambda z, t: torch.full_like(z, 2 * t), zero, times)  # t^2
    assert z.item() == pytest.approx(1, abs=1e-6)
    three = torch.full((1, 1), 3.0)
    assert flow_prior.integrate(lambda z, t: z, three, [0.4]).item() == 3
    assert flow_prior.integrate(lambda z, t: z, three, [1.0, 1.0, 1.0]).item() == 3


def test_guidance_is_the_sum_of_weighted_differences():
    def velocity(z: Tensor, t: Tensor, classes: Tensor) -> Tensor:
        return classes[:, None].float() ** 2 + z * t[:, None]

    def guided(weights: dict) -> Tensor:
        return flow_prior.guided_velocity(velocity, 4, weights)(z, 0.5)

    z = torch.tensor([[1.0], [2.0]])
    none = 16 + z / 2
    one = 1 + z / 2
    two = 4 + z / 2
    weights = torch.tensor([[0.5], [3.0]])
    wanted = none + 0.7 * (one - none) + weights * (two - none)
    torch.testing.assert_close(guided({1: 0.7, 2: weights}), wanted)
    assert guided({1: weights, 2: 1 - weights}).allclose(two + weights * (one - two))
    assert guided({1: 1.0}).equal(one)
    assert guided({}).equal(none)


def test_velocities_depend_on_time_and_class():
    velocity = shake(make_velocity())
    z = torch.randn(1, 128).repeat(4, 1)
    t = torch.tensor([0.1, 0.1, 0.1, 0.9])
    classes = torch.tensor([0, 0, 3, 0])
    with torch.no_grad():
        v = velocity(z, t, classes)
    assert v.shape == z.shape
    assert v[0].allclose(v[1])
    assert not v[0].allclose(v[2], atol=1e-2)
    assert not v[0].allclose(v[3], atol=1e-2)


def test_a_modulated_norm_is_its_formula():
    x = torch.randn(3, 16, 4, 4)
    scale = torch.randn(3, 16)
    shift = torch.randn(3, 16)
    groups = x.unflatten(1, (8, 2))
    mean = groups.mean((2, 3, 4), keepdim=True)
    variance = groups.var((2, 3, 4), unbiased=False, keepdim=True)
    norm = ((groups - mean) / (variance + 1e-5).sqrt()).flatten(1, 2)
    u = scale[..., None, None] * norm + shift[..., None, None]
    y = flow_prior.ModulatedNorm()(x, scale, shift)
    torch.testing.assert_close(y, u * u.sigmoid())


def test_attention_is_softmax_over_places():
    torch.manual_seed(1)
    attention = flow_prior.Attention(16)
    nn.init.normal_(attention.out.weight)
    x = torch.randn(2, 16, 4, 4)
    places = attention.norm(x).view(2, 16, 16).mT
    query, key, value = attention.inside(places).chunk(3, 2)
    mixed = functional.scaled_dot_product_attention(query, key, value)
    y = attention.out(mixed).mT.view_as(x)
    torch.testing.assert_close(attention(x), x + y, rtol=1e-4, atol=1e-4)


def test_normalized_latents_have_mean_zero_and_variance_one_in_each_channel():
    prior = FlowPrior(SHAPE, 1)
    g = torch.Generator().manual_seed(1)
    scale = torch.tensor([3.0, 0.2]).repeat_interleave(64)
    mu = (scale * torch.randn(3000, 128, generator=g) + 5).half()
    logvar = (scale.log() - 1).expand(3000, -1).half()
    prior.measure(mu, logvar)
    z, _ = reparam.reparameterize_kl(mu.float(), logvar.float(), torch.tensor(3))
    channels = prior.normalize(z).view(-1, 2, 64)
    torch.testing.assert_close(channels.mean((0, 2)), torch.zeros(2), atol=0.01, rtol=0)
    torch.testing.assert_close(channels.std((0, 2)), torch.ones(2), atol=0.01, rtol=0)
    assert prior.denormalize(prior.normalize(z)).allclose(z, atol=1e-4)


def test_a_state_for_drawing_holds_all_but_the_trained_velocity():
    prior = FlowPrior(SHAPE, 2)
    prior.mean.fill_(3)
    nn.init.normal_(prior.ema.enter.weight)
    state = prior.drawing_state()
    assert {name.split(".")[0] for name in state} == {"average", "mean", "std"}
    loaded = FlowPrior(SHAPE, 2)
    loaded.load_drawing_state(state)
    assert loaded.mean.equal(prior.mean)
    for network in (loaded.ema, loaded.velocity):
        assert network.enter.weight.equal(prior.ema.enter.weight)
    loaded.load_drawing_state(state, prior.velocity.state_dict())
    assert loaded.velocity.enter.weight.equal(prior.velocity.enter.weight)
    assert not loaded.ema.enter.weight.equal(loaded.velocity.enter.weight)
    with pytest.raises(RuntimeError, match="std"):
        loaded.load_drawing_state(state | {"std": torch.ones(1)})


def test_classes_hidden():
    """15 % are none, of the others 15 % the coat; a function of seed and row alone."""
    choices = torch.tensor([[0, 2, 4]]).repeat(20_000, 1)
    seed = torch.tensor(9)
    picked = flow_prior.choose_labels(choices, seed, 0)
    shares = [(picked == number).double().mean().item() for number in (4, 0, 2)]
    assert shares == pytest.approx([0.15, 0.7225, 0.1275], abs=0.01)
    assert picked[100:].equal(flow_prior.choose_labels(choices[100:], seed, 100))
    assert not picked.equal(flow_prior.choose_labels(choices, torch.tensor(10), 0))


def test_images_with_and_without_a_coat_count_alike_for_their_class():
    choices = torch.tensor([[0, 2, 4]]).repeat(20_000, 1)
    choices[::2, 1] = 0  # half of them have no coat
    picked = flow_prior.choose_labels(choices, torch.tensor(9), 0)
    weights = flow_prior.label_weights(picked, choices)
    of_class = weights * (picked == 0)
    without = of_class[::2].sum().item()
    assert without == pytest.approx(of_class[1::2].sum().item(), rel=0.03)
    assert weights[picked != 0].eq(1).all()


def test_the_average_is_weighted_by_a_power_of_the_step():
    """After the step t with weights w_t: sum t^7 w_t / sum t^7, nearly: rising factorials."""
    prior = FlowPrior(SHAPE, 1)
    total = 0.0
    sum_of_powers = 0.0
    for t in range(1, 201):
        value = math.sin(t / 30)
        with torch.no_grad():
            prior.velocity.enter.weight.fill_(value)
        prior.update_ema(torch.tensor(float(t)))
        power = math.prod(range(t, t + 7))
        total += power * value
        sum_of_powers += power
    averaged = prior.ema.enter.weight
    torch.testing.assert_close(averaged, torch.full_like(averaged, total / sum_of_powers))


@pytest.mark.parametrize("times", [[0, 0.25, 0.5, 1], [0.4, 0.7, 1]])
def test_samples_follow_the_average_by_weights_that_grow(times):
    """From the early to the late ones, with t squared; images may have weights of their own."""
    prior = FlowPrior(SHAPE, 2)
    shake(prior.ema)
    begin = torch.randn(7, 128)
    share = torch.rand(7, 1)

    def field(z: Tensor, t: float) -> Tensor:
        weights = {0: (1 - t**2) * share + 2 * t**2, 1: 0.5 * (1 - t**2)}
        return flow_prior.guided_velocity(prior.ema, prior.unconditional, weights)(z, t)

    got = flow_prior.follow(prior, {0: share, 1: 0.5}, {0: 2.0, 1: 0.0}, begin, times)
    with torch.no_grad():
        wanted = flow_prior.integrate(field, begin, times)
    torch.testing.assert_close(got, wanted, rtol=1e-3, atol=1e-3)
    assert not got.allclose(begin, atol=0.1)
    assert flow_prior.follow(prior, {0: 1.0}, {0: 2.0}, begin, [1, 1]).equal(begin)


class Toy(nn.Module):
    """A velocity of one dimension."""

    def __init__(self):
        super().__init__()
        self.name = nn.Embedding(3, 16)
        self.body = nn.Sequential(
            nn.Linear(18, 96), nn.SiLU(), nn.Linear(96, 96), nn.SiLU(), nn.Linear(96, 1)
        )

    def forward(self, z: Tensor, t: Tensor, classes: Tensor) -> Tensor:
        return self.body(torch.cat([z, t[:, None], self.name(classes)], 1))


def toy_stage(velocity: nn.Module, **attributes: object) -> PriorStage:
    """Return a stage without data, whose latents are normalized as they are."""
    stage = PriorStage.__new__(PriorStage)
    stage.config = TrainConfig(device="cpu", precision="float32")
    stage.network = velocity
    stage.prior = SimpleNamespace(
        normalize=lambda z: z, std=torch.ones(()), ema=velocity
    )
    stage.workers = Workers("cpu")
    for name, value in attributes.items():
        setattr(stage, name, value)
    return stage


def test_gradients_are_of_the_weighted_loss():
    torch.manual_seed(0)
    toy = Toy()
    rows = torch.arange(40) % 8
    choices = torch.tensor([[0, 1, 2], [0, 0, 2]] * 4)
    posteriors = torch.stack([torch.randn(8, 1), torch.zeros(8, 1)])
    seeds = torch.tensor([1, 2, 3])
    stage = toy_stage(toy, posteriors=posteriors, choices=choices)
    loss, sums = stage.loss(Batch(rows, None, 80, 0, seeds, torch.tensor(0.0)))
    got = torch.autograd.grad(loss, list(toy.parameters()))
    labels = flow_prior.choose_labels(choices[rows], seeds[2], 0)
    weights = flow_prior.label_weights(labels, choices[rows])
    times = flow_prior.even_times(40, 80, seeds[1], 0)
    error = stage.matching_loss(toy, posteriors[:, rows], labels, times, seeds[0], 0)
    wanted = torch.autograd.grad((weights * error).sum() / 80, list(toy.parameters()))
    torch.testing.assert_close(got, wanted)
    assert weights.max() > 1
    assert sums[0].item() == pytest.approx(error.sum().item(), rel=1e-6)


def test_the_matching_loss_teaches_the_direction_of_samples():
    """Its gradient is that of the squares of v(z_t, t) - (z_1 - z_0), expected.

    z_1 is a sample of the posterior, z_t on the straight line that joins it to noise z_0.
    """
    torch.manual_seed(0)
    toy = Toy()
    n = 200_000
    posteriors = torch.tensor([0.8, math.log(0.5)])[:, None, None].expand(2, n, 1)
    labels = torch.zeros(n, dtype=torch.int64)
    t = torch.full((n, 1), 0.6)
    seed = torch.tensor(5)
    loss = toy_stage(toy).matching_loss(toy, posteriors, labels, t, seed, 20).mean()
    got = torch.autograd.grad(loss, toy.body.parameters())
    z0, noise = torch.randn(2, n, 1)
    z1 = 0.8 + 0.5**0.5 * noise
    v = toy(torch.lerp(z0, z1, t), t[:, 0], labels)
    wanted = torch.autograd.grad((v - (z1 - z0)).square().mean(), toy.body.parameters())
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0.02 * b.abs().max().item())
    assert loss < (v - (z1 - z0)).square().mean()  # it lacks the samples' own variance


def train_toy(toy: Toy) -> None:
    """Train on N(-1.5, 0.5^2) and N(1.5, 0.5^2), as classes 0 and 1."""
    optimizer = torch.optim.Adam(toy.parameters(), 5e-3)
    number = torch.arange(512) % 2
    mu = 3.0 * number[:, None] - 1.5
    posteriors = torch.stack([mu, torch.full((512, 1), math.log(0.25))])
    choices = torch.stack([number, number, torch.full_like(number, 2)], 1)
    stage = toy_stage(toy)
    for step in range(1200):
        optimizer.param_groups[0]["lr"] = 5e-3 * (1 - step / 1200)
        labels = flow_prior.choose_labels(choices, torch.tensor(step), 0)
        noise_seed, time_seed = torch.tensor([2 * step, 2 * step + 1])
        times = flow_prior.even_times(512, 512, time_seed, 0)
        loss = stage.matching_loss(toy, posteriors, labels, times, noise_seed, 0).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def test_a_toy_mixture_its_modes_and_their_product():
    """Each mode is found again, and so are both; together they meet between."""
    torch.manual_seed(0)
    toy = Toy()
    train_toy(toy)
    eps = torch.randn(2000, 1)

    def follow(weights: dict[int, float]) -> Tensor:
        field = flow_prior.guided_velocity(toy, 2, weights)
        with torch.no_grad():
            return flow_prior.integrate(field, eps, even(20))

    for number, mean in ((0, -1.5), (1, 1.5)):
        z = follow({number: 1.0})
        assert z.mean().item() == pytest.approx(mean, abs=0.12)
        assert z.std().item() == pytest.approx(0.5, abs=0.12)
    anything = follow({})
    assert (anything < 0).double().mean().item() == pytest.approx(0.5, abs=0.08)
    assert anything.abs().mean().item() == pytest.approx(1.5, abs=0.2)
    both = follow({0: 1.0, 1: 1.0})
    assert abs(both.mean().item()) < 0.3
    assert both.abs().mean().item() < 1.0
