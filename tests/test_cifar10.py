import hashlib
import http.server
import io
import os
import tarfile
import threading
from pathlib import Path

import cifar10
import source
import train
from options import Fault

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
    assert labels.tolist() == [7, 7]
    assert images[1, 0].eq(1).all()
    assert images[1, 1].eq(2).all()
    assert images[1, 2, 1].tolist() == list(range(32, 64))  # row by row


@settings(deadline=None, max_examples=20, derandomize=True)
@given(n=st.integers(1, 9), seed=st.integers(0, 9))
def test_what_is_written_is_read(tmp_path_factory, n, seed):
    rng = np.random.default_rng(seed)
    images, labels = rng.integers(0, 256, (n, 3, 32, 32)), rng.integers(0, 10, n)
    path = tmp_path_factory.mktemp("w") / "b.bin"
    cifar10.write(path, images, labels)
    assert path.stat().st_size == n * 3073
    got = cifar10.read(path)
    assert (got[0].numpy() == images).all()
    assert (got[1].numpy() == labels).all()


def test_photographs_are_read_where_they_lie(own_batches):
    """In any order, again and again, of files of different lengths."""
    short = own_batches / "data_batch_2.bin"
    short.write_bytes(short.read_bytes()[:3073 * 5])
    whole, labels = cifar10.collect(own_batches, cifar10.TRAIN, torch.arange(10))
    photographs = cifar10.Photographs(own_batches, cifar10.TRAIN)
    assert len(photographs) == len(whole) and photographs.labels.equal(labels)
    for rows in (torch.randperm(len(whole)), torch.tensor([len(whole) - 1, 0, 0]), torch.arange(0)):
        assert photographs[rows].equal(whole[rows])


def test_classes_are_numbered_as_asked(batches):
    images, labels = cifar10.load(batches, "horse,bird", cifar10.TRAIN)
    swapped = cifar10.load(batches, "bird, horse", cifar10.TRAIN)
    assert (swapped[0] == images).all()
    assert (swapped[1] == 1 - labels).all()
    assert labels.bincount().tolist() == [96, 96]


def test_all_pictures_of_the_real_set():
    folder = os.environ["REAL_CIFAR10_DIR"]
    if not folder:
        pytest.skip("CIFAR10_DIR names no real batches")
    images, labels = cifar10.load(Path(folder), "horse,bird", cifar10.TRAIN)
    assert images.shape == (10_000, 3, 32, 32)
    assert labels.bincount().tolist() == [5000, 5000]
    assert 100 < images.float().mean() < 140


def test_faults_of_batches(own_batches, complaint, tmp_path):
    def fault(*argv):
        return complaint(train.main, "--data", own_batches, "--run", tmp_path / "run", "--epochs", 1, *argv)

    first = own_batches / "data_batch_1.bin"
    good = first.read_bytes()
    first.write_bytes(good[:-1])
    assert all(w in fault() for w in ("data_batch_1.bin", f"{len(good) - 1:,} bytes", "3073-byte records"))
    first.write_bytes(good[:3073 * 2] + b"\x0b" + good[3073 * 2 + 1:])
    assert all(w in fault() for w in ("data_batch_1.bin", "record 2", "label 11", "0 to 9"))
    first.write_bytes(b"")
    assert "0 bytes" in fault()
    first.unlink()
    (own_batches / "test_batch.bin").unlink()
    assert "no data_batch_1.bin, test_batch.bin;" in fault()
    assert "no folder" in complaint(train.main, "--data", tmp_path / "nowhere", "--run", tmp_path / "run")
    assert not list((tmp_path / "run").iterdir())


def test_faults_of_classes(batches, complaint, tmp_path):
    def fault(classes):
        return complaint(train.main, "--data", batches, "--run", tmp_path / "run", "--classes", classes)

    assert "--classes: got ''" in fault("")
    assert "--classes: got ','" in fault(",")
    assert "'horse,unicorn'" in fault("horse,unicorn")
    assert "different ones" in fault("horse,horse")
    assert "no picture of frog" in fault("horse,frog")


class Server:
    """A server on loopback that answers everything with the same bytes, or fewer than it says."""

    def __init__(self, body: bytes, status: int = 200, promised: int | None = None):
        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                self.send_response(status)
                self.send_header("Content-Length", str(len(body) if promised is None else promised))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_):
                pass
        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)

    def __enter__(self) -> str:
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return f"http://127.0.0.1:{self.server.server_port}/cifar-10-binary.tar.gz"

    def __exit__(self, *_):
        self.server.shutdown()
        self.server.server_close()


def archive(batches: Path, *more: str) -> bytes:
    """The batches as an archive in CIFAR-10's layout, with some more members of other names."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w:gz") as tar:
        for name in more:
            tar.addfile(tarfile.TarInfo(name), io.BytesIO())
        for name in cifar10.TRAIN + cifar10.TEST:
            tar.add(batches / name, f"{cifar10.FOLDER}/{name}")
    return out.getvalue()


def served(monkeypatch, body: bytes, size: int | None = None) -> None:
    """Hold downloads to the size and digest of these bytes, as to the official ones otherwise."""
    monkeypatch.setattr(cifar10, "SIZE", len(body) if size is None else size)
    monkeypatch.setattr(cifar10, "SHA256", hashlib.sha256(body).hexdigest())


def download(monkeypatch, url: str, parent: Path) -> Path:
    monkeypatch.setenv("PEGASUS_CIFAR10_URL", url)
    return cifar10.download(parent)


def files(folder: Path) -> list[str]:
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())


@pytest.fixture
def equal_batches(own_batches, monkeypatch) -> Path:
    """Batches of one size, as the official ones are."""
    for name in cifar10.TRAIN + cifar10.TEST:
        (own_batches / name).write_bytes((own_batches / name).read_bytes()[:3073 * 40])
    monkeypatch.setattr(cifar10, "BATCH_SIZE", 3073 * 40)
    return own_batches


def test_download(equal_batches, tmp_path, monkeypatch, capsys):
    body = archive(equal_batches, "../../x", "/tmp/y", f"{cifar10.FOLDER}/readme.html")
    served(monkeypatch, body)
    with Server(body) as url:
        folder = download(monkeypatch, url, tmp_path / "a" / "b")
    assert files(tmp_path / "a") == sorted(f"b/{cifar10.FOLDER}/{n}" for n in cifar10.TRAIN + cifar10.TEST)
    assert all((folder / n).read_bytes() == (equal_batches / n).read_bytes() for n in cifar10.TRAIN + cifar10.TEST)
    assert not (tmp_path / "x").exists()
    said = capsys.readouterr().err
    assert str(tmp_path / "a" / "b") in said
    assert "MB" in said


@pytest.mark.parametrize(("change", "words"), [
    (lambda body: b"<!DOCTYPE html><html>a portal</html>", ["36 bytes", "<!DOCTYPE ht", "wanted 170,052,171"]),
    (lambda body: b"", ["got 0 bytes"]),
    (lambda body: body + b"x", ["got more than"]),
    (lambda body: body[:100] + bytes([body[100] ^ 1]) + body[101:], ["SHA-256", "nothing was kept"]),
])
def test_downloads_of_other_bytes(equal_batches, tmp_path, monkeypatch, change, words):
    body = archive(equal_batches)
    sent = change(body)
    served(monkeypatch, body, 170_052_171 if len(sent) < 100 else len(body))
    with Server(sent) as url, pytest.raises(Fault) as fault:
        download(monkeypatch, url, tmp_path / "data")
    assert all(word in str(fault.value) for word in words), fault.value
    assert "yourself" in str(fault.value)
    assert not isinstance(fault.value, cifar10.Unreachable)
    assert files(tmp_path / "data") == []


def test_archives_without_the_batches(tmp_path, monkeypatch, equal_batches):
    def fault(body):
        served(monkeypatch, body)
        with Server(body) as url, pytest.raises(Fault) as fault:
            download(monkeypatch, url, tmp_path / "data")
        assert files(tmp_path / "data") == []
        return str(fault.value)

    assert "not CIFAR-10's archive" in fault(b"\x1f\x8b not gzip after all")
    other = io.BytesIO()
    with tarfile.open(fileobj=other, mode="w:gz") as tar:
        tar.addfile(tarfile.TarInfo("../../x"), io.BytesIO())
    assert "data_batch_1.bin" in fault(other.getvalue())
    (equal_batches / "data_batch_2.bin").write_bytes(b"short")
    assert "data_batch_2.bin is not a file of" in fault(archive(equal_batches))


def test_a_download_that_breaks_off_is_no_reason_to_draw(equal_batches, tmp_path, monkeypatch, complaint):
    body = archive(equal_batches)
    served(monkeypatch, body)
    monkeypatch.chdir(tmp_path)
    for server in (Server(body[:50], promised=len(body)), Server(b"", 404), Server(b"", 503)):
        with server as url:
            monkeypatch.setenv("PEGASUS_CIFAR10_URL", url)
            assert url in complaint(train.main, "--epochs", 1)
    assert not (tmp_path / "data" / "drawn").exists()


def test_auto_takes_the_environments_folder_then_the_data_folder(batches, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("data").mkdir()
    Path("data", cifar10.FOLDER).symlink_to(batches)
    assert source.locate("auto") == Path("data", cifar10.FOLDER)
    assert source.locate("cifar10") == Path("data", cifar10.FOLDER)
    monkeypatch.setenv("CIFAR10_DIR", str(tmp_path / "elsewhere"))
    assert source.locate("auto") == tmp_path / "elsewhere"


def test_auto_draws_only_where_nothing_answers(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(source.drawn, "write", lambda folder: folder.mkdir(parents=True))
    assert source.locate("auto") == Path("data/drawn")
    assert "DRAWN DATA" in capsys.readouterr().err
    with pytest.raises(cifar10.Unreachable, match="can't be reached.*yourself"):
        source.locate("cifar10")
    Path("data", cifar10.FOLDER).mkdir()  # begun by hand and incomplete
    with pytest.raises(Fault, match="no data_batch_1.bin"):
        source.load("auto", "horse,bird")
