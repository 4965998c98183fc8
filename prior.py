"""The learned prior: a flow from noise to the latents of photographs, conditioned on the class, and its compositions.

A trained autoencoder stays as it is. Its latents z_1, normalised per channel, and noise z_0 ~ N(0, I) are joined by
straight lines z_t = (1 - t) z_0 + t z_1, and a network v(z_t, t, class) learns their direction z_1 - z_0 by mean
squares (flow matching: Lipman et al. 2023, Liu et al. 2023). Following v from noise at t = 0 to t = 1 draws a latent.
Now and then the class is hidden in training, so that classes can be weighed against "any" (classifier-free guidance:
Ho and Salimans 2022) and against each other (Liu et al. 2022): v_none + sum over classes k of w_k (v_k - v_none).
"""
import copy
import math
import statistics
import time
from collections.abc import Callable, Sequence

import density
import fused
import recipe
import reparam
import replay

import torch
from torch import Tensor, nn
from torch.nn import functional

CHUNK = 64  # latents that are drawn at a time


class Block(nn.Module):
    """x + conv(silu(scale * norm(conv(silu(norm(x)))) + shift)), (B, channels, h, w); the condition gives both."""

    def __init__(self, channels: int, condition: int):
        super().__init__()
        self.first = fused.Sequence(nn.GroupNorm(8, channels), nn.SiLU(), fused.Convolution(channels, channels))
        self.condition = nn.Linear(condition, 2 * channels)
        self.last = fused.Convolution(channels, channels)
        nn.init.zeros_(self.last.weight)
        nn.init.zeros_(self.last.bias)

    def forward(self, x: Tensor, e: Tensor) -> Tensor:
        scale, shift = self.condition(e).chunk(2, 1)
        return x + self.last(fused.silu_group_norm(self.first(x), 8, 1 + scale, shift))


class Attention(nn.Module):
    """x + attention over all places of norm(x), (B, channels, h, w)."""

    def __init__(self, channels: int, heads: int = 4):
        super().__init__()
        self.heads, self.norm = heads, nn.GroupNorm(8, channels)
        self.inside, self.out = fused.Shrink(channels, 3 * channels, 1), fused.Shrink(channels, channels, 1)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def forward(self, x: Tensor) -> Tensor:
        inside = self.inside(self.norm(x.contiguous())).flatten(2).contiguous()  # attention likes channels outermost
        parts = inside.unflatten(1, (3, self.heads, -1)).transpose(3, 4)
        seen = functional.scaled_dot_product_attention(*parts.unbind(1))
        return x + self.out(seen.transpose(2, 3).flatten(1, 2).view_as(x))


class Velocity(nn.Module):
    """v(z, t, class) for latents on a grid: a U-net of 8 x 8 and 4 x 4, (B, latent) to (B, latent).

    Class number `classes`, one past the last, is "none": any of them. At first the velocity is zero everywhere.
    """

    def __init__(self, shape: tuple[int, int, int], classes: int, fine: int = 96, coarse: int = 160,
                 condition: int = 128):
        super().__init__()
        self.shape = shape
        self.time = nn.Sequential(nn.Linear(32, condition), nn.SiLU(), nn.Linear(condition, condition))
        self.name = nn.Embedding(classes + 1, condition)
        self.enter = nn.Conv2d(shape[0], fine, 3, padding=1)
        self.down = nn.ModuleList(Block(fine, condition) for _ in range(2))
        self.shrink = fused.Shrink(fine, coarse, 2, 2)
        self.middle = nn.ModuleList(Block(coarse, condition) for _ in range(3))
        self.attention = Attention(coarse)
        self.grow = fused.Grow(coarse, fine, 2, 2)
        self.join = fused.Shrink(2 * fine, fine, 1)
        self.up = nn.ModuleList(Block(fine, condition) for _ in range(2))
        self.leave = fused.Sequence(nn.GroupNorm(8, fine), nn.SiLU(), nn.Conv2d(fine, shape[0], 3, padding=1))
        nn.init.zeros_(self.leave[-1].weight)
        nn.init.zeros_(self.leave[-1].bias)
        self.to(memory_format=torch.channels_last)

    def forward(self, z: Tensor, t: Tensor, names: Tensor) -> Tensor:
        """Velocities float32 (B, latent) of normalised latents (B, latent) at times (B,), of class numbers (B,)."""
        angles = t[:, None] * torch.exp(torch.linspace(0, math.log(1000), 16, device=z.device))
        e = functional.silu(self.time(torch.cat([angles.sin(), angles.cos()], 1)) + self.name(names))
        x = self.enter(z.unflatten(1, self.shape))
        for block in self.down:
            x = block(x, e)
        y = self.attention(self.middle[0](self.shrink(x), e))
        for block in self.middle[1:]:
            y = block(y, e)
        x = self.join(torch.cat([x, self.grow(y)], 1))
        for block in self.up:
            x = block(x, e)
        return self.leave(x).float().flatten(1)


class Learned(nn.Module):
    """A learned prior: the velocity that is trained, its average over the steps, which draws, and the normalisation."""

    def __init__(self, shape: tuple[int, int, int], classes: int):
        super().__init__()
        self.none = classes + len(density.COATS)  # the coats are the first class's
        self.velocity = Velocity(shape, self.none)
        self.average = copy.deepcopy(self.velocity).requires_grad_(False)
        self.register_buffer("mean", torch.zeros(math.prod(shape)))
        self.register_buffer("std", torch.ones(math.prod(shape)))

    @torch.no_grad()
    def measure(self, mu: Tensor, logvar: Tensor) -> None:
        """Set mean and standard deviation of each channel to those of samples of posteriors (n, latent)."""
        cells, sums = math.prod(self.velocity.shape[1:]), mu.new_zeros(2, mu.shape[1], dtype=torch.float64)
        for m, v in zip(mu.split(1000), logvar.split(1000), strict=True):
            sums += torch.stack([m.double().sum(0), (m.float().square() + v.float().exp()).double().sum(0)])
        means, second = (sums / len(mu)).view(2, -1, cells).mean(2)
        self.mean.copy_(means.repeat_interleave(cells))
        self.std.copy_((second - means.square()).sqrt().repeat_interleave(cells))

    def drawing(self) -> dict[str, Tensor]:
        """The tensors that draw: all but the trained velocity."""
        return {name: tensor for name, tensor in self.state_dict().items() if not name.startswith("velocity.")}

    def load(self, drawing: dict[str, Tensor], velocity: dict[str, Tensor] | None) -> None:
        """Take what `drawing` gave and, to train on, the velocity; without it the average stands in for it."""
        velocity = velocity or {name[8:]: tensor for name, tensor in drawing.items() if name.startswith("average.")}
        self.load_state_dict(drawing | {f"velocity.{name}": tensor for name, tensor in velocity.items()})

    def normalised(self, z: Tensor) -> Tensor:
        return (z - self.mean) / self.std

    def latents(self, z: Tensor) -> Tensor:
        """Back from normalised latents to the decoder's."""
        return z * self.std + self.mean

    @torch.no_grad()
    def update_average(self, steps: Tensor, decay: float = 0.995) -> None:
        """After so many steps move the weights' exponential moving average, which draws better pictures."""
        nearer = 1 - (steps / (9 + steps)).clamp(max=decay)  # at first faster
        for average, weight in zip(self.average.parameters(), self.velocity.parameters(), strict=True):
            average.lerp_(weight, nearer)


def drop_labels(labels: Tensor, none: int, seed: Tensor, first: int) -> Tensor:
    """One of a row's two class numbers (B, 2), or for 15 % `none`; int64 (B,). Row i depends on (seed, first + i)."""
    chance = reparam.words(len(labels), 1, seed, first)[:, 0, 0] / 2**32
    return torch.where(chance < 0.15, none, torch.where(chance < 0.575, labels[:, 0], labels[:, 1]))


def label_weights(picked: Tensor, both: Tensor) -> Tensor:
    """What makes up for `drop_labels` (B,): 2 for a row with a coat that was given its class's label, else 1.

    Such a row gets that label half as often as one without a coat, and draws of the class would have few coats.
    """
    return 1 + (picked == both[:, 0]) * (both[:, 0] != both[:, 1])


def step_seconds(velocity: Velocity, batch_size: int, precision: torch.autocast, captured: bool) -> float:
    """Seconds of a training step, the median of five after a warm-up or, `captured`, after a CUDA graph's capture."""
    z, times = velocity.enter.weight.new_zeros(batch_size, math.prod(velocity.shape)), []

    def step(z: Tensor) -> Tensor:
        with precision:  # inside: autocast keeps cast weights until it ends, and a capture may use none from before
            v = velocity(z, z[:, 0], z[:, 0].long())
        v.sum().backward()
        return velocity.enter.bias.grad.sum()

    again, warm_up = (replay.Replay(), replay.WARM_UP + 1) if captured else (lambda step, z: step(z), 1)
    for _ in range(warm_up + 5):
        begun = time.monotonic()
        again(step, z).item()  # waits for a GPU
        times.append(time.monotonic() - begun)
    velocity.zero_grad()
    return statistics.median(times[warm_up:])


Field = Callable[[Tensor, float], Tensor]  # velocities (B, latent) of latents (B, latent) at a time


def integrate(field: Field, z: Tensor, times: Sequence[float]) -> Tensor:
    """Follow dz/dt = field(z, t) through the times, to second order; one evaluation a step, two in the first.

    Adams and Bashforth's two-step method for steps of any length, after a first step of Heun's.
    """
    v_before, step_before = None, 0.0
    for t, after in zip(times, times[1:], strict=False):
        if after == t:  # nothing is left to follow
            continue
        step, v = after - t, field(z, t)
        if v_before is None:
            z = z + step / 2 * (v + field(z + step * v, after))
        else:
            z = z + step * (v + step / (2 * step_before) * (v - v_before))
        v_before, step_before = v, step
    return z


def composed(velocity: nn.Module, none: int, weights: dict[int, float | Tensor]) -> Field:
    """v_none + sum_k w_k (v_k - v_none); a class alone at weight 1, and no class at all, need one evaluation each.

    weights: of class numbers; a number, or (B, 1) where pictures differ, or (B, latent) where places of the grid do.
    """
    alone = len(weights) < 2 and all(isinstance(w, float) and w == 1 for w in weights.values())
    names = list(weights) if weights and alone else [none, *weights]

    def field(z: Tensor, t: float) -> Tensor:
        rows = torch.tensor(names, device=z.device).repeat_interleave(len(z))
        parts = velocity(z.repeat(len(names), 1), z.new_full((len(rows),), t), rows).view(len(names), *z.shape)
        if alone:
            return parts[0]
        return parts[0] + sum(w * (part - parts[0]) for w, part in zip(weights.values(), parts[1:], strict=True))
    return field


def autocast(like: Tensor) -> torch.autocast:
    """bfloat16 where a tensor's device computes with it."""
    place = like.device.type
    return torch.autocast(place, torch.bfloat16, enabled=recipe.computes_bfloat16(place))


@torch.no_grad()
def follow(learned: Learned, weights: dict[int, float | Tensor], z: Tensor, start: float, steps: int) -> Tensor:
    """Normalised latents (n, latent) from time `start` to 1, CHUNK at a time.

    weights: as `composed`, where tensors have a row for each latent.
    """
    times, parts = [start + (1 - start) * i / steps for i in range(steps + 1)], []
    for rows in torch.arange(len(z), device=z.device).split(CHUNK):
        own = {name: w[rows] if isinstance(w, Tensor) else w for name, w in weights.items()}
        with autocast(z):
            parts.append(integrate(composed(learned.average, learned.none, own), z[rows], times))
    return torch.cat(parts)
