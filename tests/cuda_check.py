"""Compile the CUDA source for sm_75, 80, 90, 100 and 120; fail where a kernel spills registers.

    python tests/cuda_check.py

Needs nvcc and no GPU. Where there is no nvcc it says that nothing was checked, and succeeds.
"""
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

SOURCE = Path(__file__).resolve().parent.parent / "csrc" / "reparam" / "cuda_kernels.cu"
ARCHITECTURES = (75, 80, 90, 100, 120)


def compile_for(nvcc: str, architecture: int) -> str:
    """What the assembler says of the kernels; exits where the source does not compile."""
    flags = ["-std=c++20", "-O3", "-Xptxas", "-v", f"-arch=sm_{architecture}"]
    with tempfile.TemporaryDirectory() as folder:
        command = [nvcc, *flags, "-c", str(SOURCE), "-o", f"{folder}/kernels.o"]
        result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        sys.exit(f"sm_{architecture}: {SOURCE.name} does not compile\n{result.stderr}")
    return result.stderr


def main() -> None:
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        print("cuda-check: there is no nvcc here, so nothing was checked")
        return
    for architecture in ARCHITECTURES:
        text = compile_for(nvcc, architecture)
        spills = [int(n) for n in re.findall(r"(\d+) bytes spill", text)]
        registers = [int(n) for n in re.findall(r"Used (\d+) registers", text)]
        if not spills or any(spills):
            sys.exit(f"sm_{architecture}: wanted kernels without spills, got\n{text}")
        most = f"at most {max(registers)} registers"
        print(f"sm_{architecture}: {len(registers)} kernels, {most}, no spills")


if __name__ == "__main__":
    main()
