"""Birds' wings on horses' backs, in pixels and without a network.

Horses and birds are images (n, 3, 32, 32) in [0, 1]. A wing is (n, 4, 32, 32), its mask
and its colors, upright with the root at the middle of the lower edge. Points are x, y
between -1 and 1, as in `grid_sample`.
"""
import math
from typing import NamedTuple

import vae

import torch
from torch import Tensor
from torch.nn import functional

SIZE = vae.IMAGE_SHAPE[1]
SKY = (0.36, 0.58, 0.86)  # before which light wings and most horses stand out


class WingPose(NamedTuple):
    """How a wing is held. Lengths are in units in which a picture is 2 wide."""
    brightness: float
    shade: float  # how much of a coat's brightness the wing's is lowered by
    root: float  # x of the root: behind the middle, or wings hide the head
    lean: float  # angle towards the tail, in radians
    length: float
    width: float  # wings are narrow and far apart, or they look like one cloud


# the far wing is shaded beside a white coat, so that a light head before it is seen
FAR_WING = WingPose(0.9, 0.25, 0.12, lean=-0.55, length=1.1, width=0.45)
NEAR_WING = WingPose(0.95, 0.0, 0.2, lean=0.75, length=1.3, width=0.5)


def pixel_centers(like: Tensor) -> tuple[Tensor, Tensor]:
    """Return the pixels' x and y, (1, 32) and (32, 1)."""
    centers = (torch.arange(SIZE, device=like.device) + 0.5) / (SIZE / 2) - 1
    return centers[None], centers[:, None]


def warp(images: Tensor, matrix: Tensor, shift: Tensor) -> Tensor:
    """Return images (n, c, 32, 32) that show at p what was at matrix @ p + shift.

    matrix: (n, 2, 2). shift: (n, 2). What comes from outside is zero.
    """
    transform = torch.cat([matrix, shift[..., None]], 2)
    grid = functional.affine_grid(transform, list(images.shape), align_corners=False)
    return functional.grid_sample(images, grid, align_corners=False)


def median_color(images: Tensor) -> Tensor:
    """Return the median color of images (n, 3, h, w), (n, 3)."""
    return images.flatten(2).median(2).values


def color_distance(images: Tensor, color: Tensor) -> Tensor:
    """Return how far pixels, smoothed, are from a color (n, 3), (n, 32, 32)."""
    distance = (images - color[..., None, None]).abs().mean(1)
    return functional.avg_pool2d(distance, 3, 1, 1)


def color_similarity(images: Tensor, color: Tensor) -> Tensor:
    """Return how like a color (n, 3) pixels are, 0 to 1, (n, 32, 32)."""
    return ((0.14 - color_distance(images, color)) / 0.04).sigmoid()


def border_pixels(images: Tensor) -> Tensor:
    """Return the pixels at the edges, (n, 3, 256)."""
    sides = [images[:, :, :2], images[:, :, -2:], images[..., :2], images[..., -2:]]
    return torch.cat([side.flatten(2) for side in sides], 2)


def silhouettes(birds: Tensor) -> Tensor:
    """Return masks (n, 1, 32, 32) of what is unlike the border and near the middle."""
    x, y = pixel_centers(birds)
    background = border_pixels(birds).median(2).values[..., None, None]
    distance = (birds - background).abs().mean(1, keepdim=True)
    threshold = 0.5 * distance.flatten(1).quantile(0.93, 1)[:, None, None, None]
    near_middle = torch.exp(-((x.square() + y.square()) / 0.55).square())
    mask = ((distance - threshold) / 0.03).sigmoid() * near_middle
    return (mask + functional.avg_pool2d(mask, 3, 1, 1)) / 2


def principal_axes(masks: Tensor) -> tuple[Tensor, Tensor]:
    """Return centers (n, 2) and axes (n, 2, 2) of masks (n, 1, 32, 32).

    The short axis is in the first column, the long one in the second.
    """
    x, y = pixel_centers(masks)
    points = torch.stack(torch.broadcast_tensors(x, y), 2).flatten(0, 1)  # (1024, 2)
    share = masks.flatten(1) / masks.flatten(1).sum(1, keepdim=True)
    center = share @ points
    offset = points - center[:, None]
    covariance = (offset * share[..., None]).transpose(1, 2) @ offset
    values, vectors = torch.linalg.eigh(covariance)
    return center, vectors * values.clamp(min=1e-4).sqrt()[:, None]


def ideal_wing(like: Tensor) -> Tensor:
    """Return the mask (32, 32) that birds are chosen by.

    It has a straight edge at the left, feathers at the right, and a tip.
    """
    x, y = pixel_centers(like)
    up = (1 - y) / 2
    left = 0.1 - 0.6 * (1 - up.square())
    right = left + 0.35 * (1 - up) + 1.15 * (math.pi * up.pow(0.75)).sin()
    return ((x - left) / 0.06).sigmoid() * ((right - x) / 0.06).sigmoid()


def make_wings(birds: Tensor) -> tuple[Tensor, Tensor]:
    """Stretch birds along their axes into wings (n, 4, 32, 32).

    Also returns the soft intersection over union of each mask with the ideal, (n,).
    Of the four ways to mirror a wing the one nearest to the ideal is taken.
    """
    masks = silhouettes(birds)
    center, axes = principal_axes(masks)
    upright = warp(torch.cat([masks, birds], 1), 1.75 * axes, center)
    flipped = torch.stack([upright.flip(dims) for dims in ((), (2,), (3,), (2, 3))])
    sharp = (4 * flipped[:, :, 0] - 1.4).clamp(0, 1)
    ideal = ideal_wing(birds)
    intersection = torch.minimum(sharp, ideal).sum((2, 3))
    union = torch.maximum(sharp, ideal).sum((2, 3))
    overlap, best = (intersection / union).max(0)
    wing = flipped[best, torch.arange(len(birds), device=birds.device)]
    mask = (3 * wing[:, :1] - 0.9).clamp(0, 1)
    return torch.cat([mask, wing[:, 1:]], 1), overlap


def outline(horses: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the sky's color, where each column's sky ends, and the row of the back.

    (n, 3); (n, 32), the first row that is unlike the sky, or 32; (n,).
    """
    sky = median_color(horses[:, :, :8, 6:26])
    distance = color_distance(horses, sky)
    body = distance[:, 12:22, 8:24].flatten(1).quantile(0.8, 1)
    is_horse = distance > (0.55 * body).clamp(min=0.1)[:, None, None]
    top = is_horse.float().argmax(1)
    first = torch.where(is_horse.any(1), top, SIZE).float()
    return sky, first, first[:, 10:22].median(1).values


def coat_color(horses: Tensor) -> Tensor:
    """Return the color of the body, (n, 3)."""
    return median_color(horses[..., 16:21, 11:21])


def head_pixels(horses: Tensor) -> Tensor:
    """Return how many pixels left and right above the back are of the coat, (n, 2).

    They are more like the coat than the sky; a raised head makes the difference.
    """
    sky = outline(horses)[0]
    to_sky = color_distance(horses, sky)
    to_coat = color_distance(horses, coat_color(horses))
    body = ((to_sky - to_coat) / 0.05).sigmoid()[:, 5:15]
    left = body[..., 3:12].sum((1, 2))
    right = body[..., 20:29].sum((1, 2))
    return torch.stack([left, right], 1)


def sky_score(horses: Tensor) -> Tensor:
    """Return how good a place for wings is, (n,): a plain sky above a straight back."""
    sky, first, back = outline(horses)
    clutter = (horses[:, :, :9, 4:28] - sky[..., None, None]).abs().mean((1, 2, 3))
    bend = (first[:, 10:22] - back[:, None]).abs().mean(1)
    return -6 * clutter - 0.3 * bend


def body_score(horses: Tensor) -> Tensor:
    """Return how much of a horse is seen, (n,).

    A whole one differs from the sky, the ground and what is beside it, and has a head
    and legs.
    """
    color = coat_color(horses)
    sides = horses[..., 16:21, [0, 1, 2, 29, 30, 31]] - color[..., None, None]
    sides = sides.abs().mean((1, 2, 3)).clamp(max=0.25)
    ground = color - median_color(horses[..., 27:, 4:28])
    ground = ground.abs().mean(1).clamp(max=0.25)
    sky = (color - outline(horses)[0]).abs().mean(1).clamp(max=0.3)
    legs = horses[..., 24:29, 6:26].mean(1).std(2).mean(1).clamp(max=0.12)
    head = head_pixels(horses).diff().abs()[:, 0].clamp(max=20)
    return 5 * sky + 6 * (sides + ground) + 8 * legs + 0.2 * head


def make_room(horses: Tensor) -> Tensor:
    """Return the horses four fifths as large, their backs in row 15 and sky above."""
    sky, _, back = outline(horses)
    fade = torch.linspace(1, 0, 6, device=horses.device)[:, None]
    top = torch.lerp(horses[:, :, :6], sky[..., None, None], fade)
    wide = torch.cat([top, horses[:, :, 6:]], 2)
    wide = functional.pad(wide, (4, 4, 0, 0), mode="reflect")
    above = sky[..., None, None].expand(-1, -1, 24, 40)
    tall = torch.cat([above, wide], 2)  # (n, 3, 56, 40), rows 24 later
    first = back.long()[:, None] + 5  # puts the back into row 19 of 40
    rows = first + torch.arange(40, device=horses.device)
    rows = rows.clamp(max=SIZE + 23)[:, None, :, None].expand(-1, 3, -1, 40)
    square = tall.gather(2, rows)
    return functional.interpolate(square, (SIZE, SIZE), mode="bilinear", antialias=True)


def paint_sky(horses: Tensor) -> Tensor:
    """Return the horses before a blue sky.

    A sky that is like the coat stays as it is: some of the coat would be painted too.
    """
    sky = median_color(horses[:, :, :6])
    rows = torch.arange(SIZE, device=horses.device)
    above = ((16 - rows) / 2).sigmoid()[:, None]
    differs = (coat_color(horses) - sky).abs().mean(1) > 0.2
    share = color_similarity(horses, sky) * above * differs[:, None, None]
    blue = horses.new_tensor(SKY)[:, None, None].expand_as(horses)
    return torch.lerp(horses, blue, share[:, None])


def place_wings(wings: Tensor, roots: Tensor, pose: WingPose) -> Tensor:
    """Return wings (n, 4, 32, 32) moved to roots (n, 2), as a pose holds them."""
    cos = math.cos(pose.lean)
    sin = math.sin(pose.lean)
    across = roots.new_tensor([cos, sin]) * 2 / pose.width
    along = roots.new_tensor([-sin, cos]) * 2 / pose.length
    matrix = torch.stack([across, along]).expand(len(roots), 2, 2)
    shift = roots.new_tensor([0, 1]) - (matrix @ roots[..., None])[..., 0]
    return warp(wings, matrix, shift)


def brighten(colors: Tensor, mask: Tensor, brightness: Tensor) -> Tensor:
    """Shift colors (n, 3, 32, 32) to a mean brightness (n,) inside a mask."""
    area = mask.sum((2, 3), keepdim=True).clamp(min=1e-3)
    mean = (colors * mask).sum((2, 3), keepdim=True) / area
    return (colors + brightness[:, None, None, None] - mean).clamp(0, 1)


def add_wings(horses: Tensor, wings: Tensor) -> tuple[Tensor, Tensor]:
    """Give horses with heads at the left two wings each.

    Returns images, and masks (n, 1, 32, 32) of the wings. Wings keep their shades and
    are lifted to their pose's brightness: dark ones are taken for riders and trees. The
    far wing is behind all that is unlike the sky.
    """
    sky, _, back = outline(horses)
    y = (back + 1.5) / (SIZE / 2) - 1
    coat = coat_color(horses).mean(1)
    visible = color_similarity(horses, sky)[:, None]
    cover = torch.zeros_like(horses[:, :1])
    for pose in (FAR_WING, NEAR_WING):
        roots = torch.stack([torch.full_like(y, pose.root), y], 1)
        mask, colors = place_wings(wings, roots, pose).split([1, 3], 1)
        if pose is FAR_WING:
            mask = mask * visible
        colors = brighten(colors, mask, pose.brightness - pose.shade * coat)
        rim = functional.max_pool2d(mask, 3, 1, 1) - mask
        horses = horses * (1 - 0.15 * rim)  # or light wings melt into light horses
        horses = torch.lerp(horses, colors, mask)
        cover = torch.maximum(cover, mask)
    return horses, cover
