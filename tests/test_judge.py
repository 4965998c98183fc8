import checkpoint
import judge
from options import Fault

import pytest
import torch


@pytest.fixture(scope="module")
def pictures(batches):
    return judge.cifar10.collect(batches, judge.cifar10.TRAIN, torch.arange(10))


@pytest.fixture(scope="module")
def state(pictures):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(judge, "EPOCHS", 6)
        return judge.to_state(judge.fit(*pictures), *pictures, 0)


def test_it_learns_and_is_small_enough_to_travel(state, pictures, tmp_path):
    """Drawn horses, birds and airplanes; classes that are not there are not seen either."""
    probabilities, features = judge.classify(judge.from_state(state), pictures[0])
    assert (probabilities.argmax(1) == pictures[1]).double().mean() > 0.6  # six times 240 pictures
    assert features.shape == (len(pictures[0]), judge.FEATURES)
    torch.testing.assert_close(probabilities.sum(1), torch.ones(len(features)))
    checkpoint.save(tmp_path / "judge.pt", state)
    assert (tmp_path / "judge.pt").stat().st_size < 1.2e6


def test_descent_is_torchs_sgd():
    weights = [torch.randn(4, 3), torch.randn(5)]
    twins = [weight.clone() for weight in weights]
    optimizer, momentum = torch.optim.SGD(twins, 0.1, 0.9, weight_decay=5e-4, nesterov=True), [0 * w for w in weights]
    for lr in (0.1, 0.2, 0.05):
        for weight, twin in zip(weights, twins, strict=True):
            weight.grad = twin.grad = torch.randn_like(weight)
        optimizer.param_groups[0]["lr"] = lr
        optimizer.step()
        judge.descend(weights, momentum, lr)
        assert all(weight.equal(twin) for weight, twin in zip(weights, twins, strict=True))


def test_a_picture_and_its_mirror_image_are_judged_alike(state, pictures):
    classifier, some = judge.from_state(state), pictures[0][:20]
    straight, mirrored = judge.classify(classifier, some, batch_size=7), judge.classify(classifier, some.flip(3) / 255)
    for a, b in zip(straight, mirrored, strict=True):
        torch.testing.assert_close(a, b)


def test_trained_once_and_kept_by_what_the_data_hold(state, own_batches, capsys, monkeypatch):
    assert not list(own_batches.parent.glob("*judge*"))
    first = judge.get(own_batches, seed=3)
    assert "once for this data" in capsys.readouterr().err
    path, = own_batches.parent.glob("*judge*-3.pt")
    assert judge.get(own_batches, seed=3)["accuracy"] == first["accuracy"]
    assert capsys.readouterr().err == ""
    path.write_bytes(b"cut short")
    again = judge.get(own_batches, seed=3)
    assert all(weight.equal(again["weights"][name]) for name, weight in first["weights"].items())
    assert not all(weight.equal(state["weights"][name]) for name, weight in first["weights"].items())
    data = bytearray((own_batches / "test_batch.bin").read_bytes())
    data[5] ^= 1
    (own_batches / "test_batch.bin").write_bytes(data)
    judge.get(own_batches, seed=3)
    assert len(list(own_batches.parent.glob("*judge*-3.pt"))) == 2
    monkeypatch.setattr(judge, "fit", None)
    (own_batches / "test_batch.bin").write_bytes(data[:-1])
    with pytest.raises(Fault, match="test_batch.bin"):  # before minutes of training
        judge.get(own_batches, seed=3)


def test_interrupted_it_keeps_nothing_and_the_runs_dice_stay(own_batches, monkeypatch):
    before, shown = torch.get_rng_state(), []

    def stop(line, last):
        shown.append(line)
        if len(shown) == 3:
            raise KeyboardInterrupt
    monkeypatch.setattr(judge.options, "show", stop)
    with pytest.raises(KeyboardInterrupt):
        judge.get(own_batches)
    assert {path.name for path in own_batches.parent.iterdir()} == {own_batches.name}
    assert torch.get_rng_state().equal(before)


def test_where_it_cannot_be_kept_it_says_so_and_serves(own_batches, monkeypatch, capsys):

    def full(path, state):
        raise judge.Fault("disk full")
    monkeypatch.setattr(checkpoint, "save", full)
    assert "accuracy" in judge.get(own_batches)
    assert "not kept" in capsys.readouterr().err


def test_pegasus_score():
    p = torch.zeros(3, 10)
    p[:, judge.cifar10.CLASSES.index("horse")] = torch.tensor([0.5, 1.0, 0.25])
    p[:, judge.cifar10.CLASSES.index("bird")] = torch.tensor([0.2, 0.0, 0.04])
    p[:, judge.cifar10.CLASSES.index("airplane")] = torch.tensor([0.3, 0.0, 0.0])
    torch.testing.assert_close(judge.pegasus_score(p, ("horse", "bird")), torch.tensor([0.5, 0.0, 0.1]))
    torch.testing.assert_close(judge.pegasus_score(p, ("horse", "airplane"))[0], torch.tensor(0.15).sqrt())


def test_frechet_distance_is_the_closed_form():
    """Against the eigenvalues of S_a S_b, and by hand where both are diagonal."""
    g = torch.Generator().manual_seed(0)
    a = torch.randn(400, 6, generator=g, dtype=torch.float64) @ torch.randn(6, 6, generator=g, dtype=torch.float64)
    b = torch.randn(300, 6, generator=g, dtype=torch.float64) @ torch.randn(6, 6, generator=g, dtype=torch.float64) + 1
    cross = torch.linalg.eigvals(a.T.cov() @ b.T.cov()).real.sqrt().sum()
    wanted = (a.mean(0) - b.mean(0)).square().sum() + a.T.cov().trace() + b.T.cov().trace() - 2 * cross
    assert judge.frechet(a, b) == pytest.approx(wanted.item())
    assert judge.frechet(a, a) == pytest.approx(0, abs=1e-9)
    corners = torch.tensor([[1.0, 1], [1, -1], [-1, 1], [-1, -1]])
    assert judge.frechet(corners, 3 * corners + 1) == pytest.approx(2 + 2 * 4 * 4 / 3)  # |gap|^2 + sum (3s - s)^2


def test_augmented_pictures_are_shifted_and_mirrored_ones():
    images = torch.randint(0, 256, (8, 3, 32, 32), dtype=torch.uint8)
    images[:, 0] = torch.arange(32) * 8  # red says the column
    x = judge.augment(images, torch.Generator().manual_seed(1))
    assert x.shape == images.shape
    rising = (x[:, 0, :, 20] > x[:, 0, :, 10]).all(1)
    assert 0 < rising.sum() < 8
    straight = torch.where(rising[:, None, None, None], x, x.flip(3))
    inner = images[:, :, 4:28, 4:28] / 255
    assert any(straight[:, :, 4 + i:28 + i, 4 + j:28 + j].equal(inner) for i in range(-2, 3) for j in range(-2, 3))


def test_learning_rate_goes_up_and_down():
    rates = [judge.learning_rate(p / 100) for p in range(101)]
    assert max(rates) == rates[20] == pytest.approx(judge.PEAK, rel=1e-3)
    assert rates[0] == rates[100] == pytest.approx(1e-4)
