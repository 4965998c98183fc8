"""Likelihoods against closed forms."""
import math
from types import SimpleNamespace

import vae
from pegasus import likelihoods
from pegasus.drawing import sampler
from pegasus.drawing.sampler import SampleConfig
from pegasus.models import flow_prior
from pegasus.models.flow_prior import FlowPrior
from pegasus.models.variants import Component

import pytest
import torch
from conftest import ROOT
from torch import nn
from torch.distributions import MultivariateNormal, Normal


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

    monkeypatch.setattr(likelihoods, "components", components)
    model = SimpleNamespace(variance=variance)
    return model, MultivariateNormal(b, w @ w.T + variance * torch.eye(pixels))


def test_on_a_linear_gaussian_model_the_bound_is_the_exact_density(monkeypatch):
    model, exact = linear_model(monkeypatch, spread=1.5)
    x = exact.sample((40,))
    log_p = exact.log_prob(x)
    samples = likelihoods.posterior_samples(model, x, 3000, 1)
    weights = samples.log_weight
    torch.testing.assert_close(samples.elbo, weights)  # without a code
    bound = likelihoods.importance_weighted(weights)
    torch.testing.assert_close(bound.mean(), log_p.double().mean(), rtol=0, atol=0.01)
    assert (bound >= weights.mean(0)).all()  # Jensen
    assert (weights.mean(0) < log_p - 0.05).all()  # so that there was something to close
    fewer = []
    for k in (1, 10, 100, 3000):
        groups = weights.view(-1, k, 40).transpose(0, 1)
        fewer.append(likelihoods.importance_weighted(groups).mean())
    assert fewer == sorted(fewer)


def test_the_likelihood_of_an_image():
    x, xhat = torch.rand(2, 5, 3, 4, 4)
    variance = torch.tensor(0.04)
    wanted = Normal(xhat, 0.2).log_prob(x).sum((1, 2, 3))
    torch.testing.assert_close(likelihoods.log_likelihood(x, xhat, variance), wanted)


def test_monte_carlo_on_a_linear_gaussian_model_to_its_own_standard_error():
    """x = 2 z + 1 + noise: P(x) is N(1, 4 + variance). Over 300 sets of samples."""
    g = torch.Generator().manual_seed(3)
    variance = torch.tensor(0.5)
    x = torch.tensor([[1.0], [2.5], [-4.0]])
    exact = Normal(1.0, math.sqrt(4.5)).log_prob(x[:, 0].double())
    deviations = []
    for _ in range(300):
        xhat = 2 * torch.randn(1000, 1, generator=g) + 1
        log_p = likelihoods.log_densities(x, xhat, variance)
        mean = likelihoods.monte_carlo(log_p).log_p
        standard_error = (log_p - mean).exp().std(0) / math.sqrt(1000)
        deviations.append((mean - exact) / standard_error)
    deviations = torch.stack(deviations)
    assert (deviations.mean(0).abs() < 0.25).all()
    assert ((deviations.std(0) > 0.85) & (deviations.std(0) < 1.2)).all()


def test_how_many_samples_of_monte_carlo_count():
    """All of them where they are alike, one where the others are far off."""
    x = torch.zeros(1, 4)
    one = torch.tensor(1.0)
    alike = likelihoods.monte_carlo(likelihoods.log_densities(x, torch.ones(50, 4), one))
    assert alike.effective_samples.item() == pytest.approx(50)
    far = torch.full((50, 4), 100.0)
    far[7] = 0
    single = likelihoods.monte_carlo(likelihoods.log_densities(x, far, one))
    assert single.effective_samples.item() == pytest.approx(1)
    wanted = -2 * math.log(2 * math.pi) - math.log(50)
    assert single.log_p.item() == pytest.approx(wanted)


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
    log_p = flow_prior.log_density(prior, z)
    wanted = exact.log_prob(z).sum(1).double()
    torch.testing.assert_close(log_p, wanted, rtol=0, atol=0.01)


def test_the_flows_likelihood_sums_to_one():
    prior = toy_prior(Waves(), 1)
    grid = torch.linspace(-6, 6, 4001)[:, None]
    density = flow_prior.log_density(prior, grid, steps=48).exp()
    total = density.sum().item() * 12 / 4000
    assert total == pytest.approx(1, abs=5e-4)
    assert density.max() > 1.5 * density.median()  # nothing flat


def test_the_learned_prior_finds_what_it_draws_more_probable():
    """Than N(0, I) does: by hundreds of nats, the KL's excess over the flow's rate."""
    model = sampler.load(ROOT / "pegasus.pt")
    images = sampler.sample(model, SampleConfig(mode="prior", n=6))
    _, rate = likelihoods.flow_terms(model, images, seed=0)
    with torch.no_grad():
        terms = model.model(images, torch.tensor(0))
    assert (rate < terms.rate - 50).all()
    assert (rate > terms.rate / 2).all()


def test_the_elbo_of_a_perfect_prior_is_that_of_n01(monkeypatch):
    """Where the flow's likelihood is that of N(0, I), both ELBOs are one, to noise."""
    torch.manual_seed(0)
    network = vae.VAE(latent=(8,))
    network.variance.fill_(0.05)

    def log_density(prior, z, seed):
        return -(z.double().square() + math.log(2 * math.pi)).sum(1) / 2

    monkeypatch.setattr(likelihoods.flow_prior, "log_density", log_density)
    x = torch.rand(20, 3, 32, 32)
    model = SimpleNamespace(model=network, prior=None)
    flow = torch.stack([likelihoods.flow_terms(model, x, seed) for seed in range(200)])
    elbo, _, rate, _ = likelihoods.autoencoder_terms(network, x, 200, 7)
    assert flow[:, 1].mean().item() == pytest.approx(rate.mean().item(), abs=0.02)
    flow_elbo = flow[:, 0].mean(1)
    error = flow_elbo.std().item() / math.sqrt(200)
    assert error < 1
    assert flow_elbo.mean().item() == pytest.approx(elbo.mean().item(), abs=5 * error)
