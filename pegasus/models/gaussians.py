"""Gaussians fitted to the latents of each class's photographs.

What the encoder makes of all horses together, its aggregate posterior, is not N(0, I):
draws from the prior land where no photograph lies. Mean and covariance of the aggregate
are had in one pass, without optimization, and two classes multiply in closed form.
"""
from typing import NamedTuple

import vae
from pegasus.cli import UserError
from pegasus.data.classes import is_name
from pegasus.models import labels
from vae import VAE

import torch
from torch import Tensor


class Gaussian(NamedTuple):
    """N(mean, covariance): (d,) and (d, d)."""
    mean: Tensor
    covariance: Tensor


def aggregate(mu: Tensor, within: Tensor) -> Gaussian:
    """Return the aggregate posterior: m = mean mu, S = cov(mu) + mean covariance.

    mu: posterior means (n, d). within: the mean of the posterior covariances (d, d).
    Off its diagonal cov(mu) is multiplied by n / (n + d), which shrinks it where images
    are few: they would otherwise claim directions in which they never vary.
    """
    mean = mu.mean(0, dtype=torch.float64)
    between = 0.0
    for rows in mu.split(1000):
        away = rows.double() - mean
        between = between + away.T @ away
    between = between / len(mu)
    shrunk = between * (len(mu) / (len(mu) + mu.shape[1]))
    return Gaussian(mean, shrunk.diagonal_scatter(between.diagonal()) + within)


def check(
    gaussians: dict[str, Gaussian], classes: tuple[str, ...], size: int, optional: bool
) -> None:
    """Raise ValueError for classes that can't be, or Gaussians that are not theirs.

    optional: nothing is drawn from the Gaussians, and there may be none.
    """
    coats = {labels.with_coat(classes[0], coat) for coat in labels.COATS}
    complete = set(gaussians) == {*classes, *coats}
    absent = optional and not gaussians
    named = all(map(is_name, classes)) and len(set(classes)) == len(classes)
    if not named or not (complete or absent):
        raise ValueError(f"classes {', '.join(classes)}, Gaussians {', '.join(gaussians)}")
    for name, (mean, covariance) in gaussians.items():
        if mean.shape != (size,) or covariance.shape != (size, size):
            shapes = f"{tuple(mean.shape)} and {tuple(covariance.shape)}"
            raise ValueError(f"the Gaussian of {name} has shapes {shapes}")


@torch.no_grad()
def fit_classes(
    model: VAE,
    images: Tensor,
    positions: Tensor,
    classes: tuple[str, ...],
    batch_size: int = 100,
) -> dict[str, list[Tensor]]:
    """Return mean and covariance, float32, of each class and of the first one's coats.

    images: bytes (n, 3, h, w). positions: of their classes in `classes`, (n,).
    """
    fitted = {}
    for name, rows in labels.class_rows(images, positions, classes).items():
        members = rows.to(images.device)
        mu = torch.empty(len(members), model.latent_size)  # in one piece, for memory
        within = 0.0
        for first in range(0, len(members), batch_size):
            batch = members[first : first + batch_size]
            x = vae.from_bytes(images[batch].to(model.variance.device))
            mean, covariance = model.posterior_moments(x)
            mu[first : first + batch_size] = mean
            within = within + covariance * (len(batch) / len(members))
        fitted[name] = [tensor.float() for tensor in aggregate(mu, within)]
    return fitted


def root(gaussian: Gaussian) -> Tensor:
    """Return the lower triangle L with L L' the covariance, float64 (d, d).

    Raises UserError where there is none.
    """
    lower, failed = torch.linalg.cholesky_ex(gaussian.covariance.double())
    if failed or not lower.isfinite().all():
        raise UserError(
            "the model's latents have no finite covariance; it was saved while it "
            "diverged, so train again with a lower --lr"
        )
    return lower


def product(first: Gaussian, second: Gaussian, blend: float = 0.5) -> Gaussian:
    """Return p(z) ~ first(z)^blend second(z)^(1 - blend), a Gaussian in float64."""
    p = blend * torch.cholesky_inverse(root(first))
    q = (1 - blend) * torch.cholesky_inverse(root(second))
    covariance = (p + q).inverse()
    mean = covariance @ (p @ first.mean.double() + q @ second.mean.double())
    return Gaussian(mean, covariance)


def sample(gaussian: Gaussian, eps: Tensor, temperature: float = 1.0) -> Tensor:
    """Return draws (n, d), float32, from standard normals (n, d).

    Row i depends on row i alone: in float64, how many rows are multiplied together does
    not reach the bits that are kept.
    """
    spread = eps.double() @ root(gaussian).T
    return (gaussian.mean.double() + temperature * spread).float()
