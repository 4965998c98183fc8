"""Time the fused op, and the kernels of a training step, against plain PyTorch.

    python -m pegasus.bench op                                     # all sizes
    python -m pegasus.bench op --shapes 128x128 --dtypes float32   # a quick look
    python -m pegasus.bench op --device cuda
    python -m pegasus.bench step                                   # the kernels, on a CPU

Medians. The op first has to agree with the reference. "eager" is the op as people write it
(randn_like, exp, mul, sum), "compiled" the same under torch.compile, "clone" a copy of
one input: memory's own speed. THP_MEM_ALLOC_ENABLE=1 lets torch take huge pages for large
tensors, for all alike: fresh memory otherwise costs more than the arithmetic.
"""
import argparse
import copy
import functools
import os
import platform
import re
import statistics
from collections.abc import Callable
from pathlib import Path

import reparam
import vae
from pegasus import cli
from pegasus.device import autocast, resolve_device
from pegasus.models.flow_prior import Velocity
from pegasus.training.accelerate import accelerate, faster, suits_winograd, swap_layers

import torch
from torch import Tensor, nn
from torch.utils import benchmark

SHAPES = ((128, 128), (128, 512), (1024, 128), (8192, 128), (65536, 128))
TOLERANCE = {"float32": 1e-5, "float64": 1e-12, "bfloat16": 1.6e-2, "float16": 2e-3}


def machine(device: str) -> str:
    """Return the hardware and software that figures belong to."""
    name = platform.processor() or platform.machine()
    cpu_info = Path("/proc/cpuinfo")
    if cpu_info.exists():
        match = re.search(r"model name\s*: (.*)", cpu_info.read_text())
        name = match[1] if match else name
    if device == "cuda":
        name += f", {torch.cuda.get_device_name()}"
    simd = reparam.extension.simd_level if reparam.extension else "none, the reference"
    hardware = f"{name}, {os.cpu_count()} cores"
    if os.environ.get("THP_MEM_ALLOC_ENABLE") == "1":
        hardware += ", huge pages"
    return f"{hardware}; torch {torch.__version__}; SIMD level {simd}"


def shape(text: str) -> tuple[int, int]:
    """Convert for argparse: batch and latent size, as in 128x512."""
    if not re.fullmatch(r"[1-9]\d*x[1-9]\d*", text):
        raise argparse.ArgumentTypeError(f"got {text!r:.60}, wanted BxD, as in 128x128")
    rows, columns = map(int, text.split("x"))
    return rows, columns


def eager(mu: Tensor, logvar: Tensor, _seed: Tensor | None) -> tuple[Tensor, Tensor]:
    """Reparameterize and KL as people write them, with torch's own generator."""
    std = torch.exp(0.5 * logvar)
    z = mu + std * torch.randn_like(std)
    return z, 0.5 * (logvar.exp() + mu.pow(2) - 1 - logvar).sum(1)


def op_inputs(
    size: tuple[int, int], dtype: str, device: str, requires_grad: bool
) -> dict[str, Tensor]:
    """Return mu, logvar and dz of a size, dkl (B,) and a seed."""
    generator = torch.Generator().manual_seed(0)
    numbers = torch.randn(3, *size, generator=generator)
    mu, logvar, dz = numbers.to(device, getattr(torch, dtype))
    return {
        "mu": mu.requires_grad_(requires_grad),
        "logvar": logvar.requires_grad_(requires_grad),
        "dz": dz,
        "dkl": torch.ones(size[0], device=device),
        "seed": torch.tensor(7, device=device),
    }


def gradients(function: Callable, mu, logvar, dz, dkl, seed) -> tuple[Tensor, ...]:
    """Return z, kl and the gradients of mu and logvar."""
    z, kl = function(mu, logvar, seed)
    grads = torch.autograd.grad((z, kl), (mu, logvar), (dz, dkl.to(kl.dtype)))
    return z, kl, *grads


def check_op(size: tuple[int, int], dtype: str, device: str) -> None:
    """Assert that the op agrees with the reference, on up to 4096 rows."""
    rows, columns = size
    inputs = op_inputs((min(rows, 4096), columns), dtype, device, requires_grad=True)
    tolerance = TOLERANCE[dtype]
    wanted = gradients(reparam.reference, **inputs)
    compiled = torch.compile(reparam.reparameterize_kl, fullgraph=True)
    for function in (reparam.reparameterize_kl, compiled):
        got = gradients(function, **inputs)
        torch.testing.assert_close(got, wanted, rtol=tolerance, atol=tolerance)


def time_op(
    size: tuple[int, int], dtype: str, threads: int, config: argparse.Namespace
) -> list[benchmark.Measurement]:
    """Time each candidate, forward and forward with backward."""
    torch._dynamo.reset()  # or past its limit of recompilations "compiled" is eager
    functions = {
        "op": reparam.reparameterize_kl,
        "eager": eager,
        "compiled": torch.compile(eager),
    }
    candidates = [("forward", "clone", "mu.clone()", None)]
    for name, function in functions.items():
        candidates.append(("forward", name, "function(mu, logvar, seed)", function))
        call = "gradients(function, mu, logvar, dz, dkl, seed)"
        candidates.append(("forward and backward", name, call, function))
    measured = []
    for label, name, call, function in candidates:
        inputs = op_inputs(size, dtype, config.device, "backward" in label)
        timer = benchmark.Timer(
            call,
            globals={"function": function, "gradients": gradients, **inputs},
            label=label,
            sub_label=f"{size[0]}x{size[1]} {dtype}",
            description=name,
            num_threads=threads,
        )
        measured.append(timer.blocked_autorange(min_run_time=config.seconds))
    return measured


def bench_op(config: argparse.Namespace) -> None:
    """Check and time the op in all sizes, types and numbers of threads."""
    measured = []
    for dtype in config.dtypes:
        for size in config.shapes:
            check_op(size, dtype, config.device)
            for threads in config.threads:
                measured += time_op(size, dtype, threads, config)
    benchmark.Compare(measured).print()


def step_networks(network: nn.Module) -> dict[str, nn.Module]:
    """Return a network with torch's layers, in either layout, and with faster ones."""
    innermost = copy.deepcopy(network).to(memory_format=torch.channels_last)
    winograd = copy.deepcopy(innermost)
    swap_layers(winograd, lambda layer: faster(layer) if suits_winograd(layer) else layer)
    both = copy.deepcopy(network)
    accelerate(both)
    return {
        "torch's": network,
        "channels innermost": innermost,
        "Winograd's": winograd,
        "both": both,
    }


def step_losses() -> dict[str, tuple[nn.Module, Callable]]:
    """Return the networks of `make train`, each with its loss of 64 pictures."""
    images = torch.rand(64, 3, 32, 32)
    latents = torch.randn(64, 1024)
    times = torch.rand(64)
    classes = torch.zeros(64, dtype=torch.int64)
    seed = torch.tensor(7)

    def autoencoder(network: nn.Module) -> Tensor:
        return sum(network(images, seed)).sum()

    def prior(network: nn.Module) -> Tensor:
        return network(latents, times, classes).square().sum()

    model = vae.VAE("conv", "gaussian", (16, 8, 8), center=True)
    velocity = Velocity((16, 8, 8), 7)
    return {"autoencoder": (model, autoencoder), "prior": (velocity, prior)}


def forward_backward(network: nn.Module, loss: Callable, precision: str) -> None:
    """Take a step's forward and backward, as training does."""
    network.zero_grad()
    with autocast("cpu", precision):
        value = loss(network)
    value.backward()


def time_step(network: nn.Module, loss: Callable, config: argparse.Namespace) -> float:
    """Return the milliseconds of one forward and backward."""
    step = functools.partial(forward_backward, network, loss, config.precision)
    timer = benchmark.Timer("step()", globals={"step": step}, num_threads=config.threads)
    return 1e3 * timer.timeit(1).mean


def bench_step(config: argparse.Namespace) -> None:
    """Time both networks with each kernel and without, in turn."""
    for name, (network, loss) in step_losses().items():
        networks = step_networks(network)
        taken = {kernels: [] for kernels in networks}
        for _ in range(config.rounds):
            for kernels, candidate in networks.items():
                taken[kernels].append(time_step(candidate, loss, config))
        medians = [f"{key} {statistics.median(ms):.1f}" for key, ms in taken.items()]
        print(f"{name}, {config.precision}, ms: {', '.join(medians)}")


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the two subcommands."""
    whole = cli.number(int, least=1)
    raw = argparse.RawDescriptionHelpFormatter
    parser = cli.Parser(description=__doc__, formatter_class=raw)
    commands = parser.add_subparsers(required=True)
    op = commands.add_parser("op", help="the fused op against what people write")
    op.set_defaults(run=bench_op)
    op.add_argument("--shapes", nargs="+", type=shape, default=SHAPES, metavar="BxD")
    op.add_argument(
        "--dtypes", nargs="+", default=("float32", "bfloat16"), choices=tuple(TOLERANCE)
    )
    op.add_argument("--threads", nargs="+", type=whole, default=(1, 2))
    op.add_argument(
        "--seconds",
        type=cli.number(float, above=0.0),
        default=0.5,
        help="of each figure (default: 0.5)",
    )
    op.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    step = commands.add_parser("step", help="kernels of a training step against torch's layers")
    step.set_defaults(run=bench_step, device="cpu")
    step.add_argument("--precision", default="float32", choices=("float32", "bfloat16"))
    step.add_argument("--threads", type=whole, default=2)
    step.add_argument("--rounds", type=whole, default=20, help="of each figure (default: 20)")
    return parser


def main(argv: list[str] | None = None) -> None:
    config = build_parser().parse_args(argv)
    resolve_device(config.device)
    print(machine(config.device), flush=True)
    config.run(config)


if __name__ == "__main__":
    cli.run(main)
