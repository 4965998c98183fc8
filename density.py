"""Gaussians in the latent space, fitted to what a trained encoder makes of the photographs of each class.

What the encoder makes of all horses together, its aggregate posterior, is not N(0, I): draws from the prior land where
no photograph lies. Mean and covariance of the aggregate are had in one pass, without optimisation, and two classes
multiply in closed form.
"""
from typing import NamedTuple

import cifar10
import flow
import vae
from options import Fault

import torch
from torch import Tensor

COATS = ("white", "dark")


def coated(name: str, coat: str) -> str:
    """The key of a class with a coat among the Gaussians; with coat "any" it is the class's own name."""
    return name if coat == "any" else f"{coat} {name}"


def kind(classes: tuple[str, ...], coat: str) -> int:
    """The class number that labels have for the first class with a coat: 0 for "any", else one after the classes'."""
    return len(classes) + COATS.index(coat) if coat != "any" else 0


class Gaussian(NamedTuple):
    """N(mean, covariance): (d,) and (d, d)."""
    mean: Tensor
    covariance: Tensor


def aggregate(mu: Tensor, within: Tensor) -> Gaussian:
    """The aggregate posterior of images: m = mean mu, S = cov(mu) + mean covariance.

    mu: their posterior means (n, d); within: the mean of their covariances (d, d).
    cov(mu) off its diagonal is taken n / (n + d) times, as if d further images had shown none: few images would
    otherwise claim directions in which they never vary.
    """
    mean = mu.mean(0, dtype=torch.float64)
    between = sum((away := part.double() - mean).T @ away for part in mu.split(1000)) / len(mu)
    shrunk = (between * (len(mu) / (len(mu) + mu.shape[1]))).diagonal_scatter(between.diagonal())
    return Gaussian(mean, shrunk + within)


def brightness(images: Tensor) -> Tensor:
    """Mean over the central pixels, where most horses' bodies are, of images (n, 3, 32, 32); float32 (n,)."""
    return images[..., 10:22, 8:24].float().flatten(1).mean(1)


def class_rows(images: Tensor, labels: Tensor, classes: tuple[str, ...]) -> dict[str, Tensor]:
    """Which images are each class's, and the first class's "white" and "dark" quarters: rows (m,), on the CPU."""
    rows = {name: (labels == i).cpu().nonzero()[:, 0] for i, name in enumerate(classes)}
    first = rows[classes[0]]
    order = first[brightness(images[first.to(images.device)]).cpu().argsort(stable=True)]
    white, dark = order[-max(len(order) // 4, 1):].sort().values, order[:max(len(order) // 4, 1)].sort().values
    return rows | {coated(classes[0], "white"): white, coated(classes[0], "dark"): dark}


def check(densities: dict[str, Gaussian], classes: tuple[str, ...], latent: int, optional: bool) -> None:
    """Raise ValueError for classes that are none of CIFAR-10's, and for Gaussians that are not theirs.

    optional: nothing is drawn from the Gaussians, and there may be none.
    """
    wanted = {*classes, *(coated(classes[0], coat) for coat in COATS)}
    if not set(classes) <= set(cifar10.CLASSES) or set(densities) != wanted and not (optional and not densities):
        raise ValueError(f"classes {', '.join(classes)} with densities of {', '.join(densities)}")
    for name, (mean, covariance) in densities.items():
        if mean.shape != (latent,) or covariance.shape != (latent, latent):
            raise ValueError(f"the density of {name} has shapes {tuple(mean.shape)} and {tuple(covariance.shape)}")


def labels_and_coats(images: Tensor, labels: Tensor, classes: tuple[str, ...]) -> Tensor:
    """Two class numbers for each image, int64 (n, 2): its class, and its coat if it has one of COATS, else its class.

    The coats of COATS are numbered after the classes.
    """
    both = labels[:, None].repeat(1, 2)
    rows = class_rows(images, labels, classes)
    for coat in COATS:
        both[rows[coated(classes[0], coat)], 1] = kind(classes, coat)
    return both


@torch.no_grad()
def fit_classes(model: vae.VAE, images: Tensor, labels: Tensor, classes: tuple[str, ...],
                batch_size: int = 100) -> dict[str, list[Tensor]]:
    """Mean and covariance, float32, of each class, and of the first class's "white" and "dark" quarters.

    images: bytes (n, 3, 32, 32); labels: (n,), positions in `classes`. One class at a time, for memory.
    """
    fitted = {}
    for name, rows in class_rows(images, labels, classes).items():
        members = rows.to(images.device)
        mu, within = torch.empty(len(members), model.latent), 0.0  # in one piece, or the parts keep gaps between them
        for part, own in zip(members.split(batch_size), mu.split(batch_size), strict=True):
            x = vae.from_bytes(images[part].to(model.variance.device))
            mean, logvar, units = (each.cpu() for each in model.posterior(x))
            own.copy_(flow.reflect(mean, units))
            within = within + flow.mean_covariance(logvar.exp(), units) * (len(part) / len(members))
        fitted[name] = [each.float() for each in aggregate(mu, within)]
    return fitted


def product(first: Gaussian, second: Gaussian, blend: float = 0.5) -> Gaussian:
    """What is likely under both: p(z) ~ first(z)^blend second(z)^(1 - blend), a Gaussian again; in float64."""
    p, q = blend * torch.cholesky_inverse(root(first)), (1 - blend) * torch.cholesky_inverse(root(second))
    covariance = (p + q).inverse()
    return Gaussian(covariance @ (p @ first.mean.double() + q @ second.mean.double()), covariance)


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
