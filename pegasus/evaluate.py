"""Measure a checkpoint: how probable it finds photographs, how its pictures compare.

    python -m pegasus.evaluate runs/pegasus/last.pt                        # a table
    python -m pegasus.evaluate runs/pegasus/last.pt --json
    python -m pegasus.evaluate runs/pegasus/last.pt --export 2000 folder

--json adds the settings behind each figure; --export writes PNGs of 32 x 32 for other
people's measures. Three judges report (pegasus/models/classifier.py) that never chose
anything. Sets of photographs spoiled on purpose show what each measure is worth.
"""
import argparse
import dataclasses
import functools
import json
import math
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import reparam
import vae
from pegasus import cli, measures
from pegasus.cli import UserError, option
from pegasus.data import cifar10, datasets
from pegasus.data.datasets import Dataset
from pegasus.drawing import plots
from pegasus.drawing import sampler as sampling
from pegasus.drawing.sampler import SampleConfig, Sampler
from pegasus.models import classifier, flow_prior
from pegasus.models.variants import ConditionalVAE
from pegasus.training.accelerate import accelerate

import torch
from torch import Tensor

BOUND, SAMPLES, CODE = range(3)  # purposes of the seeds derived from the one asked for
NEAR = 0.05  # share of test photographs that count as near to a training photograph
COPIED = 0.1  # share of copies in the set that shows what copies look like


@dataclass(frozen=True)
class EvaluateConfig:
    checkpoint: str = option(
        "", "a checkpoint, as `make train` writes to runs/", positional=True
    )
    data: str = option(
        "auto",
        "the data it was trained on, as for train.py; auto is the folder used then",
    )
    n: int = option(2000, "pictures to draw for each row", least=200, most=65_536)
    guidance: float = option(
        2.0, "guidance scale of a class's own row, with a learned prior", least=0.0
    )
    images: int = option(500, "test photographs for bits/dim", least=1)
    k: int = option(32, "posterior samples for each of them", least=1)
    monte_carlo: int = option(
        10_000, "samples of N(0, I) for equation (1) of the paper", least=2, most=10**6
    )
    seed: int = option(0, "decides everything sampled")
    threads: int = option(
        0, "CPU threads; 0 is torch's default, one a core", least=0, most=1024
    )
    json: bool = option(False, "print JSON")
    export: list[str] | None = option(
        None,
        "only write N PNGs, of the classes in turn, to an empty folder",
        nargs=2,
        metavar=("N", "DIR"),
    )


# ---- how probable the model finds test photographs ----


@torch.no_grad()
def prior_images(sampler: Sampler, n: int, seed: int) -> Tensor:
    """Decode n samples of the autoencoder's own prior, N(0, I) or K Gaussians."""
    model = sampler.model
    eps = vae.sampling_noise(n, model.latent_size, seed)
    codes = None
    if isinstance(model, ConditionalVAE):
        codes = model.sample_codes(n, seed)
        eps = model.sample_latents(eps, codes)
    return sampling.decode(sampler, eps, codes)


@torch.no_grad()
def autoencoder_terms(model: vae.VAE, x: Tensor, k: int, seed: int) -> Tensor:
    """Return, in nats for each image, float64 (4, B): see `likelihoods`.

    -ELBO, the importance-weighted bound, rate, and squared error.
    """
    samples = measures.posterior_samples(model, x, k, seed)
    tighter = measures.importance_weighted(samples.log_weight)
    terms = model(x, torch.tensor(reparam.derive_seed(seed, 0, CODE)))
    rows = [-samples.elbo.mean(0), -tighter, terms.rate.double(), terms.sse.double()]
    return torch.stack(rows)


def flow_terms(sampler: Sampler, x: Tensor, seed: int) -> Tensor:
    """Return -ELBO and rate under the learned prior, float64 (2, B), in nats.

    Of one posterior sample: rate = log q(z|x) - log p(z), with the flow's likelihood.
    """
    model = sampler.model
    with torch.no_grad():
        mu, logvar = model.encode(x)
        eps = vae.sampling_noise(len(x), model.latent_size, seed)
        z = mu + (logvar / 2).exp() * eps
        log_x = measures.log_likelihood(x, model.decode(z), model.variance).double()
    log_q = -(eps.square() + logvar + math.log(2 * math.pi)).double().sum(1) / 2
    rate = log_q - flow_prior.log_density(sampler.prior, z, seed)
    return torch.stack([rate - log_x, rate])


def likelihoods(sampler: Sampler, images: Tensor, config: EvaluateConfig) -> dict:
    """Return how probable the model finds images, bytes (n, 3, 32, 32).

    In bits/dim: by the ELBO, by the importance-weighted bound, by equation (1) of the
    paper, and with a learned prior by the ELBO under that. In nats: rates. squared_error.
    """
    autoencoder = []
    flow = []
    for number, batch in enumerate(images.split(100)):
        cli.show(f"bits/dim of {len(images)} test photographs: {100 * number} done")
        x = vae.from_bytes(batch)
        seed = reparam.derive_seed(config.seed, number, BOUND)
        autoencoder.append(autoencoder_terms(sampler.model, x, config.k, seed))
        if sampler.prior is not None:
            flow.append(flow_terms(sampler, x, seed))
    elbo, tighter, rate, sse = torch.cat(autoencoder, 1).mean(1).tolist()
    figures = {
        "bits_per_dim": vae.bits_of_nats(elbo),
        "bits_per_dim_iw": vae.bits_of_nats(tighter),
        "rate": rate,
        "squared_error": sse,
    }
    if flow:
        flow_elbo, flow_rate = torch.cat(flow, 1).mean(1).tolist()
        figures["bits_per_dim_flow"] = vae.bits_of_nats(flow_elbo)
        figures["rate_flow"] = flow_rate
    return figures | equation_1(sampler, images, config)


def equation_1(sampler: Sampler, images: Tensor, config: EvaluateConfig) -> dict:
    """Return bits/dim of images by Monte Carlo over the prior, and what it is worth.

    `monte_carlo_samples`: how many of them count for an image, (sum w)^2 / sum w^2.
    """
    cli.show("P(x) by Monte Carlo")
    xhat = prior_images(sampler, config.monte_carlo, config.seed)
    x = vae.from_bytes(images)
    batches = [
        measures.monte_carlo(batch, xhat, sampler.model.variance) for batch in x.split(100)
    ]
    log_p, error, effective = (
        torch.cat(values).mean().item() for values in zip(*batches, strict=True)
    )
    return {
        "bits_per_dim_monte_carlo": vae.bits_of_nats(-log_p),
        "monte_carlo_error": error,
        "monte_carlo_samples": effective,
    }


# ---- sets of pictures ----


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


def draw(
    sampler: Sampler, mode: str, n: int, seed: int, guidance: float = 1.0
) -> Tensor:
    """Draw n images of a mode; guidance: of a class. Each mode has its own noise."""
    number = sampling.modes(sampler).index(mode)
    config = SampleConfig(mode=mode, n=n, seed=reparam.derive_seed(seed, number, SAMPLES))
    if mode in sampler.classes:
        config = dataclasses.replace(config, guidance=guidance)
    return sampling.sample(sampler, config)


def draw_classes(sampler: Sampler, n: int, seed: int, guidance: float = 1.0) -> Tensor:
    """Draw n images, of each class in turn."""
    count = math.ceil(n / len(sampler.classes))
    sets = [draw(sampler, name, count, seed, guidance) for name in sampler.classes]
    return interleave(sets, n)


@torch.no_grad()
def rebuild(model: vae.VAE, images: Tensor) -> Tensor:
    """Encode images (n, 3, 32, 32) and decode their posterior means."""
    return torch.cat([model.reconstruct(x) for x in images.split(100)])


def under_lines(images: Tensor) -> Tensor:
    """Return images under two white lines that lean as wings might."""
    images = images.clone()
    for row in range(2, 16):
        rise = (16 - row) // 2
        for column in (14 - rise, 15 - rise, 17 + rise, 18 + rise):
            images[:, :, row, column] = 1
    return images


def spoiled_photographs(sampler: Sampler, data: Dataset, test: Tensor) -> dict[str, Tensor]:
    """Return test photographs, and sets that a good measure tells from them.

    Rebuilt ones, which are blurred; some with rebuilt training photographs among them;
    those of the first class under two white lines.
    """
    rebuilt = rebuild(sampler.model, test)
    training = balanced_subset(data.images, data.labels, round(COPIED * len(test)))
    copies = rebuild(sampler.model, vae.from_bytes(training))
    copied = torch.cat([copies, test[len(copies) :]])
    first = vae.from_bytes(data.test_images[data.test_labels == 0])
    return {
        "photographs": test,
        "rebuilt": rebuilt,
        f"{COPIED:.0%} copies": copied,
        f"{data.classes[0]}, two lines": under_lines(first),
    }


def drawn_sets(sampler: Sampler, config: EvaluateConfig) -> dict[str, Tensor]:
    """Return what the model draws, by the name of the table's row."""
    sets = {}
    for mode in sampling.modes(sampler):
        if mode == "morph":  # whose pictures depend on their place in a sheet
            continue
        count = config.n
        if mode != "prior":
            count = math.ceil(config.n / len(sampler.classes))
        sets[mode] = draw(sampler, mode, count, config.seed, config.guidance)
    in_turn = interleave([sets[name] for name in sampler.classes], config.n)
    if sampler.prior is None:
        return sets | {"classes": in_turn}
    unguided = draw_classes(sampler, config.n, config.seed)
    return sets | {"classes": unguided, "guided classes": in_turn}


# ---- what judges see in them ----


class View(NamedTuple):
    """What one judge sees in n images."""
    probabilities: Tensor  # of CIFAR-10's classes, (n, 10)
    features: Tensor  # (n, 112)


@functools.cache
def judges() -> list[classifier.Classifier]:
    """Return the judges that report, accelerated."""
    networks = [classifier.load(seed) for seed in classifier.REPORTING]
    for network in networks:
        accelerate(network)
    return networks


def look(images: Tensor) -> list[View]:
    """Show images to each judge that reports."""
    return [View(*classifier.classify(judge, images)) for judge in judges()]


@dataclass(frozen=True)
class Reference:
    """Photographs to compare with, and what judges see in them: the same for any model."""
    images: Tensor  # test photographs, of the classes in turn, (n, 3, 32, 32)
    views: list[View]
    training: list[Tensor]  # each judge's features of the training photographs
    near: list[float]  # for each judge the distance within which NEAR of `images` are
    accuracy: float  # share of `images` that judges call what they are


def judges_accuracy(data: Dataset, views: list[View]) -> float:
    """Return the share of the test photographs, in turn, that judges are right about."""
    labels = balanced_subset(data.test_labels, data.test_labels, len(data.test_labels))
    wanted = torch.tensor([cifar10.CLASSES.index(name) for name in data.classes])[labels]
    winners = torch.stack([view.probabilities.argmax(1) for view in views])
    return (winners == wanted).double().mean().item()


def make_reference(data: Dataset) -> Reference:
    """Look at a data set's photographs. Raises UserError where there are too few."""
    images = balanced_subset(data.test_images, data.test_labels, len(data.test_images))
    if len(images) < 8 or len(data.images) < 2:
        raise UserError(
            f"{data.folder}: {len(images)} test pictures of {', '.join(data.classes)}, "
            "as many of each; the Frechet distance needs eight; use other data"
        )
    images = vae.from_bytes(images)
    cli.show("judges look at photographs")
    views = look(images)
    training = [view.features for view in look(data.images)]
    near = []
    for view, features in zip(views, training, strict=True):
        distances = measures.nearest_distances(view.features, features)
        near.append(distances.quantile(NEAR).item())
    return Reference(images, views, training, near, judges_accuracy(data, views))


def spread(values: list[float]) -> dict[str, float]:
    """Return mean and standard deviation of the judges' values."""
    return {"mean": statistics.mean(values), "deviation": statistics.stdev(values)}


def distance_to(reference: Reference, views: list[View]) -> dict[str, float]:
    """Return the Frechet distance to the photographs, at infinitely many pictures."""
    pairs = zip(views, reference.views, strict=True)
    return spread([measures.frechet_at_infinity(a.features, b.features) for a, b in pairs])


def floor(reference: Reference) -> dict[str, float]:
    """Return the Frechet distance between the two halves of the photographs."""
    distances = []
    for view in reference.views:
        first, second = view.features.split(len(view.features) // 2)[:2]
        distances.append(measures.frechet_at_infinity(first, second))
    return spread(distances)


def near_share(reference: Reference, views: list[View]) -> float:
    """Return the share of images nearer to a training photograph than `near`."""
    shares = []
    judged = zip(views, reference.training, reference.near, strict=True)
    for view, training, near in judged:
        distances = measures.nearest_distances(view.features, training)
        shares.append((distances < near).double().mean().item())
    return statistics.mean(shares)


def called_shares(views: list[View], classes: tuple[str, ...]) -> dict[str, float]:
    """Return the share of images that judges assign to each of some classes."""
    winners = torch.stack([view.probabilities.argmax(1) for view in views])
    shares = {}
    for name in classes:
        assigned = winners == cifar10.CLASSES.index(name)
        shares[name] = assigned.double().mean().item()
    return shares


def set_figures(
    images: Tensor, views: list[View], reference: Reference, classes: tuple[str, ...]
) -> dict[str, object]:
    """Return the measures of a set of images, but for its Frechet distance."""
    power = measures.radial_power(images) / measures.radial_power(reference.images)
    some = measures.variety(images[:500])
    return {
        "n": len(images),
        "power": power.tolist(),
        "deviation": some.deviation,
        "correlation": some.correlation,
        "copies": near_share(reference, views),
        "called": called_shares(views, classes),
    }


def of_all_classes(name: str, sampler: Sampler) -> bool:
    """Return whether a set has as many pictures of each class as the photographs."""
    single = name in sampler.classes or name.endswith("two lines")
    return len(sampler.classes) == 1 or not (single or name == "pegasus")


def compare(
    sampler: Sampler, data: Dataset, reference: Reference, config: EvaluateConfig
) -> dict[str, dict]:
    """Return the measures of each set of pictures, by its name."""
    sets = spoiled_photographs(sampler, data, reference.images)
    sets |= drawn_sets(sampler, config)
    result = {}
    for name, images in sets.items():
        cli.show(f"judges look at {name}")
        is_reference = name == "photographs"
        views = reference.views if is_reference else look(images)
        figures = set_figures(images, views, reference, data.classes)
        if is_reference:
            figures["frechet"] = floor(reference)
        elif of_all_classes(name, sampler):
            figures["frechet"] = distance_to(reference, views)
        result[name] = figures
    cli.show("")
    return result


# ---- the report ----


def load_sampler(path: Path) -> Sampler:
    """Return the model in a checkpoint, accelerated. Raises UserError."""
    sampler = sampling.load(path)
    accelerate(sampler.model)
    if sampler.prior is not None:
        accelerate(sampler.prior)
    return sampler


def describe_settings(
    sampler: Sampler, data: Dataset, tested: int, config: EvaluateConfig
) -> dict[str, object]:
    """Return the settings behind the figures, for --json."""
    prior = "N(0, I)"
    if isinstance(sampler.model, ConditionalVAE):
        prior = f"{len(sampler.model.conditional.mean)} Gaussians"
    return {
        "model": sampler.about,
        "data": data.name,
        "classes": list(data.classes),
        "seed": config.seed,
        "torch": torch.__version__,
        "bits_per_dim": {
            "images": tested,
            "k": config.k,
            "monte_carlo": config.monte_carlo,
            "prior": prior,
            "pixel_variance": sampler.model.variance.item(),
        },
        "frechet": {"judges": list(classifier.REPORTING), "extrapolated": True},
        "power": "8 to 12 and 12 to 16 waves a picture, of the test photographs'",
        "copies": {"quantile": NEAR, "training_photographs": len(data.images)},
        "guidance": config.guidance,
    }


def report(
    sampler: Sampler, data: Dataset, reference: Reference, config: EvaluateConfig
) -> dict:
    """Return all figures, with the settings behind them."""
    tested = balanced_subset(data.test_images, data.test_labels, config.images)
    settings = describe_settings(sampler, data, len(tested), config)
    return {
        "settings": settings | {"judges_accuracy": reference.accuracy},
        "likelihood": likelihoods(sampler, tested, config),
        "sets": compare(sampler, data, reference, config),
    }


def likelihood_lines(figures: dict) -> list[str]:
    """Return the lines of the table about bits/dim."""
    settings = figures["settings"]["bits_per_dim"]
    values = figures["likelihood"]
    prior = settings["prior"]
    lines = [f"Bits for each byte of {settings['images']} test photographs (bits/dim)"]
    if "bits_per_dim_flow" in values:
        lines.append(
            f"  {values['bits_per_dim_flow']:6.3f}  under the learned prior, by the ELBO; "
            f"rate {values['rate_flow']:.1f} nats a picture"
        )
    return [
        *lines,
        f"  {values['bits_per_dim']:6.3f}  under {prior}, by the ELBO; rate "
        f"{values['rate']:.1f} nats, squared error {values['squared_error']:.2f}",
        f"  {values['bits_per_dim_iw']:6.3f}  under {prior}, importance-weighted, "
        f"{settings['k']} samples of q(z|x)",
        f"  {values['bits_per_dim_monte_carlo']:6.3f}  under {prior}, by equation (1) of "
        f"the paper, {settings['monte_carlo']:,} samples of z,",
        f"          of which {values['monte_carlo_samples']:.1f} count for a picture",
    ]


NOTES = """
Frechet: distance to the test photographs (of these: of one half to the other), in the
  features of judges {judges}, at infinitely many pictures, ± over judges. It is not FID.
Fine, finest: detail, as the power of waves that fit 8 to 12 and 12 to 16 times into a
  picture, in percent of the test photographs'. Blur lacks it.
Alike: correlation of the upper parts of two pictures, median. 1: all are one stamp.
Copies: pictures as near to a training photograph, in the judges' features, as the nearest
  {near:.0%} of the test photographs are.
Called: what the judges call them, who are right about {accuracy:.0%} of the photographs.
Below the photographs: what measures make of some that were spoiled on purpose."""


WIDTHS = (18, 8, 7, 8, 8, 8, 8)  # of the table's first columns; 14 of all others


def row_line(cells: list[str]) -> str:
    """Return a row of the table."""
    texts = [cells[0].ljust(WIDTHS[0])]
    for i, cell in enumerate(cells[1:], 1):
        texts.append(cell.rjust(WIDTHS[i] if i < len(WIDTHS) else 14))
    return "".join(texts)


def set_line(name: str, figures: dict) -> str:
    """Return the row of the table for a set of pictures."""
    distance = deviation = ""
    if "frechet" in figures:
        distance = f"{figures['frechet']['mean']:.2f}"
        deviation = f"± {figures['frechet']['deviation']:.2f}"
    cells = [name, distance, deviation, *(f"{share:.0%}" for share in figures["power"])]
    cells += [f"{figures['correlation']:.2f}", f"{figures['copies']:.1%}"]
    return row_line(cells + [f"{share:.0%}" for share in figures["called"].values()])


def table(figures: dict) -> str:
    """Return the report's figures as text."""
    settings = figures["settings"]
    called = [f"called {name}" for name in settings["classes"]]
    heads = ["", "Frechet", "", "fine", "finest", "alike", "copies"]
    lines = [*likelihood_lines(figures), "", row_line(heads + called)]
    lines += [set_line(name, values) for name, values in figures["sets"].items()]
    lines.append(
        NOTES.format(
            judges=", ".join(map(str, settings["frechet"]["judges"])),
            near=settings["copies"]["quantile"],
            accuracy=settings["judges_accuracy"],
        )
    )
    if settings["data"] in sampling.SYNTHETIC_NAMES:
        lines.append("The judges learned from photographs: they know synthetic pictures less well.")
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
    about = sampler.about | {"mode": "classes in turn", "seed": config.seed}
    for i, image in enumerate(draw_classes(sampler, n, config.seed)):
        plots.save(plots.sheet(image[None], 1, 1, 0), folder / f"{i:05}.png", about)
    return f"{n} pictures of {', '.join(sampler.classes)} in turn in {folder}"


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
    figures = report(sampler, data, make_reference(data), config)
    print(json.dumps(figures, indent=2) if config.json else table(figures))


if __name__ == "__main__":
    cli.run(main)
