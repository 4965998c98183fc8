"""Train the paper's model and others that exchange a piece of it, and compare them.

    python -m pegasus.study                        # all that docs/study.jsonl lacks
    python -m pegasus.study --rows paper,gaussian  # only these
    python -m pegasus.study --rows none            # only the table, from what is there

It writes docs/study.jsonl, and the table in docs/study.md. A run that was cut off goes on
in runs/study. A new row is one more line in ROWS.
"""
import json
import signal
import statistics
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from pegasus import cli, evaluate
from pegasus.cli import UserError, option
from pegasus.data import datasets
from pegasus.data.datasets import Dataset
from pegasus.evaluate import EvaluateConfig, Reference
from pegasus.files import replace_file

import torch

TRAIN = Path(__file__).parents[1] / "train.py"
PAPER = (
    "--arch mlp --likelihood mse --latent 128 --schedule constant --lr 1e-3 "
    "--batch-size 128 --beta 1 --no-flip"
)
GAUSSIAN = (
    "--arch mlp --center --likelihood gaussian --schedule onecycle --lr 2e-3 --flip "
    "--epochs 60"
)
ROWS = {  # options of train.py
    "paper": f"{PAPER} --no-center --epochs 300",
    "centered": f"{PAPER} --center --epochs 300",
    "gaussian": GAUSSIAN,
    "conditional": f"{GAUSSIAN} --prior conditional",
    "conditional-1": f"{GAUSSIAN} --prior conditional --components 1",
    "flow-1": f"{GAUSSIAN} --flow 1",
    "flow-4": f"{GAUSSIAN} --flow 4",
    "flow-16": f"{GAUSSIAN} --flow 16",
}
COLUMNS = {  # heading: (keys of the figure, format)
    "bits/dim": ("likelihood bits_per_dim", "{:.3f}"),
    "IW": ("likelihood bits_per_dim_importance_weighted", "{:.3f}"),
    "rate": ("likelihood rate", "{:.1f}"),
    "squared error": ("likelihood squared_error", "{:.2f}"),
    "Fréchet": ("sets prior frechet mean", "{:.2f}"),
    "over judges": ("sets prior frechet deviation", "{:.2f}"),
    "rebuilt": ("sets rebuilt frechet mean", "{:.2f}"),
    "fine detail": ("sets prior power 0", "{:.1%}"),
}
BEGIN = "<!-- the table: python -m pegasus.study -->\n"
END = "<!-- end of the table -->\n"


@dataclass(frozen=True)
class StudyConfig:
    rows: str = option("all", "names of rows, separated by commas, or all, or none")
    seeds: int = option(3, "runs of each", least=1)
    data: str = option("auto", "as for train.py")
    runs: str = option("runs/study", "folder of the runs")
    out: str = option("docs/study", "the figures, .jsonl, and the page with the table, .md")


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


def run(
    name: str, seed: int, config: StudyConfig, data: Dataset, reference: Reference
) -> dict[str, object]:
    """Train or resume one run of a row to its end, and measure it.

    Returns its line of the figures' file. Raises UserError.
    """
    command = command_of(name, seed)
    folder = Path(config.runs) / f"{name}-{seed}"
    train([*command.split(), "--data", config.data], folder)
    sampler = evaluate.load_sampler(folder / "last.pt")
    figures = evaluate.report(sampler, data, reference, EvaluateConfig())
    return {"name": name, "command": command, "figures": figures}


def figure(run: dict, keys: str) -> float:
    """Return the figure at a path of keys, and of numbers where there is a list."""
    value = run
    for key in keys.split():
        value = value[int(key) if isinstance(value, list) else key]
    return value


def cell(runs: list[dict], keys: str, form: str) -> str:
    """Return mean and standard deviation over runs of the figure at a path of keys."""
    values = [figure(run, keys) for run in runs]
    mean = form.format(statistics.mean(values))
    if len(values) == 1:
        return mean
    return f"{mean} ± {form.format(statistics.stdev(values))}"


def figures_of(lines: list[dict], name: str) -> list[dict]:
    """Return the figures of a row's runs, with the options that it has today."""
    command = f"{ROWS[name]} --seed"
    return [line["figures"] for line in lines if line["command"].startswith(command)]


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


def write_page(lines: list[dict], path: Path) -> None:
    """Put the table into a page, between its two marks. Raises UserError."""
    page = path.read_text("utf-8") if path.exists() else f"{BEGIN}{END}"
    if BEGIN not in page or END not in page:
        raise UserError(f"{path}: lacks the lines {BEGIN.strip()} and {END.strip()}")
    before, _ = page.split(BEGIN, 1)
    _, after = page.split(END, 1)
    with replace_file(path) as temporary:
        temporary.write_text(f"{before}{BEGIN}{table(lines)}{END}{after}", "utf-8")


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


def missing_runs(names: list[str], seeds: int, lines: list[dict]) -> list[tuple[str, int]]:
    """Return name and seed of the runs that the figures lack, those of seed 0 first."""
    done = {line["command"] for line in lines}
    wanted = [(name, seed) for seed in range(seeds) for name in names]
    return [(name, seed) for name, seed in wanted if command_of(name, seed) not in done]


def check_data(config: StudyConfig, lines: list[dict], data: Dataset) -> None:
    """Raise UserError where earlier figures are of other data."""
    for line in lines:
        earlier = line["figures"]["settings"]["data"]
        if data.name != earlier:
            raise UserError(
                f"--data: got {data.name}, but {config.out}.jsonl is of {earlier}; "
                "give that, or another --out"
            )


def make(
    missing: list[tuple[str, int]], config: StudyConfig, lines: list[dict], path: Path
) -> None:
    """Make the runs that are missing; add each to the lines and to their file."""
    data = datasets.load(config.data, "horse,bird")
    check_data(config, lines, data)
    reference = evaluate.make_reference(data)
    for name, seed in missing:
        lines.append(run(name, seed, config, data, reference))
        with replace_file(path) as temporary:
            temporary.write_text("".join(json.dumps(line) + "\n" for line in lines))
        write_page(lines, Path(f"{config.out}.md"))


def main(argv: list[str] | None = None) -> None:
    config, _ = cli.parse(StudyConfig, argv, __doc__)
    torch.set_flush_denormal(True)
    names = row_names(config.rows)
    path = Path(f"{config.out}.jsonl")
    lines = []
    if path.exists():
        lines = [json.loads(line) for line in path.read_text().splitlines()]
    missing = missing_runs(names, config.seeds, lines)
    if missing:
        path.parent.mkdir(parents=True, exist_ok=True)
        make(missing, config, lines, path)
    if lines:
        write_page(lines, Path(f"{config.out}.md"))


if __name__ == "__main__":
    cli.run(main)
