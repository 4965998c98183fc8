"""The kernels' bits are the same with any instruction set and any number of threads."""
import functools
import os
import subprocess
import sys

import reparam

import pytest
from conftest import ROOT

if reparam.extension is None:
    pytest.skip("the extension is not built, or PEGASUS_EXTENSION=0", allow_module_level=True)

SIZE = os.environ.get("PEGASUS_BITS", "517x201").split("x")  # 49752x201: 10^7 values of each result of the op
CHILD = """if True:
    import hashlib, sys, torch, reparam
    rows, columns = map(int, sys.argv[1:])
    ops = torch.ops.pegasus

    def op(generator, dtype):
        if dtype != torch.float32 and rows >= 10000:
            return []
        x = [torch.randn(rows, columns, generator=generator).to(dtype) for _ in range(3)]
        dkl = torch.randn(rows, generator=generator, dtype=torch.promote_types(dtype, torch.float32))
        return [*ops.reparameterize_kl(x[0], x[1], torch.tensor(5)),
                *ops.reparameterize_kl_backward(x[2], dkl, x[0], x[1], torch.tensor(5))]

    def layers(generator, dtype):
        x = torch.randn(70, 48, 5, 5, generator=generator).to(dtype).contiguous(memory_format=torch.channels_last)
        weight, bias = torch.randn(2, 70, 48, generator=generator)
        y, dx, stats = torch.empty_like(x), torch.empty_like(x), torch.empty(2, 70, 4)
        dweight, dbias = torch.empty(2, 70, 48)
        ops.silu_group_norm(x, weight, bias, y, stats, 4, 1e-5)
        ops.silu_group_norm_backward(y, x, weight, bias, stats, dx, dweight, dbias, 4)
        logits, pictures = x.contiguous(), x.abs().float().contiguous()
        sse, dlogits = torch.empty(70), torch.empty_like(logits)
        ops.squared_error(logits, pictures, sse)
        ops.squared_error_backward(sse, logits, pictures, dlogits)
        return [y, stats, dx, dweight, dbias, sse, dlogits]

    def adam(generator, dtype):
        grad = 1e-18 * torch.randn(100003, generator=generator).to(dtype)  # squares of some are denormal
        moments, length, copy = torch.zeros(3, 100003), torch.zeros(()), torch.zeros(100003, dtype=dtype)
        ops.adam(moments[0], grad, moments[1], moments[2], copy, 1e-3, 1.0, 0.9, 0.999, 1e-8, 1.0)
        ops.add_squares(1e18 * grad, length)
        return [moments, length, torch.stack([copy, copy])]

    def winograd(generator, _):
        x, dy = (torch.randn(64, 16, 8, 4, generator=generator).contiguous(memory_format=torch.channels_last)
                 for _ in range(2))
        kernels, bias, sums = torch.randn(36, 16, 16, generator=generator), x[0, :, 0, 0].clone(), torch.empty(36, 256)
        y, dx = torch.empty_like(x), torch.empty_like(x)
        ops.winograd(x, kernels, bias, y, 7)
        ops.winograd_backward(dy, x, kernels, dx, sums, 7)
        torch.set_num_threads(1)  # the threads' sums are added up, which rounds
        ops.winograd_backward(dy, x, kernels, torch.empty_like(x), sums, 7)
        return [y, dx, sums]

    steps = (torch.float32, torch.bfloat16)
    all_of_them = {op: (*steps, torch.float16, torch.float64), layers: steps, adam: steps,
                   winograd: [None] * torch.backends.mkl.is_available()}
    for work, dtypes in all_of_them.items():
        for dtype in dtypes:
            for threads in (1, 2, 3):
                torch.set_num_threads(threads)
                for i, t in enumerate(work(torch.Generator().manual_seed(0), dtype)):
                    bits = t.contiguous().view(-1).view(torch.uint8).numpy().tobytes()
                    print(threads, work.__name__, dtype, i, hashlib.sha256(bits).hexdigest())
    print(reparam.extension.simd_level, file=sys.stderr)
"""


@functools.cache
def digests(level: str) -> list[set[str]]:
    """A line for each result at one instruction set, with one thread, two and three."""
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", CHILD, *SIZE], text=True, cwd=ROOT,
                          capture_output=True, env=os.environ | {"PEGASUS_SIMD": level})
    if "which this processor lacks" in done.stderr:
        pytest.skip(f"this processor lacks {level}")
    assert done.returncode == 0, done.stderr
    assert done.stderr.strip() == level
    lines = done.stdout.splitlines()
    return [{line[2:] for line in lines if line[0] == threads} for threads in "123"]


@pytest.mark.parametrize("level", ["baseline", "avx2", "avx512"])
def test_bits_do_not_depend_on_instruction_set_or_threads(level):
    if level not in reparam.extension.simd_levels:
        pytest.skip(f"the build has no {level}")
    wanted = digests("baseline")[0]
    assert len({line.split()[-1] for line in wanted}) == len(wanted) > 10  # all results differ
    assert digests(level) == [wanted] * 3
