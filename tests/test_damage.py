"""Checkpoints that are damaged or not what they seem; FLIPS bytes are flipped in one."""
import math
import os
import random
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path

import sample
import train
from pegasus import checkpoint
from pegasus.cli import UserError

import pytest
import torch
from conftest import equal
from test_checkpoint import Evil
from test_faults import FLIPS, command, fails, whole  # noqa: F401


def small_checkpoint(path: Path) -> Path:
    """Save a checkpoint that is mostly structure."""
    history = [{"epoch": 1, "loss": 0.5}]
    state = {"model": {"w": torch.arange(3.0)}, "history": history, "name": "x"}
    checkpoint.save(path, state)
    return path


def flip(path: Path, times: int, seed: int) -> int:
    """Change one byte, at random, so many times: each change is refused or harmless.

    Returns how many were refused.
    """
    rng = random.Random(seed)
    before = checkpoint.load(path)
    refused = 0
    with open(path, "r+b") as file:
        for _ in range(times):
            at = rng.randrange(path.stat().st_size)
            old = os.pread(file.fileno(), 1, at)
            os.pwrite(file.fileno(), bytes([old[0] ^ rng.randrange(1, 256)]), at)
            try:
                assert equal(checkpoint.load(path), before), f"byte {at}"
            except UserError as error:
                assert "\n" not in str(error)
                refused += 1
            os.pwrite(file.fileno(), old, at)
    assert equal(checkpoint.load(path), before)
    return refused


def test_flipped_bytes_of_a_run(whole, tmp_path):  # noqa: F811
    last = Path(shutil.copy(whole / "last.pt", tmp_path))
    size = last.stat().st_size
    refused = flip(last, FLIPS, 1)
    print(f"{FLIPS} flips in {size:,} bytes: {refused} refused, the others harmless")
    assert refused > 0.9 * FLIPS


def test_flipped_bytes_of_the_structure(tmp_path):
    assert 100 < flip(small_checkpoint(tmp_path / "a.pt"), 200, 2) < 200


def test_truncations(tmp_path):
    path = small_checkpoint(tmp_path / "a.pt")
    data = path.read_bytes()
    for keep in (*range(0, len(data), 31), len(data) - 1):
        path.write_bytes(data[:keep])
        with pytest.raises(UserError, match=r"a\.pt: not a checkpoint"):
            checkpoint.load(path)


def damaged(change: Callable[[dict], object]) -> Callable[[Path], None]:
    """Return a function that changes a checkpoint's state and writes it, unchecked."""
    def write(path: Path) -> None:
        state = checkpoint.load(path)
        change(state)
        torch.save(state, path)
    return write


def other_architecture(state: dict) -> None:
    state["config"]["arch"] = "conv"


def nan_bias(state: dict) -> None:
    state["model"]["encoder.1.bias"].fill_(torch.nan)


def infinite_moment(state: dict) -> None:
    state["optimizers"][0][0]["exp_avg"].view(-1)[5] = torch.inf


def evil_pickle(path: Path) -> None:
    torch.save({"format": checkpoint.FORMAT, "x": Evil()}, path)


DAMAGE = {
    "newer format": (
        damaged(lambda s: s.update(format=10)),
        "format 10, this program reads 9",
    ),
    "older format": (
        damaged(lambda s: s.update(format=8)),
        "format 8, this program reads 9",
    ),
    "other architecture": (
        damaged(other_architecture),
        "another network or version (Error(s) in loading state_dict",
    ),
    "nan": (damaged(nan_bias), "model/encoder.1.bias holds NaN"),
    "infinite moment": (
        damaged(infinite_moment),
        "optimizers/0/0/exp_avg holds NaN",
    ),
    "pickle": (evil_pickle, "would run code"),
    "no configuration": (
        damaged(lambda s: s.pop("config")),
        "another network or version ('config')",
    ),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_what_sample_and_resume_refuse(whole, tmp_path, fails, damage, monkeypatch):  # noqa: F811
    monkeypatch.setenv("EVIL", str(tmp_path / "owned"))
    run = Path(shutil.copytree(whole, tmp_path / "run"))
    write, words = DAMAGE[damage]
    write(run / "last.pt")
    before = {path.name: path.read_bytes() for path in run.iterdir()}
    out = tmp_path / "out.png"
    start = f"{run}/last.pt: "
    fails(sample.main, [run / "last.pt", out], start, words)
    fails(train.main, ["--run", run, "--resume", "--epochs", 5], start, words)
    assert {path.name: path.read_bytes() for path in run.iterdir()} == before
    assert not out.exists()
    assert not (tmp_path / "owned").exists()


def set_config(**values: object) -> Callable[[dict], None]:
    """Return a function that changes options in a checkpoint's state."""
    return lambda state: state["config"].update(values)


def set_moment(state: dict) -> None:
    state["optimizers"][0][0]["exp_avg"] = torch.zeros(2)


NOT_RESUMED = {
    "no history": (lambda s: s.pop("history"), "'history'"),
    "no data": (lambda s: s.pop("data"), "'data'"),
    "no number of composites": (lambda s: s.pop("composites"), "'composites'"),
    "epochs in words": (lambda s: s.update(epochs_done="many"), "str"),
    "more steps than an epoch's": (lambda s: s.update(step=10**6), "1000000 steps"),
    "a row too few": (lambda s: s["history"].pop(), "4 epochs"),
    "a row of another log": (lambda s: s["history"][0].update(novelty=1), "novelty"),
    "a row without a rate": (lambda s: s["history"][0].pop("test_rate"), "columns"),
    "a row of text": (lambda s: s["history"][0].update(test_loss="x"), "test_loss"),
    "an endless loss": (lambda s: s["history"][0].update(test_loss=math.inf), "test_loss inf"),
    "no options": (lambda s: s.update(config=None), "NoneType"),
    "no classes": (lambda s: s.update(classes=[]), "out of range"),
    "other totals": (lambda s: s.update(totals=torch.zeros(5)), "size"),
    "words for composites": (lambda s: s.update(composites="many"), "'many'"),
    "no birds": (lambda s: s["densities"].pop("bird"), "horse, white horse, dark horse"),
    "a moment's shape": (set_moment, "differ in shape"),
    "an unknown option": (set_config(novelty=1), "novelty"),
    "a number below its least": (set_config(threads=-5), "--threads -5"),
    "no pictures a step": (set_config(batch_size=0), "--batch-size 0"),
    "a text for a number": (set_config(lr="x"), "--lr 'x'"),
    "an infinite number": (set_config(beta=float("inf")), "--beta inf"),
    "a number beyond 64 bits": (set_config(seed=2**63), "--seed 9223372036854775808"),
    "a number beyond all floats": (set_config(lr=10**400), "--lr 1000"),
    "a number for a switch": (set_config(center=1), "--center 1"),
    "an unknown choice": (set_config(schedule="cyclic"), "--schedule 'cyclic'"),
    "nothing for a number": (set_config(beta=None), "--beta None"),
}


@pytest.mark.parametrize("damage", NOT_RESUMED)
def test_what_resume_refuses(whole, batches, tmp_path, fails, damage):  # noqa: F811
    run = Path(shutil.copytree(whole, tmp_path / "run"))
    change, words = NOT_RESUMED[damage]
    damaged(change)(run / "last.pt")
    start = f"{run}/last.pt: a checkpoint of another network or version"
    fails(train.main, command(run, batches, 5), start, words)


MACHINES_ERRORS = [
    RuntimeError("DefaultCPUAllocator: can't allocate memory"),
    MemoryError(),
    torch.OutOfMemoryError("CUDA out of memory"),
    torch.AcceleratorError("CUDA error"),
]


@pytest.mark.parametrize("error", MACHINES_ERRORS)
def test_what_the_machine_lacks_is_not_the_checkpoints_fault(error, tmp_path):
    with pytest.raises(type(error)), checkpoint.explain_mismatch(tmp_path / "a.pt"):
        raise error


def other_covariance(state: dict) -> None:
    state["densities"]["bird"][1] = torch.eye(3)


NOT_DRAWN_FROM = {
    "no white horses": (
        lambda s: s["densities"].pop("white horse"),
        "Gaussians horse, bird, dark horse",
    ),
    "no covariance": (lambda s: s["densities"]["bird"].pop(), "missing 1 required"),
    "a covariance's shape": (other_covariance, "bird has shapes (128,) and (3, 3)"),
    "an unknown class": (
        lambda s: s.update(classes=["unicorn", "bird"]),
        "classes unicorn, bird",
    ),
}


@pytest.mark.parametrize("damage", NOT_DRAWN_FROM)
def test_what_sample_refuses(whole, tmp_path, fails, damage):  # noqa: F811
    last = Path(shutil.copy(whole / "last.pt", tmp_path))
    change, words = NOT_DRAWN_FROM[damage]
    damaged(change)(last)
    start = f"{last}: a checkpoint of another network or version"
    fails(sample.main, [last, tmp_path / "out.png"], start, words)


def test_gaussians_that_can_not_be_multiplied(whole, tmp_path, fails):  # noqa: F811
    last = Path(shutil.copy(whole / "last.pt", tmp_path))
    damaged(lambda s: s["densities"]["bird"][1].zero_())(last)
    fails(sample.main, [last, tmp_path / "out.png"], "no finite covariance")


def test_an_archive_that_claims_more_than_it_is(tmp_path):
    """Small files that unpack to gigabytes are refused before they are unpacked."""
    path = tmp_path / "a.pt"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a/data.pkl", bytes(10**7))
    with pytest.raises(UserError, match="larger than the file"):
        checkpoint.load(path)


def test_weights_without_a_value_are_not_saved(tmp_path):
    path = small_checkpoint(tmp_path / "a.pt")
    before = path.read_bytes()
    weights = torch.tensor([1.0, torch.nan])
    with pytest.raises(UserError, match="not saved, model/w holds NaN.*still there"):
        checkpoint.save(path, {"model": {"w": weights}})
    assert path.read_bytes() == before
