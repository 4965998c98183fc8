"""What setup.py builds and when, and which compiler it takes for the CUDA kernels."""
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from types import ModuleType

import pytest
import setuptools
import torch
from conftest import ROOT

SUFFIX = sysconfig.get_config_var("EXT_SUFFIX")
CXX = shutil.which("c++")
NM = shutil.which("nm")
PLATFORM = f"{sysconfig.get_platform()}-{sys.implementation.cache_tag}"


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> ModuleType:
    """setup.py without its last line.

    torch has CUDA 13.0, and only the folder `tmp_path` is searched for compilers.
    """
    monkeypatch.setattr(setuptools, "setup", lambda **_: None)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setenv("PATH", str(tmp_path))
    for name in ("CUDA_HOME", "CUDA_PATH", "PEGASUS_CUDA", "PEGASUS_FLAGS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(ROOT)
    spec = importlib.util.spec_from_file_location("setup_script", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def install(path: Path, text: str) -> Path:
    """A program, a shell script."""
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return path


def install_nvcc(folder: Path, version: str) -> Path:
    """An nvcc that knows its version and nothing else."""
    text = f"Cuda compilation tools, release {version}, V{version}.88"
    return install(folder / "nvcc", f"echo '{text}'")


@pytest.mark.parametrize("name", ["torch", "pybind11"])
@pytest.mark.parametrize("got", ["2.9.1", None])
def test_packages_that_are_missing_or_old_are_told(script, monkeypatch, name, got):
    """A source distribution asks for the same ones."""
    def version(package: str) -> str:
        if package == name and got is None:
            raise script.PackageNotFoundError(package)
        return got if package == name else "9.9"

    monkeypatch.setattr(script, "version", version)
    with pytest.raises(SystemExit, match=f"{name}: .* has {got or 'none'}, wanted .* or later"):
        script.check_packages()
    oldest = ".".join(map(str, script.OLDEST[name]))
    assert f'"{name}>={oldest}"' in (ROOT / "pyproject.toml").read_text()


@pytest.mark.parametrize("asked,version,taken", [
    (None, "13.0", True),
    (None, "13.9", True),
    (None, "12.4", False),
    (None, None, False),
    ("0", "13.0", False),
    ("1", "12.4", True),
])
def test_nvcc_is_taken_where_it_is_of_the_cuda_of_torch(
    script: ModuleType,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
    asked: str | None,
    version: str | None,
    taken: bool,
) -> None:
    path = install_nvcc(tmp_path, version) if version else None
    if asked:
        monkeypatch.setenv("PEGASUS_CUDA", asked)
    assert script.nvcc() == (str(path) if taken else None)
    sentence = "Built without CUDA kernels: no nvcc of CUDA 13.0"
    assert (sentence in capsys.readouterr().err) == (not taken and asked is None)


def test_nvcc_of_cuda_home_comes_first(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install_nvcc(tmp_path, "13.0")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "home"))
    (tmp_path / "home" / "bin").mkdir(parents=True)
    path = install_nvcc(tmp_path / "home" / "bin", "13.0")
    assert script.nvcc() == str(path)


def test_nvcc_is_not_looked_for_where_torch_has_no_cuda(
    script: ModuleType,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    install_nvcc(tmp_path, "13.0")
    monkeypatch.setattr(torch.version, "cuda", None)
    assert script.nvcc() is None
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("asked,wanted", [("1", "no nvcc found"), ("yes", "wanted 0 or 1")])
def test_what_can_not_be_had_is_refused(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch, asked: str, wanted: str
) -> None:
    monkeypatch.setenv("PEGASUS_CUDA", asked)
    with pytest.raises(SystemExit, match=wanted):
        script.nvcc()


@pytest.mark.parametrize("asked,wanted", [
    ("", ["60", "75", "90"]),
    ("8.6;9.0a+PTX", ["86", "90a"]),
    (" 8.0 9.0 ", ["80", "90"]),
    ("Hopper", ["90"]),
    ("Ampere;9.0a", ["80", "86", "90a"]),
])
def test_architectures_are_those_asked_for_or_that_nvcc_knows(
    script: ModuleType,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    asked: str,
    wanted: list[str],
) -> None:
    codes = "sm_60 sm_61 sm_75 sm_86 sm_90"
    compiler = install(tmp_path / "nvcc", f'[ "$1" = --list-gpu-code ] && echo {codes}')
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", asked)
    assert script.architectures(str(compiler)) == wanted


@pytest.mark.parametrize("asked", ["Lovelace", "90", "9.0b", "8.0,9.0"])
def test_architectures_that_are_none(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch, asked: str
) -> None:
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", f"8.0 {asked}")
    with pytest.raises(SystemExit, match=f"TORCH_CUDA_ARCH_LIST: got {asked}, wanted"):
        script.architectures("nvcc")


def test_libraries_are_where_nvcc_looks_for_them(script: ModuleType, tmp_path: Path) -> None:
    line = '#$ LIBRARIES=  "-L/cuda/lib/stubs" "-L/cuda/lib"'
    compiler = install(tmp_path / "nvcc", f"echo '{line}' >&2")
    assert script.cuda_library_folders(str(compiler)) == ["/cuda/lib/stubs", "/cuda/lib"]
    assert script.cuda_library_folders(str(install_nvcc(tmp_path, "13.0"))) == []


def test_kernels_that_nvcc_can_not_compile_are_left_out(
    script: ModuleType,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture,
) -> None:
    compiler = install(tmp_path / "nvcc", "echo unsupported GNU version >&2; exit 1")
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "9.0")
    command = script.BuildExtensions(setuptools.Distribution())
    command.build_temp = str(tmp_path / "temp")
    assert command.compile_cuda(str(compiler)) == []
    assert "Built without CUDA kernels" in capfd.readouterr().err
    monkeypatch.setenv("PEGASUS_CUDA", "1")
    with pytest.raises(SystemExit, match="nvcc failed"):
        command.compile_cuda(str(compiler))


def test_nvcc_is_told_each_architecture(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = tmp_path / "told"
    compiler = install(tmp_path / "nvcc", f'echo "$@" > {told}')
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "9.0a;8.6")
    command = script.BuildExtensions(setuptools.Distribution())
    command.build_temp = str(tmp_path / "temp")
    assert command.compile_cuda(str(compiler)) == ["90a", "86"]
    kinds = re.findall(r"-gencode=arch=compute_(\w+),code=(\w+)", told.read_text())
    assert kinds == [("90a", "sm_90a"), ("86", "sm_86"), ("90a", "compute_90a")]


def test_the_op_takes_the_stable_interface_alone() -> None:
    """torch's generated one changes from version to version."""
    for path in (ROOT / "csrc/reparam").iterdir():
        assert not re.search("aoti_torch_cpu_|generated/", path.read_text()), path


@pytest.mark.skipif(not (CXX and NM), reason="there is no compiler")
def test_no_function_of_an_instruction_set_stands_for_anothers(
    script: ModuleType, tmp_path: Path
) -> None:
    """Of functions of one name the linker keeps one, perhaps with what a CPU does not know."""
    newest = list(script.LEVELS)[-1]
    jobs = [job for name in script.FOLDERS for job in script.compile_jobs(name, [])]
    compiled = tmp_path / "kernels.o"
    for source, level, flags in jobs:
        if level != newest:
            continue
        # -O0 after the others: nothing is inlined
        flags = [*script.COMMON, *flags, "-O0", "-fPIC", "-c", str(source), "-o", str(compiled)]
        subprocess.run([CXX, *flags], check=True, env={"PATH": os.defpath})
        symbols = subprocess.check_output([NM, "-C", compiled], text=True)
        functions = re.findall("^[0-9a-f]+ W (.*)", symbols, re.MULTILINE)
        assert [name for name in functions if f"pegasus::{level}::" not in name] == [], source


@pytest.fixture
def sources(tmp_path: Path) -> Path:
    """A folder with what setup.py needs."""
    folder = tmp_path / "sources"
    shutil.copytree(ROOT / "csrc", folder / "csrc")
    shutil.copy(ROOT / "setup.py", folder)
    return folder


def build(folder: Path, compiler: object, *arguments: str, flags: str = "") -> str:
    """What a build in a folder says, in place where no arguments say otherwise."""
    command = [sys.executable, "setup.py", "-q", "build_ext", *(arguments or ["--inplace"])]
    env = os.environ | {"CXX": str(compiler), "PEGASUS_CUDA": "0", "PEGASUS_FLAGS": flags}
    done = subprocess.run(command, cwd=folder, text=True, capture_output=True, env=env)
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


def test_what_is_out_of_date_is_built_anew_or_goes(
    script: ModuleType, sources: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An extension of other sources or settings is not left behind to be imported."""
    compiler = shutil.which("false", path=os.defpath)
    monkeypatch.setenv("CXX", compiler)
    monkeypatch.setenv("PEGASUS_CUDA", "0")
    for name in ("pegasus_op", "pegasus_step"):
        library = f"{name}{SUFFIX}"
        made_with = sources / "build" / f"temp.{PLATFORM}" / name / "made-with"
        for file in (sources / library, sources / "build" / f"lib.{PLATFORM}" / library, made_with):
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(script.settings(name))
    assert build(sources, compiler) == ""
    assert len(list(sources.glob("*.so"))) == 2
    text = build(sources, compiler, flags="-DNEW")
    for name in ("pegasus_op", "pegasus_step"):
        assert f"Built without {name}: {compiler} failed, see above" in text
    assert list(sources.rglob("*.so")) == []


COMPILER = """
for argument; do
  case $argument in *csrc/step/*) exit 1;; esac
done
while [ $# -gt 1 ]; do
  if [ "$1" = -o ]; then echo compiled > "$2"; fi
  shift
done
"""


def test_the_op_is_built_without_the_steps_kernels(sources: Path, tmp_path: Path) -> None:
    """A compiler that fails for the latter alone, and sources of the latter that change."""
    compiler = install(tmp_path / "compiler", COMPILER)
    op = f"pegasus_op{SUFFIX}"
    text = build(sources, compiler)
    assert "building pegasus_op" in text and "without pegasus_op" not in text
    assert text.count("Built without pegasus_step: ") == 1
    assert "training uses PyTorch's layers, which is slower and the same otherwise" in text
    assert [path.name for path in sources.glob("*.so")] == [op]
    with (sources / "csrc" / "step" / "norm.cpp").open("a") as file:
        file.write("// changed\n")
    text = build(sources, compiler)
    assert "building pegasus_op" not in text and "building pegasus_step" in text
    assert (sources / op).exists()


def test_what_pip_packs_is_the_op_alone(sources: Path, tmp_path: Path) -> None:
    """Even where both were built in place before."""
    compiler = install(tmp_path / "compiler", COMPILER.replace("exit 1", ""))
    assert "without" not in build(sources, compiler)
    assert len(list(sources.glob("*.so"))) == 2
    assert build(sources, compiler, "--build-lib", "build/lib.packed") != ""
    packed = [path.name for path in (sources / "build" / "lib.packed").iterdir()]
    assert packed == [f"pegasus_op{SUFFIX}"]
    folder = sources / "build" / f"lib.{PLATFORM}"
    assert len(list(folder.iterdir())) == 2
    build(sources, compiler, "--build-lib", str(folder))
    assert [path.name for path in folder.iterdir()] == [f"pegasus_op{SUFFIX}"]
    assert len(list(sources.glob("*.so"))) == 2
