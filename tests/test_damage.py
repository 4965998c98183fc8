"""Checkpoints that are damaged or not what they seem."""
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import checkpoint
import sample
import train
from options import Fault

import pytest
import torch
from test_checkpoint import Evil
from test_faults import FLIPS, command, fails, whole  # noqa: F401
from test_train import same


def equal(a: object, b: object) -> bool:
    """Whether two states are the same: types, keys, numbers and every bit of every tensor."""
    if type(a) is not type(b):
        return False
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and a.shape == b.shape and a.contiguous().view(-1).view(torch.uint8).equal(
            b.contiguous().view(-1).view(torch.uint8))
    if isinstance(a, dict):
        return list(a) == list(b) and all(equal(a[key], b[key]) for key in a)
    return len(a) == len(b) and all(map(equal, a, b)) if isinstance(a, list | tuple) else a == b


def small_state(path: Path) -> Path:
    """A checkpoint that is mostly structure."""
    checkpoint.save(path, {"model": {"w": torch.arange(3.0)}, "history": [{"epoch": 1, "loss": 0.5}], "name": "x"})
    return path


def flip(path: Path, times: int, seed: int) -> int:
    """Change one byte, at random, so many times; each is refused or harmless. Returns how many were refused."""
    rng, before, refused = random.Random(seed), checkpoint.load(path), 0
    with open(path, "r+b") as file:
        for _ in range(times):
            at = rng.randrange(path.stat().st_size)
            old = os.pread(file.fileno(), 1, at)
            os.pwrite(file.fileno(), bytes([old[0] ^ rng.randrange(1, 256)]), at)
            try:
                assert equal(checkpoint.load(path), before), f"byte {at}"
            except Fault as fault:
                assert "\n" not in str(fault)
                refused += 1
            os.pwrite(file.fileno(), old, at)
    assert equal(checkpoint.load(path), before)
    return refused


def test_flipped_bytes_of_a_run(whole, tmp_path):  # noqa: F811
    last = Path(shutil.copy(whole / "last.pt", tmp_path))
    refused = flip(last, FLIPS, 1)
    print(f"{FLIPS} flips in {last.stat().st_size:,} bytes: {refused} refused, the others harmless")
    assert refused > 0.9 * FLIPS


def test_flipped_bytes_of_the_structure(tmp_path):
    assert 100 < flip(small_state(tmp_path / "a.pt"), 200, 2) < 200


def test_truncations(tmp_path):
    path = small_state(tmp_path / "a.pt")
    data = path.read_bytes()
    for keep in (*range(0, len(data), 31), len(data) - 1):
        path.write_bytes(data[:keep])
        with pytest.raises(Fault, match=r"a\.pt: not a checkpoint"):
            checkpoint.load(path)


def broken(change: Callable[[dict], object]) -> Callable[[Path], None]:
    """A function that changes the state of a checkpoint and writes it as it is, unchecked."""
    def write(path: Path) -> None:
        state = checkpoint.load(path)
        change(state)
        torch.save(state, path)
    return write


def other_architecture(state: dict) -> None:
    state["config"]["arch"] = "conv"


DAMAGE = {
    "newer format": (broken(lambda s: s.update(format=7)), "format 7, this program reads 3 to 6"),
    "older format": (broken(lambda s: s.update(format=2)), "format 2, this program reads 3 to 6"),
    "other architecture": (broken(other_architecture), "another version (Error(s) in loading state_dict"),
    "nan": (broken(lambda s: s["model"]["encoder.1.bias"].fill_(torch.nan)), "model/encoder.1.bias holds NaN"),
    "infinite moment": (broken(lambda s: s["optimizer"]["state"][0]["exp_avg"].view(-1)[5:6].fill_(torch.inf)),
                        "optimizer/state/0/exp_avg holds NaN"),
    "pickle": (lambda path: torch.save({"format": 1, "x": Evil()}, path), "would run code"),
    "no configuration": (broken(lambda s: s.pop("config")), "another version ('config')"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_what_sample_and_resume_refuse(whole, tmp_path, fails, damage, monkeypatch):  # noqa: F811
    monkeypatch.setenv("EVIL", str(tmp_path / "owned"))
    run = Path(shutil.copytree(whole, tmp_path / "run"))
    write, words = DAMAGE[damage]
    write(run / "last.pt")
    before = {p.name: p.read_bytes() for p in run.iterdir()}
    fails(sample.main, [run / "last.pt", tmp_path / "out.png"], f"{run}/last.pt: ", words)
    fails(train.main, ["--run", run, "--resume", "--epochs", 5], f"{run}/last.pt: ", words)
    assert {p.name: p.read_bytes() for p in run.iterdir()} == before
    assert not (tmp_path / "out.png").exists()
    assert not (tmp_path / "owned").exists()


@pytest.mark.parametrize(("change", "words"), [
    (lambda s: s.pop("history"), "'history'"),
    (lambda s: s.pop("data"), "'data'"),
    (lambda s: s["config"].update(novelty=1), "novelty"),
    (lambda s: s.update(epochs_done="many"), "'<'"),
    (lambda s: s["optimizer"]["state"][0].update(exp_avg=torch.zeros(2)), "differ in shape"),
    (lambda s: s["config"].update(threads=-5), "--threads: got -5, wanted"),
    (lambda s: s["config"].update(batch_size=0), "--batch-size: got 0"),
    (lambda s: s["config"].update(lr="x"), "--lr: got 'x', wanted a number"),
    (lambda s: s.update(step=10**6), "1000000 steps"),
    (lambda s: s["history"].pop(), "4 epochs"),
    (lambda s: s["history"][0].update(novelty=1), "history"),
    (lambda s: s.update(totals=torch.zeros(5)), "size"),
    (lambda s: s.update(judge=5), "subscriptable"),
    (lambda s: s["densities"].pop("bird"), "densities of horse, white horse, dark horse"),
])
def test_what_resume_refuses(whole, batches, tmp_path, fails, change, words):  # noqa: F811
    run = Path(shutil.copytree(whole, tmp_path / "run"))
    broken(change)(run / "last.pt")
    fails(train.main, command(run, batches, 5), f"{run}/last.pt: a checkpoint of another version", words)


@pytest.mark.parametrize("error", [RuntimeError("DefaultCPUAllocator: can't allocate memory"), MemoryError(),
                                   torch.OutOfMemoryError("CUDA out of memory"), torch.AcceleratorError("CUDA error")])
def test_what_the_machine_lacks_is_not_the_checkpoints_fault(error, tmp_path):
    with pytest.raises(type(error)), checkpoint.fitting(tmp_path / "a.pt"):
        raise error


@pytest.mark.parametrize(("change", "words"), [
    (lambda s: s["densities"].pop("white horse"), "densities of horse, bird"),
    (lambda s: s["densities"]["bird"].pop(), "missing 1 required"),
    (lambda s: s["densities"]["bird"].__setitem__(1, torch.eye(3)), "bird has shapes (128,) and (3, 3)"),
    (lambda s: s.update(classes=["unicorn", "bird"]), "classes unicorn, bird"),
])
def test_what_sample_refuses(whole, tmp_path, fails, change, words):  # noqa: F811
    last = Path(shutil.copy(whole / "last.pt", tmp_path))
    broken(change)(last)
    fails(sample.main, [last, tmp_path / "out.png"], f"{last}: a checkpoint of another version", words)


def test_densities_that_can_not_be_multiplied(whole, tmp_path, fails):  # noqa: F811
    last = Path(shutil.copy(whole / "last.pt", tmp_path))
    broken(lambda s: s["densities"]["bird"][1].zero_())(last)
    fails(sample.main, [last, tmp_path / "out.png"], "no finite covariance")


def test_an_archive_that_claims_more_than_it_is(tmp_path):
    """Small files that unpack to gigabytes are refused before they are unpacked."""
    path = tmp_path / "a.pt"
    with checkpoint.zipfile.ZipFile(path, "w", checkpoint.zipfile.ZIP_DEFLATED) as file:
        file.writestr("a/data.pkl", bytes(10**7))
    with pytest.raises(Fault, match="larger than the file"):
        checkpoint.load(path)


def test_weights_without_a_value_are_not_saved(tmp_path):
    path = small_state(tmp_path / "a.pt")
    before = path.read_bytes()
    with pytest.raises(Fault, match="not saved, model/w holds NaN.*still there"):
        checkpoint.save(path, {"model": {"w": torch.tensor([1.0, torch.nan])}})
    assert path.read_bytes() == before


def test_an_older_format_goes_on(whole, batches, tmp_path):  # noqa: F811
    """Format 4 kept what torch's Adam keeps, and the state of torch's generator."""
    run = tmp_path / "run"
    train.main(command(run, batches, 2))
    more = {"format": 4, "rng": torch.get_rng_state()}
    broken(lambda s: (s.update(more), s["optimizer"].update(param_groups=[{"lr": 1e-3}])))(run / "last.pt")
    train.main(command(run, batches, 4))
    same(whole, run)
