import collage
import compose
import prior
import vae

import pytest
import torch

SKY = torch.tensor([0.8, 0.9, 1.0])


def scene(color, *boxes):
    """A picture (1, 3, 32, 32) of one color with dark boxes, each (top, bottom, left, right)."""
    image = torch.as_tensor(color)[None, :, None, None].expand(1, 3, 32, 32).clone()
    for top, bottom, left, right in boxes:
        image[..., top:bottom, left:right] = torch.tensor([0.4, 0.2, 0.1])[:, None, None]
    return image


def horse(down=0, sky=SKY, right=9):
    """Body, two legs, a head at the left, as far as column `right`; the back in row 15 + down."""
    return scene(sky, *((t + down, b + down, *sides) for t, b, *sides in (
        (15, 22, 8, 25), (22, 29, 9, 11), (22, 29, 22, 24), (9, 17, 5, right))))


def test_a_silhouette_is_what_is_unlike_the_border():
    mask = collage.silhouettes(scene(SKY, (12, 20, 8, 24)))[0, 0]
    assert mask[14:18, 10:22].min() > 0.8
    assert torch.cat([mask[:9], mask[23:]]).max() < 0.05


@pytest.mark.parametrize("box", [(14, 18, 6, 26), (6, 26, 14, 18)], ids=("lying", "standing"))
def test_wings_stand_upright_however_the_bird_flies(box):
    """Stretched to one form, so both are nearly the same wing."""
    wing, like = collage.wings(scene(SKY, box))
    mask = wing[0, 0]
    assert mask.shape == (32, 32) and 0 < like.item() <= 1
    assert mask[16].sum() > 10 and mask[:, 16].sum() > 20
    other = collage.wings(scene(SKY, (box[2], box[3], box[0], box[1])))[0][0, 0]
    torch.testing.assert_close(mask, other, rtol=0, atol=0.2)


def test_outline_finds_the_back_and_the_head():
    sky, first, back = collage.outline(horse())
    torch.testing.assert_close(sky[0], SKY)
    assert abs(back.item() - 15) <= 1
    assert first[0, 6] < first[0, 16] and first[0, 30] == collage.SIZE
    left, right = collage.raised(horse())[0]
    assert left > right + 5
    assert torch.equal(collage.raised(horse().flip(3))[0].argmax(), torch.tensor(1))


def test_a_whole_horse_on_a_calm_sky_ranks_before_a_cut_one():
    cut = scene(SKY, (15, 32, 0, 32))
    assert collage.whole(horse()) > collage.whole(cut)
    ground = horse()  # of the coat's color, as where a picture's middle shows nothing else
    ground[..., 29:, :] = ground[..., 20:21, 16:17]
    assert collage.whole(horse()) > collage.whole(ground) + 1
    assert collage.whole(horse()) > collage.whole(horse(right=5)) + 1  # without a head
    between = horse()
    between[..., 15:22, :] = between[..., 20:21, 16:17]  # as broad as the picture
    assert collage.whole(horse()) > collage.whole(between) + 1
    noisy = horse()
    noisy[:, :, :9] = torch.rand(1, 3, 9, 32, generator=torch.Generator().manual_seed(0))
    assert collage.calm(horse()) > collage.calm(noisy)


@pytest.mark.parametrize("down", [-8, -4, 0])
def test_room_above_the_back_wherever_it_was(down):
    roomy = collage.with_room(horse(down))
    assert roomy.shape == (1, 3, 32, 32)
    assert abs(collage.outline(roomy)[2].item() - 15) <= 1
    torch.testing.assert_close(roomy[0, :, 2, 16], SKY, rtol=0, atol=0.01)


def test_skies_turn_blue_but_those_like_the_coat_stay():
    before, after = horse(), collage.blue(horse())
    torch.testing.assert_close(after[0, :, 2, 16], torch.tensor(collage.SKY), rtol=0, atol=0.05)
    torch.testing.assert_close(after[0, :, 17:], before[0, :, 17:], rtol=0, atol=0.2)
    night = horse(sky=[0.05, 0.05, 0.1])
    assert torch.equal(collage.blue(night), night)
    light = collage.blue(1 - night)
    assert torch.equal(light, 1 - night)
    before_dark = torch.where(horse() < 0.5, torch.tensor(0.9), torch.tensor(0.1))  # a light horse in the dark
    after = collage.blue(before_dark)
    torch.testing.assert_close(after[0, :, 2, 16], torch.tensor(collage.SKY), rtol=0, atol=0.05)
    torch.testing.assert_close(after[0, :, 10:15, 6:8], before_dark[0, :, 10:15, 6:8], rtol=0, atol=0.05)


def test_wings_lie_on_the_back_and_leave_the_rest():
    wing, _ = collage.wings(scene(SKY, (6, 26, 12, 20)))
    before = collage.blue(horse())
    after, cover = collage.winged(before, wing)
    assert after.min() >= 0 and after.max() <= 1
    assert cover[0, 0, :15].sum() > 40 and cover[0, 0, 22:].max() == 0
    assert torch.equal(after[..., 22:, :], before[..., 22:, :])
    assert (after - before)[..., 9:17, 5:9].abs().mean() < 0.03  # the head, which a wing's rim touches
    assert torch.equal(after[..., 13:, :9], before[..., 13:, :9]) and cover[..., 9:17, 5:8].max() == 0
    above = (cover[0, 0, 5] > 0.5).int()
    assert above.diff().eq(1).sum() == 2 and above[0] == 0  # two wings, with sky between them
    there = cover[0, 0] > 0.9
    assert after[0].mean(0)[there].median() > before[0].mean(0)[there].median() + 0.1


def test_the_far_wing_is_behind_the_head_and_the_near_one_before_the_back():
    wing, _ = collage.wings(scene(SKY, (6, 26, 12, 20)))
    before = collage.blue(horse(right=14))
    after, cover = collage.winged(before, wing)
    assert collage.winged(collage.blue(horse()), wing)[1][..., 9:14, 11:13].max() > 0.9  # where it would be
    assert cover[..., 9:15, 5:13].max() < 0.1
    torch.testing.assert_close(after[..., 9:15, 5:12], before[..., 9:15, 5:12], rtol=0, atol=0.05)
    assert cover[..., 16, 20:24].max() > 0.9


def test_the_far_wing_is_in_shade_beside_a_light_coat():
    wing, _ = collage.wings(scene(SKY, (6, 26, 12, 20)))
    light = torch.where(horse() < 0.5, torch.tensor(0.95), torch.tensor(0.1))
    (dark, cover), (white, other) = (collage.winged(collage.blue(horses), wing) for horses in (horse(), light))
    there = (torch.minimum(cover, other) > 0.95)[0, 0]
    far, near = there.clone(), there.clone()
    far[:, 16:], near[:, :20] = False, False
    change = (dark - white)[0].mean(0)
    assert change[far].median() > 0.1 and change[near].abs().median() < 0.02


@pytest.mark.parametrize("light", [4, -4])
def test_mounts_prefer_the_coat_that_is_wanted(light):
    brown, white = horse(-5), torch.where(horse(-5) < 0.5, torch.tensor(0.95), torch.tensor(0.1))
    chosen = compose.mounts(torch.cat([brown, white] * 3).flip(3), None, (), 3, light)
    assert len(chosen) == 3 and ((collage.coat(chosen).mean(1) > 0.6) == (light > 0)).all()
    left, right = collage.raised(chosen).unbind(1)
    assert (left > right + 5).all() and ((collage.outline(chosen)[2] - 15).abs() <= 1).all()
    torch.testing.assert_close(chosen[:, :, 2, 16], torch.tensor(collage.SKY).expand(3, 3), rtol=0, atol=0.05)


@pytest.fixture(scope="module")
def parts(small_network):
    """An untrained model and prior, which moves nothing, and their bank."""
    torch.manual_seed(0)
    model = vae.VAE("conv", "gaussian", "8x8x2").eval()
    learned = prior.Learned(model.shape, 2)
    return model, learned, compose.prepare(model, learned, None, ("horse", "bird"), draws=36, horses=3, birds=4)


def test_the_bank_is_small_and_always_the_same(parts):
    model, learned, bank = parts
    assert {name: len(z) for name, z in bank.items()} == {"any": 3, "white": 3, "dark": 3, "birds": 4}
    assert all(z.dtype == torch.float16 and z.shape[1] == 128 for z in bank.values())
    again = compose.prepare(model, learned, None, ("horse", "bird"), draws=36, horses=3, birds=4)
    assert all(torch.equal(bank[name], again[name]) for name in bank)


def test_wings_are_drawn_as_a_birds_and_all_else_as_a_horse(parts, monkeypatch):
    model, learned, _ = parts
    given, cover = [], torch.zeros(1, 1, 32, 32)
    cover[..., :16] = 1
    monkeypatch.setattr(prior, "follow", lambda _, weights, z, *rest: given.append((weights, rest)) or z)
    for steps, left in ((16, 4), (8, 2), (10, 2), (1, 1)):
        compose.redrawn(model, learned, torch.rand(1, 3, 32, 32), cover, torch.zeros(1, 128), 3, steps)
        assert given[-1][1] == (compose.START, left)
    (kind, horse_), (bird, wings) = given[0][0].items()
    assert (kind, bird) == (3, 1)
    assert wings.view(2, 8, 8)[..., :4].eq(2).all() and wings.view(2, 8, 8)[..., 4:].eq(0).all()
    assert (horse_ + wings).eq(2).all()


@pytest.mark.parametrize("first", [0, 2, 3])
def test_a_pegasus_is_a_function_of_the_seed_and_its_number(parts, first):
    z = compose.pegasus(*parts, 9, 5, first)
    assert z.shape == (9, 128) and z.dtype == torch.float32 and torch.isfinite(z).all()
    torch.testing.assert_close(compose.pegasus(*parts, 4, 5, first), z[:4], rtol=0, atol=0.05)  # bfloat16 inside
    assert (compose.pegasus(*parts, 9, 6, first) - z).abs().mean() > 0.1
    assert torch.cdist(z, z).fill_diagonal_(9).min() > 0.1


def test_who_is_mirrored_has_nothing_to_do_with_the_noise(parts, monkeypatch):
    model, learned, bank = parts
    seen, joined, redrawn = [], compose.joined, compose.redrawn
    monkeypatch.setattr(compose, "joined", lambda *args: seen.append(args[2]) or joined(*args))
    monkeypatch.setattr(compose, "redrawn", lambda *args: seen.append(args[4]) or redrawn(*args))
    compose.pegasus(model, learned, bank, 64, 0)
    mirrored, eps = seen
    assert eps.shape == (64, 128) and 20 < mirrored.sum() < 44
    assert (eps.sign() * (2 * mirrored[:, None] - 1.0)).mean(0).abs().max() < 0.6  # 1 where one decides the other


def test_a_horse_of_ones_own_is_every_pegasus_horse(parts):
    """Whichever way it looks; by the untrained prior, which keeps the noise, rows differ by noise and wings alone."""
    z = compose.pegasus(*parts, 5, 5, photo=horse())
    torch.testing.assert_close(compose.pegasus(*parts, 5, 5, photo=horse().flip(3)), z, rtol=0, atol=0.01)
    assert (compose.pegasus(*parts, 5, 5, photo=horse(sky=[0.05, 0.05, 0.1])) - z).abs().max() > 0.02
    assert (compose.pegasus(*parts, 5, 5) - z).abs().max() > 0.02
    torch.testing.assert_close(compose.pegasus(*parts, 2, 5, photo=horse()), z[:2], rtol=0, atol=0.05)


@pytest.mark.parametrize("wanted", [None, prior.Learned((2, 8, 8), 2)], ids=("autoencoder", "prior"))
def test_a_preview_joins_pictures_and_shows_them_as_the_model_does(parts, wanted, monkeypatch):
    """Of so few that some come twice; before the prior it is their reconstruction."""
    model, images = parts[0], torch.cat([horse(d) for d in (-2, -1, 0, 1)] + [scene(SKY, (6, 26, 12, 20))] * 3)
    joined, seen = compose.joined, []
    monkeypatch.setattr(compose, "joined", lambda *args: seen.append(joined(*args)) or seen[0])
    shown = compose.preview(model, wanted, (images * 255).byte(), torch.tensor([0] * 4 + [1] * 3), 6)
    assert shown.shape == (6, 3, 32, 32) and shown.min() >= 0 and shown.max() <= 1
    assert seen[0][1].flatten(1).sum(1).min() > 40  # each has wings
    with torch.no_grad():
        rebuilt = model.reconstruct(seen[0][0])
    assert (shown - rebuilt).abs().max() > 1e-3 if wanted else shown.equal(rebuilt)  # the noise is in it


def test_each_part_is_taken_once_before_any_comes_again():
    of = torch.arange(50)
    rows = compose.order(of, 100, 3, 1)
    assert rows[:50].sort().values.tolist() == rows[50:].sort().values.tolist() == of.tolist()
    assert not torch.equal(rows[:50], rows[50:])
    assert torch.equal(compose.order(of, 70, 3, 1), rows[:70])
    assert not torch.equal(compose.order(of, 100, 4, 1), rows)
