"""Sheets of images and curves of numbers, drawn with Pillow."""
import math
import tempfile
import warnings
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


def check(path: Path) -> None:
    """Raise Fault, before anything is drawn, where `save` could not write or would write what the name belies."""
    if path.suffix.lower() not in ("", ".png"):
        raise Fault(f"{path}: pictures are written as PNG; end the name in .png")
    with options.writing(path, "choose another place"):
        tempfile.TemporaryFile(dir=options.behind(path).parent).close()


def save(image: Image.Image, path: Path, text: dict[str, object]) -> None:
    """Write a PNG with a text chunk for each item; `path` stays as it was until the new file is whole. Raises Fault."""
    info = PngImagePlugin.PngInfo()
    for key, value in text.items():
        info.add_text(key, str(value))
    with options.replacing(path) as beside:
        image.save(beside, "PNG", pnginfo=info)


def read(path: Path) -> Tensor:
    """Any picture's middle square as (1, 3, 32, 32) in [0, 1]. Raises Fault."""
    try:
        with warnings.catch_warnings(action="ignore"), Image.open(path) as image:  # of a large picture
            if image.mode.startswith("I"):  # 16 bits a pixel, which Pillow would cut off at 255
                image = image.convert("I").point(lambda value: value / 256).convert("L")
            image = ImageOps.exif_transpose(image)
            if image.has_transparency_data:
                image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
            square = ImageOps.fit(image.convert("RGB"), (32, 32))
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


PANELS = (("Train loss", ("train_loss",)), ("Test loss", ("test_loss",)),
          ("Distortion", ("train_distortion", "test_distortion")), ("Rate (KL)", ("train_rate", "test_rate")))


def panel(page: Image.Image, box: tuple[int, int, int, int], rows: Sequence[dict], title: str,
          columns: tuple[str, ...], unit: str) -> None:
    """Curves of some columns against epochs, on axes of their own in a box of an image."""
    epochs, series = [row["epoch"] for row in rows], [[row[column] for row in rows] for column in columns]
    left, top, right, bottom = box[0] + 76, box[1] + 34, box[2] - 20, box[3] - 50
    finite = [value for values in series for value in values if math.isfinite(value)] or [0.0]
    low, high = min(finite), max(finite)
    room = (high - low) * 0.05 or max(abs(high) * 0.05, 1e-3)
    (x0, x1), (y0, y1) = (1, max(epochs[-1], epochs[0] + 1)), (low - room, high + room)
    draw, font = ImageDraw.Draw(page), ImageFont.load_default(14)

    def point(x: float, y: float) -> tuple[float, float]:
        return left + (x - x0) / (x1 - x0) * (right - left), bottom - (y - y0) / (y1 - y0) * (bottom - top)

    for value in ticks(y0, y1):
        _, y = point(0, value)
        draw.line((left, y, right, y), GRID)
        draw.text((left - 8, y), f"{value:,.10g}", INK, font, "rm")
    for value in ticks(x0, x1, most=10):
        if value == int(value):
            x, _ = point(value, y0)
            draw.line((x, bottom, x, bottom + 5), INK)
            draw.text((x, bottom + 8), f"{value:,.10g}", INK, font, "mt")
    draw.line((left, top, left, bottom, right, bottom), INK)
    draw.text(((left + right) / 2, top - 30), title, INK, ImageFont.load_default(17), "mt")
    draw.text(((left + right) / 2, bottom + 44), "epoch", INK, font, "mb")
    draw.text((left, top - 6), unit, INK, font, "mb")
    for number, (column, values) in enumerate(zip(columns, series, strict=True)):
        points = [point(a, b) for a, b in zip(epochs, values, strict=True) if math.isfinite(b)]
        if len(points) == 1:
            draw.circle(points[0], 3, COLORS[number])
        draw.line(points, COLORS[number], 2, "curve")
        if len(columns) > 1:
            draw.text((right - 50 * (1 - number), top - 6), column.split("_")[0], COLORS[number], font, "rb")


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
        panel(page, (0, 800, 1200, 1200), learned, "Learned prior", ("train_loss", "test_loss"), "squared error")
    return caption(page, words)
