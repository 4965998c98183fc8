import dataclasses
import json
import math
from types import SimpleNamespace

import checkpoint
import evaluate
import sample
import train
from options import Fault
from conditional import Given

import pytest
import torch
from conftest import png
from torch.distributions import MultivariateNormal, Normal


def linear(d=2, pixels=6, spread=1.0):
    """x = W z + b + noise: its density is known, and so is its posterior; `spread` 1 takes the best diagonal one."""
    g = torch.Generator().manual_seed(4)
    w, b = torch.randn(pixels, d, generator=g) * 0.7, torch.randn(pixels, generator=g)
    variance = torch.tensor(0.3)
    precision = torch.eye(d) + w.T @ w / variance
    mean = torch.linalg.inv(precision) @ w.T / variance

    def given(x):
        mu = (x.flatten(1) - b) @ mean.T
        logvar = (spread / precision.diagonal()).log().expand_as(mu)
        return [Given(torch.zeros(len(x)), mu, logvar, lambda z: z @ w.T + b)]

    model = SimpleNamespace(given=given, variance=variance)
    return model, MultivariateNormal(b, w @ w.T + variance * torch.eye(pixels))


def normal(x, xhat, variance):
    return Normal(xhat, variance.sqrt()).log_prob(x).sum(1)


def test_on_a_linear_gaussian_model_the_bound_is_the_exact_density():
    model, exact = linear(spread=1.5)
    x = exact.sample((40,))
    _, elbo, weights = evaluate.samples(model, x, 3000, seed=1, likelihood=normal)
    torch.testing.assert_close(elbo, weights)  # without a code
    bound = evaluate.importance_weighted(weights)
    torch.testing.assert_close(bound.mean(), exact.log_prob(x).double().mean(), rtol=0, atol=0.01)
    assert (bound >= weights.mean(0)).all()  # Jensen
    assert (weights.mean(0) < exact.log_prob(x) - 0.05).all()  # so that there was something to close
    fewer = [evaluate.importance_weighted(weights.view(-1, k, 40).transpose(0, 1)).mean() for k in (1, 10, 100, 3000)]
    assert fewer == sorted(fewer)


def test_binned_is_a_probability_of_bytes():
    """All 256 bytes add up to one, also far from the mean; against differences of CDFs in float64."""
    values = torch.arange(256) / 255
    for mean, variance in ((0.5, 0.01), (0.0, 1e-4), (0.9, 0.3)):
        xhat, v = torch.tensor(mean), torch.tensor(variance)
        log_p = torch.stack([evaluate.binned(value.view(1, 1), xhat.view(1, 1), v)[0] for value in values])
        assert log_p.double().exp().sum().item() == pytest.approx(1, abs=1e-5)
        cdf = Normal(xhat.double(), v.double().sqrt()).cdf
        edges = (torch.arange(257, dtype=torch.float64) - 0.5) / 255
        edges[0], edges[-1] = -math.inf, math.inf
        p = cdf(edges[1:]) - cdf(edges[:-1])
        clear = p > 1e-6
        torch.testing.assert_close(log_p[clear].double(), p[clear].log(), rtol=1e-4, atol=1e-4)
    far = evaluate.binned(torch.tensor([[0.0, 1.0]]), torch.tensor([[1.0, 0.0]]), torch.tensor(1e-3))
    assert torch.isfinite(far).all()
    assert far[0].item() == pytest.approx(-(1 / 1e-3) + 2 * math.log(1e-3**0.5) - 2 * 0.919, rel=5e-3)


def test_bounds_of_a_model():
    """Rate and distortion add up to the ELBO, and nearly to vae's bits/dim, which leaves out the bins."""
    torch.manual_seed(0)
    model = evaluate.vae.VAE(latent="8")
    model.variance.fill_(0.05)
    images = torch.randint(40, 216, (30, 3, 32, 32), dtype=torch.uint8)
    found = evaluate.bounds(model, images, 16, seed=3, batch_size=7)
    both = (found["rate"] + found["distortion"]) / (evaluate.vae.PIXELS * math.log(2))
    assert found["bits_per_dim_elbo"] == pytest.approx(both, abs=1e-3)
    assert found["bits_per_dim_iw"] < found["bits_per_dim_elbo"]
    with torch.no_grad():
        terms = model(images / 255, torch.tensor(1))
    bits = evaluate.vae.bits_per_dim(terms.sse, terms.rate, model.variance).mean().item()
    assert found["bits_per_dim_elbo"] == pytest.approx(bits, abs=0.01)


def test_nearest_and_called():
    features = torch.tensor([[0.0, 0], [3, 4], [9, 1]])
    assert evaluate.nearest(features, torch.tensor([[0.0, 1], [3, 4], [9, 9]])) == pytest.approx(1)
    assert evaluate.nearest(features, features) == 0
    p = torch.zeros(4, 10)
    p[[0, 1, 2, 3], [7, 7, 2, 5]] = 1
    assert evaluate.called(p, ("horse", "bird")) == {"horse": 0.5, "bird": 0.25, "other": 0.25}


def test_classes_take_turns():
    rows = [torch.arange(3) + 10 * c for c in range(2)]
    assert evaluate.balanced(rows, 5).tolist() == [0, 10, 1, 11, 2]
    images = torch.arange(9)
    labels = torch.tensor([0, 0, 0, 0, 0, 1, 1, 0, 1])
    assert evaluate.turns(images, labels, 100).tolist() == [0, 5, 1, 6, 2, 8]
    assert evaluate.turns(images, labels, 3).tolist() == [0, 5, 1]


@pytest.fixture(scope="module")
def last(batches, tmp_path_factory):
    folder = tmp_path_factory.mktemp("evaluate") / "run"
    train.main(["--data", str(batches), "--run", str(folder), "--epochs", "2", "--arch", "mlp"])
    return folder / "last.pt"


def test_the_report(last, capsys):
    argv = [str(last), "--n", "200", "--images", "20", "--k", "4"]
    evaluate.main([*argv, "--json"])
    figures = json.loads(capsys.readouterr().out)
    assert {"bits_per_dim_elbo", "bits_per_dim_iw", "rate", "distortion", "frechet", "frechet_floor", "called",
            "pegasus_share", "nearest", "settings"} <= figures.keys()
    assert figures["bits_per_dim_iw"] <= figures["bits_per_dim_elbo"]
    assert figures["frechet"] == figures["frechet_of"]["balanced"] > figures["frechet_floor"]
    assert figures["settings"]["frechet"]["judge_seed"] == 1
    modes = {"photographs", "reconstructions", "balanced", "pegasus", "horse", "bird", "prior"}
    assert modes == figures["called"].keys() == figures["nearest"].keys() == figures["pegasus_share"].keys()
    for shares in figures["called"].values():
        assert sum(shares.values()) == pytest.approx(1)
    assert figures["pegasus_share"]["photographs"] <= 0.03  # of 48 photographs one may be above
    assert figures["nearest"]["photographs"] > 0
    table = evaluate.table(figures)
    assert f"{figures['frechet']:.2f} (balanced, N = 200)" in table
    assert "K = 4" in table
    assert len(max(table.splitlines(), key=len)) <= 120


def test_export_and_what_it_refuses(last, tmp_path, complaint):
    evaluate.main([str(last), "--export", "5", str(tmp_path / "out")])
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [f"{i:05}.png" for i in range(5)]
    size, about = png(tmp_path / "out" / "00003.png")
    assert size == (32, 32)
    assert about["mode"] == "balanced"
    assert "N: got 4611686018427387904, wanted" in complaint(evaluate.main, last, "--export", 2**62, tmp_path / "out")
    assert "N: got many" in complaint(evaluate.main, last, "--export", "many", tmp_path / "out").replace("'", "")
    assert "is not empty" in complaint(evaluate.main, last, "--export", 3, tmp_path / "out")
    (tmp_path / "file").write_text("")
    assert "file" in complaint(evaluate.main, last, "--export", 3, tmp_path / "file")
    train.source.drawn.write(tmp_path / "other", train=50, test=20, seed=5)
    assert "is not what" in complaint(evaluate.main, last, "--data", tmp_path / "other")
    state = checkpoint.load(last)
    del state["data"]["folder"]
    checkpoint.save(tmp_path / "misfit.pt", state)
    assert "another version ('folder')" in complaint(evaluate.main, tmp_path / "misfit.pt")


def test_one_class_has_no_pegasus(batches, tmp_path, capsys):
    train.main([str(a) for a in ("--data", batches, "--run", tmp_path / "r", "--epochs", 1, "--arch", "mlp",
                                 "--classes", "horse", "--no-judge")])
    assert sample.load(tmp_path / "r" / "last.pt").judge is None
    evaluate.main([str(tmp_path / "r" / "last.pt"), "--n", "200", "--images", "3", "--k", "2", "--mode", "prior"])
    said = capsys.readouterr().out
    assert "(prior, N = 200)" in said and "pegasus  " not in said


def test_one_picture_has_no_distribution(last, batches, monkeypatch):
    data = train.source.load(str(batches), "horse,bird")
    few = dataclasses.replace(data, test_images=data.test_images[:1], test_labels=data.test_labels[:1])
    monkeypatch.setattr(evaluate.source, "load", lambda *_: few)
    monkeypatch.setattr(evaluate.judge, "get", lambda *_: pytest.fail("a judge was trained first"))
    with pytest.raises(Fault, match="small: 1 picture of horse, bird to train on, or to test; .* needs two of each"):
        evaluate.main([str(last)])
