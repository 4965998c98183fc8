"""Draw horses, birds and airplanes for a machine without photographs or network.

    python -c "from pegasus.data import synthetic; synthetic.write('set', 500, 100)"

makes a folder `set` of CIFAR-10's six batch files with 500 pictures to train on and
100 to test. Picture i of a split depends on (seed, split, i) alone.

A figure is a list of tubes, from back to front. A tube has four knots of x, y and
half width; its outline is painted three times, lit on its back and dark below.
"""
import functools
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pegasus import streams
from pegasus.cli import UserError
from pegasus.data import cifar10
from pegasus.files import writing

import numpy as np
from PIL import Image, ImageColor, ImageDraw

SIDE = 32  # pixels of a picture's side, unless another is asked for
FINE = 4  # a figure is painted so many times finer
CANVAS = SIDE * FINE  # fine pixels of a picture of 32
# What every five pictures hold, each five in an order of their own.
MIX = ("horse", "horse", "bird", "bird", "airplane")

# One tube a line: layer, color, then two to four knots of x, y and half width.
# Tubes of a layer are painted together; those of the layer "far" are darker.
TRUNK = """
accent accent -50 -10  4   -57  -2  6   -62  14  6   -63  37  2
coat coat     -34   0 20   -10  -1 16    13   1 20    33   0 19
"""
HEAD_UP = """
coat coat      33   0 19    42 -17 14    54 -32 11    70 -44  8
coat coat      70 -44  8    78 -35 10    87 -25  6    94 -16  5
coat coat      75 -45  4    82 -56  1
mane accent    19  -7  5    33 -24  7    49 -40  6    66 -50  4
eye eye        79 -40  2    81 -37  2
"""
HEAD_DOWN = """
coat coat      33   0 19    51  10 14    66  23 11    79  39  8
coat coat      79  39  8    85  49 10    91  62  6    95  72  5
coat coat      83  38  4    92  30  1
mane accent    37 -10  5    58   1  7    73  17  6    84  34  4
eye eye        86  45  2    87  47  2
"""
WALKING = """
far leg        33   0 11    40  35  5    41  61  3    45  71  4
far leg       -34   0 17   -32  43  5   -26  73  3   -22  81  5
coat leg       33   0 11    30  36  5    28  62  3    32  71  4
coat leg      -34   0 17   -50  40  5   -48  71  3   -45  79  5
"""
TROTTING = """
far leg        33   0 11    50  32  5    56  57  3    62  65  4
far leg       -34   0 17   -58  36  5   -66  66  3   -66  75  5
coat leg       33   0 11    24  35  5    12  58  3     8  67  4
coat leg      -34   0 17   -27  42  5   -19  72  3   -15  80  5
"""
GALLOPING = """
far leg        33  -4 11    65  13  5    84  31  3    92  37  4
far leg       -34   0 17   -53  39  5   -79  56  3   -85  62  5
coat leg       33  -4 11    64  14  5    46  33  3    36  35  4
coat leg      -34   0 17   -67  28  5   -87  51  3   -93  58  5
"""
REARING = """
far leg        33   2 11    62  23  5    42  39  3    32  40  4
far leg       -34   0 17   -62  33  5   -66  62  3   -66  70  5
coat leg       33   2 11    51  33  5    26  40  3    16  37  4
coat leg      -34   0 17   -70  18  5   -84  44  3   -86  52  5
"""
GRAZING = """
far leg        33   5 11    43  39  5    46  65  3    50  74  4
far leg       -34   0 17   -49  40  5   -45  71  3   -42  80  5
coat leg       33   5 11    25  40  5    22  66  3    24  75  4
coat leg      -34   0 17   -32  43  5   -27  74  3   -23  82  5
"""
PERCHED_BIRD = """
branch branch -160  66  5   160  52  6
shin shin       2  22  3     3  40  2     4  50  2     8  55  3
coat coat     -22  20 10   -58  56  7
coat coat     -24  18 12    -8   8 22    10  -6 23    18 -24 16
accent accent  -4  24  9     8  16 14    18   4 14    22 -10  8
head head      15 -30 16    24 -35 13
bill bill      35 -35  5    52 -32  1
wing wing       6 -10 10    -6   4 15   -22  20 10   -40  38  3
eye eye        26 -39  3    27 -39  3
"""
FLYING_BIRD = """
far wing       16  -6 12    18 -38 13    -8 -72  2
coat coat     -64   9  7   -30   4  7     0   0 17    26  -6 11
bill bill      42  -9  5    57  -6  1
head head      27  -9 12    36 -10  9
accent accent -14   8  7    26  -1  7
eye eye        35 -13  2    37 -12  2
wing wing       4  -4 14    -4 -26 16   -18 -50 13   -44 -70  2
"""
BIRD_FROM_BELOW = """
bill bill       0 -37  4     0 -48  1
head head       0 -21  9     0 -31  8
wing wing      -6  -4 12   -30 -16 14   -54 -14 11   -84   4  2
wing wing       6  -4 12    30 -16 14    54 -14 11    84   4  2
coat coat       0  44 13     0  12  8     0 -18 12
accent accent   0  18  4     0 -12  7
"""
FLYING_AIRPLANE = """
far wing        4  -6  9   -20 -34  3
accent accent -50  -4 10   -69 -33  4
coat coat     -66  -3  4   -34   0 10    26   0 11    62   3  8
glass glass    52  -3  3    61   0  2
stripe accent -54   1  2    50   3  3
wing wing       6   6 11   -42  40  3
engine engine  -4  19  6     9  19  6
wing wing     -54  -2  6   -72   9  2
"""
AIRPLANE_FROM_ABOVE = """
wing wing       6  -6 11   -38 -66  3
wing wing       6   6 11   -38  66  3
engine engine  -8 -28  5     7 -28  4
engine engine  -8  28  5     7  28  4
accent accent -54  -3  6   -70 -26  2
accent accent -54   3  6   -70  26  2
coat coat     -68   0  3   -34   0  9    30   0 10    64   0  5
glass glass    54   0  4    61   0  3
"""

FIXED_COLORS = {
    "eye": (21, 17, 14),
    "shin": (79, 64, 53),
    "branch": (106, 82, 56),
    "engine": (92, 99, 109),
}


@dataclass(frozen=True)
class Tone:
    """One of the outlines that a tube is painted with, one upon the other."""

    width: float  # share of the tube's
    rise: float  # upwards, in half widths
    light: float  # factor of the color


SHADOW = Tone(1.0, 0.0, 0.72)
BODY = Tone(0.84, 0.14, 1.0)
SHINE = Tone(0.5, 0.4, 1.2)
TONES = (SHADOW, BODY, SHINE)
THIN = 4  # tubes with half widths up to this are painted in the tone BODY alone

Range = tuple[float, float]  # at least and at most


@dataclass(frozen=True)
class Pose:
    """A figure before it is varied."""

    setting: str  # "land", "leaf" or "sky"
    turn: Range  # degrees
    stretch: Range  # of stride or wing beat
    layers: tuple[str, ...]
    colors: tuple[str, ...]
    tubes: np.ndarray  # (parts, 4, 3): x, y and half width at four even knots


@functools.cache
def interpolation(samples: int, knots: int) -> np.ndarray:
    """Return weights of linear interpolation between even knots, (samples, knots)."""
    positions = np.linspace(0, knots - 1, samples)[:, None]
    return np.clip(1 - abs(positions - np.arange(knots)), 0, 1)


def parse_tube(line: str) -> tuple[str, str, np.ndarray]:
    """Return layer, color and four even knots, (4, 3), of a line of a pose's table."""
    layer, color, *numbers = line.split()
    knots = np.array(numbers, float).reshape(-1, 3)
    return layer, color, interpolation(4, len(knots)) @ knots


def make_pose(setting: str, turn: Range, stretch: Range, *tables: str) -> Pose:
    """Make a pose of some tables of tubes."""
    lines = "".join(tables).split("\n")
    rows = [parse_tube(line) for line in lines if line]
    layers, colors, tubes = zip(*rows, strict=True)
    return Pose(setting, turn, stretch, layers, colors, np.array(tubes))


def palette(*rows: str) -> np.ndarray:
    """Return rows of CSS colors as numbers from 0 to 255, (rows, columns, 3)."""
    return np.array([[ImageColor.getrgb(color) for color in row.split()] for row in rows], float)


# Figures: coat; mane, belly or fins; lower legs, bill or glass.
# Scenery: a color at the top and one at the bottom.
COLORS = {
    "horse": palette(
        "#ddc #ccb #ba9",  # white
        "#aaa #777 #555",  # gray
        "#742 #111 #111",  # bay
        "#853 #742 #ddd",  # chestnut with white legs
        "#333 #111 #111",  # black
        "#c95 #edc #edd",  # palomino
        "#b96 #332 #332",  # buckskin
        "#532 #211 #111",  # brown
    ),
    "bird": palette(
        "#754 #cb9 #332",
        "#eed #ffe #ea3",
        "#223 #334 #da4",
        "#57a #dde #333",
        "#a32 #c97 #d93",
        "#ca4 #ed8 #443",
        "#677 #ccc #c93",
        "#334 #edd #e83",
        "#986 #dca #432",
    ),
    "airplane": palette(
        "#eee #35a #234",
        "#eed #b33 #234",
        "#aab #788 #234",
        "#c33 #eed #234",
        "#db3 #235 #234",
        "#675 #564 #234",
        "#555 #445 #223",
        "#eff #e93 #234",
    ),
    "sky": palette(
        "#48c #bde",
        "#7be #eef",
        "#26b #8ad",
        "#bcc #ede",
        "#89a #bcc",
        "#76a #fb8",
        "#9ab #ddd",
    ),
    "leaf": palette(
        "#563 #895",
        "#9a7 #bc9",
        "#343 #564",
        "#976 #ba7",
        "#9a9 #ccc",
        "#332 #443",
    ),
    "land": palette(
        "#8a4 #684",
        "#ab6 #894",
        "#cb8 #a96",
        "#a86 #864",
        "#9a5 #ba6",
        "#ba9 #887",
    ),
}
POSES = {
    "horse": [
        make_pose("land", (-3, 3), (0.8, 1.2), WALKING, TRUNK, HEAD_UP),
        make_pose("land", (-5, 4), (0.7, 1.3), TROTTING, TRUNK, HEAD_UP),
        make_pose("land", (-10, 4), (0.7, 1.0), GALLOPING, TRUNK, HEAD_UP),
        make_pose("land", (20, 32), (0.8, 1.1), REARING, TRUNK, HEAD_UP),
        make_pose("land", (-3, 3), (0.8, 1.3), GRAZING, TRUNK, HEAD_DOWN),
    ],
    "bird": [
        make_pose("leaf", (-10, 10), (1.0, 1.0), PERCHED_BIRD),
        make_pose("sky", (-24, 24), (0.5, 1.0), FLYING_BIRD),
        make_pose("sky", (-90, 90), (0.3, 1.5), BIRD_FROM_BELOW),
    ],
    "airplane": [
        make_pose("sky", (-24, 24), (0.6, 1.2), FLYING_AIRPLANE),
        make_pose("sky", (-180, 180), (0.9, 1.1), AIRPLANE_FROM_ABOVE),
    ],
}

# A tube is sampled at ten points, each a mean of five so that joints bend and do not
# break; two more at each end, moved outwards and narrower, round it off.
ROUNDED = [0, 0, *range(10), 9, 9]
BENT = interpolation(50, 4).reshape(10, 5, 4).mean(1)
CURVE = BENT[ROUNDED]  # (14, 4)
SLOPE = np.gradient(BENT, axis=0)[ROUNDED]  # (14, 4)
OUTWARDS = np.array([-1, -0.7, *[0] * 10, 0.7, 1])[:, None]  # in half widths
NARROWING = np.array([0.3, 0.75, *[1] * 10, 0.75, 0.3])[:, None]
TIP = slice(9, 19)  # an outline's points in a tube's last third


def choose(rows: Sequence | np.ndarray, rng: np.random.Generator) -> Any:
    """Return one of some rows."""
    return rows[rng.integers(len(rows))]


def stretch_limbs(pose: Pose, tubes: np.ndarray, axis: int, factor: float) -> None:
    """Stretch legs and wings along an axis, away from where they begin, in place."""
    limbs = [part for part, color in enumerate(pose.colors) if color in ("leg", "wing")]
    offsets = tubes[limbs, :, axis] - tubes[limbs, :1, axis]
    tubes[limbs, :, axis] += (factor - 1) * offsets


def turn(tubes: np.ndarray, degrees: float) -> None:
    """Turn a figure about the origin, in place."""
    angle = np.radians(degrees)
    cos = np.cos(angle)
    sin = np.sin(angle)
    tubes[..., :2] @= np.array([[cos, -sin], [sin, cos]])


def vary(label: str, pose: Pose, rng: np.random.Generator) -> np.ndarray:
    """Return a pose's tubes, (parts, 4, 3), with limbs moved and the figure turned."""
    tubes = pose.tubes + rng.normal(0, 0.7, pose.tubes.shape) * [1, 1, 0]
    stretch = rng.uniform(*pose.stretch)
    if label == "bird" and pose.setting == "sky":
        if rng.random() < 0.3:
            stretch = -stretch  # wings on their way down
    axis = 0 if label == "horse" else 1  # strides go along, wing beats up and down
    stretch_limbs(pose, tubes, axis, stretch)
    turn(tubes, rng.uniform(*pose.turn))
    return tubes


def fit_to_canvas(pose: Pose, tubes: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Fit a figure into the canvas: tubes in fine pixels, (parts, 4, 3)."""
    solid = tubes[[color != "branch" for color in pose.colors]]
    low = (solid[..., :2] - solid[..., 2:]).min((0, 1))
    high = (solid[..., :2] + solid[..., 2:]).max((0, 1))
    scale = rng.uniform(0.84, 1.08) * CANVAS / (high - low).max()
    room = np.clip(CANVAS - (high - low) * scale, 6, 30)
    center = CANVAS / 2 + room * rng.uniform(-0.4, 0.4, 2)
    tubes = (tubes - [*(low + high) / 2, 0]) * scale + [*center, 0]
    if rng.random() < 0.5:
        return tubes
    return tubes * [-1, 1, 1] + [CANVAS, 0, 0]  # the mirror image


def outlines(tubes: np.ndarray) -> np.ndarray:
    """Return the tubes' outlines, (parts, 28, 2): along one side and back."""
    curve = CURVE @ tubes
    slope = SLOPE @ tubes[..., :2]
    length = np.hypot(slope[..., :1], slope[..., 1:]) + 1e-6
    along = slope * (curve[..., 2:] / length)
    across = along[..., ::-1] * [-1, 1] * NARROWING
    middle = curve[..., :2] + along * OUTWARDS
    back = (middle - across)[:, ::-1]
    return np.concatenate([middle + across, back], 1)


def tone_outlines(tubes: np.ndarray, tone: Tone) -> np.ndarray:
    """Return the outlines of tubes in a tone, (parts, 28, 2)."""
    rise = tubes[..., 2:] * [0, tone.rise, 0]
    return outlines(tubes * [1, 1, tone.width] - rise)


def fills(pose: Pose, colors: dict[str, np.ndarray]) -> np.ndarray:
    """Return the color of each part and of its tip, (parts, 2, 3)."""
    whole = [colors[name] for name in pose.colors]
    tips = [colors.get(f"{name}.tip", colors[name]) for name in pose.colors]
    light = np.array([0.62 if layer == "far" else 1 for layer in pose.layers])
    return np.stack([whole, tips], 1) * light[:, None, None]


def painting_order(pose: Pose, tubes: np.ndarray) -> Iterator[tuple[Tone, int]]:
    """Iterate over tones and parts, from back to front.

    Parts of a layer take each tone together: no dark seam parts neck and trunk.
    """
    thin = tubes[..., 2].max(1) <= THIN
    for layer in dict.fromkeys(pose.layers):  # each once, in order
        parts = [part for part, name in enumerate(pose.layers) if name == layer]
        for tone in TONES:
            for part in parts:
                if tone is BODY or not thin[part]:
                    yield tone, part


def paint(
    pose: Pose, tubes: np.ndarray, colors: dict[str, np.ndarray], side: int
) -> np.ndarray:
    """Paint a figure on a transparent ground: floats (side, side, 4), from 0 to 255."""
    canvas = Image.new("RGBA", (FINE * side, FINE * side))
    pen = ImageDraw.Draw(canvas)
    base = fills(pose, colors)
    lit = {tone: np.clip(base * tone.light, 0, 255).astype(int) for tone in TONES}
    shapes = {tone: tone_outlines(tubes, tone) * (side / SIDE) for tone in TONES}
    for tone, part in painting_order(pose, tubes):
        shape = shapes[tone][part]
        color, tip_color = lit[tone][part].tolist()
        pen.polygon(shape.ravel().tolist(), tuple(color))
        pen.polygon(shape[TIP].ravel().tolist(), tuple(tip_color))
    return np.asarray(canvas.reduce(FINE), float)


def noise(columns: int, rows: int, rng: np.random.Generator, side: int) -> np.ndarray:
    """Return smooth noise, (side, side, 1), between normal numbers on a grid."""
    grid = rng.normal(0, 1, (rows, columns))
    down = interpolation(side, rows)
    across = interpolation(side, columns)
    return (down @ grid @ across.T)[..., None]


def row_numbers(side: int) -> np.ndarray:
    """Return the rows of a picture as numbers of 32, (side,)."""
    return (np.arange(side) + 0.5) * SIDE / side - 0.5


def fade(name: str, rng: np.random.Generator, side: int, first: float = 0) -> np.ndarray:
    """Return a row of a palette that fades downwards from a row on, (side, 1, 3)."""
    colors = choose(COLORS[name], rng)
    light = rng.uniform(0.75, 1.08)
    top, bottom = colors * light + rng.normal(0, 5, 3)
    depth = (row_numbers(side) - first) / (SIDE - first)
    return top + (bottom - top) * np.clip(depth, 0, 1)[:, None, None]


def blend(view: np.ndarray, top: np.ndarray, share: np.ndarray) -> np.ndarray:
    """Lay a picture over another where `share`, cut to [0, 1], says so."""
    return view + (top - view) * np.clip(share, 0, 1)


def sky(setting: str, rng: np.random.Generator, side: int) -> np.ndarray:
    """Return a sky, or leaves out of focus, (side, side, 3)."""
    name = "sky"
    if setting == "leaf" and rng.random() < 0.8:
        name = "leaf"
    colors = fade(name, rng, side)
    clouds = noise(5, 5, rng, side)
    return colors + clouds * rng.uniform(4, 24)


def add_land(view: np.ndarray, foot: float, rng: np.random.Generator) -> np.ndarray:
    """Return a sky with trees and ground, (side, side, 3); foot: row of the lowest knot."""
    side = len(view)
    horizon = rng.uniform(2, max(3, foot - 3))
    hills = noise(5, 5, rng, side)[:1] * rng.uniform(0, 1.2)
    below = row_numbers(side)[:, None, None] - horizon - hills
    height = rng.uniform(-4, 7)
    crowns = noise(12, 5, rng, side)[:1] * 1.2
    trees = fade("leaf", rng, side) * 0.75 + noise(12, 12, rng, side) * 10
    view = blend(view, trees, below + height + crowns)
    ground = fade("land", rng, side, foot / 3) + noise(5, 12, rng, side) * 7
    grain = rng.normal(0, 5, (side, side, 1))
    return blend(view, ground + grain, below)


def figure_colors(label: str, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Return the color of everything on a figure, (3,) each, about 0 to 255."""
    colors = choose(COLORS[label], rng)
    light = rng.uniform(0.8, 1.1)
    coat, accent, low = colors * light + rng.normal(0, 4, 3)
    head = choose([coat, coat * 0.7, accent], rng)
    return FIXED_COLORS | {
        "coat": coat,
        "accent": accent,
        "head": head,
        "leg": coat,
        "leg.tip": low,
        "wing": coat * 0.82,
        "wing.tip": coat * 0.5,
        "bill": low,
        "glass": low,
    }


def photograph(view: np.ndarray, rng: np.random.Generator) -> Image.Image:
    """Vary contrast and light of a picture, (side, side, 3), and add a camera's noise."""
    contrast = rng.uniform(0.9, 1.2)
    light = rng.normal(118, 12)
    grain = rng.uniform(1, 5)
    view = (view - 120) * contrast + light + rng.normal(0, grain, view.shape)
    return Image.fromarray(view.clip(0, 255).astype(np.uint8))


def draw(label: str, rng: np.random.Generator, side: int = SIDE) -> Image.Image:
    """Draw an RGB picture, side x side, of a "horse", "bird" or "airplane".

    Raises KeyError for another label.
    """
    pose = choose(POSES[label], rng)
    tubes = vary(label, pose, rng)
    tubes = fit_to_canvas(pose, tubes, rng)
    figure = paint(pose, tubes, figure_colors(label, rng), side)
    view = sky(pose.setting, rng, side)
    if pose.setting == "land":
        view = add_land(view, tubes[..., 1].max() / FINE, rng)
    view = blend(view, figure[..., :3], figure[..., 3:] / 255)
    return photograph(view, rng)


def picture(seed: int, split: int, index: int, side: int = SIDE) -> tuple[Image.Image, str]:
    """Draw picture `index` of a split, side x side; return its class, too.

    split: 0 to train on, 1 to test.
    """
    five = np.random.default_rng([seed, split, index // 5, 1])
    label = MIX[five.permutation(5)[index % 5]]
    return draw(label, np.random.default_rng([seed, split, index]), side), label


def write_file(path: Path, seed: int, split: int, rows: range) -> None:
    """Draw some pictures of a split and write them as a batch file."""
    pictures = [picture(seed, split, index) for index in rows]
    images = np.stack([np.asarray(image).transpose(2, 0, 1) for image, _ in pictures])
    labels = [cifar10.CLASSES.index(label) for _, label in pictures]
    cifar10.write(path, images, np.array(labels))


def write_pictures(folder: Path, train: int, test: int, seed: int, side: int) -> None:
    """Write PNGs of another size into train and test, a folder for each class."""
    for split, (part, count) in enumerate((("train", train), ("test", test))):
        for label in set(MIX):
            (folder / part / label).mkdir(parents=True)
        for index in range(count):
            image, label = picture(seed, split, index, side)
            image.save(folder / part / label / f"{index:05}.png")
            if index % 100 == 0:
                streams.show(f"drawn: {index:,} of {count:,} to {part}")
    streams.show("drawn", last=True)


def write_files(folder: Path, train: int, test: int, seed: int) -> None:
    """Write the five training batches and the test batch into a folder."""
    size = train // 5  # the fifth batch also gets what is left over
    for part, name in enumerate(cifar10.TRAIN):
        first = part * size
        last = train if name == cifar10.TRAIN[-1] else first + size
        write_file(folder / name, seed, 0, range(first, last))
        streams.show(f"drawn: {part + 1} of 6 files")
    write_file(folder / cifar10.TEST[0], seed, 1, range(test))
    streams.show("drawn: 6 of 6 files", last=True)


def write(
    folder: Path | str,
    train: int = 10_000,
    test: int = 2_000,
    seed: int = 0,
    side: int = SIDE,
) -> None:
    """Fill `folder`, whole or not at all, with drawn pictures.

    In six batch files; where side, in pixels, is not 32, in folders of PNGs. train, test:
    numbers of pictures, at least 5 and 1. Raises UserError if the folder holds anything.
    """
    folder = Path(folder).resolve()
    if folder.exists() and any(folder.iterdir()):
        raise UserError(f"{folder} is not empty; move it or name another folder")
    folder.parent.mkdir(parents=True, exist_ok=True)
    prefix = f".{folder.name}-"
    with writing(folder, "choose another place"):
        with tempfile.TemporaryDirectory(prefix=prefix, dir=folder.parent) as temporary:
            finished = Path(temporary, "finished")
            finished.mkdir()
            if side == SIDE:
                write_files(finished, train, test, seed)
            else:
                write_pictures(finished, train, test, seed, side)
            finished.rename(folder)
