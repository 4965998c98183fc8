import pictures
from options import Fault

import numpy as np
import pytest
import torch
from conftest import png
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image


def test_sheet_puts_each_image_in_its_place():
    images = torch.arange(6).float().view(6, 1, 1, 1).expand(6, 3, 32, 32) / 10
    sheet = np.asarray(pictures.sheet(images, columns=4, scale=2, gap=1))
    assert sheet.shape == (2 * 65 + 1, 4 * 65 + 1, 3)
    for i in range(6):
        tile = sheet[1 + i // 4 * 65:, 1 + i % 4 * 65:][:64, :64]
        assert (tile == round(i * 25.5)).all()
    assert (sheet[66:, 1 + 2 * 65:] == 255).all()


def test_what_is_transparent_is_read_as_white(tmp_path, recwarn, monkeypatch):
    """In whatever mode it comes; and a large picture gives no warning."""
    cut = Image.new("RGBA", (40, 20), (0, 0, 0, 0))
    cut.paste((200, 30, 40, 255), (10, 0, 20, 20))
    for name, image in (("rgba.png", cut), ("palette.png", cut.quantize()), ("grey.png", cut.convert("LA"))):
        image.save(tmp_path / name)
        corner, middle = pictures.read(tmp_path / name)[0, :, 0, [31, 8]].unbind(1)
        assert (corner > 0.95).all(), name
        assert middle.mean() < 0.5, name
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1500)
    Image.new("1", (50, 40)).save(tmp_path / "large.png")
    assert pictures.read(tmp_path / "large.png").shape == (1, 3, 32, 32)
    assert not recwarn.list


def test_sheet_keeps_pixels_and_colours():
    image = torch.rand(1, 3, 32, 32)
    sheet = np.asarray(pictures.sheet(image, 1, 3, 0))
    assert (sheet[1::3, 1::3].transpose(2, 0, 1) == (image[0] * 255).round().numpy()).all()


@settings(deadline=None, derandomize=True)
@given(low=st.floats(-1e6, 1e6), span=st.floats(1e-3, 1e7))
def test_ticks_are_few_round_and_inside(low, span):
    values = pictures.ticks(low, low + span)
    assert 2 <= len(values) <= 7
    assert all(low - span * 1e-6 <= v <= low + span * (1 + 1e-6) for v in values)
    digits = f"{values[1] - values[0]:.3e}"
    assert digits[:5] in ("1.000", "2.000", "5.000"), digits


def test_curves_of_any_history():
    columns = [c for _, cs in pictures.PANELS for c in cs]
    for n in (1, 2, 300):
        history = [{"epoch": i + 1, **dict.fromkeys(columns, 100 / (i + 1))} for i in range(n)]
        page = pictures.curves(history, "words")
        assert page.size[0] == 1200
        assert (np.asarray(page) == pictures.COLORS[0]).all(-1).any(), "no curve was drawn"
    pictures.curves([{"epoch": 1, **dict.fromkeys(columns, float("nan"))}], "words")


def test_pngs_carry_text_and_are_whole_or_not_there(tmp_path):
    image = Image.new("RGB", (4, 4))
    pictures.save(image, tmp_path / "a.png", {"seed": 3, "data": "drawn"})
    assert png(tmp_path / "a.png") == ((4, 4), {"seed": "3", "data": "drawn"})
    assert [p.name for p in tmp_path.iterdir()] == ["a.png"]
    for place in (tmp_path / "none" / "a.png", tmp_path / "a.png" / "b.png"):
        with pytest.raises(Fault, match="can't be written"):
            pictures.save(image, place, {})


def test_sixteen_bits_a_pixel_are_read_as_bright_as_they_are(tmp_path):
    Image.fromarray(np.full((40, 50), 30_000, np.uint16)).save(tmp_path / "deep.png")
    torch.testing.assert_close(pictures.read(tmp_path / "deep.png"), torch.full((1, 3, 32, 32), 117 / 255))
