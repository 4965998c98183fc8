"""A Pegasus by the learned prior: wings of a bird that it drew on the back of a horse that it drew.

`prepare` draws many of both, once, after training, and keeps the best as latents: horses seen whole from the side with
room above the back, and birds whose silhouettes make wings. `pegasus` lays a bird twice over a horse's back, upright
and light, in pixels (sums of latents or of velocities leave no wings), goes back from there to t = START on the way
from noise, and follows the prior again, as a bird in the cells that wings cover and as a horse in all others.
"""
import cifar10
import collage
import density
import judge
import prior
import reparam
import vae

import torch
from torch import Tensor
from torch.nn import functional

BIRD, HORSE, ROOM, TRIAL, NOISE = range(5)  # purposes of derived seeds
START = 0.6  # later, wings look glued on; earlier, they fade


@torch.no_grad()
def decode(model: vae.VAE, learned: prior.Learned, z: Tensor) -> Tensor:
    """Normalised latents (n, latent) to images (n, 3, 32, 32) in [0, 1]."""
    with prior.autocast(z):
        return torch.cat([model.decode(learned.latents(part)) for part in z.split(250)])


@torch.no_grad()
def encode(model: vae.VAE, learned: prior.Learned, images: Tensor) -> Tensor:
    """Images (n, 3, 32, 32) to normalised latents (n, latent)."""
    with prior.autocast(images):
        return torch.cat([learned.normalised(model.encode(part)[0]) for part in images.split(250)])


def noise(learned: prior.Learned, n: int, seed: int) -> Tensor:
    return vae.noise(n, len(learned.mean), seed).to(learned.mean.device)


def belief(asked: judge.Judge | None, images: Tensor, names: tuple[str, ...]) -> Tensor:
    """Log of how probable the judge finds some classes, (n,); all alike where there is no judge."""
    if asked is None:
        return images.new_zeros(len(images))
    seen = judge.classify(asked, images.cpu())[0][:, [cifar10.CLASSES.index(name) for name in names]]
    return seen.sum(1).clamp(min=1e-3).log().to(images.device)


def best(score: Tensor, n: int) -> Tensor:
    return score.argsort(descending=True, stable=True)[:n]


def donors(model: vae.VAE, learned: prior.Learned, asked: judge.Judge | None, name: str, draws: int,
           n: int) -> Tensor:
    """Normalised latents (n, latent) of drawn birds: silhouettes that are most like wings, on plain backgrounds."""
    z = prior.follow(learned, {1: 2.0}, noise(learned, draws, reparam.derive_seed(0, 1, BIRD)), 0.0, 10)
    images = decode(model, learned, z)
    edge = collage.border(images)
    plain = (edge - edge.median(2, keepdim=True).values).abs().mean((1, 2))
    liked = belief(asked, images, judge.LIKE.get(name, (name,)))
    return z[best(collage.wings(images)[1] + 0.05 * liked - plain, n)]


def mounts(model: vae.VAE, learned: prior.Learned, asked: judge.Judge | None, name: str, kind: int, draws: int,
           n: int) -> Tensor:
    """Normalised latents (n, latent) of drawn horses of class number `kind`, with room above, heads to the left.

    Made smaller and put before a sky in pixels, they are drawn anew from halfway, which makes one picture of it.
    """
    z = prior.follow(learned, {kind: 3.0}, noise(learned, draws, reparam.derive_seed(0, kind, HORSE)), 0.0, 10)
    images = decode(model, learned, z)
    low = (collage.outline(images)[2] - 10).abs()
    images = images[best(belief(asked, images, (name,)) + collage.calm(images) - 0.1 * low, 3 * n // 2)]
    z = encode(model, learned, collage.blue(collage.with_room(images)))
    z = torch.lerp(noise(learned, len(z), reparam.derive_seed(0, kind, ROOM)), z, 0.5)
    images = decode(model, learned, prior.follow(learned, {kind: 2.5}, z, 0.5, 8))
    low = (collage.outline(images)[2] - 15).abs()
    score = 3 * belief(asked, images, (name,)) + collage.calm(images) + collage.whole(images) - 0.2 * low
    left, right = collage.raised(images).unbind(1)
    images = torch.where((right > left)[:, None, None, None], images.flip(3), images)
    return encode(model, learned, images[best(score, n)])


def crossed(model: vae.VAE, learned: prior.Learned, horses: Tensor, birds: Tensor, eps: Tensor, kind: int,
            steps: int = 6) -> Tensor:
    """Horses with birds' wings, of normalised latents and noise, all (n, latent); half of them mirrored."""
    wing = collage.wings(decode(model, learned, birds))[0]
    images, cover = collage.winged(decode(model, learned, horses), wing)
    images, cover = (torch.where(eps[:, 0, None, None, None] > 0, x, x.flip(3)) for x in (images, cover))
    channels, side, _ = learned.velocity.shape
    above = (1.5 * functional.adaptive_avg_pool2d(cover, side)).clamp(max=1).expand(-1, channels, -1, -1).flatten(1)
    z = torch.lerp(eps, encode(model, learned, images), START)
    return prior.follow(learned, {kind: 2 * (1 - above), 1: 2 * above}, z, START, steps)


def prepare(model: vae.VAE, learned: prior.Learned, asked: judge.Judge | None, classes: tuple[str, ...],
            draws: int = 750, horses: int = 32, birds: int = 24) -> dict[str, Tensor]:
    """The bank that `pegasus` draws from, a function of its arguments alone: normalised latents, float16.

    `any` (2 horses, latent), then (horses, latent) of each of `density.COATS`, and `birds` (birds, latent): of `draws`
    of each, twice as many of any coat, those that the judge finds the best horses once they have wings.
    """
    wings, bank = donors(model, learned, asked, classes[1], draws, birds), {}
    sides = [classes[:1], classes[:1] + judge.LIKE.get(classes[1], classes[1:2])]
    for name, kind, times in (("any", 0, 2), *((coat, len(classes) + i, 1) for i, coat in enumerate(density.COATS))):
        z, score = mounts(model, learned, asked, classes[0], kind, times * draws, times * 2 * horses), 0.0
        for turn in range(2):
            eps = noise(learned, len(z), reparam.derive_seed(0, turn, TRIAL))
            tried = decode(model, learned, crossed(model, learned, z, order(wings, len(z), turn, TRIAL), eps, kind))
            score += sum(belief(asked, tried, names) for names in sides)
        bank[name] = z[best(score, times * horses)].half().cpu()
    return bank | {"birds": wings.half().cpu()}


def check(bank: dict[str, Tensor] | None, latent: int) -> None:
    """Raise ValueError for what is no bank of latents; None is one of a run that has not ended."""
    shapes = {name: parts.shape for name, parts in (bank or {}).items()}
    if bank is not None and (set(shapes) != {"any", "birds", *density.COATS} or
                             any(shape[0] < 1 or shape[1:] != (latent,) for shape in shapes.values())):
        raise ValueError(f"parts of Pegasi have shapes {shapes}")


def order(of: Tensor, n: int, seed: int, purpose: int) -> Tensor:
    """n rows of a tensor (m, ...), each once before any comes again; row i is a function of (of, seed, i) alone."""
    generator, turns = torch.Generator().manual_seed(reparam.derive_seed(seed, 0, purpose)), torch.arange(n)
    rows = torch.randperm(len(of), generator=generator)[(turns + turns // len(of)) % len(of)]
    return of[rows.to(of.device)]


@torch.no_grad()
def pegasus(model: vae.VAE, learned: prior.Learned, bank: dict[str, Tensor], n: int, seed: int, first: int = 0,
            steps: int = 6) -> Tensor:
    """Latents (n, latent) for the decoder. first: the horse's class number. Row i depends on (bank, seed, i) alone."""
    coat = density.COATS[first - learned.none] if first else "any"  # coats' class numbers are the last before none
    horses, birds = (order(bank[name], n, seed, purpose).float().to(learned.mean.device)
                     for name, purpose in ((coat, HORSE), ("birds", BIRD)))
    eps = noise(learned, n, reparam.derive_seed(seed, 0, NOISE))
    parts = zip(*(rows.split(prior.CHUNK) for rows in (horses, birds, eps)), strict=True)
    return learned.latents(torch.cat([crossed(model, learned, *part, first, steps) for part in parts]))
