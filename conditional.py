"""A prior of K Gaussians, one for each value of a discrete code c that the encoder infers and the decoder is told.

Lavda, Gregorova and Kalousis, Data-Dependent Conditional Priors for Unsupervised Learning of Multimodal Data (2020):

    p(c) = 1/K,  p(z|c=k) = N(m_k, diag s_k^2),  q(c|x) = softmax of the encoder,  q(z|x,c) = N(W_h h + W_c c + b, ...)
    ELBO = E_q[log p(x|z,c)] - sum_k q(k|x) KL(q(z|x,k) || p(z|k)) - [log K + sum_k q(k|x) log q(k|x)]

Training draws a c that is relaxed, between one-hot codes, so that it has a gradient: its loss is no bound. Given a
hard c the model is a plain one in the coordinates (z - m_k) / s_k, where p(z|k) is N(0, I): from these K the bound is
summed up exactly.
"""
import math
from collections.abc import Callable
from typing import NamedTuple

import reparam

import torch
from torch import Tensor, nn
from torch.nn import functional

CODES = 2**62  # rows of noise from here on are the codes', those below the latents', which have the same seed


class Given(NamedTuple):
    """What is left of some images' posterior, and of the decoder, when the code is known: a plain VAE."""
    log_share: Tensor  # log q(c=k|x), (B,)
    mu: Tensor  # of q(z|x,k), (B, latent), in coordinates where p(z|k) is N(0, I)
    logvar: Tensor
    decode: Callable[[Tensor], Tensor]  # from these coordinates to mean images


def gumbel(rows: int, columns: int, seed: Tensor, row_offset: int = 0) -> Tensor:
    """Gumbel noise -log(-log u), float32 (rows, columns); row r is a function of (seed, row_offset + r) alone."""
    words = reparam.words(rows, (columns + 3) // 4, seed, CODES + row_offset).flatten(1)[:, :columns]
    return -(-((words.double() + 0.5) * 2.0**-32).log()).log().float()


class Conditional(nn.Module):
    """p(z|c), q(c|x), and what c adds to the parameters of q(z|x,c)."""

    def __init__(self, components: int, hidden: int, latent: int):
        """components: K; hidden: the numbers in h, the encoder's last hidden layer."""
        super().__init__()
        # Small at first: a code that moves z before it means anything is noise, and q(c|x) collapses onto one code.
        self.mean = nn.Parameter(0.1 * torch.randn(components, latent))
        self.logvar = nn.Parameter(torch.zeros(components, latent))  # log s_k^2
        self.shift = nn.Parameter(torch.zeros(components, 2 * latent))  # W_c'
        self.logits = nn.Linear(hidden, components)
        nn.init.zeros_(self.logits.weight)
        nn.init.zeros_(self.logits.bias)

    def log_shares(self, h: Tensor) -> Tensor:
        """log q(c|x), float32 (B, K), from h (B, hidden)."""
        return self.logits(h).float().log_softmax(1)

    def relax(self, log_share: Tensor, seed: Tensor, row_offset: int, temperature: Tensor | float) -> Tensor:
        """Codes (B, K) drawn from q(c|x), relaxed: softmax((log q + Gumbel) / temperature) (Jang et al. 2017)."""
        return ((log_share + gumbel(*log_share.shape, seed, row_offset)) / temperature).softmax(1)

    def posterior(self, mu_logvar: Tensor, code: Tensor) -> tuple[Tensor, Tensor]:
        """mu and logvar, (B, latent), of q(z|x,c) for one code, hard or relaxed, for each row, (B, K).

        mu_logvar: W_h h + b, mu's beside logvar's, (B, 2 latent).
        """
        return (mu_logvar + (code @ self.shift).float()).chunk(2, 1)

    def whiten(self, mu_logvar: Tensor) -> tuple[Tensor, Tensor]:
        """mu and logvar of q(z|x,k) for all k, (B, K, latent), in coordinates where p(z|k) is N(0, I)."""
        mu, logvar = (mu_logvar[:, None] + self.shift).chunk(2, 2)
        return (mu - self.mean) * (-self.logvar / 2).exp(), logvar - self.logvar

    def rate(self, log_share: Tensor, mu_logvar: Tensor) -> Tensor:
        """sum_k q(k|x) KL_k + log K + sum_k q(k|x) log q(k|x), the divergence from the prior, exact, in nats (B,)."""
        mu, logvar = self.whiten(mu_logvar)
        divergences = (logvar.exp() + mu.square() - 1 - logvar).sum(2) / 2
        return (log_share.exp() * (divergences + log_share)).sum(1) + math.log(log_share.shape[1])

    def given(self, h: Tensor, mu_logvar: Tensor, decode: Callable[[Tensor, Tensor], Tensor]) -> list[Given]:
        """For each code what images with these h and `mu_logvar` are coded as. decode: of z and codes (B, K)."""
        codes = torch.eye(len(self.mean), device=mu_logvar.device)
        parts = zip(*(part.unbind(1) for part in (self.log_shares(h), *self.whiten(mu_logvar))), strict=True)
        return [Given(*part, lambda z, k=k: decode(self.mean[k] + (self.logvar[k] / 2).exp() * z,
                                                   codes[k].expand(len(z), -1))) for k, part in enumerate(parts)]

    def likeliest(self, h: Tensor, mu_logvar: Tensor) -> tuple[Tensor, Tensor]:
        """mu and logvar, (B, latent), of q(z|x,c) with the likeliest c."""
        return self.posterior(mu_logvar, functional.one_hot(self.log_shares(h).argmax(1), len(self.mean)).float())

    def infer(self, z: Tensor) -> Tensor:
        """The likeliest code for latents (B, latent), p(c|z) ~ p(z|c), one-hot (B, K)."""
        white = (z[:, None] - self.mean) * (-self.logvar / 2).exp()
        best = (white.square() + self.logvar).sum(2).argmin(1)
        return functional.one_hot(best, len(self.mean)).to(z.dtype)

    def codes(self, n: int, seed: int) -> Tensor:
        """Codes drawn from p(c), one-hot (n, K); row i is a function of (seed, i) alone."""
        k = reparam.words(n, 1, torch.tensor(seed), CODES)[:, 0, 0] % len(self.mean)
        return functional.one_hot(k, len(self.mean)).float().to(self.mean.device)

    def draw(self, eps: Tensor, code: Tensor) -> Tensor:
        """Latents from p(z|c) out of standard normals (n, latent) and codes (n, K)."""
        return code @ self.mean + (code @ self.logvar / 2).exp() * eps.to(code.device)
