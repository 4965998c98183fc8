import density
import vae
from options import Fault
from density import Gaussian

import pytest
import torch
from torch.distributions import MultivariateNormal


def random(d, seed):
    g = torch.Generator().manual_seed(seed)
    a = torch.randn(d, 2 * d, generator=g, dtype=torch.float64)
    return Gaussian(torch.randn(d, generator=g, dtype=torch.float64), a @ a.T / (2 * d))


def normal(gaussian):
    return MultivariateNormal(*gaussian)


def test_fit_is_the_mixture_of_the_posteriors_where_images_are_many():
    """Mean and covariance of draws from the posteriors themselves, a thousand of each."""
    g = torch.Generator().manual_seed(1)
    mu = torch.randn(4000, 3, generator=g) @ torch.tensor([[1.0, 0.5, 0], [0, 1, 0.7], [0, 0, 0.3]]) + 2
    variance = torch.rand(4000, 3, generator=g)
    mean, covariance = density.aggregate(mu.double(), variance.double().mean(0).diag())
    z = (mu + variance.sqrt() * torch.randn(1000, *mu.shape, generator=g)).flatten(0, 1).double()
    torch.testing.assert_close(mean, z.mean(0), rtol=0, atol=3e-3)
    torch.testing.assert_close(covariance, z.T.cov(correction=0), rtol=0, atol=6e-3)
    assert covariance.dtype == torch.float64


def test_few_images_claim_less():
    """Off the diagonal n / (n + d) of what was seen; the variances stay, and fewer images than dimensions will do."""
    g = torch.Generator().manual_seed(2)
    mu, variance = torch.randn(6, 24, generator=g), torch.full((6, 24), 0.01)
    mean, covariance = density.aggregate(mu.double(), variance.double().mean(0).diag())
    seen = mu.double().T.cov(correction=0)
    off = ~torch.eye(24, dtype=torch.bool)
    torch.testing.assert_close(covariance[off], seen[off] / 5)
    torch.testing.assert_close(covariance.diagonal(), seen.diagonal() + 0.01)
    assert torch.linalg.eigvalsh(covariance).min() > 0.01
    assert torch.isfinite(density.draw(Gaussian(mean, covariance), torch.randn(3, 24))).all()


def test_classes_and_coats():
    """One pass gives what each class's own images give; the white quarter is the one with the brightest middle."""
    torch.manual_seed(0)
    model = vae.VAE(latent="8")
    images = torch.randint(0, 256, (40, 3, 32, 32), dtype=torch.uint8)
    labels = torch.arange(40) % 2
    images[::2] = images[::2] // 2
    white = [6, 8, 20, 30, 38]
    images[white, :, 10:22, 8:24] = 250
    fitted = density.fit_classes(model, images, labels, ("horse", "bird"), batch_size=7)
    assert list(fitted) == ["horse", "bird", "white horse", "dark horse"]
    for name, rows in (("horse", slice(0, 40, 2)), ("bird", slice(1, 40, 2)), ("white horse", white)):
        mu, logvar = (part.detach() for part in model.encode(images[rows] / 255))
        alone = density.aggregate(mu.double(), logvar.exp().double().mean(0).diag())
        for got, wanted in zip(fitted[name], alone, strict=True):
            torch.testing.assert_close(got, wanted.float())
            assert got.dtype == torch.float32
    assert not fitted["dark horse"][0].allclose(fitted["white horse"][0], atol=1e-3)


@pytest.mark.parametrize("blend", [0.0, 0.3, 1.0])
def test_product_is_the_product_of_the_densities(blend):
    """Against torch.distributions: the logarithms differ by one number, the same for every z."""
    first, second = random(5, 1), random(5, 2)
    z = torch.randn(20, 5, dtype=torch.float64) * 3
    wanted = blend * normal(first).log_prob(z) + (1 - blend) * normal(second).log_prob(z)
    difference = normal(density.product(first, second, blend)).log_prob(z) - wanted
    torch.testing.assert_close(difference, difference[:1].expand(20), rtol=0, atol=1e-9)


def test_draws_have_the_moments_and_rows_their_own_noise():
    gaussian = random(4, 3)
    eps = vae.noise(200_000, 4, seed=1)
    for temperature in (1.0, 0.5):
        z = density.draw(gaussian, eps, temperature).double()
        torch.testing.assert_close(z.mean(0), gaussian.mean, rtol=0, atol=0.02)
        torch.testing.assert_close(z.T.cov(), gaussian.covariance * temperature**2, rtol=0, atol=0.03)
    assert density.draw(gaussian, eps[:3]).equal(density.draw(gaussian, eps[:1000])[:3])


def test_a_model_that_diverged_is_said_to_have():
    with pytest.raises(Fault, match="--lr"):
        density.root(Gaussian(torch.zeros(3), torch.full((3, 3), float("nan"))))
