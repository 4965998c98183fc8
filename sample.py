"""Draw pictures from a checkpoint, which is all that is needed.

    python sample.py runs/pegasus/last.pt out.png                  # 64 Pegasi
    python sample.py runs/pegasus/last.pt out.png --mode morph     # rows from a horse to a bird
    python sample.py runs/pegasus/last.pt out.png --best 8         # the 8 most Pegasus-like of 64, enlarged
"""
import math
from dataclasses import dataclass
from pathlib import Path

import options
import checkpoint
import pictures
import reparam
import vae
from options import Fault, option

import torch
from PIL import Image
from torch import Tensor

MODES = ("pegasus", "prior", "morph")


@dataclass(frozen=True)
class Options:
    checkpoint: str = option("", "a checkpoint, as `make train` writes to runs/", positional=True)
    out: str = option("", "the PNG to write", positional=True)
    mode: str = option("pegasus", "pegasus: between a horse and a bird; prior: whatever the model makes of noise; "
                       "morph: rows from a horse to a bird", choices=MODES)
    best: int = option(0, "keep this many, the most Pegasus-like, enlarged; 0 keeps all", least=0)
    n: int = option(64, "how many pictures to draw", least=1)
    columns: int = option(8, "pictures in a row", least=1)
    scale: int = option(4, "pixels for each pixel of a picture", least=1)
    seed: int = option(0, "picture i is a function of the model, the seed and i alone")
    temperature: float = option(1.0, "standard deviation of the noise", least=0.0)


@dataclass(frozen=True)
class Trained:
    """A model and what is known of it: the class means of its latents, and what its pictures should say."""
    model: vae.VAE
    means: Tensor  # (classes, latent)
    classes: tuple[str, ...]
    about: dict[str, object]


def trained(state: dict, model: vae.VAE) -> Trained:
    """A model with what a run's state says of it; the digest is that of equal models everywhere."""
    config = {key: state["config"][key] for key in ("arch", "likelihood", "latent")} | {"classes": state["classes"]}
    tensors = model.state_dict() | {"latent means": state["means"]}
    about = {"Software": "Pegasus VAE", "model": checkpoint.digest(tensors, config),
             "epochs": f"{state['epoch']:g}", "data": state["data"]["name"]}
    return Trained(model, state["means"].float(), tuple(state["classes"]), about)


def load(path: Path) -> Trained:
    """The model in a checkpoint, on the CPU. Raises Fault for a file that is not one."""
    state = checkpoint.load(path)
    try:
        config = state["config"]
        model = vae.VAE(config["arch"], config["likelihood"], config["latent"])
        model.load_state_dict(state["model"])
        return trained(state, model)
    except (AttributeError, KeyError, TypeError, RuntimeError) as error:
        raise Fault(f"{path}: a checkpoint of another version ({error}); train again, or use that version") from None


def two_means(found: Trained) -> tuple[Tensor, Tensor]:
    """The latent means of the first two classes, by default horse and bird."""
    if len(found.classes) < 2:
        raise Fault(f"--mode: this model knows {found.classes[0]} only and there is nothing to mix; use --mode prior")
    return found.means[0], found.means[1]


def latents(found: Trained, mode: str, n: int, seed: int, temperature: float, columns: int) -> Tensor:
    """Latents (n, latent). Row i depends on (seed, i) alone; in `morph` on its place in a row of the sheet instead."""
    if mode == "morph":
        return morph(found, n, seed, temperature, columns)
    eps = temperature * vae.noise(n, found.model.latent, seed)
    return eps if mode == "prior" else sum(two_means(found)) / 2 + eps


def morph(found: Trained, n: int, seed: int, temperature: float, columns: int) -> Tensor:
    """Rows of latents from a draw around the first class mean to one around the second, noise on an arc between."""
    first, second = two_means(found)
    row, along = torch.arange(n) // columns, torch.arange(n) % columns / max(columns - 1, 1)
    start, end = (vae.noise(int(row[-1]) + 1, found.model.latent, reparam.derive_seed(seed, side, 0))[row]
                  for side in range(2))
    angle = along[:, None] * math.pi / 2  # straight lines would pass where there is less noise than anywhere else
    return torch.lerp(first, second, along[:, None]) + temperature * (angle.cos() * start + angle.sin() * end)


def likeness(found: Trained, z: Tensor) -> Tensor:
    """How Pegasus-like latents (n, latent) are, (n,): minus the distance to the farther of the two class means."""
    first, second = two_means(found)
    return -torch.maximum((z - first).norm(dim=1), (z - second).norm(dim=1))


@torch.no_grad()
def draw(found: Trained, mode: str = "pegasus", n: int = 64, seed: int = 0, temperature: float = 1.0,
         columns: int = 8, best: int = 0) -> Tensor:
    """Images (n or best, 3, 32, 32) in [0, 1]; with `best`, that many of the n, the most Pegasus-like first."""
    z = latents(found, mode, n, seed, temperature, columns)
    if best:
        z = z[likeness(found, z).argsort(descending=True, stable=True)[:best]]
    return found.model.decode(z)


def page(images: Tensor, about: dict[str, object], columns: int = 8, scale: int = 4) -> Image.Image:
    """A sheet of images that says below them when they come from drawn data."""
    sheet = pictures.sheet(images, columns, scale)
    return pictures.caption(sheet, pictures.DRAWN) if about["data"] == "drawn" else sheet


def main(argv: list[str] | None = None) -> None:
    chosen, given = options.parse(Options, argv, __doc__)
    found = load(Path(chosen.checkpoint))
    images = draw(found, chosen.mode, chosen.n, chosen.seed, chosen.temperature, chosen.columns, chosen.best)
    scale = 2 * chosen.scale if chosen.best and "scale" not in given else chosen.scale
    about = found.about | {"mode": chosen.mode, "seed": chosen.seed, "temperature": chosen.temperature}
    pictures.save(page(images, about, chosen.columns, scale), Path(chosen.out), about)
    what = f"the best {len(images)} of {chosen.n} pictures" if chosen.best else f"{len(images)} pictures"
    print(f"{chosen.out}: {what}, {', '.join(f'{key} {value}' for key, value in list(about.items())[1:])}")


if __name__ == "__main__":
    options.run(main)
