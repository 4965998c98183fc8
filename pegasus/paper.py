"""Report a run as the paper reports its own: losses, the batch, the best of it, P(x).

    python -m pegasus.paper runs/paper    # the end of `make paper`

Writes best.png to the run's folder, beside curves.png and samples.png.
"""
from dataclasses import dataclass
from pathlib import Path

from pegasus import checkpoint, cli, evaluate
from pegasus.cli import option
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
    """Save the most Pegasus-like picture of samples.png, enlarged, as best.png."""
    config = SampleConfig(mode="prior", best=1)
    about = sampler.about | {"mode": "prior", "seed": 0, "best": f"of {config.n}"}
    image = sampling.sample(sampler, config)
    plots.save(sampling.page(image, about, 1, SCALE), folder / "best.png", about)


def loss_line(history: list[dict]) -> str:
    """Describe a run's losses, and how much that of the test set jumps about."""
    test = [row["test_loss"] for row in history]
    lowest = min(test)
    late = test[-(len(test) // 3 + 1) :]
    return (
        f"loss         train {history[-1]['train_loss']:.2f}, test {test[-1]:.2f} nats a "
        f"picture; lowest test {lowest:.2f}, in epoch {1 + test.index(lowest)};\n"
        f"             in the last third of training test between {min(late):.2f} and "
        f"{max(late):.2f}"
    )


def main(argv: list[str] | None = None) -> None:
    config, _ = cli.parse(PaperConfig, argv, __doc__)
    folder = Path(config.run)
    torch.set_flush_denormal(True)
    history = checkpoint.load(folder / "last.pt")["history"]
    sampler = evaluate.load_sampler(folder / "last.pt")
    data = datasets.load(config.data, ",".join(sampler.classes), sampler.data)
    draw_best(sampler, folder)
    settings = EvaluateConfig()
    tested = evaluate.balanced_subset(data.test_images, data.test_labels, settings.images)
    figures = {
        "settings": evaluate.describe_settings(sampler, data, len(tested), settings),
        "likelihood": evaluate.likelihoods(sampler, tested, settings),
    }
    lines = [
        "",
        f"The paper's results in {folder}: {sampler.about['epochs']} epochs, "
        f"{', '.join(data.classes)} from {data.name}",
        loss_line(history),
        "curves.png   both against epochs: its figures 2 and 3",
        "samples.png  the batch: 64 pictures of z ~ N(0, I), none chosen",
        f"best.png     the most Pegasus-like of them, as judge {CHOOSING} says",
        *evaluate.likelihood_lines(figures),
    ]
    print("\n".join(lines))


if __name__ == "__main__":
    cli.run(main)
