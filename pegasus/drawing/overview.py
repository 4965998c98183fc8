"""Draw how the program works, with pictures that the model itself made.

    python -m pegasus.drawing.overview pegasus.pt docs/overview.png
"""
import itertools
from dataclasses import dataclass
from pathlib import Path

import reparam
from pegasus import cli, device
from pegasus.cli import UserError, option
from pegasus.drawing import plots, sampler
from pegasus.drawing.sampler import SampleConfig, Sampler
from pegasus.models import flow_prior, labels

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

WIDTH = 1180  # pixels of the drawing
ROW = 180  # pixels from one row of the drawing to the next
TILE = 96  # pixels of a picture's side
BOX = 130  # pixels of a box's width
STEP = 178  # pixels from the middle of a thing to that of the next
LEFT = 100  # pixels to the middle of the first
TIMES = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)  # at which draws on their way are shown
SEED = 55  # of horse and bird
PEGASUS_SEED = 44
STEPS = 8  # from one of these times to the next


@dataclass(frozen=True)
class OverviewConfig:
    checkpoint: str = option("", "a checkpoint with a learned prior", positional=True)
    out: str = option("", "the drawing, a PNG", positional=True)


class Canvas:
    """A white page on which things stand in rows, each at a place of its own."""

    def __init__(self, rows: int):
        self.image = Image.new("RGB", (WIDTH, rows * ROW), plots.PAPER)
        self.draw = ImageDraw.Draw(self.image)
        self.font = ImageFont.load_default(15)
        self.title_font = ImageFont.load_default(18)

    def middle(self, row: int, place: float) -> tuple[float, float]:
        return LEFT + place * STEP, row * ROW + 100

    def title(self, row: int, text: str) -> None:
        self.draw.text((20, row * ROW + 10), text, plots.COLORS[0], self.title_font)

    def box(self, row: int, place: float, text: str) -> None:
        x, y = self.middle(row, place)
        edges = (x - BOX / 2, y - TILE / 2, x + BOX / 2, y + TILE / 2)
        self.draw.rounded_rectangle(edges, 10, plots.PAPER, plots.INK, 2)
        self.draw.text((x, y), text, plots.INK, self.font, "mm", 4, "center")

    def tile(self, row: int, place: float, pixels: Tensor, text: str = "") -> None:
        """Place a picture (3, h, w) in [0, 1], and text below it."""
        x, y = self.middle(row, place)
        tile = plots.sheet(pixels[None], 1, TILE // pixels.shape[-1], 0)
        self.image.paste(tile, (round(x - TILE / 2), round(y - TILE / 2)))
        self.draw.text((x, y + TILE / 2 + 6), text, plots.INK, self.font, "ma")

    def arrow(self, row: int, place: float) -> None:
        """Point from a place to the next."""
        x, y = self.middle(row, place + 0.5)
        self.draw.line((x - 14, y, x + 8, y), plots.COLORS[1], 3)
        head = [(x + 16, y), (x + 6, y - 6), (x + 6, y + 6)]
        self.draw.polygon(head, plots.COLORS[1])


def pictures(model: Sampler, mode: str) -> Tensor:
    """Return a picture of a class and the same rebuilt, (2, 3, h, w)."""
    image = sampler.sample(model, SampleConfig(mode=mode, n=1, seed=SEED))
    with device.fast_autocast(image):
        mu, _ = model.model.encode(image)
    return torch.cat([image, model.model.decode(mu.float())])


def on_the_way(model: Sampler) -> Tensor:
    """Return a Pegasus as it is at TIMES, decoded, (6, 3, h, w)."""
    states = [reparam.normals(1, model.model.latent_size, PEGASUS_SEED)]
    winged = labels.number(model.classes, labels.PEGASUS)
    guided = {winged: sampler.DEFAULTS.guidance}
    for begin, end in itertools.pairwise(TIMES):
        times = [begin + (end - begin) * step / STEPS for step in range(STEPS + 1)]
        states.append(flow_prior.follow(model.prior, {winged: 1.0}, guided, states[-1], times))
    return model.model.decode(model.prior.denormalize(torch.cat(states)))


@torch.no_grad()
def overview(model: Sampler) -> Image.Image:
    """Draw the three parts of the program: autoencoder, prior, drawing."""
    canvas = Canvas(3)
    canvas.title(0, "1. An autoencoder learns to pack pictures into latents (vae.py)")
    horse, rebuilt_horse = pictures(model, model.classes[0])
    bird, rebuilt_bird = pictures(model, model.classes[1])
    canvas.tile(0, 0, horse, model.classes[0])
    canvas.tile(0, 0.62, bird, model.classes[1])
    canvas.box(0, 2, "encoder")
    canvas.box(0, 3, "latents\n8 x 8 x 16\nsampled, with KL\n(reparam.py)")
    canvas.box(0, 4, "decoder")
    canvas.tile(0, 5, rebuilt_horse, "rebuilt")
    canvas.tile(0, 5.62, rebuilt_bird, "rebuilt")
    canvas.title(1, "2. A network learns to lead noise to latents of each class (flow_prior.py)")
    canvas.box(1, 0, "photographs\nof horses\nand birds")
    canvas.box(1, 1, "and winged\nhorses made\nof them\n(composites.py)")
    canvas.box(1, 2, "encoder")
    canvas.box(1, 3, "latents of\nhorses, birds,\nwinged horses")
    canvas.box(1, 4, "prior\nv(z, t, class)")
    canvas.title(2, "3. A Pegasus is drawn: from noise along v, then decoded (sample.py)")
    for place, (t, image) in enumerate(zip(TIMES, on_the_way(model), strict=True)):
        canvas.tile(2, place, image, f"t = {t:g}")
    for row, places in enumerate(((0.85, 2, 3, 4), range(4), range(5))):
        for place in places:
            canvas.arrow(row, place)
    return canvas.image


def main(argv: list[str] | None = None) -> None:
    config, _ = cli.parse(OverviewConfig, argv, __doc__)
    plots.check(Path(config.out))
    model = sampler.load(Path(config.checkpoint))
    if not model.has_pegasi:
        raise UserError(f"{config.checkpoint}: its Pegasi are no class of a learned prior")
    plots.save(overview(model), Path(config.out), model.about)


if __name__ == "__main__":
    cli.run(main)
