"""Muon against singular value decompositions and its formula written out."""
import copy
import math

import vae
from pegasus.training import muon
from pegasus.training.muon import Muon

import pytest
import torch
from torch import Tensor, nn


def make_weight(
    *shape: int, layout: torch.memory_format = torch.channels_last
) -> nn.Parameter:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(shape, generator=generator)
    return nn.Parameter(weight.contiguous(memory_format=layout))


def gradient(weight: Tensor, number: int) -> Tensor:
    generator = torch.Generator().manual_seed(number)
    return torch.randn(weight.shape, generator=generator)


def make_muon(weights: list[nn.Parameter]) -> Muon:
    optimizer = Muon(weights)
    optimizer.param_groups[0]["lr"] = torch.tensor(0.01)
    return optimizer


def take_step(optimizer: Muon, number: int) -> None:
    for weight in optimizer.param_groups[0]["params"]:
        weight.grad = gradient(weight, number)
    optimizer.step()


@pytest.mark.parametrize("shape", [(40, 90), (90, 40), (64, 64)])
def test_singular_values_become_alike_and_vectors_stay(shape):
    matrix = gradient(torch.empty(shape), 1)
    u, values, vt = torch.linalg.svd(matrix, full_matrices=False)
    assert values[0] > 3 * values[-1]
    result = muon.orthogonalize(matrix)
    turned = u.T @ result @ vt.T  # diagonal where the vectors are the same
    torch.testing.assert_close(turned, turned.diag().diag(), atol=1e-4, rtol=0)
    large = turned.diag()[values > values[0] / 100]
    assert 0.65 < large.min() and large.max() < 1.25


def test_zero_stays_zero():
    assert not muon.orthogonalize(torch.zeros(32, 40)).any()


@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format])
@pytest.mark.parametrize("shape", [(64, 32, 3, 3), (80, 40, 1, 1), (32, 64, 1, 1)])
def test_steps_are_those_of_the_formula(shape, layout):
    """Momentum of 0.95, Nesterov's, five times a X + b (X X') X + c (X X')^2 X."""
    weight = make_weight(*shape, layout=layout)
    expected = weight.detach().flatten(1).double()
    momentum = torch.zeros_like(expected)
    optimizer = make_muon([weight])
    rows, columns = expected.shape
    for number in range(3):
        take_step(optimizer, number)
        g = gradient(weight, number).flatten(1).double()
        momentum = 0.95 * momentum + 0.05 * g
        x = 0.95 * momentum + 0.05 * g
        x = x / x.norm()
        for _ in range(5):
            x = 3.4445 * x - 4.775 * x @ x.T @ x + 2.0315 * x @ x.T @ x @ x.T @ x
        expected = expected - 0.1 * math.sqrt(max(1, rows / columns)) * x
    torch.testing.assert_close(weight.detach().flatten(1).double(), expected, atol=1e-5, rtol=0)


def test_a_skipped_step_changes_nothing():
    weight = make_weight(40, 50, 1, 1)
    optimizer = make_muon([weight])
    take_step(optimizer, 0)
    before = weight.detach().clone()
    momentum = optimizer.state[weight]["momentum"].clone()
    optimizer.found_inf = torch.ones(())
    weight.grad = torch.full_like(weight, torch.nan)
    optimizer.step()
    assert weight.equal(before)
    assert optimizer.state[weight]["momentum"].equal(momentum)


def test_gradients_are_divided_by_their_scale():
    weight = make_weight(40, 50, 1, 1)
    optimizer = make_muon([weight])
    optimizer.grad_scale = torch.tensor(4.0)
    take_step(optimizer, 0)
    wanted = 0.05 * gradient(weight, 0) / 4
    torch.testing.assert_close(optimizer.state[weight]["momentum"], wanted)


def test_a_weight_is_trained_alike_alone_and_beside_others():
    weights = [make_weight(40, 50, 1, 1), make_weight(64, 32, 3, 3), make_weight(40, 50, 1, 1)]
    alone = copy.deepcopy(weights[0])
    together = make_muon(weights)
    single = make_muon([alone])
    for number in range(3):
        take_step(together, number)
        take_step(single, number)
    torch.testing.assert_close(weights[0], alone)


def test_which_weights_are_hidden():
    assert muon.is_hidden(torch.empty(64, 64, 3, 3))
    assert not muon.is_hidden(torch.empty(192, 128))  # of time and class
    for size in vae.SIZES:  # from an image, and to one
        colors = 3 * (size // 16) ** 2
        assert not muon.is_hidden(torch.empty(64, colors, 3, 3))
        assert not muon.is_hidden(torch.empty(colors, 64, 3, 3))
    assert not muon.is_hidden(torch.empty(16, 64, 1, 1))  # to the latents
    assert not muon.is_hidden(torch.empty(6, 128))  # names of classes
    assert not muon.is_hidden(torch.empty(640))
