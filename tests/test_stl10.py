"""STL-10's files, of its layout: reading, downloading as far as needed, training on them."""
import hashlib
import io
import tarfile

import train
from pegasus import checkpoint
from pegasus.cli import UserError
from pegasus.data import datasets, stl10
from pegasus.data.stl10 import CLASSES, FILES, SIDE

import numpy as np
import pytest
import torch
from PIL import Image
from test_download import Server, flip_bit

HORSE, BIRD = CLASSES.index("horse"), CLASSES.index("bird")


def part_files(part: str, labels: np.ndarray) -> dict[str, bytes]:
    """Files of pictures with labels from 0: one color a class, a white bar at the top and a
    black one at the left.
    """
    numbers = labels.astype(np.uint8) + 1
    images = np.empty((len(labels), 3, SIDE, SIDE), np.uint8)
    images[:] = (numbers * 20).reshape(-1, 1, 1, 1)
    images[:, 0] += 5
    images[:, :, :10] = 255
    images[:, :, :, :10] = 0
    columns = images.transpose(0, 1, 3, 2)
    return {f"{part}_y.bin": numbers.tobytes(), f"{part}_X.bin": columns.tobytes()}


@pytest.fixture(scope="module")
def files() -> dict[str, bytes]:
    """Twelve pictures of each class to train on, four to test."""
    return part_files("train", np.arange(120) % 10) | part_files("test", np.arange(40) % 10)


@pytest.fixture
def folder(files, tmp_path):
    place = tmp_path / "stl"
    place.mkdir()
    for name, content in files.items():
        (place / name).write_bytes(content)
    return place


def test_columns_become_rows(folder):
    images, labels = stl10.load(folder, ("horse", "bird"), "train")
    assert labels.bincount().tolist() == [12, 12]
    horse = images[labels == 0][0]
    level = 20 * (HORSE + 1)
    assert horse[:, 50, 50].tolist() == [level + 5, level, level]
    assert horse[:, 5, 50].tolist() == [255, 255, 255]  # the bar at the top
    assert horse[:, 50, 5].tolist() == [0, 0, 0]  # the one at the left
    for size in (96, 48, 32):
        data = datasets.load(str(folder), None, size=size)
        assert data.images.shape == (24, 3, size, size)
        assert data.test_images.shape == (8, 3, size, size)
        middle = data.images[data.labels == 1][0, :, size // 2, size // 2]
        assert middle.tolist() == [20 * (BIRD + 1) + 5, *[20 * (BIRD + 1)] * 2]


def test_a_class_as_large_as_in_the_original(tmp_path):
    """500 horses to train on and 800 to test, in any order among others."""
    rng = np.random.default_rng(0)
    for part, n in (("train", 500), ("test", 800)):
        labels = rng.permutation([HORSE] * n + list(range(10)))
        for name, content in part_files(part, labels).items():
            (tmp_path / name).write_bytes(content)
    data = datasets.load(str(tmp_path), "horse,bird", size=96)
    assert data.labels.bincount().tolist() == [501, 1]
    assert data.test_labels.bincount().tolist() == [801, 1]
    level = 20 * (HORSE + 1)
    for images, labels in ((data.images, data.labels), (data.test_images, data.test_labels)):
        assert (images[labels == 0, :, 50, 50] == torch.tensor([level + 5, level, level])).all()
        assert (images[labels == 1, 1, 50, 50] == 20 * (BIRD + 1)).all()
        assert (images[:, :, 5, 50] == 255).all() and (images[:, :, 50, 5] == 0).all()


@pytest.mark.parametrize("size, shown", [(48, 144), (96, 96)])
def test_a_run_on_it(size, shown, small_network, folder, tmp_path, capsys):
    run = tmp_path / "run"
    arguments = ["--data", str(folder), "--run", str(run), "--threads", "1"]
    arguments += ["--size", str(size), "--epochs", "2", "--batch-size", "12"]
    assert train.main(arguments) == 0
    assert checkpoint.load(run / "last.pt")["classes"] == ["horse", "bird"]
    with Image.open(run / "reconstructions.png") as image:
        first = image.crop((4, 4, 4 + shown, 4 + shown))
    assert first.getpixel((shown // 2, 5)) == (255, 255, 255)  # the bar at the top
    assert first.getpixel((5, shown // 2)) == (0, 0, 0)


def fault(folder, names=("horse", "bird")):
    with pytest.raises(UserError) as caught:
        datasets.load(str(folder), ",".join(names))
    return str(caught.value)


def test_faults_are_told(folder):
    assert "wanted one or more different ones of airplane, bird, car" in fault(folder, ("frog",))
    whole = (folder / "train_y.bin").read_bytes()
    (folder / "train_y.bin").write_bytes(whole[:-1])
    assert "train_X.bin: got 3,317,760 bytes for 119 labels, wanted 27,648" in fault(folder)
    (folder / "train_y.bin").write_bytes(whole[:7] + b"\x0b" + whole[8:])
    assert "train_y.bin: record 7 has label 11, wanted 1 to 10; is this STL-10?" in fault(folder)
    (folder / "train_y.bin").write_bytes(b"\x01" * 120)
    assert "no picture of horse, bird in train_X.bin" in fault(folder)
    (folder / "test_X.bin").unlink()
    assert "no test_X.bin; download" in fault(folder)


# ---- the download ----


def archive(files: dict[str, bytes]) -> bytes:
    """The files in the archive's order, and much behind them that nobody wants."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w:gz", compresslevel=0) as tar:
        for name in [*FILES, "unlabeled_X.bin"]:
            content = files.get(name, bytes(20_000_000))
            member = tarfile.TarInfo(f"stl10_binary/{name}")
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return out.getvalue()


@pytest.fixture
def body(files, monkeypatch) -> bytes:
    """An archive of small files that a download takes for STL-10's."""
    wanted = {name: (len(files[name]), hashlib.md5(files[name]).hexdigest()) for name in FILES}
    monkeypatch.setattr(stl10, "FILES", wanted)
    return archive(files)


def test_a_download_ends_before_what_has_no_labels(files, body, tmp_path, monkeypatch, capsys):
    taken = []

    class Response(io.BytesIO):
        def close(self):
            taken.append(self.tell())
            super().close()

    monkeypatch.setattr(stl10, "connect", lambda *_: Response(body))
    stl10.main([str(tmp_path / "a" / "data")])
    assert taken[0] < len(body) - 15_000_000
    place = tmp_path / "a" / "data" / "stl10_binary"
    assert capsys.readouterr().out == f"{place}\n"
    assert {path.name: path.read_bytes() for path in place.iterdir()} == files


def test_a_download_comes_from_a_server_and_only_once(files, body, tmp_path, monkeypatch):
    with Server(body) as url:
        monkeypatch.setenv("PEGASUS_STL10_URL", url)
        place = stl10.complete_folder(tmp_path / "data")
    assert {path.name: path.read_bytes() for path in place.iterdir()} == files
    assert stl10.complete_folder(tmp_path / "data") == place  # the server has gone


@pytest.mark.parametrize(("change", "words"), [
    (lambda body: body[: len(body) // 10], "broke off"),
    (lambda body: flip_bit(body, 5_000), "test_X.bin has MD5"),
    (lambda body: b"<!DOCTYPE html>", "broke off (not a gzip file)"),
])
def test_a_bad_archive_leaves_nothing(body, tmp_path, monkeypatch, change, words):
    with Server(change(body)) as url:
        monkeypatch.setenv("PEGASUS_STL10_URL", url)
        with pytest.raises(UserError) as caught:
            stl10.download(tmp_path / "data")
    assert words in str(caught.value) and "nothing was kept" in str(caught.value)
    assert not list((tmp_path / "data").iterdir())


def test_a_word_means_the_folder(folder, tmp_path, monkeypatch):
    (tmp_path / "data").mkdir()
    folder.rename(tmp_path / "data" / "stl10_binary")
    monkeypatch.chdir(tmp_path)
    data = datasets.load("stl10", "monkey,car", size=96)
    assert data.classes == ("monkey", "car")
    assert torch.unique(data.labels).tolist() == [0, 1]
