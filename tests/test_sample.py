import math
import os
import shutil
import stat
import subprocess
import sys
from dataclasses import replace

import cifar10
import collage
import density
import judge
import pictures
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


MODES = ("pegasus", "morph", "horse", "bird", "prior")


def latents(found, mode, n=64, seed=0, **more):
    return sample.latents(found, sample.Options(mode=mode, n=n, seed=seed, **more))


@pytest.mark.parametrize("mode", MODES)
def test_modes_and_what_their_pictures_say(last, tmp_path, mode):
    out = tmp_path / "out.png"
    sample.main([str(last), str(out), "--mode", mode, "--n", "6", "--columns", "3", "--scale", "1", "--seed", "5"])
    size, about = png(out)
    assert size == (3 * 36 + 4, 2 * 36 + 4)
    assert (about["mode"], about["seed"], about["data"], about["coat"]) == (mode, "5", "gone", "any")
    assert len(about["model"]) == 16


def test_image_i_depends_on_seed_and_i_alone(last):
    found = sample.load(last)
    for mode in ("prior", "pegasus", "horse"):
        z = latents(found, mode, seed=1)
        assert z[:4].equal(latents(found, mode, 4, seed=1, columns=2))
        assert not z.equal(latents(found, mode, seed=2))


def test_modes_draw_from_their_densities(last):
    """Without noise the mean of the density; noise as wide as the density, here by its log-density."""
    found = sample.load(last)
    horse, bird, white = (found.densities[name] for name in ("horse", "bird", "white horse"))
    wanted = {"horse": horse, "bird": bird, "pegasus": density.product(horse, bird)}
    for mode, gaussian in wanted.items():
        torch.testing.assert_close(latents(found, mode, 1, temperature=0.0)[0], gaussian.mean.float())
        eps = torch.linalg.solve(density.root(gaussian), (latents(found, mode, 2000) - gaussian.mean).double().T)
        assert eps.std().item() == pytest.approx(1, abs=0.01)
    pegasus = latents(found, "pegasus", 1, temperature=0.0, blend=0.8, coat="white")[0]
    torch.testing.assert_close(pegasus, density.product(white, bird, 0.8).mean.float())
    torch.testing.assert_close(latents(found, "horse", 1, temperature=0.0, coat="white")[0], white.mean)
    assert latents(found, "prior", 500).std().item() == pytest.approx(1, abs=0.02)


def test_morph_goes_from_one_class_to_the_other_and_keeps_its_amount_of_noise(last):
    found = sample.load(last)
    path = latents(found, "morph", 12, temperature=0.0, columns=4)
    torch.testing.assert_close(path[[0, 4, 8]], found.densities["horse"].mean.expand(3, -1))
    torch.testing.assert_close(path[[3, 7, 11]], found.densities["bird"].mean.expand(3, -1))
    path = latents(found, "morph", 4000).view(500, 8, -1)
    assert path[:7].equal(latents(found, "morph", 56).view(7, 8, -1))
    horse, bird = (found.densities[name] for name in ("horse", "bird"))
    for k in range(8):
        along = torch.tensor(k / 7)
        gaussian = [torch.lerp(a, b, (along * math.pi / 2).sin()**2) for a, b in zip(horse, bird, strict=True)]
        noise = path[:, k] - torch.lerp(horse.mean, bird.mean, along)
        eps = torch.linalg.solve(density.root(density.Gaussian(*gaussian)), noise.double().T)
        assert eps.std().item() == pytest.approx(1, abs=0.02)
    assert not path[:, 0].allclose(path[:, -1], atol=0.5)


def test_best_of_a_class_are_what_the_judge_is_surest_of(last):
    found, chosen = sample.load(last), sample.Options(mode="bird", n=30)
    images = sample.draw(found, chosen)
    order = judge.classify(found.judge, images)[0][:, 2].argsort(descending=True)
    assert sample.draw(found, replace(chosen, best=4)).equal(images[order[:4]])


def test_best_have_the_judges_score_and_the_coat(last):
    found = sample.load(last)
    chosen = sample.Options(n=64, seed=3)
    images = sample.draw(found, chosen)
    score = judge.pegasus_score(judge.classify(found.judge, images)[0], found.classes)
    assert sample.draw(found, replace(chosen, best=5)).equal(images[score.argsort(descending=True)[:5]])
    for coat, sign in (("white", 1), ("dark", -1)):
        images = sample.draw(found, replace(chosen, coat=coat))
        best = sample.draw(found, replace(chosen, coat=coat, best=8))
        light, like = (torch.stack([measure(best).mean(), measure(images).mean()]) for measure in (
            lambda x: collage.coat(x).mean(1),
            lambda x: judge.pegasus_score(judge.classify(found.judge, x)[0], found.classes)))
        assert sign * (light[0] - light[1]) > 0
        assert like[0] > like[1]


def test_options_that_a_model_does_not_have(last, tmp_path, complaint):
    out = tmp_path / "o.png"
    assert "got pony, wanted one of pegasus, morph, horse, bird, prior" in complaint(sample.main, last, out, "--mode",
                                                                                     "pony")
    for mode in ("bird", "prior"):
        assert "--coat: got white" in complaint(sample.main, last, out, "--coat", "white", "--mode", mode)
    assert "wanted a number, 0.0 or more, at most 1.0" in complaint(sample.main, last, out, "--blend", 1.5)
    assert not out.exists()


def test_best_is_enlarged(last, tmp_path):
    sample.main([str(last), str(tmp_path / "b.png"), "--best", "4", "--n", "16", "--columns", "4"])
    size, about = png(tmp_path / "b.png")
    assert size == (4 * (32 * 8 + 4) + 4, 32 * 8 + 8)
    assert about["best"] == "of 16 by judge"


def test_one_class_has_nothing_to_mix(batches, tmp_path, complaint):
    argv = ("--data", batches, "--run", tmp_path / "r", "--epochs", 1, "--arch", "mlp", "--classes", "horse")
    train.main([str(a) for a in argv])
    last, out = tmp_path / "r" / "last.pt", tmp_path / "o.png"
    assert "wanted one of horse, prior" in complaint(sample.main, last, out)
    assert not out.exists()
    sample.main([str(last), str(out), "--mode", "horse", "--coat", "dark"])
    assert out.exists()
    found = sample.load(last)
    for mode in ("horse", "prior"):  # the surest horses: there is nothing else to go by
        images = sample.draw(found, sample.Options(mode=mode, n=20))
        order = judge.classify(found.judge, images)[0][:, 7].argsort(descending=True)
        assert sample.draw(found, sample.Options(mode=mode, n=20, best=3)).equal(images[order[:3]])


def test_places_that_cannot_be_written(last, tmp_path, complaint, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for place in (tmp_path / "none" / "out.png", ".", "", tmp_path, "/"):
        assert "can't be written" in complaint(sample.main, last, place)
    assert list(tmp_path.iterdir()) == []
    os.mkfifo("pipe")
    assert "it is no file" in complaint(sample.main, last, "pipe")
    assert stat.S_ISFIFO(os.stat("pipe").st_mode)


def test_what_is_refused_before_anything_is_drawn(last, tmp_path, complaint, monkeypatch):
    monkeypatch.setattr(sample, "load", lambda path: pytest.fail("the checkpoint was loaded"))
    assert "can't be written" in complaint(sample.main, last, tmp_path / "none" / "out.png")
    for name in ("a.jpg", "a.v2", last):
        assert f"{name}: pictures are written as PNG" in complaint(sample.main, last, tmp_path / name)
    assert "--best: got 65 of the 64 of --n" in complaint(sample.main, last, tmp_path / "a.png", "--best", 65)
    for name in ("a", "a.PNG"):
        pictures.check(tmp_path / name)
    assert list(tmp_path.iterdir()) == []


def test_the_checkpoint_that_comes_along():
    found = sample.load(ROOT / "pegasus.pt")
    assert (ROOT / "pegasus.pt").stat().st_size <= 8_000_000
    for coat in ("any", "white", "dark"):
        seen = judge.classify(found.judge, sample.draw(found, sample.Options(n=64, coat=coat)))[0]
        assert (seen.argmax(1) == cifar10.CLASSES.index("horse")).double().mean() > 0.85
        assert judge.pegasus_score(seen, found.classes).mean() > 0.25  # with wings like a cloud 0.24
