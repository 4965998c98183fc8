"""Horses, birds and airplanes drawn by this file itself, for a machine that has no photographs and reaches no network.

Picture i of a split depends on (seed, split, i) alone. From the folder of this file:

    python -c "import drawn, pathlib; drawn.write(pathlib.Path('drawn-batches'), train=500, test=100)"
    python -c "import drawn, numpy; drawn.draw('horse', numpy.random.default_rng(1)).save('horse.png')"
"""
import tempfile
from pathlib import Path

import options
import cifar10
from options import Fault

import numpy as np
from PIL import Image, ImageDraw

SIDE, FINE = 32, 4  # pixels of a picture's side; how many times finer a figure is painted
FILES = [*cifar10.TRAIN, *cifar10.TEST]
SHARES = ("horse", "horse", "bird", "bird", "airplane")  # what every five pictures hold, each five in their own order
# Poses are parted by "|": setting, least and greatest turn in degrees, least and greatest stretch of stride or of wing
# beat; then the tubes that make up the figure, from back to front: role, two to four knots of x, y, half width. A role
# is a colour, or kind.colour: parts of a kind are painted together, "far" ones darker.
TRUNK = "accent -50 -10 4 -57 -2 6 -62 14 6 -63 37 2; coat -34 0 20 -10 -1 16 13 1 20 33 0 19"
UPRIGHT = TRUNK + """; coat 33 0 19 42 -17 14 54 -32 11 70 -44 8; coat 70 -44 8 78 -35 10 87 -25 6 94 -16 5;
    coat 75 -45 4 82 -56 1; mane.accent 19 -7 5 33 -24 7 49 -40 6 66 -50 4; eye 79 -40 2 81 -37 2"""
TEXTS = {"horse": f"""
    land -3 3 0.8 1.2; far.leg 33 0 11 40 35 5 41 61 3 45 71 4; far.leg -34 0 17 -32 43 5 -26 73 3 -22 81 5;
    coat.leg 33 0 11 30 36 5 28 62 3 32 71 4; coat.leg -34 0 17 -50 40 5 -48 71 3 -45 79 5; {UPRIGHT} |
    land -5 4 0.7 1.3; far.leg 33 0 11 50 32 5 56 57 3 62 65 4; far.leg -34 0 17 -58 36 5 -66 66 3 -66 75 5;
    coat.leg 33 0 11 24 35 5 12 58 3 8 67 4; coat.leg -34 0 17 -27 42 5 -19 72 3 -15 80 5; {UPRIGHT} |
    land -10 4 0.7 1; far.leg 33 -4 11 65 13 5 84 31 3 92 37 4; far.leg -34 0 17 -53 39 5 -79 56 3 -85 62 5;
    coat.leg 33 -4 11 64 14 5 46 33 3 36 35 4; coat.leg -34 0 17 -67 28 5 -87 51 3 -93 58 5; {UPRIGHT} |
    land 20 32 0.8 1.1; far.leg 33 2 11 62 23 5 42 39 3 32 40 4; far.leg -34 0 17 -62 33 5 -66 62 3 -66 70 5;
    coat.leg 33 2 11 51 33 5 26 40 3 16 37 4; coat.leg -34 0 17 -70 18 5 -84 44 3 -86 52 5; {UPRIGHT} |
    land -3 3 0.8 1.3; far.leg 33 5 11 43 39 5 46 65 3 50 74 4; far.leg -34 0 17 -49 40 5 -45 71 3 -42 80 5;
    coat.leg 33 5 11 25 40 5 22 66 3 24 75 4; coat.leg -34 0 17 -32 43 5 -27 74 3 -23 82 5; {TRUNK};
    coat 33 0 19 51 10 14 66 23 11 79 39 8; coat 79 39 8 85 49 10 91 62 6 95 72 5; coat 83 38 4 92 30 1;
    mane.accent 37 -10 5 58 1 7 73 17 6 84 34 4; eye 86 45 2 87 47 2""", "bird": """
    leaf -10 10 1 1; branch -160 66 5 160 52 6; shin 2 22 3 3 40 2 4 50 2 8 55 3; coat -22 20 10 -58 56 7;
    coat -24 18 12 -8 8 22 10 -6 23 18 -24 16; accent -4 24 9 8 16 14 18 4 14 22 -10 8; head 15 -30 16 24 -35 13;
    bill 35 -35 5 52 -32 1; wing 6 -10 10 -6 4 15 -22 20 10 -40 38 3; eye 26 -39 3 27 -39 3 |
    sky -24 24 .5 1; far.wing 16 -6 12 18 -38 13 -8 -72 2; coat -64 9 7 -30 4 7 0 0 17 26 -6 11; bill 42 -9 5 57 -6 1;
    head 27 -9 12 36 -10 9; accent -14 8 7 26 -1 7; eye 35 -13 2 37 -12 2; wing 4 -4 14 -4 -26 16 -18 -50 13 -44 -70 2 |
    sky -90 90 0.3 1.5; bill 0 -37 4 0 -48 1; head 0 -21 9 0 -31 8; wing -6 -4 12 -30 -16 14 -54 -14 11 -84 4 2;
    wing 6 -4 12 30 -16 14 54 -14 11 84 4 2; coat 0 44 13 0 12 8 0 -18 12; accent 0 18 4 0 -12 7""", "airplane": """
    sky -24 24 0.6 1.2; far.wing 4 -6 9 -20 -34 3; accent -50 -4 10 -69 -33 4; coat -66 -3 4 -34 0 10 26 0 11 62 3 8;
    glass 52 -3 3 61 0 2; on.accent -54 1 2 50 3 3; wing 6 6 11 -42 40 3; engine -4 19 6 9 19 6; wing -54 -2 6 -72 9 2 |
    sky -180 180 0.9 1.1; wing 6 -6 11 -38 -66 3; wing 6 6 11 -38 66 3; engine -8 -28 5 7 -28 4; engine -8 28 5 7 28 4;
    accent -54 -3 6 -70 -26 2; accent -54 3 6 -70 26 2; coat -68 0 3 -34 0 9 30 0 10 64 0 5; glass 54 0 4 61 0 3"""}
# Three hexadecimal digits a colour. Figures: coat; mane, belly or fin; lower legs, bill or glass. Scenery: far, near.
PALETTES = {
    "horse": "ddcccbba9 aaa777555 742111111 853742ddd 333111111 c95edcedd b96332332 532211111",
    "bird": "754cb9332 eedffeea3 223334da4 57adde333 a32c97d93 ca4ed8443 677cccc93 334edde83 986dca432",
    "airplane": "eee35a234 eedb33234 aab788234 c33eed234 db3235234 675564234 555445223 effe93234",
    "sky": "48cbde 7beeef 26b8ad bccede 89abcc 76afb8 9abddd", "leaf": "563895 9a7bc9 343564 976ba7 9a9ccc 332443",
    "land": "8a4684 ab6894 cb8a96 a86864 9a5ba6 ba9887"}
FIXED = {"eye": (21, 17, 14), "shin": (79, 64, 53), "branch": (106, 82, 56), "engine": (92, 99, 109)}
TONES = np.array([[1, 0, 0.72], [0.84, 0.14, 1], [0.5, 0.4, 1.2]])  # width, rise, light: a lit back, a dark belly


def _between(samples, knots):
    """Weights (samples, knots) of linear interpolation between evenly spaced knots."""
    return np.clip(1 - abs(np.linspace(0, knots - 1, samples)[:, None] - np.arange(knots)), 0, 1)


def _pose(text):
    """Setting, four limits, roles (parts,), and tubes (parts, 4, 3): x, y, half width at four even knots."""
    (setting, *limits), *parts = (part.split() for part in text.split(";"))
    tubes = np.array([_between(4, len(part) // 3) @ np.array(part[1:], float).reshape(-1, 3) for part in parts])
    return setting, np.array(limits, float), [part[0] for part in parts], tubes


POSES = {label: [_pose(text) for text in texts.split("|")] for label, texts in TEXTS.items()}
COLOURS = {name: np.array([17.0 * int(digit, 16) for digit in text if digit != " "]) for name, text in PALETTES.items()}
COLOURS = {name: digits.reshape(-1, 3 if name in SHARES else 2, 3) for name, digits in COLOURS.items()}
# Ten samples of a tube, each a mean of five so that joints bend and do not break; two more at each end round it off.
_BENT, _ENDED = _between(50, 4).reshape(10, 5, 4).mean(1), [0, 0, *range(10), 9, 9]
_CURVE, _SLOPE = _BENT[_ENDED], np.gradient(_BENT, axis=0)[_ENDED]
_REACH, _NARROW = np.array([[-1, -0.7, *[0] * 10, 0.7, 1], [0.3, 0.75, *[1] * 10, 0.75, 0.3]])[..., None]
_ROWS, _NOISE = np.arange(SIDE)[:, None, None], {cells: _between(SIDE, cells) for cells in (5, 12)}


def _figure(rng, label):
    """A pose of a class, varied, turned and placed: setting, roles, tubes (parts, 4, 3) in fine pixels."""
    setting, (*turns, least, most), roles, tubes = POSES[label][rng.integers(len(POSES[label]))]
    tubes = tubes + rng.normal(0, 0.7, tubes.shape) * [1, 1, 0]
    limbs, axis = [part for part, role in enumerate(roles) if role.endswith(("wing", ".leg"))], int(label != "horse")
    stretch = rng.uniform(least, most) * (-1 if (label, setting) == ("bird", "sky") and rng.random() < 0.3 else 1)
    tubes[limbs, :, axis] += (stretch - 1) * (tubes[limbs, :, axis] - tubes[limbs, :1, axis])
    turn = np.radians(rng.uniform(*turns))
    tubes[..., :2] @= np.array([[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]])
    solid = tubes[[role != "branch" for role in roles]]
    low, high = (solid[..., :2] - solid[..., 2:]).min((0, 1)), (solid[..., :2] + solid[..., 2:]).max((0, 1))
    scale = rng.uniform(0.84, 1.08) * SIDE * FINE / (high - low).max()
    room = np.clip(SIDE * FINE - (high - low) * scale, 6, 30) * rng.uniform(-0.4, 0.4, 2)
    tubes = (tubes - [*(low + high) / 2, 0]) * scale + [*(SIDE * FINE / 2 + room), 0]
    return setting, roles, tubes if rng.random() < 0.5 else tubes * [-1, 1, 1] + [SIDE * FINE, 0, 0]


def _paint(roles, tubes, colours):
    """The figure on a transparent ground, float (32, 32, 4), 0 to 255."""
    toned = np.array([tubes * [1, 1, width] - tubes[..., 2:] * [0, rise, 0] for width, rise, _ in TONES])
    curve, along = _CURVE @ toned, _SLOPE @ toned[..., :2]
    along *= curve[..., 2:] / (np.hypot(along[..., :1], along[..., 1:]) + 1e-6)
    middle, across = curve[..., :2] + along * _REACH, along[..., ::-1] * [-1, 1] * _NARROW
    outlines = np.concatenate([middle + across, (middle - across)[..., ::-1, :]], 2).reshape(3, len(roles), -1).tolist()
    kinds, names = [role.split(".")[0] for role in roles], [role.split(".")[-1] for role in roles]
    coats = np.array([[colours[name], colours.get(f"{name}.tip", colours[name])] for name in names])
    coats *= np.array([0.62 if kind == "far" else 1 for kind in kinds])[:, None, None]
    fills, wide = np.clip(coats * TONES[:, 2, None, None, None], 0, 255).astype(int).tolist(), tubes[..., 2].max(1) > 4
    pen = ImageDraw.Draw(image := Image.new("RGBA", (SIDE * FINE, SIDE * FINE)))
    # Parts of a kind take each tone together, so that no dark seam parts a neck from its trunk.
    for _, tone, part in sorted((kinds.index(own), tone, part) for part, own in enumerate(kinds) for tone in range(3)):
        if tone == 1 or wide[part]:
            pen.polygon(outlines[tone][part], tuple(fills[tone][part][0]))
            pen.polygon(outlines[tone][part][18:38], tuple(fills[tone][part][1]))
    return np.asarray(image.reduce(FINE), float)


def _landscape(rng, setting, foot):
    """A background, float (32, 32, 3), about 0 to 255; foot: the row of the figure's lowest knot."""
    def cloudy(across, down):
        return (_NOISE[down] @ rng.normal(0, 1, (down, across)) @ _NOISE[across].T)[..., None]

    def fade(name, first=0):
        top, bottom = COLOURS[name][rng.integers(len(COLOURS[name]))] * rng.uniform(0.75, 1.08) + rng.normal(0, 5, 3)
        return top + (bottom - top) * np.clip((_ROWS - first) / (SIDE - first), 0, 1)

    view = fade("leaf" if setting == "leaf" and rng.random() < 0.8 else "sky") + cloudy(5, 5) * rng.uniform(4, 24)
    if setting == "land":
        below = _ROWS - rng.uniform(2, max(3, foot - 3)) - cloudy(5, 5)[:1] * rng.uniform(0, 1.2)
        trees = np.clip(below + rng.uniform(-4, 7) + cloudy(12, 5)[:1] * 1.2, 0, 1)
        view += (fade("leaf") * 0.75 + cloudy(12, 12) * 10 - view) * trees
        ground = fade("land", foot / 3) + cloudy(5, 12) * 7 + rng.normal(0, 5, (SIDE, SIDE, 1))
        view += (ground - view) * np.clip(below, 0, 1)
    return view


def draw(label: str, rng: np.random.Generator) -> Image.Image:
    """One 32x32 RGB picture of a "horse", "bird" or "airplane"; KeyError for another label."""
    setting, roles, tubes = _figure(rng, label)
    coat, accent, low = COLOURS[label][rng.integers(len(COLOURS[label]))] * rng.uniform(0.8, 1.1) + rng.normal(0, 4, 3)
    colours = FIXED | {"coat": coat, "accent": accent, "leg": coat, "leg.tip": low, "bill": low, "glass": low}
    colours |= {"head": (coat, coat * 0.7, accent)[rng.integers(3)], "wing": coat * 0.82, "wing.tip": coat * 0.5}
    figure, view = _paint(roles, tubes, colours), _landscape(rng, setting, tubes[..., 1].max() / FINE)
    view += (figure[..., :3] - view) * (figure[..., 3:] / 255)
    view = (view - 120) * rng.uniform(0.9, 1.2) + rng.normal(118, 12) + rng.normal(0, rng.uniform(1, 5), view.shape)
    return Image.fromarray(view.clip(0, 255).astype(np.uint8))


def _picture(seed, split, index):
    label = SHARES[np.random.default_rng([seed, split, index // 5, 1]).permutation(5)[index % 5]]
    return cifar10.CLASSES.index(label), np.asarray(draw(label, np.random.default_rng([seed, split, index])))


def write(folder: Path, train: int = 10_000, test: int = 2_000, seed: int = 0) -> None:
    """Fill `folder`, whole or not at all, with CIFAR-10's five training batches and its test batch of drawn pictures.

    `train` is 5 or more, `test` 1 or more; raises Fault if the folder holds anything.
    """
    folder = Path(folder).resolve()
    if folder.exists() and next(folder.iterdir(), None):
        raise Fault(f"{folder} is not empty; move it or name another folder")
    folder.parent.mkdir(parents=True, exist_ok=True)
    spans = [range(part * (train // 5), train if part == 4 else (part + 1) * (train // 5)) for part in range(5)]
    with (options.writing(folder, "choose another place"),
          tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as workshop):
        (fresh := Path(workshop, "fresh")).mkdir()
        for done, (name, span) in enumerate(zip(FILES, [*spans, range(test)], strict=True), 1):
            labels, pictures = zip(*(_picture(seed, done // 6, index) for index in span), strict=True)
            cifar10.write(fresh / name, np.stack(pictures).transpose(0, 3, 1, 2), np.array(labels))
            options.show(f"drawn: {done} of 6 files", done == 6)
        fresh.rename(folder)
