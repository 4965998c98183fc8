"""How probable a model finds photographs: -log P(x) in nats, and in bits for each byte.

By the ELBO and the importance-weighted bound under the autoencoder's own prior, under a
learned prior by the ELBO with its flow's likelihood, and by the paper's equation (1).
"""
import math
from collections.abc import Iterator
from typing import NamedTuple

import reparam
import vae
from pegasus import streams
from pegasus.drawing import sampler as sampling
from pegasus.drawing.sampler import Sampler
from pegasus.models import flow_prior
from pegasus.models.variants import Component, ConditionalVAE, components

import torch
from torch import Tensor

NOISE, RATE, DIVERGENCE = range(3)  # purposes of derived seeds
BATCH = 100  # photographs at a time


def log_likelihood(x: Tensor, xhat: Tensor, variance: Tensor) -> Tensor:
    """Return log N(x; xhat, variance I) in nats an image, (B,)."""
    return -vae.gaussian_nll(vae.squared_error(x, xhat), variance, x[0].numel())


# ---- bounds by posterior samples ----


def log_weight(component: Component, x: Tensor, eps: Tensor, variance: Tensor) -> Tensor:
    """Return log p(x|z) p(z) / q(z|x) of one sample, float64 (B,)."""
    z = component.mu + (component.logvar / 2).exp() * eps
    log_p = log_likelihood(x, component.decode(z), variance).double()
    # reflections change neither |z|, and so not p(z), nor volumes, and so not q(z|x)
    log_ratio = (eps.square() - z.square() + component.logvar).double().sum(1) / 2
    return log_p + log_ratio


class Samples(NamedTuple):
    """What k posterior samples of B images give, in nats, float64 (k, B)."""
    elbo: Tensor  # the mean over samples is the ELBO
    log_weight: Tensor  # log w; the log-mean-exp over samples is the tighter bound


@torch.no_grad()
def posterior_samples(model: vae.VAE, x: Tensor, k: int, seed: int = 0) -> Samples:
    """Take k posterior samples of images (B, 3, h, w) in [0, 1].

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
        noise_seed = reparam.derive_seed(seed, i, NOISE)
        eps = reparam.normals(len(x), parts[0].mu.shape[1], noise_seed)
        weights = [log_weight(part, x, eps, model.variance) for part in parts]
        weights = torch.stack(weights)
        elbo = (share * (weights - log_share)).sum(0) - log_codes
        rows.append(torch.stack([elbo, weights.logsumexp(0) - log_codes]))
    return Samples(*torch.stack(rows, 1))


def importance_weighted(log_weight: Tensor) -> Tensor:
    """Return log 1/K sum_k w_k of log w (K, B), (B,): a lower bound on log p(x).

    Burda et al. 2016, equation 8.
    """
    return log_weight.logsumexp(0) - math.log(len(log_weight))


def autoencoder_terms(model: vae.VAE, x: Tensor, k: int, seed: int) -> Tensor:
    """Return -ELBO, -log P(x) importance-weighted, rate and squared error, (4, B).

    Of images (B, 3, h, w) in [0, 1]; nats, but the squared error; float64.
    """
    samples = posterior_samples(model, x, k, seed)
    weighted = importance_weighted(samples.log_weight)
    with torch.no_grad():
        terms = model(x, torch.tensor(reparam.derive_seed(seed, 0, RATE)))
    rows = [-samples.elbo.mean(0), -weighted, terms.rate.double(), terms.sse.double()]
    return torch.stack(rows)


def flow_terms(sampler: Sampler, x: Tensor, seed: int) -> Tensor:
    """Return -ELBO and rate under the learned prior, float64 (2, B), in nats.

    Of one posterior sample z: rate = log q(z|x) - log p(z), p(z) being the flow's.
    """
    model = sampler.model
    with torch.no_grad():
        mu, logvar = model.encode(x)
        eps = reparam.normals(len(x), model.latent_size, seed)
        z = mu + (logvar / 2).exp() * eps
        log_x = log_likelihood(x, model.decode(z), model.variance).double()
    log_q = -(eps.square() + logvar + math.log(2 * math.pi)).double().sum(1) / 2
    divergence_seed = reparam.derive_seed(seed, 0, DIVERGENCE)
    rate = log_q - flow_prior.log_density(sampler.prior, z, divergence_seed)
    return torch.stack([rate - log_x, rate])


# ---- the paper's equation (1) ----


class MonteCarlo(NamedTuple):
    """An estimate of log P(x) for each of B images, float64 (B,)."""
    log_p: Tensor  # nats; too low where few samples count
    effective_samples: Tensor  # that count: (sum w)^2 / sum w^2, at most all


def log_densities(x: Tensor, xhat: Tensor, variance: Tensor) -> Tensor:
    """Return log p(x|z) of images (B, ...) under decoded samples (K, ...), float64 (K, B)."""
    sse = torch.cdist(xhat.flatten(1).double(), x.flatten(1).double()).square()
    return -vae.gaussian_nll(sse, variance.double(), x[0].numel())


def monte_carlo(log_p: Tensor) -> MonteCarlo:
    """Estimate P(x) = E p(x|z) over z ~ p(z): the paper's equation (1).

    log_p: log p(x|z) of B images under K samples of the prior, (K, B).
    """
    mean = importance_weighted(log_p)
    weight = (log_p - mean).exp()  # p(x|z) over its mean
    effective = weight.sum(0).square() / weight.square().sum(0)
    return MonteCarlo(mean, effective)


@torch.no_grad()
def prior_images(sampler: Sampler, n: int, seed: int) -> Iterator[Tensor]:
    """Decode n samples of the autoencoder's own prior, N(0, I) or K Gaussians, in parts."""
    model = sampler.model
    z = reparam.normals(n, model.latent_size, seed)
    codes = None
    if isinstance(model, ConditionalVAE):
        codes = model.sample_codes(n, seed)
        z = model.sample_latents(z, codes)
    yield from sampling.decoded(sampler, z, codes)


# ---- all of them ----


def mean_terms(
    sampler: Sampler, images: Tensor, k: int, seed: int
) -> tuple[list[float], list[float] | None]:
    """Return `autoencoder_terms` and, with a learned prior, `flow_terms`: their means.

    images: bytes (n, 3, h, w).
    """
    terms = []
    flow = []
    for number, batch in enumerate(images.split(BATCH)):
        streams.show(f"bits/dim: {BATCH * number} of {len(images)} test photographs")
        x = vae.from_bytes(batch)
        batch_seed = reparam.derive_seed(seed, number, NOISE)
        terms.append(autoencoder_terms(sampler.model, x, k, batch_seed))
        if sampler.prior is not None:
            flow.append(flow_terms(sampler, x, batch_seed))
    flow_means = torch.cat(flow, 1).mean(1).tolist() if flow else None
    return torch.cat(terms, 1).mean(1).tolist(), flow_means


def measure(
    sampler: Sampler, images: Tensor, k: int, monte_carlo_samples: int, seed: int
) -> dict[str, object]:
    """Return how probable a model finds images, bytes (n, 3, h, w), in means over them.

    k: posterior samples of each. monte_carlo_samples: of the prior, for all. In bits/dim
    but for the rates, in nats, the squared error, summed over an image's values in [0, 1],
    and `effective_samples` of equation (1). With the settings behind them.
    """
    (elbo, weighted, rate, sse), flow = mean_terms(sampler, images, k, seed)
    streams.show("bits/dim by equation (1)")
    variance = sampler.model.variance
    values = sampler.model.image_values
    x = vae.from_bytes(images)
    decoded = prior_images(sampler, monte_carlo_samples, seed)
    estimate = monte_carlo(torch.cat([log_densities(x, xhat, variance) for xhat in decoded]))
    streams.show("")
    figures = {
        "images": len(images),
        "k": k,
        "monte_carlo_samples": monte_carlo_samples,
        "prior": prior_name(sampler.model),
        "pixel_deviation": variance.sqrt().item(),
        "bits_per_dim": vae.bits_of_nats(elbo, values),
        "bits_per_dim_importance_weighted": vae.bits_of_nats(weighted, values),
        "bits_per_dim_monte_carlo": vae.bits_of_nats(-estimate.log_p.mean().item(), values),
        "effective_samples": estimate.effective_samples.mean().item(),
        "rate": rate,
        "squared_error": sse,
    }
    if flow is not None:
        figures["bits_per_dim_learned_prior"] = vae.bits_of_nats(flow[0], values)
        figures["rate_learned_prior"] = flow[1]
    return figures


def prior_name(model: vae.VAE) -> str:
    """Return what the autoencoder's own prior is called."""
    if isinstance(model, ConditionalVAE):
        return f"{len(model.conditional.mean)} Gaussians"
    return "N(0, I)"


def describe(figures: dict[str, object]) -> list[str]:
    """Return lines of text about what `measure` gave."""
    under = f"under {figures['prior']}"
    lines = [
        f"Bits for each byte (bits/dim) of {figures['images']} test photographs, lower is "
        "better, with the decoder's",
        f"error of a pixel as measured in training: {figures['pixel_deviation']:.3f} of 1",
    ]
    if "rate_learned_prior" in figures:
        lines.append(
            f"{figures['bits_per_dim_learned_prior']:8.3f}  under the learned prior, which "
            f"draws: ELBO; rate {figures['rate_learned_prior']:.1f} nats"
        )
    return [
        *lines,
        f"{figures['bits_per_dim']:8.3f}  {under}: ELBO; rate {figures['rate']:.1f} nats, "
        f"squared error {figures['squared_error']:.2f} a picture",
        f"{figures['bits_per_dim_importance_weighted']:8.3f}  {under}: importance-weighted "
        f"bound, {figures['k']} samples of q(z|x)",
        f"{figures['bits_per_dim_monte_carlo']:8.3f}  {under}: equation (1) of the paper, "
        f"the mean over {figures['monte_carlo_samples']:,} draws of z,",
        f"          of which in effect {figures['effective_samples']:.1f} decide; too "
        "high where few do",
    ]
