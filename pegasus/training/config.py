"""The options of a run, what is decided where they are left open, the learning rate."""
import math
from dataclasses import dataclass, replace

import vae
from pegasus import cli, device
from pegasus.cli import UserError, option
from pegasus.models import variants

import torch

RECIPES = {
    "mlp": {
        "likelihood": "mse", "warm_up": 0.0, "schedule": "constant",
        "batch_size": 128, "lr": 1e-3, "flip": False,
    },
    "conv": {
        "likelihood": "gaussian", "warm_up": 0.25, "schedule": "onecycle",
        "batch_size": 64, "lr": 2e-3, "flip": True,
    },
}
FREE = {  # what may change when a run goes on
    "epochs", "run", "resume", "overwrite", "threads", "device", "save_seconds"
}
OF_THIS_START = {"run", "resume", "overwrite", "device"}  # never the stored ones


@dataclass(frozen=True)
class TrainConfig:
    """Options of train.py. `resolve` decides on those left open: None, "auto", 0 threads."""
    data: str = option(
        "auto",
        "auto ($CIFAR10_DIR, data/cifar-10-batches-bin, the download, else synthetic), "
        "cifar10 (the second or third), stl10 (its folder or the download), synthetic "
        "(pictures that a program draws), a folder of CIFAR-10's or STL-10's binary files, or "
        "one with a folder of pictures for each class",
    )
    classes: str | None = option(
        None,
        "classes, separated by commas, of which the first two make the Pegasus; by default "
        "horse,bird, or all folders of pictures where these are not among them",
    )
    size: int = option(
        32, "pixels of a picture's side; others are made smaller or larger", choices=vae.SIZES
    )
    arch: str = option(
        "conv",
        "network: a small residual one, or the paper's (mlp)",
        choices=tuple(vae.NETWORKS),
    )
    likelihood: str | None = option(
        None,
        "distortion: the paper's squared error, or the calibrated Gaussian; by default "
        "mse for mlp, gaussian for conv",
        choices=vae.LIKELIHOODS,
    )
    center: bool = option(
        True,
        "subtract 0.5 from pictures before the encoder; the paper's recipe does not",
    )
    latent: str | None = option(
        None,
        "latent dimensions, or under conv a grid of rows, columns and channels; by "
        "default 8x8x16 for the learned prior, else 128",
    )
    prior: str | None = option(
        None,
        "of the latents: N(0, I); conditional on a code, a Gaussian for each value; or "
        "learned after the autoencoder, the default for conv on a grid without --flow",
        choices=("normal", "conditional", "learned"),
    )
    flow: int = option(
        0,
        "Householder reflections of the posterior's samples; 0 leaves it diagonal",
        least=0,
        most=1000,
    )
    components: int = option(
        10, "values of the code, under --prior conditional", least=1, most=65_536
    )
    beta: float = option(1.0, "weight of the rate in the loss", least=0.0)
    warm_up: float | None = option(
        None,
        "share of the autoencoder's epochs in which beta rises from 0, so that fewer "
        "latents are given up early; by default 0 for mlp, 0.25 for conv",
        least=0.0,
        most=1.0,
    )
    schedule: str | None = option(
        None,
        "learning rate over the autoencoder's epochs; by default constant for mlp, "
        "onecycle for conv",
        choices=("constant", "onecycle"),
    )
    epochs: int = option(
        300,
        "passes over the training pictures; of a learned prior, over a third of them",
        least=1,
        most=10**9,
    )
    autoencoder_epochs: int | None = option(
        None,
        "how many of --epochs are the autoencoder's; by default all, with a learned prior a "
        "fifth, at most 8",
        least=1,
    )
    batch_size: int | None = option(
        None, "pictures a step; by default 128 for mlp, 64 for conv", least=1
    )
    lr: float | None = option(
        None,
        "Adam's learning rate, under onecycle its peak; Muon's, of conv, is ten times as "
        "high; by default 1e-3 for mlp, 2e-3 for conv",
        above=0.0,
    )
    prior_lr: float = option(
        2e-3, "peak learning rate of the learned prior, always onecycle", above=0.0
    )
    flip: bool | None = option(None, "mirror half of the pictures; the default for conv")
    seed: int = option(0, "decides everything random")
    run: str = option("runs/pegasus", "folder of the run")
    resume: bool = option(False, "go on with the run in the folder, or start it")
    overwrite: bool = option(False, "begin anew in a folder that holds a run")
    threads: int = option(
        0, "CPU threads; 0 is torch's default, one a core", least=0, most=1024
    )
    precision: str = option(
        "auto",
        "of matrix products; auto is bfloat16 where the processor computes with it",
        choices=("auto", "float32", "bfloat16"),
    )
    device: str = option(
        "auto",
        "auto is cuda where there is one; chosen at each start",
        choices=("auto", "cpu", "cuda", "mps"),
    )
    save_seconds: float | None = option(
        None,
        "seconds between checkpoints; by default 60, later up to 600 where saving would "
        "take over 1/200 of the run",
        least=0.0,
    )


def default_split(epochs: int) -> int:
    """Return how many of so many epochs are by default the autoencoder's."""
    return min(max(1, round(epochs / 5)), 8)


def first_stage_epochs(config: TrainConfig) -> int:
    """Return how many of a run's epochs are its autoencoder's, at most all."""
    return min(config.autoencoder_epochs or config.epochs, config.epochs)


def resolve_prior(config: TrainConfig) -> str:
    """Return the prior asked for, or the default. Raises UserError."""
    is_grid = config.latent is None or "x" in config.latent
    suits = config.arch == "conv" and is_grid and config.flow == 0
    prior = config.prior
    if prior is None:
        prior = "learned" if suits else "normal"
    if prior == "learned" and not suits:
        raise UserError(
            "--prior: learned needs --arch conv, a grid of latents (--latent 8x8x16) and "
            "--flow 0; leave it out, or use --prior normal"
        )
    if prior != "learned" and config.autoencoder_epochs is not None:
        raise UserError(
            "--autoencoder-epochs: only a run with --prior learned has epochs of another "
            "kind; leave it out"
        )
    return prior


def resolve_machine(config: TrainConfig) -> TrainConfig:
    """Decide on device, threads and precision for this machine. Raises UserError."""
    where = device.resolve_device(config.device)
    threads = config.threads
    if threads == 0:
        threads = torch.get_num_threads()
    precision = config.precision
    if precision == "auto":
        precision = device.fastest_precision(where)
    return replace(config, device=where, threads=threads, precision=precision)


def resolve(config: TrainConfig) -> TrainConfig:
    """Decide on what was left open, for this network and machine. Raises UserError."""
    prior = resolve_prior(config)
    latent = config.latent
    if latent is None:
        latent = "8x8x16" if prior == "learned" else "128"
    variants.latent_shape(latent)  # before anything is downloaded
    decided = {"prior": prior, "latent": latent}
    if prior == "learned" and config.autoencoder_epochs is None:
        decided["autoencoder_epochs"] = default_split(config.epochs)
    for name, value in RECIPES[config.arch].items():
        if getattr(config, name) is None:
            decided[name] = value
    return resolve_machine(replace(config, **decided))


def check_unchanged(config: TrainConfig, given: set[str], stored: TrainConfig) -> None:
    """Raise UserError where an option that a run keeps is given another value."""
    for name in sorted(given - FREE - {"data"}):  # datasets.load compares the data itself
        got = getattr(config, name)
        had = getattr(stored, name)
        asks_for_none = (name, got) == ("precision", "auto")
        if got != had and not asks_for_none:
            raise UserError(
                f"{cli.flag_of(name)}: got {got}, but the run in {config.run} has {had}; "
                "leave it out, use another --run, or --overwrite"
            )


def resume_config(config: TrainConfig, given: set[str], state: dict | None) -> TrainConfig:
    """Return the options of this start: on resume the run's own, but for FREE ones.

    given: names of options on the command line. Raises UserError where others change,
    and what `checkpoint.explain_mismatch` knows where the state fits no program of this version.
    """
    if state is None:
        return resolve(config)
    # the device is chosen anew: a run may go on elsewhere
    stored = TrainConfig(**state["config"] | {"device": "auto"})
    cli.check(stored)
    check_unchanged(config, given, stored)
    changed = {"data": config.data} if config.data != "auto" else {}
    for name in OF_THIS_START | (FREE & given):
        changed[name] = getattr(config, name)
    merged = replace(stored, **changed)
    begun = state["epochs_done"] + (state["step"] > 0)
    if merged.epochs < begun:
        raise UserError(
            f"--epochs: got {merged.epochs}, but {config.run} has begun epoch {begun}; "
            f"ask for {begun} or more, --overwrite, or another --run"
        )
    by_default = stored.autoencoder_epochs == default_split(stored.epochs)
    if by_default and "autoencoder_epochs" not in given:
        if state["epochs_done"] < stored.autoencoder_epochs:
            part = max(default_split(merged.epochs), begun)  # follows the new --epochs
            merged = replace(merged, autoencoder_epochs=part)
    return resolve(merged)


def learning_rate(schedule: str, peak: float, progress: float) -> float:
    """Return the learning rate when `progress`, 0 to 1, of a stage is done.

    onecycle: a tenth of the stage up from a 25th of the peak, then half a cosine down
    (Smith and Topin 2018).
    """
    if schedule == "constant":
        return peak
    if progress < 0.1:
        return peak * (0.04 + 0.96 * progress / 0.1)
    return peak * (0.5 + 0.5 * math.cos(math.pi * (progress - 0.1) / 0.9))
