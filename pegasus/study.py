"""Train the paper's model and others that add or exchange a piece, and compare them.

    python -m pegasus.study                        # all that docs/study.jsonl lacks
    python -m pegasus.study --rows paper,gaussian  # only these
    python -m pegasus.study --rows none            # only the table, from what is there

It writes docs/study.jsonl, docs/study.md and a sheet of samples of each row. A run that
was cut off goes on in runs/study. A new row is one more line in ROWS.
"""
import functools
import json
import signal
import statistics
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from pegasus import checkpoint, cli, evaluate
from pegasus.cli import UserError, option
from pegasus.data import datasets
from pegasus.drawing import plots
from pegasus.drawing import sampler as sampling
from pegasus.drawing.sampler import SampleConfig, Sampler
from pegasus.evaluate import EvaluateConfig
from pegasus.files import replace_file

import torch

TRAIN = Path(__file__).parents[1] / "train.py"
PAPER = (
    "--arch mlp --likelihood mse --latent 128 --schedule constant --lr 1e-3 "
    "--batch-size 128 --beta 1 --no-flip"
)
MLP = "--arch mlp --schedule onecycle --lr 2e-3 --flip --epochs 60"
GAUSSIAN = f"{MLP} --likelihood gaussian"
ROWS = {  # options of train.py
    "paper": f"{PAPER} --epochs 300",
    "one-cycle": MLP,
    "gaussian": GAUSSIAN,
    "conditional": f"{GAUSSIAN} --prior conditional",
    "conditional-1": f"{GAUSSIAN} --prior conditional --components 1",
    "flow-1": f"{GAUSSIAN} --flow 1",
    "flow-4": f"{GAUSSIAN} --flow 4",
    "flow-16": f"{GAUSSIAN} --flow 16",
    "conv": "--prior normal --epochs 60",
    "conv-grid": "--prior normal --latent 8x8x8 --epochs 60",
    "learned": "--autoencoder-epochs 60 --epochs 300",
}
MODES = ("horse", "bird", "pegasus", "prior")
COLUMNS = {  # heading: (keys of the figure, format)
    "bits/dim": ("bits_per_dim_elbo", "{:.3f}"),
    "IW": ("bits_per_dim_iw", "{:.3f}"),
    "rate": ("rate", "{:.1f}"),
    "squared error": ("sse", "{:.2f}"),
    "Fréchet": ("frechet_of balanced", "{:.2f}"),
    "prior's": ("frechet_of prior", "{:.2f}"),
    "rebuilt": ("frechet_of reconstructions", "{:.2f}"),
    "floor": ("frechet_floor", "{:.2f}"),
    "horse": ("called horse horse", "{:.1%}"),
    "bird": ("called bird bird", "{:.1%}"),
    "Pegasus": ("pegasus_share pegasus", "{:.1%}"),
    "of horses": ("pegasus_share horse", "{:.1%}"),
    "of birds": ("pegasus_share bird", "{:.1%}"),
    "of the prior's": ("pegasus_share prior", "{:.1%}"),
}
INTRODUCTION = """# Pieces

`python -m pegasus.study` trains these, from {data}, and measures them. Figures are of
one run, or of several the mean ± standard deviation.

- bits/dim: ELBO and importance-weighted (IW, K = {k}), of {images} test photographs,
  integrated over the bins of their bytes, under the conditional prior, otherwise under
  N(0, I), which stays the autoencoder's prior where another is learned to sample from.
- Rate: nats.
- Fréchet distance in the features of judge {judge_seed}, not FID, to the test
  photographs: of {n} samples of the classes, of as many of the prior, of rebuilt test
  photographs; floor: of {n} training photographs.
- Horse, bird: the share of that mode's samples that the judge gives that class.
- Pegasus: the share more Pegasus-like than 99 % of the test photographs, of pegasus,
  horse, bird and prior mode.
- The learned prior's Fréchet distance is without guidance; its classes have guidance
  {guidance}, its Pegasi are composed.
"""


@dataclass(frozen=True)
class StudyConfig:
    rows: str = option("all", "names of rows, separated by commas, or all, or none")
    seeds: int = option(3, "runs of each", least=1)
    data: str = option("auto", "as for train.py")
    runs: str = option("runs/study", "folder of the runs")
    out: str = option(
        "docs/study",
        "folder of the pictures; beside it the table, .md, and the figures, .jsonl",
    )
    n: int = option(
        1000,
        "images to sample in each mode; finished runs keep what they had",
        least=200,
    )


def command_of(name: str, seed: int) -> str:
    """Return the options of train.py for a run; finished runs are known by them."""
    return f"{ROWS[name]} --seed {seed}"


def train(arguments: list[str], folder: Path) -> None:
    """Run train.py to its end in a process of its own. Raises UserError if it stops."""
    command = [sys.executable, str(TRAIN), *arguments, "--run", str(folder), "--resume"]
    with subprocess.Popen(command) as process:
        # a signal makes it save before it ends: pass it on, and wait
        previous = signal.signal(signal.SIGTERM, lambda *_: process.terminate())
        try:
            status = process.wait()
        except KeyboardInterrupt:  # a terminal sends SIGINT to both
            status = process.wait()
        signal.signal(signal.SIGTERM, previous)
    if status:
        raise UserError(
            f"{folder}: train.py ended with status {status}; the same command goes on"
        )


def run(name: str, seed: int, config: StudyConfig) -> dict[str, object]:
    """Train or resume one run of a row to its end, and measure it.

    Returns its line of the figures' file. Raises UserError.
    """
    command = command_of(name, seed)
    folder = Path(config.runs) / f"{name}-{seed}"
    arguments = [*command.split(), "--data", config.data]
    if "autoencoder" not in command:
        arguments.append("--no-judge")  # only composed Pegasi need it
    train(arguments, folder)
    state = checkpoint.load(folder / "last.pt")
    sampler = evaluate.load_sampler(folder / "last.pt")
    data = datasets.load(state["data"]["folder"], ",".join(sampler.classes))
    settings = EvaluateConfig(n=config.n)
    judge = evaluate.get_classifier(data, settings.judge_seed)
    if seed == 0:
        picture(sampler, Path(config.out) / f"{name}.png")
    figures = evaluate.report(sampler, data, judge, settings)
    errors = [row["test_sse"] for row in state["history"] if "test_sse" in row]
    figures["sse"] = errors[-1]
    figures["settings"]["data"] = data.name  # not where it lies on this machine
    return {
        "name": name,
        "command": command,
        "torch": torch.__version__,
        "figures": figures,
    }


def picture(sampler: Sampler, path: Path) -> None:
    """Save a sheet of eight samples for each of MODES, a row each, none chosen."""
    rows = [sampling.sample(sampler, SampleConfig(mode=mode, n=8)) for mode in MODES]
    about = sampler.about | {"mode": ", ".join(MODES), "seed": 0}
    path.parent.mkdir(parents=True, exist_ok=True)
    plots.save(sampling.page(torch.cat(rows), about, 8, 2), path, about)


def cell(runs: list[dict], keys: str, form: str) -> str:
    """Return mean and standard deviation over runs of the figure at a path of keys."""
    values = [functools.reduce(dict.__getitem__, keys.split(), run) for run in runs]
    mean = form.format(statistics.mean(values))
    if len(values) == 1:
        return mean
    return f"{mean} ± {form.format(statistics.stdev(values))}"


def figures_of(lines: list[dict], name: str) -> list[dict]:
    """Return the figures of a row's runs."""
    return [line["figures"] for line in lines if line["name"] == name]


def table(lines: list[dict]) -> str:
    """Return a Markdown table with a line for each row that has runs."""
    rows = [f"| | epochs | runs | {' | '.join(COLUMNS)} |"]
    rows.append("|---|" + "---:|" * (len(COLUMNS) + 2))
    for name in ROWS:
        runs = figures_of(lines, name)
        if runs:
            cells = [name, runs[0]["settings"]["model"]["epochs"], str(len(runs))]
            cells += [cell(runs, keys, form) for keys, form in COLUMNS.values()]
            rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows) + "\n"


def write_page(lines: list[dict], out: Path) -> None:
    """Write the table, the commands behind it and the sheets to a Markdown file."""
    settings = lines[0]["figures"]["settings"]
    values = settings["bits_per_dim"] | settings["frechet"] | {"data": settings["data"]}
    names = [name for name in ROWS if figures_of(lines, name)]
    commands = [f"- {name}: `train.py {ROWS[name]}`" for name in names]
    parts = [
        INTRODUCTION.format(**values),
        table(lines),
        "\n".join(commands) + "\n",
        "Eight samples each, none chosen, of the run with seed 0; rows: "
        f"{', '.join(MODES)}.\n",
    ]
    parts += [f"{name}\n\n![{name}]({out.name}/{name}.png)\n" for name in names]
    with replace_file(Path(f"{out}.md")) as temporary:
        temporary.write_text("\n".join(parts))


def row_names(text: str) -> list[str]:
    """Return the names of rows that --rows asks for. Raises UserError."""
    if text == "all":
        return list(ROWS)
    if text == "none":
        return []
    names = list(dict.fromkeys(text.split(",")))
    if not set(names) <= set(ROWS):
        raise UserError(
            f"--rows: got {text}, wanted names out of {', '.join(ROWS)}, "
            "or all, or none"
        )
    return names


def missing_runs(
    names: list[str], seeds: int, lines: list[dict]
) -> list[tuple[str, int]]:
    """Return name and seed of the runs that the figures lack, those of seed 0 first."""
    done = {line["command"] for line in lines}
    wanted = [(name, seed) for seed in range(seeds) for name in names]
    return [(name, seed) for name, seed in wanted if command_of(name, seed) not in done]


def check_data(config: StudyConfig, lines: list[dict]) -> None:
    """Raise UserError where earlier figures are of other data."""
    earlier = lines[0]["figures"]["settings"]["data"]
    name = datasets.load(config.data, "horse,bird").name
    if name != earlier:
        raise UserError(
            f"--data: got {name}, but {config.out}.jsonl is of {earlier}; "
            "give that, or another --out"
        )


def main(argv: list[str] | None = None) -> None:
    config, _ = cli.parse(StudyConfig, argv, __doc__)
    names = row_names(config.rows)
    out = Path(config.out)
    path = Path(f"{out}.jsonl")
    lines = []
    if path.exists():
        lines = [json.loads(line) for line in path.read_text().splitlines()]
    missing = missing_runs(names, config.seeds, lines)
    if missing and lines:
        check_data(config, lines)
    for name, seed in missing:
        lines.append(run(name, seed, config))
        with replace_file(path) as temporary:
            temporary.write_text("".join(json.dumps(line) + "\n" for line in lines))
        write_page(lines, out)
    if lines:
        write_page(lines, out)


if __name__ == "__main__":
    cli.run(main)
