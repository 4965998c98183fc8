"""Command lines: what they take and refuse, what is said of errors, options out of a file."""
import dataclasses
import errno
import os
import re
import shlex
import signal
import subprocess
import sys
from dataclasses import replace

import reparam
import sample
import train
from pegasus import checkpoint, cli, evaluate, paper, study
from pegasus.checkpoint import CompactConfig
from pegasus.cli import UserError
from pegasus.drawing.sampler import SampleConfig
from pegasus.evaluate import EvaluateConfig
from pegasus.models import classifier
from pegasus.models.classifier import ClassifierConfig
from pegasus.paper import PaperConfig
from pegasus.study import StudyConfig
from pegasus.training.config import TrainConfig, resolve

import pytest
import torch
from conftest import ROOT

SCRIPTS = (
    (train, TrainConfig),
    (sample, SampleConfig),
    (evaluate, EvaluateConfig),
    (study, StudyConfig),
    (checkpoint, CompactConfig),
    (paper, PaperConfig),
    (classifier, ClassifierConfig),
)


@pytest.mark.parametrize(
    ("argv", "words"),
    [
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
    ],
)
def test_bad_options_are_one_sentence(complaint, argv, words):
    sentence = complaint(train.main, *argv)
    assert all(word in sentence for word in words), sentence


@pytest.mark.parametrize(
    "argv",
    [
        ["--n", "65536"],
        ["--scale", "64", "--n", "99"],
        ["--best", "10000", "--n", "10000"],
    ],
)
def test_a_sheet_that_fits_into_no_memory(complaint, tmp_path, argv):
    places = (ROOT / "pegasus.pt", tmp_path / "out.png")
    assert "wanted at most 268,435,456" in complaint(sample.main, *places, *argv)


def test_what_was_given_is_told_apart_from_defaults():
    config, given = cli.parse(TrainConfig, ["--lr", "2e-3", "--flip"], "")
    assert given == {"lr", "flip"}
    assert (config.lr, config.flip, config.epochs) == (2e-3, True, 300)


def test_an_option_whose_name_python_reserves():
    argv = ["a.pt", "b.png", "--from", "photo.png"]
    config, given = cli.parse(SampleConfig, argv, "")
    assert (config.checkpoint, config.from_) == ("a.pt", "photo.png")
    assert given == {"checkpoint", "out", "from_"}
    assert cli.flag_of("from_") == "--from"
    assert cli.flag_of("batch_size") == "--batch-size"


def test_help_lists_the_options(capsys):
    for script, config_class in SCRIPTS:
        with pytest.raises(SystemExit) as left:
            script.main(["--help"])
        assert left.value.code == 0
        said = capsys.readouterr().out
        for field in dataclasses.fields(config_class):
            positional = field.metadata.get("positional")
            flag = field.name if positional else cli.flag_of(field.name)
            assert f"  {flag}" in said or f", {flag}" in said, (script.__name__, flag)


# ---- defaults ----


def test_the_defaults_of_mlp_are_the_papers_recipe():
    """But for the input, which its encoder gets as it is."""
    config = resolve(TrainConfig(arch="mlp"))
    model = (config.likelihood, config.latent, config.beta, config.flip)
    assert model == ("mse", "128", 1.0, False)
    training = (config.schedule, config.lr, config.batch_size, config.epochs)
    assert training == ("constant", 1e-3, 128, 300)
    assert config.prior == "normal"
    assert config.center


def test_what_is_given_stands_beside_defaults():
    config = resolve(TrainConfig(arch="mlp", lr=0.5, flip=True))
    assert (config.lr, config.flip, config.schedule) == (0.5, True, "constant")
    conv = resolve(TrainConfig(arch="conv"))
    assert (conv.likelihood, conv.prior, conv.latent) == ("gaussian", "learned", "8x8x16")


@pytest.mark.parametrize(
    ("avx2", "avx512_bf16", "counted", "taken"),
    [
        (True, True, True, True),  # Zen 4 or Sapphire Rapids
        (False, False, True, True),  # ARM
        (True, False, True, False),  # Skylake to Ice Lake, Arrow Lake
        (True, False, False, False),  # Zen 3
    ],
)
def test_bfloat16_is_the_default_where_the_processor_computes_with_it(
    monkeypatch, avx2, avx512_bf16, counted, taken
):
    monkeypatch.setattr(torch.cpu, "_is_avx2_supported", lambda: avx2)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx512_bf16)
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: counted)
    config = resolve(TrainConfig(device="cpu"))
    assert config.precision == ("bfloat16" if taken else "float32")


def test_cuda_where_there_is_none(complaint, tmp_path):
    sentence = complaint(train.main, "--device", "cuda", "--run", tmp_path / "r")
    assert "--device: got cuda, but torch finds no CUDA device" in sentence


def commands(*words: str) -> str:
    """What make would do."""
    command = ["make", "-n", "PYTHON=python", *words]
    settings = {"capture_output": True, "text": True, "check": True}
    env = {"PATH": os.environ["PATH"]}
    return subprocess.run(command, cwd=ROOT, env=env, **settings).stdout


def test_make_leaves_epochs_and_seed_to_the_run_where_they_are_not_given():
    assert "--epochs" not in commands("train")
    assert "--seed" not in commands("train")
    assert '--epochs "5" --seed "3" ' in commands("train", "EPOCHS=5", "SEED=3")
    assert '--run "runs/paper" --arch mlp' in commands("paper")
    assert '--run "mine" --arch mlp' in commands("paper", "RUN=mine")


def test_dashes_are_no_positional_options(complaint):
    assert "out: got nothing" in complaint(sample.main, "--", "--", "--")


def test_make_sample_draws_from_the_run_that_is_named():
    assert 'sample.py "no/such/run/last.pt"' in commands("sample", "RUN=no/such/run")
    if not (ROOT / "runs/pegasus/last.pt").exists():
        assert 'sample.py "pegasus.pt"' in commands("sample")


def test_make_demo_draws_from_the_checkpoint_that_comes_along():
    lines = [line for line in commands("demo").splitlines() if "sample.py" in line]
    assert all('sample.py "pegasus.pt" demo/' in line for line in lines)
    names = [re.search(r"demo/(\S+)", line)[1] for line in lines]
    assert names == ["pegasus.png", "best.png", "white.png", "walk.gif"]


def test_make_paper_names_every_option_of_the_papers_recipe():
    """It trains what the defaults of mlp are, not centered."""
    words = shlex.split(commands("paper").replace("\\\n", " "))
    argv = words[words.index("train.py") + 1 : words.index("-m") - 1]
    config, given = cli.parse(TrainConfig, argv, "")
    wanted = TrainConfig(arch="mlp", center=False, run="runs/paper", resume=True)
    assert resolve(config) == resolve(wanted)
    recipe = {"likelihood", "center", "latent", "schedule", "lr", "batch_size", "beta", "flip"}
    assert given == recipe | {"arch", "run", "data", "resume"}
    assert words[words.index("-m") :] == ["-m", "pegasus.paper", "runs/paper"]


# ---- options out of a file ----


def test_options_of_a_run_pass_the_check_that_files_get():
    cli.check(TrainConfig())
    cli.check(resolve(TrainConfig(lr=1 / 3, seed=-7, save_seconds=0.1, run="-x=1 y")))
    cli.check(TrainConfig(lr=1, save_seconds=0))  # whole numbers will do


@pytest.mark.parametrize(
    "change",
    [
        {"epochs": 0},
        {"epochs": 2**63},
        {"epochs": 1.0},
        {"epochs": True},
        {"epochs": None},
        {"epochs": "3"},
        {"batch_size": -1},
        {"threads": 1025},
        {"components": 65_537},
        {"lr": 0.0},
        {"lr": float("nan")},
        {"lr": "1e-3"},
        {"lr": True},
        {"beta": float("inf")},
        {"beta": -0.1},
        {"beta": 10**400},
        {"arch": "transformer"},
        {"arch": ["mlp"]},
        {"arch": None},
        {"likelihood": "poisson"},
        {"flip": 1},
        {"center": 0},
        {"run": 3},
        {"seed": torch.tensor(3)},
    ],
)
def test_options_out_of_a_file_that_no_command_line_gives(change):
    """Wrong types, numbers out of range, unknown choices."""
    with pytest.raises(ValueError, match=cli.flag_of(next(iter(change)))):
        cli.check(replace(TrainConfig(), **change))


# ---- what is said of errors ----


def test_a_full_gpu_is_told_in_one_sentence(complaint):
    def main(_: list[str]) -> None:
        with checkpoint.explain_mismatch(ROOT / "last.pt"):
            text = "CUDA out of memory. Tried to allocate 2.00 GiB"
            raise torch.OutOfMemoryError(text)

    sentence = complaint(main)
    assert "the GPU's memory is full (CUDA out of memory" in sentence
    assert "another network or version" not in sentence


def test_full_memory_is_told_in_one_sentence(complaint):
    def main(_: list[str]) -> None:
        torch.empty(2**60)

    assert "memory is full ([enforce fail" in complaint(main)


def raising(error: Exception):
    def main(_: list[str]) -> None:
        raise error

    return main


def test_errors_that_the_user_can_mend_are_one_sentence(complaint):
    assert complaint(raising(UserError("so"))).endswith(": so")
    missing = FileNotFoundError(errno.ENOENT, "No such file", "a.png")
    assert complaint(raising(missing)).endswith(": a.png: No such file")
    assert complaint(raising(MemoryError())).endswith("(MemoryError); ask for less")


def test_bugs_are_told_whole():
    with pytest.raises(KeyError, match="bug"):
        cli.run(lambda: raising(KeyError("bug"))([]))


@pytest.mark.parametrize(("error", "status"), [(KeyboardInterrupt(), 130), (None, 3)])
def test_exit_statuses(error, status):
    def main() -> int:
        if error:
            raise error
        return 3

    with pytest.raises(SystemExit) as left:
        cli.run(main)
    assert left.value.code == status


def test_long_errors_are_cut():
    assert cli.brief("a\n  b\tc") == "a b c"
    assert cli.brief(ValueError()) == "ValueError"
    assert cli.brief("x" * 999) == "x" * 200 + "..."


def run_script(command: list[str], **env: str) -> subprocess.CompletedProcess:
    settings = {"capture_output": True, "text": True, "timeout": 60}
    return subprocess.run(command, cwd=ROOT, env=os.environ | env, **settings)


@pytest.mark.parametrize(
    "script",
    [["train.py"], ["sample.py"], ["-m", "pegasus.evaluate"], ["-m", "pegasus.checkpoint"],
     ["-m", "pegasus.study"], ["-m", "pegasus.data.download"], ["-m", "pegasus.paper"],
     ["-m", "pegasus.models.classifier"]],
)
def test_a_python_without_torch_is_told_which_one_to_use(script):
    done = run_script([sys.executable, "-S", "-E", *script])
    assert done.returncode == 2
    assert "has no numpy; use .venv/bin/python" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("package", ["torch", "numpy", "PIL"])
def test_an_old_package_is_told_in_one_sentence(monkeypatch, capsys, package):
    cli.check_versions()
    monkeypatch.setattr(f"{package}.__version__", "1.9.0a0+git")
    with pytest.raises(SystemExit) as left:
        cli.check_versions()
    assert left.value.code == 2
    said = capsys.readouterr().err
    wanted = ".".join(map(str, cli.OLDEST[package]))
    assert f"has {package} 1.9.0a0+git, wanted {wanted} or later; use .venv/bin" in said


def test_packages_are_looked_at_before_anything_is_done():
    code = "import PIL; PIL.__version__ = '9.4.0'; import pegasus.cli"
    done = run_script([sys.executable, "-c", code])
    assert done.returncode == 2
    assert "has PIL 9.4.0, wanted 10.4 or later" in done.stderr


@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP"])
def test_signals_that_nohup_ignored_end_nothing(name):
    signum = getattr(signal, name)
    signal.signal(signum, signal.SIG_IGN)

    def main() -> int:
        signal.raise_signal(signum)
        return 3

    with pytest.raises(SystemExit) as left:
        cli.run(main)
    assert signal.getsignal(signum) == signal.SIG_IGN
    assert left.value.code == 3


@pytest.mark.parametrize("left", ["python", "python that lacks torch", ""])
def test_make_sets_up_anew_where_the_environment_is_dead(tmp_path, left, monkeypatch):
    """Its Python is gone, is another one, or all is well."""
    for name in ("MAKEFLAGS", "PYTHON"):  # of `make test PYTHON=...`
        monkeypatch.delenv(name, raising=False)
    for name in ("Makefile", "requirements.txt", "requirements-dev.txt"):
        (tmp_path / name).write_bytes((ROOT / name).read_bytes())
    python = tmp_path / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    (tmp_path / ".venv" / ".ready").touch()
    script = {"python": "", "python that lacks torch": "exit 1", "": "exit 0"}[left]
    if script:
        python.write_text(f"#!/bin/sh\n{script}\n")
        python.chmod(0o755)
    done = subprocess.run(["make", "-n", "build"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert ("-m venv --clear .venv" in done.stdout) == bool(left)


MAKE_TARGETS = set(re.findall(r"(?m)^([a-z-]+):.*##", (ROOT / "Makefile").read_text()))
WITHOUT_PYTHON = {"help", "package-check", "arm-check", "clean", "distclean"}


def test_make_takes_a_python_with_a_blank_in_its_path():
    for target in MAKE_TARGETS - WITHOUT_PYTHON:
        done = run_script(["make", "-n", target, "PYTHON=/a b/python"])
        assert done.stdout.count("/a b/python") == done.stdout.count('"/a b/python"') > 0


@pytest.mark.skipif(not reparam.extension, reason="the reference has no instruction sets")
def test_an_unknown_instruction_set_is_told_in_one_sentence():
    done = run_script([sys.executable, "sample.py", "--help"], PEGASUS_SIMD="abacus")
    assert done.returncode == 2
    assert "PEGASUS_SIMD: got 'abacus', wanted one of baseline" in done.stderr
    assert "Traceback" not in done.stderr
