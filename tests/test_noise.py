"""Statistics of the noise. Seeds are fixed; limits are about five standard deviations."""
import math

import reparam

import pytest
import torch

ROWS = 1000
COLUMNS = 1000


def sample(seed: int) -> torch.Tensor:
    """The noise, (ROWS, COLUMNS): with mu = 0 and std = 1, z is eps."""
    zeros = torch.zeros(ROWS, COLUMNS)
    return reparam.reparameterize_kl(zeros, zeros, torch.tensor(seed))[0].double()


@pytest.fixture(scope="module")
def eps() -> torch.Tensor:
    return sample(20)


@pytest.mark.parametrize("power,moment,variance", [(1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)])
def test_moments(eps, power, moment, variance):
    limit = 5 * math.sqrt(variance / eps.numel())
    assert abs(eps.pow(power).mean() - moment) < limit


@pytest.mark.parametrize("position", range(4))
def test_moments_of_each_position_in_a_group(eps, position):
    some = eps[:, position::4]
    assert abs(some.mean()) < 5 / math.sqrt(some.numel())
    assert abs(some.pow(2).mean() - 1) < 5 * math.sqrt(2 / some.numel())


def kolmogorov_smirnov(sample: torch.Tensor) -> float:
    """The largest distance between the sample's distribution and N(0, 1)'s, times sqrt(n)."""
    n = sample.numel()
    cdf = torch.special.ndtr(sample.flatten().sort().values)
    steps = torch.arange(n + 1, dtype=torch.float64) / n
    distance = max((cdf - steps[:-1]).max(), (steps[1:] - cdf).max())
    return distance.item() * math.sqrt(n)


def test_kolmogorov_smirnov(eps):
    assert kolmogorov_smirnov(eps) < 1.95  # exceeded with probability 0.001
    assert kolmogorov_smirnov(eps * 1.01) > 1.95  # the test can fail


def correlation(a: torch.Tensor, b: torch.Tensor) -> float:
    """In standard deviations of independent samples'."""
    return (a * b).mean().item() * math.sqrt(a.numel())


@pytest.mark.parametrize("lag", [1, 2, 3, 4, 8, 16])
def test_neighbouring_columns_do_not_correlate(eps, lag):
    assert abs(correlation(eps[:, lag:], eps[:, :-lag])) < 5
    squares = eps.pow(2) - 1
    limit = 2 * 5  # the product's standard deviation is 2
    assert abs(correlation(squares[:, lag:], squares[:, :-lag])) < limit


@pytest.mark.parametrize("lag", [1, 2, 4])
def test_neighbouring_rows_do_not_correlate(eps, lag):
    assert abs(correlation(eps[lag:], eps[:-lag])) < 5


@pytest.mark.parametrize("other", [21, 20 + 2**32, -20, reparam.derive_seed(20, 1, 0)])
def test_seeds_do_not_correlate(eps, other):
    second = sample(other)
    assert abs(correlation(eps, second)) < 5
    assert not torch.equal(eps, second)


def test_the_tails_reach_beyond_24_bits(eps):
    beyond = (eps.abs() > 4).sum().item()
    below = torch.special.ndtr(torch.tensor(4.0, dtype=torch.float64)).item()
    expected = eps.numel() * 2 * (1 - below)
    assert abs(beyond - expected) < 5 * math.sqrt(expected)
