"""drawn.py: the same seed gives the same pictures, the classes tell apart, and half a folder is never left behind."""

import cifar10
import drawn
from options import Fault
from cifar10 import RECORD

import numpy as np
import pytest


def test_bytes_depend_on_the_seed_alone(tmp_path):
    for folder, seed in (("one", 3), ("same", 3), ("other", 4)):
        drawn.write(tmp_path / folder, train=25, test=5, seed=seed)
    for name in drawn.FILES:
        one = (tmp_path / "one" / name).read_bytes()
        assert one == (tmp_path / "same" / name).read_bytes()
        assert one != (tmp_path / "other" / name).read_bytes()


def test_a_picture_does_not_depend_on_how_many_are_drawn(tmp_path):
    drawn.write(tmp_path / "few", train=25, test=7, seed=1)
    drawn.write(tmp_path / "more", train=52, test=12, seed=1)

    def split(folder, names):
        return b"".join((tmp_path / folder / name).read_bytes() for name in names)

    assert split("more", drawn.FILES[:5])[: 25 * RECORD] == split("few", drawn.FILES[:5])
    assert split("more", drawn.FILES[5:])[: 7 * RECORD] == split("few", drawn.FILES[5:])
    assert split("few", drawn.FILES[:5])[: 7 * RECORD] != split("few", drawn.FILES[5:])


def test_files_have_cifar10s_layout_and_the_promised_shares(tmp_path):
    drawn.write(tmp_path / "set", train=52, test=10, seed=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["set"]
    assert sorted(path.name for path in (tmp_path / "set").iterdir()) == drawn.FILES
    sizes = [(tmp_path / "set" / name).stat().st_size for name in drawn.FILES]
    assert sizes == [RECORD * count for count in (10, 10, 10, 10, 12, 10)]
    for name in drawn.FILES[:4] + drawn.FILES[5:]:
        assert cifar10.read(tmp_path / "set" / name)[1].bincount()[[7, 2, 0]].tolist() == [4, 4, 2]
    orders = {tuple(cifar10.read(tmp_path / "set" / name)[1].tolist()) for name in drawn.FILES[:4]}
    assert len(orders) > 1  # no one fixed order


def test_classes_tell_apart():
    labels = np.arange(900) % 3
    names = ("horse", "bird", "airplane")
    drawings = [drawn.draw(names[label], np.random.default_rng([8, index])) for index, label in enumerate(labels)]
    pictures = np.stack([np.asarray(drawing) for drawing in drawings])
    coarse = pictures.reshape(900, 8, 4, 8, 4, 3).mean((2, 4)) / 255  # 8x8 colours
    edges = abs(np.diff(pictures.mean(3), axis=1))[:, :28].reshape(900, 7, 4, 8, 4).mean((2, 4)) / 255
    features = np.column_stack([coarse.reshape(900, -1), edges.reshape(900, -1), np.ones(900)])
    first, rest = features[:600], features[600:]
    weights = np.linalg.solve(first.T @ first + np.eye(features.shape[1]), first.T @ np.eye(3)[labels[:600]])
    right = np.argmax(rest @ weights, 1) == labels[600:]
    assert right.mean() > 0.7  # chance is a third
    assert min(right[labels[600:] == c].mean() for c in range(3)) > 0.55


@pytest.mark.parametrize("label", ["horse", "bird", "airplane"])
def test_pictures_of_a_class_vary(label):
    pictures = np.array([np.asarray(drawn.draw(label, np.random.default_rng([5, i]))) for i in range(200)])
    assert pictures.shape == (200, 32, 32, 3)
    assert pictures.dtype == np.uint8
    assert len({picture.tobytes() for picture in pictures}) == 200
    assert pictures.std(0).mean() > 35  # at one pixel, over the pictures
    assert pictures.reshape(200, -1).std(1).mean() > 30  # within a picture
    assert 100 < pictures.mean() < 170


def test_unknown_label_is_refused():
    with pytest.raises(KeyError):
        drawn.draw("frog", np.random.default_rng(0))


@pytest.mark.parametrize(("error", "told"), [
    (OSError("disk full"), pytest.raises(Fault, match=r"can't be written \(disk full\)")),
    (KeyboardInterrupt(), pytest.raises(KeyboardInterrupt))])
def test_an_interrupted_write_leaves_nothing(tmp_path, monkeypatch, error, told):
    whole, calls = cifar10.write, []

    def failing(path, images, labels):
        calls.append(path)
        if len(calls) == 4:
            raise error
        whole(path, images, labels)

    monkeypatch.setattr(cifar10, "write", failing)
    with told:
        drawn.write(tmp_path / "set", train=10, test=2)
    assert len(calls) == 4
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_holds_anything_is_not_touched(tmp_path):
    drawn.write(tmp_path / "older", train=10, test=2)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").write_text("mine")
    for folder in (tmp_path / "older", tmp_path / "other"):
        before = {path.name: path.read_bytes() for path in folder.iterdir()}
        with pytest.raises(Fault, match="not empty"):
            drawn.write(folder, train=10, test=2, seed=1)
        assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    (tmp_path / "empty").mkdir()
    drawn.write(tmp_path / "empty", train=10, test=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "older", "other"]
    assert len(list((tmp_path / "empty").iterdir())) == 6
