"""Which compiler setup.py takes for the CUDA kernels, and when it builds."""
import importlib.util
import os
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


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> ModuleType:
    """setup.py without its last line; torch has CUDA 13.0, and the folder `tmp_path` alone is searched for nvcc."""
    monkeypatch.setattr(setuptools, "setup", lambda **_: None)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setenv("PATH", str(tmp_path))
    for name in ("CUDA_HOME", "CUDA_PATH", "PEGASUS_CUDA"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(ROOT)
    spec = importlib.util.spec_from_file_location("setup_script", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def install(folder: Path, version: str) -> Path:
    """An nvcc that knows its version and nothing else."""
    path = folder / "nvcc"
    path.write_text(f"#!/bin/sh\necho 'Cuda compilation tools, release {version}, V{version}.88'\n")
    path.chmod(0o755)
    return path


@pytest.mark.parametrize("asked, version, taken", [
    (None, "13.0", True), (None, "13.9", True), (None, "12.4", False), (None, None, False), ("0", "13.0", False),
    ("1", "12.4", True)])
def test_nvcc_is_taken_where_it_is_of_the_cuda_of_torch(
        script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture,
        asked: str | None, version: str | None, taken: bool) -> None:
    path = install(tmp_path, version) if version else None
    if asked:
        monkeypatch.setenv("PEGASUS_CUDA", asked)
    assert script.nvcc() == (str(path) if taken else None)
    told = "Built without CUDA kernels: no nvcc of CUDA 13.0" in capsys.readouterr().err
    assert told == (not taken and asked is None)


def test_nvcc_is_not_looked_for_where_torch_has_no_cuda(script: ModuleType, tmp_path: Path,
                                                        monkeypatch: pytest.MonkeyPatch,
                                                        capsys: pytest.CaptureFixture) -> None:
    install(tmp_path, "13.0")
    monkeypatch.setattr(torch.version, "cuda", None)
    assert script.nvcc() is None
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("asked, wanted", [("1", "no nvcc found"), ("yes", "wanted 0 or 1")])
def test_what_can_not_be_had_is_refused(script: ModuleType, monkeypatch: pytest.MonkeyPatch, asked: str,
                                        wanted: str) -> None:
    monkeypatch.setenv("PEGASUS_CUDA", asked)
    with pytest.raises(SystemExit, match=wanted):
        script.nvcc()


@pytest.mark.parametrize("listed, wanted", [("", ["60", "75", "90"]), ("8.6;9.0a+PTX", ["86", "90a"])])
def test_architectures_are_those_asked_for_or_that_nvcc_knows(script: ModuleType, tmp_path: Path,
                                                              monkeypatch: pytest.MonkeyPatch, listed: str,
                                                              wanted: list[str]) -> None:
    compiler = install(tmp_path, "12.6")
    compiler.write_text('#!/bin/sh\n[ "$1" = --list-gpu-code ] && echo sm_60 sm_61 sm_75 sm_86 sm_90\n')
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", listed)
    assert script.architectures(str(compiler)) == wanted


def test_kernels_that_nvcc_can_not_compile_are_left_out(script: ModuleType, tmp_path: Path,
                                                        monkeypatch: pytest.MonkeyPatch,
                                                        capfd: pytest.CaptureFixture) -> None:
    compiler, objects = install(tmp_path, "13.0"), []
    compiler.write_text("#!/bin/sh\necho unsupported GNU version >&2\nexit 1\n")
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "9.0")
    build = script.BuildOp(setuptools.Distribution())
    build.build_temp = str(tmp_path / "temp")
    assert build.cuda_objects(objects, str(compiler)) == [] == objects
    assert "Built without CUDA kernels" in capfd.readouterr().err
    monkeypatch.setenv("PEGASUS_CUDA", "1")
    with pytest.raises(SystemExit, match="nvcc failed"):
        build.cuda_objects(objects, str(compiler))


def build(folder: Path, **env: str) -> str:
    """What a build in a folder says, with a compiler that fails at once."""
    done = subprocess.run([sys.executable, "setup.py", "-q", "build_ext", "--inplace"], cwd=folder, text=True,
                          capture_output=True, env=os.environ | env)
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


def test_what_is_out_of_date_is_built_anew_or_goes(script: ModuleType, tmp_path: Path,
                                                   monkeypatch: pytest.MonkeyPatch) -> None:
    """An extension of other sources or settings is not left behind to be imported."""
    monkeypatch.setenv("CXX", shutil.which("false", path=os.defpath))
    platform = f"{sysconfig.get_platform()}-{sys.implementation.cache_tag}"
    shutil.copytree(ROOT / "csrc", tmp_path / "csrc")
    shutil.copy(ROOT / "setup.py", tmp_path)
    name, settings = f"pegasus_op{sysconfig.get_config_var('EXT_SUFFIX')}", script.settings()
    built = [tmp_path / name, *(tmp_path / "build" / f"{part}.{platform}" / file
                                for part, file in (("lib", name), ("temp", "made-with")))]
    for file in built:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(settings)
    assert build(tmp_path) == ""
    assert (tmp_path / name).exists()
    assert f"Built without the extension: {os.environ['CXX']} failed" in build(tmp_path, PEGASUS_FLAGS="-DNEW")
    assert not (tmp_path / name).exists()
