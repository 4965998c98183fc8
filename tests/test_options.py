import dataclasses
import json
import os
import subprocess
import sys

import options
import bench
import checkpoint
import evaluate
import recipe
import reparam
import sample
import study
import train

import pytest
import torch
from conftest import ROOT


@pytest.mark.parametrize(("argv", "words"), [
    (["--epochs", "-1"], ["--epochs", "got -1", "1 or more"]),
    (["--epochs", "2.5"], ["--epochs", "'2.5'", "whole number"]),
    (["--lr", "nan"], ["--lr", "got nan", "above 0"]),
    (["--lr", "0"], ["--lr", "got 0", "above 0"]),
    (["--beta", "inf"], ["--beta", "got inf", "0.0 or more"]),
    (["--batch-size", "0"], ["--batch-size", "got 0", "1 or more"]),
    (["--arch", "nonsense"], ["--arch", "nonsense", "mlp"]),
    (["--epoch", "3"], ["--epoch"]),
    (["--seed", "9" * 400], ["--seed", "below 2^63"]),
    (["--seed", str(2**63)], ["--seed", "below 2^63"]),
    (["--epochs", "9" * 5000], ["--epochs", "whole number"]),
    (["--threads", "1025"], ["--threads", "at most 1024"]),
    (["--run", "runs/\udc80"], ["--run", "UTF-8"]),
])
def test_bad_options_are_one_sentence(complaint, argv, words):
    sentence = complaint(train.main, *argv)
    assert all(word in sentence for word in words), sentence


@pytest.mark.parametrize("argv", [["--n", "65536"], ["--columns", "65536"], ["--scale", "64", "--n", "99"],
                                  ["--best", "10000", "--n", "10000"]])
def test_a_sheet_that_fits_into_no_memory(complaint, tmp_path, argv):
    assert "wanted at most 268,435,456" in complaint(sample.main, tmp_path / "none.pt", tmp_path / "out.png", *argv)


def test_options_are_told_apart_from_defaults():
    chosen, given = train.options.parse(train.Options, ["--lr", "2e-3", "--flip"], "")
    assert given == {"lr", "flip"}
    assert (chosen.lr, chosen.flip, chosen.batch_size) == (2e-3, True, 128)


def test_mlps_defaults_are_the_papers_recipe():
    chosen = recipe.resolve(recipe.Options(arch="mlp"))
    assert (chosen.likelihood, chosen.latent, chosen.beta, chosen.flip) == ("mse", "128", 1.0, False)
    assert (chosen.schedule, chosen.lr, chosen.batch_size, chosen.epochs) == ("constant", 1e-3, 128, 300)


@pytest.mark.parametrize(("avx2", "avx512_bf16", "counted", "taken"), [
    (True, True, True, True), (False, False, True, True),  # Zen 4 or Sapphire Rapids; ARM
    (True, False, True, False), (True, False, False, False)])  # Skylake to Ice Lake, Arrow Lake; Zen 3
def test_bfloat16_is_the_default_where_the_processor_computes_with_it(monkeypatch, avx2, avx512_bf16, counted, taken):
    monkeypatch.setattr(torch.cpu, "_is_avx2_supported", lambda: avx2)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx512_bf16)
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: counted)
    chosen = recipe.resolve(recipe.Options(device="cpu"))
    assert chosen.precision == ("bfloat16" if taken else "float32")


def test_make_leaves_epochs_and_seed_to_the_run_where_they_are_not_given():
    def said(*words: str, **env: str) -> str:
        command = ["make", "-n", "PYTHON=python", *words]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True,
                              env={"PATH": os.environ["PATH"]} | env).stdout
    assert "--epochs" not in said("train") and "--seed" not in said("train")
    assert '--epochs "5" --seed "3" ' in said("train", "EPOCHS=5", "SEED=3")
    assert '--run "runs/paper" --arch mlp' in said("paper")
    assert '--run "mine" --arch mlp' in said("paper", RUN="mine")


def test_what_is_given_stands_beside_defaults():
    chosen = recipe.resolve(recipe.Options(arch="mlp", lr=0.5, flip=True))
    assert (chosen.lr, chosen.flip, chosen.schedule) == (0.5, True, "constant")
    assert recipe.resolve(recipe.Options(arch="conv")).likelihood == "gaussian"


@pytest.mark.parametrize("script", ["train.py", "sample.py"])
def test_a_python_without_torch_is_told_which_one_to_use(script):
    done = subprocess.run([sys.executable, "-S", "-E", script], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert "has no numpy; use .venv/bin/python" in done.stderr
    assert "Traceback" not in done.stderr


def test_help_lists_the_options(capsys):
    for script in (train, sample, evaluate, study, checkpoint):
        with pytest.raises(SystemExit) as left:
            script.main(["--help"])
        assert left.value.code == 0
        said = capsys.readouterr().out
        for field in dataclasses.fields(script.Options):
            flag = field.name if field.metadata.get("positional") else "--" + field.name.strip("_").replace("_", "-")
            assert f"  {flag}" in said or f", {flag}" in said, (script.__name__, flag)


def test_a_full_gpu_is_told_in_one_sentence(capsys):
    def main():
        with checkpoint.fitting(ROOT / "last.pt"):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
    with pytest.raises(SystemExit) as left:
        options.run(main)
    assert left.value.code == 2
    said = capsys.readouterr().err
    assert "the GPU's memory is full (CUDA out of memory" in said and "another version" not in said


def test_full_memory_is_told_in_one_sentence(complaint):
    def main(_):
        torch.empty(2**60)
    assert "memory is full ([enforce fail" in complaint(main)


@pytest.mark.skipif(not reparam.extension, reason="the reference has no instruction sets")
def test_an_unknown_instruction_set_is_told_in_one_sentence():
    done = subprocess.run([sys.executable, "sample.py", "--help"], cwd=ROOT, capture_output=True, text=True, timeout=60,
                          env=os.environ | {"PEGASUS_SIMD": "abacus"})
    assert done.returncode == 2
    assert "PEGASUS_SIMD: got 'abacus', wanted one of baseline" in done.stderr
    assert "Traceback" not in done.stderr


def test_stored_options_are_those_that_were_given():
    chosen = recipe.resolve(recipe.Options(flip=False, lr=1 / 3, seed=-7, threads=2, save_seconds=0.1, run="-x=1 y"))
    assert options.stored(recipe.Options, dataclasses.asdict(chosen)) == chosen


@pytest.mark.parametrize("argv", [("op", "--shapes", "12"), ("op", "--shapes", "axb"), ("op", "--threads", 0),
                                  ("train", "--rounds", -1), ("train", "--images", 0)])
def test_what_bench_refuses(complaint, argv):
    assert f"argument {argv[1]}: got" in complaint(bench.main, *argv)


@pytest.mark.filterwarnings("ignore")  # of fewer cores than workers, of forks beside threads
def test_bench_times_our_step_the_usual_loop_and_the_floor(batches, small_network, tmp_path, capsys):
    bench.main(["train", "--data", str(batches), "--arch", "mlp", "prior", "--images", "150", "--rounds", "1",
                "--threads", "1", "--json", str(tmp_path / "b.json")])
    first, second = json.loads((tmp_path / "b.json").read_text())["rows"]
    assert set(first) - set(second) == {"usual, 0 workers", "usual, 2 workers"}
    assert all(row[name] > 0 for row in (first, second) for name in ("ours", "floor"))
    assert f"{first['floor'] / first['ours']:.2f} times the floor's time" in capsys.readouterr().out
