"""Each measure sees what it is for."""
import math
from types import SimpleNamespace

import vae
from pegasus import measures
from pegasus.models import flow_prior
from pegasus.models.flow_prior import FlowPrior
from pegasus.models.variants import Component

import pytest
import torch
from torch import nn
from torch.distributions import MultivariateNormal, Normal

# ---- likelihoods ----


def linear_model(monkeypatch, d=2, pixels=6, spread=1.0):
    """Return x = W z + b + noise, of which density and posterior are known.

    spread: 1 takes the best diagonal posterior.
    """
    g = torch.Generator().manual_seed(4)
    w = torch.randn(pixels, d, generator=g) * 0.7
    b = torch.randn(pixels, generator=g)
    variance = torch.tensor(0.3)
    precision = torch.eye(d) + w.T @ w / variance
    mean = torch.linalg.inv(precision) @ w.T / variance

    def components(model, x):
        mu = (x.flatten(1) - b) @ mean.T
        logvar = (spread / precision.diagonal()).log().expand_as(mu)
        return [Component(torch.zeros(len(x)), mu, logvar, lambda z: z @ w.T + b)]

    monkeypatch.setattr(measures, "components", components)
    model = SimpleNamespace(variance=variance)
    return model, MultivariateNormal(b, w @ w.T + variance * torch.eye(pixels))


def test_on_a_linear_gaussian_model_the_bound_is_the_exact_density(monkeypatch):
    model, exact = linear_model(monkeypatch, spread=1.5)
    x = exact.sample((40,))
    log_p = exact.log_prob(x)
    samples = measures.posterior_samples(model, x, 3000, 1)
    weights = samples.log_weight
    torch.testing.assert_close(samples.elbo, weights)  # without a code
    bound = measures.importance_weighted(weights)
    torch.testing.assert_close(bound.mean(), log_p.double().mean(), rtol=0, atol=0.01)
    assert (bound >= weights.mean(0)).all()  # Jensen
    assert (weights.mean(0) < log_p - 0.05).all()  # so that there was something to close
    fewer = []
    for k in (1, 10, 100, 3000):
        groups = weights.view(-1, k, 40).transpose(0, 1)
        fewer.append(measures.importance_weighted(groups).mean())
    assert fewer == sorted(fewer)


def test_the_likelihood_of_an_image():
    x, xhat = torch.rand(2, 5, 3, 4, 4)
    variance = torch.tensor(0.04)
    wanted = Normal(xhat, 0.2).log_prob(x).sum((1, 2, 3))
    torch.testing.assert_close(measures.log_likelihood(x, xhat, variance), wanted)


def test_monte_carlo_on_a_linear_gaussian_model_to_its_own_standard_error():
    """x = 2 z + 1 + noise: P(x) is N(1, 4 + variance). Over 300 sets of samples."""
    g = torch.Generator().manual_seed(3)
    variance = torch.tensor(0.5)
    x = torch.tensor([[1.0], [2.5], [-4.0]])
    exact = Normal(1.0, math.sqrt(4.5)).log_prob(x[:, 0].double())
    deviations = []
    for _ in range(300):
        xhat = 2 * torch.randn(1000, 1, generator=g) + 1
        estimate = measures.monte_carlo(x, xhat, variance)
        deviations.append((estimate.log_p - exact) / estimate.standard_error)
    deviations = torch.stack(deviations)
    assert (deviations.mean(0).abs() < 0.25).all()
    assert ((deviations.std(0) > 0.85) & (deviations.std(0) < 1.2)).all()


def test_how_many_samples_of_monte_carlo_count():
    """All of them where they are alike, one where the others are far off."""
    x = torch.zeros(1, 4)
    alike = measures.monte_carlo(x, torch.ones(50, 4), torch.tensor(1.0))
    assert alike.effective_samples.item() == pytest.approx(50)
    assert alike.standard_error.item() == pytest.approx(0, abs=1e-12)
    far = torch.full((50, 4), 100.0)
    far[7] = 0
    one = measures.monte_carlo(x, far, torch.tensor(1.0))
    assert one.effective_samples.item() == pytest.approx(1)
    wanted = -2 * math.log(2 * math.pi) - math.log(50)
    assert one.log_p.item() == pytest.approx(wanted)


class GaussianField(nn.Module):
    """The flow from N(0, I) to N(mean, deviation^2), in closed form."""

    def __init__(self, mean, deviation):
        super().__init__()
        self.mean = mean
        self.variance = deviation**2

    def forward(self, z, t, classes):
        t = t[:, None]
        slope = (t * self.variance - (1 - t)) / ((1 - t) ** 2 + t**2 * self.variance)
        return self.mean + slope * (z - t * self.mean)


class Waves(nn.Module):
    """Some field that is not linear."""

    def forward(self, z, t, classes):
        t = t[:, None]
        return (3 * z).sin() * (1 - t) + 0.5 * t * z.cos()


def toy_prior(field, side):
    prior = FlowPrior((1, side, side), 2)
    prior.ema = field
    prior.mean.fill_(0.4)
    prior.std.copy_(torch.linspace(0.5, 2, side**2))
    return prior


def test_the_flows_likelihood_of_a_gaussian():
    mean = torch.tensor([0.3, -1.0, 0.0, 2.0])
    deviation = torch.tensor([0.6, 1.0, 1.5, 0.8])
    prior = toy_prior(GaussianField(mean, deviation), 2)
    exact = Normal(prior.denormalize(mean), deviation * prior.std)
    torch.manual_seed(0)
    z = exact.sample((30,))
    log_p = flow_prior.log_density(prior, z, batch_size=7)
    wanted = exact.log_prob(z).sum(1).double()
    torch.testing.assert_close(log_p, wanted, rtol=0, atol=0.01)


def test_the_flows_likelihood_sums_to_one():
    prior = toy_prior(Waves(), 1)
    grid = torch.linspace(-6, 6, 4001)[:, None]
    density = flow_prior.log_density(prior, grid, steps=48, batch_size=5000).exp()
    total = density.sum().item() * 12 / 4000
    assert total == pytest.approx(1, abs=5e-4)
    assert density.max() > 1.5 * density.median()  # nothing flat


# ---- sets of images ----


def test_frechet_distance_is_the_closed_form():
    """Against the eigenvalues of S_a S_b, and by hand where both are diagonal."""
    g = torch.Generator().manual_seed(0)
    mix_a, mix_b = torch.randn(2, 6, 6, generator=g, dtype=torch.float64)
    a = torch.randn(400, 6, generator=g, dtype=torch.float64) @ mix_a
    b = torch.randn(300, 6, generator=g, dtype=torch.float64) @ mix_b + 1
    cross = torch.linalg.eigvals(a.T.cov() @ b.T.cov()).real.sqrt().sum()
    gap = (a.mean(0) - b.mean(0)).square().sum()
    wanted = gap + a.T.cov().trace() + b.T.cov().trace() - 2 * cross
    assert measures.frechet(a, b) == pytest.approx(wanted.item())
    assert measures.frechet(a, a) == pytest.approx(0, abs=1e-9)
    corners = torch.tensor([[1.0, 1], [1, -1], [-1, 1], [-1, -1]])
    wanted = 2 + 2 * 4 * 4 / 3  # |gap|^2 + sum (3 s - s)^2
    assert measures.frechet(corners, 3 * corners + 1) == pytest.approx(wanted)


@pytest.mark.parametrize("shift", [0.0, 0.2])
def test_extrapolated_the_frechet_distance_has_no_bias(shift):
    """Of two Gaussians in 40 dimensions it is 40 shift^2; at N = 400 it is 2 more."""
    g = torch.Generator().manual_seed(1)
    a, b = torch.randn(2, 6, 400, 40, generator=g)
    b = b + shift
    pairs = list(zip(a, b, strict=True))
    wanted = 40 * shift**2
    at_n = [measures.frechet_at(x, y, 400) for x, y in pairs]
    assert sum(at_n) / 6 > wanted + 1.5
    at_infinity = [measures.frechet_at_infinity(x, y) for x, y in pairs]
    assert sum(at_infinity) / 6 == pytest.approx(wanted, abs=0.25)


def test_frechet_distance_of_rows_in_turn():
    a = torch.arange(20.0).view(10, 2).square()
    b = a.flip(0)
    halves = (measures.frechet(a[:4], b[:4]) + measures.frechet(a[4:8], b[4:8])) / 2
    assert measures.frechet_at(a, b, 4) == pytest.approx(halves)
    assert measures.frechet_at(a, b[:7], 4) == pytest.approx(measures.frechet(a[:4], b[:4]))


def waves(count, vertical=False):
    """Return a picture of so many waves."""
    line = torch.sin(2 * math.pi * count * torch.arange(32) / 32)
    image = line[:, None] if vertical else line
    return 0.5 + 0.4 * image.expand(3, 32, 32)


def test_radial_power_knows_how_fine_a_wave_is():
    for vertical in (False, True):
        coarse, fine, finest = (
            measures.radial_power(waves(count, vertical)[None]) for count in (3, 10, 14)
        )
        assert fine[0] > 100 * fine[1]
        assert finest[1] > 100 * finest[0]
        assert coarse.sum() < 0.01 * fine.sum()


def test_radial_power_sees_blur():
    g = torch.Generator().manual_seed(2)
    sharp = torch.rand(20, 3, 32, 32, generator=g)
    blurred = nn.functional.avg_pool2d(sharp, 3, 1, 1)
    share = measures.radial_power(blurred) / measures.radial_power(sharp)
    assert (share < 0.25).all()
    half = measures.radial_power(0.5 + (sharp - 0.5) / 2) / measures.radial_power(sharp)
    torch.testing.assert_close(half, torch.full((2,), 0.25))


def test_variety_sees_one_stamp():
    g = torch.Generator().manual_seed(5)
    different = vae.from_bytes(torch.randint(0, 256, (64, 3, 32, 32), generator=g))
    noise = 0.05 * torch.randn(64, 3, 32, 32, generator=g)
    stamps = different[:1] + noise
    stamps[::2] = stamps[::2].flip(3)  # mirrored, a stamp is still one
    stamped = measures.variety(stamps)
    varied = measures.variety(different)
    assert stamped.correlation > 0.9 > 0.2 > varied.correlation
    assert stamped.deviation < 0.06 < 0.25 < varied.deviation


def test_pictures_of_one_color_are_alike():
    assert measures.variety(torch.full((5, 3, 32, 32), 0.5)).correlation == 1


def test_nearest_distances():
    features = torch.tensor([[0.0, 0], [3, 4], [9, 1]])
    others = torch.tensor([[0.0, 1], [3, 4], [9, 9]])
    assert measures.nearest_distances(features, others).tolist() == pytest.approx([1, 0, 6.7082])
    assert measures.nearest_distances(features, features).tolist() == [0, 0, 0]
