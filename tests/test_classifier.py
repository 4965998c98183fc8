"""The judges: those that travel with the program, and how others are made."""
import os
import re
from pathlib import Path

from pegasus.cli import UserError
from pegasus.data import cifar10
from pegasus.models import classifier

import pytest
import torch
from conftest import equal


@pytest.fixture(scope="module")
def dataset(batches):
    return cifar10.load_all(batches, cifar10.TRAIN)


@pytest.fixture(scope="module")
def state(dataset):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(classifier, "EPOCHS", 6)
        return classifier.to_state(classifier.fit(*dataset), *dataset, 0)


def test_it_learns_and_is_small_enough_to_travel(state, dataset, tmp_path):
    """Synthetic horses, birds and airplanes; other classes are not found either."""
    images, labels = dataset
    network = classifier.from_state(state)
    probabilities, features = classifier.classify(network, images)
    correct = probabilities.argmax(1) == labels
    assert correct.double().mean() > 0.6  # six times 240 images
    assert features.shape == (len(images), classifier.FEATURES)
    torch.testing.assert_close(probabilities.sum(1), torch.ones(len(features)))
    torch.save(state, tmp_path / "judge.pt")
    assert (tmp_path / "judge.pt").stat().st_size < 1.2e6


def test_an_image_and_its_mirror_image_are_classified_alike(state, dataset):
    network = classifier.from_state(state)
    images = dataset[0][:20]
    straight = classifier.classify(network, images, batch_size=7)
    mirrored = classifier.classify(network, images.flip(3) / 255)
    for a, b in zip(straight, mirrored, strict=True):
        torch.testing.assert_close(a, b)


def test_four_different_judges_travel_with_the_program(dataset):
    """That of seed 0 chooses, the others report."""
    assert (classifier.CHOOSING, *classifier.REPORTING) == (0, 1, 2, 3)
    opinions = []
    for seed in range(4):
        path = classifier.FOLDER / f"{seed}.pt"
        state = torch.load(path, weights_only=True)
        assert state["seed"] == seed
        assert 0.84 < state["accuracy"] < 0.9
        assert path.stat().st_size < 1.2e6
        judge = classifier.load(seed)
        assert classifier.load(seed) is judge
        assert not judge.training
        probabilities, _ = classifier.classify(judge, dataset[0][:50])
        for other in opinions:
            assert not probabilities.allclose(other, atol=0.05)
        opinions.append(probabilities)


def test_the_judges_accuracy_on_photographs():
    folder = os.environ["REAL_CIFAR10_DIR"]
    if not folder:
        pytest.skip("CIFAR10_DIR names no real batches")
    images, labels = cifar10.load_all(Path(folder), cifar10.TEST)
    images = images[:2000]
    labels = labels[:2000]
    for seed in range(4):
        state = torch.load(classifier.FOLDER / f"{seed}.pt", weights_only=True)
        probabilities, _ = classifier.classify(classifier.from_state(state), images)
        correct = (probabilities.argmax(1) == labels).double().mean()
        assert correct.item() == pytest.approx(state["accuracy"], abs=0.025)


@pytest.fixture(scope="module")
def ten_classes(batches, tmp_path_factory):
    """A folder of batches, ten pictures of each with another label: it takes all classes."""
    folder = tmp_path_factory.mktemp("ten")
    for name in (*cifar10.TRAIN, *cifar10.TEST):
        images, labels = cifar10.read(batches / name)
        labels[:10] = torch.arange(10)
        cifar10.write(folder / name, images, labels)
    return folder


@pytest.fixture
def own_folder(tmp_path, monkeypatch):
    """An empty folder of judges."""
    folder = tmp_path / "judges"
    folder.mkdir()
    monkeypatch.setattr(classifier, "FOLDER", folder)
    classifier.load.cache_clear()
    yield folder
    classifier.load.cache_clear()


def make_judge(batches, *argv):
    classifier.main([str(word) for word in ("--data", batches, *argv)])


def read_weights(path):
    """The weights in a judge's file, checked."""
    state = torch.load(path, weights_only=True)
    classifier.from_state(state)
    return state["weights"]


def test_a_missing_judge_names_the_command_that_makes_it(own_folder, ten_classes):
    with pytest.raises(UserError, match="2.pt: no such judge") as missing:
        classifier.load(2)
    module, options = re.search(r"python -m (\S+) (.*) makes it", str(missing.value)).groups()
    assert module == classifier.__name__
    make_judge(ten_classes, *options.split())
    assert [path.name for path in own_folder.iterdir()] == ["2.pt"]
    made = read_weights(own_folder / "2.pt")
    loaded = classifier.load(2).state_dict()
    assert all(tensor.equal(made[name].to(tensor)) for name, tensor in loaded.items())


def test_a_judge_is_a_function_of_the_data_and_the_seed(own_folder, ten_classes, tmp_path, capsys):
    """And not of global random numbers."""
    first = tmp_path / "first.pt"
    again = tmp_path / "again.pt"
    other = tmp_path / "other.pt"
    make_judge(ten_classes, "--seed", 3, "--out", first)
    said = capsys.readouterr().out
    torch.manual_seed(8)
    make_judge(ten_classes, "--seed", 3, "--out", again)
    make_judge(ten_classes, "--seed", 4, "--out", other)
    assert list(own_folder.iterdir()) == []
    wanted = read_weights(first)
    assert equal(read_weights(again), wanted)
    assert not read_weights(other)["head.weight"].equal(wanted["head.weight"])
    images, labels = cifar10.load_all(ten_classes, cifar10.TEST)
    state = torch.load(first, weights_only=True)
    probabilities, _ = classifier.classify(classifier.from_state(state), images)
    correct = (probabilities.argmax(1) == labels).sum().item()
    assert (state["seed"], state["accuracy"]) == (3, correct / len(labels))
    assert said == f"{first}: {correct / len(labels):.1%} of the test photographs right\n"


def test_wrong_data_show_before_training(own_batches, own_folder, monkeypatch):
    monkeypatch.setattr(classifier, "fit", None)
    with pytest.raises(UserError, match="no pictures of some of CIFAR-10's ten classes"):
        make_judge(own_batches)
    data = (own_batches / "test_batch.bin").read_bytes()
    (own_batches / "test_batch.bin").write_bytes(data[:-1])
    with pytest.raises(UserError, match="test_batch.bin"):
        make_judge(own_batches)


def interrupt_training(monkeypatch):
    shown = []

    def show(line, last):
        shown.append(line)
        if len(shown) % 3 == 0:
            raise KeyboardInterrupt

    monkeypatch.setattr(classifier.streams, "show", show)


def interrupt_saving(monkeypatch):
    save = torch.save

    def interrupted(*args):
        save(*args)
        raise KeyboardInterrupt

    monkeypatch.setattr(torch, "save", interrupted)


@pytest.mark.parametrize("interrupt", [interrupt_training, interrupt_saving])
def test_an_interrupted_one_leaves_no_file(own_folder, ten_classes, monkeypatch, interrupt):
    """And what was there before stays."""
    (own_folder / "1.pt").write_bytes(b"before")
    interrupt(monkeypatch)
    for seed in (0, 1):
        with pytest.raises(KeyboardInterrupt):
            make_judge(ten_classes, "--seed", seed)
    assert [path.name for path in own_folder.iterdir()] == ["1.pt"]
    assert (own_folder / "1.pt").read_bytes() == b"before"


def test_global_random_numbers_stay(dataset, monkeypatch):
    before = torch.get_rng_state()
    classifier.fit(*dataset)
    assert torch.get_rng_state().equal(before)
    interrupt_training(monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        classifier.fit(*dataset)
    assert torch.get_rng_state().equal(before)


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
