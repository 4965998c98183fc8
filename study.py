"""Train the paper's model, and others that add or exchange a piece, and compare them by the same figures.

    python study.py                           # all that docs/study.jsonl lacks, then docs/study.md and pictures
    python study.py --rows paper,gaussian     # only these
    python study.py --rows none               # only the table, from what is there

A run that was cut off goes on in runs/study. A new row is one more line in ROWS.
"""
import functools
import json
import statistics
from dataclasses import dataclass
from pathlib import Path

import options
import checkpoint
import evaluate
import judge
import pictures
import recipe
import sample
import source
import train
from options import Fault, option

import torch

PAPER = "--arch mlp --likelihood mse --latent 128 --schedule constant --lr 1e-3 --batch-size 128 --beta 1 --no-flip"
MLP = "--arch mlp --schedule onecycle --lr 2e-3 --flip --epochs 60"
GAUSSIAN = f"{MLP} --likelihood gaussian"
ROWS = {"paper": f"{PAPER} --epochs 300",  # options of train.py
        "one-cycle": MLP,
        "gaussian": GAUSSIAN,
        "conditional": f"{GAUSSIAN} --prior conditional",
        "conditional-1": f"{GAUSSIAN} --prior conditional --components 1",
        "flow-1": f"{GAUSSIAN} --flow 1",
        "flow-4": f"{GAUSSIAN} --flow 4",
        "flow-16": f"{GAUSSIAN} --flow 16",
        "conv": "--prior normal --epochs 60",
        "conv-grid": "--prior normal --latent 8x8x8 --epochs 60",
        "learned": "--autoencoder-epochs 60 --epochs 300"}
MODES, BLENDS = ("horse", "bird", "pegasus", "prior"), (0.3, 0.5, 0.7)
COLUMNS = {"bits/dim": ("bits_per_dim_elbo", "{:.3f}"), "IW": ("bits_per_dim_iw", "{:.3f}"), "rate": ("rate", "{:.1f}"),
           "squared error": ("sse", "{:.2f}"), "Fréchet": ("frechet_of balanced", "{:.2f}"),
           "prior's": ("frechet_of prior", "{:.2f}"), "rebuilt": ("frechet_of reconstructions", "{:.2f}"),
           "floor": ("frechet_floor", "{:.2f}"), "horse": ("called horse horse", "{:.1%}"),
           "bird": ("called bird bird", "{:.1%}"), "Pegasus": ("pegasus_share pegasus", "{:.1%}"),
           "of horses": ("pegasus_share horse", "{:.1%}"), "of birds": ("pegasus_share bird", "{:.1%}"),
           "of the prior's": ("pegasus_share prior", "{:.1%}")}
BLENDED = {f"{name} {blend}": (f"blends {blend} {key}", "{:.1%}") for blend in BLENDS
           for name, key in (("horse", "called horse"), ("bird", "called bird"), ("Pegasus", "pegasus_share"))}
WORDS = """# Pieces

`python study.py` trains these, from {data}, and judges them. Figures are of one run, or of several the mean ±
standard deviation.
bits/dim: ELBO and importance-weighted (IW, K = {k}), of {images} test photographs, integrated over the bins of their
bytes, under N(0, I), which stays the autoencoder's prior where another is learned to draw, or under the conditional
one. Rate: nats. Fréchet distance in the features of judge {judge_seed}, not FID, to the test photographs: of {n} draws
from the class densities, of as many from the prior, of rebuilt test photographs; floor: of {n} training photographs.
Horse, bird: the share of that mode's draws that the judge gives that class. Pegasus: the share more Pegasus-like than
99 % of the test photographs, of pegasus, horse, bird and prior mode. The learned prior's Fréchet distance is without
guidance; its classes and Pegasi have guidance {guidance}, its Pegasi are composed, and by `--blend` they are sums of
velocities (`--no-composed`).
"""


@dataclass(frozen=True)
class Options:
    rows: str = option("all", "names of rows, separated by commas, or all, or none")
    seeds: int = option(3, "runs of each", least=1)
    data: str = option("auto", "as for train.py")
    runs: str = option("runs/study", "folder of the runs")
    out: str = option("docs/study", "folder of the pictures; beside it the table, .md, and the figures, .jsonl")
    n: int = option(1000, "pictures to draw in each mode; finished runs keep what they had", least=200)


def blends(found: sample.Trained, data: source.Pictures, classifier: judge.Judge, n: int) -> dict[str, dict]:
    """What the judge makes of n Pegasi for each share of the first class."""
    real = judge.pegasus_score(judge.classify(classifier, data.test_images)[0], data.classes)
    result = {}
    for blend in BLENDS:
        p = judge.classify(classifier, sample.draw(found, sample.Options(n=n, blend=blend, seed=1, composed=False)))[0]
        share = (judge.pegasus_score(p, data.classes) > real.quantile(0.99)).double().mean().item()
        result[str(blend)] = {"called": evaluate.called(p, data.classes), "pegasus_share": share}
    return result


def run(name: str, seed: int, chosen: Options) -> dict:
    """A line of the figures: one run of a row, trained or resumed to its end, and judged. Raises Fault."""
    words, folder = f"{ROWS[name]} --seed {seed}", Path(chosen.runs) / f"{name}-{seed}"
    parts = [] if "autoencoder" in words else ["--no-judge"]  # with the judge come the parts of Pegasi
    if train.main([*words.split(), "--data", chosen.data, "--run", str(folder), *parts, "--resume"]):
        raise Fault(f"{folder}: stopped; the same command goes on")
    state, found = checkpoint.load(folder / "last.pt"), sample.load(folder / "last.pt")
    data, settings = source.load(state["data"]["folder"], ",".join(found.classes)), evaluate.Options(n=chosen.n)
    evaluate.check(data)
    place = recipe.resolve(recipe.Options())
    judged = judge.get(Path(data.folder), settings.judge_seed, place.device, place.precision)
    if seed == 0:
        picture(found, Path(chosen.out) / f"{name}.png")
    figures = evaluate.report(found, data, judged, settings) | {
        "sse": [row["test_sse"] for row in state["history"] if "test_sse" in row][-1],
        "blends": blends(found, data, judge.from_state(judged), chosen.n)}
    figures["settings"]["data"] = data.name  # not where it lies on this machine
    return {"name": name, "command": words, "torch": torch.__version__, "figures": figures}


def picture(found: sample.Trained, path: Path) -> None:
    """A sheet of eight draws for each of MODES, a row each, none chosen."""
    draws = [sample.draw(found, sample.Options(mode=mode, n=8)) for mode in MODES]
    path.parent.mkdir(parents=True, exist_ok=True)
    about = found.about | {"mode": ", ".join(MODES), "seed": 0}
    pictures.save(sample.page(torch.cat(draws), about, 8, 2), path, about)


def cell(runs: list[dict], key: str, form: str) -> str:
    """Mean and standard deviation of a figure of some runs."""
    values = [functools.reduce(dict.__getitem__, key.split(), figures) for figures in runs]
    spread = f" ± {form.format(statistics.stdev(values))}" if len(values) > 1 else ""
    return form.format(statistics.mean(values)) + spread


def table(done: list[dict], columns: dict[str, tuple[str, str]]) -> str:
    """Markdown: a line for each row that has runs."""
    lines = [f"| | epochs | runs | {' | '.join(columns)} |", "|---|" + "---:|" * (len(columns) + 2)]
    for name in ROWS:
        runs = [line["figures"] for line in done if line["name"] == name]
        if runs:
            cells = " | ".join(cell(runs, *column) for column in columns.values())
            lines.append(f"| {name} | {runs[0]['settings']['model']['epochs']} | {len(runs)} | {cells} |")
    return "\n".join(lines) + "\n"


def write(done: list[dict], out: Path) -> None:
    """The table, the commands behind it, and the sheets."""
    settings = done[0]["figures"]["settings"]
    words = WORDS.format(**settings["bits_per_dim"] | settings["frechet"] | {
        "data": settings["data"], "guidance": evaluate.Options().guidance})
    names = [name for name in ROWS if any(line["name"] == name for line in done)]
    parts = [words, table(done, COLUMNS), "Pegasus mode by `--blend`, the horse's share:\n", table(done, BLENDED),
             "\n".join(f"- {name}: `train.py {ROWS[name]}`" for name in names) + "\n",
             f"Eight draws each, none chosen, of the run with seed 0; rows: {', '.join(MODES)}.\n",
             *(f"{name}\n\n![{name}]({out.name}/{name}.png)\n" for name in names)]
    with options.replacing(Path(f"{out}.md")) as beside:
        beside.write_text("\n".join(parts))


def main(argv: list[str] | None = None) -> None:
    chosen, _ = options.parse(Options, argv, __doc__)
    names = {"all": list(ROWS), "none": []}.get(chosen.rows, list(dict.fromkeys(chosen.rows.split(","))))
    if set(names) - set(ROWS):
        raise Fault(f"--rows: got {chosen.rows}, wanted names out of {', '.join(ROWS)}, or all, or none")
    out = Path(chosen.out)
    lines = Path(f"{out}.jsonl")
    done = [json.loads(line) for line in lines.read_text().splitlines()] if lines.exists() else []
    have = {line["command"] for line in done}
    missing = [(name, seed) for seed in range(chosen.seeds) for name in names
               if f"{ROWS[name]} --seed {seed}" not in have]
    known = done[0]["figures"]["settings"]["data"] if done else ""
    if missing and done and (got := source.load(chosen.data, "horse,bird").name) != known:
        raise Fault(f"--data: got {got}, but {lines} is of {known}; give that, or another --out")
    for name, seed in missing:
        done.append(run(name, seed, chosen))
        with options.replacing(lines) as beside:
            beside.write_text("".join(json.dumps(line) + "\n" for line in done))
        write(done, out)
    if done:
        write(done, out)


if __name__ == "__main__":
    options.run(main)
