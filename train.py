"""Train a variational autoencoder on CIFAR-10's horses and birds.

    python train.py                               # a convolutional network, 300 epochs
    python train.py --resume                      # goes on where that stopped
    python train.py --run runs/paper --arch mlp   # the paper's recipe

A run's folder, runs/pegasus, holds the checkpoint last.pt, log.csv (nats and squared
error an image), speed.csv, config.json and pictures. A resumed run ends with the same
bits as one that was never stopped. Options: pegasus/training/config.py, or --help.
"""
import contextlib
import math
from dataclasses import replace
from pathlib import Path

from pegasus import checkpoint, cli, device
from pegasus.cli import UserError
from pegasus.data import datasets
from pegasus.drawing import compose
from pegasus.models import classifier
from pegasus.training import cuda_graph, run_dir
from pegasus.training.accelerate import accelerate
from pegasus.training.config import TrainConfig, resume_config
from pegasus.training.distributed import Workers
from pegasus.training.progress import Progress
from pegasus.training.run import Run, Stage
from pegasus.training.signals import StopSignal
from pegasus.training.stages import Batch, derived_seeds, epoch_flips, epoch_order

import torch
from torch import Tensor
from torch.nn.utils import get_total_norm
from torch.optim import Adam

PREPARING = "drawing the parts of Pegasi, a minute or several; cut off, --resume does it"


def make_optimizer(stage: Stage) -> Adam:
    """Return Adam for a stage; each step sets its learning rate."""
    on_gpu = stage.config.device != "cpu"
    return Adam(stage.network.parameters(), fused=True, capturable=on_gpu)


def restore_optimizer(optimizer: Adam, moments: dict) -> None:
    """Take Adam's moments from a checkpoint, each in the memory layout of its weight.

    Raises what `checkpoint.matching` knows where they are another network's.
    """
    if not moments:  # saved before the first step
        return
    for i, p in enumerate(optimizer.param_groups[0]["params"]):
        state = {"step": moments[i]["step"].to(p.device)}
        for name in ("exp_avg", "exp_avg_sq"):
            if moments[i][name].shape != p.shape:
                raise ValueError("optimizer and model differ in shape")
            state[name] = torch.empty_like(p).copy_(moments[i][name])
        optimizer.state[p] = state


def batches(run: Run) -> list[tuple[Tensor, Tensor | None]]:
    """Return what is left of an epoch: rows of the images, and which are mirrored."""
    config = run.config
    order = epoch_order(config.seed, run.epoch, run.images).to(config.device)
    rows = order.split(config.batch_size)
    mirrored = [None] * len(rows)
    if config.flip:
        flips = epoch_flips(config.seed, run.epoch, run.images).to(config.device)
        mirrored = flips.split(config.batch_size)
    return list(zip(rows, mirrored, strict=True))[run.step :]


def step_inputs(run: Run, stage: Stage) -> tuple[Tensor, Tensor]:
    """Return a step's seeds, and its learning rate beside the stage's progress, 0 to 1."""
    config = run.config
    seeds = derived_seeds(config.seed, run.steps_done, stage.purposes, config.device)
    steps = (stage.last_epoch - stage.first_epoch) * run.steps
    progress = (run.steps_done - stage.first_epoch * run.steps) / steps
    pace = [stage.learning_rate(progress), progress]
    return seeds, device.to_device(pace, config.device)


def clip_scale(norm: Tensor, max_norm: float | None) -> Tensor | None:
    """Return what gradients of a length are divided by to be no longer than max_norm."""
    return None if max_norm is None else (norm / max_norm).clamp(min=1.0)


def log_epoch(run: Run, stage: Stage, progress: Progress) -> None:
    """Test, log and show what the epoch brought. Raises UserError for a loss of NaN."""
    means = run.guard.means(run.images)
    values = stage.test(means)
    if not math.isfinite(sum(values.values())):
        raise UserError(
            f"{run.folder}: the loss is no longer finite in epoch {run.epoch + 1}; what was "
            f"saved last is still there; begin again with a lower {stage.lr_flag}"
        )
    run.end_epoch(stage.name, values, progress.leads)
    shown = stage.metrics(means) | {"test loss": values["test_loss"]}
    if "bits_per_dim" in values:
        shown["bits/dim"] = values["bits_per_dim"]
    progress.end_epoch(run.epoch, shown, run.folder / "speed.csv")


def train_stage(run: Run, stage: Stage, optimizer: Adam, workers: Workers, stop: StopSignal):
    """Train a stage to its end, or until a signal: the training loop."""
    parameters = list(stage.network.parameters())

    def step(rows: Tensor, mirrored: Tensor | None, seeds: Tensor, pace: Tensor) -> Tensor:
        lr, share_done = pace
        batch = Batch(rows, mirrored, len(rows), 0, seeds, share_done)
        optimizer.param_groups[0]["lr"] = lr
        optimizer.zero_grad()
        loss, sums = stage.loss(batch.part(workers.share(len(rows))))
        loss.backward()
        workers.sum(sums)
        workers.sum_gradients(parameters)
        norm = get_total_norm([p.grad for p in parameters])
        optimizer.found_inf = run.guard.count(norm, sums, len(rows))  # 1: skip the step
        optimizer.grad_scale = clip_scale(norm, stage.max_norm)  # divides the gradients
        optimizer.step()
        stage.after_step(optimizer.state[parameters[0]]["step"])
        return sums

    if run.config.device != "cpu" and workers.size == 1:
        step = cuda_graph.Replay(step, run.config.batch_size)
    counts = (stage.last_epoch, run.config.epochs, run.images, run.images_done)
    progress = Progress(*counts, workers.leads)
    while run.epoch < stage.last_epoch:
        for rows, mirrored in batches(run):
            step(rows, mirrored, *step_inputs(run, stage))
            run.step += 1
            run.guard.check(run.steps_done, run.steps, run.config.run, stage.lr_flag)
            if progress.is_due():
                metrics = stage.metrics(run.guard.means(run.epoch_images))
                progress.show(run.epoch + 1, run.epoch_images, metrics)
            if run.step == run.steps:
                log_epoch(run, stage, progress)
            stop.agreed = workers.max(stop.asked, run.config.device)
            if stop.agreed:
                return
            if run.timer.is_due():
                save(run, stage, optimizer, workers)


def save(run: Run, stage: Stage, optimizer: Adam, workers: Workers) -> dict | None:
    """Save checkpoint and pictures, in the first process alone; return the state."""
    if workers.leads:
        return run.save(stage, optimizer)
    run.timer.saved()
    return None


def train(run: Run, state: dict | None, workers: Workers, stop: StopSignal) -> dict | None:
    """Train all epochs that are left; return the state of the last save.

    state: of the checkpoint to go on from.
    """
    with checkpoint.matching(run.last_path if state else None):
        stage = run.next_stage(workers, state)
        optimizer = make_optimizer(stage)
        if state and state["phase"] == stage.name:
            restore_optimizer(optimizer, state["optimizer"]["state"])
    stop.listen()
    train_stage(run, stage, optimizer, workers, stop)
    while run.epoch < run.config.epochs and not stop.agreed:
        stage = run.next_stage(workers)
        optimizer = make_optimizer(stage)
        train_stage(run, stage, optimizer, workers, stop)
    return save(run, stage, optimizer, workers)


def begin(
    config: TrainConfig, given: set[str], workers: Workers
) -> tuple[Run, dict | None]:
    """Return the run that is asked for, and the checkpoint's state where it goes on.

    given: names of options on the command line. Raises UserError.
    """
    torch.set_flush_denormal(True)  # denormals take 5 to 40 times as long
    state = workers.first(lambda: run_dir.read_state(config))
    last = Path(config.run) / "last.pt"
    expected = None
    with checkpoint.matching(last if state else None):
        config = resume_config(config, given, state)
        if state:
            expected = {key: str(state["data"][key]) for key in ("folder", "digest")}
    torch.set_num_threads(config.threads)
    torch.backends.cudnn.deterministic = True  # a resumed run is to have the same bits
    data = workers.first(lambda: datasets.load(config.data, config.classes, expected))
    with checkpoint.matching(last if state else None):
        run = Run(config, data)
        if state:
            run.restore(state)
    if workers.leads:
        run_dir.begin(config, data, run.history)
        print(run_dir.describe(config, data, run.images, run.epoch), flush=True)
    return run, state


def finish(run: Run, state: dict) -> None:
    """Put the classifier and parts of Pegasi into the checkpoint of a finished run.

    state: of its last save. It draws without them already.
    """
    config = run.config
    if not config.judge:
        return
    if state["judge"] is None:
        place = (config.device, config.precision)
        state["judge"] = classifier.get(Path(run.data.folder), 0, *place, accelerate)
        run.write(state)
    has_prior = state["phase"] == "prior" and len(run.data.classes) > 1
    if has_prior and state["bank"] is None:
        print(PREPARING, flush=True)
        judge = classifier.from_state(state["judge"])
        accelerate(judge)
        state["bank"] = compose.prepare(run.model, run.prior, judge, run.data.classes)
        run.write(state)


def main(argv: list[str] | None = None) -> int:
    config, given = cli.parse(TrainConfig, argv, __doc__)
    workers = Workers(device.resolve_device(config.device))
    folder = Path(config.run)
    if workers.restarts and run_dir.same_job(folder):
        config = replace(config, resume=True, overwrite=False)
    stop = StopSignal()
    with run_dir.lock(folder) if workers.leads else contextlib.nullcontext():
        try:  # a process that ends without leaving its group may abort, and hide why
            run, state = begin(config, given, workers)
            state = train(run, state, workers, stop)
        finally:
            workers.leave()
        if workers.leads:
            stopped = ", then stopped; --resume goes on" if stop.agreed else ""
            print(f"{run.epoch} epochs done{stopped}: {folder}/last.pt and pictures")
        if workers.leads and not stop.asked:
            stop.release()
            finish(run, state)
    return 128 + stop.agreed if stop.agreed else 0


if __name__ == "__main__":
    cli.run(main)
