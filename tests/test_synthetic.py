"""The same seed gives the same pictures; no half a folder is ever left behind."""
from pegasus.cli import UserError
from pegasus.data import cifar10, datasets, synthetic
from pegasus.data.cifar10 import RECORD

import numpy as np
import pytest
from PIL import Image

FILES = [*cifar10.TRAIN, *cifar10.TEST]


def test_bytes_depend_on_the_seed_alone(tmp_path):
    for folder, seed in (("one", 3), ("same", 3), ("other", 4)):
        synthetic.write(tmp_path / folder, train=25, test=5, seed=seed)
    for name in FILES:
        one = (tmp_path / "one" / name).read_bytes()
        assert one == (tmp_path / "same" / name).read_bytes()
        assert one != (tmp_path / "other" / name).read_bytes()


def test_a_picture_does_not_depend_on_how_many_are_drawn(tmp_path):
    synthetic.write(tmp_path / "few", train=25, test=7, seed=1)
    synthetic.write(tmp_path / "more", train=52, test=12, seed=1)

    def split(folder, names):
        return b"".join((tmp_path / folder / name).read_bytes() for name in names)

    few_train = split("few", cifar10.TRAIN)
    few_test = split("few", cifar10.TEST)
    assert split("more", cifar10.TRAIN)[: 25 * RECORD] == few_train
    assert split("more", cifar10.TEST)[: 7 * RECORD] == few_test
    train = {few_train[i : i + RECORD] for i in range(0, len(few_train), RECORD)}
    test = {few_test[i : i + RECORD] for i in range(0, len(few_test), RECORD)}
    assert not train & test


def test_files_have_cifar10s_layout_and_the_promised_shares(tmp_path):
    synthetic.write(tmp_path / "set", train=52, test=10, seed=2)
    assert [path.name for path in tmp_path.iterdir()] == ["set"]
    assert sorted(path.name for path in (tmp_path / "set").iterdir()) == FILES
    sizes = [(tmp_path / "set" / name).stat().st_size for name in FILES]
    assert sizes == [RECORD * count for count in (10, 10, 10, 10, 12, 10)]
    orders = set()
    for name in FILES[:4] + FILES[5:]:
        _, labels = cifar10.read(tmp_path / "set" / name)
        assert labels.bincount()[[7, 2, 0]].tolist() == [4, 4, 2]
        orders.add(tuple(labels.tolist()))
    assert len(orders) > 1  # no one fixed order


def test_larger_pictures_are_the_same_ones_in_more_detail(tmp_path, monkeypatch):
    monkeypatch.setattr(synthetic, "photograph", lambda view, rng: Image.fromarray(
        view.clip(0, 255).astype(np.uint8)))  # no grain
    for index in range(10):
        large, small = (synthetic.picture(3, 0, index, side)[0] for side in (96, 32))
        assert large.size == (96, 96)
        away = np.asarray(large.reduce(3), float) - np.asarray(small, float)
        assert abs(away).mean() < 8
        edges = [abs(np.diff(np.asarray(image, float), axis=0)).max() for image in (large, small)]
        assert edges[0] > 0.6 * edges[1]  # not merely enlarged


def test_other_sizes_are_folders_of_pictures(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(synthetic.write, "__defaults__", (20, 10, 0, 32))
    data = datasets.load("synthetic", None, size=64)
    assert data.images.shape == (16, 3, 64, 64)  # without airplanes
    assert data.test_images.shape == (8, 3, 64, 64)
    assert data.classes == ("horse", "bird")
    assert datasets.is_synthetic(data.name)


def coarse_features(pictures):
    """Colors and vertical differences of 8x8 cells, and ones, (n, features)."""
    n = len(pictures)
    colors = pictures.reshape(n, 8, 4, 8, 4, 3).mean((2, 4)) / 255
    edges = abs(np.diff(pictures.mean(3), axis=1))[:, :28]
    edges = edges.reshape(n, 7, 4, 8, 4).mean((2, 4)) / 255
    return np.column_stack([colors.reshape(n, -1), edges.reshape(n, -1), np.ones(n)])


def test_classes_tell_apart():
    """By a linear classifier, fitted to 600 pictures, on 300 others."""
    labels = np.arange(900) % 3
    names = ("horse", "bird", "airplane")
    pictures = np.stack([
        np.asarray(synthetic.draw(names[label], np.random.default_rng([8, index])))
        for index, label in enumerate(labels)
    ])
    features = coarse_features(pictures)
    first = features[:600]
    ridge = first.T @ first + np.eye(features.shape[1])
    weights = np.linalg.solve(ridge, first.T @ np.eye(3)[labels[:600]])
    right = np.argmax(features[600:] @ weights, 1) == labels[600:]
    assert right.mean() > 0.7  # chance is a third
    assert min(right[labels[600:] == c].mean() for c in range(3)) > 0.55


@pytest.mark.parametrize("label", ["horse", "bird", "airplane"])
def test_pictures_of_a_class_vary(label):
    generators = [np.random.default_rng([5, i]) for i in range(200)]
    pictures = np.stack([np.asarray(synthetic.draw(label, rng)) for rng in generators])
    assert pictures.shape == (200, 32, 32, 3)
    assert pictures.dtype == np.uint8
    assert len({picture.tobytes() for picture in pictures}) == 200
    assert pictures.std(0).mean() > 35  # at one pixel, over the pictures
    assert pictures.reshape(200, -1).std(1).mean() > 30  # within a picture
    assert 100 < pictures.mean() < 170


def test_unknown_label_is_refused():
    with pytest.raises(KeyError):
        synthetic.draw("frog", np.random.default_rng(0))


@pytest.mark.parametrize(
    ("error", "raised", "words"),
    [
        (OSError("disk full"), UserError, r"can't be written \(disk full\)"),
        (KeyboardInterrupt(), KeyboardInterrupt, None),
    ],
)
def test_an_interrupted_write_leaves_nothing(tmp_path, monkeypatch, error, raised, words):
    write_batch = cifar10.write
    paths = []

    def failing(path, images, labels):
        paths.append(path)
        if len(paths) == 4:
            raise error
        write_batch(path, images, labels)

    monkeypatch.setattr(cifar10, "write", failing)
    with pytest.raises(raised, match=words):
        synthetic.write(tmp_path / "set", train=10, test=2)
    assert len(paths) == 4
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_holds_anything_is_not_touched(tmp_path):
    synthetic.write(tmp_path / "older", train=10, test=2)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").write_text("mine")
    for folder in (tmp_path / "older", tmp_path / "other"):
        before = {path.name: path.read_bytes() for path in folder.iterdir()}
        with pytest.raises(UserError, match="not empty"):
            synthetic.write(folder, train=10, test=2, seed=1)
        assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    (tmp_path / "empty").mkdir()
    synthetic.write(tmp_path / "empty", train=10, test=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "older", "other"]
    assert len(list((tmp_path / "empty").iterdir())) == 6
