"""Sampling from a checkpoint: modes, options, what a picture says of itself."""
import math
import os
import shutil
import stat
import subprocess
import sys
from dataclasses import replace

import reparam
import sample
import train
import vae
from pegasus import measures
from pegasus.cli import UserError
from pegasus.data import cifar10, pictures
from pegasus.drawing import overview, plots, sampler
from pegasus.drawing.sampler import SampleConfig, Sampler
from pegasus.models import classifier, composites, flow_prior, gaussians
from pegasus.models.gaussians import Gaussian

import numpy as np
import pytest
import torch
from conftest import ROOT, png
from PIL import Image
from torch.nn import functional

MODES = ("pegasus", "morph", "horse", "bird", "prior")
HORSE = cifar10.CLASSES.index("horse")


@pytest.fixture(scope="module")
def last(batches, tmp_path_factory):
    """A checkpoint of the paper's network whose data is gone."""
    folder = tmp_path_factory.mktemp("sample")
    data = folder / "gone"
    run = folder / "run"
    shutil.copytree(batches, data)
    argv = ["--data", str(data), "--run", str(run), "--epochs", "1", "--arch", "mlp"]
    train.main(argv)
    shutil.rmtree(data)
    return run / "last.pt"


@pytest.fixture(scope="module")
def plain(last):
    """Its sampler, without a flow prior."""
    return sampler.load(last)


@pytest.fixture(scope="module")
def flow():
    """A sampler with a small flow prior of random weights."""
    torch.manual_seed(0)
    with pytest.MonkeyPatch.context() as patched:  # other tests load whole networks
        patched.setattr(vae, "CHANNELS", (16, 16))
        patched.setattr(flow_prior, "CHANNELS", (16, 16))
        model = vae.VAE("conv", "gaussian", (2, 8, 8)).eval()
        prior = flow_prior.FlowPrior(model.latent_shape, 7)
    for parameter in prior.ema.parameters():
        parameter.add_(0.05 * torch.randn(parameter.shape))
    return Sampler(
        model=model,
        gaussians={},
        classes=("horse", "bird"),
        about={"model": "0" * 16, "data": "photographs", "prior": "learned"},
        prior=prior,
        has_pegasi=True,
        data={},
    )


def latents(source, mode, n=64, seed=0, **more):
    return sampler.latents(source, SampleConfig(mode=mode, n=n, seed=seed, **more))


def whiten(z, gaussian):
    """Latents (n, d) as standard normals (d, n), were they of a Gaussian."""
    offset = (z - gaussian.mean).double().T
    return torch.linalg.solve(gaussians.root(gaussian), offset)


def test_twice_the_same_bytes_from_the_checkpoint_alone(last, tmp_path):
    for name in ("a.png", "b.png"):
        done = subprocess.run(
            [sys.executable, os.path.join(ROOT, "sample.py"), last, name],
            cwd=tmp_path,
            text=True,
            capture_output=True,
            timeout=60,
        )
        assert done.returncode == 0, done.stderr
        assert name in done.stdout
        assert "64 pictures" in done.stdout
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    assert png(tmp_path / "a.png")[0] == (8 * 132 + 4, 8 * 132 + 4)


@pytest.mark.parametrize("mode", MODES)
def test_modes_and_what_their_pictures_say(last, tmp_path, mode):
    out = tmp_path / "out.png"
    options = ["--n", "6", "--columns", "3", "--scale", "1", "--seed", "5"]
    sample.main([str(last), str(out), "--mode", mode, *options])
    size, about = png(out)
    assert size == (3 * 36 + 4, 2 * 36 + 4)
    assert about["mode"] == mode
    assert about["seed"] == "5"
    assert about["data"] == "gone"
    assert about["coat"] == "any"
    assert len(about["model"]) == 16


@pytest.mark.parametrize("mode", ["prior", "pegasus", "horse"])
def test_image_i_depends_on_seed_and_i_alone(plain, mode):
    z = latents(plain, mode, seed=1)
    assert z[:4].equal(latents(plain, mode, 4, seed=1, columns=2))
    assert not z.equal(latents(plain, mode, seed=2))


@pytest.mark.parametrize("mode", MODES)
def test_image_i_of_a_flow_prior_depends_on_seed_and_i_alone(flow, mode):
    options = {"steps": 3, "columns": 4}
    z = latents(flow, mode, 70, seed=3, **options)
    assert z.shape == (70, 128)
    assert z.isfinite().all()
    again = latents(flow, mode, 8, seed=3, **options)
    assert z[:8].allclose(again, rtol=0, atol=0.05)  # products may depend on their size
    assert not z.equal(latents(flow, mode, 70, seed=4, **options))


def test_modes_are_of_their_gaussians(plain):
    """Without noise the mean, and noise as wide as the Gaussian, by its log-density."""
    horse = plain.gaussians["horse"]
    bird = plain.gaussians["bird"]
    white = plain.gaussians["white horse"]
    both = gaussians.product(horse, bird)
    for mode, gaussian in {"horse": horse, "bird": bird, "pegasus": both}.items():
        middle = latents(plain, mode, 1, temperature=0.0)[0]
        torch.testing.assert_close(middle, gaussian.mean.float())
        eps = whiten(latents(plain, mode, 2000), gaussian)
        assert eps.std().item() == pytest.approx(1, abs=0.01)
    pegasus = latents(plain, "pegasus", 1, temperature=0.0, blend=0.8, coat="white")[0]
    wanted = gaussians.product(white, bird, 0.8).mean.float()
    torch.testing.assert_close(pegasus, wanted)
    white_horse = latents(plain, "horse", 1, temperature=0.0, coat="white")[0]
    torch.testing.assert_close(white_horse, white.mean)
    assert latents(plain, "prior", 500).std().item() == pytest.approx(1, abs=0.02)


def test_morph_goes_from_one_class_to_the_other(plain):
    horse = plain.gaussians["horse"]
    bird = plain.gaussians["bird"]
    path = latents(plain, "morph", 12, temperature=0.0, columns=4)
    torch.testing.assert_close(path[[0, 4, 8]], horse.mean.expand(3, -1))
    torch.testing.assert_close(path[[3, 7, 11]], bird.mean.expand(3, -1))
    path = latents(plain, "morph", 4000).view(500, 8, -1)
    assert path[:7].equal(latents(plain, "morph", 56).view(7, 8, -1))
    assert not path[:, 0].allclose(path[:, -1], atol=0.5)


def test_morph_keeps_its_amount_of_noise(plain):
    horse = plain.gaussians["horse"]
    bird = plain.gaussians["bird"]
    path = latents(plain, "morph", 4000).view(500, 8, -1)
    for k in range(8):
        share = torch.tensor(k / 7)
        mean = torch.lerp(horse.mean, bird.mean, share)
        weight = (share * math.pi / 2).sin() ** 2
        covariance = torch.lerp(horse.covariance, bird.covariance, weight)
        eps = whiten(path[:, k], Gaussian(mean, covariance))
        assert eps.std().item() == pytest.approx(1, abs=0.02)


@pytest.mark.parametrize(
    ("mode", "options", "weights"),
    [
        ("pegasus", {}, {2: 1.0}),
        ("pegasus", {"coat": "dark"}, {6: 1.0}),
        ("horse", {"coat": "white"}, {3: 1.0}),
        ("bird", {}, {1: 1.0}),
        ("walk", {"coat": "white"}, {5: 1.0}),
        ("prior", {}, {}),
    ],
)
def test_a_mode_follows_its_class(flow, mode, options, weights):
    config = SampleConfig(mode=mode, **options)
    assert sampler.class_weights(flow, config, sampler.morph_share(config, None)) == weights


def test_morph_leads_from_the_first_class_by_pegasus_to_the_second(flow):
    config = SampleConfig(mode="morph", n=5, columns=5, coat="white")
    weights = sampler.class_weights(flow, config, sampler.morph_share(config, None))
    shares = {number: weight[:, 0].tolist() for number, weight in weights.items()}
    assert shares == {3: [1, 0.5, 0, 0, 0], 5: [0, 0.5, 1, 0.5, 0], 1: [0, 0, 0, 0.5, 1]}


def test_a_coat_is_there_early(flow):
    """It counts twice; other classes once, without guidance."""
    config = SampleConfig(mode="morph", coat="white")
    assert sampler.early_weights(flow, config, {3: 0.5, 5: 0.5, 1: 0}) == {3: 1, 5: 1, 1: 0}
    assert sampler.early_weights(flow, config, {1: 1.0}) == {1: 1.0}
    assert sampler.early_weights(flow, SampleConfig(), {2: 1.0}) == {2: 1.0}


def test_guidance_is_for_later(flow, monkeypatch):
    given = []

    def follow(prior, early, late, z, times):
        given.append((early, late, times))
        return z

    monkeypatch.setattr(sampler, "follow", follow)
    latents(flow, "pegasus", 2, coat="white", guidance=5.0, steps=2)
    latents(flow, "bird", 2, guidance=5.0, steps=4)
    assert given[0] == ({5: 2}, {5: 5}, [0, 0.5, 1])
    assert given[1] == ({1: 1}, {1: 5}, [0, 0.25, 0.5, 0.75, 1])


@pytest.mark.parametrize("mode, single", [("walk", True), ("pegasus", False)])
def test_walks_are_drawn_in_float32(flow, monkeypatch, mode, single):
    """In bfloat16 their pictures tremble."""
    given = []

    def follow(prior, early, late, z, times):
        given.append(torch.is_autocast_enabled("cpu"))
        return z

    monkeypatch.setattr(sampler, "follow", follow)
    monkeypatch.setattr(sampler.device, "fastest_precision", lambda device: "bfloat16")
    latents(flow, mode, 2)
    assert given == [not single]


def test_without_a_class_of_their_own_pegasi_are_of_two(flow):
    without = replace(flow, has_pegasi=False)
    config = SampleConfig(blend=0.25)
    share = torch.zeros(1, 1)
    assert sampler.class_weights(without, config, share) == {0: 0.5, 1: 1.5}
    config = replace(config, mode="morph", n=3, columns=3)
    weights = sampler.class_weights(without, config, sampler.morph_share(config, None))
    assert weights[0][:, 0].tolist() == [1, 0.5, 0]
    assert weights[1][:, 0].tolist() == [0, 0.5, 1]


def test_guidance_and_coat_change_the_flow(flow):
    changes = ({}, {"guidance": 4.0}, {"coat": "white"}, {"coat": "dark"})
    sets = [latents(flow, "horse", 2, steps=2, **change) for change in changes]
    for i, a in enumerate(sets):
        assert all(not a.allclose(b, atol=1e-4) for b in sets[:i])


# ---- walks ----


def test_noise_of_a_walk_goes_in_a_circle():
    turns = torch.arange(12) / 12
    eps = sampler.circle_noise(turns, 1000, seed=1)
    assert eps[0].equal(reparam.normals(1, 1000, 1)[0])
    lengths = eps.norm(dim=1)
    torch.testing.assert_close(lengths, lengths[:1].expand(12))
    steps = (eps - eps.roll(-1, 0)).norm(dim=1)  # the last one leads back to the first
    torch.testing.assert_close(steps, steps[:1].expand(12))


def test_a_walks_steps_become_even():
    """Where pictures jump from one to another, and back, between two of them."""
    turns = torch.arange(64) / 64

    def pictures(turns):
        light = torch.sigmoid(300 * (turns - 0.3)) - torch.sigmoid(300 * (turns - 0.7))
        return (0.8 * light + 0.1 * (2 * math.pi * turns).sin())[:, None, None, None]

    def steps(turns):
        images = pictures(turns)
        return (images - images.roll(-1, 0)).abs().flatten()

    assert steps(turns).max() > 10 * steps(turns).median()
    for _ in range(sampler.ROUNDS):
        turns = sampler.even_turns(turns, pictures(turns))
    assert turns.diff().min() > 0 and 0 <= turns[0] and turns[-1] < 1
    assert steps(turns).max() < 2 * steps(turns).median()


@pytest.mark.parametrize("prior", ["flow", "plain"])
@pytest.mark.parametrize("mode", ["walk", "morph"])
def test_a_walk_comes_back_to_its_beginning(request, prior, mode):
    source = request.getfixturevalue(prior)
    config = SampleConfig(mode=mode, n=8, steps=2, out="a.GIF")
    images = sampler.sample(source, config)
    assert images.shape == (8, 3, 32, 32)
    step = (images - images.roll(-1, 0)).square().mean((1, 2, 3)).sqrt()
    assert 0 < step.min() and step.max() < 3 * step.median()
    if mode == "morph":
        share = sampler.morph_share(config, torch.tensor([0, 0.25, 0.5, 0.75]))
        assert share[:, 0].tolist() == [0, 0.5, 1, 0.5]


@pytest.mark.parametrize("suffix", ["gif", "webp"])
@pytest.mark.parametrize("mode", ["walk", "morph"])
def test_a_moving_picture_has_a_frame_a_picture_and_goes_on(last, tmp_path, suffix, mode):
    path = tmp_path / f"out.{suffix}"
    sample.main([str(last), str(path), "--mode", mode, "--n", "6", "--scale", "2"])
    with Image.open(path) as image:
        assert (image.n_frames, image.info["loop"]) == (6, 0)
        assert image.size[0] == 2 * 32 + 2 * plots.GAP
        if suffix == "gif":
            assert b"epochs: 1; " in image.info["comment"]
            assert f"mode: {mode}".encode() in image.info["comment"]


def test_what_does_not_move_is_refused(last, tmp_path, complaint):
    out = tmp_path / "out.gif"
    assert "--mode horse does not move" in complaint(sample.main, last, out, "--mode", "horse")
    for mode in ("walk", "morph"):
        moving = (last, tmp_path / "out.png", "--mode", mode)
        said = complaint(sample.main, *moving, "--best", 2)
        assert "--best: a walk or a morph shows all" in said
    said = complaint(sample.main, last, tmp_path / "out.jpg")
    assert "end the name in .png, .gif or .webp" in said
    assert not list(tmp_path.iterdir())


def save_photo(path):
    """Write a picture of random pixels; return it, (1, 3, 32, 32)."""
    photo = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(2))
    plots.save(plots.sheet(photo, 1, 1, 0), path, {})
    return photo


@pytest.fixture
def photo_posterior(flow, tmp_path):
    """A picture's file, and mean and deviation (128,) of its latents."""
    path = tmp_path / "photo.png"
    photo = save_photo(path)
    x = vae.from_bytes(pictures.read(path)[None])
    assert x.allclose(photo, atol=1 / 255)
    with torch.no_grad():
        mu, logvar = flow.model.encode(x)
    return str(path), mu[0], (logvar[0] / 2).exp()


def test_pictures_kept_whole_are_samples_of_the_autoencoders_posterior(
    flow, photo_posterior
):
    path, mu, std = photo_posterior
    z = latents(flow, "horse", 2000, from_=path, keep=1.0)
    eps = (z - mu) / std
    torch.testing.assert_close(eps.mean(0), torch.zeros(128), rtol=0, atol=0.12)
    torch.testing.assert_close(eps.std(0), torch.ones(128), rtol=0, atol=0.09)
    assert z[:3].equal(latents(flow, "horse", 3, from_=path, keep=1.0))
    assert not z[:3].allclose(latents(flow, "horse", 3, seed=1, from_=path, keep=1.0))
    images = sampler.sample(flow, SampleConfig(mode="horse", n=2, from_=path, keep=1.0))
    assert images.equal(flow.model.decode(z[:2]).detach())
    assert (images[0] - images[1]).abs().mean() > 1e-3


def test_a_pictures_latents_are_mixed_with_noise_of_their_own(
    flow, photo_posterior, monkeypatch
):
    """Where both were the same numbers, deviations would add up instead of squares."""
    monkeypatch.setattr(sampler, "follow", lambda prior, early, late, z, times: z)
    path, mu, std = photo_posterior
    z = latents(flow, "horse", 2000, from_=path, keep=0.75)
    wanted = (0.25**2 + (0.75 * std) ** 2).sqrt()
    torch.testing.assert_close(z.std(0) / wanted, torch.ones(128), rtol=0, atol=0.09)
    mean = (z.mean(0) - 0.75 * mu) / wanted
    torch.testing.assert_close(mean, torch.zeros(128), rtol=0, atol=0.12)


def test_in_morph_a_row_of_the_sheet_begins_from_one_sample_of_a_picture(
    flow, photo_posterior
):
    path, _, std = photo_posterior
    z = latents(flow, "morph", 8, columns=4, from_=path, keep=1.0)
    first, second = z.view(2, 4, 128)
    assert first.equal(first[:1].expand(4, 128))
    assert second.equal(second[:1].expand(4, 128))
    assert ((first[0] - second[0]) / std).abs().mean() > 0.5


def test_typical_is_what_is_like_a_quarter_of_the_others():
    directions = torch.eye(4)[torch.tensor([0, 0, 0, 1, 1, 2, 2, 3])]
    lengths = torch.arange(1, 9)[:, None]  # of no matter
    expected = torch.tensor([1, 1, 1, 2 / 3, 2 / 3, 2 / 3, 2 / 3, 1 / 3])
    torch.testing.assert_close(sampler.typicality(directions * lengths), expected)


def test_how_typical_does_not_depend_on_how_many_are_compared_at_a_time():
    features = torch.rand(3 * sampler.CHUNK + 5, 7)
    unit = functional.normalize(features, dim=1)
    count = 1 + math.ceil(len(unit) / 4)
    nearest = (unit @ unit.T).sort(1, descending=True).values[:, :count]
    torch.testing.assert_close(sampler.typicality(features), nearest.mean(1))


def test_blend_is_refused_where_it_does_nothing(flow):
    with pytest.raises(UserError, match="--blend: Pegasi are a class"):
        sampler.sample(flow, SampleConfig(n=2, blend=0.6))
    sampler.check(replace(flow, has_pegasi=False), SampleConfig(n=2, blend=0.6))


def judged(images):
    """Return what the judge that chooses says: probabilities, and how typical images are."""
    probabilities, features = classifier.classify(classifier.load(classifier.CHOOSING), images)
    return probabilities, sampler.typicality(features)


@pytest.mark.parametrize(
    "mode, name", [("bird", "bird"), ("horse", "horse"), ("pegasus", "horse"), ("prior", "horse")]
)
def test_the_best_of_a_class_are_what_the_judge_is_surest_of(plain, mode, name):
    config = SampleConfig(mode=mode, n=30)
    images = sampler.sample(plain, config)
    order = judged(images)[0][:, cifar10.CLASSES.index(name)].argsort(descending=True)
    assert sampler.sample(plain, replace(config, best=4)).equal(images[order[:4]])


def test_the_best_pegasi_of_a_class_are_the_most_typical(flow):
    config = SampleConfig(n=10, steps=4)
    images = sampler.sample(flow, config)
    order = judged(images)[1].argsort(descending=True)
    assert sampler.sample(flow, replace(config, best=3)).equal(images[order[:3]])


def test_the_best_of_classes_that_the_judge_does_not_know_are_the_most_typical(plain):
    images = sampler.sample(plain, SampleConfig(mode="horse", n=12))
    cats = replace(plain, classes=("tabby", "whippet"))
    score = sampler.ranking(cats, images, SampleConfig(mode="tabby"))
    assert score.equal(judged(images)[1])


@pytest.mark.parametrize("model", ["plain", "flow"])
@pytest.mark.parametrize("number, coat", [(0, "white"), (1, "dark")])
def test_the_best_of_a_coat_are_those_of_the_quarter_that_has_most_of_it(
    model, number, coat, request
):
    source = request.getfixturevalue(model)
    config = SampleConfig(n=64, seed=3, coat=coat, steps=2)
    images = sampler.sample(source, config)
    coated = composites.coat_scores(images)[number]
    order = sampler.ranking(source, images, replace(config, coat="any")).argsort(descending=True)
    has_it = (coated >= coated.quantile(0.75))[order]
    assert has_it.sum() == 16
    best = sampler.sample(source, replace(config, best=20))
    assert best.equal(images[torch.cat([order[has_it], order[~has_it]])[:20]])


def test_the_best_of_one_is_that_one(flow):
    config = SampleConfig(n=1, steps=2, coat="white")
    images = sampler.sample(flow, config)
    assert sampler.sample(flow, replace(config, best=1)).equal(images)


def test_two_are_as_typical_as_each_other():
    first, second = sampler.typicality(torch.rand(2, 9))
    assert first < 1
    torch.testing.assert_close(first, second)


def test_options_that_a_model_does_not_have(last, tmp_path, complaint):
    out = tmp_path / "o.png"
    sentence = complaint(sample.main, last, out, "--mode", "pony")
    assert "got pony, wanted one of pegasus, morph, horse, bird, prior" in sentence
    for mode in ("bird", "prior"):
        sentence = complaint(sample.main, last, out, "--coat", "white", "--mode", mode)
        assert "--coat: got white" in sentence
        assert sentence.endswith("the modes pegasus, morph, horse, walk")
    sentence = complaint(sample.main, last, out, "--from", last)
    assert "--from: this model has no learned prior" in sentence
    sentence = complaint(sample.main, last, out, "--blend", 1.5)
    assert "wanted a number, 0.0 or more, at most 1.0" in sentence
    assert not out.exists()


def test_best_is_enlarged(last, tmp_path):
    options = ["--best", "4", "--n", "16", "--columns", "4"]
    sample.main([str(last), str(tmp_path / "b.png"), *options])
    size, about = png(tmp_path / "b.png")
    assert size == (4 * (32 * 8 + 4) + 4, 32 * 8 + 8)
    assert about["best"] == "of 16 by judge 0"
    sample.main([str(last), str(tmp_path / "b.png"), *options, "--scale", "4"])
    assert png(tmp_path / "b.png")[0] == (4 * 132 + 4, 32 * 4 + 8)


def test_what_a_picture_by_a_flow_prior_says(flow, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sampler, "load", lambda path: flow)
    out = tmp_path / "o.png"
    sample.main(["x.pt", str(out), "--n", "2", "--steps", "4"])
    about = png(out)[1]
    assert about["steps"] == "4"
    assert "hardly with wings" not in capsys.readouterr().out
    monkeypatch.setattr(sampler, "load", lambda path: replace(flow, has_pegasi=False))
    sample.main(["x.pt", str(out), "--n", "2", "--steps", "4", "--guidance", "1.9"])
    about = png(out)[1]
    assert about["guidance"] == "1.9"
    assert "2 pictures between horse and bird, hardly with wings" in capsys.readouterr().out


def test_the_overview_ends_with_a_draw(flow, tmp_path, monkeypatch, complaint):
    config = SampleConfig(n=1, seed=overview.PEGASUS_SEED, steps=40)
    with torch.no_grad():
        states = overview.on_the_way(flow)
    assert len(states) == len(overview.TIMES)
    torch.testing.assert_close(states[-1:], sampler.sample(flow, config), rtol=0, atol=0.02)
    monkeypatch.setattr(sampler, "load", lambda path: flow)
    overview.main(["x.pt", str(tmp_path / "o.png")])
    size, about = png(tmp_path / "o.png")
    assert size == (overview.WIDTH, 3 * overview.ROW)
    assert about["model"] == "0" * 16
    monkeypatch.setattr(sampler, "load", lambda path: replace(flow, has_pegasi=False))
    assert "no class of a learned prior" in complaint(overview.main, "x.pt", tmp_path / "p.png")


@pytest.mark.parametrize(
    ("about", "lines"),
    [
        ({"data": "photographs", "prior": "learned"}, 0),
        ({"data": "synthetic"}, 1),
        ({"data": "photographs", "prior": sampler.UNTRAINED}, 1),
        ({"data": "synthetic", "prior": sampler.PREVIEW}, 2),
    ],
)
def test_a_sheet_says_what_its_pictures_are_not(about, lines):
    images = torch.rand(8, 3, 32, 32)
    plain = plots.sheet(images)
    page = sampler.page(images, about)
    height = plots.caption(plain, "words").height - plain.height
    assert page.height == plain.height + lines * height
    assert (np.asarray(page)[: plain.height] == np.asarray(plain)).all()


def test_one_class_has_nothing_to_mix(batches, tmp_path, complaint):
    run = tmp_path / "r"
    argv = ["--data", str(batches), "--run", str(run), "--epochs", "1", "--arch", "mlp"]
    train.main([*argv, "--classes", "horse"])
    last = run / "last.pt"
    out = tmp_path / "o.png"
    assert "wanted one of horse, prior" in complaint(sample.main, last, out)
    assert not out.exists()
    sample.main([str(last), str(out), "--mode", "horse", "--coat", "dark"])
    assert out.exists()
    for mode in ("horse", "prior"):
        sample.main([str(last), str(out), "--mode", mode, "--n", "5", "--best", "3"])
        assert png(out)[1]["best"] == "of 5 by judge 0"


def test_paths_that_cannot_be_written(last, tmp_path, complaint, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for path in (tmp_path / "none" / "out.png", ".", "", tmp_path, "/"):
        assert "can't be written" in complaint(sample.main, last, path)
    assert list(tmp_path.iterdir()) == []
    os.mkfifo("pipe")
    assert "it is no file" in complaint(sample.main, last, "pipe")
    assert stat.S_ISFIFO(os.stat("pipe").st_mode)


def test_what_is_refused_before_anything_is_read(tmp_path, complaint, monkeypatch):
    monkeypatch.setattr(sampler, "load", lambda path: pytest.fail("it was loaded"))
    nowhere = tmp_path / "none" / "o.png"
    assert "can't be written" in complaint(sample.main, "x.pt", nowhere)
    for name in ("a.jpg", "a.v2", "last.pt"):
        sentence = complaint(sample.main, "x.pt", tmp_path / name)
        assert f"{name}: pictures are written as PNG" in sentence
    sentence = complaint(sample.main, "x.pt", tmp_path / "a.png", "--best", 65)
    assert "--best: got 65 of the 64 of --n" in sentence
    for name in ("a", "a.PNG"):
        plots.check(tmp_path / name)
    assert list(tmp_path.iterdir()) == []
    Image.new("RGB", (4, 4)).save(tmp_path / "photo.png")
    (tmp_path / "link.png").symlink_to("photo.png")
    for name in ("photo.png", "link.png"):
        arguments = ("x.pt", tmp_path / name, "--from", tmp_path / "photo.png")
        assert "which would be lost" in complaint(sample.main, *arguments)
    assert "which would be lost" in complaint(sample.main, "photo", "photo")
    sentence = complaint(sample.main, "x.pt", tmp_path / "a.png", "--guidance", "1e38")
    assert "--guidance: got 1e38" in sentence and "at most 100" in sentence


def test_files_that_are_no_picture(flow, tmp_path, complaint, monkeypatch):
    monkeypatch.setattr(sampler, "load", lambda path: flow)
    text = tmp_path / "text.png"
    text.write_text("no picture")
    out = tmp_path / "o.png"
    sentence = complaint(sample.main, "x.pt", out, "--from", text)
    assert "text.png: not a picture" in sentence
    sentence = complaint(sample.main, "x.pt", out, "--from", tmp_path / "none.png")
    assert "none.png: no such file" in sentence
    assert not out.exists()


def test_the_checkpoint_that_comes_along():
    path = ROOT / "pegasus.pt"
    source = sampler.load(path)
    assert path.stat().st_size <= 8_000_000
    shown = png(ROOT / "docs" / "pegasus.png")[1]
    assert shown["model"] == source.about["model"]
    for coat in ("any", "white", "dark"):
        images = sampler.sample(source, SampleConfig(n=64, coat=coat))
        p, _ = classifier.classify(classifier.load(classifier.CHOOSING), images)
        assert (p.argmax(1) == HORSE).double().mean() > 0.75
        assert measures.variety(images).correlation < 0.5  # of one stamp 0.67
