import struct

from pegasus.cli import UserError
from pegasus.drawing import plots

import numpy as np
import pytest
import torch
from conftest import png
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps


def test_sheet_puts_each_image_in_its_place():
    images = torch.arange(6).float().view(6, 1, 1, 1).expand(6, 3, 32, 32) / 10
    sheet = np.asarray(plots.sheet(images, columns=4, scale=2, gap=1))
    assert sheet.shape == (2 * 65 + 1, 4 * 65 + 1, 3)
    for i in range(6):
        tile = sheet[1 + i // 4 * 65 :, 1 + i % 4 * 65 :][:64, :64]
        assert (tile == round(i * 25.5)).all()
    assert (sheet[66:, 1 + 2 * 65 :] == 255).all()


def test_sheet_keeps_pixels_and_colors():
    image = torch.rand(1, 3, 32, 32)
    sheet = np.asarray(plots.sheet(image, 1, 3, 0))
    wanted = (image[0] * 255).round().numpy()
    assert (sheet[1::3, 1::3].transpose(2, 0, 1) == wanted).all()


def test_what_is_transparent_is_read_as_white(tmp_path):
    cut = Image.new("RGBA", (40, 20), (0, 0, 0, 0))
    cut.paste((200, 30, 40, 255), (10, 0, 20, 20))
    images = {"rgba": cut, "palette": cut.quantize(), "grey": cut.convert("LA")}
    for name, image in images.items():
        image.save(tmp_path / f"{name}.png")
        pixels = plots.read(tmp_path / f"{name}.png")[0]
        assert (pixels[:, 0, 31] > 0.95).all(), name
        assert pixels[:, 0, 8].mean() < 0.5, name


def test_a_large_picture_gives_no_warning(tmp_path, recwarn, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1500)
    Image.new("1", (50, 40)).save(tmp_path / "large.png")
    assert plots.read(tmp_path / "large.png").shape == (1, 3, 32, 32)
    assert not recwarn.list


def exif(orientation: int) -> bytes:
    """EXIF data with an orientation, and a resolution of -1/0."""
    header = b"Exif\0\0MM\0*" + struct.pack(">I", 8)
    entries = struct.pack(">HHHIHH", 2, 0x0112, 3, 1, orientation, 0)
    entries += struct.pack(">HHII", 0x011A, 10, 1, 38)
    return header + entries + struct.pack(">Iii", 0, -1, 0)


@pytest.mark.parametrize("orientation", range(10))
def test_pictures_are_turned_as_exif_says(tmp_path, orientation):
    pixels = np.zeros((64, 64), np.uint8)
    pixels[:20, :40] = 255
    image = Image.fromarray(pixels)
    image.save(tmp_path / "a.png", exif=exif(orientation))
    plain = Image.Exif()
    plain[0x0112] = orientation
    image.save(tmp_path / "b.png", exif=plain)
    with Image.open(tmp_path / "b.png") as plain_image:
        ImageOps.exif_transpose(plain_image).save(tmp_path / "c.png")
    assert plots.read(tmp_path / "a.png").equal(plots.read(tmp_path / "c.png"))


def test_exif_that_cannot_be_read_turns_nothing(tmp_path):
    image = Image.new("RGB", (64, 64), "white")
    image.save(tmp_path / "a.jpg", exif=b"Exif\0\0MM\0*" + b"\xff" * 40)
    assert plots.read(tmp_path / "a.jpg").min() == 1


@pytest.mark.parametrize("dtype", [np.float32, np.int32])
def test_pixels_whose_white_is_unknown_are_refused(tmp_path, dtype):
    Image.fromarray(np.ones((40, 40), dtype)).save(tmp_path / "a.tiff")
    with pytest.raises(UserError, match="a.tiff: .*its pixels have 32 bits; save it with"):
        plots.read(tmp_path / "a.tiff")


def test_a_picture_of_too_many_pixels_is_told(tmp_path, monkeypatch):
    Image.new("L", (64, 64)).save(tmp_path / "a.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(UserError, match="a.png: wanted at most 2,000 pixels"):
        plots.read(tmp_path / "a.png")


def test_sixteen_bits_a_pixel_are_read_as_bright_as_they_are(tmp_path):
    pixels = np.full((40, 50), 30_000, np.uint16)
    Image.fromarray(pixels).save(tmp_path / "deep.png")
    wanted = torch.full((1, 3, 32, 32), 117 / 255)
    torch.testing.assert_close(plots.read(tmp_path / "deep.png"), wanted)


@settings(deadline=None, derandomize=True)
@given(low=st.floats(-1e6, 1e6), span=st.floats(1e-3, 1e7))
def test_ticks_are_few_round_and_inside(low, span):
    values = plots.ticks(low, low + span)
    assert 2 <= len(values) <= 7
    assert all(low - span * 1e-6 <= v <= low + span * (1 + 1e-6) for v in values)
    digits = f"{values[1] - values[0]:.3e}"
    assert digits[:5] in ("1.000", "2.000", "5.000"), digits


COLUMNS = [column for _, columns in plots.PANELS for column in columns]


@pytest.mark.parametrize("n", [1, 2, 300])
def test_curves_of_any_history(n):
    history = []
    for i in range(n):
        history.append({"epoch": i + 1, **dict.fromkeys(COLUMNS, 100 / (i + 1))})
    page = plots.curves(history, "words")
    assert page.size[0] == 1200
    has_color = (np.asarray(page) == plots.COLORS[0]).all(-1)
    assert has_color.any(), "no curve was drawn"


def test_a_curve_lies_where_its_axes_put_it():
    """Of two epochs: from the left at the bottom to the right at the top."""
    history = [{"epoch": i + 1, **dict.fromkeys(COLUMNS, float(i))} for i in range(2)]
    pixels = np.asarray(plots.curves(history, ""))[:400, :600]
    rows, columns = (pixels == plots.COLORS[0]).all(-1).nonzero()
    assert columns.min() == pytest.approx(76, abs=2)
    assert columns.max() == pytest.approx(580, abs=2)
    height = 350 - 34
    assert rows.max() == pytest.approx(350 - height * 0.05 / 1.1, abs=2)
    assert rows.min() == pytest.approx(34 + height * 0.05 / 1.1, abs=2)
    assert columns[rows.argmax()] < columns[rows.argmin()]


def test_a_learned_prior_gets_a_panel_of_its_own():
    row = dict.fromkeys(COLUMNS, 1.0)
    history = [{"epoch": 1, "phase": "autoencoder", **row}]
    without = plots.curves(history, "words")
    history.append({"epoch": 2, "phase": "prior", **row})
    page = plots.curves(history, "words")
    assert page.size[1] == without.size[1] + 400
    curves = np.asarray(page)[:800]
    assert (curves == np.asarray(without)[:800]).all()


def test_curves_without_a_finite_number():
    empty = plots.curves([{"epoch": 1, **dict.fromkeys(COLUMNS, float("nan"))}], "words")
    drawn = plots.curves([{"epoch": 1, **dict.fromkeys(COLUMNS, 2.0)}], "words")
    assert empty.size == drawn.size
    assert (np.asarray(empty) != np.asarray(drawn)).any()  # no point where there is none


def test_pngs_carry_text_and_are_whole_or_not_there(tmp_path):
    image = Image.new("RGB", (4, 4))
    plots.save(image, tmp_path / "a.png", {"seed": 3, "data": "synthetic"})
    assert png(tmp_path / "a.png") == ((4, 4), {"seed": "3", "data": "synthetic"})
    assert [p.name for p in tmp_path.iterdir()] == ["a.png"]
    for path in (tmp_path / "none" / "a.png", tmp_path / "a.png" / "b.png"):
        with pytest.raises(UserError, match="can't be written"):
            plots.save(image, path, {})
