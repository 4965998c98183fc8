from pegasus.cli import UserError
from pegasus.drawing import plots

import numpy as np
import pytest
import torch
from conftest import png
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image


def test_sheet_puts_each_image_in_its_place():
    images = torch.arange(6).float().view(6, 1, 1, 1).expand(6, 3, 32, 32) / 10
    sheet = np.asarray(plots.sheet(images, columns=4, scale=2, gap=1))
    assert sheet.shape == (2 * 65 + 1, 4 * 65 + 1, 3)
    for i in range(6):
        tile = sheet[1 + i // 4 * 65 :, 1 + i % 4 * 65 :][:64, :64]
        assert (tile == round(i * 25.5)).all()
    assert (sheet[66:, 1 + 2 * 65 :] == 255).all()
    assert plots.sheet(images[:1], columns=4, scale=2, gap=1).size == (66, 66)


def test_sheet_keeps_pixels_and_colors():
    image = torch.rand(1, 3, 32, 32)
    sheet = np.asarray(plots.sheet(image, 1, 3, 0))
    wanted = (image[0] * 255).round().numpy()
    assert (sheet[1::3, 1::3].transpose(2, 0, 1) == wanted).all()


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


def test_pngs_carry_text_and_are_whole_or_not_there(tmp_path):
    image = Image.new("RGB", (4, 4))
    plots.save(image, tmp_path / "a.png", {"seed": 3, "data": "synthetic"})
    assert png(tmp_path / "a.png") == ((4, 4), {"seed": "3", "data": "synthetic"})
    assert [p.name for p in tmp_path.iterdir()] == ["a.png"]
    for path in (tmp_path / "none" / "a.png", tmp_path / "a.png" / "b.png"):
        with pytest.raises(UserError, match="can't be written"):
            plots.save(image, path, {})
