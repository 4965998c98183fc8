"""Each measure sees what it is for."""
import math

import vae
from pegasus import measures

import pytest
import torch
from torch import nn


def test_frechet_distance_is_the_closed_form():
    """Against the eigenvalues of S_a S_b, and by hand where both are diagonal."""
    g = torch.Generator().manual_seed(0)
    mix_a, mix_b = torch.randn(2, 6, 6, generator=g, dtype=torch.float64)
    a = torch.randn(400, 6, generator=g, dtype=torch.float64) @ mix_a
    b = torch.randn(300, 6, generator=g, dtype=torch.float64) @ mix_b + 1
    cross = torch.linalg.eigvals(a.T.cov() @ b.T.cov()).real.sqrt().sum()
    gap = (a.mean(0) - b.mean(0)).square().sum()
    wanted = gap + a.T.cov().trace() + b.T.cov().trace() - 2 * cross
    assert measures.frechet(a, b) == pytest.approx(wanted.item())
    assert measures.frechet(a, a) == pytest.approx(0, abs=1e-9)
    corners = torch.tensor([[1.0, 1], [1, -1], [-1, 1], [-1, -1]])
    wanted = 2 + 2 * 4 * 4 / 3  # |gap|^2 + sum (3 s - s)^2
    assert measures.frechet(corners, 3 * corners + 1) == pytest.approx(wanted)


@pytest.mark.parametrize("shift", [0.0, 0.2])
def test_extrapolated_the_frechet_distance_has_no_bias(shift):
    """Of two Gaussians in 40 dimensions it is 40 shift^2; at N = 400 it is 2 more."""
    g = torch.Generator().manual_seed(1)
    a, b = torch.randn(2, 6, 400, 40, generator=g)
    b = b + shift
    pairs = list(zip(a, b, strict=True))
    wanted = 40 * shift**2
    at_n = [measures.frechet_at(x, y, 400) for x, y in pairs]
    assert sum(at_n) / 6 > wanted + 1.5
    at_infinity = [measures.frechet_at_infinity(x, y) for x, y in pairs]
    assert sum(at_infinity) / 6 == pytest.approx(wanted, abs=0.25)


def test_frechet_distance_of_rows_in_turn():
    a = torch.arange(20.0).view(10, 2).square()
    b = a.flip(0)
    halves = (measures.frechet(a[:4], b[:4]) + measures.frechet(a[4:8], b[4:8])) / 2
    assert measures.frechet_at(a, b, 4) == pytest.approx(halves)
    assert measures.frechet_at(a, b[:7], 4) == pytest.approx(measures.frechet(a[:4], b[:4]))


def waves(count, vertical=False):
    """Return a picture of so many waves."""
    line = torch.sin(2 * math.pi * count * torch.arange(32) / 32)
    image = line[:, None] if vertical else line
    return 0.5 + 0.4 * image.expand(3, 32, 32)


def test_radial_power_knows_how_fine_a_wave_is():
    for vertical in (False, True):
        coarse, fine, finest = (
            measures.radial_power(waves(count, vertical)[None]) for count in (3, 10, 14)
        )
        assert fine[0] > 100 * fine[1]
        assert finest[1] > 100 * finest[0]
        assert coarse.sum() < 0.01 * fine.sum()


def test_radial_power_sees_blur():
    g = torch.Generator().manual_seed(2)
    sharp = torch.rand(20, 3, 32, 32, generator=g)
    blurred = nn.functional.avg_pool2d(sharp, 3, 1, 1)
    share = measures.radial_power(blurred) / measures.radial_power(sharp)
    assert (share < 0.25).all()
    half = measures.radial_power(0.5 + (sharp - 0.5) / 2) / measures.radial_power(sharp)
    torch.testing.assert_close(half, torch.full((2,), 0.25))


def test_variety_sees_one_stamp():
    g = torch.Generator().manual_seed(5)
    different = vae.from_bytes(torch.randint(0, 256, (64, 3, 32, 32), generator=g))
    noise = 0.05 * torch.randn(64, 3, 32, 32, generator=g)
    stamps = different[:1] + noise
    stamps[::2] = stamps[::2].flip(3)  # mirrored, a stamp is still one
    stamped = measures.variety(stamps)
    varied = measures.variety(different)
    assert stamped.correlation > 0.9 > 0.2 > varied.correlation
    assert stamped.deviation < 0.06 < 0.25 < varied.deviation


def test_pictures_of_one_color_are_alike():
    assert measures.variety(torch.full((5, 3, 32, 32), 0.5)).correlation == 1


def test_nearest_distances():
    features = torch.tensor([[0.0, 0], [3, 4], [9, 1]])
    others = torch.tensor([[0.0, 1], [3, 4], [9, 9]])
    assert measures.nearest_distances(features, others).tolist() == pytest.approx([1, 0, 6.7082])
    assert measures.nearest_distances(features, features).tolist() == [0, 0, 0]


def test_a_detector_is_the_best_line_between_two_gaussians():
    """Fisher's: of N(m, I) and N(-m, I) it is wrong as often as N(0, 1) is beyond |m|."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(2, 4000, 8, generator=generator)
    mean = torch.full((8,), 0.4)
    weights = measures.detector(noise[0, :2000] + mean, noise[1, :2000] - mean)
    found = measures.detected(weights, noise[0, 2000:] + mean)
    mistaken = measures.detected(weights, noise[1, 2000:] - mean)
    wrong = torch.special.ndtr(-mean.norm()).item()
    assert 1 - found == pytest.approx(wrong, abs=0.02)
    assert mistaken == pytest.approx(wrong, abs=0.02)
