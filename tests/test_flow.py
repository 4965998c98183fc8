import math

import density
import evaluate
import flow
import sample
import train
import vae

import pytest
import torch
from torch.distributions import MultivariateNormal, kl_divergence


def units(n=5, t=3, d=7, seed=0):
    return flow.unit(torch.randn(n, t, d, generator=torch.Generator().manual_seed(seed)))


def matrices(vectors):
    """The product of I - 2 u u' for each row of vectors (n, T, d), the last one leftmost."""
    eye = torch.eye(vectors.shape[2], dtype=vectors.dtype)
    whole = eye.expand(len(vectors), -1, -1)
    for u in vectors.unbind(1):
        whole = (eye - 2 * u[:, :, None] * u[:, None, :]) @ whole
    return whole


def test_reflections_are_householders_matrices():
    z, u = torch.randn(5, 7), units()
    torch.testing.assert_close(flow.reflect(z, u), (matrices(u) @ z[:, :, None])[:, :, 0])


@pytest.mark.parametrize("length", [1.0, 1e-30, 1e30])
def test_the_norm_is_kept_and_each_step_is_its_own_inverse(length):
    z = torch.randn(64, 128)
    u = flow.unit(length * torch.randn(64, 4, 128))
    torch.testing.assert_close(flow.reflect(z, u).norm(dim=1), z.norm(dim=1))
    torch.testing.assert_close(flow.reflect(flow.reflect(z, u[:, :1]), u[:, :1]), z)
    torch.testing.assert_close(flow.reflect(flow.reflect(z, u), u.flip(1)), z)
    assert not flow.reflect(z, u).allclose(z, atol=0.1)


def test_no_direction_reflects_nothing():
    z = torch.randn(2, 4)
    assert flow.reflect(z, flow.unit(torch.zeros(2, 1, 4))).equal(z)


@pytest.mark.parametrize("t", [0, 1, 3])
def test_mean_covariance(t):
    u, variance = units(t=t).double(), torch.rand(5, 7, dtype=torch.float64)
    h = matrices(u)
    torch.testing.assert_close(flow.mean_covariance(variance, u), (h @ variance.diag_embed() @ h.mT).mean(0))


@pytest.mark.parametrize(("arch", "latent"), [("mlp", "12"), ("conv", "12"), ("conv", "8x8x2")])
def test_model(arch, latent):
    """The rate is the divergence of the reflected Gaussian, and every weight is trained."""
    torch.manual_seed(0)
    model = vae.VAE(arch, "gaussian", latent, reflections=3)
    x = torch.rand(2, 3, 32, 32)
    terms = model(x, torch.tensor(2))
    mu, logvar, u = model.posterior(x)
    h, prior = matrices(u), MultivariateNormal(torch.zeros(model.latent), torch.eye(model.latent))
    covariance = h @ logvar.exp().diag_embed() @ h.mT
    posterior = MultivariateNormal((h @ mu[:, :, None])[:, :, 0], (covariance + covariance.mT) / 2)
    torch.testing.assert_close(terms.rate, kl_divergence(posterior, prior), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(model.reconstruct(x), model.decode(posterior.mean), rtol=1e-4, atol=1e-4)
    assert model.given(x)[0].decode(mu).equal(model.reconstruct(x))
    assert not model.decode(mu).allclose(model.reconstruct(x), atol=1e-3)
    terms.sse.sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.flow.parameters())


def test_what_is_fitted_is_behind_the_flow():
    """Mean and covariance of many samples of the posteriors themselves."""
    torch.manual_seed(1)
    model = vae.VAE(latent="6", reflections=2)
    torch.nn.init.normal_(model.encoder[-1].weight, std=0.1)
    images = torch.randint(0, 256, (20, 3, 32, 32), dtype=torch.uint8)
    labels = torch.zeros(20, dtype=torch.int64)
    fitted = density.Gaussian(*density.fit_classes(model, images, labels, ("horse",))["horse"])
    with torch.no_grad():
        before, logvar, u = model.posterior(images / 255)
    z = flow.reflect((before + (logvar / 2).exp() * torch.randn(20_000, 20, 6)).flatten(0, 1),
                     u.repeat(20_000, 1, 1)).double()
    off = flow.reflect(before, u).double().T.cov(correction=0)
    unshrunk = fitted.covariance + (off - off.diagonal().diag()) * (1 - 20 / 26)
    scale = math.sqrt(z.var(0).mean())
    torch.testing.assert_close(fitted.mean.double() / scale, z.mean(0) / scale, rtol=0, atol=0.01)
    torch.testing.assert_close(unshrunk / scale**2, z.T.cov() / scale**2, rtol=0, atol=0.02)


def test_a_run_with_a_flow(batches, tmp_path, complaint):
    argv = ["--run", str(tmp_path / "r"), "--arch", "mlp", "--no-judge"]
    train.main([*argv, "--data", str(batches), "--epochs", "1", "--flow", "2"])
    train.main([*argv, "--resume", "--epochs", "2"])
    found = sample.load(tmp_path / "r" / "last.pt")
    assert len(found.model.flow.layers) == 2
    assert sample.draw(found).shape == (64, 3, 32, 32)
    assert "--flow: got 1" in complaint(train.main, *argv, "--resume", "--flow", 1)
    x = torch.rand(4, 3, 32, 32)
    weights = evaluate.samples(found.model, x, 200, seed=0)[2]
    with torch.no_grad():
        terms = [found.model(x, torch.tensor(seed)) for seed in range(200)]
    rate, sse = (torch.stack(part).double().mean(0) for part in zip(*terms, strict=True))
    like = vae.gaussian(sse, found.model.variance.double()) + vae.PIXELS * math.log(255)  # bins of 1/255
    torch.testing.assert_close(weights.mean(0), -rate - like, rtol=0.01, atol=0)
