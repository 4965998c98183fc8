"""The fused op against eager, compiled eager and memory's own speed: `python bench.py op`."""
import argparse
import os
import platform
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

import reparam

import torch
from torch import Tensor

SHAPES = ("128x128", "128x512", "1024x128", "8192x128", "65536x128")
LARGE_MMAP = "glibc.malloc.mmap_threshold=4294967296:glibc.malloc.trim_threshold=4294967296"  # keep freed memory


def shape(text: str) -> str:
    """A converter for argparse that takes a batch and a latent size."""
    if not re.fullmatch(r"[1-9]\d*x[1-9]\d*", text):
        raise argparse.ArgumentTypeError(f"got {text!r:.60}, wanted BxD, as in 128x128")
    return text


def eager(mu: Tensor, logvar: Tensor, seed: Tensor) -> tuple[Tensor, Tensor]:
    """Reparameterize and KL as people write them; the generator is torch's own, so `seed` goes unused."""
    std = torch.exp(0.5 * logvar)
    z = mu + std * torch.randn_like(std)
    return z, 0.5 * (logvar.exp() + mu.pow(2) - 1 - logvar).sum(1)


def tensors(shape: tuple[int, int], dtype: torch.dtype, device: str) -> tuple[Tensor, ...]:
    """mu, logvar, dz of `shape`, dkl (B,) and a seed."""
    generator = torch.Generator().manual_seed(0)
    mu, logvar, dz = (torch.randn(shape, generator=generator).to(device, dtype) for _ in range(3))
    return mu, logvar, dz, torch.ones(shape[0], device=device), torch.tensor(7, device=device)


def gradients(function: Callable, mu: Tensor, logvar: Tensor, seed: Tensor, dz: Tensor, dkl: Tensor) -> tuple:
    """Gradients of z and kl with respect to mu and logvar, which must require them."""
    z, kl = function(mu, logvar, seed)
    return torch.autograd.grad((z, kl), (mu, logvar), (dz, dkl.to(kl.dtype)))


def check(shape: tuple[int, int], dtype: torch.dtype, device: str) -> None:
    """Stop with an error unless the op agrees with the reference, values and gradients, on up to 4096 rows."""
    mu, logvar, dz, dkl, seed = tensors((min(shape[0], 4096), shape[1]), dtype, device)
    mu, logvar = mu.requires_grad_(), logvar.requires_grad_()
    tolerance = {torch.float32: 1e-5, torch.float64: 1e-12, torch.bfloat16: 1.6e-2, torch.float16: 2e-3}[dtype]
    for function in (reparam.reparameterize_kl, torch.compile(reparam.reparameterize_kl, fullgraph=True)):
        got, wanted = ((*f(mu, logvar, seed), *gradients(f, mu, logvar, seed, dz, dkl))
                       for f in (function, reparam.reference))
        for name, g, w in zip(("z", "kl", "dmu", "dlogvar"), got, wanted, strict=True):
            torch.testing.assert_close(g, w, rtol=tolerance, atol=tolerance, msg=lambda m, name=name: f"{name}: {m}")


def saved_bytes(function: Callable, mu: Tensor, logvar: Tensor, seed: Tensor) -> int:
    """Bytes of the distinct tensors that autograd keeps for the backward."""
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        function(mu, logvar, seed)
    return sum({(tensor.data_ptr(), tensor.shape): tensor.nbytes for tensor in kept}.values())


def turn(candidates: dict[str, Callable], device: str) -> list[float]:
    """Seconds that each candidate takes, run once."""
    times = []
    for run in candidates.values():
        start = time.perf_counter()
        run()
        if device != "cpu":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return times


def medians(candidates: dict[str, Callable], turns: list[list[float]]) -> dict[str, float]:
    """Median seconds of each candidate, of what `turn` gave."""
    return {name: statistics.median(t) for name, t in zip(candidates, zip(*turns, strict=True), strict=True)}


def time_op(shape: tuple[int, int], dtype: torch.dtype, threads: int, seconds: float, device: str) -> dict:
    """One row of the table: forward and forward + backward of each candidate, in microseconds."""
    torch.set_num_threads(threads)
    torch._dynamo.reset()  # or a later row passes its limit of recompilations, and "compiled" is quietly eager
    mu, logvar, dz, dkl, seed = tensors(shape, dtype, device)
    with_mu, with_logvar = mu.clone().requires_grad_(), logvar.clone().requires_grad_()
    functions = {"op": reparam.reparameterize_kl, "eager": eager, "compiled": torch.compile(eager)}
    candidates = {"clone": mu.clone}
    for name, function in functions.items():
        candidates[f"{name} forward"] = lambda f=function: f(mu, logvar, seed)
        candidates[f"{name} both"] = lambda f=function: gradients(f, with_mu, with_logvar, seed, dz, dkl)
    for _ in range(3):
        turn(candidates, device)
    end, turns = time.perf_counter() + seconds, []
    while time.perf_counter() < end or len(turns) < 7:
        turns.append(turn(candidates, device))
    result = {name: 1e6 * median for name, median in medians(candidates, turns).items()}
    saved = {f"{name} saved": saved_bytes(functions[name], with_mu, with_logvar, seed) for name in ("op", "eager")}
    return {"shape": shape, "dtype": str(dtype)[6:], "threads": threads, "runs": len(turns), **result, **saved}


def machine(device: str) -> str:
    """The hardware and software that the figures belong to."""
    model = platform.processor() or platform.machine()
    if os.path.exists("/proc/cpuinfo"):
        with open("/proc/cpuinfo") as file:
            model = next((line.split(":")[1].strip() for line in file if line.startswith("model name")), model)
    level = reparam.extension.simd_level if reparam.extension else "no extension: the reference"
    gpu = f", {torch.cuda.get_device_name()}" if device != "cpu" else ""
    return f"{model}, {os.cpu_count()} cores{gpu}; torch {torch.__version__}; SIMD level {level}"


def show(row: dict) -> None:
    """Print a row of the table."""
    ratio = {f"{name} {part}": row[f"{name} {part}"] / row[f"op {part}"]
             for name in ("eager", "compiled") for part in ("forward", "both")}
    print(f"{'x'.join(map(str, row['shape'])):>10} {row['dtype']:>8} {row['threads']:>3} | {row['op forward']:9.0f} "
          f"{ratio['eager forward']:6.1f}x {ratio['compiled forward']:6.1f}x {row['op forward'] / row['clone']:6.2f} | "
          f"{row['op both']:9.0f} {ratio['eager both']:6.1f}x {ratio['compiled both']:6.1f}x | "
          f"{row['op saved']:>11,} {row['eager saved']:>11,} | {row['runs']:>5}", flush=True)


def op(chosen: argparse.Namespace) -> list[dict]:
    """The subcommand `op`; returns the rows of its table."""
    print(machine(chosen.device) + ("; freed memory kept" if "GLIBC_TUNABLES" in os.environ else ""))
    print("                          |   forward   eager compiled  /clone |      both   eager compiled | "
          "saved, bytes       eager |  runs")
    rows = []
    for dtype in chosen.dtypes:
        for shape in chosen.shapes:
            size = tuple(int(n) for n in shape.split("x"))
            check(size, getattr(torch, dtype), chosen.device)
            for threads in chosen.threads:
                rows.append(time_op(size, getattr(torch, dtype), threads, chosen.seconds, chosen.device))
                show(rows[-1])
    if chosen.shapes[-1] == SHAPES[-1] and chosen.device == "cpu" and "GLIBC_TUNABLES" not in os.environ:
        print(f"\nAgain with freed memory kept by the process (GLIBC_TUNABLES={LARGE_MMAP}):", flush=True)
        subprocess.run([sys.executable, sys.argv[0], "op", "--shapes", SHAPES[-1], "--seconds", str(chosen.seconds),
                        "--threads", *map(str, chosen.threads), "--dtypes", *chosen.dtypes],
                       env={**os.environ, "GLIBC_TUNABLES": LARGE_MMAP}, check=True)
    return rows
