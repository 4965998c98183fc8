"""Gaussians in the latent space, fitted to what a trained encoder makes of the photographs of each class.

What the encoder makes of all horses together, its aggregate posterior, is not N(0, I): draws from the prior land where
no photograph lies. Mean and covariance of the aggregate are had in one pass, without optimisation, and two classes
multiply in closed form.
"""
from typing import NamedTuple

import flow
import vae
from options import Fault

import torch
from torch import Tensor

CENTRE = (..., slice(10, 22), slice(8, 24))  # where the body is in most photographs of horses
COATS = ("white", "dark")


class Gaussian(NamedTuple):
    """N(mean, covariance): (d,) and (d, d)."""
    mean: Tensor
    covariance: Tensor


def fit(mu: Tensor, covariance: Tensor) -> Gaussian:
    """The aggregate posterior of n images: their posterior means (n, d), and the mean of their covariances (d, d).

    m = mean mu, S = cov(mu) + mean covariance, in float64. cov(mu) off its diagonal is taken n / (n + d) times, as if d
    further images had shown none: few images would otherwise claim directions in which they never vary.
    """
    n, d = mu.shape
    mean = mu.double().mean(0)
    centred = mu.double() - mean
    between = centred.T @ centred / n
    shrunk = (between * (n / (n + d))).diagonal_scatter(between.diagonal())
    return Gaussian(mean, shrunk + covariance)


def brightness(images: Tensor) -> Tensor:
    """Mean over the central pixels, where the body is, of images (n, 3, 32, 32); float32 (n,)."""
    return images[CENTRE].float().flatten(1).mean(1)


@torch.no_grad()
def encode(model: vae.VAE, images: Tensor, batch_size: int = 1000) -> tuple[Tensor, Tensor, Tensor]:
    """The posteriors of images (n, 3, 32, 32) of bytes, on the CPU.

    Means (n, latent), behind the flow; before it, variances (n, latent); its unit vectors (n, T, latent). float32.
    """
    parts = [model.posterior(vae.from_bytes(part)) for part in images.split(batch_size)]
    mu, logvar, units = (torch.cat(part).cpu() for part in zip(*parts, strict=True))
    return flow.reflect(mu, units), logvar.exp(), units


def fit_classes(model: vae.VAE, images: Tensor, labels: Tensor, classes: tuple[str, ...]) -> dict[str, list[Tensor]]:
    """Mean and covariance, float32, of each class, and of the first class's "white" and "dark" quarters.

    images: bytes (n, 3, 32, 32); labels: (n,), positions in `classes`. One pass of the encoder.
    """
    mu, variance, units = encode(model, images)
    rows = {name: (labels == i).nonzero()[:, 0] for i, name in enumerate(classes)}
    first = rows[classes[0]]
    order = first[brightness(images[first]).argsort(stable=True)]
    quarter = max(len(order) // 4, 1)
    rows |= {f"white {classes[0]}": order[-quarter:], f"dark {classes[0]}": order[:quarter]}
    fitted = {name: fit(mu[row], flow.mean_covariance(variance[row], units[row]))
              for name, row in ((name, row.cpu()) for name, row in rows.items())}
    return {name: [part.float() for part in gaussian] for name, gaussian in fitted.items()}


def product(first: Gaussian, second: Gaussian, blend: float = 0.5) -> Gaussian:
    """What is likely under both: p(z) ~ first(z)^blend second(z)^(1 - blend), a Gaussian again; in float64."""
    weights = blend, 1 - blend
    precisions = [w * g.covariance.double().inverse() for w, g in zip(weights, (first, second), strict=True)]
    covariance = sum(precisions).inverse()
    pulls = [p @ g.mean.double() for p, g in zip(precisions, (first, second), strict=True)]
    return Gaussian(covariance @ sum(pulls), covariance)


def root(gaussian: Gaussian) -> Tensor:
    """The lower triangle L with L L' the covariance, float64 (d, d). Raises Fault where there is none."""
    lower, failed = torch.linalg.cholesky_ex(gaussian.covariance.double())
    if failed or not lower.isfinite().all():
        raise Fault("the model's latents have no finite covariance; it was saved while it diverged, so train again "
                    "with a lower --lr")
    return lower


def draw(gaussian: Gaussian, eps: Tensor, temperature: float = 1.0) -> Tensor:
    """Draws (n, d), float32, from standard normals (n, d); row i depends on row i alone.

    In float64, so that how many rows are multiplied together does not reach the bits that are kept.
    """
    return (gaussian.mean.double() + temperature * (eps.double() @ root(gaussian).T)).float()


def log_density(gaussian: Gaussian, z: Tensor) -> Tensor:
    """log N(z; mean, covariance) up to a constant of d alone, for z (n, d); float64 (n,)."""
    lower = root(gaussian)
    white = torch.linalg.solve_triangular(lower, (z.double() - gaussian.mean.double()).T, upper=False)
    return -white.square().sum(0) / 2 - lower.diagonal().log().sum()
