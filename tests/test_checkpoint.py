import os
import pickle
import zipfile

import checkpoint
import sample
from options import Fault

import pytest
import torch


@pytest.fixture
def saved(tmp_path):
    path = tmp_path / "a.pt"
    checkpoint.save(path, {"weights": torch.arange(5000.0), "history": [{"epoch": 1, "loss": 0.5}], "name": "x"})
    return path


def test_what_is_saved_is_loaded(saved):
    state = checkpoint.load(saved)
    assert state["weights"].equal(torch.arange(5000.0))
    assert state["history"] == [{"epoch": 1, "loss": 0.5}]
    assert os.listdir(saved.parent) == ["a.pt"]


def test_a_flipped_bit_is_refused(saved):
    data = bytearray(saved.read_bytes())
    at = data.find(torch.arange(100.0).numpy().tobytes()) + 2000
    data[at] ^= 1
    saved.write_bytes(data)
    with pytest.raises(Fault, match="a.pt: not .*damaged at"):
        checkpoint.load(saved)


class Evil:
    def __reduce__(self):
        return os.mkdir, (os.environ["EVIL"],)


def test_a_pickle_that_would_run_code_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("EVIL", str(tmp_path / "owned"))
    torch.save({"format": 1, "x": Evil()}, tmp_path / "evil.pt")
    with pytest.raises(Fault, match="would run code"):
        checkpoint.load(tmp_path / "evil.pt")
    assert not (tmp_path / "owned").exists()
    pickle.loads(pickle.dumps(Evil()))  # the trap is a real one
    assert (tmp_path / "owned").exists()


def test_files_that_are_no_checkpoints(tmp_path, complaint):
    text, other = tmp_path / "t.pt", tmp_path / "z.pt"
    text.write_text("hello")
    with zipfile.ZipFile(other, "w") as archive:
        archive.writestr("a", "b")
    for path, words in ((text, "not a checkpoint"), (other, "not a checkpoint"), (tmp_path / "none.pt", "no such file"),
                        (tmp_path, "can't be read")):
        assert words in complaint(sample.main, path, tmp_path / "out.png")
    assert not (tmp_path / "out.png").exists()


def test_a_failing_save_keeps_the_old_file(saved, monkeypatch):
    before = saved.read_bytes()

    def full(*_):
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(Fault, match="No space left.*still there"):
        checkpoint.save(saved, {"weights": torch.zeros(3)})
    assert saved.read_bytes() == before
    assert os.listdir(saved.parent) == ["a.pt"]


def test_digest_is_of_contents():
    a, b = torch.arange(4.0), torch.ones(3, dtype=torch.bfloat16)
    digest = checkpoint.digest({"a": a, "b": b}, {"x": 1, "y": 2})
    assert digest == checkpoint.digest({"b": b.clone(), "a": a.clone()}, {"y": 2, "x": 1})
    assert digest != checkpoint.digest({"a": a + 1, "b": b}, {"x": 1, "y": 2})
    assert digest != checkpoint.digest({"a": a.view(2, 2), "b": b}, {"x": 1, "y": 2})
    assert digest != checkpoint.digest({"a": a, "b": b}, {"x": 1, "y": 3})
