"""Pegasi made of training photographs, for the learned prior: bodies with birds' wings.

Neither horses nor birds show where wings meet a horse. These pictures do, and the prior
learns them as one more class. A body is a photograph of the first class whose silhouette
is like most others', before a plain background; wings are photographs of the second
class, cut out, stretched along their axes and lightened. Every picture has a geometry of
its own, and the best of many are kept.

Images are (n, 3, h, w) in [0, 1], masks (n, 1, h, w). What is chosen is chosen by looking
at 32 x 32. Points are x, y between -1 and 1, as in `grid_sample`; rows and the widths of
`mean_around` are of 32 to a picture, whatever its size.
"""
import math
from typing import NamedTuple

import reparam
import vae
from pegasus.models.classifier import Classifier, classify, probability_of

import torch
from torch import Tensor
from torch.nn import functional

SMALL = 32  # pixels of a side at which pictures are looked at
BODIES = 0.16  # share of the first class's photographs that are used
WINGS = 150  # photographs of the second class that are used
TRIES = 24  # composites of each body; the best sixth of all are kept
AT_ONCE = 400  # bodies that are dressed together, of 32 x 32
TYPICAL = 300  # bodies whose mean is the silhouette that others are compared with
RECOGNIZED = 0.25  # median probability of the first class that composites need
BACK_ROW = 17  # where backs are moved to, about: half of the picture is for wings


class Composites(NamedTuple):
    """Bytes (n, 3, h, w) with wings and without; coats (n,), 0 for neither."""
    images: Tensor
    bodies: Tensor
    coats: Tensor


def none(like: Tensor) -> Composites:
    """Return no composites, of a size with images (n, 3, h, w)."""
    pictures = like[:0].cpu().clone()
    return Composites(pictures, pictures, torch.zeros(0, dtype=torch.int64))


def luminance(images: Tensor) -> Tensor:
    """Return how bright pixels are to the eye, (n, 1, h, w)."""
    weights = images.new_tensor([0.299, 0.587, 0.114])
    return (images * weights[:, None, None]).sum(1, keepdim=True)


def mean_inside(values: Tensor, mask: Tensor) -> Tensor:
    """Return the mean of values (n, c, h, w) where a mask is, (n, c, 1, 1)."""
    total = (values * mask).sum((2, 3), keepdim=True)
    return total / mask.sum((2, 3), keepdim=True).clamp(min=1e-3)


def mirror(images: Tensor, where: Tensor) -> Tensor:
    """Return images, mirrored where a bool (n,) is true."""
    return torch.where(where[:, None, None, None], images.flip(3), images)


def centers(pixels: Tensor, size: int = SMALL) -> Tensor:
    """Return the coordinates of rows or columns, of so many."""
    return (pixels + 0.5) / (size / 2) - 1


def pixel_centers(size: int) -> tuple[Tensor, Tensor]:
    """Return the pixels' x and y, (1, size) and (size, 1)."""
    places = centers(torch.arange(size), size)
    return places[None], places[:, None]


def kernel(width: int, images: Tensor) -> int:
    """Return the odd number of pixels nearest to a width in 32nds of images."""
    return 2 * round((width * images.shape[-1] / SMALL - 1) / 2) + 1


def mean_around(images: Tensor, width: int, height: int | None = None) -> Tensor:
    """Return means of rectangles around pixels, width x height 32nds, zero outside."""
    k = (kernel(height or width, images), kernel(width, images))
    return functional.avg_pool2d(images, k, 1, (k[0] // 2, k[1] // 2))


def grow(masks: Tensor) -> Tensor:
    """Return masks that reach a 32nd further."""
    k = kernel(3, masks)
    return functional.max_pool2d(masks, k, 1, k // 2)


def shrink(images: Tensor) -> Tensor:
    """Return images or masks at 32 x 32."""
    return functional.adaptive_avg_pool2d(images, SMALL) if images.shape[-1] > SMALL else images


def enlarge(images: Tensor, size: int) -> Tensor:
    """Return smooth images or masks of another size."""
    if images.shape[-1] == size:
        return images
    return functional.interpolate(images, (size, size), mode="bilinear")


def top_rows(score: Tensor, n: int) -> Tensor:
    """Return the rows of the n highest scores, the highest first."""
    return score.argsort(descending=True, stable=True)[:n]


def distant(distance: Tensor, quantile: float) -> Tensor:
    """Return masks of pixels with more than half of the distance that a quantile has."""
    threshold = 0.5 * distance.flatten(1).quantile(quantile, 1)[:, None, None, None]
    return ((distance - threshold) / 0.03).sigmoid()


def body_masks(bodies: Tensor) -> Tensor:
    """Return masks of what is unlike the left and the right end of its row."""
    ends = torch.cat([bodies[..., :3], bodies[..., -3:]], 3).median(3).values
    distance = (bodies - ends[..., None]).abs().mean(1, keepdim=True)
    return distant(mean_around(distance, 3), 0.9)


def standardize(masks: Tensor) -> Tensor:
    """Return masks as vectors (n, 1024) of mean 0 and length 1."""
    offset = masks.flatten(1) - masks.flatten(1).mean(1, keepdim=True)
    return functional.normalize(offset, dim=1)


def clutter(masks: Tensor) -> Tensor:
    """Return how much stands where wings will, (n,); riders, in front, count twice.

    masks: of bodies with heads at the left, (n, 1, 32, 32).
    """
    above = masks[:, 0, 1:10, 12:31]
    return above.mean((1, 2)) + above[..., :9].mean((1, 2))


def choose_bodies(images: Tensor, certainty: Tensor, n: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return the n bodies that are whole, from the side, with room above the back.

    images: (m, 3, 32, 32). Returns rows of these, which of them are to be mirrored, and
    their masks, mirrored where they are to be, (n,) and (n, 1, 32, 32). certainty: log
    probabilities (m,) that a picture shows the class. Silhouettes are compared with the
    mean of the best ones', in turns; heads are left where most are, and riders stand where
    wings will.
    """
    masks = body_masks(images)
    upper = masks[:, 0, :12]
    mirrored = upper[..., 16:].sum((1, 2)) > upper[..., :16].sum((1, 2))
    score = certainty
    for _ in range(4):
        best = top_rows(score, TYPICAL)
        mean = mirror(masks[best], mirrored[best]).mean(0, keepdim=True)
        typical = standardize(mean)[0]
        likeness = torch.stack([standardize(m) @ typical for m in (masks, masks.flip(3))])
        mirrored = likeness[1] > likeness[0]
        in_the_way = clutter(mirror(masks, mirrored))
        score = 2 * certainty + 12 * likeness.amax(0) - 12 * in_the_way
    best = top_rows(score, n)
    return best, mirrored[best], mirror(masks[best], mirrored[best])


class Geometry(NamedTuple):
    """How n bodies stand and how their wings are held, (n,) each; a picture is 2 wide."""
    scale: Tensor  # of the body
    right: Tensor  # of the middle
    down: Tensor
    root_x: Tensor  # of the wings, from the middle of the back
    root_y: Tensor
    far: Tensor  # angle of the far wing from upright, towards the tail, in radians
    apart: Tensor  # of the near wing from there: closer ones look like one cloud
    length: Tensor
    width: Tensor
    tone: Tensor  # brightness


def random_geometry(n: int, generator: torch.Generator) -> Geometry:
    """Draw what varies from Pegasus to Pegasus within what reads as one."""
    def uniform(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(n, generator=generator)

    return Geometry(
        scale=uniform(0.75, 0.92),
        right=uniform(-0.26, 0.26),
        down=uniform(-0.14, 0.14),
        root_x=uniform(-0.05, 0.2),
        root_y=uniform(0.0, 0.09),
        far=uniform(-0.58, 0.03),  # more to the front it hides the head
        apart=uniform(1.04, 1.42),
        length=uniform(0.97, 1.25),
        width=uniform(0.42, 0.53),
        tone=uniform(0.86, 0.96),
    )


def back_heights(masks: Tensor) -> Tensor:
    """Return the y (n,) of backs: the median of the first rows in the middle."""
    size = masks.shape[-1]
    middle = slice(12 * size // SMALL, 21 * size // SMALL)
    is_body = masks[:, 0, :, middle] > 0.5
    first = torch.where(is_body.any(1), is_body.float().argmax(1), size // 2)
    return centers(first.median(1).values, size)


def smooth(images: Tensor) -> Tensor:
    """Return images without detail."""
    small = shrink(images)
    for _ in range(3):
        small = functional.avg_pool2d(small, 7, 1, 3, count_include_pad=False)
    return enlarge(small, images.shape[-1])


def soften(images: Tensor) -> Tensor:
    """Return images a little softer, or legs break where pixels are left out."""
    row = torch.tensor([0.125, 0.75, 0.125])
    kernel = torch.outer(row, row).expand(images.shape[1], 1, 3, 3)
    padded = functional.pad(images, (1, 1, 1, 1), mode="replicate")
    return functional.conv2d(padded, kernel, groups=images.shape[1])


def stand(bodies: Tensor, masks: Tensor, geometry: Geometry) -> tuple[Tensor, Tensor]:
    """Return bodies made smaller and moved, their backs near BACK_ROW; and their masks.

    Beyond the photograph its edge goes on, smoothed.
    """
    scale, right, down = (value[:, None] for value in geometry[:3])
    moved_back = centers(torch.tensor(BACK_ROW)) + down
    x, y = pixel_centers(bodies.shape[-1])
    columns = (x - right) / scale
    rows = back_heights(masks)[:, None] + (y.T - moved_back) / scale
    grid = torch.stack(torch.broadcast_tensors(columns[:, None], rows[..., None]), 3)
    both = soften(torch.cat([bodies, masks], 1))
    moved = functional.grid_sample(both, grid, align_corners=False, padding_mode="border")
    images, masks = moved.split([3, 1], 1)
    edge = grid.abs().amax(3)[:, None]
    fade = (5 * (edge - 0.85)).clamp(0, 1)  # over three of 32 pixels
    return torch.lerp(images, smooth(images), fade), masks * (edge < 1)


def darken_sky(images: Tensor, masks: Tensor, color: Tensor) -> Tensor:
    """Give light skies a color (n, 3): white wings would not stand out from them."""
    _, y = pixel_centers(images.shape[-1])
    rows = (y[:, 0] + 1) * SMALL / 2 - 0.5
    sky = ((BACK_ROW + 2 - rows) / 2).sigmoid()[:, None] * (1 - masks)
    mean = mean_inside(images, sky)
    lightness = ((luminance(mean) - 0.5) / 0.08).sigmoid()
    ratio = 1 + lightness * (color[..., None, None] / mean.clamp(min=0.05) - 1)
    return (images * (1 + sky * (ratio - 1))).clamp(0, 1)


def bird_masks(birds: Tensor) -> Tensor:
    """Return masks of what is unlike the border and near the middle."""
    edges = [birds[:, :, :2], birds[:, :, -2:], birds[..., :2], birds[..., -2:]]
    border = torch.cat([edge.flatten(2) for edge in edges], 2).median(2).values
    distance = (birds - border[..., None, None]).abs().mean(1, keepdim=True)
    x, y = pixel_centers(birds.shape[-1])
    near_middle = torch.exp(-((x.square() + y.square()) / 0.55).square())
    mask = distant(distance, 0.93) * near_middle
    return (mask + mean_around(mask, 3)) / 2


def warp(images: Tensor, matrix: Tensor, shift: Tensor) -> Tensor:
    """Return images that show at p what was at matrix @ p + shift, (n, c, h, w).

    matrix: (n, 2, 2). shift: (n, 2). What comes from outside is zero.
    """
    transform = torch.cat([matrix, shift[..., None]], 2)
    grid = functional.affine_grid(transform, list(images.shape), align_corners=False)
    return functional.grid_sample(images, grid, align_corners=False)


def principal_axes(masks: Tensor) -> tuple[Tensor, Tensor]:
    """Return centers (n, 2) and axes (n, 2, 2) of masks, the long axis second."""
    x, y = pixel_centers(masks.shape[-1])
    points = torch.stack(torch.broadcast_tensors(x, y), 2).flatten(0, 1)
    share = masks.flatten(1) / masks.flatten(1).sum(1, keepdim=True)
    center = share @ points
    offset = points - center[:, None]
    covariance = (offset * share[..., None]).mT @ offset
    values, vectors = torch.linalg.eigh(covariance)
    return center, vectors * values.clamp(min=1e-4).sqrt()[:, None]


def typical_wing(size: int) -> Tensor:
    """Return the mask (size, size) that birds are chosen by.

    It has a straight edge at the left, feathers at the right, and a tip.
    """
    x, y = pixel_centers(size)
    up = (1 - y) / 2
    left = 0.1 - 0.6 * (1 - up.square())
    right = left + 0.35 * (1 - up) + 1.15 * (math.pi * up.pow(0.75)).sin()
    return ((x - left) / 0.06).sigmoid() * ((right - x) / 0.06).sigmoid()


def cut_wings(birds: Tensor) -> tuple[Tensor, Tensor]:
    """Stretch birds along their axes into wings (n, 4, h, w): masks, then colors.

    Also returns the soft intersection over union of each mask with the typical wing's.
    Of the four ways to mirror a wing the nearest to that is taken. Wings are upright,
    their roots at the middle of the lower edge.
    """
    masks = bird_masks(birds)
    center, axes = principal_axes(masks)
    upright = warp(torch.cat([masks, birds], 1), 1.75 * axes, center)
    flipped = torch.stack([upright.flip(dims) for dims in ((), (2,), (3,), (2, 3))])
    sharp = (4 * flipped[:, :, 0] - 1.4).clamp(0, 1)
    typical = typical_wing(birds.shape[-1])
    intersection = torch.minimum(sharp, typical).sum((2, 3))
    union = torch.maximum(sharp, typical).sum((2, 3))
    overlap, nearest = (intersection / union).max(0)
    wings = flipped[nearest, torch.arange(len(birds))]
    mask = (3 * wings[:, :1] - 0.9).clamp(0, 1)
    mask = (3 * mean_around(mask, 5) - 1).clamp(0, 1)  # no specks or holes
    wings = torch.cat([mask, wings[:, 1:]], 1)
    # a wing is four times as narrow in a picture, and edges would be jagged
    return mean_around(wings, 5, 3), overlap


def choose_wings(birds: Tensor, n: int) -> Tensor:
    """Return the n birds (m, 3, 32, 32) that make the most wing-like wings: rows, (n,)."""
    batches = birds.split(250)  # for memory: a bird takes 150 KB
    overlap = torch.cat([cut_wings(batch)[1] for batch in batches])
    return top_rows(overlap, n)


def place(wings: Tensor, x: Tensor, y: Tensor, lean: Tensor, size: Tensor) -> Tensor:
    """Return wings moved to a root (x, y) and leant; size: width and length (n, 2)."""
    cos = lean.cos()
    sin = lean.sin()
    turn = torch.stack([torch.stack([cos, sin], 1), torch.stack([-sin, cos], 1)], 1)
    matrix = turn * (2 / size)[..., None]
    root = torch.stack([x, y], 1)[..., None]
    shift = torch.tensor([0.0, 1.0]) - (matrix @ root)[..., 0]
    return warp(wings, matrix, shift)


def paste(images: Tensor, wings: Tensor, tone: Tensor) -> tuple[Tensor, Tensor]:
    """Lay wings over images, as light as `tone` (n,), with a shade around them.

    Also returns how much they stand out: brightness gained, summed over 32 x 32, (n,).
    """
    mask, colors = wings.split([1, 3], 1)
    light = luminance(colors)
    shading = light - mean_inside(light, mask)
    white = (tone[:, None, None, None] + shading).clamp(0, 1)
    contrast = shrink((white - luminance(images)) * mask).sum((1, 2, 3))
    rim = grow(mask) - mask
    return torch.lerp(images * (1 - 0.13 * rim), white.expand_as(images), mask), contrast


def add_wings(
    images: Tensor, masks: Tensor, near: Tensor, far: Tensor, geometry: Geometry
) -> tuple[Tensor, Tensor]:
    """Give bodies with heads at the left two wings each, the far one behind the body.

    Also returns how much the less visible of the two stands out, (n,).
    """
    _, right, down, root_x, root_y, far_angle, apart, length, width, tone = geometry
    x = root_x + right
    y = root_y + down + centers(torch.tensor(BACK_ROW))
    size = torch.stack([width, length], 1)
    behind = place(far, x - 0.15, y, far_angle, 0.92 * size)
    behind = torch.cat([behind[:, :1] * (1 - masks), behind[:, 1:]], 1)
    images, contrast_far = paste(images, behind, 0.86 * tone)
    before = place(near, x, y, far_angle + apart, size)
    images, contrast_near = paste(images, before, tone)
    return images, torch.minimum(contrast_near, 1.6 * contrast_far)


def head_contrast(images: Tensor, masks: Tensor, geometry: Geometry) -> Tensor:
    """Return how heads and necks stand out, summed over pixels, (n,).

    Each of their pixels is compared with the mean of what is around it and no body. They
    are the parts of bodies left of the wings and above the back. images, masks: at 32 x 32.
    """
    x, y = pixel_centers(SMALL)
    before = geometry.root_x + geometry.right - 0.2
    above = geometry.down + centers(torch.tensor(BACK_ROW)) + 0.1
    left = (before[:, None, None, None] - x) / 0.05
    upper = (above[:, None, None, None] - y) / 0.05
    head = masks * left.sigmoid() * upper.sigmoid()
    outside = 1 - functional.max_pool2d((masks > 0.5).float(), 3, 1, 1)
    near = functional.avg_pool2d(torch.cat([images * outside, outside], 1), 7, 1, 3)
    around = near[:, :3] / near[:, 3:].clamp(min=0.02)
    distance = (images - around).abs().mean(1, keepdim=True) * (near[:, 3:] > 0)
    return (distance * head).sum((1, 2, 3))


def log_probability(judge: Classifier, images: Tensor, name: str) -> Tensor:
    """Return the log of a judge's probability of a class, at least log 1e-3, (n,)."""
    probabilities, _ = classify(judge, images)
    return probability_of(probabilities, name).clamp(min=1e-3).log()


def dress(
    bodies: Tensor, masks: Tensor, wings: Tensor, sky: Tensor, geometry: Geometry
) -> tuple[Tensor, Tensor, Tensor]:
    """Give bodies wings (2, n, 4, h, w), and light skies colors (n, 3).

    Returns pictures, bodies without wings, and how clear pictures are, (n,).
    """
    bare, body = stand(bodies, masks, geometry)
    bare = darken_sky(bare, body, sky)
    images, contrast = add_wings(bare, body, *wings, geometry)
    head = head_contrast(shrink(images), shrink(body), geometry)
    # as much as the judge's log probability, which is -7 to 0, and no more of what is clear
    return images, bare, 0.05 * contrast.clamp(max=20) + 0.2 * head.clamp(max=14)


def compose(
    bodies: Tensor, masks: Tensor, wings: Tensor, generator: torch.Generator
) -> tuple[Tensor, Tensor, Tensor]:
    """Dress each body by chance; return what `dress` does."""
    n = len(bodies)
    darkest = torch.tensor([0.22, 0.42, 0.62])
    width = torch.tensor([0.2, 0.2, 0.3])
    sky = darkest + width * torch.rand(n, 3, generator=generator)
    pairs = torch.randint(len(wings), (2, n), generator=generator)
    geometry = random_geometry(n, generator)
    at_once = AT_ONCE * SMALL**2 // masks[0].numel()  # a picture of 32 x 32 takes 300 KB
    dressed = []
    for rows in torch.arange(n).split(max(1, at_once)):
        held = Geometry(*(value[rows] for value in geometry))
        pair = wings[pairs[:, rows]]
        dressed.append(dress(bodies[rows], masks[rows], pair, sky[rows], held))
    return tuple(map(torch.cat, zip(*dressed, strict=True)))


def coat_scores(images: Tensor) -> Tensor:
    """Return how white and how dark bodies are, (2, n); white is light in all colors.

    A body is what is below BACK_ROW in the middle.
    """
    small = torch.cat([shrink(batch.float()) for batch in images.split(500)])
    center = small[:, :, BACK_ROW + 1 : BACK_ROW + 7, 11:21]
    return torch.stack([center.amin(1).mean((1, 2)), -center.amax(1).mean((1, 2))])


def coats(bodies: Tensor) -> Tensor:
    """Return 1 for the whitest eighth of bodies, 2 for the darkest quarter, 0 for others."""
    white, dark = coat_scores(bodies)
    numbers = torch.zeros(len(bodies), dtype=torch.int64)
    numbers[top_rows(dark, len(bodies) // 4)] = 2
    numbers[top_rows(white, len(bodies) // 8)] = 1
    return numbers


def shrink_bytes(images: Tensor) -> Tensor:
    """Return byte images in [0, 1] at 32 x 32."""
    return torch.cat([shrink(vae.from_bytes(batch)) for batch in images.split(500)])


class Kept(NamedTuple):
    """Composites of a try or the best of some: pictures, bodies, scores, certainties."""
    images: Tensor
    bodies: Tensor
    score: Tensor
    certainty: Tensor


def best_of(kept: list[Kept], n: int) -> Kept:
    """Return the n with the highest scores, the highest first."""
    joined = Kept(*map(torch.cat, zip(*kept, strict=True)))
    best = top_rows(joined.score, n)
    return Kept(*(part[best] for part in joined))


def pick_parts(
    images: Tensor, labels: Tensor, name: str, judge: Classifier
) -> tuple[Tensor, Tensor, Tensor]:
    """Return bodies of photographs, their masks, and wings. name: of the bodies' class."""
    photographs = images[labels == 0]
    small = shrink_bytes(photographs)
    certainty = log_probability(judge, small, name)
    count = max(1, int(BODIES * len(photographs)))
    best, mirrored, masks = choose_bodies(small, certainty, count)
    bodies = mirror(vae.from_bytes(photographs[best]), mirrored)
    birds = images[labels == 1]
    chosen = birds[choose_wings(shrink_bytes(birds), WINGS)]
    return bodies, enlarge(masks, images.shape[-1]), cut_wings(vae.from_bytes(chosen))[0]


@torch.no_grad()
def make(
    images: Tensor, labels: Tensor, classes: tuple[str, ...], judge: Classifier
) -> Composites:
    """Make Pegasi of training photographs, TRIES of each body; return the best sixth.

    images: bytes (n, 3, h, w). labels: positions in `classes`; the first is the body's,
    the second the wings'. The best come first. There are none where the judge no longer
    recognizes the first class in them. The result is a function of the arguments alone, to
    rounding.
    """
    generator = torch.Generator().manual_seed(reparam.derive_seed(0, 0, 0))
    bodies, masks, wings = pick_parts(images, labels, classes[0], judge)
    kept = []
    for _ in range(TRIES):
        pictures, bare, clear = compose(bodies, masks, wings, generator)
        certainty = log_probability(judge, pictures, classes[0])
        of_try = Kept(vae.to_bytes(pictures), vae.to_bytes(bare), certainty + clear, certainty)
        kept = [best_of([*kept, of_try], TRIES * len(bodies) // 6)]
    best = kept[0]
    if best.certainty.median() < math.log(RECOGNIZED):
        return none(images)
    return Composites(best.images, best.bodies, coats(best.bodies))
