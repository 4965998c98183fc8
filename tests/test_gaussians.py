"""The Gaussians of classes' latents: their fit, their products, their samples."""
import reparam
import vae
from pegasus.cli import UserError
from pegasus.models import gaussians
from pegasus.models.gaussians import Gaussian

import pytest
import torch
from torch import Tensor
from torch.distributions import MultivariateNormal

CLASSES = ("horse", "bird")


def random_gaussian(d: int, seed: int) -> Gaussian:
    g = torch.Generator().manual_seed(seed)
    a = torch.randn(d, 2 * d, generator=g, dtype=torch.float64)
    mean = torch.randn(d, generator=g, dtype=torch.float64)
    return Gaussian(mean, a @ a.T / (2 * d))


def log_density(gaussian: Gaussian, z: Tensor) -> Tensor:
    return MultivariateNormal(*gaussian).log_prob(z)


def within(variance: Tensor) -> Tensor:
    """Return the mean of diagonal covariances (n, d)."""
    return variance.double().mean(0).diag()


def test_fit_is_the_mixture_of_the_posteriors_where_images_are_many():
    """Mean and covariance of samples of the posteriors themselves, a thousand of each."""
    g = torch.Generator().manual_seed(1)
    mix = torch.tensor([[1.0, 0.5, 0], [0, 1, 0.7], [0, 0, 0.3]])
    mu = torch.randn(4000, 3, generator=g) @ mix + 2
    variance = torch.rand(4000, 3, generator=g)
    mean, covariance = gaussians.aggregate(mu.double(), within(variance))
    eps = torch.randn(1000, *mu.shape, generator=g)
    z = (mu + variance.sqrt() * eps).flatten(0, 1).double()
    torch.testing.assert_close(mean, z.mean(0), rtol=0, atol=3e-3)
    torch.testing.assert_close(covariance, z.T.cov(correction=0), rtol=0, atol=6e-3)
    assert covariance.dtype == torch.float64


def test_few_images_claim_less():
    """Off the diagonal n / (n + d) of what was seen; the variances stay.

    Fewer images than dimensions will do.
    """
    mu = torch.randn(6, 24, generator=torch.Generator().manual_seed(2))
    variance = torch.full((6, 24), 0.01)
    mean, covariance = gaussians.aggregate(mu.double(), within(variance))
    seen = mu.double().T.cov(correction=0)
    off = ~torch.eye(24, dtype=torch.bool)
    torch.testing.assert_close(covariance[off], seen[off] / 5)
    torch.testing.assert_close(covariance.diagonal(), seen.diagonal() + 0.01)
    assert torch.linalg.eigvalsh(covariance).min() > 0.01
    z = gaussians.sample(Gaussian(mean, covariance), torch.randn(3, 24))
    assert z.isfinite().all()


def test_classes_and_coats():
    """One pass gives what each class's own images give.

    The white quarter is the one with the brightest middle.
    """
    torch.manual_seed(0)
    model = vae.VAE(latent=(8,))
    images = torch.randint(0, 256, (40, 3, 32, 32), dtype=torch.uint8)
    labels = torch.arange(40) % 2
    images[::2] = images[::2] // 2
    white = [6, 8, 20, 30, 38]
    images[white, :, 10:22, 8:24] = 250
    fitted = gaussians.fit_classes(model, images, labels, CLASSES, batch_size=7)
    assert list(fitted) == ["horse", "bird", "white horse", "dark horse"]
    rows_of = {"horse": slice(0, 40, 2), "bird": slice(1, 40, 2), "white horse": white}
    for name, rows in rows_of.items():
        mu, logvar = model.encode(images[rows] / 255)
        alone = gaussians.aggregate(mu.detach().double(), within(logvar.detach().exp()))
        for got, wanted in zip(fitted[name], alone, strict=True):
            torch.testing.assert_close(got, wanted.float())
            assert got.dtype == torch.float32
    dark = fitted["dark horse"][0]
    assert not dark.allclose(fitted["white horse"][0], atol=1e-3)


@pytest.mark.parametrize("blend", [0.0, 0.3, 1.0])
def test_product_is_the_product_of_the_densities(blend):
    """Against torch.distributions: the logarithms differ by one number for every z."""
    first = random_gaussian(5, 1)
    second = random_gaussian(5, 2)
    z = torch.randn(20, 5, dtype=torch.float64) * 3
    wanted = blend * log_density(first, z) + (1 - blend) * log_density(second, z)
    got = log_density(gaussians.product(first, second, blend), z)
    difference = got - wanted
    constant = difference[:1].expand(20)
    torch.testing.assert_close(difference, constant, rtol=0, atol=1e-9)


def test_samples_have_the_moments_and_rows_their_own_noise():
    gaussian = random_gaussian(4, 3)
    eps = reparam.normals(200_000, 4, seed=1)
    for temperature in (1.0, 0.5):
        z = gaussians.sample(gaussian, eps, temperature).double()
        wanted = gaussian.covariance * temperature**2
        torch.testing.assert_close(z.mean(0), gaussian.mean, rtol=0, atol=0.02)
        torch.testing.assert_close(z.T.cov(), wanted, rtol=0, atol=0.03)
    few = gaussians.sample(gaussian, eps[:3])
    assert few.equal(gaussians.sample(gaussian, eps[:1000])[:3])


def test_a_model_that_diverged_is_said_to_have():
    nan = torch.full((3, 3), float("nan"))
    with pytest.raises(UserError, match="--lr"):
        gaussians.root(Gaussian(torch.zeros(3), nan))


def test_what_a_checkpoint_must_hold():
    """Gaussians of all classes and coats, or none where a flow prior draws; their shapes."""
    whole = dict.fromkeys(("horse", "bird", "white horse", "dark horse"), random_gaussian(3, 1))
    gaussians.check(whole, CLASSES, 3, optional=False)
    gaussians.check({}, CLASSES, 3, optional=True)
    less = {name: whole[name] for name in ("horse", "bird")}
    for fitted, optional in (({}, False), (less, False), (less, True)):
        with pytest.raises(ValueError, match="Gaussians"):
            gaussians.check(fitted, CLASSES, 3, optional)
    with pytest.raises(ValueError, match="shapes"):
        gaussians.check(whole, CLASSES, 4, optional=False)
    for classes in (("horse", "a,b"), ("horse", "prior"), ("horse", "horse")):
        with pytest.raises(ValueError, match="classes horse, "):
            gaussians.check({}, classes, 3, optional=True)
