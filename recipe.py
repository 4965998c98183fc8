"""The options of a run, what is decided where they are left open, and the learning rate."""
import math
from dataclasses import asdict, dataclass, replace

import vae
from options import Fault, option

import torch

RECIPES = {"mlp": {"likelihood": "mse", "schedule": "constant", "lr": 1e-3, "flip": False},  # the paper's
           "conv": {"likelihood": "gaussian", "schedule": "onecycle", "lr": 2e-3, "flip": True}}
FREE = {"judge", "epochs", "run", "resume", "overwrite", "threads", "device", "save_seconds"}  # may change on resume


@dataclass(frozen=True)
class Options:
    data: str = option("auto", "auto ($CIFAR10_DIR, data/cifar-10-batches-bin, the download, else drawn pictures), "
                       "cifar10 (the download), drawn, or a folder of CIFAR-10's binary batches")
    classes: str = option("horse,bird", "CIFAR-10 classes, separated by commas; the first two make the Pegasus")
    arch: str = option("conv", "network: a small residual one, or the paper's (mlp)", choices=tuple(vae.NETWORKS))
    likelihood: str | None = option(None, "distortion: the paper's squared error, or the calibrated Gaussian; by "
                                    "default mse for mlp, gaussian for conv", choices=tuple(vae.LIKELIHOODS))
    latent: str = option("128", "latent dimensions, or under conv a grid of rows, columns and channels: 8x8x8")
    flow: int = option(0, "Householder reflections of the posterior's samples; 0 leaves it diagonal", least=0)
    prior: str = option("normal", "of the latents: N(0, I), or conditional on a code, a Gaussian for each value",
                        choices=("normal", "conditional"))
    components: int = option(10, "values of the code, under --prior conditional", least=1)
    beta: float = option(1.0, "weight of the rate in the loss", least=0.0)
    schedule: str | None = option(None, "learning rate over the run; by default constant for mlp, onecycle for conv",
                                  choices=("constant", "onecycle"))
    epochs: int = option(300, "passes over the training pictures", least=1)
    batch_size: int = option(128, "pictures a step", least=1)
    lr: float | None = option(None, "Adam's learning rate, under onecycle its peak; by default 1e-3 for mlp, 2e-3 "
                              "for conv", above=0.0)
    flip: bool | None = option(None, "mirror half of the pictures; the default for conv")
    seed: int = option(0, "decides everything random")
    run: str = option("runs/pegasus", "folder of the run")
    resume: bool = option(False, "go on with the run in the folder, or start it")
    overwrite: bool = option(False, "begin anew in a folder that holds a run")
    judge: bool = option(True, "put into the checkpoint the judge that --best asks; trained once for each data set")
    threads: int = option(0, "CPU threads; 0 is one a core", least=0, most=1024)
    precision: str = option("auto", "of matrix products; auto is bfloat16 where the processor computes with it",
                            choices=("auto", "float32", "bfloat16"))
    device: str = option("auto", "auto is cuda where there is one", choices=("auto", "cpu", "cuda"))
    save_seconds: float | None = option(None, "seconds between checkpoints; by default 60, or up to 600 where saving "
                                        "would take over a hundredth of the run", least=0.0)


def device(chosen: Options) -> str:
    """`cpu` or `cuda`. Raises Fault where cuda is asked for and there is none."""
    if chosen.device == "cuda" and not torch.cuda.is_available():
        raise Fault("--device: got cuda, but torch finds no CUDA device; use --device cpu")
    return "cuda" if chosen.device != "cpu" and torch.cuda.is_available() else "cpu"


def resolve(chosen: Options) -> Options:
    """Options with whatever was left open decided, for this network and this machine."""
    decided = {name: value for name, value in RECIPES[chosen.arch].items() if getattr(chosen, name) is None}
    place = device(chosen)
    fast = torch.cuda.is_bf16_supported() if place == "cuda" else torch.ops.mkldnn._is_mkldnn_bf16_supported()
    precision = ("bfloat16" if fast else "float32") if chosen.precision == "auto" else chosen.precision
    threads = chosen.threads or torch.get_num_threads()
    return replace(chosen, **decided, device=place, precision=precision, threads=threads)


def settle(chosen: Options, given: set[str], state: dict | None) -> Options:
    """The options of this start: on resume the run's own, except those that may change. Raises Fault for others."""
    if state is None:
        return resolve(chosen)
    stored = asdict(Options(**state["config"]))  # what an older run had no word for was as it is by default
    for name in sorted(given - FREE - {"data"}):
        got = getattr(chosen, name)
        if got not in (stored[name], "auto"):
            flag = name.replace("_", "-")
            raise Fault(f"--{flag}: got {got}, but the run in {chosen.run} has {stored[name]}; leave it, use another "
                        "--run, or --overwrite")
    free = {name: getattr(chosen, name) for name in FREE & (given | {"run", "resume", "overwrite"})}
    return resolve(replace(Options(**stored), **free, **({"data": chosen.data} if chosen.data != "auto" else {})))


def learning_rate(chosen: Options, progress: float) -> float:
    """The learning rate when `progress`, 0 to 1, of the run is done.

    onecycle: a tenth of the run up from a 25th of the peak, then half a cosine down (Smith and Topin 2018).
    """
    if chosen.schedule == "constant":
        return chosen.lr
    if progress < 0.1:
        return chosen.lr * (0.04 + 0.96 * progress / 0.1)
    return chosen.lr * (0.5 + 0.5 * math.cos(math.pi * (progress - 0.1) / 0.9))
