"""Sample latents and images from a trained model, and lay them out on a sheet.

Latents come from the flow prior where there is one; Pegasi are one of its classes. Without
a flow prior they come from Gaussians fitted to the latents of each class, and Pegasi from
the product of two.
"""
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import reparam
import vae
from pegasus import checkpoint, device, streams
from pegasus.cli import UserError, option
from pegasus.data import datasets, pictures
from pegasus.drawing import plots
from pegasus.models import classifier, composites, gaussians, labels, variants
from pegasus.models.flow_prior import FlowPrior, follow
from pegasus.models.gaussians import Gaussian
from vae import VAE

import numpy
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional

GAUSSIAN, POSTERIOR = range(2)  # purposes of derived seeds
CHUNK = 64  # pictures that are drawn, or compared, at a time
WALK = "walk"  # the mode of pictures that turn into each other

Noise = Callable[[int], Tensor]  # a seed's standard normals (n, d), one row a picture
ROUNDS = 4  # in which a walk's steps are made even
FINER = 4  # times as many pictures are on a walk, for that, as are shown
UNTRAINED = "drawn from the aggregate posterior: the learned prior is not trained yet"
PREVIEW = "training pictures joined, and rebuilt: the prior learns Pegasi from such"


@dataclass(frozen=True)
class SampleConfig:
    checkpoint: str = option(
        "", "a checkpoint, as `make train` writes to runs/", positional=True
    )
    out: str = option(
        "", "the PNG to write; of modes walk and morph also a moving GIF or WebP", positional=True
    )
    mode: str = option(
        "pegasus",
        "pegasus: a winged horse; walk: Pegasi that turn into each other, the last into the "
        "first; morph: rows from a horse to a Pegasus to a bird, in a moving picture there "
        "and back; the name of one of the run's classes; prior: whatever the model makes of "
        "noise",
    )
    best: int = option(
        0,
        "keep this many, enlarged: of Pegasi the most typical, of a class those that a "
        "classifier is surest of; 0 keeps all",
        least=0,
    )
    n: int = option(64, "how many pictures to draw", least=1, most=65_536)
    blend: float = option(
        0.5,
        "where Pegasi are no class of the model, how much of the first class they have, 0 to 1",
        least=0.0,
        most=1.0,
    )
    coat: str = option("any", "of the horse", choices=("any", *labels.COATS))
    guidance: float = option(
        6.0,
        "with a learned prior, how strongly pictures follow their class at the end of the "
        "way: 1 as learned; more is clearer, and more alike",
        least=0.0,
        most=100.0,
    )
    from_: str | None = option(
        None,
        "with a learned prior, a picture to begin from, as of a horse to get wings",
        metavar="PICTURE",
    )
    keep: float = option(0.4, "how much of that picture to keep, 0 to 1", least=0.0, most=1.0)
    steps: int = option(16, "of the integration of the learned prior", least=1, most=1000)
    temperature: float = option(1.0, "standard deviation of the noise", least=0.0, most=100.0)
    columns: int = option(8, "pictures in a row", least=1, most=65_536)
    scale: int | None = option(
        None,
        "pixels for each pixel of a picture; by default about 128 for its side, twice as many "
        "with --best and where it moves",
        least=1,
        most=64,
    )
    seed: int = option(
        0, "picture i is a function of the model, the seed and i alone, to rounding"
    )


DEFAULTS = SampleConfig()


@dataclass(frozen=True)
class Sampler:
    """A model with all that sampling needs, and what its pictures should say."""
    model: VAE
    gaussians: dict[str, Gaussian]  # of each class, and of the first one's coats
    classes: tuple[str, ...]
    about: dict[str, object]  # a PNG's text
    prior: FlowPrior | None  # once its training has begun
    has_pegasi: bool  # whether they are a class of the prior
    data: dict[str, str]  # folder and digest of what it was trained on

    @property
    def device(self) -> str:
        return self.model.variance.device.type


def digest(
    state: dict, model: VAE, fitted: dict[str, Gaussian], prior: FlowPrior | None
) -> str:
    """Return a fingerprint of weights and settings, the same for equal models."""
    tensors = dict(model.state_dict())
    for name, gaussian in fitted.items():
        tensors[f"mean of {name}"] = gaussian.mean
        tensors[f"covariance of {name}"] = gaussian.covariance
    if prior is not None:
        for name, tensor in prior.drawing_state().items():
            tensors[f"prior {name}"] = tensor
    config = {"classes": state["classes"]}
    for key in ("arch", "likelihood", "latent", "flow", "center"):
        config[key] = state["config"][key]
    return checkpoint.digest(tensors, config)


def from_state(state: dict, model: VAE, prior: FlowPrior | None) -> Sampler:
    """Return the sampler of a run's state.

    Before its training begins a prior is left out: samples then come from Gaussians, and
    pictures say so. Raises ValueError where Gaussians don't fit.
    """
    is_untrained = prior is not None and state["phase"] != "prior"
    if is_untrained:
        prior = None
    fitted = {name: Gaussian(*pair) for name, pair in state["densities"].items()}
    gaussians.check(fitted, state["classes"], model.latent_size, prior is not None)
    about = {
        "Software": "Pegasus VAE",
        "model": digest(state, model, fitted, prior),
        "epochs": f"{state['epoch']:g}",
        "data": str(state["data"]["name"]),
    }
    if is_untrained:
        about["prior"] = UNTRAINED
    elif prior is not None:
        about["prior"] = "learned"
    return Sampler(
        model=model,
        gaussians=fitted,
        classes=tuple(state["classes"]),
        about=about,
        prior=prior,
        has_pegasi=prior is not None and state["composites"] > 0,
        data={key: str(state["data"][key]) for key in ("folder", "digest")},
    )


def load(path: Path) -> Sampler:
    """Read a checkpoint's sampler to the CPU. Raises UserError where it is none."""
    state = checkpoint.load(path)
    with checkpoint.explain_mismatch(path):
        model = variants.build(state["config"])
        model.load_state_dict(state["model"])
        prior = None
        if state["prior"]:
            names = labels.names(state["classes"])
            prior = FlowPrior(model.latent_shape, len(names))
            prior.load_drawing_state(state["prior"])
        return from_state(state, model, prior)


def modes(sampler: Sampler) -> tuple[str, ...]:
    """Return what `--mode` may be: a Pegasus needs two classes."""
    pair = len(sampler.classes) > 1
    of_two = (labels.PEGASUS, "morph") if pair else ()
    return (*of_two, *sampler.classes, "prior", *([WALK] if pair else []))


def check_coat(sampler: Sampler, config: SampleConfig) -> None:
    """Raise UserError for a coat in a mode without the first class."""
    first = sampler.classes[0]
    with_coat = [m for m in modes(sampler) if m in (labels.PEGASUS, WALK, "morph", first)]
    if config.coat != "any" and config.mode not in with_coat:
        raise UserError(
            f"--coat: got {config.coat} with --mode {config.mode}, which has no "
            f"{first}; leave it out, or use one of the modes {', '.join(with_coat)}"
        )


def check(sampler: Sampler, config: SampleConfig) -> None:
    """Raise UserError for options that this model can't serve."""
    if config.mode not in modes(sampler):
        raise UserError(
            f"--mode: got {config.mode}, wanted one of {', '.join(modes(sampler))}, "
            f"which is what this model of {', '.join(sampler.classes)} can draw"
        )
    if config.from_ is not None and sampler.prior is None:
        raise UserError(
            "--from: this model has no learned prior, and nothing else can go on from "
            "a picture; leave it out"
        )
    if sampler.has_pegasi and config.blend != DEFAULTS.blend:
        raise UserError("--blend: Pegasi are a class of this model; leave it out")
    if config.best and config.mode in (WALK, "morph"):
        raise UserError("--best: a walk or a morph shows all of its pictures; leave it out")
    if is_walk(config) and sampler.model.latent_size < 2:
        raise UserError("--mode walk: there is no circle in one latent dimension")
    if config.best:
        classifier.load(classifier.CHOOSING)  # before minutes of drawing
    check_coat(sampler, config)


def class_pair(sampler: Sampler, coat: str) -> tuple[Gaussian, Gaussian]:
    """Return the Gaussians of the first class, with a coat, and of the second."""
    first = labels.with_coat(sampler.classes[0], coat)
    return sampler.gaussians[first], sampler.gaussians[sampler.classes[1]]


def sample_codes(sampler: Sampler, config: SampleConfig) -> Tensor | None:
    """Sample the codes (n, K) of a conditional prior in mode prior, else None."""
    if config.mode == "prior" and isinstance(sampler.model, variants.ConditionalVAE):
        return sampler.model.sample_codes(config.n, config.seed)
    return None


def is_walk(config: SampleConfig) -> bool:
    """Return whether pictures are on a closed way, each near the next."""
    return config.mode == WALK or (config.mode == "morph" and plots.is_moving(config.out))


def subject(config: SampleConfig) -> str:
    """Return what is drawn: a mode, or what a walk shows."""
    return labels.PEGASUS if config.mode == WALK else config.mode


def morph_share(config: SampleConfig, turns: Tensor | None) -> Tensor:
    """Return how far from the first class to the second pictures are, 0 to 1, (n, 1).

    They go along a row of the sheet, or on a walk there and back.
    """
    if turns is not None:
        return (1 - (1 - 2 * turns).abs())[:, None]
    rows = torch.arange(config.n)
    return (rows % config.columns / max(config.columns - 1, 1))[:, None]


def circle_noise(turns: Tensor, size: int, seed: int) -> Tensor:
    """Return standard normals on a circle, (n, size). turns: how far around, 0 to 1, (n,).

    All have the same length.
    """
    first, second = reparam.normals(2, size, seed)
    second = second - first * (first @ second) / (first @ first)
    second = second * first.norm() / second.norm()
    angle = (2 * math.pi * turns)[:, None]
    return angle.cos() * first + angle.sin() * second


def sheet_noise(
    sampler: Sampler, config: SampleConfig, seed: int, turns: Tensor | None
) -> Tensor:
    """Return standard normals (n, d), on a walk those of a circle.

    In mode morph a row of the sheet shares them.
    """
    if turns is not None:
        return circle_noise(turns, sampler.model.latent_size, seed)
    number = torch.arange(config.n)
    if config.mode == "morph":
        number = number // config.columns
    eps = reparam.normals(int(number[-1]) + 1, sampler.model.latent_size, seed)
    return eps[number]


def centered_noise(
    config: SampleConfig, gaussian: Gaussian, number: int, noise: Noise
) -> Tensor:
    """Sample a Gaussian moved to zero, (n, d); another number gives other noise."""
    seed = reparam.derive_seed(config.seed, number, GAUSSIAN)
    centered = Gaussian(torch.zeros_like(gaussian.mean), gaussian.covariance)
    return gaussians.sample(centered, noise(seed), config.temperature)


def morph_latents(
    sampler: Sampler, config: SampleConfig, share: Tensor, noise: Noise
) -> Tensor:
    """Sample latents from the first class's Gaussian to the second's, by `morph_share`.

    Means move on a line, noise on an arc: a line would pass where there is less noise
    than anywhere else.
    """
    angle = share * math.pi / 2
    first, second = class_pair(sampler, config.coat)
    z = torch.lerp(first.mean, second.mean, share)
    z = z + angle.cos() * centered_noise(config, first, 0, noise)
    return z + angle.sin() * centered_noise(config, second, 1, noise)


def prior_latents(sampler: Sampler, config: SampleConfig, noise: Noise) -> Tensor:
    """Sample latents from N(0, I) or the conditional prior.

    While a run's flow prior is untrained, from each class's Gaussian in turn.
    """
    eps = noise(config.seed)
    if sampler.about.get("prior") == UNTRAINED:
        fitted = [sampler.gaussians[name] for name in sampler.classes]
        z = torch.stack([gaussians.sample(g, eps, config.temperature) for g in fitted])
        number = torch.arange(config.n)
        return z[number % len(fitted), number]
    codes = sample_codes(sampler, config)
    if codes is not None:
        return sampler.model.sample_latents(config.temperature * eps, codes).cpu()
    return (config.temperature * eps.double()).float()


def gaussian_latents(sampler: Sampler, config: SampleConfig, noise: Noise) -> Tensor:
    """Sample latents from a class's Gaussian, or from the product of two."""
    if subject(config) == labels.PEGASUS:
        first, second = class_pair(sampler, config.coat)
        gaussian = gaussians.product(first, second, config.blend)
    else:
        gaussian = sampler.gaussians[labels.with_coat(config.mode, config.coat)]
    return gaussians.sample(gaussian, noise(config.seed), config.temperature)


def morph_weights(share: Tensor, first: int, middle: int, last: int) -> dict[int, Tensor]:
    """Return weights (n, 1) of three classes, one after the other as a share rises."""
    start = (1 - 2 * share).clamp(min=0)
    end = (2 * share - 1).clamp(min=0)
    return {first: start, middle: 1 - start - end, last: end}


def class_weights(
    sampler: Sampler, config: SampleConfig, share: Tensor
) -> dict[int, float | Tensor]:
    """Return how much of each class number the flow follows.

    share: of `morph_share`, for mode morph, whose weights are as many. Pegasi that are no class
    are of the first two together.
    """
    if config.mode == "prior":
        return {}
    classes = sampler.classes
    first = labels.number(classes, classes[0], config.coat)
    if config.mode == "morph" and sampler.has_pegasi:
        winged = labels.number(classes, labels.PEGASUS, config.coat)
        return morph_weights(share, first, winged, 1)
    if config.mode == "morph":
        return {first: 1 - share, 1: share}
    if subject(config) == labels.PEGASUS and not sampler.has_pegasi:
        return {first: 2 * config.blend, 1: 2 - 2 * config.blend}
    return {labels.number(classes, subject(config), config.coat): 1.0}


def early_weights(
    sampler: Sampler, config: SampleConfig, weights: dict[int, float | Tensor]
) -> dict[int, float | Tensor]:
    """Return the weights at t = 0, from those of `class_weights`.

    That is without guidance; but a coat has to be there early, so it counts twice.
    """
    if config.coat == "any":
        return weights
    coated = [
        labels.number(sampler.classes, name, config.coat)
        for name in (sampler.classes[0], labels.PEGASUS)
    ]
    return {n: 2 * weight if n in coated else weight for n, weight in weights.items()}


def begin_from(sampler: Sampler, config: SampleConfig, eps: Tensor, noise: Noise) -> Tensor:
    """Return latents (n, d) on the way from noise (n, d) to a picture's.

    Its latents are samples: to the prior a mean is a latent like no other, of which little
    is drawn anew.
    """
    size = sampler.model.image_shape[1]
    photo = vae.from_bytes(pictures.read(Path(config.from_), size)[None]).to(sampler.device)
    with device.fast_autocast(photo):
        mu, logvar = sampler.model.encode(photo)
    seed = reparam.derive_seed(config.seed, 0, POSTERIOR)
    posterior_noise = noise(seed).to(mu) * config.temperature
    z = sampler.prior.normalize(mu + (logvar / 2).exp() * posterior_noise)
    return torch.lerp(eps, z.cpu(), config.keep)


def flow_latents(sampler: Sampler, config: SampleConfig, share: Tensor, noise: Noise) -> Tensor:
    """Sample latents by the flow prior, from noise or from a picture."""
    eps = noise(config.seed) * config.temperature
    start = 0.0
    if config.from_ is not None:
        start = config.keep
        eps = begin_from(sampler, config, eps, noise)
    times = [start + (1 - start) * i / config.steps for i in range(config.steps + 1)]
    precision = device.fastest_precision(sampler.device)
    if is_walk(config):
        precision = "float32"  # in bfloat16 pictures tremble from step to step
    z = []
    for rows in torch.arange(config.n).split(CHUNK):
        streams.show(f"{config.mode}: {int(rows[0]):,} of {config.n:,} sampled")
        weights = class_weights(sampler, config, share[rows].to(sampler.device))
        early = early_weights(sampler, config, weights)
        late = {number: config.guidance * weight for number, weight in weights.items()}
        begin = eps[rows].to(sampler.device)
        with device.autocast(sampler.device, precision):
            end = follow(sampler.prior, early, late, begin, times)
        z.append(sampler.prior.denormalize(end).cpu())
    streams.show("")
    return torch.cat(z)


@torch.no_grad()
def latents(sampler: Sampler, config: SampleConfig, turns: Tensor | None = None) -> Tensor:
    """Sample latents (n, d), on the CPU.

    Row i depends on (seed, i) alone; in mode morph on the seed, its row and its column
    of the sheet. turns: how far around a walk pictures are, 0 to 1, (n,); rows depend on
    the seed and on these.
    """
    def noise(seed: int) -> Tensor:
        return sheet_noise(sampler, config, seed, turns)

    share = morph_share(config, turns)
    if sampler.prior is not None:
        return flow_latents(sampler, config, share, noise)
    if config.mode == "morph":
        return morph_latents(sampler, config, share, noise)
    if config.mode == "prior":
        return prior_latents(sampler, config, noise)
    return gaussian_latents(sampler, config, noise)


def decoded(sampler: Sampler, z: Tensor, codes: Tensor | None) -> Iterator[Tensor]:
    """Decode latents (n, d), of codes (n, K) if known, to images, 500 at a time."""
    for rows in torch.arange(len(z)).split(500):
        batch = z[rows].to(sampler.device)
        if codes is None:
            x = sampler.model.decode(batch)
        else:
            x = sampler.model.decode(batch, codes[rows])
        yield x.cpu()


def decode(sampler: Sampler, z: Tensor, codes: Tensor | None) -> Tensor:
    """Decode latents (n, d), of codes (n, K) if known, to images (n, 3, h, w)."""
    return torch.cat(list(decoded(sampler, z, codes)))


def typicality(features: Tensor) -> Tensor:
    """Return how like others pictures are, (n,), by their features (n, d).

    That is the mean cosine similarity to the quarter of them that is most like a picture.
    Pictures that came out badly are unlike each other.
    """
    unit = functional.normalize(features, dim=1)
    count = min(len(unit), 1 + math.ceil(len(unit) / 4))  # one is the picture itself
    likeness = (rows @ unit.T for rows in unit.split(CHUNK))
    return torch.cat([rows.topk(count, sorted=False).values.mean(1) for rows in likeness])


def ranking(sampler: Sampler, images: Tensor, config: SampleConfig) -> Tensor:
    """Return what `--best` goes by, (n,).

    Pegasi that are a class, and classes that the judge does not know, go by how typical
    they are; all else by how sure it is of the mode's class, or of the first. With a coat
    the quarter that has most of it comes before the others.
    """
    judge = classifier.load(classifier.CHOOSING)
    probabilities, features = classifier.classify(judge, images)
    name = config.mode if config.mode in sampler.classes else sampler.classes[0]
    is_pegasus = config.mode == labels.PEGASUS and sampler.has_pegasi
    if is_pegasus or not classifier.knows(name):
        score = typicality(features)
    else:
        score = classifier.probability_of(probabilities, name)
    if config.coat == "any":
        return score
    coat = composites.coat_scores(images)[labels.COATS.index(config.coat)]
    return score + 2 * (coat >= coat.quantile(0.75))  # a score is at most 1


def even_turns(turns: Tensor, images: Tensor) -> Tensor:
    """Return places on a walk (n,) between which pictures change more evenly.

    Pictures of evenly spaced noise hardly change for a while, then all at once.
    """
    step = (images - images.roll(-1, 0)).square().mean((1, 2, 3)).sqrt().double()
    if step.sum() == 0:  # one picture, or all alike
        return turns
    step = step + step.mean() / 4  # a careful way: what is between pictures is not known
    way = functional.pad(step.cumsum(0), (1, 0)).numpy()
    around = functional.pad(turns.double(), (0, 1), value=1.0).numpy()
    even = numpy.interp(way[-1] * numpy.arange(len(turns)) / len(turns), way, around)
    return torch.from_numpy(even).float()


def walk(sampler: Sampler, config: SampleConfig) -> Tensor:
    """Sample images (n, 3, h, w) of a closed walk, in steps that look alike."""
    count = FINER * config.n
    finer = replace(config, n=count)
    turns = torch.arange(count) / count
    for _ in range(ROUNDS):
        images = decode(sampler, latents(sampler, finer, turns), None)
        turns = even_turns(turns, images)
    return decode(sampler, latents(sampler, config, turns[::FINER]), None)


@torch.no_grad()
def sample(sampler: Sampler, config: SampleConfig = DEFAULTS) -> Tensor:
    """Sample images (n, 3, h, w) in [0, 1]; with `best` that many, the best first.

    Raises UserError for options that this model can't serve.
    """
    check(sampler, config)
    if is_walk(config):
        return walk(sampler, config)
    z = latents(sampler, config)
    images = decode(sampler, z, sample_codes(sampler, config))
    if config.best == 0:
        return images
    best = ranking(sampler, images, config).argsort(descending=True, stable=True)
    return images[best[: config.best]]


def default_scale(size: int) -> int:
    """Return how many pixels a sheet shows for a pixel of pictures of a size."""
    return max(1, round(128 / size))


def page(
    images: Tensor, about: dict[str, object], columns: int = 8, scale: int | None = None
) -> Image.Image:
    """Lay out images on a sheet that says below what they are not.

    That is, where they come from synthetic data, or not yet from the learned prior.
    """
    if scale is None:
        scale = default_scale(images.shape[-1])
    sheet = plots.sheet(images, columns, scale)
    if about.get("prior") in (UNTRAINED, PREVIEW):
        sheet = plots.caption(sheet, about["prior"])
    if datasets.is_synthetic(about["data"]):
        sheet = plots.caption(sheet, plots.SYNTHETIC)
    return sheet
