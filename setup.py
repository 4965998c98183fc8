"""Builds the extension `pegasus_op` and installs it with reparam.py.

    python setup.py build_ext --inplace     # here, for the scripts of this folder
    pip install --no-build-isolation .      # `import reparam` in another project, with the torch that is installed,
                                            # after `pip install -U setuptools pybind11`

Needs a C++20 compiler. CUDA kernels are built where torch has CUDA and nvcc is of the same major version;
PEGASUS_CUDA=0 or 1 overrides, TORCH_CUDA_ARCH_LIST chooses architectures. PEGASUS_FLAGS adds flags, for sanitizers.
Without a compiler nothing is built and reparam.py uses its PyTorch reference, which is slower and the same otherwise.
"""
import hashlib
import os
import platform
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import BaseError, CCompilerError

TARGET = "-DTORCH_TARGET_VERSION=0x020a000000000000"  # the stable ABI of torch 2.10 and later
# No contraction of a * b + c: every instruction set is to give the same bits.
KERNEL = ["-O3", "-ffp-contract=off", "-fno-math-errno", "-Wno-maybe-uninitialized", "-Wno-unknown-warning-option"]
X86 = platform.machine().lower() in ("x86_64", "amd64")
# Tuned for no processor in particular, gcc's AVX-512 code runs 14 % longer on a Zen 4; tuning changes no bit.
LEVELS = {"baseline": []} | ({"avx2": ["-mavx2"], "avx512": ["-mavx512f", "-mtune=icelake-server"]} if X86 else {})
SOURCES = sorted(str(path) for path in Path("csrc").iterdir() if path.suffix in (".cpp", ".cu", ".h"))
ARCHITECTURES = ("5.0", "6.0", "7.0", "7.5", "8.0", "9.0", "10.0", "12.0")  # torch's; the first three go with CUDA 12


def settings() -> str:
    """What the extension is built of and with."""
    names = ("CXX", "CFLAGS", "CXXFLAGS", "LDFLAGS", "PEGASUS_FLAGS", "PEGASUS_CUDA", "CUDA_HOME", "CUDA_PATH",
             "TORCH_CUDA_ARCH_LIST")
    digest = hashlib.sha256(b"".join(Path(name).read_bytes() for name in [*SOURCES, "setup.py"])).hexdigest()
    return " ".join([digest, f"torch {version('torch')}", *(f"{name}={os.environ.get(name, '')}" for name in names)])


def nvcc() -> str | None:
    """The CUDA compiler to use, of torch's major version of CUDA; or None: then the extension has no CUDA kernels."""
    import torch

    asked, home = os.environ.get("PEGASUS_CUDA", ""), os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    if asked not in ("", "0", "1"):
        raise SystemExit(f"PEGASUS_CUDA: got {asked!r}, wanted 0 or 1")
    if asked == "0" or not (asked or torch.version.cuda):
        return None
    path = shutil.which("nvcc", path=f"{home}/bin" if home else None) or shutil.which("nvcc")
    if asked and path is None:
        raise SystemExit("PEGASUS_CUDA=1: no nvcc found on PATH or under CUDA_HOME")
    said = subprocess.run([path, "--version"], capture_output=True, text=True).stdout if path and not asked else ""
    if asked or f"release {torch.version.cuda.split('.')[0]}." in said:
        return path
    go_without("CUDA kernels", f"no nvcc of CUDA {torch.version.cuda}, which is torch's, was found")
    return None


def go_without(what: str, reason: str) -> None:
    """Say what is left out, which makes a slower project and not a broken one."""
    print(f"Built without {what}: {reason}. reparam.py uses its PyTorch reference instead, which is slower and the "
          "same otherwise.", file=sys.stderr)


def architectures(compiler: str) -> list[str]:
    """Compute capabilities such as "90" or "90a": TORCH_CUDA_ARCH_LIST's, else those of ARCHITECTURES nvcc knows."""
    wanted = [a for a in re.split(r"[ ;]+", os.environ.get("TORCH_CUDA_ARCH_LIST", "")) if a]
    if wanted:
        return [a.removesuffix("+PTX").replace(".", "") for a in wanted]
    known = subprocess.run([compiler, "--list-gpu-code"], capture_output=True, text=True, check=True).stdout.split()
    return [a.replace(".", "") for a in ARCHITECTURES if f"sm_{a.replace('.', '')}" in known]


def cuda_library_directories(compiler: str) -> list[str]:
    """Where nvcc itself would look for libcudart; its own path may be a wrapper's."""
    said = subprocess.run([compiler, "--dryrun", "csrc/reparam.cu"], capture_output=True, text=True).stderr
    return re.findall(r'-L([^"\s]+)', next((line for line in said.splitlines() if "LIBRARIES=" in line), ""))


class BuildOp(build_ext):
    """Compiles the CPU kernels once for each instruction set, and reparam.cu with nvcc; skips what is up to date."""

    def build_extension(self, extension: Extension) -> None:
        target, made_with = Path(self.get_ext_fullpath(extension.name)), Path(self.build_temp) / "made-with"
        now = settings()
        if not self.force and target.exists() and made_with.exists() and made_with.read_text() == now:
            return
        made_with.unlink(missing_ok=True)  # or an interrupted link would pass for up to date
        compiler = nvcc()
        print("the extension is built: a minute or two", flush=True)
        import pybind11
        from torch.utils.cpp_extension import include_paths, library_paths

        self.flags = ["-std=c++20", "-g0", *os.environ.get("PEGASUS_FLAGS", "").split()]
        # pybind11's own headers before those that come with torch, which refuse to be used beside the stable ABI
        self.includes = [pybind11.get_include(), *include_paths()]
        objects, macros = [], [TARGET, *(["-DPEGASUS_X86"] if X86 else [])]
        libraries, library_directories = ["torch", "torch_cpu", "c10"], library_paths()
        if names := self.cuda_objects(objects, compiler):
            macros += ["-DPEGASUS_CUDA", "-DUSE_CUDA", f'-DPEGASUS_CUDA_ARCHITECTURES="{" ".join(names)}"']
            libraries += ["torch_cuda", "cudart"]
            library_directories += cuda_library_directories(compiler)
        jobs = [(source, "module", ["-O2", "-fvisibility=hidden", *macros])
                for source in ("module.cpp", "step_ops.cpp", "winograd.cpp")]
        jobs += [(source, level, [*KERNEL, f"-DPEGASUS_LEVEL={level}", *flags])
                 for level, flags in LEVELS.items() for source in ("cpu.cpp", "step.cpp", "tiles.cpp")]
        with ThreadPoolExecutor(min(os.cpu_count() or 1, 4)) as pool:  # a compiler takes a gigabyte
            objects += pool.map(lambda job: self.compile(*job), jobs)
        target.parent.mkdir(parents=True, exist_ok=True)
        self.compiler.link_shared_object(objects, str(target), libraries=libraries, library_dirs=library_directories,
                                         extra_postargs=self.flags[1:], target_lang="c++")
        made_with.write_text(now)

    def compile(self, source: str, folder: str, flags: list[str]) -> str:
        return self.compiler.compile([f"csrc/{source}"], output_dir=str(Path(self.build_temp) / folder),
                                     include_dirs=self.includes, extra_postargs=[*self.flags, *flags])[0]

    def cuda_objects(self, objects: list[str], compiler: str | None) -> list[str]:
        """Add the CUDA kernels to the objects; the architectures they are for, none where that can't be done."""
        if compiler is None:
            return []
        names, result = architectures(compiler), Path(self.build_temp) / "reparam.cu.o"
        result.parent.mkdir(parents=True, exist_ok=True)
        flags = [f"-gencode=arch=compute_{name},code=sm_{name}" for name in names]
        flags.append(f"-gencode=arch=compute_{names[0]},code=compute_{names[0]}")  # PTX, for all others from there on
        try:
            self.spawn([compiler, "-std=c++20", "-O3", "-Xcompiler", "-fPIC", *flags, "-c", "csrc/reparam.cu",
                        "-o", str(result)])
        except BaseError:
            if os.environ.get("PEGASUS_CUDA"):
                raise SystemExit(f"PEGASUS_CUDA=1: {compiler} failed, see above") from None
            go_without("CUDA kernels", f"{compiler} failed, see above")
            return []
        objects.append(str(result))
        return names

    def run(self) -> None:
        compiler, inplace = (os.environ.get("CXX") or "c++").split()[0], self.inplace
        found = shutil.which(compiler) or shutil.which("g++")
        os.environ.setdefault("CXX", compiler if shutil.which(compiler) else "g++")
        try:
            super().run()
        except (BaseError, CCompilerError):
            why = f"{compiler} failed, see above; a C++20 compiler is needed" if found else "no C++ compiler was found"
            go_without("the extension", why)
            self.extensions = []
            for place in [self.build_lib, "."] if inplace else [self.build_lib]:
                for older in Path(place).glob("pegasus_op.*.so"):
                    older.unlink()  # or what is imported or packed would not be what the sources say


setup(name="pegasus-op", version="0.1.0", py_modules=["reparam"], cmdclass={"build_ext": BuildOp},
      ext_modules=[Extension("pegasus_op", ["csrc/module.cpp"], depends=[*SOURCES, "setup.py"], language="c++")])
