"""Tables and links of the documents, against what they are made of."""
import json
import re
import statistics
from collections.abc import Callable

from pegasus import cli, evaluate, study

import pytest
from conftest import ROOT

PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md"))]
LINES = [json.loads(line) for line in (ROOT / "docs/study.jsonl").read_text().splitlines()]
PEGASUS = json.loads((ROOT / "docs/pegasus.json").read_text())
PAPER = "`make paper EPOCHS=300`"
CENTERED = '`make paper EPOCHS=300 RUN=runs/centered ARGS="--center"`'
RUNS = {
    PAPER: study.figures_of(LINES, "paper"),
    CENTERED: study.figures_of(LINES, "centered"),
    "`pegasus.pt`": [PEGASUS],
}
TABLES = [("README.md", PAPER), ("README.md", "`pegasus.pt`")]
TABLES += [("docs/results.md", name) for name in RUNS]


def percent(value: float) -> str:
    return f"{100 * value:.0f} %"


def bits_per_dim(runs: list[dict]) -> str:
    """Return bits/dim under the prior that draws, mean and deviation over runs."""
    learned = "bits_per_dim_learned_prior" in runs[0]["likelihood"]
    key = "bits_per_dim_learned_prior" if learned else "bits_per_dim"
    return study.cell(runs, f"likelihood {key}", "{:.3f}")


def cells(runs: list[dict]) -> dict[str, str]:
    """Return what the columns of a table should say of a row's runs."""
    def mean(figure: Callable[[dict], float]) -> float:
        return statistics.mean(map(figure, runs))

    fine, finest = (
        percent(mean(lambda run, i=i: run["sets"]["all classes"]["power"][i])) for i in (0, 1)
    )
    distance, spread = (
        mean(lambda run, k=key: run["sets"]["all classes"]["frechet"][k])
        for key in ("mean", "deviation")
    )
    return {
        "runs": str(len(runs)),
        "bits/dim": bits_per_dim(runs),
        "squared error": f"{mean(lambda run: run['likelihood']['squared_error']):.1f}",
        "Fréchet": f"{distance:.2f} ± {spread:.2f}",
        "rebuilt": f"{mean(lambda run: run['sets']['rebuilt']['frechet']['mean']):.2f}",
        "fine, finest detail": f"{fine}, {finest}",
        "finest detail": finest,
        "near": f"{100 * mean(lambda run: run['sets']['all classes']['near']):.1f} %",
        "horse": percent(mean(lambda run: run["sets"]["horse"]["called"]["horse"])),
        "bird": percent(mean(lambda run: run["sets"]["bird"]["called"]["bird"])),
    }


def rows_of(page: str) -> list[dict[str, str]]:
    """Return the rows of the first table below the mark for results, by column."""
    text = (ROOT / page).read_text().split("<!-- table: results")[1]
    lines = re.search(r"\n((?:\|.*\n)+)", text)[1].splitlines()
    head, _, *rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return [dict(zip(head, row, strict=True)) for row in rows]


@pytest.mark.parametrize("page, name", TABLES)
def test_figures_are_those_of_the_runs(page, name):
    (row,) = [row for row in rows_of(page) if row[""].split(", ")[0] == name]
    for column, text in row.items():
        if column:
            wanted = cells(RUNS[name])[column.removeprefix("called ")]
            assert text in (wanted, wanted.split(" ±")[0]), (column, wanted)


def test_the_report_is_that_of_the_figures():
    report = "\n".join(evaluate.table(PEGASUS).splitlines()[2:])
    measures = report.split("\nJudges")[0].strip("\n")
    assert f"```\n{measures}\n```" in (ROOT / "docs/results.md").read_text()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    text = re.sub(r"`[^`]*`", "", page.read_text())  # code has brackets, too
    for link in re.findall(r"\]\(([^)]+)\)", text):
        path, _, part = link.partition("#")
        if path.startswith("https:"):
            continue
        target = page.parent / path if path else page
        assert target.exists(), link
        heads = re.findall(r"(?m)^#+ (.+)$", target.read_text()) if part else []
        assert not part or part in [head.lower().replace(" ", "-") for head in heads], link


def test_the_readme_says_which_versions_are_the_oldest():
    text = " ".join((ROOT / "README.md").read_text().split())
    for package, numbers in cli.OLDEST.items():
        name = {"PIL": "pillow"}.get(package, package)
        assert f"{name} {'.'.join(map(str, numbers))}" in text
    build = (ROOT / "pyproject.toml").read_text()
    assert "pybind11 3.0 or later" in text and "pybind11>=3.0" in build
