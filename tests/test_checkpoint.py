"""Checkpoints are saved whole, loaded as they were, and never run code."""
import os
import pickle
import zipfile
from pathlib import Path

import sample
from pegasus import checkpoint
from pegasus.cli import UserError

import pytest
import torch


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    path = tmp_path / "a.pt"
    history = [{"epoch": 1, "loss": 0.5}]
    state = {"weights": torch.arange(5000.0), "history": history, "name": "x"}
    checkpoint.save(path, state)
    return path


def test_what_is_saved_is_loaded(saved):
    state = checkpoint.load(saved)
    assert state["weights"].equal(torch.arange(5000.0))
    assert state["history"] == [{"epoch": 1, "loss": 0.5}]
    assert state["name"] == "x"
    assert os.listdir(saved.parent) == ["a.pt"]


def test_a_flipped_bit_is_refused(saved):
    data = bytearray(saved.read_bytes())
    at = data.find(torch.arange(100.0).numpy().tobytes()) + 2000
    data[at] ^= 1
    saved.write_bytes(data)
    with pytest.raises(UserError, match="a.pt: not .*damaged at"):
        checkpoint.load(saved)


class Evil:
    """An object whose pickle makes a folder, named by $EVIL, when it is loaded."""

    def __reduce__(self):
        return os.mkdir, (os.environ["EVIL"],)


def test_a_pickle_that_would_run_code_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("EVIL", str(tmp_path / "owned"))
    torch.save({"format": checkpoint.FORMAT, "x": Evil()}, tmp_path / "evil.pt")
    with pytest.raises(UserError, match="would run code"):
        checkpoint.load(tmp_path / "evil.pt")
    assert not (tmp_path / "owned").exists()
    pickle.loads(pickle.dumps(Evil()))  # the trap is a real one
    assert (tmp_path / "owned").exists()


def test_files_that_are_no_checkpoints(tmp_path, complaint):
    text = tmp_path / "t.pt"
    text.write_text("hello")
    archive = tmp_path / "z.pt"
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("a", "b")
    cases = {
        text: "not a checkpoint",
        archive: "not a checkpoint",
        tmp_path / "none.pt": "no such file",
        tmp_path: "can't be read",
    }
    for path, words in cases.items():
        assert words in complaint(sample.main, path, tmp_path / "out.png")
    assert not (tmp_path / "out.png").exists()


@pytest.mark.parametrize("number", [1, 8, 10, 9.0, "9", None])
def test_other_formats_are_refused(tmp_path, number):
    torch.save({"format": number}, tmp_path / "a.pt")
    words = "not a checkpoint of this project"
    if isinstance(number, int):
        words = f"checkpoint format {number}, this program reads 9; use the version"
    with pytest.raises(UserError, match=f"a.pt: {words}"):
        checkpoint.load(tmp_path / "a.pt")


def test_a_failing_save_keeps_the_old_file(saved, monkeypatch):
    before = saved.read_bytes()

    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(UserError, match="No space left.*still there"):
        checkpoint.save(saved, {"weights": torch.zeros(3)})
    assert saved.read_bytes() == before
    assert os.listdir(saved.parent) == ["a.pt"]


def test_digest_is_of_contents():
    a = torch.arange(4.0)
    b = torch.ones(3, dtype=torch.bfloat16)
    config = {"x": 1, "y": 2}
    digest = checkpoint.digest({"a": a, "b": b}, config)
    copies = {"b": b.clone(), "a": a.clone()}
    assert digest == checkpoint.digest(copies, {"y": 2, "x": 1})
    assert digest != checkpoint.digest({"a": a + 1, "b": b}, config)
    assert digest != checkpoint.digest({"a": a.view(2, 2), "b": b}, config)
    assert digest != checkpoint.digest({"a": a, "b": b}, {"x": 1, "y": 3})
