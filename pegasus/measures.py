"""What a model is measured by: functions of images, of features, of likelihoods.

None knows about checkpoints or options; evaluate.py puts them together.
"""
import math
from typing import NamedTuple

import reparam
import vae
from pegasus.models.variants import Component, components

import torch
from torch import Tensor

BOUND = 0  # purpose of derived seeds
UPPER_ROWS = 13  # of a picture: what is above a horse's back


# ---- how probable a model finds photographs ----


def log_likelihood(x: Tensor, xhat: Tensor, variance: Tensor) -> Tensor:
    """Return log N(x; xhat, variance I) in nats an image, (B,)."""
    sse = (x - xhat).square().flatten(1).sum(1)
    return -vae.gaussian_nll(sse, variance, x[0].numel())


class Samples(NamedTuple):
    """What k posterior samples of B images give, in nats, float64 (k, B)."""
    log_likelihood: Tensor  # log p(x|z), or its expectation over the code
    elbo: Tensor  # the mean over samples is the ELBO
    log_weight: Tensor  # log w; the log-mean-exp over samples is the tighter bound


def sample_component(
    component: Component, x: Tensor, eps: Tensor, variance: Tensor
) -> tuple[Tensor, Tensor]:
    """Return log p(x|z) and log p(x|z) p(z) / q(z|x) of one sample, float64 (B,)."""
    z = component.mu + (component.logvar / 2).exp() * eps
    log_p = log_likelihood(x, component.decode(z), variance).double()
    # reflections change neither |z|, and so not p(z), nor volumes, and so not q(z|x)
    log_ratio = (eps.square() - z.square() + component.logvar).double().sum(1) / 2
    return log_p, log_p + log_ratio


@torch.no_grad()
def posterior_samples(model: vae.VAE, x: Tensor, k: int, seed: int = 0) -> Samples:
    """Take k posterior samples of images (B, 3, 32, 32) in [0, 1].

    Their noise depends on (seed, number, row) alone. p(z) is N(0, I), or p(c) = 1/K and
    p(z|c) a Gaussian. Then codes are summed out:
    elbo = sum_c q(c|x) [log w_c - log K q(c|x)], and w = sum_c w_c / K, since
    E w_c = p(x|c).
    """
    parts = components(model, x)
    log_share = torch.stack([part.log_share for part in parts]).double()  # (K, B)
    share = log_share.exp()
    log_codes = math.log(len(parts))
    rows = []
    for i in range(k):
        noise_seed = reparam.derive_seed(seed, i, BOUND)
        eps = vae.sampling_noise(len(x), parts[0].mu.shape[1], noise_seed)
        terms = [sample_component(part, x, eps, model.variance) for part in parts]
        log_p, log_weight = (torch.stack(values) for values in zip(*terms, strict=True))
        elbo = (share * (log_weight - log_share)).sum(0) - log_codes
        weight = log_weight.logsumexp(0) - log_codes
        rows.append(torch.stack([(share * log_p).sum(0), elbo, weight]))
    return Samples(*torch.stack(rows, 1))


def importance_weighted(log_weight: Tensor) -> Tensor:
    """Return log 1/K sum_k w_k of log w (K, B), (B,): a lower bound on log p(x).

    Burda et al. 2016, equation 8.
    """
    return log_weight.logsumexp(0) - math.log(len(log_weight))


class MonteCarlo(NamedTuple):
    """An estimate of log P(x) for each of B images, float64 (B,)."""
    log_p: Tensor  # nats
    standard_error: Tensor  # of log_p; too small where few samples count
    effective_samples: Tensor  # (sum w)^2 / sum w^2, at most as many as were drawn


def monte_carlo(x: Tensor, xhat: Tensor, variance: Tensor) -> MonteCarlo:
    """Estimate P(x) = E p(x|z) over z ~ p(z): the paper's equation (1).

    x: images (B, ...). xhat: decoded samples of the prior, (K, ...).
    """
    squared = torch.cdist(xhat.flatten(1).double(), x.flatten(1).double()).square()
    log_p = -vae.gaussian_nll(squared, variance.double(), x[0].numel())  # (K, B)
    mean = importance_weighted(log_p)
    relative = (log_p - mean).exp()  # p(x|z) over its mean
    error = relative.std(0) / math.sqrt(len(xhat))
    effective = relative.sum(0).square() / relative.square().sum(0)
    return MonteCarlo(mean, error, effective)


# ---- how much two sets of images differ ----


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
    whole = min(len(a), len(b)) // n
    pairs = zip(a[: whole * n].split(n), b[: whole * n].split(n), strict=True)
    return sum(frechet(*pair) for pair in pairs) / whole


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


# ---- how different the images of a set are ----


def align(images: Tensor) -> Tensor:
    """Return each image (n, 3, h, w) or its mirror image, whichever is nearer the mean.

    First nearer the first one: the mean of as many stamps as mirrored ones tells nothing.
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
    """How different pictures are above the back; 64 horses: 0.25 and 0.03."""
    deviation: float  # of a value in rows 0 to 12, 0 to 1
    correlation: float  # of two pictures' rows, in grey; median. 1: all are one stamp


def variety(images: Tensor) -> Variety:
    """Measure how different images (n, 3, 32, 32) in [0, 1] are, mirrored alike."""
    upper = align(images)[:, :, :UPPER_ROWS]
    grey = upper.mean(1).flatten(1)
    correlations = torch.corrcoef(grey)
    n = len(images)
    above = torch.triu_indices(n, n, offset=1)
    median = correlations.nan_to_num(1.0)[above[0], above[1]].median()
    return Variety(upper.std(0).mean().item(), median.item())
