"""Sheets of images and curves of numbers, drawn with Pillow."""
import math
import tempfile
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import vae
from pegasus import files
from pegasus.cli import UserError

from PIL import ExifTags, Image, ImageDraw, ImageFont, PngImagePlugin, features
from torch import Tensor

INK = (40, 40, 40)
GRID = (225, 225, 225)
PAPER = (255, 255, 255)
COLORS = ((31, 95, 170), (200, 80, 30))  # of a panel's curves
GAP = 4  # pixels between the images of a sheet
MOVING = (".gif", ".webp")
FRAME = 80  # milliseconds for which a moving picture shows each of its own
SYNTHETIC = "made from synthetic data, not from photographs"
PANELS = (
    ("Train loss", ("train_loss",)),
    ("Test loss", ("test_loss",)),
    ("Distortion", ("train_distortion", "test_distortion")),
    ("Rate (KL)", ("train_rate", "test_rate")),
)


def is_moving(path: Path | str) -> bool:
    """Return whether a file is to be a moving picture, by its name's ending."""
    return Path(path).suffix.lower() in MOVING


def check(path: Path) -> None:
    """Check, before anything is computed, that a picture can be written to a path.

    Raises UserError, also for a name that ends as another format's.
    """
    if path.suffix.lower() not in ("", ".png", *MOVING):
        raise UserError(
            f"{path}: pictures are written as PNG, moving ones as GIF or WebP; end the name "
            "in .png, .gif or .webp"
        )
    if path.suffix.lower() == ".webp" and not features.check("webp"):
        raise UserError(f"{path}: this Pillow has no WebP; end the name in .gif")
    with files.writing(path, "choose another place"):
        folder = files.real_file(path).parent
        tempfile.TemporaryFile(dir=folder).close()


def save(image: Image.Image, path: Path, text: dict[str, object]) -> None:
    """Write a PNG with a text chunk for each item, whole or not at all. Raises UserError."""
    info = PngImagePlugin.PngInfo()
    for key, value in text.items():
        info.add_text(key, str(value))
    with files.replace_file(path) as temporary:
        image.save(temporary, "PNG", pnginfo=info)


def one_palette(frames: list[Image.Image]) -> list[Image.Image]:
    """Return pictures of one size with the same 256 colors: other ones would flicker."""
    width, height = frames[0].size
    strip = Image.new("RGB", (width, height * len(frames)))
    for number, frame in enumerate(frames):
        strip.paste(frame, (0, number * height))
    strip = strip.quantize(256, dither=Image.Dither.NONE)
    tops = range(0, strip.height, height)
    return [strip.crop((0, top, width, top + height)) for top in tops]


def save_moving(frames: list[Image.Image], path: Path, text: dict[str, object]) -> None:
    """Write pictures as one that moves, for ever, whole or not at all.

    Its format is that of the name's ending. A GIF has text as a comment, a WebP as EXIF's
    description. Raises UserError.
    """
    settings = {"save_all": True, "duration": FRAME, "loop": 0}
    description = "; ".join(f"{key}: {value}" for key, value in text.items())
    if path.suffix.lower() == ".gif":
        frames = one_palette(frames)
        settings |= {"format": "GIF", "comment": description.encode()}
    else:
        exif = Image.Exif()
        exif[ExifTags.Base.ImageDescription] = description
        settings |= {"format": "WEBP", "quality": 90, "exif": exif}
    with files.replace_file(path) as temporary:
        frames[0].save(temporary, append_images=frames[1:], **settings)


def caption(image: Image.Image, text: str) -> Image.Image:
    """Return the image with text below it, in as many lines as it needs."""
    font = ImageFont.load_default(max(10, min(20, image.width // 28)))
    lines = textwrap.wrap(text, max(10, int(1.9 * image.width / font.size)))
    height = image.height + (1 + len(lines)) * font.size
    page = Image.new("RGB", (image.width, height), PAPER)
    page.paste(image)
    place = (image.width // 2, image.height + font.size / 2)
    ImageDraw.Draw(page).text(place, "\n".join(lines), INK, font, "ma", 0, "center")
    return page


def sheet(images: Tensor, columns: int = 8, scale: int = 4, gap: int = GAP) -> Image.Image:
    """Lay out images (n, 3, h, w) in [0, 1] row by row, each `scale` times as large."""
    columns = min(columns, len(images))
    tiles = vae.to_bytes(images)
    tiles = tiles.permute(0, 2, 3, 1).cpu().numpy()
    height = tiles.shape[1] * scale
    width = tiles.shape[2] * scale
    rows = math.ceil(len(tiles) / columns)
    size = (columns * (width + gap) + gap, rows * (height + gap) + gap)
    page = Image.new("RGB", size, PAPER)
    for i, pixels in enumerate(tiles):
        tile = Image.fromarray(pixels)
        tile = tile.resize((width, height), Image.Resampling.NEAREST)
        left = gap + i % columns * (width + gap)
        top = gap + i // columns * (height + gap)
        page.paste(tile, (left, top))
    return page


def ticks(low: float, high: float, most: int = 6) -> list[float]:
    """Return round numbers from `low` to `high`, at most `most` + 1 of them.

    Their steps are 1, 2 or 5 times a power of ten.
    """
    rough = (high - low) / most
    power = 10 ** math.floor(math.log10(rough))
    step = next(power * m for m in (1, 2, 5, 10) if power * m >= rough * 0.999)
    first = math.ceil(low / step - 1e-9)
    last = math.floor(high / step + 1e-9)
    return [step * k for k in range(first, last + 1)]


class Axes(NamedTuple):
    """A rectangle of a page in pixels, and the ranges of numbers that it shows."""
    left: int
    top: int
    right: int
    bottom: int
    x_range: tuple[float, float]
    y_range: tuple[float, float]

    def x_pixel(self, x: float) -> float:
        """Return the column of a number on the x axis."""
        low, high = self.x_range
        return self.left + (x - low) / (high - low) * (self.right - self.left)

    def y_pixel(self, y: float) -> float:
        """Return the row of a number on the y axis."""
        low, high = self.y_range
        return self.bottom - (y - low) / (high - low) * (self.bottom - self.top)


def padded_range(values: list[float]) -> tuple[float, float]:
    """Return a range that holds all values with a margin around them."""
    low = min(values)
    high = max(values)
    margin = (high - low) * 0.05
    if margin == 0:
        margin = max(abs(high) * 0.05, 1e-3)
    return low - margin, high + margin


def draw_axes(draw: ImageDraw.ImageDraw, axes: Axes, title: str, unit: str) -> None:
    """Draw axes with their ticks, a title above them and a unit at the y axis."""
    font = ImageFont.load_default(14)
    left, top, right, bottom = axes[:4]
    for value in ticks(*axes.y_range):
        y = axes.y_pixel(value)
        draw.line((left, y, right, y), GRID)
        draw.text((left - 8, y), f"{value:,.10g}", INK, font, "rm")
    for value in ticks(*axes.x_range, most=10):
        if value == int(value):  # epochs are whole
            x = axes.x_pixel(value)
            draw.line((x, bottom, x, bottom + 5), INK)
            draw.text((x, bottom + 8), f"{value:,.10g}", INK, font, "mt")
    draw.line((left, top, left, bottom, right, bottom), INK)
    middle = (left + right) / 2
    draw.text((middle, top - 30), title, INK, ImageFont.load_default(17), "mt")
    draw.text((middle, bottom + 44), "epoch", INK, font, "mb")
    draw.text((left, top - 6), unit, INK, font, "mb")


def draw_curve(
    draw: ImageDraw.ImageDraw,
    axes: Axes,
    epochs: list[int],
    values: list[float],
    color: tuple[int, int, int],
) -> None:
    """Draw a line through some values, or a dot where it is one."""
    points = [(axes.x_pixel(x), axes.y_pixel(y)) for x, y in zip(epochs, values, strict=True)]
    if len(points) == 1:
        draw.circle(points[0], 3, color)
    draw.line(points, color, 2, "curve")


def draw_panel(
    page: Image.Image,
    box: tuple[int, int, int, int],
    history: Sequence[dict],
    panel: tuple[str, tuple[str, ...]],
    unit: str,
) -> None:
    """Draw a panel's curves against epochs in a box (left, top, right, bottom).

    panel: its title and one or two of history's columns, as in PANELS.
    """
    title, columns = panel
    left, top, right, bottom = box
    epochs = [row["epoch"] for row in history]
    values = [row[column] for column in columns for row in history]
    epoch_range = (1, max(epochs[-1], epochs[0] + 1))
    corners = (left + 76, top + 34, right - 20, bottom - 50)
    axes = Axes(*corners, epoch_range, padded_range(values))
    draw = ImageDraw.Draw(page)
    draw_axes(draw, axes, title, unit)
    for i, column in enumerate(columns):
        draw_curve(draw, axes, epochs, [row[column] for row in history], COLORS[i])
        if len(columns) > 1:
            name = column.split("_")[0]
            place = (axes.right - 50 * (1 - i), axes.top - 6)
            draw.text(place, name, COLORS[i], ImageFont.load_default(14), "rb")


def curves(history: Sequence[dict], text: str) -> Image.Image:
    """Draw losses against epochs: the paper's two figures, distortion and rate.

    Where a prior was learned, its losses too. history: a dict for each epoch with
    `epoch`, `phase` and the columns of PANELS, in nats. text: a line at the foot.
    """
    prior = [row for row in history if row.get("phase") == "prior"]
    autoencoder = history[:len(history) - len(prior)]
    page = Image.new("RGB", (1200, 1200 if prior else 800), PAPER)
    for i, panel in enumerate(PANELS):
        left = i % 2 * 600
        top = i // 2 * 400
        box = (left, top, left + 600, top + 400)
        draw_panel(page, box, autoencoder, panel, "nats an image")
    if prior:
        panel = ("Learned prior", ("train_loss", "test_loss"))
        draw_panel(page, (0, 800, 1200, 1200), prior, panel, "squared error")
    return caption(page, text)
