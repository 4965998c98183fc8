"""Pegasi by the flow prior: birds' wings on horses' backs, both sampled from it.

`prepare` samples many of both, once, after training, and keeps the best as latents, the
parts: horses seen whole from the side with room above the back, and birds whose
silhouettes make wings. `pegasus` puts a bird twice over a horse's back, upright and
light, in pixels (sums of latents or of velocities leave no wings), mixes the result's
latents with noise as at t = START_TIME (SDEdit: Meng et al. 2022), and follows the prior
from there, as a bird where wings are and as a horse elsewhere.
"""
import math
from collections.abc import Iterator
from typing import NamedTuple

import reparam
import vae
from pegasus import cli, device
from pegasus.drawing import wing_shapes
from pegasus.models import gaussians
from pegasus.models.classifier import (
    Classifier,
    classify,
    probability_of,
    similar_classes,
)
from pegasus.models.flow_prior import CHUNK, FlowPrior, sample_ode
from vae import VAE

import torch
from torch import Tensor
from torch.nn import functional

# purposes of derived seeds
BIRD_SEED, HORSE_SEED, SAMPLE_SEED, TRIAL_SEED, NOISE_SEED = range(5)
BIRD_CLASS = 1  # the classes are a horse's, a bird's
START_TIME = 0.8  # later, less is the model's; earlier, wings and light heads fade
CANDIDATES = 1000  # photographs of a class that a preview chooses from
BATCH = 250  # images that the autoencoder takes at a time
BRIGHTNESS = {"any": 0, "white": 4, "dark": -4}  # how much a light coat counts


def chunks(n: int, title: str) -> Iterator[Tensor]:
    """Yield the rows of n samples, CHUNK at a time; show on a terminal how far it is."""
    for rows in torch.arange(n).split(CHUNK):
        cli.show(f"{title}: {int(rows[0]):,} of {n:,} sampled")
        yield rows
    cli.show("")


@torch.no_grad()
def decode(model: VAE, prior: FlowPrior, z: Tensor) -> Tensor:
    """Decode normalized latents (n, d) to images (n, 3, 32, 32) in [0, 1]."""
    with device.fast_autocast(z):
        batches = [model.decode(prior.denormalize(batch)) for batch in z.split(BATCH)]
    return torch.cat(batches)


@torch.no_grad()
def encode(model: VAE, prior: FlowPrior, images: Tensor) -> Tensor:
    """Encode images (n, 3, 32, 32) to normalized posterior means (n, d)."""
    with device.fast_autocast(images):
        batches = [prior.normalize(model.encode(x)[0]) for x in images.split(BATCH)]
    return torch.cat(batches)


@torch.no_grad()
def encode_sample(model: VAE, prior: FlowPrior, images: Tensor, eps: Tensor) -> Tensor:
    """Encode images to normalized posterior samples (n, d), by noise eps (n, d).

    images: (n, 3, 32, 32), or one for all rows. The prior was trained on samples: to it
    a mean is a latent like no other, of which little is drawn anew.
    """
    with device.fast_autocast(images):
        mu, logvar = model.encode(images)
    return prior.normalize(mu + (logvar / 2).exp() * eps)


class Noise(NamedTuple):
    """The random numbers of n Pegasi, on the model's device."""
    start: Tensor  # standard normals (n, d), mixed with latents
    posterior: Tensor  # standard normals (n, d), of the posterior samples
    mirrored: Tensor  # bool (n,)

    def rows(self, rows: Tensor) -> "Noise":
        """Return the numbers of some of the Pegasi."""
        return Noise(*(numbers[rows] for numbers in self))


def noise(model: VAE, n: int, seed: int) -> Noise:
    """Return the random numbers of n Pegasi; row i is a function of (seed, i) alone."""
    size = model.latent_size
    eps = vae.sampling_noise(n, 2 * size + 1, seed).to(model.variance.device)
    return Noise(eps[:, :size], eps[:, size + 1 :], eps[:, size] > 0)


def sample_class(model: VAE, prior: FlowPrior, class_number: int, n: int) -> Tensor:
    """Sample images (n, 3, 32, 32) of a class."""
    seed = reparam.derive_seed(0, class_number, SAMPLE_SEED)
    start = vae.sampling_noise(n, model.latent_size, seed).to(model.variance.device)
    return decode(model, prior, sample_ode(prior, {class_number: 3.0}, start, 0.0, 10))


def log_probability(
    classifier: Classifier | None, images: Tensor, names: tuple[str, ...]
) -> Tensor:
    """Return the log of the classifier's probability of any of some classes, (n,).

    It is at least log 1e-3, and zero without a classifier.
    """
    if classifier is None:
        return images.new_zeros(len(images))
    probabilities, _ = classify(classifier, images.cpu())
    return probability_of(probabilities, names).clamp(min=1e-3).log().to(images.device)


def top_rows(score: Tensor, n: int) -> Tensor:
    """Return the rows of the n highest scores, the highest first."""
    return score.argsort(descending=True, stable=True)[:n]


def mirror(images: Tensor, where: Tensor) -> Tensor:
    """Return images (n, c, 32, 32), mirrored where a bool (n,) is true."""
    return torch.where(where[:, None, None, None], images.flip(3), images)


def face_left(horses: Tensor) -> Tensor:
    """Return horses (n, 3, 32, 32), mirrored where their heads are at the right."""
    left, right = wing_shapes.head_pixels(horses).unbind(1)
    return mirror(horses, right > left)


def choose_birds(
    birds: Tensor, classifier: Classifier | None, names: tuple[str, ...], n: int
) -> Tensor:
    """Return the n birds (n, 3, 32, 32) of some with the most wing-like silhouettes.

    names: classes that a bird may be taken for. Plain backgrounds are preferred.
    """
    border = wing_shapes.border_pixels(birds)
    clutter = (border - border.median(2, keepdim=True).values).abs().mean((1, 2))
    batches = birds.split(100)  # for memory: a bird takes 64 KB
    overlap = torch.cat([wing_shapes.make_wings(batch)[1] for batch in batches])
    score = overlap + 0.05 * log_probability(classifier, birds, names) - clutter
    return birds[top_rows(score, n)]


def choose_horses(
    horses: Tensor,
    classifier: Classifier | None,
    names: tuple[str, ...],
    n: int,
    brightness: float = 0,
) -> Tensor:
    """Return the n horses of some that are seen whole from the side, before a blue sky.

    Chosen once as they are, 3 n of them, and again when they are smaller, with room
    above their backs. Heads are to the left. brightness: how much a light coat counts;
    below 0 a dark one counts.
    """
    def best(horses: Tensor, n: int, row: int, certainty: float) -> Tensor:
        off = (wing_shapes.outline(horses)[2] - row).abs()  # from where a back should be
        like = log_probability(classifier, horses, names)
        light = wing_shapes.coat_color(horses).mean(1)
        score = certainty * (like - 0.1 * off) + brightness * light
        score = score + wing_shapes.sky_score(horses) + wing_shapes.body_score(horses)
        return horses[top_rows(score, n)]

    candidates = best(horses, 3 * n, row=10, certainty=1)
    candidates = wing_shapes.paint_sky(wing_shapes.make_room(candidates))
    return face_left(best(candidates, n, row=15, certainty=3))


def paste_wings(
    horses: Tensor, birds: Tensor, mirrored: Tensor
) -> tuple[Tensor, Tensor]:
    """Give horses birds' wings; mirror some, bool (n,).

    Returns images (n, 3, 32, 32) and the wings' masks (n, 1, 32, 32).
    """
    wings, _ = wing_shapes.make_wings(birds)
    images, cover = wing_shapes.add_wings(horses, wings)
    return mirror(images, mirrored), mirror(cover, mirrored)


def resample(
    model: VAE,
    prior: FlowPrior,
    images: Tensor,
    cover: Tensor,
    eps: Noise,
    class_number: int,
    steps: int = 16,
) -> Tensor:
    """Let the prior draw images with pasted wings anew from START_TIME on.

    cover: the wings' masks. class_number: the horse's. steps: of the whole way from
    noise, of which the part from START_TIME on is taken. Returns normalized latents
    (n, d).
    """
    channels, side, _ = model.latent_shape
    wing = (1.5 * functional.adaptive_avg_pool2d(cover, side)).clamp(max=1)
    wing = wing.expand(-1, channels, -1, -1).flatten(1)
    weights = {class_number: 2 * (1 - wing), BIRD_CLASS: 2 * wing}
    latents = encode_sample(model, prior, images, eps.posterior)
    z = torch.lerp(eps.start, latents, START_TIME)
    steps_left = math.ceil(round((1 - START_TIME) * steps, 9))  # 2.0000000001 is 2
    return sample_ode(prior, weights, z, START_TIME, steps_left)


def make_pegasi(
    model: VAE,
    prior: FlowPrior,
    horses: Tensor,
    birds: Tensor,
    eps: Noise,
    class_number: int,
    steps: int = 16,
) -> Tensor:
    """Return horses with birds' wings, half of them mirrored, as normalized latents.

    horses, birds: normalized latents (n, d).
    """
    horse_images = decode(model, prior, horses)
    bird_images = decode(model, prior, birds)
    images, cover = paste_wings(horse_images, bird_images, eps.mirrored)
    return resample(model, prior, images, cover, eps, class_number, steps)


def cycle_rows(table: Tensor, n: int, seed: int, purpose: int) -> Tensor:
    """Return n rows of a table (m, ...), each once before any comes again.

    Row i is a function of (table, seed, i) alone. Every time round begins one row
    further, or 64 horses and 24 birds would meet in the same 192 pairs again and again.
    """
    generator = torch.Generator().manual_seed(reparam.derive_seed(seed, 0, purpose))
    shuffled = torch.randperm(len(table), generator=generator)
    turns = torch.arange(n)
    rows = shuffled[(turns + turns // len(table)) % len(table)]
    return table[rows.to(table.device)]


def trial_score(
    model: VAE,
    prior: FlowPrior,
    classifier: Classifier | None,
    classes: tuple[str, ...],
    horses: Tensor,
    birds: Tensor,
    class_number: int,
) -> Tensor:
    """Score horses, latents (n, d), by the Pegasi they make with two birds each, (n,).

    A Pegasus should look like a horse above all, and like a winged one.
    """
    horse = classes[:1]
    winged = similar_classes(classes[1], classes)
    score = 0.0
    for trial in range(2):
        eps = noise(model, len(horses), reparam.derive_seed(0, trial, TRIAL_SEED))
        pairs = cycle_rows(birds, len(horses), trial, TRIAL_SEED)
        z = make_pegasi(model, prior, horses, pairs, eps, class_number)
        images = decode(model, prior, z)
        score = score + (
            log_probability(classifier, images, horse)
            + log_probability(classifier, images, horse + winged)
            + 0.25 * log_probability(classifier, images, winged)
        )
    return score


def prepare(
    model: VAE,
    prior: FlowPrior,
    classifier: Classifier | None,
    classes: tuple[str, ...],
    draws: int = 3000,
    horses: int = 64,
    birds: int = 24,
) -> dict[str, Tensor]:
    """Return the parts of Pegasi, normalized latents in float16.

    "birds" (birds, d): the best of draws // 2. "any" and each of gaussians.COATS
    (horses, d): of `draws` horses those that make the best Pegasi. They are a function
    of the arguments alone.
    """
    cli.show("parts for Pegasi: wings")
    similar = similar_classes(classes[1], classes)
    images = sample_class(model, prior, BIRD_CLASS, draws // 2)
    wings = encode(model, prior, choose_birds(images, classifier, similar, birds))
    parts = {"birds": wings.half().cpu()}
    for coat, brightness in BRIGHTNESS.items():
        cli.show(f"parts for Pegasi: horses, {coat}")
        number = gaussians.class_number(classes, coat)
        images = sample_class(model, prior, number, draws)
        images = choose_horses(images, classifier, classes[:1], 4 * horses, brightness)
        z = encode(model, prior, images)
        score = trial_score(model, prior, classifier, classes, z, wings, number)
        parts[coat] = z[top_rows(score, horses)].half().cpu()
    cli.show("parts for Pegasi: ready", last=True)
    return parts


def check(parts: dict[str, Tensor] | None, latent_size: int) -> None:
    """Raise ValueError for what are no parts; None is those of a run under way."""
    if parts is None:
        return
    shapes = {name: latents.shape for name, latents in parts.items()}
    complete = set(shapes) == {"any", "birds", *gaussians.COATS}
    fits = [len(z) > 0 and z.shape[1:] == (latent_size,) for z in parts.values()]
    if not complete or not all(fits):
        raise ValueError(f"parts of Pegasi have shapes {shapes}")


@torch.no_grad()
def pegasus(
    model: VAE,
    prior: FlowPrior,
    parts: dict[str, Tensor],
    classes: tuple[str, ...],
    n: int,
    seed: int,
    coat: str = "any",
    steps: int = 16,
    photo: Tensor | None = None,
) -> Tensor:
    """Sample Pegasi as the decoder's latents (n, d).

    Row i is a function of (parts, seed, i) alone. photo: an image (1, 3, 32, 32) of a
    horse to give wings, instead of the parts' horses.
    """
    eps = noise(model, n, reparam.derive_seed(seed, 0, NOISE_SEED))
    horses = cycle_rows(parts[coat], n, seed, HORSE_SEED).to(eps.start)
    birds = cycle_rows(parts["birds"], n, seed, BIRD_SEED).to(eps.start)
    if photo is not None:
        horse = face_left(wing_shapes.paint_sky(wing_shapes.make_room(photo.to(eps.start))))
        horses = encode(model, prior, horse).expand_as(horses)
    number = gaussians.class_number(classes, coat)
    z = []
    for rows in chunks(n, "pegasus"):
        pairs = (horses[rows], birds[rows], eps.rows(rows))
        z.append(make_pegasi(model, prior, *pairs, number, steps))
    return prior.denormalize(torch.cat(z))


def choose_photographs(
    images: Tensor, labels: Tensor, n: int
) -> tuple[Tensor, Tensor]:
    """Return n horses and n birds of photographs, as `prepare` chooses, no classifier.

    images: bytes (m, 3, 32, 32). labels: 0 for horses, 1 for birds.
    """
    horses = vae.from_bytes(images[labels == 0][:CANDIDATES])
    birds = vae.from_bytes(images[labels == 1][:CANDIDATES])
    horses = choose_horses(horses, None, (), n)
    birds = choose_birds(birds, None, (), n // 2)
    return cycle_rows(horses, n, 0, HORSE_SEED), cycle_rows(birds, n, 0, BIRD_SEED)


@torch.no_grad()
def preview(
    model: VAE, prior: FlowPrior | None, images: Tensor, labels: Tensor, n: int = 64
) -> Tensor:
    """Return Pegasi of photographs (n, 3, 32, 32), for a run that has no parts yet.

    images: bytes, with labels. They are joined in pixels and reconstructed by the autoencoder or,
    where there is a prior, drawn anew by it.
    """
    horses, birds = choose_photographs(images, labels, n)
    eps = noise(model, n, reparam.derive_seed(0, 0, NOISE_SEED))
    images, cover = paste_wings(horses.to(eps.start), birds.to(eps.start), eps.mirrored)
    if prior is None:
        return model.reconstruct(images)
    return decode(model, prior, resample(model, prior, images, cover, eps, 0))
