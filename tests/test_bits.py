"""Kernels give the same bits with any instruction set and any number of threads.

    python tests/test_bits.py op|step    # digests of what one instruction set computes
"""
import functools
import hashlib
import importlib.util
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import reparam

import pytest
import torch

ROOT = Path(__file__).parent.parent
# 49752x201: 10^7 values of each result of the op
ROWS, COLUMNS = map(int, os.environ.get("PEGASUS_BITS", "517x201").split("x"))
FLOAT_TYPES = (torch.float32, torch.bfloat16)
Results = list[torch.Tensor]


def op_results(generator: torch.Generator, dtype: torch.dtype) -> Results:
    """z, kl, dmu, dlogvar, of many rows and of a long one."""
    if dtype != torch.float32 and ROWS >= 10000:
        return []
    results = []
    for shape in ((ROWS, COLUMNS), (2, 20001)):
        mu, logvar, dz = (torch.randn(shape, generator=generator).to(dtype) for _ in range(3))
        kl_dtype = reparam.kl_dtype(mu)
        dkl = torch.randn(shape[:1], generator=generator, dtype=kl_dtype)
        seed = torch.tensor(5)
        ops = torch.ops.pegasus
        results += ops.reparameterize_kl(mu, logvar, seed)
        results += ops.reparameterize_kl_backward(dz, dkl, mu, logvar, seed)
    return results


def images(generator: torch.Generator, *shape: int) -> torch.Tensor:
    x = torch.randn(shape, generator=generator)
    return x.contiguous(memory_format=torch.channels_last)


def norm_results(generator: torch.Generator, dtype: torch.dtype) -> Results:
    """Values and gradients of silu_group_norm."""
    x = images(generator, 70, 48, 5, 5).to(dtype)
    weight, bias = torch.randn(2, 70, 48, generator=generator)
    y = torch.empty_like(x)
    dx = torch.empty_like(x)
    stats = torch.empty(2, 70, 4)
    dweight, dbias = torch.empty(2, 70, 48)
    ops = torch.ops.pegasus_step
    ops.silu_group_norm(x, weight, bias, y, stats, 4, 1e-5)
    ops.silu_group_norm_backward(y, x, weight, bias, stats, dx, dweight, dbias, 4)
    return [y, stats, dx, dweight, dbias]


def winograd_results(generator: torch.Generator, dtype: torch.dtype) -> Results:
    """Values and gradients of winograd; the weight's with one thread.

    With several, the threads' sums are added up, which rounds.
    """
    x = images(generator, 64, 16, 8, 4)
    dy = images(generator, 64, 16, 8, 4)
    weight = images(generator, 16, 16, 3, 3)
    bias = x[0, :, 0, 0].clone()
    dweight = torch.empty_like(weight)
    y = torch.empty_like(x)
    dx = torch.empty_like(x)
    ops = torch.ops.pegasus_step
    ops.winograd(x, weight, bias, y, 7)
    ops.winograd_backward(dy, x, weight, dx, dweight, 7)
    torch.set_num_threads(1)
    ops.winograd_backward(dy, x, weight, torch.empty_like(x), dweight, 7)
    return [y, dx, dweight]


def show(results: Callable[..., Results], dtype: torch.dtype) -> None:
    """Print a line for each result and number of threads."""
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        generator = torch.Generator().manual_seed(0)
        for i, tensor in enumerate(results(generator, dtype)):
            data = tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()
            digest = hashlib.sha256(data).hexdigest()
            print(threads, results.__name__, dtype, i, digest)


def main(extension: str) -> None:
    if extension == "op":
        for dtype in (*FLOAT_TYPES, torch.float16, torch.float64):
            show(op_results, dtype)
        print(reparam.extension.simd_level, file=sys.stderr)
        return
    import pegasus_step

    for dtype in FLOAT_TYPES:
        show(norm_results, dtype)
    if torch.backends.mkl.is_available():  # others' products may depend on the threads
        show(winograd_results, torch.float32)
    print(pegasus_step.simd_level, file=sys.stderr)


@functools.cache
def digests(extension: str, level: str) -> list[set[str]]:
    """A line for each result at one instruction set, with one thread, two and three."""
    command = [sys.executable, "-W", "ignore", __file__, extension]
    env = os.environ | {"PEGASUS_SIMD": level, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=env)
    if f"PEGASUS_SIMD: got '{level}'" in done.stderr:
        pytest.skip(f"the build or this processor lacks {level}")
    assert done.returncode == 0, done.stderr
    assert done.stderr.strip() == level
    lines = done.stdout.splitlines()
    return [{line[2:] for line in lines if line[0] == threads} for threads in "123"]


@pytest.mark.parametrize("extension", ["op", "step"])
@pytest.mark.parametrize("level", ["baseline", "avx2", "avx512"])
def test_bits_do_not_depend_on_instruction_set_or_threads(extension: str, level: str) -> None:
    if reparam.extension is None:
        pytest.skip("the extension is not built, or PEGASUS_EXTENSION=0")
    if extension == "step" and importlib.util.find_spec("pegasus_step") is None:
        pytest.skip("pegasus_step is not built")
    wanted = digests(extension, "baseline")[0]
    values = {line.split()[-1] for line in wanted}
    assert len(values) == len(wanted) >= 10  # all results differ
    assert digests(extension, level) == [wanted] * 3


GOLDEN = {  # noise, z, kl, dmu, dlogvar
    torch.float32: "a389df2efbcc3d0b db0f627732da699d bfa7e5da271e9ce2 "
    "f1376a89ff295423 023cece5305158ba",
    torch.float64: "dc8d71e50963c6c0 852b08dbac8ebc3d 1ae1441e5c870037 "
    "73d4684f274bd6f8 d4067561cb5f05e5",
    torch.bfloat16: "1f1809dea2b322ec c5d6b34499b359ef fe80c67095f81f9d "
    "b6f17dc76ede3691 6ff0982397a893a5",
    torch.float16: "4e9a541ebf5bc9f2 58011d23b216c089 2ea2e81d90b4e575 "
    "16b2cf4811256fd7 83a162b0aa1df64a",
}


def numbers(generator: torch.Generator, *shape: int) -> torch.Tensor:
    """Numbers from -4 to 4 that are the same on every machine."""
    return torch.randint(-(2**15), 2**15 + 1, shape, generator=generator) / 2**13


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_no_version_changes_a_bit(dtype: torch.dtype) -> None:
    """Digests of noise, z, kl and gradients. float64's functions are the system's: rounded."""
    if reparam.extension is None:
        pytest.skip("the extension is not built, or PEGASUS_EXTENSION=0")
    generator = torch.Generator().manual_seed(0)
    mu, logvar, dz = numbers(generator, 3, 67, 1003).to(dtype)
    dkl = numbers(generator, 67).to(reparam.kl_dtype(mu))
    seed = torch.tensor(-77)
    zeros = torch.zeros_like(mu)
    ops = torch.ops.pegasus
    results = [ops.reparameterize_kl(zeros, zeros, seed, 2**33)[0]]
    results += ops.reparameterize_kl(mu, logvar, seed, 3)
    results += ops.reparameterize_kl_backward(dz, dkl, mu, logvar, seed, 3)
    digests = []
    for tensor in results:
        rounded = tensor.float() if dtype == torch.float64 else tensor
        data = rounded.flatten().view(torch.uint8).numpy().tobytes()
        digests.append(hashlib.sha256(data).hexdigest()[:16])
    assert " ".join(digests) == GOLDEN[dtype]


if __name__ == "__main__":
    main(sys.argv[1])
