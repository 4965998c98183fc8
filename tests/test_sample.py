import os
import shutil
import subprocess
import sys

import sample
import train

import pytest
import torch
from conftest import ROOT, png


@pytest.fixture(scope="module")
def last(batches, tmp_path_factory):
    """A checkpoint whose data is gone."""
    folder = tmp_path_factory.mktemp("sample")
    shutil.copytree(batches, folder / "gone")
    train.main(["--data", str(folder / "gone"), "--run", str(folder / "run"), "--epochs", "1", "--arch", "mlp"])
    shutil.rmtree(folder / "gone")
    return folder / "run" / "last.pt"


def test_twice_the_same_bytes_from_the_checkpoint_alone(last, tmp_path):
    for name in ("a.png", "b.png"):
        done = subprocess.run([sys.executable, os.path.join(ROOT, "sample.py"), last, name], cwd=tmp_path, text=True,
                              capture_output=True, timeout=60)
        assert done.returncode == 0, done.stderr
        assert name in done.stdout
        assert "64 pictures" in done.stdout
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    assert png(tmp_path / "a.png")[0] == (8 * 132 + 4, 8 * 132 + 4)


@pytest.mark.parametrize("mode", sample.MODES)
def test_modes_and_what_their_pictures_say(last, tmp_path, mode):
    out = tmp_path / "out.png"
    sample.main([str(last), str(out), "--mode", mode, "--n", "6", "--columns", "3", "--scale", "1", "--seed", "5"])
    size, about = png(out)
    assert size == (3 * 36 + 4, 2 * 36 + 4)
    assert (about["mode"], about["seed"], about["data"]) == (mode, "5", "gone")
    assert len(about["model"]) == 16


def test_image_i_depends_on_seed_and_i_alone(last):
    found = sample.load(last)
    for mode in ("prior", "pegasus"):
        z = sample.latents(found, mode, 64, seed=1, temperature=1.0, columns=8)
        assert z[:4].equal(sample.latents(found, mode, 4, seed=1, temperature=1.0, columns=2))
        assert not z.equal(sample.latents(found, mode, 64, seed=2, temperature=1.0, columns=8))


def test_pegasus_is_between_the_class_means_and_morph_goes_from_one_to_the_other(last):
    found = sample.load(last)
    still = sample.latents(found, "pegasus", 2, 0, 0.0, 8)
    torch.testing.assert_close(still[0], found.means.mean(0))
    path = sample.latents(found, "morph", 12, 0, 0.0, 4)
    torch.testing.assert_close(path[[0, 4, 8]], found.means[:1].expand(3, -1))
    torch.testing.assert_close(path[[3, 7, 11]], found.means[1:].expand(3, -1))


def test_morph_keeps_its_ends_and_its_amount_of_noise(last):
    found = sample.load(last)
    path = sample.latents(found, "morph", 400, 0, 1.0, 8).view(50, 8, -1)
    assert path[:7].equal(sample.latents(found, "morph", 56, 0, 1.0, 8).view(7, 8, -1))
    along = torch.arange(8) / 7
    spread = (path - torch.lerp(*found.means, along[:, None])).std((0, 2))
    torch.testing.assert_close(spread, torch.ones(8), rtol=0.05, atol=0)
    assert not path[:, 0].allclose(path[:, -1], atol=0.5)


def test_best_are_the_nearest_to_both_means(last):
    found = sample.load(last)
    z = sample.latents(found, "pegasus", 64, 3, 1.0, 8)
    far = torch.cdist(z, found.means).max(1).values
    images = sample.draw(found, "pegasus", 64, 3, best=5)
    assert images.equal(found.model.decode(z[far.argsort()[:5]]).detach())


def test_best_is_enlarged(last, tmp_path):
    sample.main([str(last), str(tmp_path / "b.png"), "--best", "4", "--n", "16", "--columns", "4"])
    assert png(tmp_path / "b.png")[0] == (4 * (32 * 8 + 4) + 4, 32 * 8 + 8)


def test_one_class_has_nothing_to_mix(batches, tmp_path, complaint):
    argv = ("--data", batches, "--run", tmp_path / "r", "--epochs", 1, "--arch", "mlp", "--classes", "horse")
    train.main([str(a) for a in argv])
    last, out = tmp_path / "r" / "last.pt", tmp_path / "o.png"
    assert "--mode prior" in complaint(sample.main, last, out)
    assert not out.exists()
    sample.main([str(last), str(out), "--mode", "prior"])
    assert out.exists()


def test_places_that_cannot_be_written(last, tmp_path, complaint):
    assert "none/out.png: can't be written" in complaint(sample.main, last, tmp_path / "none" / "out.png")
