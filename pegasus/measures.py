"""How sets of pictures differ: functions of images and of a judge's features."""
from typing import NamedTuple

import torch
from torch import Tensor

UPPER_ROWS = 13  # of a picture: what is above a horse's back


# ---- two sets ----


def frechet(a: Tensor, b: Tensor) -> float:
    """Return the Frechet distance between two sets of features, (n, d) and (m, d).

    Of Gaussians fitted to them (Dowson and Landau 1982), in float64:
    |m_a - m_b|^2 + tr(S_a + S_b - 2 (S_a S_b)^(1/2)). FID is its name only where the
    features are Inception's.
    """
    a = a.double()
    b = b.double()
    values, vectors = torch.linalg.eigh(a.T.cov())
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    cross = torch.linalg.eigvalsh(root @ b.T.cov() @ root).clamp(min=0).sqrt().sum()
    gap = (a.mean(0) - b.mean(0)).square().sum()
    return (gap + a.var(0).sum() + b.var(0).sum() - 2 * cross).item()


def frechet_at(a: Tensor, b: Tensor, n: int) -> float:
    """Return the mean distance of n rows of each: the first ones, the next ones, ..."""
    count = min(len(a), len(b)) // n
    pairs = zip(a[: count * n].split(n), b[: count * n].split(n), strict=True)
    return sum(frechet(*pair) for pair in pairs) / count


def frechet_at_infinity(a: Tensor, b: Tensor) -> float:
    """Return what the distance tends to as the sets (n, d) and (m, d) grow.

    It falls linearly in 1/N (Chong and Forsyth 2020): extrapolated from all rows of the
    smaller set and from half as many. Near zero for two samples of one distribution,
    where noise can make it negative.
    """
    n = min(len(a), len(b))
    half = n // 2
    return (n * frechet_at(a, b, n) - half * frechet_at(a, b, half)) / (n - half)


def radial_power(images: Tensor) -> Tensor:
    """Return the power of images (n, 3, 32, 32) in their finest detail, (2,).

    Of waves that fit 8 to 12 times, and 12 to 16 times, into a picture, whatever their
    direction: squared amplitudes, summed, under a window that fades the borders. Blur is
    missing power.
    """
    side = images.shape[3]
    window = torch.hann_window(side, periodic=False, device=images.device)
    centered = images - images.mean((2, 3), keepdim=True)
    spectrum = torch.fft.fft2(centered * window * window[:, None])
    power = spectrum.abs().square().mean((0, 1))
    frequency = torch.fft.fftfreq(side, 1 / side, device=images.device)
    radius = torch.hypot(frequency, frequency[:, None])
    bands = [(radius >= low) & (radius < low + 4) for low in (8, 12)]
    return torch.stack([power[band].sum() for band in bands])


def nearest_distances(features: Tensor, others: Tensor) -> Tensor:
    """Return the distance of each of (n, d) to the nearest of (m, d), (n,)."""
    distances = [torch.cdist(batch, others).amin(1) for batch in features.split(500)]
    return torch.cat(distances)


# ---- one set ----


def align(images: Tensor) -> Tensor:
    """Return each image (n, 3, h, w) or its mirror image, whichever is nearer the mean.

    Begins with the first image: the mean of images and their mirror images is symmetric.
    """
    mirrored = images.flip(3)
    aligned = images[:1]
    for _ in range(10):
        mean = aligned.mean(0)
        straight = (images - mean).square().sum((1, 2, 3))
        turned = (mirrored - mean).square().sum((1, 2, 3))
        aligned = torch.where((straight <= turned)[:, None, None, None], images, mirrored)
    return aligned


class Variety(NamedTuple):
    """How different pictures are above the back; of 64 horses 0.25 and 0.03."""
    deviation: float  # over pictures, of values in [0, 1]; mean over rows 0 to 12
    correlation: float  # of these rows of two pictures, in grey; median. 1: one stamp


def variety(images: Tensor) -> Variety:
    """Measure how different images (n, 3, 32, 32) in [0, 1] are, mirrored alike."""
    upper = align(images)[:, :, :UPPER_ROWS]
    grey = upper.mean(1).flatten(1)
    correlations = torch.corrcoef(grey)
    n = len(images)
    above = torch.triu_indices(n, n, offset=1)
    median = correlations.nan_to_num(1.0)[above[0], above[1]].median()
    return Variety(upper.std(0).mean().item(), median.item())


def detector(present: Tensor, absent: Tensor) -> Tensor:
    """Return weights (d + 1,) that tell features of two kinds (n, d) apart.

    By ridge regression on 1 and -1; the last weight is a constant.
    """
    x = with_constant(torch.cat([present, absent]))
    y = torch.cat([torch.ones(len(present)), -torch.ones(len(absent))]).double()
    ridge = 1e-3 * len(x) * torch.eye(x.shape[1], dtype=torch.float64)
    return torch.linalg.solve(x.T @ x + ridge, x.T @ y)


def with_constant(features: Tensor) -> Tensor:
    """Return features (n, d) and a column of ones, float64 (n, d + 1)."""
    return torch.nn.functional.pad(features.double(), (0, 1), value=1.0)


def detected(weights: Tensor, features: Tensor) -> float:
    """Return the share of features (n, d) that a detector takes for the first kind."""
    return (with_constant(features) @ weights > 0).double().mean().item()
