"""The classifier, called the judge in files and options, and the measures by it."""
from pegasus import checkpoint
from pegasus.cli import UserError
from pegasus.data import cifar10
from pegasus.models import classifier
from pegasus.training.accelerate import accelerate

import pytest
import torch


@pytest.fixture(scope="module")
def dataset(batches):
    return cifar10.load_all(batches, cifar10.TRAIN)


@pytest.fixture(scope="module")
def state(dataset):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(classifier, "EPOCHS", 6)
        network = classifier.fit(*dataset, prepare=accelerate)
        return classifier.to_state(network, *dataset, 0)


def test_it_learns_and_is_small_enough_to_travel(state, dataset, tmp_path):
    """Synthetic horses, birds and airplanes; other classes are not found either."""
    images, labels = dataset
    network = classifier.from_state(state)
    probabilities, features = classifier.classify(network, images)
    correct = probabilities.argmax(1) == labels
    assert correct.double().mean() > 0.6  # six times 240 images
    assert features.shape == (len(images), classifier.FEATURES)
    torch.testing.assert_close(probabilities.sum(1), torch.ones(len(features)))
    checkpoint.save(tmp_path / "judge.pt", state)
    assert (tmp_path / "judge.pt").stat().st_size < 1.2e6


def test_an_image_and_its_mirror_image_are_classified_alike(state, dataset):
    network = classifier.from_state(state)
    images = dataset[0][:20]
    straight = classifier.classify(network, images, batch_size=7)
    mirrored = classifier.classify(network, images.flip(3) / 255)
    for a, b in zip(straight, mirrored, strict=True):
        torch.testing.assert_close(a, b)


def test_trained_once_and_kept_by_what_the_data_hold(
    state, own_batches, capsys, monkeypatch
):
    assert not list(own_batches.parent.glob("*judge*"))
    first = classifier.get(own_batches, seed=3)
    assert "once for this data" in capsys.readouterr().err
    (path,) = own_batches.parent.glob("*judge*-3.pt")
    assert classifier.get(own_batches, seed=3)["accuracy"] == first["accuracy"]
    assert capsys.readouterr().err == ""
    path.write_bytes(b"cut short")
    again = classifier.get(own_batches, seed=3)["weights"]
    assert all(tensor.equal(again[name]) for name, tensor in first["weights"].items())
    other = state["weights"]
    assert not all(tensor.equal(other[name]) for name, tensor in first["weights"].items())
    data = bytearray((own_batches / "test_batch.bin").read_bytes())
    data[5] ^= 1
    (own_batches / "test_batch.bin").write_bytes(data)
    classifier.get(own_batches, seed=3)
    assert len(list(own_batches.parent.glob("*judge*-3.pt"))) == 2
    monkeypatch.setattr(classifier, "fit", None)
    (own_batches / "test_batch.bin").write_bytes(data[:-1])
    with pytest.raises(UserError, match="test_batch.bin"):  # before minutes of training
        classifier.get(own_batches, seed=3)


def test_interrupted_it_keeps_nothing_and_global_random_numbers_stay(
    own_batches, monkeypatch
):
    before = torch.get_rng_state()
    shown = []

    def stop(line, last):
        shown.append(line)
        if len(shown) == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(classifier.cli, "show", stop)
    with pytest.raises(KeyboardInterrupt):
        classifier.get(own_batches)
    assert {path.name for path in own_batches.parent.iterdir()} == {own_batches.name}
    assert torch.get_rng_state().equal(before)


def test_where_it_cannot_be_kept_it_says_so_and_serves(own_batches, monkeypatch, capsys):

    def full(path, state):
        raise UserError("disk full")

    monkeypatch.setattr(checkpoint, "save", full)
    assert "accuracy" in classifier.get(own_batches)
    assert "not kept" in capsys.readouterr().err


def test_it_is_prepared_before_it_is_trained(dataset):
    """Here by nothing but zeros in the last layer: all classes are equally likely."""

    def prepare(network):
        assert network.training
        network.head.requires_grad_(False).weight.zero_()
        network.head.bias.zero_()

    network = classifier.fit(dataset[0][:40], dataset[1][:40], prepare=prepare)
    probabilities, _ = classifier.classify(network, dataset[0][:10])
    torch.testing.assert_close(probabilities, torch.full((10, 10), 0.1))


def test_pegasus_score():
    p = torch.zeros(3, 10)
    p[:, cifar10.CLASSES.index("horse")] = torch.tensor([0.5, 1.0, 0.25])
    p[:, cifar10.CLASSES.index("bird")] = torch.tensor([0.2, 0.0, 0.04])
    p[:, cifar10.CLASSES.index("airplane")] = torch.tensor([0.3, 0.0, 0.0])
    score = classifier.pegasus_score(p, ("horse", "bird"))
    torch.testing.assert_close(score, torch.tensor([0.5, 0.0, 0.1]))
    score = classifier.pegasus_score(p, ("horse", "airplane"))
    torch.testing.assert_close(score[0], torch.tensor(0.15).sqrt())


def test_frechet_distance_is_the_closed_form():
    """Against the eigenvalues of S_a S_b, and by hand where both are diagonal."""
    g = torch.Generator().manual_seed(0)
    mix_a, mix_b = torch.randn(2, 6, 6, generator=g, dtype=torch.float64)
    a = torch.randn(400, 6, generator=g, dtype=torch.float64) @ mix_a
    b = torch.randn(300, 6, generator=g, dtype=torch.float64) @ mix_b + 1
    cross = torch.linalg.eigvals(a.T.cov() @ b.T.cov()).real.sqrt().sum()
    gap = (a.mean(0) - b.mean(0)).square().sum()
    wanted = gap + a.T.cov().trace() + b.T.cov().trace() - 2 * cross
    assert classifier.frechet(a, b) == pytest.approx(wanted.item())
    assert classifier.frechet(a, a) == pytest.approx(0, abs=1e-9)
    corners = torch.tensor([[1.0, 1], [1, -1], [-1, 1], [-1, -1]])
    wanted = 2 + 2 * 4 * 4 / 3  # |gap|^2 + sum (3 s - s)^2
    assert classifier.frechet(corners, 3 * corners + 1) == pytest.approx(wanted)


def test_augmented_images_are_shifted_and_mirrored_ones():
    images = torch.randint(0, 256, (8, 3, 32, 32), dtype=torch.uint8)
    images[:, 0] = torch.arange(32) * 8  # red says the column
    x = classifier.augment(images, torch.Generator().manual_seed(1))
    assert x.shape == images.shape
    rising = (x[:, 0, :, 20] > x[:, 0, :, 10]).all(1)
    assert 0 < rising.sum() < 8
    straight = torch.where(rising[:, None, None, None], x, x.flip(3))
    inner = images[:, :, 4:28, 4:28] / 255
    shifts = [(i, j) for i in range(-2, 3) for j in range(-2, 3)]
    assert any(
        straight[:, :, 4 + i : 28 + i, 4 + j : 28 + j].equal(inner) for i, j in shifts
    )


def test_learning_rate_goes_up_and_down():
    rates = [classifier.learning_rate(p / 100) for p in range(101)]
    assert max(rates) == rates[20] == pytest.approx(classifier.PEAK_LR, rel=1e-3)
    assert rates[0] == rates[100] == pytest.approx(1e-4)
