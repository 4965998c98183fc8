"""Report a run as the paper reports its own: losses, the batch, the best of it, P(x).

    python -m pegasus.paper runs/paper    # the end of `make paper`

Writes best.png to the run's folder, beside curves.png and samples.png.
"""
from dataclasses import dataclass
from pathlib import Path

from pegasus import checkpoint, cli, evaluate, likelihoods
from pegasus.cli import UserError, option
from pegasus.data import datasets
from pegasus.drawing import plots
from pegasus.drawing import sampler as sampling
from pegasus.drawing.sampler import SampleConfig, Sampler
from pegasus.evaluate import EvaluateConfig
from pegasus.models.classifier import CHOOSING

import torch

SCALE = 16  # of best.png


@dataclass(frozen=True)
class PaperConfig:
    run: str = option("", "folder of a finished run", positional=True)
    data: str = option(
        "auto", "the data it was trained on, as for train.py; auto is the folder used then"
    )


def draw_best(sampler: Sampler, folder: Path) -> None:
    """Save the picture of samples.png that a judge prefers, enlarged, as best.png."""
    config = SampleConfig(mode="prior", best=1)
    best = f"of {config.n} by judge {CHOOSING}"
    about = sampler.about | {"mode": "prior", "seed": 0, "best": best}
    image = sampling.sample(sampler, config)
    plots.save(sampling.page(image, about, 1, SCALE), folder / "best.png", about)


def describe_losses(history: list[dict]) -> list[str]:
    """Describe a run's losses, and how much that of the test set jumps about."""
    test = [row["test_loss"] for row in history]
    lowest = min(test)
    late = test[-max(1, len(test) // 3) :]
    return [
        f"loss         train {history[-1]['train_loss']:.2f}, test {test[-1]:.2f}; the "
        f"lowest test loss is {lowest:.2f}, in epoch {1 + test.index(lowest)}",
        f"             in the last third of the epochs it is {min(late):.2f} to "
        f"{max(late):.2f}",
    ]


def read_history(path: Path) -> list[dict]:
    """Return the rows of the log of a finished run. Raises UserError for another one."""
    state = checkpoint.load(path)
    with checkpoint.explain_mismatch(path):
        finished = state["epochs_done"] == state["config"]["epochs"]
        if state["prior"] is not None or not finished:
            raise UserError(
                f"{path}: not a finished run of the paper's kind, without a learned prior; "
                "`make paper` makes one"
            )
        return state["history"]


def main(argv: list[str] | None = None) -> None:
    config, _ = cli.parse(PaperConfig, argv, __doc__)
    folder = Path(config.run)
    torch.set_flush_denormal(True)
    history = read_history(folder / "last.pt")
    sampler = evaluate.load_sampler(folder / "last.pt")
    size = sampler.model.image_shape[1]
    data = datasets.load(config.data, ",".join(sampler.classes), sampler.data, size)
    draw_best(sampler, folder)
    figures = evaluate.measure_likelihoods(sampler, data, EvaluateConfig())
    lines = [
        f"\nThe paper's results in {folder}: {', '.join(data.classes)} from {data.name}, "
        f"{sampler.about['epochs']} epochs",
        *describe_losses(history),
        "curves.png   losses against epochs: the paper's figures 2 and 3",
        "samples.png  the batch: 64 pictures of z ~ N(0, I), none chosen",
        f"best.png     the best of the batch, as judge {CHOOSING} says",
        "P(x)",
        *likelihoods.describe(figures),
    ]
    print("\n".join(lines))


if __name__ == "__main__":
    cli.run(main)
