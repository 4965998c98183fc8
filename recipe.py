"""The options of a run, what is decided where they are left open, and the learning rate."""
import math
from dataclasses import asdict, dataclass, replace

import options
import vae
from options import Fault, option

import torch

RECIPES = {"mlp": {"likelihood": "mse", "schedule": "constant", "lr": 1e-3, "flip": False},  # the paper's
           "conv": {"likelihood": "gaussian", "schedule": "onecycle", "lr": 2e-3, "flip": True}}
FREE = {"judge", "epochs", "run", "resume", "overwrite", "threads", "device", "save_seconds"}  # may change on resume


@dataclass(frozen=True)
class Options:
    data: str = option("auto", "auto ($CIFAR10_DIR, data/cifar-10-batches-bin, the download, else drawn pictures), "
                       "cifar10 (the second or third), drawn (the last), or a folder of CIFAR-10's binary batches")
    classes: str = option("horse,bird", "CIFAR-10 classes, separated by commas; the first two make the Pegasus")
    arch: str = option("conv", "network: a small residual one, or the paper's (mlp)", choices=tuple(vae.NETWORKS))
    likelihood: str | None = option(None, "distortion: the paper's squared error, or the calibrated Gaussian; by "
                                    "default mse for mlp, gaussian for conv", choices=tuple(vae.LIKELIHOODS))
    latent: str | None = option(None, "latent dimensions, or under conv a grid of rows, columns and channels; by "
                                "default 8x8x8 for the learned prior, else 128")
    prior: str | None = option(None, "of the latents: N(0, I); conditional on a code, a Gaussian for each value; or "
                               "learned after the autoencoder, the default for conv on a grid without --flow",
                               choices=("normal", "conditional", "learned"))
    flow: int = option(0, "Householder reflections of the posterior's samples; 0 leaves it diagonal", least=0,
                       most=1000)
    components: int = option(10, "values of the code, under --prior conditional", least=1, most=65_536)
    beta: float = option(1.0, "weight of the rate in the loss", least=0.0)
    schedule: str | None = option(None, "learning rate over the autoencoder's epochs; by default constant for mlp, "
                                  "onecycle for conv", choices=("constant", "onecycle"))
    epochs: int = option(300, "passes over the training pictures", least=1, most=10**9)
    autoencoder_epochs: int | None = option(None, "how many of them are the autoencoder's; by default all, with a "
                                            "learned prior a third, at most 20, from 100 on a fifth", least=1)
    batch_size: int = option(128, "pictures a step", least=1)
    lr: float | None = option(None, "Adam's learning rate, under onecycle its peak; by default 1e-3 for mlp, 2e-3 "
                              "for conv", above=0.0)
    prior_lr: float = option(1.5e-3, "peak learning rate of the learned prior, always onecycle", above=0.0)
    flip: bool | None = option(None, "mirror half of the pictures; the default for conv")
    seed: int = option(0, "decides everything random")
    run: str = option("runs/pegasus", "folder of the run")
    resume: bool = option(False, "go on with the run in the folder, or start it")
    overwrite: bool = option(False, "begin anew in a folder that holds a run")
    judge: bool = option(True, "after training put into the checkpoint the judge that --best asks, trained once for "
                         "each data set, and the parts that winged Pegasi are composed of")
    threads: int = option(0, "CPU threads; 0 is torch's default, one a core", least=0, most=1024)
    precision: str = option("auto", "of matrix products; auto is bfloat16 where the processor computes with it",
                            choices=("auto", "float32", "bfloat16"))
    device: str = option("auto", "auto is cuda where there is one; chosen at each start",
                         choices=("auto", "cpu", "cuda"))
    save_seconds: float | None = option(None, "seconds between checkpoints; by default 60, later up to 600 where "
                                        "saving would take over 1/200 of the run", least=0.0)


def device(chosen: Options) -> str:
    """`cpu` or `cuda`. Raises Fault where cuda is asked for and there is none."""
    if chosen.device == "cuda" and not torch.cuda.is_available():
        raise Fault("--device: got cuda, but torch finds no CUDA device; use --device cpu")
    return "cuda" if chosen.device != "cpu" and torch.cuda.is_available() else "cpu"


def computes_bfloat16(place: str) -> bool:
    """Whether `cpu` or `cuda` multiplies matrices of bfloat16 faster than others.

    Of x86-64 processors those do that have AVX512_BF16: others that oneDNN counts emulate it, or have no gradients.
    """
    if place == "cuda":
        return torch.cuda.is_bf16_supported(False)
    known = torch.cpu._is_avx512_bf16_supported() or not torch.cpu._is_avx2_supported()
    return known and torch.ops.mkldnn._is_mkldnn_bf16_supported()


def resolve(chosen: Options) -> Options:
    """Options with whatever was left open decided, for this network and this machine. Raises Fault."""
    decided = {name: value for name, value in RECIPES[chosen.arch].items() if getattr(chosen, name) is None}
    grid = chosen.arch == "conv" and "x" in (chosen.latent or "8x8x8") and not chosen.flow
    learned = chosen.prior == "learned" or chosen.prior is None and grid
    if learned and not grid:
        raise Fault("--prior: learned needs --arch conv, a grid of latents (--latent 8x8x8) and --flow 0; leave it "
                    "out, or use --prior normal")
    if chosen.autoencoder_epochs and not learned:
        raise Fault("--autoencoder-epochs: only a run with --prior learned has epochs of another kind; leave it out")
    latent = chosen.latent or ("8x8x8" if learned else "128")
    vae.latent_shape(latent)  # before anything is downloaded
    decided |= {"prior": "learned" if learned else chosen.prior or "normal", "latent": latent,
                "autoencoder_epochs": (chosen.autoencoder_epochs or default_split(chosen.epochs)) if learned else None,
                "device": device(chosen), "threads": chosen.threads or torch.get_num_threads()}
    if chosen.precision == "auto":
        decided["precision"] = "bfloat16" if computes_bfloat16(decided["device"]) else "float32"
    return replace(chosen, **decided)


def default_split(epochs: int) -> int:
    """How many of so many epochs are the autoencoder's where the prior is learned and nothing else is asked."""
    return max(1, round(epochs / 5), min(round(epochs / 3), 20))


def split(chosen: Options) -> int:
    """How many of a run's epochs are its autoencoder's."""
    return min(chosen.autoencoder_epochs or chosen.epochs, chosen.epochs)


def settle(chosen: Options, given: set[str], state: dict | None) -> Options:
    """The options of this start: on resume the run's own, but for those in FREE. Raises Fault where others change."""
    if state is None:
        return resolve(chosen)
    stored = asdict(options.stored(Options, state["config"] | {"device": "auto"}))  # it may move
    for name in sorted(given - FREE - {"data"}):
        got = getattr(chosen, name)
        if got != stored[name] and (name, got) != ("precision", "auto"):
            flag = name.replace("_", "-")
            raise Fault(f"--{flag}: got {got}, but the run in {chosen.run} has {stored[name]}; leave it out, use "
                        "another --run, or --overwrite")
    free = {name: getattr(chosen, name) for name in FREE & (given | {"run", "resume", "overwrite", "device"})}
    epochs, done = free.get("epochs", stored["epochs"]), state["epochs_done"]
    if epochs < done or epochs == done and state["step"] > 0:
        least = done + (state["step"] > 0)
        raise Fault(f"--epochs: got {epochs}, but {chosen.run} has begun epoch {least}; ask for {least} or more, "
                    "--overwrite, or another --run")
    under_way = state["phase"] != "prior" and done < (stored["autoencoder_epochs"] or 0)
    asked = "autoencoder_epochs" in given or stored["autoencoder_epochs"] != default_split(stored["epochs"])
    if under_way and not asked:  # the default follows the new --epochs
        stored["autoencoder_epochs"] = max(default_split(epochs), done + (state["step"] > 0))
    return resolve(replace(Options(**stored), **free, **({"data": chosen.data} if chosen.data != "auto" else {})))


def learning_rate(schedule: str, peak: float, progress: float) -> float:
    """The learning rate when `progress`, 0 to 1, of a phase is done.

    onecycle: a tenth of the phase up from a 25th of the peak, then half a cosine down (Smith and Topin 2018).
    """
    if schedule == "constant":
        return peak
    if progress < 0.1:
        return peak * (0.04 + 0.96 * progress / 0.1)
    return peak * (0.5 + 0.5 * math.cos(math.pi * (progress - 0.1) / 0.9))
