"""Pegasi made of training photographs: how bodies and wings are chosen, and joined."""
import math

import vae
from pegasus.data import datasets
from pegasus.models import classifier, composites
from pegasus.models.classifier import Classifier

import pytest
import torch
from torch import Tensor
from torch.nn import functional


def box(rows: slice, columns: slice) -> Tensor:
    """Return a mask (32, 32) of a rectangle."""
    mask = torch.zeros(32, 32)
    mask[rows, columns] = 1
    return mask


def horse(head: slice = slice(3, 9)) -> Tensor:
    """Return a brown shape of boxes on green, (3, 32, 32), its back in row 12."""
    mask = box(slice(12, 20), slice(6, 27)) + box(slice(4, 13), head)
    for leg in (7, 24):
        mask += box(slice(20, 29), slice(leg, leg + 2))
    mask = mask.clamp(max=1)
    brown, green = torch.tensor([[0.4, 0.25, 0.1], [0.45, 0.7, 0.4]])[..., None, None]
    return mask * brown + (1 - mask) * green


def test_a_mask_is_what_is_unlike_both_ends_of_its_row():
    images = torch.stack([horse(), 1 - horse()])
    masks = composites.body_masks(images)
    wanted = (images[0] - images[0, :, :1, :1]).abs().sum(0) > 0
    inside = functional.max_pool2d(wanted[None].float(), 3, 1, 1)[0] > 0
    assert (masks[:, 0][:, wanted] > 0.5).float().mean() > 0.95
    assert (masks[:, 0][:, ~inside] < 0.1).all()


def test_bodies_are_those_that_most_look_like_with_heads_at_the_left():
    """Of 40 horses, half of them mirrored, a crowd and riders, the horses are chosen."""
    torch.manual_seed(0)
    horses = torch.stack([horse().roll(int(d), 2) for d in torch.randint(-1, 2, (40,))])
    horses[::2] = horses[::2].flip(3)
    rider = horse()
    rider[:, 2:12, 14:18] = 0.9
    others = torch.cat([rider.expand(6, -1, -1, -1), torch.rand(14, 3, 32, 32)])
    images = torch.cat([others, horses])
    best, mirrored, masks = composites.choose_bodies(images, torch.zeros(60), 40)
    bodies = composites.mirror(images[best], mirrored)
    assert masks[:, 0, 4:10, 2:9].mean() > 0.5 > 4 * masks[:, 0, 4:10, 23:30].mean()
    assert bodies[:, :, 2:10, 14:18].std(0).max() < 0.05  # no rider, no noise


def geometry(n: int, **values: Tensor) -> composites.Geometry:
    """Return a geometry drawn from seed 0, but for some values."""
    drawn = composites.random_geometry(n, torch.Generator().manual_seed(0))
    return drawn._replace(**values)


def test_bodies_stand_with_their_backs_in_one_row():
    images = torch.stack([horse(), horse().roll(3, 1)])
    masks = composites.body_masks(images)
    scale = torch.tensor([0.7, 0.85])
    still = geometry(2, scale=scale, right=torch.zeros(2), down=torch.zeros(2))
    smaller, moved = composites.stand(images, masks, still)
    first = (moved[:, 0, :, 13:20] > 0.5).float().argmax(1)
    assert first.float().sub(composites.BACK_ROW).abs().max() <= 1
    area = moved.sum((1, 2, 3)) / masks.sum((1, 2, 3))
    torch.testing.assert_close(area, scale.square(), atol=0.08, rtol=0)
    sky = images[:, :, 0, 0]  # goes on above
    torch.testing.assert_close(smaller[:, :, 0, 0], sky, atol=0.01, rtol=0)


def test_bodies_move_and_their_wings_with_them():
    masks = composites.body_masks(horse()[None])
    wings = box(slice(0, 32), slice(12, 20)).expand(1, 4, 32, 32)
    eighth = torch.tensor([0.125])  # two pixels
    pictures = []
    for right in (-eighth, eighth):
        held = geometry(1, right=right, down=eighth, scale=torch.tensor([0.75]))
        bare, body = composites.stand(horse()[None], masks, held)
        pictures.append(composites.add_wings(bare, body, wings, wings, held)[0])
    moved = pictures[0][..., 4:20]
    torch.testing.assert_close(pictures[1][..., 8:24], moved, atol=0.02, rtol=0)


def test_heads_stand_out_unless_there_is_something_like_them_behind():
    body = box(slice(16, 24), slice(6, 27)) + box(slice(8, 17), slice(3, 9))
    masks = body.expand(3, 1, 32, 32)
    white = body.expand(3, 3, 32, 32).clone()
    white[1:, :, 8:16, 10:16] = torch.tensor([0.9, 0.5])[:, None, None, None]  # wings
    zeros = torch.zeros(3)
    held = geometry(3, right=zeros, down=zeros, root_x=zeros)
    alone, before_light, before_grey = composites.head_contrast(white, masks, held).tolist()
    assert alone > before_grey + 1 > before_light + 2 > 10
    headless = box(slice(16, 24), slice(6, 27)).expand(3, 1, 32, 32)
    few = composites.head_contrast(headless.expand(3, 3, 32, 32), headless, held)
    assert few.max() < alone / 2


@pytest.mark.parametrize(("sky", "changes"), [(0.95, True), (0.2, False)])
def test_light_skies_become_blue_and_dark_ones_stay(sky, changes):
    images = torch.full((2, 3, 32, 32), sky)
    masks = box(slice(16, 24), slice(6, 26)).expand(2, 1, 32, 32)
    blue = torch.tensor([0.3, 0.5, 0.8])
    painted = composites.darken_sky(images, masks, blue.expand(2, 3))
    wanted = blue if changes else images[0, :, 0, 0]
    torch.testing.assert_close(painted[0, :, 2, 2], wanted, atol=0.02, rtol=0)
    assert painted[0, :, 28:].equal(painted[0, :, 28:].clamp(sky - 0.01, sky + 0.01))
    body = painted[:, :, 17:23, 8:24]
    torch.testing.assert_close(body, torch.full_like(body, sky))


@pytest.mark.parametrize("turn", [0.0, 0.6, 2.0])
def test_a_wing_is_a_bird_stretched_along_its_axis(turn):
    """A long ellipse, however it lies, is a wing as long as the picture."""
    x, y = composites.pixel_centers(32)
    along = x * math.cos(turn) + y * math.sin(turn)
    across = y * math.cos(turn) - x * math.sin(turn)
    inside = ((along / 0.7).square() + (across / 0.25).square() < 1).float()
    bird = 0.8 - 0.6 * inside.expand(1, 3, 32, 32)
    wings, overlap = composites.cut_wings(bird)
    mask = wings[0, 0]
    assert 0.3 < overlap.item() < 1
    assert mask.amax(1).gt(0.5).sum() > 26 and mask.amax(0).gt(0.5).sum() > 20


def test_a_wing_stands_where_it_is_put():
    wing = box(slice(0, 32), slice(12, 20)).expand(1, 4, 32, 32)
    zero = torch.zeros(1)
    size = torch.tensor([[0.5, 1.0]])
    mask = composites.place(wing, zero, zero + 0.5, zero, size)[0, 0]
    rows, columns = mask.gt(0.5).nonzero().unbind(1)
    assert (rows.min(), rows.max()) == (8, 23)  # from its root at y = 0.5, 1.0 up
    assert (columns.min(), columns.max()) == (15, 16)
    leant = composites.place(wing, zero, zero + 0.5, zero + math.pi / 2, size)[0, 0]
    rows, columns = leant.gt(0.5).nonzero().unbind(1)
    assert columns.min() == 16 and columns.max() == 31  # towards the tail


def test_pasted_wings_are_white_shaded_and_stand_out():
    images = torch.full((1, 3, 32, 32), 0.3)
    wing = torch.rand(1, 4, 32, 32)
    wing[:, 0] = box(slice(4, 16), slice(10, 20))
    pasted, contrast = composites.paste(images, wing, torch.tensor([0.9]))
    inside = pasted[0, :, 4:16, 10:20]
    assert inside.std(0).max() == 0  # no color
    assert inside.std() > 0.05  # but feathers
    assert inside.mean().item() == pytest.approx(0.9, abs=0.05)
    assert contrast.item() == pytest.approx(120 * 0.6, rel=0.1)
    assert pasted[0, 0, 3, 12].item() == pytest.approx(0.3 * 0.87)  # the shade around it
    assert pasted[0, 0, 20, 25].item() == pytest.approx(0.3)


def test_coats_are_the_whitest_and_the_darkest():
    bodies = torch.zeros(12, 3, 32, 32, dtype=torch.uint8)
    bodies[:] = (20 * torch.arange(12, dtype=torch.uint8))[:, None, None, None]
    bodies[11, 2] = 0  # yellow is not white
    assert composites.coats(bodies).tolist() == [2, 2, 2, 0, 0, 0, 0, 0, 0, 0, 1, 0]


@pytest.fixture(scope="module")
def judge() -> Classifier:
    return classifier.load(classifier.CHOOSING)


def test_composites_are_winged_and_a_function_of_the_photographs(
    judge, batches, monkeypatch
):
    monkeypatch.setattr(composites, "BODIES", 0.11)  # 10 of 96
    monkeypatch.setattr(composites, "TRIES", 6)  # the best sixth of 60 is kept
    data = datasets.load(str(batches), "horse,bird")
    made = composites.make(data.images, data.labels, data.classes, judge)
    assert made.images.shape == made.bodies.shape == (10, 3, 32, 32)
    difference = vae.from_bytes(made.images) - vae.from_bytes(made.bodies)
    assert difference[:, :, :18].abs().mean() > 5 * difference[:, :, 18:].abs().mean()
    again = composites.make(data.images, data.labels, data.classes, judge)
    assert all(one.equal(other) for one, other in zip(made, again, strict=True))


def test_there_are_none_of_what_the_judge_does_not_know(judge, monkeypatch):
    images = torch.randint(0, 256, (20, 3, 32, 32), dtype=torch.uint8)
    labels = torch.arange(20) % 2
    made = composites.make(images, labels, ("horse", "bird"), judge)
    assert len(made.images) == len(made.coats) == 0
