import reparam
import vae

import pytest
import torch
from torch.distributions import Normal, kl_divergence


@pytest.fixture
def model():
    torch.manual_seed(0)
    return vae.VAE()


@pytest.fixture
def x():
    return torch.rand(6, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def test_the_papers_network(model):
    shapes = [tuple(p.shape) for p in model.parameters()]
    assert shapes == [(512, 3072), (512,), (256, 512), (256,), (512, 128), (512,), (3072, 512), (3072,)]
    h = torch.rand(2, 3, 32, 32)
    w = [p.detach() for p in model.parameters()]
    hidden = (h.flatten(1) @ w[0].T + w[1]).clamp(min=0) @ w[2].T + w[3]
    torch.testing.assert_close(torch.cat(model.encode(h), 1), hidden)
    z = torch.randn(2, 128)
    xhat = ((z @ w[4].T + w[5]).clamp(min=0) @ w[6].T + w[7]).sigmoid().view(2, 3, 32, 32)
    torch.testing.assert_close(model.decode(z), xhat)


def test_the_papers_objective(model, x):
    """Squared error plus KL for each image, against torch.distributions and the same noise."""
    seed = torch.tensor(5)
    terms = model(x, seed, 40)
    mu, logvar = model.encode(x)
    eps = reparam.normals_from_words(reparam.words(6, 32, seed, 40), torch.float32).flatten(1)
    z = mu + logvar.mul(0.5).exp() * eps
    kl = kl_divergence(Normal(mu, logvar.mul(0.5).exp()), Normal(0.0, 1.0)).sum(1)
    error = (x - model.decode(z)).pow(2).sum((1, 2, 3))
    torch.testing.assert_close(terms.rate, kl)
    torch.testing.assert_close(terms.distortion, error)
    torch.testing.assert_close(terms.sse, error)


def test_rows_apart_equal_rows_together(model, x):
    seed = torch.tensor(9)
    whole, first, second = model(x, seed), model(x[:2], seed, 0), model(x[2:], seed, 2)
    for a, b, c in zip(whole, first, second, strict=True):
        torch.testing.assert_close(a, torch.cat([b, c]))
    assert not torch.allclose(model(x, torch.tensor(10)).sse, whole.sse)


def test_training_lowers_both_terms_of_the_loss(model, x):
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    losses = []
    for step in range(60):
        terms = model(x, torch.tensor(step))
        losses.append((terms.distortion + terms.rate).mean())
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < 0.6 * losses[0]


def test_class_means(model):
    images = torch.randint(0, 256, (7, 3, 32, 32), dtype=torch.uint8)
    labels = torch.tensor([0, 1, 0, 0, 1, 2, 2])
    means = vae.class_means(model, images, labels, 3, batch_size=2)
    mu = model.encode(images / 255)[0].double().detach()
    for c in range(3):
        torch.testing.assert_close(means[c], mu[labels == c].mean(0), rtol=1e-5, atol=1e-6)


def test_noise_of_an_image_depends_on_its_number_alone():
    whole = vae.noise(64, 128, seed=3)
    assert whole[7:9].equal(vae.noise(2, 128, seed=3, first=7))
    assert whole[:5].equal(vae.noise(5, 128, seed=3))
    assert not whole.equal(vae.noise(64, 128, seed=4))
    assert abs(whole.mean()) < 0.05
    assert abs(whole.std() - 1) < 0.05
