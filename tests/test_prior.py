"""The learned prior: its sampler on fields with known solutions, its network, and a toy mixture it must recover."""
import math
from types import SimpleNamespace

import density
import phases
import prior
import recipe
import reparam

import pytest
import torch
from torch import nn

SHAPE = (2, 8, 8)


def velocity(**more) -> prior.Velocity:
    torch.manual_seed(0)
    return prior.Velocity(SHAPE, 3, fine=16, coarse=16, condition=8, **more)


def even(steps: int) -> list[float]:
    return [i / steps for i in range(steps + 1)]


def test_a_new_velocity_is_zero_and_leaves_noise_as_it_was():
    z = torch.randn(5, 128)
    field = prior.composed(velocity(), 3, {0: 2.0, 1: 0.5})
    with torch.no_grad():
        assert prior.integrate(field, z, even(7)).equal(z)


def test_the_sampler_is_of_second_order():
    """dz/dt = z cos(6 t) has the solution z exp(sin(6 t) / 6): halving the step quarters the error."""
    exact = math.exp(math.sin(6) / 6)
    one = torch.ones(1, 1, dtype=torch.float64)
    errors = [abs(prior.integrate(lambda z, t: z * math.cos(6 * t), one, even(n)).item() - exact)
              for n in (200, 400, 800)]
    for coarse, fine in zip(errors, errors[1:], strict=False):
        assert 3.5 < coarse / fine < 4.5


def test_the_sampler_takes_steps_of_any_length():
    times = [0, 0.01, 0.05, 0.2, 0.3, 0.31, 0.5, 0.8, 1]
    linear = prior.integrate(lambda z, t: torch.full_like(z, 2 * t), torch.zeros(1, 1), times)  # z = t^2
    assert linear.item() == pytest.approx(1, abs=1e-6)
    assert prior.integrate(lambda z, t: z, torch.full((1, 1), 3.0), [0.4]).item() == 3


def test_composition_is_the_sum_of_guided_differences():
    def field(z, t, names):
        return names[:, None].float() ** 2 + z * t[:, None]

    z = torch.tensor([[1.0], [2.0]])
    none, one, two = 16 + z / 2, 1 + z / 2, 4 + z / 2
    weights = torch.tensor([[0.5], [3.0]])
    assert prior.composed(field, 4, {1: 0.7, 2: weights})(z, 0.5).allclose(
        none + 0.7 * (one - none) + weights * (two - none))
    assert prior.composed(field, 4, {1: 1.0})(z, 0.5).equal(one)
    assert prior.composed(field, 4, {})(z, 0.5).equal(none)


def test_velocities_depend_on_time_and_name():
    net = velocity()
    nn.init.normal_(net.leave[-1].weight)
    for block in (*net.down, *net.middle, *net.up):
        nn.init.normal_(block.last.weight)
    z, t, names = torch.randn(4, 128), torch.tensor([0.1, 0.1, 0.1, 0.9]), torch.tensor([0, 0, 3, 0])
    z[1:] = z[0]
    with torch.no_grad():
        v = net(z, t, names)
    assert v.shape == z.shape
    assert v[0].allclose(v[1])
    assert not v[0].allclose(v[2], atol=1e-2)
    assert not v[0].allclose(v[3], atol=1e-2)


def test_normalised_latents_have_mean_zero_and_variance_one_in_each_channel():
    learned = prior.Learned(SHAPE, 1)
    g = torch.Generator().manual_seed(1)
    scale = torch.tensor([3.0, 0.2]).repeat_interleave(64)
    mu, logvar = (scale * torch.randn(3000, 128, generator=g) + 5).half(), (scale.log() - 1).expand(3000, -1).half()
    learned.measure(mu, logvar)
    z, _ = reparam.reparameterize_kl(mu.float(), logvar.float(), torch.tensor(3))
    channels = learned.normalised(z).view(-1, 2, 64)
    torch.testing.assert_close(channels.mean((0, 2)), torch.zeros(2), atol=0.01, rtol=0)
    torch.testing.assert_close(channels.std((0, 2)), torch.ones(2), atol=0.01, rtol=0)
    assert learned.latents(learned.normalised(z)).allclose(z, atol=1e-4)


def test_names_hidden():
    """15 % are none, the others in equal parts class and coat; a function of seed and row alone."""
    both = torch.tensor([[0, 2]]).repeat(20_000, 1)
    names = prior.drop_labels(both, 4, torch.tensor(9), 0)
    shares = [(names == name).double().mean().item() for name in (4, 0, 2)]
    assert shares == pytest.approx([0.15, 0.425, 0.425], abs=0.01)
    assert names[100:].equal(prior.drop_labels(both[100:], 4, torch.tensor(9), 100))
    assert not names.equal(prior.drop_labels(both, 4, torch.tensor(10), 0))
    both[::2, 1] = 0  # half of them have no coat, and count as much for the class as those that have one
    names = prior.drop_labels(both, 4, torch.tensor(9), 0)
    weights = prior.label_weights(names, both) * (names == 0)
    assert weights[::2].sum().item() == pytest.approx(weights[1::2].sum().item(), rel=0.03)
    assert prior.label_weights(names, both)[names != 0].eq(1).all()


def test_names_of_photographs():
    images = torch.arange(8, dtype=torch.uint8)[:, None, None, None].expand(-1, 3, 32, 32) * 20
    both = density.labels_and_coats(images, torch.tensor([0, 1] * 4), ("horse", "bird"))
    assert both[:, 0].tolist() == [0, 1] * 4
    assert both[:, 1].tolist() == [3, 1, 0, 1, 0, 1, 2, 1]  # the darkest horse is dark, the lightest white


def test_averaged_weights_follow():
    learned = prior.Learned(SHAPE, 1)
    before = learned.average.enter.weight.clone()
    with torch.no_grad():
        learned.velocity.enter.weight.add_(1)
    learned.update_average(torch.tensor(10**6))
    assert (learned.average.enter.weight - before).allclose(torch.tensor(0.005), atol=1e-6)
    learned.update_average(torch.tensor(1))
    assert (learned.average.enter.weight - before).mean().item() == pytest.approx(0.9, abs=0.01)


class Toy(nn.Module):
    """A velocity of one dimension."""

    def __init__(self):
        super().__init__()
        self.name = nn.Embedding(3, 16)
        self.body = nn.Sequential(nn.Linear(18, 96), nn.SiLU(), nn.Linear(96, 96), nn.SiLU(), nn.Linear(96, 1))

    def forward(self, z, t, names):
        return self.body(torch.cat([z, t[:, None], self.name(names)], 1))


def test_gradients_are_of_the_weighted_loss():
    torch.manual_seed(0)
    net, rows, both = Toy(), torch.arange(40) % 8, torch.tensor([[0, 1], [0, 0]] * 4)
    mu, logvar, seeds = torch.randn(8, 1), torch.zeros(8, 1), torch.tensor([1, 2, 3, 4])
    run = SimpleNamespace(learned=SimpleNamespace(normalised=lambda z: z, none=2), mu=mu, logvar=logvar, labels=both,
                          options=recipe.Options(device="cpu", precision="float32"),
                          optimizer=SimpleNamespace(trained=net))
    run.loss = lambda *about: phases.Prior.loss(run, *about)
    sums = phases.Prior.backward(run, rows, None, 80, 0, seeds, torch.tensor(0.0))
    names = prior.drop_labels(both[rows], 2, seeds[3], 0)
    loss = run.loss(net, mu[rows], logvar[rows], names, seeds[:3], 0)
    wanted = torch.autograd.grad((prior.label_weights(names, both[rows]) * loss).sum() / 80, list(net.parameters()))
    for parameter, gradient in zip(net.parameters(), wanted, strict=True):
        torch.testing.assert_close(parameter.grad, gradient)
    assert 2 in prior.label_weights(names, both[rows])
    assert sums[0].item() == pytest.approx(loss.sum().item(), rel=1e-6)


def test_a_toy_mixture_its_modes_and_their_product():
    """N(-1.5, 0.5^2) and N(1.5, 0.5^2): each is found again, and so are both; together they meet between."""
    torch.manual_seed(0)
    net = Toy()
    optimizer, logvar = torch.optim.Adam(net.parameters(), 5e-3), torch.full((512, 1), math.log(0.25))
    run = SimpleNamespace(learned=SimpleNamespace(normalised=lambda z: z),
                          options=recipe.Options(device="cpu", precision="float32"))
    for step in range(1200):
        optimizer.param_groups[0]["lr"] = 5e-3 * (1 - step / 1200)
        kind = torch.arange(512) % 2
        names = prior.drop_labels(kind[:, None].repeat(1, 2), 2, torch.tensor(step), 0)
        seeds = torch.tensor([3 * step, 3 * step + 1, 3 * step + 2])
        loss = phases.Prior.loss(run, net, 3.0 * kind[:, None] - 1.5, logvar, names, seeds, 0).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    eps = torch.randn(2000, 1)
    with torch.no_grad():
        one, two, any_, both = (prior.integrate(prior.composed(net, 2, w), eps, even(20)) for w in (
            {0: 1.0}, {1: 1.0}, {}, {0: 1.0, 1: 1.0}))
    for z, mean in ((one, -1.5), (two, 1.5)):
        assert z.mean().item() == pytest.approx(mean, abs=0.12)
        assert z.std().item() == pytest.approx(0.5, abs=0.12)
    assert (any_ < 0).double().mean().item() == pytest.approx(0.5, abs=0.08)
    assert any_.abs().mean().item() == pytest.approx(1.5, abs=0.2)
    assert abs(both.mean().item()) < 0.3
    assert both.abs().mean().item() < 1.0
