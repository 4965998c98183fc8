"""The variational autoencoder: two networks, and the terms of their loss.

The paper, "Winged Horses with a Vanilla Variational Auto encoder", trains the VAE of
Kingma and Welling (2014) with a squared error:

    loss(x) = sum (x - xhat)^2 + KL(N(mu, exp(logvar)) || N(0, I))
    xhat = decoder(z),  z ~ N(mu, exp(logvar)),  mu, logvar = encoder(x)

That is `VAE("mlp", "mse")`. `VAE("conv", "gaussian", (16, 8, 8), center=True)` draws better:
a residual network, a measured pixel variance, latents in 16 channels of 8 x 8.
Pictures have 32, 48, 64 or 96 pixels a side: all but the first and the last layer is the same.
AutoencoderStage.loss in pegasus/training/stages.py adds up the loss, in nats per image.
Checkpoints rely on the names of modules here, variants.py on the encoder's last and the
decoder's first layer, accelerate.py on GroupNorm followed by SiLU in nn.Sequential.
"""
import math
from typing import NamedTuple

import reparam

import torch
from torch import Tensor, nn
from torch.nn import functional

SIZES = (32, 48, 64, 96)  # pixels of a picture's side
# of the convolutional network, at 16 x 16 and at 8 x 8; others than multiples of 16, or below 64,
# are trained by Adam instead of Muon and without the fast convolutions
CHANNELS = (64, 64)


class Terms(NamedTuple):
    """The parts of the loss for each image, float32 (B,)."""
    rate: Tensor  # the KL divergence, nats
    sse: Tensor  # squared error, summed over values in [0, 1]; see VAE.distortion


def build_mlp(latent: tuple[int, ...], size: int) -> tuple[nn.Sequential, nn.Sequential]:
    """Build the paper's encoder, and its decoder to logits, for a vector of latents."""
    shape = (3, size, size)
    values = math.prod(shape)
    encoder = [nn.Flatten(), nn.Linear(values, 512), nn.ReLU()]
    encoder += [nn.Linear(512, 2 * latent[0])]  # mu, then logvar
    decoder = [nn.Linear(latent[0], 512), nn.ReLU(), nn.Linear(512, values)]
    decoder += [nn.Unflatten(1, shape)]
    return nn.Sequential(*encoder), nn.Sequential(*decoder)


class Residual(nn.Module):
    """x + conv(silu(norm(conv(silu(norm(x)))))), (B, channels, h, w)."""

    def __init__(self, channels: int):
        super().__init__()
        self.body = nn.Sequential(
            nn.GroupNorm(8, channels),
            nn.SiLU(),
            nn.Conv2d(channels, channels, 3, padding=1),
            nn.GroupNorm(8, channels),
            nn.SiLU(),
            nn.Conv2d(channels, channels, 3, padding=1),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x)


def build_conv(latent: tuple[int, ...], size: int) -> tuple[nn.Sequential, nn.Sequential]:
    """Build a residual encoder and decoder around a grid of 8 x 8.

    latent: (channels, 8, 8), or (size,) for a vector, which adds a linear layer at
    each end of the grid.
    """
    fine, coarse = CHANNELS
    channels = latent[0] if len(latent) == 3 else 8
    block = size // 16  # pixels of a side that are channels in the first and last layer
    colors = 3 * block * block
    encoder = [
        nn.PixelUnshuffle(block),  # (B, colors, 16, 16)
        nn.Conv2d(colors, fine, 3, padding=1),
        Residual(fine),
        nn.Conv2d(fine, coarse, 2, stride=2),  # (B, coarse, 8, 8)
        Residual(coarse),
        nn.GroupNorm(8, coarse),
        nn.SiLU(),
        nn.Conv2d(coarse, 2 * channels, 1),  # mu, then logvar
    ]
    decoder = [
        nn.Conv2d(channels, coarse, 3, padding=1),
        Residual(coarse),
        nn.ConvTranspose2d(coarse, fine, 2, stride=2),  # (B, fine, 16, 16)
        Residual(fine),
        nn.GroupNorm(8, fine),
        nn.SiLU(),
        nn.Conv2d(fine, colors, 3, padding=1),
        nn.PixelShuffle(block),  # (B, 3, size, size)
    ]
    if len(latent) == 1:
        grid = (channels, 8, 8)
        encoder += [nn.Flatten(), nn.Linear(2 * math.prod(grid), 2 * latent[0])]
        decoder = [nn.Linear(latent[0], math.prod(grid)), nn.Unflatten(1, grid), *decoder]
    return nn.Sequential(*encoder), nn.Sequential(*decoder)


def gaussian_nll(sse: Tensor, variance: Tensor, values: int) -> Tensor:
    """Return -log N(x; xhat, variance I) in nats per image of so many values.

    One variance for all values. The best one is the mean squared error; with the batch's
    this is the objective of sigma-VAE (Rybkin et al. 2021, section 3).
    """
    return sse / (2 * variance) + values / 2 * torch.log(2 * math.pi * variance)


def bits_per_dim(sse: Tensor, rate: Tensor, variance: Tensor, values: int) -> Tensor:
    """Return bits for each of an image's bytes, by the ELBO.

    A byte's probability is taken as its density times the bin's width, 1/255, which
    leaves out that the first and the last bin could reach to infinity.
    """
    return bits_of_nats(gaussian_nll(sse, variance, values) + rate, values)


def bits_of_nats(nats: Tensor | float, values: int) -> Tensor | float:
    """Convert -log p(x) of images in [0, 1] to bits for each of their bytes."""
    return (nats / values + math.log(255)) / math.log(2)


NETWORKS = {"mlp": build_mlp, "conv": build_conv}
LIKELIHOODS = ("mse", "gaussian")


class VAE(nn.Module):
    """Encoder to a diagonal Gaussian posterior, decoder to the mean image.

    latent: (size,), or (channels, 8, 8) with the convolutional network. center: whether
    the encoder gets x - 0.5; from inputs that are all positive most ReLUs of "mlp" die.
    size: one of SIZES.
    """

    def __init__(
        self,
        arch: str = "mlp",
        likelihood: str = "mse",
        latent: tuple = (128,),
        center: bool = False,
        size: int = 32,
    ):
        super().__init__()
        self.image_shape = (3, size, size)
        self.image_values = math.prod(self.image_shape)
        self.center = 0.5 if center else 0.0
        self.latent_shape = latent
        self.latent_size = math.prod(latent)
        self.likelihood = likelihood
        self.encoder, self.decoder = NETWORKS[arch](latent, size)
        self.register_buffer("variance", torch.tensor(0.5))  # set after each epoch

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Encode images in [0, 1] to mu and logvar, float32 (B, latent_size)."""
        return self.encoder(x - self.center).float().flatten(1).chunk(2, 1)

    def decode(self, z: Tensor) -> Tensor:
        """Decode latents (B, latent_size) to images in [0, 1], float32 (B, 3, h, w)."""
        logits = self.decoder(z.unflatten(1, self.latent_shape))
        return logits.float().sigmoid()

    def forward(
        self, x: Tensor, seed: Tensor, row_offset: int = 0, progress: Tensor | None = None
    ) -> Terms:
        """Return rate and squared error of images (B, 3, h, w), with one z each.

        seed (int64, one element) and row_offset (of x's first row in the whole batch)
        decide the noise. progress: of training, 0 to 1, for ConditionalVAE alone.
        """
        mu, logvar = self.encode(x)
        z, rate = reparam.reparameterize_kl(mu, logvar, seed, row_offset)
        return Terms(rate, squared_error(x, self.decode(z)))

    def distortion(self, sse: Tensor, variance: Tensor) -> Tensor:
        """Return the reconstruction term: squared error, or nats at a pixel variance."""
        if self.likelihood == "mse":  # gaussian_nll at 1/2, less a constant
            return sse
        return gaussian_nll(sse, variance, self.image_values)

    def reconstruct(self, x: Tensor) -> Tensor:
        """Encode images and decode their posterior means, (B, 3, h, w)."""
        mu, _ = self.encode(x)
        return self.decode(mu)

    def posterior_moments(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return posterior means (B, d) and the mean of the covariances, float64 (d, d).

        The latter on the CPU.
        """
        mu, logvar = self.encode(x)
        return mu, logvar.exp().cpu().double().mean(0).diag()


def squared_error(x: Tensor, xhat: Tensor) -> Tensor:
    """Return sum (x - xhat)^2 of each image, (B,)."""
    return functional.mse_loss(xhat, x, reduction="none").flatten(1).sum(1)


def from_bytes(images: Tensor) -> Tensor:
    """Convert uint8 images to float32 in [0, 1]."""
    return images.float().div_(255)


def to_bytes(images: Tensor) -> Tensor:
    """Round images to uint8; what is outside [0, 1] is cut off."""
    return (images.clamp(0, 1) * 255).round().byte()


def resize(images: Tensor, size: int) -> Tensor:
    """Return images (n, 3, h, w) in [0, 1] made larger or smaller, (n, 3, size, size)."""
    if images.shape[-1] == size:
        return images
    settings = {"mode": "bicubic", "antialias": True}
    return functional.interpolate(images, (size, size), **settings).clamp(0, 1)
