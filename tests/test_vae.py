"""The model and its objective, against the formulas written out and torch.distributions."""
import math

import reparam
import vae

import pytest
import torch
from conftest import IMAGE_SHAPE, IMAGE_VALUES
from torch import Tensor
from torch.distributions import Normal, kl_divergence


@pytest.fixture
def model() -> vae.VAE:
    torch.manual_seed(0)
    return vae.VAE()


@pytest.fixture
def x() -> Tensor:
    return torch.rand(6, *IMAGE_SHAPE, generator=torch.Generator().manual_seed(1))


def test_the_papers_network(model):
    shapes = [tuple(p.shape) for p in model.parameters()]
    encoder = [(512, 3072), (512,), (256, 512), (256,)]
    decoder = [(512, 128), (512,), (3072, 512), (3072,)]
    assert shapes == encoder + decoder
    h = torch.rand(2, *IMAGE_SHAPE)
    w = [p.detach() for p in model.parameters()]
    hidden = (h.flatten(1) @ w[0].T + w[1]).clamp(min=0)
    wanted = hidden @ w[2].T + w[3]
    torch.testing.assert_close(torch.cat(model.encode(h), 1), wanted)
    z = torch.randn(2, 128)
    hidden = (z @ w[4].T + w[5]).clamp(min=0)
    xhat = (hidden @ w[6].T + w[7]).sigmoid().view(2, *IMAGE_SHAPE)
    torch.testing.assert_close(model.decode(z), xhat)


def test_the_papers_objective(model, x):
    """Squared error plus KL of each image, against torch.distributions and the same noise."""
    seed = torch.tensor(5)
    terms = model(x, seed, 40)
    mu, logvar = model.encode(x)
    std = (logvar / 2).exp()
    words = reparam.words(6, 32, seed, 40)
    eps = reparam.normals_from_words(words, torch.float32).flatten(1)
    kl = kl_divergence(Normal(mu, std), Normal(0.0, 1.0)).sum(1)
    error = (x - model.decode(mu + std * eps)).pow(2).sum((1, 2, 3))
    torch.testing.assert_close(terms.rate, kl)
    torch.testing.assert_close(terms.sse, error)
    whatever = torch.tensor(0.1)  # the paper's objective has no variance
    torch.testing.assert_close(model.distortion(terms.sse, whatever), error)


def test_the_gaussian_likelihood_is_a_normal_density(x):
    xhat = torch.rand_like(x)
    variance = torch.tensor(0.03)
    sse = (x - xhat).square().sum((1, 2, 3))
    density = Normal(xhat, variance.sqrt()).log_prob(x).sum((1, 2, 3))
    torch.testing.assert_close(vae.gaussian_nll(sse, variance, IMAGE_VALUES), -density)
    model = vae.VAE("mlp", "gaussian", (3,))
    torch.testing.assert_close(model.distortion(sse, variance), -density)
    few = (x - xhat).flatten(1)[:, :7]  # of which an image has no more
    density = Normal(0.0, variance.sqrt()).log_prob(few).sum(1)
    nll = vae.gaussian_nll(few.square().sum(1), variance, 7)
    torch.testing.assert_close(nll, -density)


def test_the_mean_squared_error_is_the_best_variance(x):
    sse = (x - torch.rand_like(x)).square().sum((1, 2, 3))
    best = sse.mean() / IMAGE_VALUES
    least = vae.gaussian_nll(sse, best, IMAGE_VALUES).mean()
    for factor in (0.99, 1.01):
        assert vae.gaussian_nll(sse, best * factor, IMAGE_VALUES).mean() > least


def test_bits_per_dim_of_a_known_code():
    """A byte costs its Gaussian's entropy and the log of how many bins it has; so does z."""
    variance = torch.tensor(0.01)
    sse = IMAGE_VALUES * variance
    entropy = Normal(0.0, variance.sqrt()).entropy()
    expected = (entropy + math.log(255)) / math.log(2)
    bits = vae.bits_per_dim(sse, torch.tensor(0.0), variance, IMAGE_VALUES)
    torch.testing.assert_close(bits, expected)
    rate = torch.tensor(IMAGE_VALUES * math.log(2))  # a bit for each value
    bits = vae.bits_per_dim(sse, rate, variance, IMAGE_VALUES)
    torch.testing.assert_close(bits, expected + 1)


def test_bits_per_dim_of_images(x):
    """-log2 of each byte's density times 1/255, in float64, and the rate's bits."""
    xhat = torch.rand_like(x)
    variance = torch.tensor(0.03)
    rate = torch.linspace(0, 5000, 6)
    normal = Normal(xhat.double(), variance.double().sqrt())
    probability = normal.log_prob(x.double()).exp() / 255
    bits = -probability.log2().flatten(1).sum(1) + rate.double() / math.log(2)
    wanted = bits / (3 * 32 * 32)
    sse = (x - xhat).square().sum((1, 2, 3))
    got = vae.bits_per_dim(sse, rate, variance, IMAGE_VALUES)
    torch.testing.assert_close(got.double(), wanted)
    assert vae.bits_of_nats(0.0, IMAGE_VALUES) == pytest.approx(math.log2(255))  # a density of one


@pytest.mark.parametrize(("arch", "latent"), [("mlp", (7,)), ("conv", (2, 8, 8))])
def test_a_centered_encoder_gets_pictures_less_a_half(arch, latent, x):
    """The decoder and the error know nothing of it."""
    centered = vae.VAE(arch, "gaussian", latent, center=True)
    plain = vae.VAE(arch, "gaussian", latent)
    plain.load_state_dict(centered.state_dict())
    mu, logvar = centered.encode(x)
    wanted_mu, wanted_logvar = plain.encode(x - 0.5)
    assert mu.equal(wanted_mu)
    assert logvar.equal(wanted_logvar)
    assert not mu.allclose(plain.encode(x)[0], atol=1e-3)
    assert centered.reconstruct(x).equal(plain.decode(mu))
    eps = reparam.normals(6, centered.latent_size, 4)
    xhat = plain.decode(mu + (logvar / 2).exp() * eps)
    sse = (x - xhat).square().sum((1, 2, 3))
    torch.testing.assert_close(centered(x, torch.tensor(4)).sse, sse)


@pytest.mark.parametrize("latent", [(128,), (7,), (8, 8, 8), (3, 8, 8)])
def test_conv_shapes_and_gradients(latent, x):
    model = vae.VAE("conv", "gaussian", latent)
    mu, logvar = model.encode(x)
    assert mu.shape == logvar.shape == (6, math.prod(latent))
    assert (model.latent_shape, model.latent_size) == (latent, math.prod(latent))
    assert model.decode(mu).shape == x.shape
    terms = model(x, torch.tensor(1))
    (model.distortion(terms.sse, torch.tensor(0.05)) + terms.rate).sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())


def test_a_grids_latents_lie_where_they_are_in_the_picture():
    model = vae.VAE("conv", "gaussian", (4, 8, 8))
    z = torch.zeros(1, 256)
    changed = z.clone()
    changed.view(4, 8, 8)[:, 0, 0] = 3
    difference = (model.decode(changed) - model.decode(z)).abs().sum((0, 1))
    near = difference[:8, :8].mean()
    far = difference[16:, 16:].mean()  # normalization reaches everywhere
    assert near > 2 * far


def test_reconstructions_and_moments(model, x):
    mu, logvar = model.encode(x)
    assert model.reconstruct(x).equal(model.decode(mu))
    mean, covariance = model.posterior_moments(x)
    assert mean.equal(mu)
    torch.testing.assert_close(covariance, torch.diag(logvar.double().exp().mean(0)))


def test_bytes_become_numbers_between_0_and_1():
    images = torch.arange(256, dtype=torch.uint8)
    x = vae.from_bytes(images)
    assert x.dtype == torch.float32
    torch.testing.assert_close(x.double() * 255, torch.arange(256).double())
    assert images.equal(torch.arange(256, dtype=torch.uint8))
