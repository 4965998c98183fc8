import math

import reparam
import vae
from options import Fault

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
    torch.testing.assert_close(terms.sse, error)
    torch.testing.assert_close(model.distortion(terms.sse, torch.tensor(0.1)), error)  # whatever the variance


def test_the_calibrated_likelihood_is_a_normal_density(x):
    xhat, variance = torch.rand_like(x), torch.tensor(0.03)
    sse = (x - xhat).square().sum((1, 2, 3))
    density = Normal(xhat, variance.sqrt()).log_prob(x).sum((1, 2, 3))
    torch.testing.assert_close(vae.gaussian(sse, variance), -density)
    best = sse.mean() / vae.PIXELS  # the batch's mean squared error is the variance with the least distortion
    for other in (0.99, 1.01):
        assert vae.gaussian(sse, best * other).mean() > vae.gaussian(sse, best).mean()


def test_bits_per_dim_of_a_known_code():
    """A pixel of variance s^2 known to within 1/255... costs its Gaussian's entropy plus 8 bits; the rate adds."""
    variance = torch.tensor(0.01)
    sse = vae.PIXELS * variance
    entropy = Normal(0.0, variance.sqrt()).entropy()
    expected = (entropy + math.log(256)) / math.log(2)
    torch.testing.assert_close(vae.bits_per_dim(sse, torch.tensor(0.0), variance), expected)
    more = vae.bits_per_dim(sse, torch.tensor(vae.PIXELS * math.log(2)), variance)
    torch.testing.assert_close(more, expected + 1)


@pytest.mark.parametrize("latent", ["128", "7", "8x8x8", "8x8x3"])
def test_conv_shapes_and_gradients(latent, x):
    model = vae.VAE("conv", "gaussian", latent)
    mu, logvar = model.encode(x)
    size = math.prod(int(part) for part in latent.split("x"))
    assert mu.shape == logvar.shape == (6, size)
    assert model.decode(mu).shape == x.shape
    terms = model(x, torch.tensor(1))
    (model.distortion(terms.sse, torch.tensor(0.05)) + terms.rate).sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())


def test_a_grids_latents_lie_where_they_are_in_the_picture(x):
    model = vae.VAE("conv", "gaussian", "8x8x4")
    z = torch.zeros(1, 256)
    changed = z.clone()
    changed.view(4, 8, 8)[:, 0, 0] = 3
    difference = (model.decode(changed) - model.decode(z)).abs().sum((0, 1))
    assert difference[:8, :8].mean() > 2 * difference[16:, 16:].mean()  # normalisation reaches everywhere


@pytest.mark.parametrize("latent", ["", "0", "x", "8x8", "8x8x0", "4x4x8", "-3", "8x8x8x8", "many", "99999999999",
                                    "8x8x99999999"])
def test_latents_that_make_no_sense(latent):
    with pytest.raises(Fault, match="--latent"):
        vae.VAE("conv", "gaussian", latent)


def test_a_grid_needs_the_convolutional_network():
    with pytest.raises(Fault, match="--arch conv"):
        vae.VAE("mlp", "mse", "8x8x8")


@pytest.mark.parametrize("arch", ["mlp", "conv"])
def test_a_copy_with_bfloat16_weights_encodes_with_them(arch, x):
    """Though the encoder is kept split in two beside itself."""
    half = vae.fused.bfloat16_copy(vae.VAE(arch, latent="8"))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        before = half.encode(x)[0]
        half.encoder[-1].bias += 1
        torch.testing.assert_close(half.encode(x)[0], before + 1, rtol=0.02, atol=0.02)
