import json
import math
import signal

import train
from pegasus import study
from pegasus.cli import UserError
from pegasus.data import synthetic
from pegasus.evaluate import EvaluateConfig

import pytest
import torch
from conftest import ROOT

ROWS = {
    "one": "--arch mlp --latent 4 --epochs 1",
    "two": "--arch mlp --latent 4 --epochs 1 --flow 1",
}


BITS = "likelihood bits_per_dim"


def quick_evaluation():
    return EvaluateConfig(n=500, images=10, k=2, monte_carlo=10)


def train_here(arguments, folder):
    """Train in this process, which is faster."""
    assert train.main([*arguments, "--run", str(folder), "--resume"]) == 0


def test_a_study_goes_on(batches, tmp_path, monkeypatch, complaint):
    """Finished runs are not made again, a new row is; the table has means over runs."""
    monkeypatch.setattr(study, "ROWS", {"one": ROWS["one"]})
    monkeypatch.setattr(study, "EvaluateConfig", quick_evaluation)
    out = tmp_path / "docs" / "study"
    lines_file = out.with_suffix(".jsonl")
    page_file = out.with_suffix(".md")
    arguments = ["--data", batches, "--runs", tmp_path / "runs", "--out", out]
    arguments = [str(argument) for argument in arguments]
    study.main([*arguments, "--seeds", "1"])
    first = lines_file.read_text()
    page_file.write_text(f"Before.\n{page_file.read_text()}After.\n")
    monkeypatch.setattr(study, "ROWS", ROWS)
    monkeypatch.setattr(study, "train", train_here)
    study.main([*arguments, "--seeds", "1"])
    study.main([*arguments, "--seeds", "2", "--rows", "two"])
    text = lines_file.read_text()
    assert text.startswith(first)
    lines = [json.loads(line) for line in text.splitlines()]
    wanted = [f"{ROWS['one']} --seed 0"]
    wanted += [f"{ROWS['two']} --seed {seed}" for seed in (0, 1)]
    assert [line["command"] for line in lines] == wanted
    page = page_file.read_text()
    bits = torch.tensor([study.figure(line["figures"], BITS) for line in lines[1:]])
    assert f"| two | 1 | 2 | {bits.mean():.3f} ± {bits.std():.3f} |" in page
    assert page.startswith("Before.\n")
    assert page.endswith("After.\n")
    page_file.write_text(page.replace("| two |", "| 2 |"))
    study.main([*arguments, "--rows", "none"])
    assert page_file.read_text() == page
    synthetic.write(tmp_path / "other", train=25, test=10)
    other = ["--data", tmp_path / "other", "--out", out, "--seeds", 2]
    said = complaint(study.main, *other)
    assert f"got other, but {out}.jsonl is of {batches.name}" in said
    said = complaint(study.main, *arguments, "--rows", "three")
    assert "got three, wanted names out of one, two" in said
    page_file.write_text("no marks")
    said = complaint(study.main, *arguments, "--rows", "none")
    assert "study.md: lacks the lines <!-- the table" in said


@pytest.fixture
def script(tmp_path, monkeypatch):
    """A stand-in for train.py, to be written."""
    monkeypatch.setattr(study, "TRAIN", tmp_path / "script.py")
    return study.TRAIN


def test_a_run_that_stops_is_told(script, tmp_path):
    script.write_text("import sys; sys.exit(2)")
    with pytest.raises(UserError, match="run: .* status 2; the same command goes on"):
        study.train([], tmp_path / "run")


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
def test_interrupted_it_waits_until_the_run_is_saved(script, tmp_path, name):
    """SIGTERM is passed on; SIGINT a terminal sends to both, here the script itself."""
    signum = getattr(signal, name)
    script.write_text(
        f"""
import os, pathlib, signal, sys, time

def save(signum, frame):
    time.sleep(1)
    pathlib.Path({str(tmp_path / "saved")!r}).touch()
    sys.exit(128 + signum)

signal.signal(signal.{name}, save)
os.kill(os.getppid(), signal.{name})
if signal.{name} == signal.SIGINT:
    os.kill(os.getpid(), signal.{name})
time.sleep(60)
"""
    )
    before = signal.getsignal(signal.SIGTERM)
    wanted = f"status {128 + signum}; the same command goes on"
    with pytest.raises(UserError, match=wanted):
        study.train([], tmp_path / "run")
    assert (tmp_path / "saved").exists()
    assert signal.getsignal(signal.SIGTERM) == before


def test_a_cell():
    runs = [{"a": {"b": [0, value]}} for value in (0.1, 0.2, 0.6)]
    spread = f"30.0% ± {100 * math.sqrt(0.07):.1f}%"
    assert study.cell(runs, "a b 1", "{:.1%}") == spread
    assert study.cell(runs[:1], "a b 1", "{:.2f}") == "0.10"
    with pytest.raises(KeyError):
        study.cell(runs, "a c", "{:.2f}")


def test_the_page_has_the_table_of_the_figures_that_are_there(tmp_path):
    figures = (ROOT / "docs" / "study.jsonl").read_text()
    page = (ROOT / "docs" / "study.md").read_text()
    (tmp_path / "study.jsonl").write_text(figures)
    (tmp_path / "study.md").write_text(page.replace("| paper |", "| other |"))
    study.main(["--rows", "none", "--out", str(tmp_path / "study")])
    assert (tmp_path / "study.md").read_text() == page
    assert all(f"| {name} |" in page for name in study.ROWS)


def test_the_papers_recipe_is_the_same_wherever_it_stands():
    """In the Makefile and here."""
    makefile = (ROOT / "Makefile").read_text().replace("\\\n", " ")
    recipe = f"{study.PAPER} --no-center"
    assert recipe in " ".join(makefile.split())
    assert study.ROWS["paper"].startswith(recipe)
