"""The variational autoencoder: networks, posterior, objective; rate and distortion in nats.

The paper is "Winged Horses with a Vanilla Variational Auto encoder"; its model is Kingma and Welling's
Auto-Encoding Variational Bayes (2014) with a squared error:

    loss(x) = sum (x - xhat)^2 + KL(N(mu, exp(logvar)) || N(0, I)),  xhat = decoder(z),  z ~ N(mu, exp(logvar))

Better pictures come from the calibrated likelihood and a convolutional network (`gaussian`, `conv`).
"""
import math
import re
from typing import NamedTuple

import flow
import fused
import reparam
from options import Fault
from conditional import Conditional, Given

import torch
from torch import Tensor, nn

IMAGE = (3, 32, 32)
PIXELS = 3072


class Terms(NamedTuple):
    """What the objective is made of, for each image, float32 (B,)."""
    rate: Tensor  # nats
    sse: Tensor   # squared error summed over an image's 3,072 values in [0, 1]


def latent_shape(latent: str) -> tuple[int, ...]:
    """`128` to (128,), a vector; `8x8x4` (rows, columns, channels) to (4, 8, 8), a grid. Raises Fault."""
    if not re.fullmatch("(8x8x)?[1-9][0-9]{0,4}", latent) or int(latent.removeprefix("8x8x")) > 65_536:
        raise Fault(f"--latent: got {latent!r}, wanted a number of dimensions, as in 128, or a grid, as in 8x8x8")
    *grid, channels = map(int, latent.split("x"))
    return (channels, *grid)


def mlp(shape: tuple[int, ...]) -> tuple[nn.Module, nn.Module]:
    """The paper's network: 3072 -> 512 ReLU -> (mu, logvar), latent -> 512 ReLU -> 3072 logits."""
    if len(shape) > 1:
        raise Fault("--latent: a grid needs --arch conv; wanted a number of dimensions, as in 128")
    encoder = nn.Sequential(nn.Flatten(), nn.Linear(PIXELS, 512), nn.ReLU(), nn.Linear(512, 2 * shape[0]))
    decoder = nn.Sequential(nn.Linear(shape[0], 512), nn.ReLU(), nn.Linear(512, PIXELS), nn.Unflatten(1, IMAGE))
    return encoder, decoder


class Residual(nn.Module):
    """x + conv(silu(norm(conv(silu(norm(x)))))), (B, channels, h, w)."""

    def __init__(self, channels: int):
        super().__init__()
        self.body = fused.Sequence(*(layer for _ in range(2) for layer in (
            nn.GroupNorm(8, channels), nn.SiLU(), fused.Convolution(channels, channels))))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x)


def conv(shape: tuple[int, ...], fine: int = 64, coarse: int = 64) -> tuple[nn.Module, nn.Module]:
    """A small residual network with `fine` channels at 16 x 16 and `coarse` at 8 x 8, where a grid of latents lies.

    A vector of latents adds a linear layer at each end: 8 x 8 x 16 numbers to mu and logvar, z to 8 x 8 x 8 numbers.
    """
    channels = shape[0] if len(shape) == 3 else 8
    encoder = [nn.PixelUnshuffle(2), nn.Conv2d(12, fine, 3, padding=1), Residual(fine),
               fused.Shrink(fine, coarse, 2, 2), Residual(coarse),
               nn.GroupNorm(8, coarse), nn.SiLU(), fused.Shrink(coarse, 2 * channels, 1)]
    decoder = [nn.Conv2d(channels, coarse, 3, padding=1), Residual(coarse), fused.Grow(coarse, fine, 2, 2),
               Residual(fine), nn.GroupNorm(8, fine), nn.SiLU(), nn.Conv2d(fine, 12, 3, padding=1), nn.PixelShuffle(2)]
    if len(shape) == 1:
        encoder += [nn.Flatten(), nn.Linear(128 * channels, 2 * shape[0])]
        decoder = [nn.Linear(shape[0], 64 * channels), nn.Unflatten(1, (channels, 8, 8)), *decoder]
    return tuple(fused.Sequence(*layers).to(memory_format=torch.channels_last) for layers in (encoder, decoder))


def gaussian(sse: Tensor, variance: Tensor) -> Tensor:
    """-log N(x; xhat, variance I) in nats an image, (B,), with one variance for all pixels.

    With the batch's mean squared error as variance, its optimum, this is sigma-VAE's (Rybkin et al. 2021, section 3).
    """
    return sse / (2 * variance) + PIXELS / 2 * torch.log(2 * math.pi * variance)


def bits_per_dim(sse: Tensor, rate: Tensor, variance: Tensor) -> Tensor:
    """Bits for each of an image's 3,072 bytes at a pixel variance, up to the binning of pixels."""
    return ((gaussian(sse, variance) + rate) / PIXELS + math.log(256)) / math.log(2)


NETWORKS = {"mlp": mlp, "conv": conv}
LIKELIHOODS = {"mse": lambda sse, variance: sse, "gaussian": gaussian}  # mse: a variance of 1/2, up to a constant


class VAE(nn.Module):
    """An encoder to a Gaussian posterior, a decoder to the mean image, a standard normal prior.

    The posterior is diagonal or, with `reflections`, that many Householder reflections of a diagonal one. With
    `components` the prior is so many Gaussians, and posterior and decoder depend on which one.
    """

    def __init__(self, arch: str = "mlp", likelihood: str = "mse", latent: str = "128", reflections: int = 0,
                 components: int = 0):
        super().__init__()
        self.shape = latent_shape(latent)
        self.latent = math.prod(self.shape)
        self.encoder, self.decoder = NETWORKS[arch](self.shape)
        self.split = self.encoder[:-1], self.encoder[-1]  # slicing takes 30 us; a tuple adds nothing to state_dict
        self.distortion = LIKELIHOODS[likelihood]  # (sse, variance) to nats
        self.register_buffer("variance", torch.tensor(0.5))  # of a pixel, as last measured on the training set
        self.flow = flow.Householder(reflections, self.encoder[-1], self.latent) if reflections else None
        self.conditional = self.add_components(components) if components else None

    def add_components(self, components: int) -> Conditional:
        """A conditional prior for this network, whose decoder from now on takes z beside the code. Raises Fault."""
        if self.flow or len(self.shape) > 1:
            raise Fault("--prior: conditional needs a vector of latents and no --flow, whose divergence from it has no "
                        "closed form; leave one of them out")
        self.decoder[0] = nn.Linear(self.latent + components, self.decoder[0].out_features)
        nn.init.zeros_(self.decoder[0].weight.data[:, self.latent:])  # a code is noise at first: see `Conditional`
        return Conditional(components, self.encoder[-1].in_features, self.latent)

    def hidden(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The encoder's last hidden layer h, and mu beside logvar made of it, float32 (B, 2 latent)."""
        body, head = self.split
        h = body(x)
        return h, head(h).float().flatten(1)

    def posterior(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Images (B, 3, 32, 32) in [0, 1] to mu and logvar, float32 (B, latent), and unit vectors (B, T, latent).

        A sample of N(mu, exp(logvar)), reflected at the unit vectors, is one of the posterior. Under a conditional
        prior it is that of the likeliest code.
        """
        h, mu_logvar = self.hidden(x)
        mu, logvar = self.conditional.likeliest(h, mu_logvar) if self.conditional else mu_logvar.chunk(2, 1)
        return mu, logvar, self.flow(h) if self.flow else mu.new_zeros(len(mu), 0, self.latent)

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Images (B, 3, 32, 32) in [0, 1] to the posterior's mu and logvar before any flow, float32 (B, latent)."""
        return self.posterior(x)[:2]

    def decode(self, z: Tensor, code: Tensor | None = None) -> Tensor:
        """Latents (B, latent) to mean images, float32 (B, 3, 32, 32) in [0, 1]; code as in `logits`."""
        return self.logits(z, code).float().sigmoid()

    def logits(self, z: Tensor, code: Tensor | None = None) -> Tensor:
        """What `decode` takes the sigmoid of, contiguous.

        code: of a conditional prior, (B, K); by default the likeliest one for z.
        """
        if self.conditional:
            z = torch.cat([z, self.conditional.infer(z) if code is None else code], 1)
        return self.decoder(z if len(self.shape) == 1 else z.unflatten(1, self.shape)).contiguous()

    def given(self, x: Tensor) -> list[Given]:
        """For each code the plain VAE that is left when it is known; without a conditional prior the only one."""
        if self.conditional:
            return self.conditional.given(*self.hidden(x), self.decode)
        mu, logvar, units = self.posterior(x)
        return [Given(mu.new_zeros(len(mu)), mu, logvar, lambda z: self.decode(flow.reflect(z, units)))]

    def coded(self, x: Tensor, seed: Tensor, row_offset: int, progress: Tensor | float | None) -> Terms:
        """`forward` under a conditional prior: by one relaxed code an image, or without progress summed over codes."""
        h, mu_logvar = self.hidden(x)
        log_share, sse = self.conditional.log_shares(h), x.new_zeros(len(x))
        if progress is None:
            for part in self.conditional.given(h, mu_logvar, self.decode):
                z, _ = reparam.reparameterize_kl(part.mu, part.logvar, seed, row_offset)
                sse = sse + part.log_share.exp() * (x - part.decode(z)).square().flatten(1).sum(1)
        else:
            code = self.conditional.relax(log_share, seed, row_offset, 1 - progress / 2)  # temperatures from 1 to 1/2
            z, _ = reparam.reparameterize_kl(*self.conditional.posterior(mu_logvar, code), seed, row_offset)
            sse = fused.squared_error(self.logits(z, code), x)
        return Terms(self.conditional.rate(log_share, mu_logvar), sse)

    def forward(self, x: Tensor, seed: Tensor, row_offset: int = 0,
                progress: Tensor | float | None = None) -> Terms:
        """Rate and squared error with one posterior sample for each image (B, 3, 32, 32).

        seed, row_offset: the sample's noise, as in `reparam.reparameterize_kl`. progress: of the training, 0 to 1,
        where a conditional prior's codes are to be relaxed; without it the terms are those of a bound.
        """
        if self.conditional:
            return self.coded(x, seed, row_offset, progress)
        mu, logvar, units = self.posterior(x)
        z, rate = reparam.reparameterize_kl(mu, logvar, seed, row_offset)
        return Terms(rate, fused.squared_error(self.logits(flow.reflect(z, units)), x))

    def reconstruct(self, x: Tensor) -> Tensor:
        """Images decoded again from their posterior means, (B, 3, 32, 32)."""
        mu, _, units = self.posterior(x)
        return self.decode(flow.reflect(mu, units))


def build(config: dict) -> VAE:
    """The model of a run's options. Raises Fault."""
    components = config["components"] if config["prior"] == "conditional" else 0
    return VAE(config["arch"], config["likelihood"], config["latent"], config["flow"], components)


def from_bytes(images: Tensor) -> Tensor:
    """uint8 images to float32 in [0, 1]."""
    return images.float().div_(255)


def noise(n: int, latent: int, seed: int) -> Tensor:
    """Standard normals (n, latent); row i is a function of (seed, i) alone."""
    return reparam.normals(n, latent, torch.tensor(seed))
