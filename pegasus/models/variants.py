"""Two published variants of the VAE, and the model that a run's options ask for.

Householder flow: a posterior with correlations.
    Tomczak and Welling, Improving Variational Auto-Encoders using Householder Flow
    (2016): v_1 = W_0 h, v_{t+1} = W_t v_t, z_t = z_{t-1} - 2 u_t (u_t . z_{t-1}) with
    u_t the unit vector of v_t.

Conditional prior: K Gaussians, one for each value of a code c that the encoder infers.
    Lavda, Gregorova and Kalousis, Data-Dependent Conditional Priors for Unsupervised
    Learning of Multimodal Data (2020):

    p(c) = 1/K,  p(z|c=k) = N(m_k, diag s_k^2)
    q(c|x) = softmax(encoder),  q(z|x,c) = N(W_h h + W_c c + b, ...)
    ELBO = E_q[log p(x|z,c)] - sum_k q(k|x) KL(q(z|x,k) || p(z|k))
           - [log K + sum_k q(k|x) log q(k|x)]
"""
import math
import re
from collections.abc import Callable
from typing import NamedTuple

import reparam
import vae
from pegasus import device
from pegasus.cli import UserError
from vae import VAE, Terms

import torch
from torch import Tensor, nn
from torch.nn import functional

CODES = 2**62  # first row of the codes' noise; latents have the rows below


def latent_shape(text: str) -> tuple[int, ...]:
    """Return (128,) for "128", a vector, and (4, 8, 8) for "8x8x4", a grid. Raises UserError."""
    fits = re.fullmatch("(8x8x)?[1-9][0-9]{0,4}", text)
    if not fits or int(text.removeprefix("8x8x")) > 65_536:
        raise UserError(
            f"--latent: got {text!r}, wanted a number of dimensions, as in 128, "
            "or a grid, as in 8x8x16"
        )
    *grid, channels = map(int, text.split("x"))
    return (channels, *grid)


def build(config: dict) -> VAE:
    """Return the untrained model of a run's options. Raises UserError."""
    shape = latent_shape(config["latent"])
    size = config.get("size", 32)  # of a checkpoint that is older than --size
    if size not in vae.SIZES:  # of a checkpoint
        raise ValueError(f"size: got {size}, wanted one of {vae.SIZES}")
    arguments = (config["arch"], config["likelihood"], shape, config["center"], size)
    is_grid = len(shape) > 1
    if is_grid and config["arch"] == "mlp":
        raise UserError(
            "--latent: a grid needs --arch conv; wanted a number of dimensions, as in 128"
        )
    if config["prior"] == "conditional":
        if config["flow"] or is_grid:
            raise UserError(
                "--prior: conditional needs a vector of latents and no --flow, whose "
                "divergence from it has no closed form; leave one of them out"
            )
        return ConditionalVAE(*arguments, count=config["components"])
    if config["flow"]:
        return HouseholderVAE(*arguments, reflections=config["flow"])
    return VAE(*arguments)


class Component(NamedTuple):
    """The plain VAE that is left of a variant for some images, once the code is known."""
    log_share: Tensor  # log q(c=k|x), (B,)
    mu: Tensor  # of q(z|x,k), (B, d), in coordinates where p(z|k) is N(0, I)
    logvar: Tensor
    decode: Callable[[Tensor], Tensor]  # from these coordinates to images


def components(model: VAE, x: Tensor) -> list[Component]:
    """Return one component for each code of a conditional prior, otherwise one."""
    if isinstance(model, ConditionalVAE):
        return model.components(x)
    if isinstance(model, HouseholderVAE):
        mu, logvar, units = model.encode_reflected(x)
    else:
        mu, logvar = model.encode(x)
        units = mu.new_zeros(len(mu), 0, model.latent_size)  # no reflection

    def decode(z: Tensor) -> Tensor:
        return model.decode(reflect(z, units))

    return [Component(mu.new_zeros(len(mu)), mu, logvar, decode)]


# ---- Householder flow ----


def unit(v: Tensor) -> Tensor:
    """Divide vectors (..., d) by their lengths, however short; zero stays zero."""
    largest = v.abs().amax(-1, keepdim=True)
    return functional.normalize(v / largest.where(largest > 0, 1), dim=-1)


def reflect(z: Tensor, units: Tensor) -> Tensor:
    """Reflect z (B, d) at T unit vectors in turn, (B, T, d)."""
    for u in units.unbind(1):
        z = z - 2 * u * (u * z).sum(1, keepdim=True)
    return z


def mean_covariance(variance: Tensor, units: Tensor) -> Tensor:
    """Return the mean over images of H diag(variance) H', float64 (d, d).

    variance: (n, d). units: the reflections that make up H, (n, T, d).

    H is I - P' U with the unit vectors as rows of U. One vector u more turns P into
    [P - 2 (P u) u', 2 u'], since (I - 2 u u')(I - P' U) = I - (P - 2 (P u) u')' U
    - 2 u u'. So H D H' is D - (P' U D)' - P' U D + P' (U D U') P, which takes products
    of (n T, d) matrices instead of a (d, d) one for each image.
    """
    variance = variance.double()
    u = units.double()
    p = u[:, :0]
    for last in u.split(1, 1):
        turned = p - 2 * (p * last).sum(2, keepdim=True) * last
        p = torch.cat([turned, 2 * last], 1)
    scaled = u * variance[:, None]
    once = p.flatten(0, 1).T @ scaled.flatten(0, 1)
    twice = (scaled @ u.mT @ p).flatten(0, 1).T @ p.flatten(0, 1)
    return variance.mean(0).diag() + (twice - once - once.T) / len(variance)


class Householder(nn.Module):
    """The encoder's last hidden layer h to T unit vectors (B, T, d)."""

    def __init__(self, steps: int, head: nn.Linear | nn.Conv2d, latent_size: int):
        """head: the encoder's last layer, from h to mu and logvar; v_1 needs half of it."""
        super().__init__()
        if isinstance(head, nn.Linear):
            first = nn.Linear(head.in_features, latent_size)
        else:
            convolution = nn.Conv2d(head.in_channels, head.out_channels // 2, 1)
            first = nn.Sequential(convolution, nn.Flatten())
        # without bias, so that a vector's length does not turn the next one
        rest = [nn.Linear(latent_size, latent_size, bias=False) for _ in range(steps - 1)]
        self.layers = nn.ModuleList([first, *rest])

    def forward(self, v: Tensor) -> Tensor:
        units = []
        for layer in self.layers:
            v = unit(layer(v).float())
            units.append(v)
        return torch.stack(units, 1)


class HouseholderVAE(VAE):
    """A VAE whose posterior is a diagonal Gaussian reflected `reflections` times.

    The product H of the reflections is orthogonal: |H z| = |z| and its determinant has
    size one, so under N(0, I) the KL stays that of the diagonal Gaussian.
    """

    def __init__(self, *arguments: object, reflections: int):
        """arguments: VAE's."""
        super().__init__(*arguments)
        self.flow = Householder(reflections, self.encoder[-1], self.latent_size)

    def encode_reflected(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return mu and logvar before the flow, (B, d), and unit vectors (B, T, d)."""
        h = self.encoder[:-1](x - self.center)
        mu, logvar = self.encoder[-1](h).float().flatten(1).chunk(2, 1)
        return mu, logvar, self.flow(h)

    def forward(
        self, x: Tensor, seed: Tensor, row_offset: int = 0, progress: Tensor | None = None
    ) -> Terms:
        mu, logvar, units = self.encode_reflected(x)
        z, rate = reparam.reparameterize_kl(mu, logvar, seed, row_offset)
        xhat = self.decode(reflect(z, units))
        return Terms(rate, vae.squared_error(x, xhat))

    def reconstruct(self, x: Tensor) -> Tensor:
        mu, _, units = self.encode_reflected(x)
        return self.decode(reflect(mu, units))

    def posterior_moments(self, x: Tensor) -> tuple[Tensor, Tensor]:
        mu, logvar, units = self.encode_reflected(x)
        return reflect(mu, units), mean_covariance(logvar.exp().cpu(), units.cpu())


# ---- conditional prior ----


def gumbel(rows: int, columns: int, seed: Tensor, row_offset: int = 0) -> Tensor:
    """Return Gumbel noise -log(-log u), float32 (rows, columns).

    Row r is a function of (seed, row_offset + r) alone.
    """
    groups = (columns + 3) // 4
    words = reparam.words(rows, groups, seed, CODES + row_offset)
    dtype = device.widest_float(words.device.type)
    uniform = (words.flatten(1)[:, :columns].to(dtype) + 0.5) * 2.0**-32
    uniform = uniform.clamp(max=1 - torch.finfo(dtype).eps / 2)  # float32 would round to 1
    return -(-uniform.log()).log().float()


class Conditional(nn.Module):
    """p(z|c), q(c|x), and what c adds to the parameters of q(z|x,c)."""

    def __init__(self, count: int, hidden_size: int, latent_size: int):
        """count: K. hidden_size: numbers in h, the encoder's last hidden layer."""
        super().__init__()
        # Small at first: a code that moves z before it means anything is noise, and
        # q(c|x) collapses onto one code.
        self.mean = nn.Parameter(0.1 * torch.randn(count, latent_size))
        self.logvar = nn.Parameter(torch.zeros(count, latent_size))  # log s_k^2
        self.shift = nn.Parameter(torch.zeros(count, 2 * latent_size))  # W_c'
        self.logits = nn.Linear(hidden_size, count)
        nn.init.zeros_(self.logits.weight)
        nn.init.zeros_(self.logits.bias)

    def log_shares(self, h: Tensor) -> Tensor:
        """Return log q(c|x), float32 (B, K), from h (B, hidden_size)."""
        return self.logits(h).float().log_softmax(1)

    def relax(
        self, log_share: Tensor, seed: Tensor, row_offset: int, temperature: Tensor | float
    ) -> Tensor:
        """Draw relaxed codes (B, K): softmax((log q + Gumbel) / temperature).

        Jang et al. 2017. They have a gradient, which hard codes have not.
        """
        noise = gumbel(*log_share.shape, seed, row_offset)
        return ((log_share + noise) / temperature).softmax(1)

    def posterior(self, mu_logvar: Tensor, code: Tensor) -> tuple[Tensor, Tensor]:
        """Return mu and logvar, (B, d), of q(z|x,c) for codes (B, K), hard or relaxed.

        mu_logvar: W_h h + b, mu's beside logvar's, (B, 2 d).
        """
        return (mu_logvar + (code @ self.shift).float()).chunk(2, 1)

    def whiten(self, mu_logvar: Tensor) -> tuple[Tensor, Tensor]:
        """Return mu and logvar of q(z|x,k) for all k, (B, K, d), where p(z|k) is N(0, I)."""
        mu, logvar = (mu_logvar[:, None] + self.shift).chunk(2, 2)
        return (mu - self.mean) * (-self.logvar / 2).exp(), logvar - self.logvar

    def rate(self, log_share: Tensor, mu_logvar: Tensor) -> Tensor:
        """Return the exact divergence from the prior in nats, (B,), summed over codes.

        sum_k q(k|x) KL_k + log K + sum_k q(k|x) log q(k|x)
        """
        mu, logvar = self.whiten(mu_logvar)
        divergences = (logvar.exp() + mu.square() - 1 - logvar).sum(2) / 2
        mixed = (log_share.exp() * (divergences + log_share)).sum(1)
        return mixed + math.log(log_share.shape[1])

    def infer(self, z: Tensor) -> Tensor:
        """Return the likeliest code of latents (B, d), p(c|z) ~ p(z|c), one-hot (B, K)."""
        white = (z[:, None] - self.mean) * (-self.logvar / 2).exp()
        best = (white.square() + self.logvar).sum(2).argmin(1)
        return functional.one_hot(best, len(self.mean)).to(z.dtype)


class ConditionalVAE(VAE):
    """A VAE with a prior of K Gaussians and a decoder that is told which one.

    With `progress` (training) each image has one relaxed code, and the terms bound
    nothing. Without it they are those of the ELBO, summed over hard codes.
    """

    def __init__(self, *arguments: object, count: int):
        """arguments: VAE's. count: K."""
        super().__init__(*arguments)
        hidden_size = self.encoder[-1].in_features
        first = nn.Linear(self.latent_size + count, self.decoder[0].out_features)
        nn.init.zeros_(first.weight.data[:, self.latent_size :])  # see `Conditional`
        self.decoder[0] = first
        self.conditional = Conditional(count, hidden_size, self.latent_size)

    def hidden(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return h, and mu beside logvar made of it, float32 (B, 2 d)."""
        h = self.encoder[:-1](x - self.center)
        return h, self.encoder[-1](h).float()

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return mu and logvar, (B, d), of q(z|x,c) with the likeliest c."""
        h, mu_logvar = self.hidden(x)
        best = self.conditional.log_shares(h).argmax(1)
        code = functional.one_hot(best, len(self.conditional.mean)).float()
        return self.conditional.posterior(mu_logvar, code)

    def decode(self, z: Tensor, code: Tensor | None = None) -> Tensor:
        """Decode latents to images; code: (B, K), by default the likeliest for z."""
        if code is None:
            code = self.conditional.infer(z)
        return self.decoder(torch.cat([z, code], 1)).float().sigmoid()

    def forward(
        self, x: Tensor, seed: Tensor, row_offset: int = 0, progress: Tensor | None = None
    ) -> Terms:
        h, mu_logvar = self.hidden(x)
        log_share = self.conditional.log_shares(h)
        rate = self.conditional.rate(log_share, mu_logvar)
        if progress is None:
            return Terms(rate, self.expected_error(x, seed, row_offset))
        temperature = 1 - progress / 2  # from 1 to 1/2
        code = self.conditional.relax(log_share, seed, row_offset, temperature)
        mu, logvar = self.conditional.posterior(mu_logvar, code)
        z = reparam.reparameterize(mu, logvar, seed, row_offset)
        return Terms(rate, vae.squared_error(x, self.decode(z, code)))

    def expected_error(self, x: Tensor, seed: Tensor, row_offset: int) -> Tensor:
        """Return the squared error's expectation over q(c|x), one sample of z a code."""
        sse = x.new_zeros(len(x))
        for part in self.components(x):
            z = reparam.reparameterize(part.mu, part.logvar, seed, row_offset)
            error = vae.squared_error(x, part.decode(z))
            sse = sse + part.log_share.exp() * error
        return sse

    def components(self, x: Tensor) -> list[Component]:
        """Return what is left of the model for images and each code."""
        h, mu_logvar = self.hidden(x)
        log_share = self.conditional.log_shares(h)
        mu, logvar = self.conditional.whiten(mu_logvar)
        result = []
        for k in range(log_share.shape[1]):
            decode = self.component_decoder(k)
            result.append(Component(log_share[:, k], mu[:, k], logvar[:, k], decode))
        return result

    def component_decoder(self, k: int) -> Callable[[Tensor], Tensor]:
        """Return a decoder of latents in coordinates where p(z|k) is N(0, I)."""
        prior = self.conditional
        code = functional.one_hot(torch.tensor(k), len(prior.mean)).to(prior.mean)

        def decode(z: Tensor) -> Tensor:
            latents = prior.mean[k] + (prior.logvar[k] / 2).exp() * z
            return self.decode(latents, code.expand(len(z), -1))

        return decode

    def sample_codes(self, n: int, seed: int) -> Tensor:
        """Draw codes from p(c), one-hot (n, K); row i is a function of (seed, i) alone."""
        words = reparam.words(n, 1, torch.tensor(seed), CODES)[:, 0, 0]
        mean = self.conditional.mean
        return functional.one_hot(words % len(mean), len(mean)).to(mean)

    def sample_latents(self, eps: Tensor, code: Tensor) -> Tensor:
        """Draw from p(z|c) out of standard normals (n, d) and codes (n, K)."""
        prior = self.conditional
        std = (code @ prior.logvar / 2).exp()
        return code @ prior.mean + std * eps.to(code.device)
