"""The variational autoencoder: networks, posterior, objective; rate and distortion in nats.

The paper is "Winged Horses with a Vanilla Variational Auto encoder"; its model is Kingma and Welling's
Auto-Encoding Variational Bayes (2014) with a squared error:

    loss(x) = sum (x - xhat)^2 + KL(N(mu, exp(logvar)) || N(0, I)),  xhat = decoder(z),  z ~ N(mu, exp(logvar))
"""
from typing import NamedTuple

import reparam

import torch
from torch import Tensor, nn

IMAGE = (3, 32, 32)
PIXELS = 3072


class Terms(NamedTuple):
    """The parts of the objective for each image, float32 (B,)."""
    distortion: Tensor  # nats; under `mse` the squared error itself
    rate: Tensor        # nats
    sse: Tensor         # sum over an image's 3,072 values in [0, 1] of the squared error


def mlp(latent: int) -> tuple[nn.Module, nn.Module]:
    """The paper's network: 3072 -> 512 ReLU -> (mu, logvar), latent -> 512 ReLU -> 3072 logits."""
    encoder = nn.Sequential(nn.Flatten(), nn.Linear(PIXELS, 512), nn.ReLU(), nn.Linear(512, 2 * latent))
    decoder = nn.Sequential(nn.Linear(latent, 512), nn.ReLU(), nn.Linear(512, PIXELS), nn.Unflatten(1, IMAGE))
    return encoder, decoder


def squared_error(sse: Tensor) -> Tensor:
    """The paper's distortion: the squared error as it is, which fixes a pixel's variance at 1/2."""
    return sse


NETWORKS = {"mlp": mlp}
LIKELIHOODS = {"mse": squared_error}


class VAE(nn.Module):
    """An encoder to a diagonal Gaussian posterior, a decoder to the mean image, a standard normal prior."""

    def __init__(self, arch: str = "mlp", likelihood: str = "mse", latent: int = 128):
        super().__init__()
        self.latent = latent
        self.encoder, self.decoder = NETWORKS[arch](latent)
        self.likelihood = LIKELIHOODS[likelihood]

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Images (B, 3, 32, 32) in [0, 1] to the posterior's mu and logvar, float32 (B, latent)."""
        mu, logvar = self.encoder(x).float().chunk(2, 1)
        return mu, logvar

    def decode(self, z: Tensor) -> Tensor:
        """Latents (B, latent) to mean images, float32 (B, 3, 32, 32) in [0, 1]."""
        return self.decoder(z).float().sigmoid()

    def forward(self, x: Tensor, seed: Tensor, row_offset: int = 0) -> Terms:
        """The objective's terms with one posterior sample for each image (B, 3, 32, 32).

        seed, row_offset: the sample's noise, as in `reparam.reparameterize_kl`.
        """
        z, rate = reparam.reparameterize_kl(*self.encode(x), seed, row_offset)
        sse = (x - self.decode(z)).square().flatten(1).sum(1)
        return Terms(self.likelihood(sse), rate, sse)

    def reconstruct(self, x: Tensor) -> Tensor:
        """Images decoded again from their posterior means, (B, 3, 32, 32)."""
        return self.decode(self.encode(x)[0])


def from_bytes(images: Tensor) -> Tensor:
    """uint8 images to float32 in [0, 1]."""
    return images.float() / 255


def noise(n: int, latent: int, seed: int, first: int = 0) -> Tensor:
    """Standard normals (n, latent); row i is a function of (seed, first + i) alone."""
    zeros = torch.zeros(n, latent)
    return reparam.reparameterize_kl(zeros, zeros, torch.tensor(seed), first)[0]


@torch.no_grad()
def class_means(model: VAE, images: Tensor, labels: Tensor, classes: int, batch_size: int = 1000) -> Tensor:
    """Mean of mu over the images (n, 3, 32, 32, bytes) of each class, float64 (classes, latent)."""
    totals = torch.zeros(classes, model.latent, dtype=torch.float64, device=images.device)
    for part, label in zip(images.split(batch_size), labels.split(batch_size), strict=True):
        totals.index_add_(0, label, model.encode(from_bytes(part))[0].double())
    return totals / torch.bincount(labels, minlength=classes)[:, None]
