"""Checks, then times, the fused op and whole epochs of training against what people would use instead.

    python bench.py op                                        # all sizes, float32 and bfloat16, one thread and two
    python bench.py op --shapes 128x128 --dtypes float32      # a quick look
    python bench.py op --json op.json                         # its first pass as JSON
    python bench.py op --device cuda                          # the same on a GPU; so for train
    python bench.py train --data auto                         # epochs of both networks and the prior
    python bench.py train --arch mlp --sizes                  # and against batch, data and latent size, and processes

`op`: every figure is the median of runs that take turns: one of each candidate, then one of each again. "eager" is
the op as people write it (randn_like, exp, mul, sum), "compiled" the same under torch.compile, "clone" the time to
copy one input: memory's own speed. Times are in microseconds. Results are checked against the reference before timing.

`train`: images a second of whole epochs, medians of rounds that take turns, after one that does not count. "usual" is
the loop people copy (float32, a DataLoader that converts picture by picture as torchvision does, default Adam, the same
network and threads, the better of 0 and 2 workers); "floor" the time of the step's matrix products or convolutions
alone, forward and backward, in torch's own layers, the precision that `train.py` would choose and channels innermost,
plus one pass of torch's fused Adam.
"""
import argparse
import copy
import csv
import dataclasses
import json
import math
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import options
import bench_op
import fused
import log
import recipe
import replay
import source
import train
import vae
from bench_op import eager, machine
from group import Group

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn


class Usual(torch.utils.data.Dataset):
    """Pictures converted one by one: each becomes one of Pillow's and then a tensor, as torchvision's CIFAR10 and
    its ToTensor do it."""

    def __init__(self, images: Tensor):
        self.images = images.permute(0, 2, 3, 1).contiguous().numpy()

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, i: int) -> Tensor:
        picture = np.array(Image.fromarray(self.images[i]))
        return torch.from_numpy(picture).permute(2, 0, 1).contiguous().float().div(255)


def usual_model(chosen: recipe.Options) -> vae.VAE:
    """The network of torch's own layers, in torch's default layout."""
    model = vae.VAE(chosen.arch, chosen.likelihood, chosen.latent)
    for layer in model.modules():
        if type(layer).__module__ == "fused":
            layer.__class__ = type(layer).__base__
    return model.to(memory_format=torch.contiguous_format)


def usual_loss(model: vae.VAE, x: Tensor) -> Tensor:
    """The objective as people write it."""
    mu, logvar = model.encoder(x).flatten(1).chunk(2, 1)
    z, kl = eager(mu, logvar, None)
    sse = (x - torch.sigmoid(model.decoder(z.unflatten(1, model.shape)))).pow(2).flatten(1).sum(1)
    return (model.distortion(sse, sse.detach().mean() / vae.PIXELS) + kl).mean()


def usual_epoch(model: vae.VAE, optimizer: torch.optim.Adam, loader: torch.utils.data.DataLoader) -> None:
    for x in loader:
        loss = usual_loss(model, x.to(model.variance.device))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def our_epoch(training: train.Training) -> None:
    """The training part of an epoch as `train.py` runs it: no test, no log, no checkpoint."""
    quiet = log.Progress(1, 1, training.images, 0, 0.0, training.folder / "speed.csv", quiet=True)
    training.step = 0
    training.totals.zero_()
    with torch.backends.cudnn.flags(enabled=True, deterministic=True):  # as train.py has it
        training.train_epoch(quiet)


def floor_step(training: train.Training, batch: int) -> Callable[[], Tensor]:
    """A function that does the matrix products or convolutions of one step, and Adam's pass over memory, alone.

    On a GPU captured, as the step itself is.
    """
    dtype = torch.bfloat16 if training.options.precision == "bfloat16" else torch.float32
    network = training.optimizer.trained
    products = [m for m in network.modules() if isinstance(m, fused.PRODUCTS)]
    copies, layers = {m: copy.deepcopy(m).to(dtype) for m in products}, []

    def keep(layer: nn.Module, inputs: tuple, output: Tensor) -> None:
        x = inputs[0].detach().to(dtype).requires_grad_(bool(layers))  # the first needs no gradient of the pictures
        kind = next(kind for kind in fused.PRODUCTS if isinstance(layer, kind))  # torch's own
        layers.append((copies[layer], kind.forward, x, torch.randn_like(output, dtype=dtype)))

    hooks = [m.register_forward_hook(keep) for m in products]
    rows = torch.arange(batch, device=training.options.device)
    seeds = train.phases.purpose_seeds(training.options, 0, *training.phase.purposes)
    training.phase.backward(rows, None, batch, 0, seeds, torch.tensor(0.0, device=rows.device))
    for hook in hooks:
        hook.remove()
    weights = [p.detach().float().requires_grad_() for p in network.parameters()]
    for weight in weights:
        weight.grad = torch.zeros_like(weight)
    optimizer = torch.optim.Adam(weights, 1e-9, fused=True, capturable=rows.is_cuda)

    def step() -> Tensor:
        for layer, forward, inputs, gradient in layers:
            wanted = [layer.weight] + ([inputs] if inputs.requires_grad else [])
            torch.autograd.grad(forward(layer, inputs), wanted, gradient)
        optimizer.step()
        return weights[0]
    again = replay.Replay()
    return lambda: again(step) if rows.is_cuda else step()


def time_training(chosen: recipe.Options, data: source.Pictures, rounds: int, against: bool = True) -> dict:
    """Images a second of train.py's epochs and, with `against`, of the usual loop and of the floor."""
    training = train.Training(chosen, data, None, Group(chosen.device))
    training.epoch = chosen.epochs - 1  # of the learned prior where there is one
    training.enter()
    n, batch = len(data.images), min(chosen.batch_size, len(data.images))
    candidates = {"ours": lambda: our_epoch(training)}
    if against and chosen.prior == "normal":
        for workers in (0, 2):
            model = usual_model(chosen).to(chosen.device)
            loader = torch.utils.data.DataLoader(Usual(data.images), batch, shuffle=True, num_workers=workers)
            optimizer = torch.optim.Adam(model.parameters(), chosen.lr)
            candidates[f"usual, {workers} workers"] = lambda a=(model, optimizer, loader): usual_epoch(*a)
    if against:
        step = floor_step(training, batch)
        candidates["floor"] = lambda: [step() for _ in range(round(n / batch))]
    turns = [bench_op.turn(candidates, chosen.device) for _ in range(rounds + 1)][1:]  # the first warms up
    return {name: n / median for name, median in bench_op.medians(candidates, turns).items()}


def variants(base: recipe.Options, images: int, sizes: bool) -> list[tuple[dict, int]]:
    """Changes of options, and numbers of pictures, to time."""
    batches = [({"batch_size": size}, images) for size in (32, 256, 1024)]
    grids = ("8x8x4", "128") if base.prior == "normal" else ("8x8x4",)
    latents = [({"latent": size}, images) for size in (("32", "512") if base.arch == "mlp" else grids)]
    return [({}, images), *([*batches, *latents, ({}, 5_000), ({}, 50_000)] if sizes else [])]


def processes_speed(base: recipe.Options, data: str, processes: int) -> float:
    """Images a second of so many processes of one thread each: the better of two epochs on all pictures, after one."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", processes, "--",
               Path(__file__).with_name("train.py"), "--data", data, "--arch", base.arch, "--latent", base.latent,
               "--prior", base.prior, "--epochs", 3, "--threads", 1, "--run", base.run, "--overwrite", "--no-judge",
               "--device", "cpu"]
    subprocess.run([str(word) for word in command], check=True, capture_output=True)
    with open(Path(base.run) / "speed.csv") as file:
        epochs = [float(row["images_per_second"]) for row in csv.DictReader(file)]
    return max(epochs[1:])  # the first warms up, or is the autoencoder's


def time_network(name: str, chosen: argparse.Namespace, data: source.Pictures, place: str) -> Iterator[dict]:
    """Rows of figures of one network, which are printed as they come. place: a folder to train in."""
    network = {"mlp": {"arch": "mlp"}, "conv": {"latent": chosen.latent, "prior": "normal"},
               "prior": {"latent": "8x8x8", "epochs": 2}}[name]
    base = recipe.resolve(recipe.Options(**network, run=place, threads=chosen.threads, device=chosen.device,
                                         save_seconds=math.inf))
    torch.set_num_threads(base.threads)
    print(f"{name}, latent {base.latent}, {base.threads} threads, {base.precision}, {chosen.rounds} rounds; "
          f"{machine(base.device)}", flush=True)
    for changes, n in variants(base, chosen.images, chosen.sizes):
        against = not changes and n == chosen.images
        rows = torch.arange(n) % len(data.images)  # again from the start where there are fewer
        some = dataclasses.replace(data, images=data.images[rows], labels=data.labels[rows])
        speeds = time_training(dataclasses.replace(base, **changes), some, chosen.rounds, against)
        yield {"arch": name, **changes, "images": n, **speeds}
    for count in (1, 2) if chosen.sizes and base.device == "cpu" else ():
        yield {"arch": name, "processes": count, "ours": processes_speed(base, chosen.data, count)}


def train_command(chosen: argparse.Namespace) -> list[dict]:
    """The subcommand `train`; returns its rows of figures."""
    torch.set_flush_denormal(True)
    data, rows = source.load(chosen.data, "horse,bird"), []
    with tempfile.TemporaryDirectory() as place:
        for name in chosen.arch:
            for row in time_network(name, chosen, data, place):
                show_training(row)
                rows.append(row)
    return rows


def show_training(row: dict) -> None:
    """Print images a second, and the ratios that count."""
    print("  " + ", ".join(f"{key} {value:,.0f}" if isinstance(value, float) else f"{key} {value}"
                           for key, value in row.items()), flush=True)
    usual = max(row.get("usual, 0 workers", 0), row.get("usual, 2 workers", 0))
    if usual:
        print(f"  {row['ours'] / usual:.2f} times the usual loop's speed", flush=True)
    if "floor" in row:
        print(f"  {row['floor'] / row['ours']:.2f} times the floor's time", flush=True)


def main(argv: list[str] | None = None) -> None:
    whole = options.number(int, least=1)
    parser = options.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    command = commands.add_parser("op", help="the fused op against eager, compiled eager and clone")
    command.add_argument("--shapes", nargs="+", type=bench_op.shape, default=bench_op.SHAPES, metavar="BxD")
    command.add_argument("--dtypes", nargs="+", default=("float32", "bfloat16"),
                         choices=("float32", "bfloat16", "float16", "float64"))
    command.add_argument("--threads", nargs="+", type=whole, default=(1, 2))
    command.add_argument("--seconds", type=float, default=3.0, help="a row takes about this long")
    command.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    command.add_argument("--json", metavar="FILE", help="write figures to this file, but those with freed memory kept")
    command.set_defaults(run=bench_op.op)
    command = commands.add_parser("train", help="whole epochs against the usual loop and the step's floor")
    command.add_argument("--data", default="auto", help="as in train.py")
    command.add_argument("--arch", nargs="+", default=("mlp", "conv", "prior"), choices=("mlp", "conv", "prior"))
    command.add_argument("--latent", default="8x8x8", help="of conv (default: 8x8x8)")
    command.add_argument("--images", type=whole, default=10_000, help="an epoch's (default: 10000)")
    command.add_argument("--rounds", type=whole, default=3, help="epochs of each that are timed (default: 3)")
    command.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    command.add_argument("--threads", type=options.number(int, least=0, most=1024), default=0,
                         help="0 is torch's default, one a core")
    command.add_argument("--sizes", action="store_true", help="also other batch, data and latent sizes, and processes")
    command.add_argument("--json", metavar="FILE", help="write every figure to this file")
    command.set_defaults(run=train_command)
    chosen = parser.parse_args(argv)
    recipe.device(chosen)
    rows = chosen.run(chosen)
    if chosen.json:
        Path(chosen.json).write_text(json.dumps({"machine": machine(chosen.device), "rows": rows}, indent=1))


if __name__ == "__main__":
    options.run(main)
