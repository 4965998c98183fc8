"""A Pegasus by the learned prior: wings of a bird that it drew on the back of a horse that it drew.

`prepare` draws many of both, once, after training, and keeps the best as latents: horses seen whole from the side with
room above the back, and birds whose silhouettes make wings. `pegasus` lays a bird twice over a horse's back, upright
and light, in pixels (sums of latents or of velocities leave no wings), mixes its latents with noise as at t = START
(SDEdit: Meng et al. 2022), and follows the prior from there, as a bird where wings are and as a horse elsewhere.
"""
import functools
import math

import options
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

BIRD, HORSE, DRAW, TRIAL, NOISE = range(5)  # purposes of derived seeds
START = 0.8  # later, less of it is the model's; earlier, wings and light heads fade
CANDIDATES = 1000  # photographs of a class that are looked at


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


def noise(model: vae.VAE, n: int, seed: int) -> Tensor:
    """Standard normals (n, latent + 1), where the model is; the last column decides who is mirrored."""
    return vae.noise(n, model.latent + 1, seed).to(model.variance.device)


def belief(classifier: judge.Judge | None, images: Tensor, names: tuple[str, ...]) -> Tensor:
    """Log of the judge's probability of any of some classes, (n,), at least log 1e-3; zeros without a judge."""
    if classifier is None:
        return images.new_zeros(len(images))
    seen = judge.classify(classifier, images.cpu())[0][:, [cifar10.CLASSES.index(name) for name in names]]
    return seen.sum(1).clamp(min=1e-3).log().to(images.device)


def best(score: Tensor, n: int) -> Tensor:
    return score.argsort(descending=True, stable=True)[:n]


def drawn(model: vae.VAE, learned: prior.Learned, kind: int, n: int) -> Tensor:
    """Draws (n, 3, 32, 32) of class number `kind`."""
    eps = noise(model, n, reparam.derive_seed(0, kind, DRAW))[:, :-1]
    return decode(model, learned, prior.follow(learned, {kind: 3.0}, eps, 0.0, 10))


def donors(birds: Tensor, classifier: judge.Judge | None, names: tuple[str, ...], n: int) -> Tensor:
    """The n birds (n, 3, 32, 32) of some whose silhouettes are most like wings, on plain backgrounds."""
    edge = collage.border(birds)
    plain = (edge - edge.median(2, keepdim=True).values).abs().mean((1, 2))
    like = torch.cat([collage.wings(part)[1] for part in birds.split(100)])  # 64 KB a bird
    return birds[best(like + 0.05 * belief(classifier, birds, names) - plain, n)]


def faced(horses: Tensor) -> Tensor:
    """Horses (n, 3, 32, 32), mirrored where that puts their heads to the left."""
    left, right = collage.raised(horses).unbind(1)
    return torch.where((right > left)[:, None, None, None], horses.flip(3), horses)


def mounts(horses: Tensor, classifier: judge.Judge | None, names: tuple[str, ...], n: int, light: float = 0) -> Tensor:
    """The n horses (n, 3, 32, 32) of some seen whole from the side, made smaller and put before a sky.

    Heads to the left. Chosen twice, before that and after it. light: how much a light coat counts; below 0 a dark one.
    """
    def chosen(horses: Tensor, n: int, row: int, sure: float) -> Tensor:
        off = (collage.outline(horses)[2] - row).abs()  # rows from where a back should be
        score = sure * (belief(classifier, horses, names) - 0.1 * off) + light * collage.coat(horses).mean(1)
        return horses[best(score + collage.calm(horses) + collage.whole(horses), n)]

    few = chosen(horses, 3 * n, 10, 1)
    return faced(chosen(collage.blue(collage.with_room(few)), n, 15, 3))


def joined(horses: Tensor, birds: Tensor, mirrored: Tensor) -> tuple[Tensor, Tensor]:
    """Horses with birds' wings, (n, 3, 32, 32), and where these are, (n, 1, 32, 32); some mirrored, bool (n,)."""
    return tuple(torch.where(mirrored[:, None, None, None], x.flip(3), x)
                 for x in collage.winged(horses, collage.wings(birds)[0]))


def redrawn(model: vae.VAE, learned: prior.Learned, images: Tensor, cover: Tensor, eps: Tensor, kind: int,
            steps: int = 16) -> Tensor:
    """Normalised latents (n, latent) of `joined` images and cover, by the prior from START on.

    eps: (n, latent). steps: of the whole way from noise, of which what is left from START on is taken.
    """
    channels, side, _ = learned.velocity.shape
    covered = (1.5 * functional.adaptive_avg_pool2d(cover, side)).clamp(max=1).expand(-1, channels, -1, -1).flatten(1)
    z = torch.lerp(eps, encode(model, learned, images), START)
    return prior.follow(learned, {kind: 2 * (1 - covered), 1: 2 * covered}, z, START,
                        math.ceil(round((1 - START) * steps, 9)))


def crossed(model: vae.VAE, learned: prior.Learned, horses: Tensor, birds: Tensor, eps: Tensor, kind: int,
            steps: int = 16) -> Tensor:
    """Horses with birds' wings, of normalised latents (n, latent) and `noise`; half of them mirrored."""
    parts = joined(decode(model, learned, horses), decode(model, learned, birds), eps[:, -1] > 0)
    return redrawn(model, learned, *parts, eps[:, :-1], kind, steps)


def prepare(model: vae.VAE, learned: prior.Learned, classifier: judge.Judge | None, classes: tuple[str, ...],
            draws: int = 3000, horses: int = 64, birds: int = 24) -> dict[str, Tensor]:
    """The bank that `pegasus` draws from, a function of its arguments alone: normalised latents, float16.

    `birds` (birds, latent): the best `donors` of draws // 2. `any` and each of `density.COATS` (horses, latent): of
    `draws` the `mounts` that the judge finds the best Pegasi once they have wings.
    """
    flying = judge.alike(classes[1], classes)
    liked = ((classes[:1], 1), (classes[:1] + flying, 1), (flying, 0.25))  # a horse above all
    options.show("parts for Pegasi: wings")
    wings = encode(model, learned, donors(drawn(model, learned, 1, draws // 2), classifier, flying, birds))
    bank = {"birds": wings.half().cpu()}
    for name, light in {"any": 0, "white": 4, "dark": -4}.items():
        options.show(f"parts for Pegasi: horses, {name}", last=name == "dark")
        kind = density.kind(classes, name)
        images = mounts(drawn(model, learned, kind, draws), classifier, classes[:1], 4 * horses, light)
        z, score = encode(model, learned, images), 0.0
        for turn in range(2):
            eps = noise(model, len(z), reparam.derive_seed(0, turn, TRIAL))
            tried = decode(model, learned, crossed(model, learned, z, order(wings, len(z), turn, TRIAL), eps, kind))
            score += sum(weight * belief(classifier, tried, names) for names, weight in liked)
        bank[name] = z[best(score, horses)].half().cpu()
    return bank


def check(bank: dict[str, Tensor] | None, latent: int) -> None:
    """Raise ValueError for what is no bank of latents; None is one of a run that has not ended."""
    shapes = {name: parts.shape for name, parts in (bank or {}).items()}
    if bank is not None and (set(shapes) != {"any", "birds", *density.COATS} or
                             any(shape[0] < 1 or shape[1:] != (latent,) for shape in shapes.values())):
        raise ValueError(f"parts of Pegasi have shapes {shapes}")


def order(of: Tensor, n: int, seed: int, purpose: int) -> Tensor:
    """n rows of a tensor (m, ...), each once before any comes again; row i is a function of (of, seed, i) alone."""
    # one further each time round, or 64 horses and 24 birds would meet in the same 192 pairs again and again
    generator, turns = torch.Generator().manual_seed(reparam.derive_seed(seed, 0, purpose)), torch.arange(n)
    rows = torch.randperm(len(of), generator=generator)[(turns + turns // len(of)) % len(of)]
    return of[rows.to(of.device)]


@torch.no_grad()
def pegasus(model: vae.VAE, learned: prior.Learned, bank: dict[str, Tensor], n: int, seed: int, kind: int = 0,
            steps: int = 16, photo: Tensor | None = None) -> Tensor:
    """Latents (n, latent) for the decoder. Row i is a function of (bank, seed, i) alone.

    kind: the class number of the horse, or of its coat. photo: an image (1, 3, 32, 32) of a horse to take for all
    instead of the bank's.
    """
    coat = density.COATS[kind - learned.none] if kind else "any"  # coats' class numbers are the last before none
    horses, birds = (order(bank[name], n, seed, purpose).float().to(learned.mean.device)
                     for name, purpose in ((coat, HORSE), ("birds", BIRD)))
    if photo is not None:
        horse = faced(collage.blue(collage.with_room(photo.to(horses.device))))
        horses = encode(model, learned, horse).expand_as(horses)
    eps = noise(model, n, reparam.derive_seed(seed, 0, NOISE))
    parts = zip(*(rows.split(prior.CHUNK) for rows in (horses, birds, eps)), strict=True)
    return learned.latents(torch.cat([crossed(model, learned, *part, kind, steps) for part in parts]))


@functools.lru_cache(maxsize=1)  # a run shows the same ones whenever it saves
def photographed(images: Tensor, labels: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """Horses and birds (n, 3, 32, 32) out of photographs of bytes, by the measures of `prepare` without a judge."""
    horses, birds = (vae.from_bytes(images[labels == i][:CANDIDATES]) for i in (0, 1))
    horses, birds = mounts(horses, None, (), n), donors(birds, None, (), n // 2)
    return order(horses, n, 0, HORSE), order(birds, n, 0, BIRD)


@torch.no_grad()
def preview(model: vae.VAE, learned: prior.Learned | None, images: Tensor, labels: Tensor, n: int = 64) -> Tensor:
    """What a run shows until it has a bank, (n, 3, 32, 32): Pegasi of training photographs, images of bytes.

    Joined, and seen through the autoencoder; with a prior drawn anew by it.
    """
    horses, birds = (part.to(model.variance.device) for part in photographed(images, labels, n))
    eps = noise(model, n, reparam.derive_seed(0, 0, NOISE))
    joint, cover = joined(horses, birds, eps[:, -1] > 0)
    if learned is None:
        return model.reconstruct(joint)
    return decode(model, learned, redrawn(model, learned, joint, cover, eps[:, :-1], 0))
