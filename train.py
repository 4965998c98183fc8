"""Train a variational autoencoder on CIFAR-10's horses and birds, then a prior for it.

    python train.py                      # a convolutional network, 300 epochs
    python train.py --resume             # goes on where that stopped
    python train.py --run runs/paper --arch mlp --no-center  # the paper's recipe

A run's folder, runs/pegasus, holds the checkpoint last.pt, log.csv (nats and squared
error an image), speed.csv, config.json and pictures. A resumed run ends with the same
bits as one that was never stopped. Options: pegasus/training/config.py, or --help.

The first stage of a run trains the autoencoder, a second one a prior of its latents. A
stage gives loss and test, in pegasus/training/stages.py; the loop, train_stage, is here.
"""
import contextlib
import math
from dataclasses import replace
from pathlib import Path

from pegasus import checkpoint, cli, device
from pegasus.cli import UserError
from pegasus.data import datasets
from pegasus.training import cuda_graph, muon, run_dir
from pegasus.training.adam import SkippingAdam
from pegasus.training.config import TrainConfig, resume_config
from pegasus.training.distributed import Workers
from pegasus.training.muon import Muon
from pegasus.training.progress import Progress
from pegasus.training.run import Run
from pegasus.training.signals import StopSignal
from pegasus.training.stages import Batch, Stage, derived_seeds, epoch_flips, epoch_order

import torch
from torch import Tensor
from torch.nn.utils import get_total_norm
from torch.optim import Adam, Optimizer


def make_optimizers(stage: Stage) -> list[Optimizer]:
    """Return Adam for a stage and, but for the paper's network, Muon for hidden layers.

    Each step sets their learning rate.
    """
    weights = list(stage.network.parameters())
    hidden = []
    if stage.config.arch == "conv":
        hidden = [weight for weight in weights if muon.is_hidden(weight)]
        weights = [weight for weight in weights if not muon.is_hidden(weight)]
    if stage.config.device == "mps":
        adam = SkippingAdam(weights)
    else:
        adam = Adam(weights, fused=True, capturable=device.has_graphs(stage.config.device))
    return [adam, Muon(hidden)] if hidden else [adam]


def restore_optimizers(optimizers: list[Optimizer], moments: list[dict]) -> None:
    """Take moments from a checkpoint, each in the memory layout of its weight.

    Raises what `checkpoint.explain_mismatch` knows where they are another network's.
    """
    for optimizer, saved in zip(optimizers, moments, strict=True):
        if not saved:  # before the first step
            continue
        for i, weight in enumerate(optimizer.param_groups[0]["params"]):
            for name, moment in saved[i].items():
                like = torch.zeros((), device=weight.device) if name == "step" else weight
                if moment.shape != like.shape:
                    raise ValueError("optimizer and model differ in shape")
                optimizer.state[weight][name] = torch.empty_like(like).copy_(moment)


def batches(run: Run, stage: Stage) -> list[tuple[Tensor, Tensor | None]]:
    """Return what is left of an epoch: rows of the images, and which are mirrored.

    Where an epoch takes some of a stage's images, the next takes others, until (nearly) all
    had their turn.
    """
    config = run.config
    n = run.image_count
    turn, part = divmod(run.epoch, stage.image_count // n)
    order = epoch_order(config.seed, turn, stage.image_count)[part * n : (part + 1) * n]
    rows = order.to(config.device).split(config.batch_size)
    mirrored = [None] * len(rows)
    if config.flip:
        flips = epoch_flips(config.seed, run.epoch, run.image_count).to(config.device)
        mirrored = flips.split(config.batch_size)
    return list(zip(rows, mirrored, strict=True))[run.step :]


def step_inputs(run: Run, stage: Stage) -> tuple[Tensor, Tensor]:
    """Return a step's seeds, and its learning rate with the stage's progress, 0 to 1."""
    config = run.config
    seeds = derived_seeds(config.seed, run.steps_done, stage.purposes, config.device)
    steps = (stage.last_epoch - stage.first_epoch) * run.steps_per_epoch
    progress = (run.steps_done - stage.first_epoch * run.steps_per_epoch) / steps
    lr_and_progress = [stage.learning_rate(progress), progress]
    return seeds, device.to_device(lr_and_progress, config.device)


def check_gradients(weights: dict[str, Tensor]) -> None:
    """Raise UserError for a weight without a gradient, as of a layer that is not used."""
    for name, weight in weights.items():
        if weight.grad is None:
            raise UserError(
                f"{name} has no gradient, since the loss does not depend on it; use it, or "
                "remove it from __init__"
            )


def clip_divisor(norm: Tensor, max_norm: float | None) -> Tensor | None:
    """Return the number to divide gradients of a norm by, to bring it down to max_norm."""
    return None if max_norm is None else (norm / max_norm).clamp(min=1.0)


def steps_taken(adam: Optimizer) -> Tensor:
    """Return how many steps Adam took; skipped ones do not count."""
    first = adam.param_groups[0]["params"][0]
    none = torch.zeros((), device=first.device)
    return adam.state.get(first, {}).get("step", none).to(first.device)


def update_weights(
    optimizers: list[Optimizer], lr: Tensor, skip: Tensor, divisor: Tensor | None
) -> Tensor:
    """Take a step of each optimizer; return how many steps were taken so far.

    skip: 1.0 to take none. divisor: of the gradients, unless None.
    """
    for optimizer in optimizers:
        optimizer.param_groups[0]["lr"] = lr
        optimizer.found_inf = skip  # torch's fused Adam has these names
        optimizer.grad_scale = divisor
        optimizer.step()
    return steps_taken(optimizers[0])


def show_step(run: Run, stage: Stage, display: Progress) -> None:
    """Take a step's time; show the epoch's means now and then."""
    display.note_step()
    if display.is_due():
        metrics = stage.metrics(run.guard.means(run.epoch_images))
        display.show(run.epoch + 1, run.images_done, metrics)


def finish_epoch(run: Run, stage: Stage, display: Progress) -> None:
    """Test, log and show the epoch, and go on to the next one.

    Raises UserError for a loss that is not finite.
    """
    means = run.guard.means(run.image_count)
    values = stage.test(means)
    if not math.isfinite(sum(values.values())):
        raise UserError(
            f"{run.folder}: the loss is no longer finite in epoch {run.epoch + 1}; what was "
            f"saved last is still there; begin again with a lower {stage.lr_flag}"
        )
    run.end_epoch(stage.name, values, display.leads)  # counts run.epoch
    shown = stage.metrics(means) | {"test loss": values["test_loss"]}
    if "bits_per_dim" in values:
        shown["bits/dim"] = values["bits_per_dim"]
    display.end_epoch(run.epoch, shown, run.folder / "speed.csv")


def train_stage(run: Run, stage: Stage, optimizers: list, workers: Workers, stop: StopSignal):
    """Train a stage to its end, or until a signal: the training loop."""
    weights = dict(stage.network.named_parameters())
    parameters = list(weights.values())

    # On a GPU captured as a CUDA graph: it reads tensors only, and calls no .item().
    def step(rows: Tensor, mirrored: Tensor | None, seeds: Tensor, lr_and_progress: Tensor):
        lr, progress = lr_and_progress
        batch = Batch(rows, mirrored, len(rows), row_offset=0, seeds=seeds, progress=progress)
        stage.network.zero_grad()
        loss, sums = stage.loss(batch.part(workers.share(len(rows))))
        loss.backward()
        check_gradients(weights)
        workers.sum_(sums)
        workers.sum_gradients(parameters)
        norm = get_total_norm([p.grad for p in parameters])
        skip = run.guard.record(norm, sums, len(rows))
        steps = update_weights(optimizers, lr, skip, clip_divisor(norm, stage.max_norm))
        stage.after_step(steps)
        return sums

    if device.has_graphs(run.config.device) and workers.size == 1:
        step = cuda_graph.Replay(step, run.config.batch_size)
    epochs = (stage.last_epoch, run.config.epochs)
    display = Progress(*epochs, run.image_count, run.images_done, workers.leads)
    while run.epoch < stage.last_epoch:
        for rows, mirrored in batches(run, stage):
            step(rows, mirrored, *step_inputs(run, stage))
            run.step += 1
            run.guard.check(run.steps_done, run.steps_per_epoch, run.folder, stage.lr_flag)
            show_step(run, stage, display)
            if run.step == run.steps_per_epoch:
                finish_epoch(run, stage, display)
            stop.agreed = workers.max(stop.asked, run.config.device)
            if stop.agreed:
                return
            if workers.leads and run.timer.is_due() and run.epoch < run.config.epochs:
                run.save(stage, optimizers)  # after the last epoch `train` does


def train(run: Run, state: dict | None, workers: Workers, stop: StopSignal) -> None:
    """Train all epochs that are left, and save.

    state: of the checkpoint to go on from; it is emptied.
    """
    with checkpoint.explain_mismatch(run.last_path if state else None):
        stage = run.next_stage(workers)
        optimizers = make_optimizers(stage)
        if state and state["phase"] == stage.name:
            restore_optimizers(optimizers, state["optimizers"])
    if state:
        state.clear()  # frees what the networks have copied
    if workers.leads:
        run_dir.prepare(run.config, run.data, run.history)
        print(run_dir.describe(run.config, run.data, run.photographs, run.epoch), flush=True)
    stop.listen()
    train_stage(run, stage, optimizers, workers, stop)
    while run.epoch < run.config.epochs and not stop.agreed:
        stage = run.next_stage(workers)
        optimizers = make_optimizers(stage)
        train_stage(run, stage, optimizers, workers, stop)
    stage.network.zero_grad()  # frees the gradients
    if workers.leads:
        run.save(stage, optimizers)


def open_run(config: TrainConfig, given: set[str], workers: Workers) -> tuple[Run, dict | None]:
    """Return the run that is asked for, and the checkpoint's state where it goes on.

    given: names of options on the command line. Raises UserError.
    """
    torch.set_flush_denormal(True)  # denormals take 5 to 40 times as long
    state = workers.leader_first(lambda: run_dir.read_state(config))
    last = Path(config.run) / "last.pt"
    expected = None  # data of the checkpoint, which must be the same
    with checkpoint.explain_mismatch(last if state else None):
        config = resume_config(config, given, state)
        if state:
            expected = {key: str(state["data"][key]) for key in ("folder", "digest")}
    torch.set_num_threads(config.threads)
    torch.backends.cudnn.deterministic = True  # a resumed run is to have the same bits
    data = workers.leader_first(
        lambda: datasets.load(config.data, config.classes, expected, config.size)
    )
    if config.classes is None:
        config = replace(config, classes=",".join(data.classes))
    with checkpoint.explain_mismatch(last if state else None):
        run = Run(config, data)
        if state:
            run.restore(state)
    return run, state


def main(argv: list[str] | None = None) -> int:
    config, given = cli.parse(TrainConfig, argv, __doc__)
    if not config.run:
        raise UserError("--run: got nothing, wanted the name of a folder")
    workers = Workers(device.resolve_device(config.device))
    folder = Path(config.run)
    if workers.restarts and run_dir.same_job(folder):  # a lost process was replaced
        config = replace(config, resume=True, overwrite=False)
    stop = StopSignal()
    try:  # leave the group on errors too: its abort would hide them
        with run_dir.lock(folder) if workers.leads else contextlib.nullcontext():
            run, state = open_run(config, given, workers)
            train(run, state, workers, stop)
    finally:
        workers.leave()
        stop.release()
    if workers.leads:
        stopped = ", then stopped; --resume goes on, as make does" if stop.agreed else ""
        done = f"{run.epoch} of {run.config.epochs} epochs done"
        print(f"{done}{stopped}: {folder}/last.pt and pictures")
    return (128 + stop.agreed) if stop.agreed else 0  # as a shell reports a signal


if __name__ == "__main__":
    cli.run(main)
