import copy

import vae
from pegasus.drawing import compose, wing_shapes
from pegasus.models.flow_prior import FlowPrior

import pytest
import torch

SKY = torch.tensor([0.8, 0.9, 1.0])
DARK_SKY = torch.tensor([0.05, 0.05, 0.1])
BROWN = torch.tensor([0.4, 0.2, 0.1])
BLUE = torch.tensor(wing_shapes.SKY)
CLASSES = ("horse", "bird")


def scene(color, *boxes):
    """A picture (1, 3, 32, 32) of a color with dark boxes (top, bottom, left, right)."""
    image = color[None, :, None, None].expand(1, 3, 32, 32).clone()
    for top, bottom, left, right in boxes:
        image[..., top:bottom, left:right] = BROWN[:, None, None]
    return image


def horse(down=0, sky=SKY, right=9):
    """Body, legs, a head at the left as far as `right`; the back in row 15 + down."""
    boxes = [(15, 22, 8, 25), (22, 29, 9, 11), (22, 29, 22, 24), (9, 17, 5, right)]
    moved = [(top + down, bottom + down, *sides) for top, bottom, *sides in boxes]
    return scene(sky, *moved)


def light_horse(down=0, color=0.9, background=0.1):
    """A light horse in the dark."""
    is_horse = horse(down) < 0.5
    return torch.where(is_horse, torch.tensor(color), torch.tensor(background))


def bird():
    return scene(SKY, (6, 26, 12, 20))


def close(a, b, atol):
    torch.testing.assert_close(a, b, rtol=0, atol=atol)


def test_a_silhouette_is_what_is_unlike_the_border():
    mask = wing_shapes.silhouettes(scene(SKY, (12, 20, 8, 24)))[0, 0]
    assert mask[14:18, 10:22].min() > 0.8
    assert torch.cat([mask[:9], mask[23:]]).max() < 0.05


@pytest.mark.parametrize(
    "box", [(14, 18, 6, 26), (6, 26, 14, 18)], ids=("lying", "standing")
)
def test_wings_stand_upright_however_the_bird_flies(box):
    """Stretched to one form, so both are nearly the same wing."""
    wing, overlap = wing_shapes.make_wings(scene(SKY, box))
    mask = wing[0, 0]
    assert mask.shape == (32, 32)
    assert 0 < overlap.item() <= 1
    assert mask[16].sum() > 10
    assert mask[:, 16].sum() > 20
    turned = scene(SKY, (box[2], box[3], box[0], box[1]))
    close(mask, wing_shapes.make_wings(turned)[0][0, 0], atol=0.2)


def test_outline_finds_the_back_and_the_head():
    sky, first, back = wing_shapes.outline(horse())
    torch.testing.assert_close(sky[0], SKY)
    assert abs(back.item() - 15) <= 1
    assert first[0, 6] < first[0, 16]
    assert first[0, 30] == wing_shapes.SIZE
    left, right = wing_shapes.head_pixels(horse())[0]
    assert left > right + 5
    left, right = wing_shapes.head_pixels(horse().flip(3))[0]
    assert right > left + 5


def test_a_whole_horse_ranks_before_a_cut_one():
    whole = wing_shapes.body_score(horse())
    assert whole > wing_shapes.body_score(scene(SKY, (15, 32, 0, 32)))
    ground = horse()  # of the coat's color, as where the middle shows nothing else
    ground[..., 29:, :] = ground[..., 20:21, 16:17]
    assert whole > wing_shapes.body_score(ground) + 1
    headless = horse(right=5)
    assert whole > wing_shapes.body_score(headless) + 1
    broad = horse()  # as the picture
    broad[..., 15:22, :] = broad[..., 20:21, 16:17]
    assert whole > wing_shapes.body_score(broad) + 1


def test_a_calm_sky_ranks_before_a_noisy_one():
    noisy = horse()
    generator = torch.Generator().manual_seed(0)
    noisy[:, :, :9] = torch.rand(1, 3, 9, 32, generator=generator)
    assert wing_shapes.sky_score(horse()) > wing_shapes.sky_score(noisy)


@pytest.mark.parametrize("down", [-8, -4, 0])
def test_room_above_the_back_wherever_it_was(down):
    roomy = wing_shapes.make_room(horse(down))
    assert roomy.shape == (1, 3, 32, 32)
    assert abs(wing_shapes.outline(roomy)[2].item() - 15) <= 1
    close(roomy[0, :, 2, 16], SKY, atol=0.01)


def test_skies_turn_blue():
    before = horse()
    after = wing_shapes.paint_sky(before)
    close(after[0, :, 2, 16], BLUE, atol=0.05)
    close(after[0, :, 17:], before[0, :, 17:], atol=0.2)
    before = light_horse()
    after = wing_shapes.paint_sky(before)
    close(after[0, :, 2, 16], BLUE, atol=0.05)
    close(after[0, :, 10:15, 6:8], before[0, :, 10:15, 6:8], atol=0.05)


def test_skies_like_the_coat_stay():
    night = horse(sky=DARK_SKY)
    assert wing_shapes.paint_sky(night).equal(night)
    light = 1 - night
    assert wing_shapes.paint_sky(light).equal(light)


def test_wings_lie_on_the_back_and_leave_the_rest():
    wing, _ = wing_shapes.make_wings(bird())
    before = wing_shapes.paint_sky(horse())
    after, cover = wing_shapes.add_wings(before, wing)
    assert after.min() >= 0
    assert after.max() <= 1
    assert cover[0, 0, :15].sum() > 40
    assert cover[0, 0, 22:].max() == 0
    assert after[..., 22:, :].equal(before[..., 22:, :])
    assert (after - before)[..., 9:17, 5:9].abs().mean() < 0.03  # a rim is there
    assert after[..., 13:, :9].equal(before[..., 13:, :9])
    assert cover[..., 9:17, 5:8].max() == 0
    above = (cover[0, 0, 5] > 0.5).int()
    assert above[0] == 0
    assert above.diff().eq(1).sum() == 2  # two wings, with sky between them
    inside = cover[0, 0] > 0.9
    brightness = [image[0].mean(0)[inside].median() for image in (before, after)]
    assert brightness[1] > brightness[0] + 0.1


def test_the_far_wing_is_behind_the_head_and_the_near_one_before_the_back():
    wing, _ = wing_shapes.make_wings(bird())
    before = wing_shapes.paint_sky(horse(right=14))
    after, cover = wing_shapes.add_wings(before, wing)
    _, free = wing_shapes.add_wings(wing_shapes.paint_sky(horse()), wing)
    assert free[..., 9:14, 11:13].max() > 0.9  # where it is without such a head
    assert cover[..., 9:15, 5:13].max() < 0.1
    close(after[..., 9:15, 5:12], before[..., 9:15, 5:12], atol=0.05)
    assert cover[..., 16, 20:24].max() > 0.9


def test_the_far_wing_is_in_shade_beside_a_light_coat():
    wing, _ = wing_shapes.make_wings(bird())
    dark, dark_cover = wing_shapes.add_wings(wing_shapes.paint_sky(horse()), wing)
    light_coat = wing_shapes.paint_sky(light_horse(color=0.95))
    light, light_cover = wing_shapes.add_wings(light_coat, wing)
    covered = (torch.minimum(dark_cover, light_cover) > 0.95)[0, 0]
    far = covered.clone()
    far[:, 16:] = False
    near = covered.clone()
    near[:, :20] = False
    change = (dark - light)[0].mean(0)
    assert change[far].median() > 0.1
    assert change[near].abs().median() < 0.02


@pytest.mark.parametrize("brightness", [4, -4])
def test_horses_of_the_coat_that_is_wanted_are_preferred(brightness):
    pair = torch.cat([horse(-5), light_horse(-5, color=0.95)])
    horses = pair.repeat(3, 1, 1, 1).flip(3)
    chosen = compose.choose_horses(horses, None, (), 3, brightness)
    assert len(chosen) == 3
    is_light = wing_shapes.coat_color(chosen).mean(1) > 0.6
    assert (is_light == (brightness > 0)).all()
    left, right = wing_shapes.head_pixels(chosen).unbind(1)
    assert (left > right + 5).all()
    back = wing_shapes.outline(chosen)[2]
    assert ((back - 15).abs() <= 1).all()
    close(chosen[:, :, 2, 16], BLUE.expand(3, 3), atol=0.05)


def prepare(model, prior):
    return compose.prepare(model, prior, None, CLASSES, draws=36, horses=3, birds=4)


@pytest.fixture(scope="module")
def trio(small_network):
    """An untrained model, an untrained prior, which moves nothing, and their parts."""
    torch.manual_seed(0)
    model = vae.VAE("conv", "gaussian", (2, 8, 8)).eval()
    prior = FlowPrior(model.latent_shape, 2)
    return model, prior, prepare(model, prior)


def test_parts_are_small_and_always_the_same(trio):
    model, prior, parts = trio
    assert {name: len(z) for name, z in parts.items()} == {
        "any": 3,
        "white": 3,
        "dark": 3,
        "birds": 4,
    }
    for z in parts.values():
        assert z.dtype == torch.float16
        assert z.shape[1] == 128
    again = prepare(model, prior)
    assert all(parts[name].equal(again[name]) for name in parts)


def test_what_are_no_parts_is_refused(trio):
    parts = trio[2]
    compose.check(parts, 128)
    compose.check(None, 128)
    wrong = [
        {},
        {name: z for name, z in parts.items() if name != "dark"},
        parts | {"green": parts["dark"]},
        parts | {"dark": parts["dark"][:0]},
        parts | {"dark": parts["dark"][:, 1:]},
        parts | {"dark": parts["dark"][0]},
    ]
    for damaged in wrong:
        with pytest.raises(ValueError, match="parts of Pegasi"):
            compose.check(damaged, 128)


@pytest.mark.parametrize(("steps", "left"), [(16, 4), (8, 2), (10, 2), (1, 1)])
def test_wings_are_resampled_as_a_bird_all_else_as_a_horse(trio, monkeypatch, steps, left):
    model, prior, _ = trio
    calls = []

    def sample_ode(prior, weights, z, start, steps):
        calls.append((weights, start, steps))
        return z

    monkeypatch.setattr(compose, "sample_ode", sample_ode)
    cover = torch.zeros(1, 1, 32, 32)
    cover[..., :16] = 1
    images = torch.rand(1, 3, 32, 32)
    compose.resample(model, prior, images, cover, compose.noise(model, 1, 0), 3, steps)
    weights, *rest = calls[0]
    assert rest == [compose.START_TIME, left]
    assert list(weights) == [3, 1]
    wing = weights[1].view(2, 8, 8)
    assert wing[..., :4].eq(2).all()
    assert wing[..., 4:].eq(0).all()
    assert (weights[3] + weights[1]).eq(2).all()


@pytest.mark.parametrize("coat", ["any", "white", "dark"])
def test_a_pegasus_is_a_function_of_the_seed_and_its_number(trio, coat):
    z = compose.pegasus(*trio, CLASSES, 9, 5, coat)
    assert z.shape == (9, 128)
    assert z.dtype == torch.float32
    assert z.isfinite().all()
    few = compose.pegasus(*trio, CLASSES, 4, 5, coat)
    close(few, z[:4], atol=0.05)  # bfloat16 inside
    assert (compose.pegasus(*trio, CLASSES, 9, 6, coat) - z).abs().mean() > 0.1
    assert torch.cdist(z, z).fill_diagonal_(9).min() > 0.1


@pytest.mark.parametrize(("coat", "number"), [("any", 0), ("white", 2), ("dark", 3)])
def test_a_pegasus_of_a_coat_is_of_its_parts_and_class(trio, monkeypatch, coat, number):
    calls = []
    make_pegasi = compose.make_pegasi
    monkeypatch.setattr(
        compose, "make_pegasi", lambda *args: calls.append(args) or make_pegasi(*args)
    )
    compose.pegasus(*trio, CLASSES, 3, 5, coat, 8)
    _, _, horses, birds, _, class_number, steps = calls[0]
    assert (class_number, steps) == (number, 8)
    parts = trio[2]
    for rows, table in ((horses, parts[coat]), (birds, parts["birds"])):
        assert (rows[:, None] == table.float()).all(2).any(1).all()


def test_who_is_mirrored_has_nothing_to_do_with_the_noise(trio, monkeypatch):
    calls = []
    paste_wings = compose.paste_wings
    resample = compose.resample
    monkeypatch.setattr(
        compose,
        "paste_wings",
        lambda *args: calls.append(args[2]) or paste_wings(*args),
    )
    monkeypatch.setattr(
        compose, "resample", lambda *args: calls.append(args[4]) or resample(*args)
    )
    compose.pegasus(*trio, CLASSES, 64, 0)
    mirrored, eps = calls
    assert 20 < mirrored.sum() < 44
    for normals in (eps.start, eps.posterior):
        assert normals.shape == (64, 128)
        agreement = (normals.sign() * (2 * mirrored[:, None] - 1.0)).mean(0)
        assert agreement.abs().max() < 0.6  # 1 where one decides the other


def test_the_random_numbers_of_pegasi_are_independent(trio):
    """A row's are a function of the seed and its number."""
    model = trio[0]
    eps = compose.noise(model, 1000, 3)
    few = compose.noise(model, 7, 3)
    some = eps.rows(torch.tensor([4, 1]))
    other = compose.noise(model, 1000, 4)
    for k, numbers in enumerate(eps):
        assert few[k].equal(numbers[:7])
        assert some[k].equal(numbers[[4, 1]])
        assert not other[k].equal(numbers)
    both = torch.cat([eps.start, eps.posterior], 1)
    assert both.shape == (1000, 256)
    close(both.mean(0), torch.zeros(256), atol=0.2)
    close(both.std(0), torch.ones(256), atol=0.15)
    whole = torch.cat([both, eps.mirrored[:, None]], 1)
    close(whole.T.corrcoef(), torch.eye(257), atol=0.25)


@pytest.fixture(scope="module")
def measured(trio):
    """The model, with posteriors of many widths, and its prior, which knows of them."""
    model, prior, _ = copy.deepcopy(trio)
    torch.nn.init.uniform_(model.encoder[-1].bias, -3, 3)
    prior.mean.copy_(torch.linspace(-1, 2, 128))
    prior.std.copy_(torch.linspace(1, 3, 128))
    return model, prior


def posterior(model, prior, images):
    """Mean and deviation of the images' normalized latents, (n, 128) each."""
    with torch.no_grad():
        mu, logvar = model.encode(images)
    return (mu - prior.mean) / prior.std, (logvar / 2).exp() / prior.std


def test_sampled_latents_are_of_the_posterior(measured):
    """Of one image for all rows."""
    generator = torch.Generator().manual_seed(0)
    eps = torch.randn(4000, 128, generator=generator)
    image = torch.rand(1, 3, 32, 32, generator=generator)
    z = compose.encode_sample(*measured, image, eps)
    mean, std = posterior(*measured, image)
    assert z.shape == (4000, 128)
    close((z.mean(0) - mean[0]) / std[0], torch.zeros(128), atol=0.08)
    close(z.std(0) / std[0], torch.ones(128), atol=0.06)


def test_a_sampled_latent_is_a_function_of_its_image_and_noise(measured):
    images = torch.rand(3, 3, 32, 32)
    eps = torch.randn(3, 128)
    z = compose.encode_sample(*measured, images, eps)
    mean, std = posterior(*measured, images)
    close(z, mean + std * eps, atol=0.05)  # bfloat16 inside
    changed = eps.clone()
    changed[1] = -eps[1]
    again = compose.encode_sample(*measured, images, changed)
    assert again[[0, 2]].equal(z[[0, 2]])
    close(again[1], mean[1] - std[1] * eps[1], atol=0.05)
    means = compose.encode_sample(*measured, images, torch.zeros(3, 128))
    close(means, compose.encode(*measured, images), atol=0.05)


def test_wings_are_resampled_from_samples_of_the_posterior(measured, monkeypatch):
    """A mean is a latent like none that the prior was trained on."""
    model, prior = measured
    monkeypatch.setattr(compose, "sample_ode", lambda prior, weights, z, *_: z)
    images = torch.rand(5, 3, 32, 32)
    eps = compose.noise(model, 5, 3)
    z = compose.resample(model, prior, images, images[:, :1], eps, 0)
    mean, std = posterior(model, prior, images)
    wanted = 0.2 * eps.start + 0.8 * (mean + std * eps.posterior)
    close(z, wanted, atol=0.05)
    assert (z - (0.2 * eps.start + 0.8 * mean)).abs().mean() > 0.1


def test_a_horse_of_ones_own_is_every_pegasus_horse(trio):
    """Whichever way it looks.

    By the untrained prior, which keeps the noise, rows differ by noise and wings alone.
    """
    def pegasus(n=5, photo=None):
        return compose.pegasus(*trio, CLASSES, n, 5, photo=photo)

    z = pegasus(photo=horse())
    close(pegasus(photo=horse().flip(3)), z, atol=0.01)
    assert (pegasus(photo=horse(sky=DARK_SKY)) - z).abs().max() > 0.02
    assert (pegasus() - z).abs().max() > 0.02
    close(pegasus(2, horse()), z[:2], atol=0.05)


@pytest.fixture(params=[False, True], ids=("autoencoder", "prior"))
def preview(request, trio, monkeypatch):
    """A preview of a few photographs, and the images and masks it was made of."""
    model, prior, _ = trio
    horses = [horse(down) for down in (-2, -1, 0, 1)]
    photographs = (torch.cat([*horses, *[bird()] * 3]) * 255).byte()
    labels = torch.tensor([0] * 4 + [1] * 3)
    pasted = []
    paste_wings = compose.paste_wings

    def watched(*args):
        pasted.append(paste_wings(*args))
        return pasted[0]

    monkeypatch.setattr(compose, "paste_wings", watched)
    used = prior if request.param else None
    return used, compose.preview(model, used, photographs, labels, 6), pasted[0]


def test_a_preview_joins_photographs_and_shows_them_as_the_model_does(trio, preview):
    """Of so few that some come twice; before the prior it is their reconstruction."""
    prior, shown, (images, cover) = preview
    assert shown.shape == (6, 3, 32, 32)
    assert shown.min() >= 0
    assert shown.max() <= 1
    assert cover.flatten(1).sum(1).min() > 40  # each has wings
    with torch.no_grad():
        rebuilt = trio[0].reconstruct(images)
    if prior is None:
        assert shown.equal(rebuilt)
    else:
        assert (shown - rebuilt).abs().max() > 1e-3  # the noise is in it


def test_each_row_is_taken_once_before_any_comes_again():
    table = torch.arange(50)
    rows = compose.cycle_rows(table, 100, 3, 1)
    assert rows[:50].sort().values.equal(table)
    assert rows[50:].sort().values.equal(table)
    assert not rows[:50].equal(rows[50:])
    assert compose.cycle_rows(table, 70, 3, 1).equal(rows[:70])
    assert not compose.cycle_rows(table, 100, 4, 1).equal(rows)


def test_chunks_hold_every_row_once_and_show_how_far_they_are(monkeypatch):
    lines = []
    monkeypatch.setattr(compose.cli, "show", lines.append)
    rows = torch.cat(list(compose.chunks(130, "bird")))
    assert rows.equal(torch.arange(130))
    assert lines == [
        "bird: 0 of 130 sampled",
        "bird: 64 of 130 sampled",
        "bird: 128 of 130 sampled",
        "",
    ]
