"""Sheets of images and curves of numbers, drawn with Pillow."""
import math
from collections.abc import Sequence
from pathlib import Path

import options
from options import Fault

import numpy
import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps, PngImagePlugin
from torch import Tensor

INK, GRID, PAPER = (40, 40, 40), (225, 225, 225), (255, 255, 255)
COLORS = ((31, 95, 170), (200, 80, 30))
DRAWN = "made from drawn data, not from photographs"


def save(image: Image.Image, path: Path, text: dict[str, object]) -> None:
    """Write a PNG with a text chunk for each item; `path` stays as it was until the new file is whole. Raises Fault."""
    info = PngImagePlugin.PngInfo()
    for key, value in text.items():
        info.add_text(key, str(value))
    with options.replacing(path) as beside:
        image.save(beside, "PNG", pnginfo=info)


def read(path: Path, size: int = 32) -> Tensor:
    """Any picture's middle square as (1, 3, size, size) in [0, 1]. Raises Fault."""
    try:
        with Image.open(path) as image:
            square = ImageOps.fit(ImageOps.exif_transpose(image).convert("RGB"), (size, size))
    except FileNotFoundError:
        raise Fault(f"{path}: no such file; wanted a picture") from None
    except Exception as error:  # a file can hold anything, and makes the readers of pictures raise as much
        raise Fault(f"{path}: not a picture that Pillow reads ({options.brief(error)})") from None
    return torch.from_numpy(numpy.asarray(square).copy()).permute(2, 0, 1)[None] / 255


def caption(image: Image.Image, words: str) -> Image.Image:
    """The image with a line of words below it."""
    font = ImageFont.load_default(max(10, min(20, image.width // 28)))
    taller = Image.new("RGB", (image.width, image.height + 2 * font.size), PAPER)
    taller.paste(image)
    ImageDraw.Draw(taller).text((image.width // 2, taller.height - font.size), words, INK, font, "mm")
    return taller


def sheet(images: Tensor, columns: int = 8, scale: int = 4, gap: int = 4) -> Image.Image:
    """Images (n, 3, h, w) in [0, 1], row by row, each `scale` times as large, pixels left as they are."""
    tiles = (images.clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy()
    height, width = tiles.shape[1] * scale, tiles.shape[2] * scale
    rows = math.ceil(len(tiles) / columns)
    page = Image.new("RGB", (columns * (width + gap) + gap, rows * (height + gap) + gap), PAPER)
    for i, tile in enumerate(tiles):
        place = (gap + i % columns * (width + gap), gap + i // columns * (height + gap))
        page.paste(Image.fromarray(tile).resize((width, height), Image.Resampling.NEAREST), place)
    return page


def ticks(low: float, high: float, most: int = 6) -> list[float]:
    """Round numbers from `low` to `high`, steps of 1, 2 or 5 times a power of ten, at most `most` + 1 of them."""
    rough = (high - low) / most
    power = 10 ** math.floor(math.log10(rough))
    step = next(power * m for m in (1, 2, 5, 10) if power * m >= rough * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [step * k for k in range(first, math.floor(high / step + 1e-9) + 1)]


def limits(values: Sequence[float]) -> tuple[float, float]:
    """The least and greatest finite value with a little room, never equal."""
    finite = [v for v in values if math.isfinite(v)] or [0.0]
    low, high = min(finite), max(finite)
    room = (high - low) * 0.05 or max(abs(high) * 0.05, 1e-3)
    return low - room, high + room


class Plot:
    """One set of axes in a box of an image."""

    def __init__(self, draw: ImageDraw.ImageDraw, box: tuple[int, int, int, int], x: Sequence, y: Sequence):
        self.draw, self.font = draw, ImageFont.load_default(14)
        self.left, self.top, self.right, self.bottom = box[0] + 76, box[1] + 34, box[2] - 20, box[3] - 50
        self.x_limits, self.y_limits = (min(x[0], 1), max(x[-1], x[0] + 1)), limits(y)

    def point(self, x: float, y: float) -> tuple[float, float]:
        (x0, x1), (y0, y1) = self.x_limits, self.y_limits
        return (self.left + (x - x0) / (x1 - x0) * (self.right - self.left),
                self.bottom - (y - y0) / (y1 - y0) * (self.bottom - self.top))

    def axes(self, title: str, x_name: str, y_name: str) -> None:
        for value in ticks(*self.y_limits):
            _, y = self.point(0, value)
            self.draw.line((self.left, y, self.right, y), GRID)
            self.draw.text((self.left - 8, y), f"{value:,.10g}", INK, self.font, "rm")
        for value in ticks(*self.x_limits, most=10):
            if value == int(value):
                x, _ = self.point(value, self.y_limits[0])
                self.draw.line((x, self.bottom, x, self.bottom + 5), INK)
                self.draw.text((x, self.bottom + 8), f"{value:,.10g}", INK, self.font, "mt")
        self.draw.line((self.left, self.top, self.left, self.bottom, self.right, self.bottom), INK)
        middle = (self.left + self.right) / 2
        self.draw.text((middle, self.top - 30), title, INK, ImageFont.load_default(17), "mt")
        self.draw.text((middle, self.bottom + 44), x_name, INK, self.font, "mb")
        self.draw.text((self.left, self.top - 6), y_name, INK, self.font, "mb")

    def curve(self, x: Sequence, y: Sequence, number: int, name: str = "") -> None:
        points = [self.point(a, b) for a, b in zip(x, y, strict=True) if math.isfinite(b)]
        if len(points) == 1:
            self.draw.circle(points[0], 3, COLORS[number])
        self.draw.line(points, COLORS[number], 2, "curve")
        self.draw.text((self.right - 50 * (1 - number), self.top - 6), name, COLORS[number], self.font, "rb")


PANELS = (("Train loss", ("train_loss",)), ("Test loss", ("test_loss",)),
          ("Distortion", ("train_distortion", "test_distortion")), ("Rate (KL)", ("train_rate", "test_rate")))
PRIOR = ("Learned prior", ("train_loss", "test_loss"))


def panel(page: Image.Image, box: tuple[int, int, int, int], rows: Sequence[dict], title: str,
          columns: tuple[str, ...], unit: str) -> None:
    """Curves of some columns against epochs in a box of an image."""
    epochs, series = [row["epoch"] for row in rows], [[row[column] for row in rows] for column in columns]
    plot = Plot(ImageDraw.Draw(page), box, epochs, sum(series, []))
    plot.axes(title, "epoch", unit)
    for number, (column, values) in enumerate(zip(columns, series, strict=True)):
        plot.curve(epochs, values, number, column.split("_")[0] if len(columns) > 1 else "")


def curves(history: Sequence[dict], words: str) -> Image.Image:
    """The paper's two figures, train and test loss against epochs, under them distortion and rate, in nats; and where
    a prior was learned, its loss.

    history: one dict an epoch with `epoch`, `phase` and the columns named in PANELS. words: a line at the foot.
    """
    learned = [row for row in history if row.get("phase") == "prior"]
    before = history[:len(history) - len(learned)]
    page = Image.new("RGB", (1200, 1200 if learned else 800), PAPER)
    for i, (title, columns) in enumerate(PANELS):
        box = (i % 2 * 600, i // 2 * 400, i % 2 * 600 + 600, i // 2 * 400 + 400)
        panel(page, box, before, title, columns, "nats an image")
    if learned:
        panel(page, (0, 800, 1200, 1200), learned, *PRIOR, "squared error")
    return caption(page, words)
