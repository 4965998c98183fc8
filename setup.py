"""Build the extensions: the op behind reparam.py, and kernels for training on a CPU.

    python setup.py build_ext --inplace  # both, here, for the scripts of this folder
    pip install --no-build-isolation .   # the op alone, for `import reparam` in another
                                         # project; uses the torch that is installed;
                                         # first `pip install -U setuptools pybind11`

Needs torch 2.10, pybind11 3.0 and a C++20 compiler. What can't be compiled is left out, with
a sentence: Python code takes its place, which is slower and the same otherwise. CUDA kernels
are built where torch has CUDA and there is an nvcc of the same major version.

Environment: CXX is the compiler. PEGASUS_CUDA=0 or 1 leaves CUDA out or insists on it.
TORCH_CUDA_ARCH_LIST chooses its architectures ("8.0;9.0a", "Hopper"). PEGASUS_FLAGS adds
flags, for sanitizers.
"""
import hashlib
import os
import platform
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

try:
    from setuptools import Extension, setup
    from setuptools.command.build_ext import build_ext
    from setuptools.errors import BaseError, CCompilerError
except ImportError:
    sys.exit(
        f"{sys.executable} has no setuptools, or one too old; install it, or use .venv, as "
        "`make` does"
    )

OLDEST = {"torch": (2, 10), "pybind11": (3, 0)}  # packages' versions
OP = "pegasus_op"
STEP = "pegasus_step"
FOLDERS = {OP: Path("csrc/reparam"), STEP: Path("csrc/step")}
INSTEAD = {
    OP: "reparam.py uses its PyTorch reference",
    STEP: "training uses PyTorch's layers",
}
CUDA_SOURCE = FOLDERS[OP] / "cuda_kernels.cu"

COMMON = ["-std=c++20", "-g0"]
# the stable ABI of torch 2.10 and later
STABLE = "-DTORCH_TARGET_VERSION=0x020a000000000000"
HOST = ["-O2", "-fvisibility=hidden", STABLE]
# No contraction of a * b + c: all instruction sets are to give the same bits.
KERNEL = ["-O3", "-ffp-contract=off", "-fno-math-errno"]
KERNEL += ["-Wno-maybe-uninitialized", "-Wno-unknown-warning-option"]
LEVELS = {"baseline": []}
if platform.machine().lower() in ("x86_64", "amd64"):
    HOST.append("-DPEGASUS_X86")
    LEVELS["avx2"] = ["-mavx2"]
    # Tuned for no processor in particular, gcc's code takes 14 % longer on a Zen 4.
    # Tuning changes no bit.
    LEVELS["avx512"] = ["-mavx512f", "-mtune=icelake-server"]

# torch's own; CUDA 13 no longer knows the first three
ARCHITECTURES = ("5.0", "6.0", "7.0", "7.5", "8.0", "9.0", "10.0", "12.0")
GENERATIONS = {  # which TORCH_CUDA_ARCH_LIST can name
    "Pascal": "6.0 6.1", "Volta": "7.0", "Turing": "7.5", "Ampere": "8.0 8.6",
    "Ada": "8.9", "Hopper": "9.0", "Blackwell": "10.0 12.0",
}
VARIABLES = ("CXX", "CFLAGS", "CXXFLAGS", "LDFLAGS", "PEGASUS_FLAGS")
CUDA_VARIABLES = ("PEGASUS_CUDA", "CUDA_HOME", "CUDA_PATH", "TORCH_CUDA_ARCH_LIST")


def check_packages() -> None:
    """Exit with a sentence where a package is missing or older than what was tried."""
    for name, oldest in OLDEST.items():
        try:
            got = version(name) or "none"
        except PackageNotFoundError:
            got = "none"
        numbers = [int(text) for text in re.findall(r"\d+", got)[:2]]
        if tuple(numbers) < oldest:
            wanted = ".".join(map(str, oldest))
            sys.exit(
                f"{name}: {sys.executable} has {got}, wanted {wanted} or later; install it, or "
                "use .venv, as `make` does"
            )


def files(name: str) -> list[str]:
    """List the files that an extension is made of."""
    paths = {path for path in FOLDERS[name].iterdir() if path.is_file()}
    if name == STEP:
        paths |= set(FOLDERS[OP].glob("*.h"))
    return sorted(str(path) for path in paths)


def settings(name: str) -> str:
    """Describe what an extension is built of and with."""
    digest = hashlib.sha256()
    for path in [*files(name), "setup.py"]:
        digest.update(Path(path).read_bytes())
    variables = VARIABLES + CUDA_VARIABLES if name == OP else VARIABLES
    texts = [f"{variable}={os.environ.get(variable, '')}" for variable in variables]
    return " ".join([digest.hexdigest(), f"torch {version('torch')}", *texts])


def go_without(what: str, reason: str, name: str) -> None:
    """Say what is left out of the extension `name`, or that all of it is."""
    print(
        f"Built without {what}: {reason}. Instead, {INSTEAD[name]}, "
        "which is slower and the same otherwise.",
        file=sys.stderr,
    )


def output_of(*command: str) -> str:
    """Return what a command prints."""
    return subprocess.run(command, capture_output=True, text=True).stdout


def find_nvcc() -> str | None:
    """Find the nvcc under CUDA_HOME or on PATH."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    path = shutil.which("nvcc", path=f"{home}/bin") if home else None
    return path or shutil.which("nvcc")


def nvcc() -> str | None:
    """Return the CUDA compiler to use; None to build without CUDA kernels."""
    import torch

    asked = os.environ.get("PEGASUS_CUDA", "")
    if asked not in ("", "0", "1"):
        raise SystemExit(f"PEGASUS_CUDA: got {asked!r}, wanted 0 or 1")
    if asked == "0":
        return None
    path = find_nvcc()
    if asked == "1":
        if path is None:
            raise SystemExit("PEGASUS_CUDA=1: no nvcc found on PATH or under CUDA_HOME")
        return path
    if torch.version.cuda is None:
        return None
    release = f"release {torch.version.cuda.split('.')[0]}."
    if path and release in output_of(path, "--version"):
        return path
    reason = f"no nvcc of CUDA {torch.version.cuda}, which is torch's, was found"
    go_without("CUDA kernels", reason, OP)
    return None


def architectures(compiler: str) -> list[str]:
    """List compute capabilities to compile for, such as "90" or "90a".

    They are those of TORCH_CUDA_ARCH_LIST, else those of ARCHITECTURES that nvcc knows.
    """
    asked = os.environ.get("TORCH_CUDA_ARCH_LIST", "")
    for name, numbers in GENERATIONS.items():
        asked = asked.replace(name, numbers)
    wanted = re.findall(r"[^ ;]+", asked)
    for text in wanted:
        if not re.fullmatch(r"\d+\.\d[af]?(\+PTX)?", text):
            raise SystemExit(
                f"TORCH_CUDA_ARCH_LIST: got {text}, wanted numbers as in 9.0a, or some "
                f"of {', '.join(GENERATIONS)}"
            )
    if wanted:
        return [text.removesuffix("+PTX").replace(".", "") for text in wanted]
    known = output_of(compiler, "--list-gpu-code").split()
    numbers = [text.replace(".", "") for text in ARCHITECTURES]
    return [number for number in numbers if f"sm_{number}" in known]


def cuda_library_folders(compiler: str) -> list[str]:
    """List where nvcc looks for libcudart; nvcc's own path may be a wrapper's."""
    command = [compiler, "--dryrun", str(CUDA_SOURCE)]
    plan = subprocess.run(command, capture_output=True, text=True).stderr
    for line in plan.splitlines():
        if "LIBRARIES=" in line:
            return re.findall(r'-L([^"\s]+)', line)
    return []


def compile_jobs(name: str, macros: list[str]) -> list[tuple[Path, str, list[str]]]:
    """List an extension's sources, each with a folder for its object file and flags.

    CPU kernels are compiled once for each instruction set.
    """
    host = []
    kernels = []
    for source in sorted(FOLDERS[name].glob("*.cpp")):
        if not source.name.endswith("_kernels.cpp"):
            host.append((source, "host", [*HOST, *macros]))
            continue
        for level, flags in LEVELS.items():
            flags = [*KERNEL, f"-DPEGASUS_LEVEL={level}", *flags]
            kernels.append((source, level, flags))
    return host + kernels  # module.cpp takes longest, so first


class BuildExtensions(build_ext):
    """Builds what is out of date: in place both extensions, otherwise the op alone."""

    def finalize_options(self) -> None:
        super().finalize_options()
        self.folders = [self.build_lib, "."] if self.inplace else [self.build_lib]
        if not self.inplace:
            self.extensions = [e for e in self.extensions if e.name == OP]

    def run(self) -> None:
        check_packages()
        if not os.environ.get("CXX"):
            os.environ["CXX"] = "c++" if shutil.which("c++") else "g++"
        if not self.inplace:
            self.remove(STEP)  # or one that was built in place would be packed
        super().run()

    def build_extensions(self) -> None:
        """Build the op, then the step's kernels; after a failure leave out the rest."""
        built = []
        for extension in self.extensions:
            if not self.build_one(extension.name):
                break
            built.append(extension)
        for extension in self.extensions[len(built):]:
            self.leave_out(extension.name)
        self.extensions = built

    def build_one(self, name: str) -> bool:
        """Build an extension where it is out of date; return whether it is there."""
        target = Path(self.get_ext_fullpath(name))
        made_with = Path(self.build_temp) / name / "made-with"
        now = settings(name)
        if target.exists() and made_with.exists() and not self.force:
            if made_with.read_text() == now:
                return True
        made_with.parent.mkdir(parents=True, exist_ok=True)
        # before the work: an interrupted link must not pass for up to date
        made_with.unlink(missing_ok=True)
        try:
            self.compile_and_link(name, target)
        except (BaseError, CCompilerError):
            return False
        made_with.write_text(now)
        return True

    def leave_out(self, name: str) -> None:
        """Say that an extension could not be built, and remove any older one."""
        compiler = os.environ["CXX"]
        reason = f"{compiler} failed, see above; a C++20 compiler is needed"
        if not shutil.which(compiler.split()[0]):
            reason = f"no C++ compiler was found (CXX={compiler})"
        go_without(name, reason, name)
        self.remove(name)

    def remove(self, name: str) -> None:
        """Remove what would be imported or packed in place of what the sources say."""
        for folder in self.folders:
            for older in Path(folder).glob(f"{name}.*.so"):
                older.unlink()

    def compile_and_link(self, name: str, target: Path) -> None:
        """Build an extension, the op with CUDA kernels where that is possible."""
        from torch.utils.cpp_extension import library_paths

        compiler = nvcc() if name == OP else None
        print(f"building {name}: up to a minute", flush=True)
        macros = []
        objects = []
        libraries = ["torch", "torch_cpu", "c10"]
        library_folders = library_paths()
        names = self.compile_cuda(compiler) if compiler else []
        if names:
            macros = ["-DPEGASUS_CUDA", "-DUSE_CUDA"]
            objects = [self.cuda_object()]
            libraries += ["torch_cuda", "cudart"]
            library_folders += cuda_library_folders(compiler)
        macros.append(f'-DPEGASUS_CUDA_ARCHITECTURES="{" ".join(names)}"')
        objects += self.compile_cpp(name, macros)
        target.parent.mkdir(parents=True, exist_ok=True)
        self.compiler.link_shared_object(
            objects,
            str(target),
            libraries=libraries,
            library_dirs=library_folders,
            extra_postargs=self.flags(),
            target_lang="c++",
        )

    def flags(self) -> list[str]:
        """List the flags of every file and of the link."""
        return [*COMMON, *os.environ.get("PEGASUS_FLAGS", "").split()]

    def compile_cpp(self, name: str, macros: list[str]) -> list[str]:
        """Compile an extension's C++ files; return the object files."""
        import pybind11
        from torch.utils.cpp_extension import include_paths

        # pybind11's headers before torch's copy, which refuses the stable ABI
        folders = [pybind11.get_include(), *include_paths()]

        def compile_one(job: tuple[Path, str, list[str]]) -> str:
            source, folder, flags = job
            return self.compiler.compile(
                [str(source)],
                output_dir=str(Path(self.build_temp) / folder),
                include_dirs=folders,
                extra_postargs=[*self.flags(), *flags],
            )[0]

        # a compiler takes half a gigabyte of memory
        with ThreadPoolExecutor(min(os.cpu_count() or 1, 4)) as pool:
            return list(pool.map(compile_one, compile_jobs(name, macros)))

    def cuda_object(self) -> str:
        """Return the path of the CUDA kernels' object file."""
        return str(Path(self.build_temp) / "cuda_kernels.cu.o")

    def compile_cuda(self, compiler: str) -> list[str]:
        """Compile the CUDA kernels; return the architectures, none where that fails."""
        names = architectures(compiler)
        flags = [f"-gencode=arch=compute_{name},code=sm_{name}" for name in names]
        for name in names[:1]:  # PTX, for newer architectures that are not listed
            flags.append(f"-gencode=arch=compute_{name},code=compute_{name}")
        command = [compiler, "-std=c++20", "-O3", "--threads=0", "-Xcompiler=-fPIC"]
        output = self.cuda_object()
        Path(output).parent.mkdir(parents=True, exist_ok=True)
        try:
            self.spawn([*command, *flags, "-c", str(CUDA_SOURCE), "-o", output])
        except BaseError:
            if os.environ.get("PEGASUS_CUDA"):
                message = f"PEGASUS_CUDA=1: {compiler} failed, see above"
                raise SystemExit(message) from None
            go_without("CUDA kernels", f"{compiler} failed, see above", OP)
            return []
        return names


def extension(name: str) -> Extension:
    """Describe an extension to setuptools."""
    main = str(FOLDERS[name] / "module.cpp")
    return Extension(name, [main], depends=[*files(name), "setup.py"], language="c++")


setup(
    name="pegasus-op",
    version="1.0.0",
    py_modules=["reparam"],
    install_requires=["torch>=2.10"],
    cmdclass={"build_ext": BuildExtensions},
    # a source distribution has the op alone
    ext_modules=[extension(name) for name in FOLDERS if FOLDERS[name].is_dir()],
)
