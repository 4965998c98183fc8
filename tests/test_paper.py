import train
from pegasus import checkpoint, paper
from pegasus.drawing import sampler
from pegasus.drawing.sampler import SampleConfig

import numpy
import pytest
import torch
from conftest import png
from PIL import Image


@pytest.fixture(scope="module")
def run(batches, tmp_path_factory):
    folder = tmp_path_factory.mktemp("paper") / "run"
    recipe = ["--arch", "mlp", "--no-center", "--epochs", "3"]
    train.main([*recipe, "--data", str(batches), "--run", str(folder)])
    return folder


def test_it_reports_what_the_paper_reports(run, capsys):
    paper.main([str(run)])
    said = capsys.readouterr().out
    for name in ("curves.png", "samples.png", "best.png"):
        assert f"\n{name} " in said
        assert (run / name).exists()
    assert "horse, bird from small, 3 epochs" in said
    assert "equation (1)" in said
    assert "importance-weighted" in said
    assert len(max(said.splitlines(), key=len)) <= 100


def test_the_best_is_one_of_the_batch_enlarged(run):
    paper.main([str(run)])
    size, about = png(run / "best.png")
    assert size == (32 * paper.SCALE + 8, 32 * paper.SCALE + 8)
    assert about["mode"] == "prior"
    corner = slice(4 + paper.SCALE // 2, None, paper.SCALE)
    with Image.open(run / "best.png") as image:
        pixels = torch.from_numpy(numpy.array(image))[corner, corner]
    batch = sampler.sample(sampler.load(run / "last.pt"), SampleConfig(mode="prior"))
    batch = (batch.permute(0, 2, 3, 1) * 255).round()
    assert (batch - pixels).abs().amax((1, 2, 3)).min() == 0


def test_losses_in_words():
    test = [9.0, 5.0, 4.0, 4.5, 4.2, 4.4]
    history = [{"test_loss": value, "train_loss": 3.0} for value in test]
    now, late = paper.describe_losses(history)
    assert "train 3.00, test 4.40" in now
    assert "lowest test loss is 4.00, in epoch 3" in now
    assert "4.20 to 4.40" in late


def test_without_a_run_it_says_so(tmp_path, complaint):
    assert "last.pt: no such file" in complaint(paper.main, tmp_path)


def test_another_kind_of_run_is_refused(run, tmp_path, complaint):
    state = checkpoint.load(run / "last.pt")
    state["config"]["epochs"] = 9
    checkpoint.save(tmp_path / "last.pt", state)
    assert "not a finished run of the paper's kind" in complaint(paper.main, tmp_path)
