import hashlib
import shutil
from pathlib import Path

from pegasus.cli import UserError
from pegasus.data import cifar10, datasets, download, synthetic

import pytest


def load(argv: list[str]) -> None:
    """A command line for `complaint`: --data, --classes."""
    datasets.load(*argv)


def test_a_dataset_says_where_it_is_from(batches):
    data = datasets.load(str(batches), "bird,horse")
    assert data.classes == ("bird", "horse")
    assert data.name == batches.name
    assert data.folder == str(batches.resolve())
    assert data.images.shape == (192, 3, 32, 32)
    assert data.test_images.shape == (48, 3, 32, 32)
    parts = (data.images, data.labels, data.test_images, data.test_labels)
    content = b"".join(part.numpy().tobytes() for part in parts)
    assert data.digest == hashlib.sha256(content).hexdigest()


def test_faults_are_one_sentence(own_batches, complaint, tmp_path):
    (own_batches / "test_batch.bin").unlink()
    assert "no test_batch.bin of CIFAR-10" in complaint(load, own_batches, "horse,bird")
    assert "--data: no folder" in complaint(load, tmp_path / "nowhere", "horse,bird")
    assert "--data: no folder" in complaint(load, "", "horse,bird")
    for data in (own_batches, "cifar10"):
        assert "--classes: got ''" in complaint(load, data, "")


def test_a_checkpoints_folder_is_what_auto_means(batches, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    data = datasets.load(str(batches), "horse,bird")
    expected = {"folder": data.folder, "digest": data.digest}
    assert datasets.load("auto", "horse,bird", expected).digest == data.digest
    with pytest.raises(UserError, match="is not what the checkpoint was trained on"):
        datasets.load("auto", "bird,horse", expected)
    other = datasets.load("auto", "bird,horse", expected, must_match=False)
    assert other.digest != data.digest
    assert "is not what the checkpoint was trained on" in capsys.readouterr().err
    gone = {"folder": str(tmp_path / "gone"), "digest": data.digest}
    with pytest.raises(UserError, match="--data: no folder .*gone"):
        datasets.load("auto", "horse,bird", gone)


def test_a_checkpoints_cifar10_may_have_been_moved(batches, tmp_path, monkeypatch):
    digest = datasets.load(str(batches), "horse,bird").digest
    folder = tmp_path / cifar10.FOLDER
    expected = {"folder": str(folder), "digest": digest}
    monkeypatch.setenv("CIFAR10_DIR", str(batches))
    assert datasets.load("auto", "horse,bird", expected).folder == str(batches.resolve())
    shutil.copytree(batches, folder)
    assert datasets.load("auto", "horse,bird", expected).folder == str(folder.resolve())


def test_auto_takes_the_environments_folder_then_the_data_folder(
    batches, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    Path("data").mkdir()
    Path("data", cifar10.FOLDER).symlink_to(batches)
    assert datasets.locate("auto") == Path("data", cifar10.FOLDER)
    assert datasets.locate("cifar10") == Path("data", cifar10.FOLDER)
    monkeypatch.setenv("CIFAR10_DIR", str(tmp_path / "elsewhere"))
    assert datasets.locate("auto") == tmp_path / "elsewhere"


def test_auto_draws_only_where_nothing_answers(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(synthetic, "write", lambda folder, side: folder.mkdir(parents=True))
    assert datasets.locate("auto") == Path("data/synthetic")
    assert "SYNTHETIC DATA" in capsys.readouterr().err
    with pytest.raises(download.Unreachable, match="can't be reached.*yourself"):
        datasets.locate("cifar10")
    Path("data", cifar10.FOLDER).mkdir()  # begun by hand and incomplete
    with pytest.raises(UserError, match=f"{cifar10.FOLDER}: holds neither CIFAR-10"):
        datasets.load("auto", "horse,bird")


def test_synthetic_is_drawn_once(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(synthetic.write, "__defaults__", (10, 5, 0, 32))
    data = datasets.load("synthetic", "horse,bird")
    assert data.name == "synthetic"
    assert "drawing 12,000 pictures" in capsys.readouterr().err
    assert datasets.load("synthetic", "horse,bird").digest == data.digest
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("whole", [True, False])
def test_another_process_may_draw_meanwhile(batches, tmp_path, monkeypatch, whole):
    monkeypatch.chdir(tmp_path)

    def write(folder, side):
        folder.parent.mkdir(parents=True)
        if whole:
            folder.symlink_to(batches)
        raise UserError(f"{folder} is not empty")

    monkeypatch.setattr(synthetic, "write", write)
    if whole:
        assert datasets.locate("synthetic") == Path("data/synthetic")
        return
    with pytest.raises(UserError, match="not empty"):
        datasets.locate("synthetic")
