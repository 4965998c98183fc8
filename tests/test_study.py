import json
import math

import options
import drawn
import recipe
import study

import pytest
import torch
from conftest import ROOT


def test_a_study_goes_on(batches, tmp_path, monkeypatch, complaint):
    """Finished runs are not made again, a new row is, and the table holds the mean over the runs of each."""
    rows = {"one": "--arch mlp --latent 4 --epochs 1", "two": "--arch mlp --latent 4 --epochs 1 --flow 1"}
    monkeypatch.setattr(study, "ROWS", {"one": rows["one"]})
    out = tmp_path / "docs" / "study"
    argv = [str(a) for a in ("--data", batches, "--runs", tmp_path / "runs", "--out", out, "--n", 200)]
    study.main([*argv, "--seeds", "1"])
    first, sheet = out.with_suffix(".jsonl").read_text(), (out / "one.png").read_bytes()
    monkeypatch.setattr(study, "ROWS", rows)
    monkeypatch.setattr(study, "picture", lambda found, path: path.write_text(""))
    study.main([*argv, "--seeds", "1"])
    study.main([*argv, "--seeds", "2", "--rows", "two"])
    assert (out / "one.png").read_bytes() == sheet
    text = out.with_suffix(".jsonl").read_text()
    assert text.startswith(first)
    lines = [json.loads(line) for line in text.splitlines()]
    wanted = [f"{rows['one']} --seed 0", *(f"{rows['two']} --seed {seed}" for seed in (0, 1))]
    assert [line["command"] for line in lines] == wanted
    table = out.with_suffix(".md").read_text()
    bits = torch.tensor([line["figures"]["bits_per_dim_elbo"] for line in lines[1:]])
    assert f"| two | 1 | 2 | {bits.mean():.3f} ± {bits.std():.3f} |" in table
    assert f"`train.py {rows['two']}`" in table
    out.with_suffix(".md").unlink()
    study.main([*argv, "--rows", "none"])
    assert out.with_suffix(".md").read_text() == table
    drawn.write(tmp_path / "other", train=25, test=10)
    assert f"got other, but {out}.jsonl is of {batches.name}" in complaint(
        study.main, "--data", tmp_path / "other", "--out", out, "--seeds", 2)
    assert "got three, wanted names out of one, two" in complaint(study.main, *argv, "--rows", "three")


def test_a_cell():
    runs = [{"a": {"b": value}} for value in (0.1, 0.2, 0.6)]
    assert study.cell(runs, "a b", "{:.1%}") == f"30.0% ± {100 * math.sqrt(0.07):.1f}%"
    assert study.cell(runs[:1], "a b", "{:.2f}") == "0.10"
    with pytest.raises(KeyError):
        study.cell(runs, "a c", "{:.2f}")


def test_the_papers_recipe_is_the_same_wherever_it_stands():
    """In the Makefile, here, and what --arch mlp takes by default."""
    assert study.PAPER in " ".join((ROOT / "Makefile").read_text().replace("\\\n", " ").split())
    paper, _ = options.parse(recipe.Options, study.PAPER.split(), "")
    assert recipe.resolve(paper) == recipe.resolve(recipe.Options(arch="mlp"))
