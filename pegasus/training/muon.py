"""Muon: momentum made orthogonal, for the weights in the middle of a network.

Jordan et al. 2024, https://kellerjordan.github.io/posts/muon. A weight is a matrix, of
outputs by inputs. The few directions in which its gradient is large decide a step of
plain momentum; here all directions count alike. Adam trains the rest.
"""
import math

import torch
from torch import Tensor, nn

MOMENTUM = 0.95
LEAST = 64  # channels in and out of a weight that Muon trains
ITERATIONS = 5
A, B, C = 3.4445, -4.7750, 2.0315  # of the iteration; Jordan's
RATE = 10  # times Adam's learning rate


def is_hidden(weight: Tensor) -> bool:
    """Return whether a weight is one for Muon: of a convolution of hidden channels.

    Not of one from or to an image or latents, which have few channels, or 108 for 96 pixels:
    hidden ones are multiples of 16.
    """
    channels = weight.shape[:2]
    few = min(channels) < LEAST or any(number % 16 for number in channels)
    return weight.ndim == 4 and not few


def as_matrix(weight: Tensor) -> Tensor:
    """Return a weight (r, c, h, w) as (r, h w c), a view where channels are innermost."""
    return weight.movedim(1, 3).flatten(1)


def polynomial(gram: Tensor) -> Tensor:
    """Return a I + b G + c G^2 of a matrix G (r, r)."""
    result = torch.addmm(gram, gram, gram, beta=B, alpha=C)
    result.diagonal().add_(A)
    return result


def orthogonalize(matrix: Tensor) -> Tensor:
    """Bring all singular values of a matrix (r, c) to 0.7 to 1.2, but for tiny ones.

    By an odd polynomial of the matrix X, scaled to length 1, applied five times:
    a X + b (X X') X + c (X X')^2 X. All but the last product takes X X' alone, for speed.
    """
    is_tall = matrix.shape[0] > matrix.shape[1]
    x = matrix.mT if is_tall else matrix
    gram = x @ x.mT
    square = gram.trace().clamp(min=1e-14)  # of the length
    gram = gram / square
    factor = polynomial(gram)
    product = factor
    for _ in range(ITERATIONS - 1):
        gram = factor @ gram @ factor
        factor = polynomial(gram)
        product = factor @ product
    x = (product * square.rsqrt()) @ x
    return x.mT if is_tall else x


class Muon(torch.optim.Optimizer):
    """Muon for convolutions in float32; each step sets its learning rate, as Adam's.

    Like torch's fused Adam, reads `grad_scale`, by which gradients are divided unless
    it is None, and `found_inf`, 1.0 to skip a step.
    """

    def __init__(self, weights: list[nn.Parameter]):
        super().__init__(weights, {"lr": 0.0})
        self.grad_scale = None
        self.found_inf = torch.zeros(())

    @torch.no_grad()
    def step(self) -> None:
        for weight in self.param_groups[0]["params"]:
            direction = as_matrix(self.direction(weight))
            rows, columns = direction.shape
            rate = RATE * self.param_groups[0]["lr"] * math.sqrt(max(1, rows / columns))
            step = orthogonalize(direction) * (rate * (1 - self.found_inf))
            weight.sub_(step.unflatten(1, (*weight.shape[2:], -1)).movedim(3, 1))

    def direction(self, weight: nn.Parameter) -> Tensor:
        """Add a gradient to its momentum; return where both point (Nesterov)."""
        state = self.state[weight]
        if not state:
            state["momentum"] = torch.zeros_like(weight)
        gradient = weight.grad if self.grad_scale is None else weight.grad / self.grad_scale
        gradient = torch.where(self.found_inf > 0, 0, gradient)
        state["momentum"].lerp_(gradient, (1 - MOMENTUM) * (1 - self.found_inf))
        return gradient.lerp(state["momentum"], MOMENTUM)
