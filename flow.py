"""A posterior with correlations: Householder reflections of a diagonal Gaussian's samples.

Tomczak and Welling, Improving Variational Auto-Encoders using Householder Flow (2016): v_1 = W_0 h, v_{t+1} = W_t v_t,
z_t = z_{t-1} - 2 u_t (u_t . z_{t-1}) with u_t the unit vector of v_t. The product H of the reflections is orthogonal:
its determinant has size one and |H z| = |z|, so that under a prior N(0, I) the divergence of N(H mu, H diag(v) H') is
that of N(mu, diag(v)), in closed form. No d x d matrix is formed for an image.
"""
import torch
from torch import Tensor, nn
from torch.nn import functional


def unit(v: Tensor) -> Tensor:
    """Vectors (..., d) divided by their lengths, however short; zero stays zero, which reflects nothing."""
    largest = v.abs().amax(-1, keepdim=True)
    return functional.normalize(v / largest.where(largest > 0, 1), dim=-1)


def reflect(z: Tensor, units: Tensor) -> Tensor:
    """z (B, d) reflected at T unit vectors after each other, (B, T, d); T may be 0."""
    for u in units.unbind(1):
        z = z - 2 * u * (u * z).sum(1, keepdim=True)
    return z


def mean_covariance(variance: Tensor, units: Tensor) -> Tensor:
    """The mean over images of H diag(variance) H', float64 (d, d), for variances (n, d) and unit vectors (n, T, d).

    H is I - P' U with the unit vectors as the rows of U, and one vector u more turns P into [P - 2 (P u) u', 2 u'],
    since (I - 2 u u')(I - P' U) = I - (P - 2 (P u) u')' U - 2 u u'. So H D H' is D - (P' U D)' - P' U D +
    P' (U D U') P: products of (n T, d) matrices.
    """
    variance, u = variance.double(), units.double()
    p = u[:, :0]
    for last in u.split(1, 1):
        p = torch.cat([p - 2 * (p * last).sum(2, keepdim=True) * last, 2 * last], 1)
    scaled = u * variance[:, None]
    once = p.flatten(0, 1).T @ scaled.flatten(0, 1)
    twice = (scaled @ u.mT @ p).flatten(0, 1).T @ p.flatten(0, 1)
    return variance.mean(0).diag() + (twice - once - once.T) / len(variance)


class Householder(nn.Module):
    """The encoder's last hidden layer h to T unit vectors (B, T, d)."""

    def __init__(self, steps: int, head: nn.Linear | nn.Conv2d, latent: int):
        """head: the encoder's last layer, h to mu and logvar; h to v_1 is one like it with half as many outputs."""
        super().__init__()
        if isinstance(head, nn.Linear):
            first = nn.Linear(head.in_features, latent)
        else:
            first = nn.Sequential(nn.Conv2d(head.in_channels, head.out_channels // 2, 1), nn.Flatten())
        self.layers = nn.ModuleList([first, *(nn.Linear(latent, latent, bias=False) for _ in range(steps - 1))])

    def forward(self, v: Tensor) -> Tensor:
        # only the first layer has a bias, so the length of a vector does not change the direction of the next
        return torch.stack([v := unit(layer(v).float()) for layer in self.layers], 1)
