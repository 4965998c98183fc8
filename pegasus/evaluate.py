"""Measure a checkpoint: bits/dim, Frechet distance, how its samples are classified.

    python -m pegasus.evaluate runs/pegasus/last.pt                        # a table
    python -m pegasus.evaluate runs/pegasus/last.pt --json
    python -m pegasus.evaluate runs/pegasus/last.pt --export 2000 folder

--json adds the settings behind each figure; --export writes PNGs of 32 x 32 for other
people's measures. It reports with the judge (pegasus.models.classifier) of seed 1:
`sample.py --best` and the composed Pegasi choose with that of seed 0.
"""
import argparse
import dataclasses
import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import reparam
import vae
from pegasus import cli
from pegasus.cli import UserError, option
from pegasus.data import cifar10, datasets
from pegasus.data.datasets import Dataset
from pegasus.device import fastest_precision, resolve_device
from pegasus.drawing import plots
from pegasus.drawing import sampler as sampling
from pegasus.drawing.sampler import SampleConfig, Sampler
from pegasus.models import classifier
from pegasus.models.classifier import Classifier
from pegasus.models.variants import Component, ConditionalVAE, components
from pegasus.training.accelerate import accelerate

import torch
from torch import Tensor

BOUND = 0  # purposes of the seeds derived from the one asked for
SAMPLES = 1


@dataclass(frozen=True)
class EvaluateConfig:
    checkpoint: str = option(
        "", "a checkpoint, as `make train` writes to runs/", positional=True
    )
    data: str = option(
        "auto",
        "the data it was trained on, as for train.py; auto is the folder used then",
    )
    mode: str = option(
        "balanced",
        "what the Frechet distance and --export are of: balanced, as many samples of "
        "each class, or prior, samples of the prior",
        choices=("balanced", "prior"),
    )
    n: int = option(2000, "images to sample in each mode", least=200, most=65_536)
    guidance: float = option(
        2.0,
        "guidance scale of each class's own set, with a learned prior; "
        "balanced has none",
        least=0.0,
    )
    images: int = option(500, "test photographs for bits/dim", least=1)
    k: int = option(32, "posterior samples for each of them", least=1)
    judge_seed: int = option(
        1,
        "which judge reports; trained once, in minutes, and kept beside the data",
        least=0,
    )
    seed: int = option(0, "decides everything sampled")
    threads: int = option(
        0, "CPU threads; 0 is torch's default, one a core", least=0, most=1024
    )
    json: bool = option(False, "print JSON")
    export: list[str] | None = option(
        None, "only write N PNGs to an empty folder", nargs=2, metavar=("N", "DIR")
    )


# ---- bits/dim ----


def binned_log_likelihood(x: Tensor, xhat: Tensor, variance: Tensor) -> Tensor:
    """Return log P(bytes) in nats an image, (B,).

    N(xhat, variance) integrated over each byte's bin of width 1/255; the first and the
    last bin reach to infinity. x: bytes / 255, (B, 3, 32, 32).
    """
    std = variance.sqrt()
    low = (x - 1 / 510 - xhat) / std
    high = (x + 1 / 510 - xhat) / std
    low = low.masked_fill(x < 0.5 / 255, -math.inf)
    high = high.masked_fill(x > 254.5 / 255, math.inf)
    # above the mean the difference of two numbers near one would have no digits
    mirrored = low > 0
    log_low = torch.special.log_ndtr(torch.where(mirrored, -high, low))
    log_high = torch.special.log_ndtr(torch.where(mirrored, -low, high))
    log_share = (-(log_low - log_high).expm1()).log()
    return (log_high + log_share).flatten(1).sum(1)


class Samples(NamedTuple):
    """What k posterior samples of B images give, in nats, float64 (k, B)."""
    log_likelihood: Tensor  # log p(x|z), or its expectation over the code
    elbo: Tensor  # the mean over samples is the ELBO
    log_weight: Tensor  # log w; the log-mean-exp over samples is the tighter bound


def sample_component(
    component: Component,
    x: Tensor,
    eps: Tensor,
    variance: Tensor,
    log_likelihood: Callable,
) -> tuple[Tensor, Tensor]:
    """Return log p(x|z) and log p(x|z) p(z) / q(z|x) of one sample, float64 (B,)."""
    z = component.mu + (component.logvar / 2).exp() * eps
    log_p = log_likelihood(x, component.decode(z), variance).double()
    # reflections change neither |z|, and so not p(z), nor volumes, and so not q(z|x)
    log_ratio = (eps.square() - z.square() + component.logvar).double().sum(1) / 2
    return log_p, log_p + log_ratio


@torch.no_grad()
def posterior_samples(
    model: vae.VAE,
    x: Tensor,
    k: int,
    seed: int = 0,
    log_likelihood: Callable = binned_log_likelihood,
) -> Samples:
    """Take k posterior samples of images (B, 3, 32, 32) in [0, 1].

    Their noise depends on (seed, number, row) alone. p(z) is N(0, I), or p(c) = 1/K and
    p(z|c) a Gaussian. Then codes are summed out:
    elbo = sum_c q(c|x) [log w_c - log K q(c|x)], and w = sum_c w_c / K, since
    E w_c = p(x|c).
    """
    parts = components(model, x)
    log_share = torch.stack([part.log_share for part in parts]).double()  # (K, B)
    share = log_share.exp()
    log_codes = math.log(len(parts))
    rows = []
    for i in range(k):
        noise_seed = reparam.derive_seed(seed, i, BOUND)
        eps = vae.sampling_noise(len(x), parts[0].mu.shape[1], noise_seed)
        inputs = (x, eps, model.variance, log_likelihood)
        terms = [sample_component(part, *inputs) for part in parts]
        log_p, log_weight = (torch.stack(values) for values in zip(*terms, strict=True))
        elbo = (share * (log_weight - log_share)).sum(0) - log_codes
        weight = log_weight.logsumexp(0) - log_codes
        rows.append(torch.stack([(share * log_p).sum(0), elbo, weight]))
    return Samples(*torch.stack(rows, 1))


def importance_weighted(log_weight: Tensor) -> Tensor:
    """Return log 1/K sum_k w_k of log w (K, B), (B,): a lower bound on log p(x).

    Burda et al. 2016, equation 8.
    """
    return log_weight.logsumexp(0) - math.log(len(log_weight))


def bounds(
    model: vae.VAE, images: Tensor, k: int, seed: int, batch_size: int = 100
) -> dict[str, float]:
    """Return bits/dim by both bounds, and rate and distortion in nats an image.

    images: bytes (n, 3, 32, 32).
    """
    rows = []
    for number, batch in enumerate(images.split(batch_size)):
        x = vae.from_bytes(batch)
        batch_seed = reparam.derive_seed(seed, number, BOUND)
        samples = posterior_samples(model, x, k, batch_seed)
        with torch.no_grad():
            rate = model(x, torch.tensor(0)).rate.double()
        elbo = samples.elbo.mean(0)
        tighter = importance_weighted(samples.log_weight)
        distortion = -samples.log_likelihood.mean(0)
        rows.append(torch.stack([-elbo, -tighter, rate, distortion]))
    elbo, tighter, rate, distortion = torch.cat(rows, 1).mean(1).tolist()
    bits = vae.IMAGE_VALUES * math.log(2)
    return {
        "bits_per_dim_elbo": elbo / bits,
        "bits_per_dim_iw": tighter / bits,
        "rate": rate,
        "distortion": distortion,
    }


# ---- sets of images ----


def interleave(sets: list[Tensor], n: int) -> Tensor:
    """Return n rows in all, in turn one of each tensor."""
    count = math.ceil(n / len(sets))
    return torch.stack([rows[:count] for rows in sets], 1).flatten(0, 1)[:n]


def balanced_subset(rows: Tensor, labels: Tensor, n: int) -> Tensor:
    """Return at most n rows, in turn one of each class and as many of each.

    A file may hold one class after another, so the first n would not do.
    """
    sets = [rows[labels == label] for label in labels.unique()]
    least = min(map(len, sets))
    return interleave([members[:least] for members in sets], min(n, least * len(sets)))


def image_modes(sampler: Sampler) -> list[str]:
    """Return the modes of a model whose samples are independent: all but morph."""
    return [mode for mode in sampling.modes(sampler) if mode != "morph"]


def sample_mode(
    sampler: Sampler, mode: str, n: int, seed: int, guidance: float
) -> Tensor:
    """Sample n images of a mode; guidance: of a class. Each mode has its own noise."""
    number = image_modes(sampler).index(mode)
    mode_seed = reparam.derive_seed(seed, number, SAMPLES)
    config = SampleConfig(mode=mode, n=n, seed=mode_seed)
    if mode in sampler.classes:
        config = dataclasses.replace(config, guidance=guidance)
    return sampling.sample(sampler, config)


def sample_balanced(sampler: Sampler, n: int, seed: int) -> Tensor:
    """Sample n images in turn one of each class, without guidance."""
    count = math.ceil(n / len(sampler.classes))
    sets = [sample_mode(sampler, name, count, seed, 1.0) for name in sampler.classes]
    return interleave(sets, n)


def image_sets(
    sampler: Sampler, data: Dataset, config: EvaluateConfig
) -> dict[str, Tensor]:
    """Return the sets to compare by name: images (m, 3, 32, 32) in [0, 1].

    The test photographs, their reconstructions, samples of each mode, and, of the
    classes in turn, `balanced` without guidance and with a learned prior `guided`.
    """
    photographs = vae.from_bytes(data.test_images)
    with torch.no_grad():
        batches = [sampler.model.reconstruct(x) for x in photographs.split(500)]
    sets = {"photographs": photographs, "reconstructions": torch.cat(batches)}
    for mode in image_modes(sampler):
        sets[mode] = sample_mode(sampler, mode, config.n, config.seed, config.guidance)
    in_turn = interleave([sets[name] for name in sampler.classes], config.n)
    if sampler.prior is None:
        sets["balanced"] = in_turn
    else:
        sets["balanced"] = sample_balanced(sampler, config.n, config.seed)
        sets["guided"] = in_turn
    return sets


# ---- what a classifier makes of them ----


def nearest(features: Tensor, others: Tensor) -> float:
    """Return the median distance of features (n, d) to the nearest of (m, d)."""
    distances = [torch.cdist(batch, others).amin(1) for batch in features.split(500)]
    return torch.cat(distances).median().item()


def class_shares(probabilities: Tensor, classes: tuple[str, ...]) -> dict[str, float]:
    """Return the share of images assigned to each of some classes, and `other`."""
    winners = probabilities.argmax(1)
    shares = {}
    for name in classes:
        assigned = winners == cifar10.CLASSES.index(name)
        shares[name] = assigned.double().mean().item()
    return shares | {"other": 1 - sum(shares.values())}


def pegasus_figures(
    probabilities: dict[str, Tensor], classes: tuple[str, ...]
) -> dict[str, dict[str, float]]:
    """Return how Pegasus-like each set is; nothing for a run of one class.

    pegasus_share: of images with a score above that of 99 % of the test photographs.
    pegasus_score: the mean score.
    """
    shares = {}
    means = {}
    if len(classes) > 1:
        photographs = classifier.pegasus_score(probabilities["photographs"], classes)
        threshold = photographs.quantile(0.99)
        for name, values in probabilities.items():
            score = classifier.pegasus_score(values, classes)
            shares[name] = (score > threshold).double().mean().item()
            means[name] = score.mean().item()
    return {"pegasus_share": shares, "pegasus_score": means}


@torch.no_grad()
def compare(
    sets: dict[str, Tensor], data: Dataset, network: Classifier, n: int
) -> dict[str, object]:
    """Return what a classifier makes of sets of images, by figure and set.

    called: the share that it assigns to each class. nearest: to a training photograph,
    in its features. frechet_of: to the test photographs; frechet_floor is that of n
    training photographs. Besides, `pegasus_figures`.
    """
    probabilities = {}
    features = {}
    for name, images in sets.items():
        probabilities[name], features[name] = classifier.classify(network, images)
    _, training = classifier.classify(network, data.images)
    photographs = features["photographs"]
    shown = data.classes
    if "bird" in shown and "airplane" not in shown:
        shown = (*shown, "airplane")  # for which birds are taken
    floor = balanced_subset(training, data.labels, n)
    return {
        "called": {name: class_shares(p, shown) for name, p in probabilities.items()},
        "nearest": {name: nearest(rows, training) for name, rows in features.items()},
        "frechet_of": {
            name: classifier.frechet(rows, photographs)
            for name, rows in features.items()
            if name != "photographs"
        },
        **pegasus_figures(probabilities, data.classes),
        "frechet_floor": classifier.frechet(floor, photographs),
    }


# ---- the report ----


def load_sampler(path: Path) -> Sampler:
    """Return the model in a checkpoint, accelerated. Raises UserError."""
    sampler = sampling.load(path)
    accelerate(sampler.model)
    if sampler.prior is not None:
        accelerate(sampler.prior)
    return sampler


def get_classifier(data: Dataset, seed: int) -> dict[str, object]:
    """Return the state of the classifier that reports. Raises UserError.

    Where there are too few images to compare with, it says so before training one.
    """
    least = min(len(data.images), len(data.test_images))
    if least < 2:
        raise UserError(
            f"{data.folder}: {least} picture of {', '.join(data.classes)} to train on, "
            "or to test; the Frechet distance needs two of each; use other data"
        )
    device = resolve_device("auto")
    precision = fastest_precision(device)
    return classifier.get(Path(data.folder), seed, device, precision, accelerate)


def describe_settings(
    sampler: Sampler, data: Dataset, accuracy: float, config: EvaluateConfig
) -> dict[str, object]:
    """Return the settings behind each figure, for --json."""
    prior = "N(0, I)"
    if isinstance(sampler.model, ConditionalVAE):
        prior = f"{len(sampler.model.conditional.mean)} Gaussians"
    shared = {
        "n": config.n,
        "classes": list(data.classes),
        "test_photographs": len(data.test_images),
        "judge_seed": config.judge_seed,
        "guidance": config.guidance,
        "judge_accuracy": accuracy,
    }
    floor = balanced_subset(data.labels, data.labels, config.n)
    tested = balanced_subset(data.test_labels, data.test_labels, config.images)
    return {
        "model": sampler.about,
        "data": data.folder,
        "seed": config.seed,
        "bits_per_dim": {
            "k": config.k,
            "images": len(tested),
            "prior": prior,
            "pixel_variance": sampler.model.variance.item(),
        },
        "frechet": shared | {"mode": config.mode, "floor_n": len(floor)},
        "called": shared,
        "pegasus_share": shared | {"above_quantile": 0.99},
        "nearest": shared,
    }


def report(
    sampler: Sampler, data: Dataset, state: dict, config: EvaluateConfig
) -> dict[str, object]:
    """Return all figures, under the names that --json gives them, and their settings.

    state: of the classifier.
    """
    images = balanced_subset(data.test_images, data.test_labels, config.images)
    figures = bounds(sampler.model, images, config.k, config.seed)
    network = classifier.from_state(state)
    accelerate(network)
    compared = compare(image_sets(sampler, data, config), data, network, config.n)
    figures["frechet"] = compared["frechet_of"][config.mode]
    settings = describe_settings(sampler, data, state["accuracy"], config)
    return figures | compared | {"settings": settings}


def summary_lines(figures: dict) -> list[str]:
    """Return the lines of the table that are about the model as a whole."""
    bits = figures["settings"]["bits_per_dim"]
    settings = figures["settings"]["frechet"]
    return [
        f"bits/dim    {figures['bits_per_dim_elbo']:.3f} (ELBO), "
        f"{figures['bits_per_dim_iw']:.3f} (importance-weighted, K = {bits['k']}), "
        f"{bits['images']} test photographs, under {bits['prior']}",
        f"nats        rate {figures['rate']:.1f}, "
        f"distortion {figures['distortion']:.1f}",
        f"Frechet     {figures['frechet']:.2f} ({settings['mode']}, N = {settings['n']}), "
        f"{figures['frechet_floor']:.2f} for {settings['floor_n']} training photographs",
    ]


def set_line(figures: dict, name: str) -> str:
    """Return the line of the table for a set of images."""
    cells = [f"{name:16}"]
    distance = figures["frechet_of"].get(name)
    cells.append(" " * 9 if distance is None else f"{distance:>9.2f}")
    cells += [f"{share:>11.1%}" for share in figures["called"][name].values()]
    share = figures["pegasus_share"].get(name)
    cells.append(" " * 11 if share is None else f"{share:>11.1%}")
    cells.append(f"{figures['nearest'][name]:>9.2f}")
    return "".join(cells)


def table(figures: dict) -> str:
    """Return the report's figures as text."""
    settings = figures["settings"]["frechet"]
    names = "".join(f"{name:>11}" for name in figures["called"]["photographs"])
    lines = [
        *summary_lines(figures),
        "",
        f"{'':16}{'Frechet':>9}{names}{'Pegasus':>11}{'nearest':>9}",
        *(set_line(figures, name) for name in figures["called"]),
        "",
        f"Judge {settings['judge_seed']}, right about {settings['judge_accuracy']:.1%} "
        "of all test photographs: its Frechet distance to them",
        "(not FID), the share it calls each class, the share more Pegasus-like than 99 %",
        "of them, and in its features the distance to the nearest training photograph.",
    ]
    return "\n".join(lines)


def export(sampler: Sampler, config: EvaluateConfig) -> str:
    """Write N PNGs of 32 x 32 pixels; return a sentence about it. Raises UserError."""
    count, name = config.export
    folder = Path(name)
    try:
        n = cli.number(int, least=1, most=65_536)(count)
    except argparse.ArgumentTypeError as error:
        raise UserError(f"--export: N: {error}") from None
    folder.mkdir(parents=True, exist_ok=True)
    if any(folder.iterdir()):
        raise UserError(f"--export: {folder} is not empty; choose another folder")
    if config.mode == "balanced":
        images = sample_balanced(sampler, n, config.seed)
    else:
        images = sample_mode(sampler, config.mode, n, config.seed, config.guidance)
    about = sampler.about | {"mode": config.mode, "seed": config.seed}
    for i, image in enumerate(images):
        plots.save(plots.sheet(image[None], 1, 1, 0), folder / f"{i:05}.png", about)
    return f"{n} pictures of {config.mode} in {folder}"


def main(argv: list[str] | None = None) -> None:
    config, _ = cli.parse(EvaluateConfig, argv, __doc__)
    if config.threads:
        torch.set_num_threads(config.threads)
    torch.set_flush_denormal(True)
    sampler = load_sampler(Path(config.checkpoint))
    if config.export:
        print(export(sampler, config))
        return
    data = datasets.load(config.data, ",".join(sampler.classes), sampler.data)
    figures = report(sampler, data, get_classifier(data, config.judge_seed), config)
    print(json.dumps(figures, indent=2) if config.json else table(figures))


if __name__ == "__main__":
    cli.run(main)
