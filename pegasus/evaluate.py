"""Measure a checkpoint: how probable it finds photographs, how its pictures compare.

    python -m pegasus.evaluate runs/pegasus/last.pt                        # a table
    python -m pegasus.evaluate runs/pegasus/last.pt --json
    python -m pegasus.evaluate runs/pegasus/last.pt --export 2000 folder

--json has the settings beside the figures; --export writes PNGs for other people's
measures. Three judges report (pegasus/models/classifier.py) that never chose
anything. Photographs spoiled on purpose show what each measure is worth.
"""
import argparse
import functools
import json
import math
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import reparam
import vae
from pegasus import cli, likelihoods, measures, streams
from pegasus.cli import UserError, option
from pegasus.data import cifar10, datasets
from pegasus.data.datasets import Dataset
from pegasus.drawing import plots
from pegasus.drawing import sampler as sampling
from pegasus.drawing.sampler import SampleConfig, Sampler
from pegasus.models import classifier, composites
from pegasus.models.classifier import Classifier
from pegasus.models.labels import PEGASUS
from pegasus.training.accelerate import accelerate

import torch
from torch import Tensor

SAMPLES = 1  # purpose of the seeds derived from the one asked for
NEAR = 0.05  # share of test photographs that count as near to a training photograph
COPIED = 10  # of so many photographs one is a copy, in the set that shows copies


@dataclass(frozen=True)
class EvaluateConfig:
    checkpoint: str = option(
        "", "a checkpoint, as `make train` writes to runs/", positional=True
    )
    data: str = option(
        "auto",
        "the data to compare with, as for train.py; auto is the folder it was trained on",
    )
    n: int = option(
        2000,
        "pictures to draw of all classes together, and as many of the prior",
        least=500,
        most=65_536,
    )
    guidance: float = option(
        sampling.DEFAULTS.guidance,
        "guidance of the rows that have one, with a learned prior",
        least=0.0,
        most=100.0,
    )
    images: int = option(500, "test photographs for bits/dim", least=1)
    k: int = option(32, "posterior samples for each of them", least=1)
    monte_carlo: int = option(
        10_000,
        "samples of the autoencoder's prior for equation (1) of the paper",
        least=2,
        most=100_000,
    )
    seed: int = option(0, "decides everything sampled")
    threads: int = option(
        0, "CPU threads; 0 is torch's default, one a core", least=0, most=1024
    )
    json: bool = option(False, "print JSON")
    export: list[str] | None = option(
        None,
        "only write N PNGs, of the classes in turn without guidance, to an empty folder",
        nargs=2,
        metavar=("N", "DIR"),
    )


# ---- sets of pictures ----


class ImageSet(NamedTuple):
    """Pictures to compare with photographs."""
    images: Tensor  # (n, 3, h, w) in [0, 1]
    label: int | None = None  # of the photographs to compare with; None: all classes


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


def add_copies(test: Tensor, training: Tensor, classes: int) -> Tensor:
    """Return photographs of which one in COPIED is a training photograph, moved by a pixel.

    Both are of the classes in turn, and so is the result.
    """
    turns = torch.arange(len(test)) // classes
    (rows,) = torch.where(turns % COPIED == 0)
    rows = rows[: len(training)]
    mixed = test.clone()
    mixed[rows] = training[: len(rows)].roll(1, 3)
    return mixed


def add_lines(images: Tensor) -> Tensor:
    """Return images under two white lines that lean as wings might."""
    images = images.clone()
    for row in range(2, 16):
        rise = (16 - row) // 2
        for column in (14 - rise, 15 - rise, 17 + rise, 18 + rise):
            images[:, :, row, column] = 1
    return images


def draw(sampler: Sampler, mode: str, n: int, seed: int, guidance: float = 1.0) -> Tensor:
    """Draw n images of a mode. Each mode has its own noise."""
    number = sampling.modes(sampler).index(mode)
    own_seed = reparam.derive_seed(seed, number, SAMPLES)
    config = SampleConfig(mode=mode, n=n, seed=own_seed, guidance=guidance)
    return sampling.sample(sampler, config)


def draw_classes(sampler: Sampler, n: int, seed: int) -> Tensor:
    """Draw n images, of each class in turn, without guidance."""
    count = math.ceil(n / len(sampler.classes))
    sets = [draw(sampler, name, count, seed) for name in sampler.classes]
    return interleave(sets, n)


@torch.no_grad()
def rebuild(model: vae.VAE, images: Tensor) -> Tensor:
    """Encode images (n, 3, h, w) and decode their posterior means."""
    return torch.cat([model.reconstruct(x) for x in images.split(100)])


def drawn_sets(sampler: Sampler, config: EvaluateConfig) -> dict[str, ImageSet]:
    """Return what the model draws, by the name of the table's row."""
    n = config.n
    guidance = config.guidance
    count = math.ceil(n / len(sampler.classes))
    sets = {}
    if PEGASUS in sampling.modes(sampler):
        images = draw(sampler, PEGASUS, count, config.seed, guidance)
        sets[PEGASUS] = ImageSet(images, 0)
    for label, name in enumerate(sampler.classes):
        images = draw(sampler, name, count, config.seed, guidance)
        sets[name] = ImageSet(images, label)
    guided = interleave([sets[name].images for name in sampler.classes], n)
    sets["prior"] = ImageSet(draw(sampler, "prior", n, config.seed))
    if sampler.prior is None:
        return sets | {"all classes": ImageSet(guided)}
    unguided = draw_classes(sampler, n, config.seed)
    return sets | {"all classes": ImageSet(unguided), "all, guided": ImageSet(guided)}


# ---- what the judges say of them ----


class Judgement(NamedTuple):
    """What one judge says of n images."""
    probabilities: Tensor  # of CIFAR-10's classes, (n, 10)
    features: Tensor  # (n, 112)


@functools.cache
def judges() -> list[Classifier]:
    """Return the judges that report, accelerated."""
    networks = [classifier.load(seed) for seed in classifier.REPORTING]
    for network in networks:
        accelerate(network)
    return networks


def judge(images: Tensor) -> list[Judgement]:
    """Show images to each judge that reports."""
    return [Judgement(*classifier.classify(network, images)) for network in judges()]


@dataclass(frozen=True)
class Reference:
    """Photographs to compare with, and what judges say of them: the same for all models."""
    images: Tensor  # test photographs, of the classes in turn, (n, 3, h, w) in [0, 1]
    labels: Tensor  # of these, (n,)
    judgements: list[Judgement]
    training: list[Tensor]  # each judge's features of the training photographs
    near: list[float]  # each judge's distance to them, within which NEAR of `images` are
    accuracy: dict[str, float]  # share of each class's `images` that judges know
    spoiled: dict[str, tuple[ImageSet, list[Judgement]]]  # by the name of the table's row

    def rows(self, label: int | None) -> Tensor:
        """Return the rows of a class's photographs, or of all."""
        if label is None:
            return torch.arange(len(self.images))
        return torch.where(self.labels == label)[0]


def called_shares(
    judgements: list[Judgement], classes: tuple[str, ...], labels: Tensor | None = None
) -> dict[str, float]:
    """Return the share of images that judges assign to each class that they know.

    With labels, positions in `classes`, (n,): of each class's own images alone.
    """
    winners = torch.stack([said.probabilities.argmax(1) for said in judgements])
    shares = {}
    for label, name in enumerate(classes):
        if classifier.knows(name):
            calls = winners if labels is None else winners[:, labels == label]
            assigned = calls == cifar10.CLASSES.index(name)
            shares[name] = assigned.double().mean().item()
    return shares


def make_reference(data: Dataset) -> Reference:
    """Judge a data set's photographs. Raises UserError where there are too few."""
    count = len(data.test_images)
    images = vae.from_bytes(balanced_subset(data.test_images, data.test_labels, count))
    labels = balanced_subset(data.test_labels, data.test_labels, count)
    if len(images) < max(8, 2 * len(data.classes)) or len(data.images) < 2:
        raise UserError(
            f"{data.folder}: {len(images)} test pictures, as many of each of "
            f"{', '.join(data.classes)}; the Frechet distance needs eight; use other data"
        )
    streams.show("judges look at photographs")
    judgements = judge(images)
    training = [said.features for said in judge(data.images)]
    near = []
    for said, features in zip(judgements, training, strict=True):
        distances = measures.nearest_distances(said.features, features)
        near.append(distances.quantile(NEAR).item())
    copies = balanced_subset(data.images, data.labels, len(images))
    sets = {
        "10% copies": ImageSet(add_copies(images, vae.from_bytes(copies), len(data.classes))),
        "two lines": ImageSet(add_lines(vae.resize(images[labels == 0], 32)), 0),
    }
    return Reference(
        images=images,
        labels=labels,
        judgements=judgements,
        training=training,
        near=near,
        accuracy=called_shares(judgements, data.classes, labels),
        spoiled={name: (some, judge(some.images)) for name, some in sets.items()},
    )


# ---- what has wings ----


class Detector(NamedTuple):
    """Tells pictures with wings from others by what the judges see."""
    weights: Tensor
    found: float  # share of composites of test photographs that it takes for winged
    mistaken: float  # and of their bodies without wings

    def share(self, judgements: list[Judgement]) -> float:
        return measures.detected(self.weights, all_features(judgements))


def all_features(judgements: list[Judgement]) -> Tensor:
    """Return what all judges see in n images, (n, 336)."""
    return torch.cat([said.features for said in judgements], 1)


def features_of_composites(
    model: vae.VAE, images: Tensor, positions: Tensor, classes: tuple[str, ...]
) -> list[Tensor]:
    """Return what judges see in composites, rebuilt by a model: with wings, and without."""
    chooser = classifier.load(classifier.CHOOSING)
    accelerate(chooser)
    made = composites.make(images, positions, classes, chooser)
    step = len(made.images) // 800 + 1
    views = []
    for pictures in (made.images[::step], made.bodies[::step]):
        rebuilt = rebuild(model, vae.from_bytes(pictures))
        views.append(all_features(judge(rebuilt)))
    return views


def make_detector(sampler: Sampler, data: Dataset) -> Detector | None:
    """Return a detector of wings, from training photographs, where Pegasi are a class."""
    if not sampler.has_pegasi:
        return None
    streams.show("judges look at composites")
    training = (data.images, data.labels, data.classes)
    weights = measures.detector(*features_of_composites(sampler.model, *training))
    test = (data.test_images, data.test_labels, data.classes)
    views = features_of_composites(sampler.model, *test)
    return Detector(weights, *(measures.detected(weights, view) for view in views))


# ---- figures of a set ----


def spread(values: list[float]) -> dict[str, float]:
    """Return mean and standard deviation over judges."""
    return {"mean": statistics.mean(values), "deviation": statistics.stdev(values)}


def frechet_figures(
    reference: Reference, judgements: list[Judgement], label: int | None
) -> dict[str, float]:
    """Return a set's Frechet distance to the photographs of its classes."""
    rows = reference.rows(label)
    pairs = zip(judgements, reference.judgements, strict=True)
    distance = measures.frechet_at_infinity
    return spread([distance(drawn.features, of.features[rows]) for drawn, of in pairs])


def halves_figures(reference: Reference) -> dict[str, float]:
    """Return the Frechet distance between the two halves of the photographs."""
    half = len(reference.images) // 2
    features = [judgement.features for judgement in reference.judgements]
    distance = measures.frechet_at_infinity
    return spread([distance(f[:half], f[half : 2 * half]) for f in features])


def near_share(reference: Reference, judgements: list[Judgement]) -> float:
    """Return the share of images nearer to a training photograph than `near`."""
    shares = []
    views = zip(judgements, reference.training, reference.near, strict=True)
    for said, training, near in views:
        distances = measures.nearest_distances(said.features, training)
        shares.append((distances < near).double().mean().item())
    return statistics.mean(shares)


def set_figures(
    image_set: ImageSet,
    judgements: list[Judgement],
    reference: Reference,
    classes: tuple[str, ...],
    detector: Detector | None,
) -> dict[str, object]:
    """Return the measures of a set of images, but for its Frechet distance."""
    images, label = image_set
    images = vae.resize(images, 32)
    compared = vae.resize(reference.images[reference.rows(label)], 32)
    photographs = measures.radial_power(compared)
    variety = measures.variety(images[:500])
    return {
        "n": len(images),
        "power": (measures.radial_power(images) / photographs).tolist(),
        "deviation": variety.deviation,
        "correlation": variety.correlation,
        "near": near_share(reference, judgements),
        "winged": detector.share(judgements) if detector else None,
        "called": called_shares(judgements, classes),
    }


def compare(
    sampler: Sampler,
    reference: Reference,
    detector: Detector | None,
    config: EvaluateConfig,
) -> dict[str, dict]:
    """Return the measures of each set of pictures, by the name of the table's row."""
    sets = {"rebuilt": ImageSet(rebuild(sampler.model, reference.images))}
    sets |= drawn_sets(sampler, config)
    judged = dict(reference.spoiled)
    for name, image_set in sets.items():
        streams.show(f"judges look at {name}")
        judged[name] = (image_set, judge(image_set.images))
    streams.show("")
    classes = sampler.classes
    photographs = ImageSet(reference.images)
    figures = set_figures(photographs, reference.judgements, reference, classes, detector)
    result = {"photographs": {"frechet": halves_figures(reference)} | figures}
    for name, (image_set, judgements) in judged.items():
        frechet = frechet_figures(reference, judgements, image_set.label)
        figures = set_figures(image_set, judgements, reference, classes, detector)
        result[name] = {"frechet": frechet} | figures
    return result


# ---- the report ----


def load_sampler(path: Path) -> Sampler:
    """Return the model in a checkpoint, accelerated. Raises UserError."""
    sampler = sampling.load(path)
    accelerate(sampler.model)
    if sampler.prior is not None:
        accelerate(sampler.prior)
    return sampler


def measure_likelihoods(
    sampler: Sampler, data: Dataset, config: EvaluateConfig
) -> dict[str, object]:
    """Return how probable the model finds test photographs, of the classes in turn."""
    images = balanced_subset(data.test_images, data.test_labels, config.images)
    return likelihoods.measure(sampler, images, config.k, config.monte_carlo, config.seed)


def report(
    sampler: Sampler, data: Dataset, reference: Reference, config: EvaluateConfig
) -> dict[str, dict]:
    """Return all figures, with the settings behind them."""
    detector = make_detector(sampler, data)
    settings = {
        "model": sampler.about,
        "data": data.name,
        "classes": list(data.classes),
        "size": data.images.shape[-1],
        "seed": config.seed,
        "torch": torch.__version__,
        "judges": list(classifier.REPORTING),
        "judges_accuracy": reference.accuracy,
        "test_photographs": len(reference.images),
        "training_photographs": len(data.images),
        "near": NEAR,
        "guidance": config.guidance,
        "detector": detector and {"found": detector.found, "mistaken": detector.mistaken},
    }
    return {
        "settings": settings,
        "likelihood": measure_likelihoods(sampler, data, config),
        "sets": compare(sampler, reference, detector, config),
    }


NOTES = """
Judges {judges}: classifiers of CIFAR-10's ten classes, which chose none of these pictures.
They know {accuracy} among the test photographs.
Rows
  photographs  {count} test photographs, of each class as many
  10% copies   a tenth of them replaced by training photographs, moved by a pixel
  two lines    those of {first} under two white lines, as a bad Pegasus
  rebuilt      photographs, encoded and decoded
  {drawn}  drawn as by sample.py --mode{guidance}
  all classes  drawn, of each class as many{unguided}
Columns
  Frechet  distance to the photographs of the same class or classes, 0 is best; that of the
           photographs is between their halves. In the judges' features, so it is not FID;
           for infinitely many pictures, by extrapolation, which can end below 0.
           ±: standard deviation over judges, nothing else. Pegasi are compared with
           {first}: wings alone make it large.
  fine     power of waves that fit 8 to 12 times into a picture, in percent of the
           photographs'; finest: 12 to 16 times. Less is blur, more noise or hard edges.
           Larger pictures are made smaller first, to 32 x 32, for all but bits/dim.
  alike    median correlation of two pictures' upper parts. 0: unrelated; 1: one stamp.
  near     share nearer to some training photograph than {far:.0%} of the test photographs
           are, in the judges' features. More than {near:.0%}: copies. Odd pictures: none.
{winged}  called   what the judges call them."""
WINGED = """  winged   share that a detector takes for winged. It learned from composites with and
           without wings; of test photographs' it takes {found:.0%} and {mistaken:.0%} for such.
"""


def set_cells(name: str, figures: dict) -> list[str]:
    """Return the cells of the table's row for a set of pictures."""
    frechet = figures["frechet"]
    return [
        name,
        f"{frechet['mean']:.2f}",
        f"± {frechet['deviation']:.2f}",
        *(f"{share:.0%}" for share in figures["power"]),
        f"{figures['correlation']:.2f}",
        f"{figures['near']:.1%}",
        *([] if figures["winged"] is None else [f"{figures['winged']:.0%}"]),
        *(f"{share:.0%}" for share in figures["called"].values()),
    ]


def align_cells(rows: list[list[str]]) -> list[str]:
    """Return rows of cells as lines, the first column to the left, the others right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        others = map(str.rjust, row[1:], widths[1:])
        lines.append("  ".join([row[0].ljust(widths[0]), *others]))
    return lines


def describe_table(figures: dict) -> str:
    """Explain the table's rows and columns."""
    settings = figures["settings"]
    classes = settings["classes"]
    guidance = unguided = ""
    if "all, guided" in figures["sets"]:
        guidance = f", classes with guidance that grows to {settings['guidance']:g} (1 is none)"
        unguided = ", without guidance; below: with it"
    modes = [name for name in figures["sets"] if name in (PEGASUS, *classes, "prior")]
    right = [f"{share:.0%} of {name}" for name, share in settings["judges_accuracy"].items()]
    return NOTES.format(
        judges=", ".join(map(str, settings["judges"])),
        accuracy=", ".join(right) or "no class",
        count=settings["test_photographs"],
        first=classes[0],
        drawn=", ".join(modes),
        guidance=guidance,
        unguided=unguided,
        winged=WINGED.format(**settings["detector"]) if settings["detector"] else "",
        near=settings["near"],
        far=1 - settings["near"],
    )


def table(figures: dict) -> str:
    """Return the report's figures as text."""
    settings = figures["settings"]
    model = ", ".join(f"{key} {value}" for key, value in settings["model"].items())
    heads = ["", "Frechet", "", "fine", "finest", "alike", "near"]
    heads += ["winged"] if settings["detector"] else []
    rows = [heads + [f"called {name}" for name in settings["judges_accuracy"]]]
    rows += [set_cells(name, values) for name, values in figures["sets"].items()]
    notes = describe_table(figures)
    if datasets.is_synthetic(settings["data"]):
        notes += "\nThe judges learned from photographs and know synthetic pictures less well."
    likelihood = likelihoods.describe(figures["likelihood"])
    return "\n".join([model, "", *likelihood, "", *align_cells(rows), notes])


def export(sampler: Sampler, config: EvaluateConfig) -> str:
    """Write N PNGs of the model's size; return a sentence about it. Raises UserError."""
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
    size = sampler.model.image_shape[1]
    names = ",".join(sampler.classes)
    data = datasets.load(config.data, names, sampler.data, size, must_match=False)
    figures = report(sampler, data, make_reference(data), config)
    print(json.dumps(figures, indent=2) if config.json else table(figures))


if __name__ == "__main__":
    cli.run(main)
