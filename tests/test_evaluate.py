import dataclasses
import json
import math
from types import SimpleNamespace

import train
import vae
from pegasus import checkpoint, evaluate
from pegasus.cli import UserError
from pegasus.data import datasets, synthetic
from pegasus.drawing import sampler
from pegasus.models import classifier
from pegasus.models.variants import Component

import pytest
import torch
from conftest import png
from torch.distributions import MultivariateNormal, Normal


def linear_model(monkeypatch, d=2, pixels=6, spread=1.0):
    """Return x = W z + b + noise, of which density and posterior are known.

    spread: 1 takes the best diagonal posterior.
    """
    g = torch.Generator().manual_seed(4)
    w = torch.randn(pixels, d, generator=g) * 0.7
    b = torch.randn(pixels, generator=g)
    variance = torch.tensor(0.3)
    precision = torch.eye(d) + w.T @ w / variance
    mean = torch.linalg.inv(precision) @ w.T / variance

    def components(model, x):
        mu = (x.flatten(1) - b) @ mean.T
        logvar = (spread / precision.diagonal()).log().expand_as(mu)
        return [Component(torch.zeros(len(x)), mu, logvar, lambda z: z @ w.T + b)]

    monkeypatch.setattr(evaluate, "components", components)
    model = SimpleNamespace(variance=variance)
    return model, MultivariateNormal(b, w @ w.T + variance * torch.eye(pixels))


def log_normal(x, xhat, variance):
    return Normal(xhat, variance.sqrt()).log_prob(x).sum(1)


def test_on_a_linear_gaussian_model_the_bound_is_the_exact_density(monkeypatch):
    model, exact = linear_model(monkeypatch, spread=1.5)
    x = exact.sample((40,))
    log_p = exact.log_prob(x)
    samples = evaluate.posterior_samples(model, x, 3000, 1, log_normal)
    weights = samples.log_weight
    torch.testing.assert_close(samples.elbo, weights)  # without a code
    bound = evaluate.importance_weighted(weights)
    torch.testing.assert_close(bound.mean(), log_p.double().mean(), rtol=0, atol=0.01)
    assert (bound >= weights.mean(0)).all()  # Jensen
    assert (weights.mean(0) < log_p - 0.05).all()  # so that there was something to close
    fewer = []
    for k in (1, 10, 100, 3000):
        groups = weights.view(-1, k, 40).transpose(0, 1)
        fewer.append(evaluate.importance_weighted(groups).mean())
    assert fewer == sorted(fewer)


@pytest.mark.parametrize(("mean", "variance"), [(0.5, 0.01), (0.0, 1e-4), (0.9, 0.3)])
def test_the_binned_likelihood_is_a_probability_of_bytes(mean, variance):
    """All 256 add up to one; against differences of CDFs in float64."""
    values = torch.arange(256) / 255
    xhat = torch.tensor(mean)
    v = torch.tensor(variance)
    log_p = evaluate.binned_log_likelihood(values.view(-1, 1), xhat.view(1, 1), v)
    assert log_p.double().exp().sum().item() == pytest.approx(1, abs=1e-5)
    edges = (torch.arange(257, dtype=torch.float64) - 0.5) / 255
    edges[0] = -math.inf
    edges[-1] = math.inf
    cdf = Normal(xhat.double(), v.double().sqrt()).cdf(edges)
    p = cdf.diff()
    clear = p > 1e-6
    torch.testing.assert_close(log_p[clear].double(), p[clear].log(), rtol=1e-4, atol=1e-4)


def test_the_binned_likelihood_far_from_the_mean():
    x = torch.tensor([[0.0, 1.0]])
    far = evaluate.binned_log_likelihood(x, 1 - x, torch.tensor(1e-3))
    assert torch.isfinite(far).all()
    wanted = -(1 / 1e-3) + 2 * math.log(1e-3**0.5) - 2 * 0.919
    assert far[0].item() == pytest.approx(wanted, rel=5e-3)


def test_bounds_of_a_model():
    """Rate and distortion add up to the ELBO, and nearly to vae's bits/dim.

    That leaves out the bins.
    """
    torch.manual_seed(0)
    model = vae.VAE(latent=(8,))
    model.variance.fill_(0.05)
    images = torch.randint(40, 216, (30, 3, 32, 32), dtype=torch.uint8)
    figures = evaluate.bounds(model, images, 16, seed=3, batch_size=7)
    both = (figures["rate"] + figures["distortion"]) / (vae.IMAGE_VALUES * math.log(2))
    assert figures["bits_per_dim_elbo"] == pytest.approx(both, abs=1e-3)
    assert figures["bits_per_dim_iw"] < figures["bits_per_dim_elbo"]
    with torch.no_grad():
        terms = model(images / 255, torch.tensor(1))
    bits = vae.bits_per_dim(terms.sse, terms.rate, model.variance).mean().item()
    assert figures["bits_per_dim_elbo"] == pytest.approx(bits, abs=0.01)


def test_nearest_and_class_shares():
    features = torch.tensor([[0.0, 0], [3, 4], [9, 1]])
    others = torch.tensor([[0.0, 1], [3, 4], [9, 9]])
    assert evaluate.nearest(features, others) == pytest.approx(1)
    assert evaluate.nearest(features, features) == 0
    p = torch.zeros(4, 10)
    p[[0, 1, 2, 3], [7, 7, 2, 5]] = 1
    wanted = {"horse": 0.5, "bird": 0.25, "other": 0.25}
    assert evaluate.class_shares(p, ("horse", "bird")) == wanted


def test_classes_take_turns():
    rows = [torch.arange(3) + 10 * c for c in range(2)]
    assert evaluate.interleave(rows, 5).tolist() == [0, 10, 1, 11, 2]
    images = torch.arange(9)
    labels = torch.tensor([0, 0, 0, 0, 0, 1, 1, 0, 1])
    assert evaluate.balanced_subset(images, labels, 100).tolist() == [0, 5, 1, 6, 2, 8]
    assert evaluate.balanced_subset(images, labels, 3).tolist() == [0, 5, 1]


@pytest.fixture(scope="module")
def last(batches, tmp_path_factory):
    folder = tmp_path_factory.mktemp("evaluate") / "run"
    arguments = ["--data", str(batches), "--run", str(folder), "--epochs", "2"]
    train.main([*arguments, "--arch", "mlp"])
    return folder / "last.pt"


def test_the_report(last, capsys):
    arguments = [str(last), "--n", "200", "--images", "20", "--k", "4"]
    evaluate.main([*arguments, "--json"])
    figures = json.loads(capsys.readouterr().out)
    names = {"bits_per_dim_elbo", "bits_per_dim_iw", "rate", "distortion", "frechet"}
    names |= {"frechet_floor", "called", "pegasus_share", "nearest", "settings"}
    assert names <= figures.keys()
    assert figures["bits_per_dim_iw"] <= figures["bits_per_dim_elbo"]
    assert figures["frechet"] == figures["frechet_of"]["balanced"]
    assert figures["frechet"] > figures["frechet_floor"]
    assert figures["settings"]["frechet"]["judge_seed"] == 1
    sets = {"photographs", "reconstructions", "balanced"}
    sets |= {"pegasus", "horse", "bird", "prior"}
    for name in ("called", "nearest", "pegasus_share"):
        assert figures[name].keys() == sets
    for shares in figures["called"].values():
        assert sum(shares.values()) == pytest.approx(1)
    # of 48 photographs one may be above
    assert figures["pegasus_share"]["photographs"] <= 0.03
    assert figures["nearest"]["photographs"] > 0
    table = evaluate.table(figures)
    assert f"{figures['frechet']:.2f} (balanced, N = 200)" in table
    assert "K = 4" in table
    assert len(max(table.splitlines(), key=len)) <= 120


def test_export(last, tmp_path):
    evaluate.main([str(last), "--export", "5", str(tmp_path / "out")])
    names = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert names == [f"{i:05}.png" for i in range(5)]
    size, about = png(tmp_path / "out" / "00003.png")
    assert size == (32, 32)
    assert about["mode"] == "balanced"


def test_what_export_refuses(last, tmp_path, complaint):
    said = complaint(evaluate.main, last, "--export", 2**62, tmp_path / "out")
    assert "N: got 4611686018427387904, wanted" in said
    said = complaint(evaluate.main, last, "--export", "many", tmp_path / "out")
    assert "N: got 'many'" in said
    (tmp_path / "file").write_text("")
    said = complaint(evaluate.main, last, "--export", 3, tmp_path)
    assert "is not empty" in said
    assert "file" in complaint(evaluate.main, last, "--export", 3, tmp_path / "file")


def test_other_data_and_another_version_are_refused(last, tmp_path, complaint):
    synthetic.write(tmp_path / "other", train=50, test=20, seed=5)
    said = complaint(evaluate.main, last, "--data", tmp_path / "other")
    assert "is not what" in said
    state = checkpoint.load(last)
    del state["data"]["folder"]
    checkpoint.save(tmp_path / "misfit.pt", state)
    said = complaint(evaluate.main, tmp_path / "misfit.pt")
    assert "another version ('folder')" in said


def test_one_class_has_no_pegasus(batches, tmp_path, capsys):
    arguments = ["--data", str(batches), "--run", str(tmp_path / "r"), "--epochs", "1"]
    train.main([*arguments, "--arch", "mlp", "--classes", "horse", "--no-judge"])
    last = tmp_path / "r" / "last.pt"
    assert sampler.load(last).classifier is None
    capsys.readouterr()
    arguments = ["--n", "200", "--images", "3", "--k", "2", "--mode", "prior"]
    evaluate.main([str(last), *arguments])
    said = capsys.readouterr().out
    assert "(prior, N = 200)" in said
    assert "pegasus  " not in said


def test_guidance_is_of_classes_alone(monkeypatch):
    """Composed Pegasi take none, and refuse any."""
    configs = []
    monkeypatch.setattr(evaluate.sampling, "modes", lambda s: ("pegasus", "morph", "horse"))
    monkeypatch.setattr(evaluate.sampling, "sample", lambda s, c: configs.append(c))
    model = SimpleNamespace(classes=("horse", "bird"))
    for mode in ("pegasus", "horse"):
        evaluate.sample_mode(model, mode, 8, 0, guidance=3.0)
    assert [config.guidance for config in configs] == [2.0, 3.0]
    assert configs[0].seed != configs[1].seed


def test_one_image_has_no_distribution(last, batches, monkeypatch):
    data = datasets.load(str(batches), "horse,bird")
    test = (data.test_images[:1], data.test_labels[:1])
    few = dataclasses.replace(data, test_images=test[0], test_labels=test[1])
    monkeypatch.setattr(datasets, "load", lambda *_: few)
    reason = "a judge was trained first"
    monkeypatch.setattr(classifier, "get", lambda *_: pytest.fail(reason))
    wanted = "small: 1 picture of horse, bird to train on, or to test; .* two of each"
    with pytest.raises(UserError, match=wanted):
        evaluate.main([str(last)])
