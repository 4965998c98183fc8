import contextlib
import dataclasses
import io
import json
from types import SimpleNamespace

import train
import vae
from pegasus import checkpoint, device, evaluate
from pegasus.cli import UserError
from pegasus.data import datasets, synthetic
from pegasus.evaluate import EvaluateConfig, Judgement
from pegasus.models import composites

import pytest
import torch
from conftest import png


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


@pytest.fixture(scope="module")
def figures(last):
    """What --json prints."""
    arguments = [str(last), "--n", "500", "--images", "20", "--k", "4"]
    with contextlib.redirect_stdout(io.StringIO()) as out:
        evaluate.main([*arguments, "--monte-carlo", "50", "--json"])
    return json.loads(out.getvalue())


def test_figures_have_their_settings(figures):
    assert figures.keys() == {"settings", "likelihood", "sets"}
    assert figures["settings"]["judges"] == [1, 2, 3]
    assert figures["settings"]["classes"] == ["horse", "bird"]
    assert figures["likelihood"]["monte_carlo_samples"] == 50
    assert figures["sets"]["prior"]["n"] == 500


def test_bounds_are_in_order(figures):
    """Equation (1) is no bad estimate where the latents say as little as here."""
    values = figures["likelihood"]
    weighted = values["bits_per_dim_importance_weighted"]
    assert weighted < values["bits_per_dim"]
    assert values["bits_per_dim_monte_carlo"] == pytest.approx(weighted, abs=0.05)
    assert 1 <= values["effective_samples"] <= 50
    assert "bits_per_dim_learned_prior" not in values


def test_bits_per_dim_is_that_of_the_log(last):
    """Of all test pictures, with other noise."""
    model = evaluate.load_sampler(last)
    data = datasets.load("auto", ",".join(model.classes), model.data)
    config = EvaluateConfig(images=60, k=8, monte_carlo=2)
    values = evaluate.measure_likelihoods(model, data, config)
    assert values["images"] == len(data.test_images)
    logged = checkpoint.load(last)["history"][-1]
    assert values["bits_per_dim"] == pytest.approx(logged["bits_per_dim"], abs=0.01)
    rounding = 1e-2 if device.supports_bfloat16("cpu") else 1e-4
    assert values["rate"] == pytest.approx(logged["test_rate"], rel=rounding)
    assert values["squared_error"] == pytest.approx(logged["test_sse"], rel=0.02)


def test_each_set_has_its_measures(figures):
    spoiled = ["photographs", "10% copies", "two lines", "rebuilt"]
    drawn = ["pegasus", "horse", "bird", "prior", "all classes"]
    assert list(figures["sets"]) == spoiled + drawn
    for values in figures["sets"].values():
        assert sum(values["called"].values()) <= 1
    photographs = figures["sets"]["photographs"]
    assert photographs["power"] == pytest.approx([1, 1])
    assert photographs["near"] == pytest.approx(evaluate.NEAR, abs=0.03)
    floor = photographs["frechet"]["mean"]
    assert figures["sets"]["all classes"]["frechet"]["mean"] > floor


def test_spoiled_photographs_are_seen(figures):
    """Blur in the detail, by a model that has learned little; lines, as too much of it."""
    sets = figures["sets"]
    assert sets["10% copies"]["near"] > sets["photographs"]["near"] + 0.05
    assert max(sets["rebuilt"]["power"]) < 0.5
    assert sets["two lines"]["power"][1] > 1.5


def test_copies_are_every_tenth_of_each_class():
    test = torch.zeros(40, 1, 1, 3)
    training = torch.arange(1.0, 41)[:, None, None, None].expand(40, 1, 1, 3)
    mixed = evaluate.add_copies(test, training, classes=2)
    copied = mixed.amax((1, 2, 3))
    assert copied.nonzero()[:, 0].tolist() == [0, 1, 20, 21]
    assert copied[copied > 0].tolist() == [1, 2, 3, 4]


def test_copies_are_seen():
    """One draw in ten from the training set, the others elsewhere."""
    g = torch.Generator().manual_seed(0)
    training, test, draws = torch.randn(3, 1000, 112, generator=g)
    near = evaluate.measures.nearest_distances(test, training).quantile(0.05).item()
    reference = SimpleNamespace(training=[training], near=[near])
    share = evaluate.near_share(reference, [Judgement(None, draws)])
    assert share == pytest.approx(0.05, abs=0.02)
    draws[::10] = training[::10] + 0.1 * torch.randn(100, 112, generator=g)
    copied = evaluate.near_share(reference, [Judgement(None, draws)])
    assert copied == pytest.approx(0.1 + 0.9 * share, abs=0.02)


def test_photographs_of_a_class_are_what_its_draws_are_compared_with(batches):
    data = datasets.load(str(batches), "horse,bird")
    reference = evaluate.make_reference(data)
    assert len(reference.rows(None)) == len(reference.images)
    for label in (0, 1):
        rows = reference.rows(label)
        wanted = vae.from_bytes(data.test_images[data.test_labels == label][: len(rows)])
        assert reference.images[rows].equal(wanted)
        features = [said.features[rows] for said in reference.judgements]
        same = [Judgement(None, rows) for rows in features]
        mean = evaluate.frechet_figures(reference, same, label)["mean"]
        assert mean == pytest.approx(0, abs=1e-6)
        assert evaluate.frechet_figures(reference, same, 1 - label)["mean"] > 1


def test_classes_that_no_judge_knows_are_called_nothing():
    p = torch.eye(10)[[7, 2]]
    judgements = [Judgement(p, None)]
    labels = torch.tensor([0, 1])
    assert evaluate.called_shares(judgements, ("horse", "tabby"), labels) == {"horse": 1.0}
    assert evaluate.called_shares(judgements, ("tabby", "bird")) == {"bird": 0.5}


def test_accuracy_and_called_shares_are_means_over_judges():
    p = torch.zeros(2, 4, 10)
    p[0, [0, 1, 2, 3], [7, 7, 2, 5]] = 1
    p[1, [0, 1, 2, 3], [7, 2, 2, 5]] = 1
    judgements = [Judgement(said, None) for said in p]
    classes = ("horse", "bird")
    assert evaluate.called_shares(judgements, classes) == {"horse": 3 / 8, "bird": 3 / 8}
    labels = torch.tensor([0, 0, 1, 1])
    accuracy = evaluate.called_shares(judgements, classes, labels)
    assert accuracy == {"horse": 3 / 4, "bird": 1 / 2}


def test_the_table(figures):
    table = evaluate.table(figures)
    lines = table.splitlines()
    distance = figures["sets"]["all classes"]["frechet"]["mean"]
    (row,) = [line for line in lines if line.startswith("all classes ")]
    assert f" {distance:.2f} " in row
    (heads,) = [line for line in lines if line.endswith("called horse  called bird")]
    assert len(row) == len(heads)
    assert f"{figures['likelihood']['bits_per_dim']:.3f}  under N(0, I)" in table
    assert "4 samples of q(z|x)" in table
    assert "pegasus, horse, bird, prior  drawn as" in table
    assert len(max(table.splitlines(), key=len)) <= 100
    for name in figures["sets"]:
        assert f"\n{name} " in table


def test_of_synthetic_pictures_the_table_says_that_judges_know_photographs(figures):
    settings = figures["settings"] | {"data": "synthetic"}
    said = evaluate.table(figures | {"settings": settings})
    assert "judges learned from photographs" in said
    assert "judges learned from photographs" not in evaluate.table(figures)


def test_export(last, tmp_path):
    evaluate.main([str(last), "--export", "5", str(tmp_path / "out")])
    names = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert names == [f"{i:05}.png" for i in range(5)]
    size, about = png(tmp_path / "out" / "00003.png")
    assert size == (32, 32)
    assert about["mode"] == "classes in turn"


def test_what_export_refuses(last, tmp_path, complaint):
    said = complaint(evaluate.main, last, "--export", 2**62, tmp_path / "out")
    assert "N: got 4611686018427387904, wanted" in said
    said = complaint(evaluate.main, last, "--export", "many", tmp_path / "out")
    assert "N: got 'many'" in said
    (tmp_path / "file").write_text("")
    said = complaint(evaluate.main, last, "--export", 3, tmp_path)
    assert "is not empty" in said
    assert "file" in complaint(evaluate.main, last, "--export", 3, tmp_path / "file")


def test_other_data_are_told(last, tmp_path, capsys, monkeypatch):
    """As where CIFAR-10 was packed anew, of which the program's own checkpoint is."""
    synthetic.write(tmp_path / "other", train=50, test=20, seed=5)
    monkeypatch.setattr(evaluate, "report", lambda _, data, *rest: {"data": data.name})
    evaluate.main([str(last), "--data", str(tmp_path / "other"), "--json"])
    said = capsys.readouterr()
    assert "is not what the checkpoint was trained on" in said.err
    assert json.loads(said.out) == {"data": "other"}


def test_guidance_that_draws_black_is_refused(complaint):
    assert "at most 100" in complaint(evaluate.main, "x.pt", "--guidance", "1e38")


def test_another_version_is_refused(last, tmp_path, complaint):
    state = checkpoint.load(last)
    del state["data"]["folder"]
    checkpoint.save(tmp_path / "misfit.pt", state)
    said = complaint(evaluate.main, tmp_path / "misfit.pt")
    assert "another network or version ('folder')" in said


def test_one_class_has_no_pegasus(batches, tmp_path, capsys):
    arguments = ["--data", str(batches), "--run", str(tmp_path / "r"), "--epochs", "1"]
    train.main([*arguments, "--arch", "mlp", "--classes", "horse"])
    last = tmp_path / "r" / "last.pt"
    capsys.readouterr()
    evaluate.main([str(last), "--n", "500", "--images", "3", "--k", "2"])
    said = capsys.readouterr().out
    assert "all classes  " in said
    assert "pegasus  " not in said


def test_each_mode_has_noise_of_its_own(monkeypatch):
    configs = []
    monkeypatch.setattr(evaluate.sampling, "modes", lambda s: ("pegasus", "morph", "horse"))
    monkeypatch.setattr(evaluate.sampling, "sample", lambda s, c: configs.append(c))
    for mode in ("pegasus", "horse"):
        evaluate.draw(None, mode, 8, 0, guidance=3.0)
    assert [config.guidance for config in configs] == [3.0, 3.0]
    assert configs[0].seed != configs[1].seed


def test_a_detector_tells_composites_from_their_bodies(batches, monkeypatch):
    """Also of photographs that it did not learn from."""
    monkeypatch.setattr(composites, "BODIES", 0.5)
    data = datasets.load(str(batches), "horse,bird")
    model = SimpleNamespace(reconstruct=lambda images: images)
    pegasi = SimpleNamespace(model=model, classes=data.classes, has_pegasi=True)
    detector = evaluate.make_detector(pegasi, data)
    assert detector.found > 0.8
    assert detector.mistaken < 0.2
    assert evaluate.make_detector(SimpleNamespace(has_pegasi=False), data) is None


def test_few_images_have_no_distribution(batches):
    data = datasets.load(str(batches), "horse,bird")
    few = dataclasses.replace(
        data, test_images=data.test_images[:1], test_labels=data.test_labels[:1]
    )
    wanted = "small: 1 test pictures, as many of each of horse, bird; .* use other data"
    with pytest.raises(UserError, match=wanted):
        evaluate.make_reference(few)
