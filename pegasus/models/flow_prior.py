"""The learned prior: a flow from noise to the latents of photographs, by class.

A trained autoencoder stays as it is. Its latents z_1 ~ q(z|x), normalized per channel,
and noise z_0 ~ N(0, I) are joined by straight lines z_t = (1 - t) z_0 + t z_1, and a
network v(z_t, t, class) learns their direction E[z_1 - z_0 | z_t, x] by mean squares (flow
matching: Lipman et al. 2023, Liu et al. 2023). Following v from noise at t = 0 to t = 1
draws a latent. Now and then the class is hidden in training, so that classes can be
weighed against "any" (classifier-free guidance: Ho and Salimans 2022) and against each
other (Liu et al. 2022): v_any + sum over classes k of w_k (v_k - v_any). Guidance grows
on the way, for variety (Wang et al. 2024).
"""
import copy
import math
from collections.abc import Callable, Sequence

import reparam

import torch
from torch import Tensor, nn
from torch.nn import functional

# of the network, at 8 x 8 and at 4 x 4; which numbers to take: as in vae.py
CHANNELS = (96, 160)
CONDITION = 128  # numbers that time and class become
DROPPED = 0.15  # share of rows whose class is hidden in training
COATED = 0.15  # share of the other rows with a coat that get it instead of their class

Field = Callable[[Tensor, float], Tensor]  # velocities (B, d) of latents at a time


class ModulatedNorm(nn.Module):
    """silu(scale * norm(x) + shift), x (B, C, h, w), scale and shift (B, C)."""

    groups = 8
    eps = 1e-5

    def forward(self, x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        y = functional.group_norm(x, self.groups, eps=self.eps)
        scale = scale.to(y.dtype)[..., None, None]
        shift = shift.to(y.dtype)[..., None, None]
        return functional.silu(torch.addcmul(shift, y, scale))


class Block(nn.Module):
    """x + conv(modulated norm(conv(silu(norm(x))))), (B, channels, h, w)."""

    def __init__(self, channels: int):
        super().__init__()
        self.first = nn.Sequential(
            nn.GroupNorm(8, channels),
            nn.SiLU(),
            nn.Conv2d(channels, channels, 3, padding=1),
        )
        self.condition = nn.Linear(CONDITION, 2 * channels)
        self.modulate = ModulatedNorm()
        self.last = nn.Conv2d(channels, channels, 3, padding=1)
        nn.init.zeros_(self.last.weight)
        nn.init.zeros_(self.last.bias)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        scale, shift = self.condition(condition).chunk(2, 1)
        return x + self.last(self.modulate(self.first(x), 1 + scale, shift))


class Attention(nn.Module):
    """x + attention over all places of norm(x), (B, channels, h, w)."""

    def __init__(self, channels: int):
        super().__init__()
        self.norm = nn.GroupNorm(8, channels)
        self.inside = nn.Linear(channels, 3 * channels)  # query, key and value
        self.out = nn.Linear(channels, channels)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def forward(self, x: Tensor) -> Tensor:
        places = self.norm(x).flatten(2).mT  # (B, h w, channels)
        query, key, value = self.inside(places).chunk(3, 2)
        weights = (query @ key.mT / math.sqrt(key.shape[2])).softmax(2)
        y = self.out(weights @ value)
        return x + y.mT.view_as(x)


def mix(linear: nn.Linear, x: Tensor) -> Tensor:
    """Apply a linear layer to the channels of each place of x (B, C, h, w)."""
    return linear(x.movedim(1, 3)).movedim(3, 1)


class Velocity(nn.Module):
    """v(z, t, class) for latents on a grid: a U-net of 8 x 8 and 4 x 4.

    Class numbers are 0 to `unconditional`, which stands for "any". The network adds to
    the `direction` to N(0, 1), which is what latents without structure need, and at first
    adds nothing. Checkpoints know the layers by their names here.
    """

    def __init__(self, latent_shape: tuple[int, int, int], unconditional: int):
        super().__init__()
        fine, coarse = CHANNELS
        self.latent_shape = latent_shape
        self.time = nn.Sequential(
            nn.Linear(32, CONDITION), nn.SiLU(), nn.Linear(CONDITION, CONDITION)
        )
        self.name = nn.Embedding(unconditional + 1, CONDITION)  # of the class
        self.enter = nn.Conv2d(latent_shape[0], fine, 3, padding=1)
        self.down = nn.ModuleList(Block(fine) for _ in range(2))
        self.shrink = nn.Linear(4 * fine, coarse)  # of squares of 2 x 2
        self.middle = nn.ModuleList(Block(coarse) for _ in range(3))
        self.attention = Attention(coarse)
        self.grow = nn.Linear(coarse, 4 * fine)
        self.up = nn.ModuleList(Block(fine) for _ in range(2))
        self.leave = nn.Sequential(
            nn.GroupNorm(8, fine), nn.SiLU(), nn.Conv2d(fine, latent_shape[0], 3, padding=1)
        )
        nn.init.zeros_(self.leave[-1].weight)
        nn.init.zeros_(self.leave[-1].bias)

    def embed(self, t: Tensor, classes: Tensor) -> Tensor:
        """Embed times (B,) and class numbers (B,) together, (B, CONDITION)."""
        frequencies = torch.exp(torch.linspace(0, math.log(1000), 16, device=t.device))
        angles = t[:, None] * frequencies
        waves = torch.cat([angles.sin(), angles.cos()], 1)
        return functional.silu(self.time(waves) + self.name(classes))

    def forward(self, z: Tensor, t: Tensor, classes: Tensor) -> Tensor:
        """Return velocities float32 (B, d) of normalized latents (B, d) at times (B,)."""
        condition = self.embed(t, classes)
        x = self.enter(z.unflatten(1, self.latent_shape))  # (B, fine, 8, 8)
        for block in self.down:
            x = block(x, condition)
        y = mix(self.shrink, functional.pixel_unshuffle(x, 2))  # (B, coarse, 4, 4)
        y = self.attention(self.middle[0](y, condition))
        for block in self.middle[1:]:
            y = block(y, condition)
        x = x + functional.pixel_shuffle(mix(self.grow, y), 2)
        for block in self.up:
            x = block(x, condition)
        t = t[:, None]
        deviation = (t.square() + (1 - t).square()).rsqrt()
        return direction(z, t, 0.0, 1.0) + deviation * self.leave(x).float().flatten(1)


def direction(z: Tensor, t: Tensor, mean: Tensor | float, variance: Tensor | float) -> Tensor:
    """Return the velocity that takes N(0, 1) at t = 0 to N(mean, variance) at t = 1.

    On the way it is N(t mean, (1 - t)^2 + t^2 variance): a Gaussian path, whose velocity
    is E[z_1 - z_0 | z_t] (Lipman et al. 2023, theorem 3). z: (B, d); t: (B, 1).
    """
    slope = (t * variance - (1 - t)) / ((1 - t).square() + t.square() * variance)
    return mean + slope * (z - t * mean)


def even_times(n: int, size: int, seed: Tensor, row_offset: int) -> Tensor:
    """Return times (n, 1) for n of a step's `size` rows, spread evenly over the step.

    u goes around [0, 1) in steps of 1 / size from a random start (Kingma et al. 2021);
    t is u drawn towards 1/2. Row i depends on (seed, row_offset + i, size) alone.
    """
    rows = row_offset + torch.arange(n, device=seed.device)
    first = reparam.words(1, 1, seed)[0, 0, 0] / 2**32
    u = (first + rows / size) % 1
    # 0.6: t is spread as the sigmoid of N(0, 1) is, nearly
    return (0.6 * u.logit()).sigmoid()[:, None]


class FlowPrior(nn.Module):
    """The velocity that is trained, its moving average, which draws, the normalization."""

    def __init__(self, latent_shape: tuple[int, int, int], classes: int):
        super().__init__()
        self.unconditional = classes  # the number of "any", behind those of the classes
        self.velocity = Velocity(latent_shape, self.unconditional)
        self.ema = copy.deepcopy(self.velocity).requires_grad_(False)
        size = math.prod(latent_shape)
        self.register_buffer("mean", torch.zeros(size))
        self.register_buffer("std", torch.ones(size))

    @torch.no_grad()
    def measure(self, mu: Tensor, logvar: Tensor) -> None:
        """Set each channel's mean and deviation to those of posterior samples (n, d)."""
        cells = math.prod(self.velocity.latent_shape[1:])
        sums = torch.zeros(2, mu.shape[1], dtype=torch.float64)
        for m, v in zip(mu.cpu().split(1000), logvar.cpu().split(1000), strict=True):
            square = m.float().square() + v.float().exp()
            sums += torch.stack([m.double().sum(0), square.double().sum(0)])
        mean, second = (sums / len(mu)).view(2, -1, cells).mean(2)
        std = (second - mean.square()).sqrt()
        self.mean.copy_(mean.repeat_interleave(cells))
        self.std.copy_(std.repeat_interleave(cells))

    def drawing_state(self) -> dict[str, Tensor]:
        """Return the tensors that drawing needs: all but the trained velocity."""
        average = {f"average.{name}": p for name, p in self.ema.state_dict().items()}
        return {"mean": self.mean, "std": self.std, **average}

    def load_drawing_state(
        self, state: dict[str, Tensor], velocity_state: dict[str, Tensor] | None = None
    ) -> None:
        """Take what `drawing_state` gave and, to train on, the velocity's weights.

        If these are not given, the averaged weights are used.
        """
        averaged = {name.replace("average.", "ema."): p for name, p in state.items()}
        if velocity_state is None:
            trained = {name.replace("average.", "velocity."): p for name, p in state.items()}
        else:
            trained = {f"velocity.{name}": p for name, p in velocity_state.items()}
        self.load_state_dict(averaged | trained)

    def normalize(self, z: Tensor) -> Tensor:
        return (z - self.mean) / self.std

    def denormalize(self, z: Tensor) -> Tensor:
        """Convert normalized latents to the decoder's."""
        return z * self.std + self.mean

    @torch.no_grad()
    def update_ema(self, steps: Tensor) -> None:
        """Move the averaged weights after so many steps of training.

        A step's weight in the average grows with the seventh power of its number, so
        that the average spans an eighth of the steps, however many (Karras et al. 2024).
        """
        rate = 8 / (7 + steps)
        pairs = zip(self.ema.parameters(), self.velocity.parameters(), strict=True)
        for average, weight in pairs:
            average.lerp_(weight, rate)


def choose_labels(choices: Tensor, seed: Tensor, row_offset: int) -> Tensor:
    """Return one of three class numbers of each row, int64 (B,).

    choices: (B, 3), as labels.py has them. The third for the share DROPPED of the rows, of
    the others the second, with a coat, for the share COATED, else the first. Row i depends
    on (seed, row_offset + i) alone.
    """
    words = reparam.words(len(choices), 1, seed, row_offset)
    chance = words[:, 0, 0] / 2**32
    name, coat, hidden = choices.unbind(1)
    labels = torch.where(chance < 1 - (1 - DROPPED) * COATED, name, coat)
    return torch.where(chance < DROPPED, hidden, labels)


def label_weights(labels: Tensor, choices: Tensor) -> Tensor:
    """Return weights of the loss (B,), above 1 for a row with a coat given its class.

    Such rows get that label less often than those without a coat, and samples of the
    class would have few coats.
    """
    name, coat, _ = choices.unbind(1)
    return 1 + (labels == name) * (name != coat) * COATED / (1 - COATED)


def integrate(field: Field, z: Tensor, times: Sequence[float]) -> Tensor:
    """Follow dz/dt = field(z, t) through the times, to second order.

    Adams and Bashforth's two-step method for steps of any length after a first step of
    Heun's: one evaluation a step, two in the first.
    """
    v_before = None
    step_before = 0.0
    for t, after in zip(times, times[1:], strict=False):
        if after == t:  # nothing is left to follow
            continue
        step = after - t
        v = field(z, t)
        if v_before is None:
            z = z + step / 2 * (v + field(z + step * v, after))
        else:
            z = z + step * (v + step / (2 * step_before) * (v - v_before))
        v_before = v
        step_before = step
    return z


def guided_velocity(
    velocity: nn.Module, unconditional: int, weights: dict[int, float | Tensor]
) -> Field:
    """Return v_any + sum_k w_k (v_k - v_any) as a function of latents and time.

    unconditional: the class number of "any". weights: of class numbers; a number, or
    (B, 1) where images differ. What has no weight is not evaluated, as "any" where those
    of classes sum to 1.
    """
    shares = weights | {unconditional: 1 - sum(weights.values())}
    shares = {k: w for k, w in shares.items() if torch.as_tensor(w).abs().max() > 1e-6}
    numbers = list(shares)

    def field(z: Tensor, t: float) -> Tensor:
        classes = torch.tensor(numbers, device=z.device).repeat_interleave(len(z))
        times = z.new_full((len(classes),), t)
        v = velocity(z.repeat(len(numbers), 1), times, classes)
        parts = zip(shares.values(), v.view(len(numbers), *z.shape), strict=True)
        return sum(share * v_class for share, v_class in parts)

    return field


def log_density(prior: FlowPrior, z: Tensor, seed: int = 0, steps: int = 12) -> Tensor:
    """Return log p(z) of latents (n, d) in nats, float64 (n,), as draws of "any" have it.

    Along the flow d log p / dt = -div v, so that log p(z) = log N(z_0; 0, I) minus the
    integral of div v, with z_0 found by going back in time (Chen et al. 2018). By the
    midpoint rule; the divergence by Hutchinson's estimate e' J e, e of random signs.
    """
    field = guided_velocity(prior.ema, prior.unconditional, {})
    signs = reparam.normals(*z.shape, seed).sign().to(z)
    u = prior.normalize(z)
    divergence = 0.0
    for i in reversed(range(steps)):
        with torch.no_grad():
            middle = u - field(u, (i + 1) / steps) / (2 * steps)
        middle.requires_grad_()
        v = field(middle, (i + 0.5) / steps)
        (gradient,) = torch.autograd.grad(v, middle, signs)
        divergence = divergence + (gradient * signs).double().sum(1) / steps
        u = u - v.detach() / steps
    log_normal = -(u.double().square() + math.log(2 * math.pi)).sum(1) / 2
    return log_normal - divergence - prior.std.double().log().sum()


@torch.no_grad()
def follow(
    prior: FlowPrior,
    early: dict[int, float | Tensor],
    late: dict[int, float | Tensor],
    z: Tensor,
    times: Sequence[float],
) -> Tensor:
    """Follow normalized latents (n, d) through the times.

    The weights, as of `guided_velocity`, go from `early` to `late`, of the same classes, with
    the time's square: full weights from the start make poses and skies more alike (Wang et
    al. 2024).
    """
    def field(z: Tensor, t: float) -> Tensor:
        weights = {n: first + t * t * (late[n] - first) for n, first in early.items()}
        return guided_velocity(prior.ema, prior.unconditional, weights)(z, t)

    return integrate(field, z, times)
