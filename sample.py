"""Draw pictures from a checkpoint, which is all that is needed.

    python sample.py runs/pegasus/last.pt out.png                  # 64 Pegasi
    python sample.py runs/pegasus/last.pt out.png --mode horse     # 64 horses
    python sample.py runs/pegasus/last.pt out.png --mode morph     # rows from a horse to a bird
    python sample.py runs/pegasus/last.pt out.png --best 8 --coat white  # the 8 of 64 that the judge prefers, enlarged
    python sample.py runs/pegasus/last.pt out.png --from photo.png       # out of a picture of your own
"""
import math
import sys
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import options
import checkpoint
import cifar10
import collage
import compose
import density
import judge
import pictures
import prior
import reparam
import vae
from options import Fault, option
from density import Gaussian

import torch
from PIL import Image
from torch import Tensor

LARGEST = 2**28  # pixels of a sheet
BEFORE = "drawn from the aggregate posterior: the learned prior is not trained yet"
JOINED = "training pictures joined: the model draws its own Pegasi at the end of the run"


@dataclass(frozen=True)
class Options:
    checkpoint: str = option("", "a checkpoint, as `make train` writes to runs/", positional=True)
    out: str = option("", "the PNG to write", positional=True)
    mode: str = option("pegasus", "pegasus: both horse and bird; morph: rows from a horse to a bird; the name of one "
                       "of the run's classes; prior: whatever the model makes of noise")
    best: int = option(0, "keep this many, enlarged: of a class's mode or composed Pegasi what the judge is surest is "
                       "that class, or a horse; else the most Pegasus-like; 0 keeps all", least=0)
    n: int = option(64, "how many pictures to draw", least=1, most=65_536)
    blend: float = option(0.5, "how much of the first class a Pegasus has, 0 to 1", least=0.0, most=1.0)
    coat: str = option("any", "of the horse", choices=("any", *density.COATS))
    guidance: float = option(2.0, "with a learned prior, weight of a class against any; 1: no guidance", least=0.0)
    from_: str | None = option(None, "with a learned prior, a picture to begin from; a whole horse gets wings")
    keep: float = option(0.4, "how much of that picture to keep, 0 to 1", least=0.0, most=1.0)
    composed: bool = option(True, "Pegasi of a horse's body and a bird's wings, where the model has the parts and "
                            "blend, guidance, temperature and keep are as by default; else sums of velocities")
    steps: int = option(16, "of the integration of the learned prior", least=1, most=1000)
    temperature: float = option(1.0, "standard deviation of the noise", least=0.0)
    columns: int = option(8, "pictures in a row", least=1, most=65_536)
    scale: int = option(4, "pixels for each pixel of a picture", least=1, most=64)
    seed: int = option(0, "picture i is a function of the model, the seed and i alone, to rounding")


@dataclass(frozen=True)
class Trained:
    """A model and what is known of it: its classes' latents, and what its pictures should say."""
    model: vae.VAE
    densities: dict[str, Gaussian]  # of each class, and of the first one's coats
    classes: tuple[str, ...]
    about: dict[str, object]
    judge: judge.Judge | None
    learned: prior.Learned | None  # once it is being trained
    bank: dict[str, Tensor] | None  # what its Pegasi are composed of, at the end of a run
    data: dict[str, str]  # folder and digest of what it was trained on

    @property
    def device(self) -> str:
        return self.model.variance.device.type


def trained(state: dict, model: vae.VAE, learned: prior.Learned | None) -> Trained:
    """A model with what a run's state says of it; its digest is of weights and settings, so equal models share it."""
    # until its phase begins the prior is untrained: draws come from the classes' Gaussians, as pictures then say
    waits, learned = learned and state["phase"] != "prior", learned if state["phase"] == "prior" else None
    config = {key: state["config"][key] for key in ("arch", "likelihood", "latent", "flow")}
    config |= {"classes": state["classes"]}
    densities = {name: Gaussian(*fitted) for name, fitted in state["densities"].items()}
    fitted = {f"{part} of {name}": tensor for name, gaussian in densities.items()
              for part, tensor in gaussian._asdict().items()}
    drawing = {f"prior {name}": tensor for name, tensor in learned.drawing().items()} if learned else {}
    bank = {f"bank {name}": parts for name, parts in (state["bank"] or {}).items()}
    compose.check(state["bank"], model.latent)
    density.check(densities, state["classes"], model.latent, bool(learned))
    weights = model.state_dict() | fitted | drawing | bank
    about = {"Software": "Pegasus VAE", "model": checkpoint.digest(weights, config),
             "epochs": f"{state['epoch']:g}", "data": state["data"]["name"]}
    about |= {"prior": BEFORE if waits else "learned"} if learned or waits else {}
    classifier = judge.from_state(state["judge"]) if state["judge"] else None
    data = {key: str(state["data"][key]) for key in ("folder", "digest")}
    return Trained(model, densities, tuple(state["classes"]), about, classifier, learned, state["bank"], data)


def load(path: Path) -> Trained:
    """The model in a checkpoint, on the CPU. Raises Fault for a file that is not one."""
    state = checkpoint.load(path)
    with checkpoint.fitting(path):
        model = vae.build(state["config"])
        model.load_state_dict(state["model"])
        learned = prior.Learned(model.shape, len(state["classes"])) if state["prior"] else None
        if learned:
            learned.load(state["prior"], None)
        return trained(state, model, learned)


def modes(found: Trained) -> tuple[str, ...]:
    """What `--mode` may be for a model: a Pegasus needs two classes."""
    return (*(("pegasus", "morph") if len(found.classes) > 1 else ()), *found.classes, "prior")


def check(found: Trained, chosen: Options) -> None:
    """Raise Fault for options that this model can't serve."""
    if chosen.mode not in modes(found):
        raise Fault(f"--mode: got {chosen.mode}, wanted one of {', '.join(modes(found))}, which is what this model "
                    f"of {', '.join(found.classes)} can draw")
    if chosen.from_ is not None and not found.learned:
        raise Fault("--from: this model has no learned prior, and nothing else can go on from a picture; leave it out")
    if chosen.best and not found.judge:
        raise Fault("--best: this checkpoint has no judge to ask; use a finished run's last.pt, to which train.py "
                    "--resume --judge adds one")
    coated = ("pegasus", "morph", found.classes[0])
    if chosen.coat != "any" and chosen.mode not in coated:
        raise Fault(f"--coat: got {chosen.coat} with --mode {chosen.mode}, which has no {found.classes[0]}; leave it "
                    f"out, or use one of the modes {', '.join(mode for mode in coated if mode in modes(found))}")


def two_sides(found: Trained, coat: str) -> tuple[Gaussian, Gaussian]:
    """The first two classes, by default horse, of the coat asked for, and bird."""
    return found.densities[density.coated(found.classes[0], coat)], found.densities[found.classes[1]]


def codes(found: Trained, chosen: Options) -> Tensor | None:
    """The codes (n, K) of draws from a conditional prior; other latents, which know none, are given the likeliest."""
    known = found.model.conditional
    return known.codes(chosen.n, chosen.seed) if known and chosen.mode == "prior" else None


def latents(found: Trained, chosen: Options) -> Tensor:
    """Latents (n, latent). Row i depends on (seed, i) alone; in `morph` on the seed, and on its row and column."""
    if found.learned:
        with told(found.learned.average, chosen):
            return learned_latents(found, chosen)
    if chosen.mode == "morph":
        return morph(found, chosen)
    eps = vae.noise(chosen.n, found.model.latent, chosen.seed)
    if chosen.mode == "prior" and found.about.get("prior") == BEFORE:
        sets = [density.draw(found.densities[name], eps, chosen.temperature) for name in found.classes]
        return torch.stack(sets)[torch.arange(chosen.n) % len(sets), torch.arange(chosen.n)]
    if (code := codes(found, chosen)) is not None:
        return found.model.conditional.draw(chosen.temperature * eps, code).cpu()
    if chosen.mode == "prior":
        return (chosen.temperature * eps.double()).float()
    if chosen.mode == "pegasus":
        gaussian = density.product(*two_sides(found, chosen.coat), chosen.blend)
    else:
        gaussian = found.densities[density.coated(chosen.mode, chosen.coat)]
    return density.draw(gaussian, eps, chosen.temperature)


def composes(found: Trained, chosen: Options) -> bool:
    """Whether Pegasi are composed of parts."""
    usual = (chosen.blend, chosen.guidance, chosen.temperature, chosen.keep) == (0.5, 2.0, 1.0, 0.4)
    return bool(chosen.mode == "pegasus" and found.bank and chosen.composed and usual)


def weights(found: Trained, chosen: Options) -> dict[int, float | Tensor]:
    """How much of each class the learned prior's flow follows; in `morph` (n, 1), changing along a row of the sheet."""
    first = density.kind(found.classes, chosen.coat)
    if chosen.mode == "prior":
        return {}
    if chosen.mode == "morph":
        along = torch.arange(chosen.n, device=found.device)[:, None] % chosen.columns / max(chosen.columns - 1, 1)
        return {first: chosen.guidance * (1 - along), 1: chosen.guidance * along}
    if chosen.mode == "pegasus":
        return {first: 2 * chosen.blend * chosen.guidance, 1: 2 * (1 - chosen.blend) * chosen.guidance}
    return {found.classes.index(chosen.mode) or first: chosen.guidance}


def told(average: torch.nn.Module, chosen: Options) -> AbstractContextManager:
    """While inside, tell on a terminal how far the drawing is, by a hook on the averaged velocity."""
    done, before = 0, 0.0

    def tell(_: torch.nn.Module, inputs: tuple[Tensor, ...]) -> None:
        nonlocal done, before
        t = inputs[1][0].item()
        done, before = done + prior.CHUNK * (t < before), t  # time went back: the next chunk has begun
        share = (done + t * min(prior.CHUNK, chosen.n - done)) / chosen.n
        print(f"\r{chosen.mode}: {share:.0%} of {chosen.n} drawn", end="\033[K\r", file=sys.stderr, flush=True)
    return average.register_forward_pre_hook(tell) if sys.stderr.isatty() else nullcontext()


@torch.no_grad()
def learned_latents(found: Trained, chosen: Options) -> Tensor:
    """Latents (n, latent) by the learned prior."""
    photo = pictures.read(Path(chosen.from_)) if chosen.from_ is not None else None
    if composes(found, chosen):
        return compose.pegasus(found.model, found.learned, found.bank, chosen.n, chosen.seed,
                               density.kind(found.classes, chosen.coat), chosen.steps, photo).cpu()
    row = torch.arange(chosen.n) // chosen.columns if chosen.mode == "morph" else torch.arange(chosen.n)
    eps = chosen.temperature * vae.noise(int(row[-1]) + 1, found.model.latent, chosen.seed)[row]
    begin = 0.0
    if photo is not None:
        mu, _ = found.model.encode(photo.to(found.device))
        begin, eps = chosen.keep, torch.lerp(eps, found.learned.normalised(mu).cpu(), chosen.keep)
    z = prior.follow(found.learned, weights(found, chosen), eps.to(found.device), begin, chosen.steps)
    return found.learned.latents(z).cpu()


def morph(found: Trained, chosen: Options) -> Tensor:
    """Rows of latents from a draw of the first class to one of the second: means on a line, noise on an arc."""
    columns = chosen.columns
    row, along = torch.arange(chosen.n) // columns, torch.arange(chosen.n) % columns / max(columns - 1, 1)
    angle = along[:, None] * math.pi / 2  # straight lines would pass where there is less noise than anywhere else
    first, second = two_sides(found, chosen.coat)
    z = torch.lerp(first.mean, second.mean, along[:, None])
    for side, (gaussian, weight) in enumerate(((first, angle.cos()), (second, angle.sin()))):
        seed = reparam.derive_seed(chosen.seed, side, 0)
        eps = vae.noise(int(row[-1]) + 1, found.model.latent, seed)[row]
        z += weight * density.draw(gaussian._replace(mean=torch.zeros_like(gaussian.mean)), eps, chosen.temperature)
    return z


def ranking(found: Trained, images: Tensor, chosen: Options) -> Tensor:
    """What `--best` goes by, (n,): the judge's score of images, and the coat.

    The score is how sure the judge is of a mode's class, or of the horse that composed Pegasi, which have wings, may
    lack; else `judge.pegasus_score`. With a coat, the sum of an image's ranks by score and by how light, or how dark,
    the body is: neither has a unit that the other knows.
    """
    seen, name = judge.classify(found.judge, images)[0], chosen.mode
    if composes(found, chosen) or len(found.classes) < 2:
        name = found.classes[0]
    score = seen[:, cifar10.CLASSES.index(name)] if name in found.classes else judge.pegasus_score(seen, found.classes)
    if chosen.coat == "any":
        return score
    light = collage.coat(images).mean(1) * (1 if chosen.coat == "white" else -1)
    return score.argsort(stable=True).argsort() + light.argsort(stable=True).argsort()


@torch.no_grad()
def draw(found: Trained, chosen: Options = Options()) -> Tensor:  # noqa: B008  frozen
    """Images (n or best, 3, 32, 32) in [0, 1]; with `best`, that many of the n, the best by `ranking` first."""
    check(found, chosen)
    z, code = latents(found, chosen), codes(found, chosen)
    images = torch.cat([found.model.decode(z[rows].to(found.device), None if code is None else code[rows]).cpu()
                        for rows in torch.arange(chosen.n).split(500)])
    order = ranking(found, images, chosen).argsort(descending=True, stable=True) if chosen.best else slice(None)
    return images[order][:chosen.best or None]


def page(images: Tensor, about: dict[str, object], columns: int = 8, scale: int = 4) -> Image.Image:
    """A sheet of images that says below them when they come from drawn data, or not yet from the learned prior."""
    sheet = pictures.sheet(images, columns, scale)
    words = [about["prior"]] if about.get("prior") in (BEFORE, JOINED) else []
    for line in words + ([pictures.DRAWN] if about["data"] == "drawn" else []):
        sheet = pictures.caption(sheet, line)
    return sheet


def check_sheet(chosen: Options, scale: int) -> None:
    """Raise Fault for a sheet that can't be written, would not fit into memory, or wants more than there are."""
    pictures.check(Path(chosen.out))
    if chosen.best > chosen.n:
        raise Fault(f"--best: got {chosen.best} of the {chosen.n} of --n; ask for a larger --n")
    pixels = math.ceil((chosen.best or chosen.n) / chosen.columns) * chosen.columns * (vae.IMAGE[1] * scale + 4) ** 2
    if pixels > LARGEST:
        raise Fault(f"--n, --columns, --scale: got a sheet of {pixels:,} pixels; wanted at most {LARGEST:,}")


def main(argv: list[str] | None = None) -> None:
    chosen, given = options.parse(Options, argv, __doc__)
    scale = 2 * chosen.scale if chosen.best and "scale" not in given else chosen.scale
    check_sheet(chosen, scale)
    found = load(Path(chosen.checkpoint))
    images = draw(found, chosen)
    about = found.about | {key: getattr(chosen, key) for key in ("mode", "seed", "temperature", "blend", "coat")}
    if found.learned:
        about |= {"steps": chosen.steps, "guidance": chosen.guidance, "composed": composes(found, chosen)}
        about |= {"from": chosen.from_, "keep": chosen.keep} if chosen.from_ is not None else {}
    about |= {"best": f"of {chosen.n} by judge"} if chosen.best else {}
    pictures.save(page(images, about, chosen.columns, scale), Path(chosen.out), about)
    what = f"the best {len(images)} of {chosen.n} pictures" if chosen.best else f"{len(images)} pictures"
    if chosen.mode == "pegasus" and found.learned and not found.bank:
        what += " without wings (this checkpoint has no parts for them: train.py --resume --judge adds them)"
    print(f"{chosen.out}: {what}, {', '.join(f'{key} {value}' for key, value in list(about.items())[1:])}")


if __name__ == "__main__":
    options.run(main)
