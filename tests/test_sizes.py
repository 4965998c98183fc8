"""Pictures of other sizes than CIFAR-10's, from their reading to a sheet."""
import sample
import train
import vae
from pegasus import checkpoint, evaluate
from pegasus.data import datasets
from pegasus.drawing import sampler
from pegasus.models import classifier, composites, labels

import pytest
import torch
from PIL import Image

LARGE = vae.SIZES[1:]


@pytest.mark.parametrize("size", LARGE)
@pytest.mark.parametrize("arch,latent", [("mlp", (6,)), ("conv", (4, 8, 8)), ("conv", (6,))])
def test_networks_of_a_size(arch, latent, size):
    model = vae.VAE(arch, "gaussian", latent, True, size)
    x = torch.rand(2, 3, size, size)
    terms = model(x, torch.tensor(1))
    assert terms.sse.shape == (2,)
    assert model.reconstruct(x).shape == x.shape
    nats = model.distortion(terms.sse, model.variance)
    assert nats.equal(vae.gaussian_nll(terms.sse, model.variance, x[0].numel()))


def test_smaller_and_larger_pictures_look_alike():
    x = torch.rand(2, 3, 8, 8)
    x = vae.resize(x, 32)
    assert vae.resize(x, 32) is x
    for size in LARGE:
        assert vae.resize(vae.resize(x, size), 32).sub(x).abs().mean() < 0.01


@pytest.mark.parametrize("size", LARGE)
def test_classes_coats_and_judges_see_the_same(batches, size):
    small = datasets.load(str(batches), "horse,bird")
    data = datasets.load(str(batches), "horse,bird", size=size)
    assert data.images.shape == (len(small.images), 3, size, size)
    rows = labels.class_rows(small.images, small.labels, small.classes)
    large = labels.class_rows(data.images, data.labels, data.classes)
    same = [len(set(rows[n].tolist()) & set(large[n].tolist())) / len(rows[n]) for n in rows]
    assert min(same) > 0.9
    judge = classifier.load(1)
    seen = [classifier.classify(judge, d.images[:20])[0] for d in (small, data)]
    assert seen[0].sub(seen[1]).abs().mean() < 0.02


@pytest.mark.parametrize("size", LARGE)
def test_composites_are_as_those_at_32(batches, monkeypatch, size):
    """Bodies, wings and places are the same; not what is best of nearly equal ones."""
    monkeypatch.setattr(composites, "TRIES", 6)
    monkeypatch.setattr(composites, "RECOGNIZED", 1e-9)
    monkeypatch.setattr(composites, "BODIES", 0.05)
    pictures = []
    parts = []
    for side in (32, size):
        data = datasets.load(str(batches), "horse,bird", size=side)
        judge = classifier.load(classifier.CHOOSING)
        parts.append(composites.pick_parts(data.images, data.labels, "horse", judge))
        generator = torch.Generator().manual_seed(1)
        images, bare, _ = composites.compose(*parts[-1], generator)
        pictures.append(vae.resize(images, 32))
        made = composites.make(data.images, data.labels, data.classes, judge)
        assert made.images.shape[1:] == made.bodies.shape[1:] == (3, side, side)
    bodies = [vae.resize(bodies, 32) for bodies, _, _ in parts]
    assert bodies[0].sub(bodies[1]).abs().mean() < 0.02
    assert pictures[0].sub(pictures[1]).abs().mean() < 0.04


@pytest.mark.parametrize("size", LARGE)
def test_a_run_of_a_size(small_network, batches, tmp_path, size):
    run = tmp_path / "run"
    arguments = ["--data", str(batches), "--run", str(run), "--threads", "1"]
    arguments += ["--size", str(size), "--batch-size", "40"]
    assert train.main([*arguments, "--epochs", "2"]) == 0
    assert train.main([*arguments, "--epochs", "3", "--resume"]) == 0
    state = checkpoint.load(run / "last.pt")
    assert state["config"]["size"] == size
    scale = sampler.default_scale(size)
    for name in ("samples", "pegasus", "reconstructions"):
        with Image.open(run / f"{name}.png") as image:
            assert image.width == 8 * (size * scale + 4) + 4
    photo = tmp_path / "photo.png"
    Image.new("RGB", (200, 150), "brown").save(photo)
    out = tmp_path / "out.png"
    sample.main([str(run / "last.pt"), str(out), "--from", str(photo), "--n", "2", "--steps", "2"])
    with Image.open(out) as image:
        assert image.height == size * scale + 8
    source = sampler.load(run / "last.pt")
    data = datasets.load("auto", ",".join(source.classes), source.data, size)
    config = evaluate.EvaluateConfig(images=4, k=2, monte_carlo=5)
    likelihood = evaluate.measure_likelihoods(source, data, config)
    assert likelihood["bits_per_dim"] == pytest.approx(
        checkpoint.load(run / "last.pt")["history"][0]["bits_per_dim"], abs=1
    )
    assert evaluate.make_reference(data).images.shape[1:] == (3, size, size)


def test_a_forged_size_is_refused(small_network, batches, tmp_path, complaint):
    arguments = ["--data", str(batches), "--run", str(tmp_path / "run"), "--threads", "1"]
    assert train.main([*arguments, "--epochs", "1", "--arch", "mlp"]) == 0
    last = tmp_path / "run" / "last.pt"
    state = checkpoint.load(last)
    for size in (-32, 33, "32", None):
        state["config"]["size"] = size
        checkpoint.save(last, state)
        assert "size" in complaint(sample.main, last, tmp_path / "out.png")
