import os
from pathlib import Path

from pegasus.cli import UserError
from pegasus.data import cifar10, classes
from pegasus.data.cifar10 import RECORD

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st


def test_a_record_is_a_label_and_three_planes(tmp_path):
    record = bytes([7]) + bytes([1] * 1024) + bytes([2] * 1024) + bytes(range(256)) * 4
    (tmp_path / "b.bin").write_bytes(record * 2)
    images, labels = cifar10.read(tmp_path / "b.bin")
    assert images.shape == (2, 3, 32, 32)
    assert images.dtype == torch.uint8
    assert labels.dtype == torch.int64
    assert labels.tolist() == [7, 7]
    assert images[1, 0].eq(1).all()
    assert images[1, 1].eq(2).all()
    assert images[1, 2, 1].tolist() == list(range(32, 64))  # row by row


@settings(deadline=None, max_examples=20, derandomize=True)
@given(n=st.integers(1, 9), seed=st.integers(0, 9))
def test_what_is_written_is_read(tmp_path_factory, n, seed):
    rng = np.random.default_rng(seed)
    images = rng.integers(0, 256, (n, 3, 32, 32))
    labels = rng.integers(0, 10, n)
    path = tmp_path_factory.mktemp("w") / "b.bin"
    cifar10.write(path, images, labels)
    assert path.stat().st_size == n * RECORD
    read_images, read_labels = cifar10.read(path)
    assert (read_images.numpy() == images).all()
    assert (read_labels.numpy() == labels).all()


def test_all_classes_are_loaded_in_the_order_of_the_files(own_batches):
    """Of files of different lengths, with CIFAR-10's own labels."""
    short = own_batches / "data_batch_2.bin"
    short.write_bytes(short.read_bytes()[: 5 * RECORD])
    images, labels = cifar10.load_all(own_batches, cifar10.TRAIN)
    records = b"".join((own_batches / name).read_bytes() for name in cifar10.TRAIN)
    assert len(images) == len(labels) == len(records) / RECORD
    assert bytes(labels.tolist()) == records[::RECORD]
    for i in (0, 50, len(images) - 1):
        start = i * RECORD + 1
        assert images[i].numpy().tobytes() == records[start : start + RECORD - 1]


def test_classes_are_numbered_as_asked(batches):
    images, labels = cifar10.load(batches, ("horse", "bird"), cifar10.TRAIN)
    swapped_images, swapped_labels = cifar10.load(batches, ("bird", "horse"), cifar10.TRAIN)
    assert (swapped_images == images).all()
    assert (swapped_labels == 1 - labels).all()
    assert labels.bincount().tolist() == [96, 96]


def test_a_class_holds_its_own_images(batches):
    images, labels = cifar10.load(batches, ("horse", "bird"), cifar10.TEST)
    all_images, all_labels = cifar10.load_all(batches, cifar10.TEST)
    horse = cifar10.CLASSES.index("horse")
    assert images[labels == 0].equal(all_images[all_labels == horse])


def test_all_images_of_the_real_set():
    folder = os.environ["REAL_CIFAR10_DIR"]
    if not folder:
        pytest.skip("CIFAR10_DIR names no real batches")
    images, labels = cifar10.load(Path(folder), ("horse", "bird"), cifar10.TRAIN)
    assert images.shape == (10_000, 3, 32, 32)
    assert labels.bincount().tolist() == [5000, 5000]
    assert 100 < images.float().mean() < 140


def test_faults_of_files(own_batches):
    first = own_batches / "data_batch_1.bin"
    whole = first.read_bytes()

    def fault(load=cifar10.load_all, *names):
        with pytest.raises(UserError) as caught:
            load(own_batches, *names, cifar10.TRAIN)
        return str(caught.value)

    first.write_bytes(whole[:-1])
    wanted = ("data_batch_1.bin", f"{len(whole) - 1:,} bytes", "3073-byte records")
    assert all(words in fault() for words in wanted)
    first.write_bytes(whole[: 2 * RECORD] + b"\x0a" + whole[2 * RECORD + 1 :])
    wanted = ("data_batch_1.bin", "record 2", "label 10", "0 to 9")
    assert all(words in fault() for words in wanted)
    first.write_bytes(b"")
    assert "0 bytes" in fault()
    first.unlink()
    (own_batches / "test_batch.bin").unlink()
    for message in (fault(), fault(cifar10.load, ("horse", "bird"))):
        assert "no data_batch_1.bin, test_batch.bin of CIFAR-10" in message
        assert cifar10.DOWNLOAD in message


def test_faults_of_classes():
    def fault(names):
        with pytest.raises(UserError) as caught:
            classes.parse(names, cifar10.CLASSES)
        return str(caught.value)

    assert "--classes: got ''" in fault("")
    assert "--classes: got ','" in fault(",")
    assert "'horse,unicorn'" in fault("horse,unicorn")
    assert "different ones" in fault("horse,horse")


def test_a_class_without_a_picture(batches):
    with pytest.raises(UserError, match="no picture of frog in data_batch_1.bin"):
        cifar10.load(batches, ("horse", "frog"), cifar10.TRAIN)
