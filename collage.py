"""Wings of birds on backs of horses, in pixels: silhouettes, outlines, shapes laid over pictures. Without a network.

All horses and birds are images (n, 3, 32, 32) in [0, 1]; a wing is (n, 4, 32, 32), its mask and its colors, upright
with the root at the middle of the lower edge. Points are x, y between -1 and 1, as in `grid_sample`.
"""
import math

import vae

import torch
from torch import Tensor
from torch.nn import functional

SIZE = vae.IMAGE[1]
SKY = (0.36, 0.58, 0.86)  # before which light wings and most horses stand out
# the far wing, the near one: brightness; what a white coat takes of it, so that a light head before it is seen; x of
# the root, behind the middle, or wings hide the head; lean (radians) to the tail; length; width: narrow and far apart,
# or they look like one cloud
PAIR = ((0.9, 0.25, 0.12, -0.55, 1.1, 0.45), (0.95, 0.0, 0.2, 0.75, 1.3, 0.5))  # pictures are 2 wide


def places(like: Tensor) -> tuple[Tensor, Tensor]:
    """The pixels' x and y, (1, 32) and (32, 1)."""
    at = (torch.arange(SIZE, device=like.device) + 0.5) / (SIZE / 2) - 1
    return at[None], at[:, None]


def warped(images: Tensor, turn: Tensor, shift: Tensor) -> Tensor:
    """Images (n, c, 32, 32) that show at p what was at turn @ p + shift, (n, 2, 2) and (n, 2); zero from outside."""
    where = functional.affine_grid(torch.cat([turn, shift[..., None]], 2), list(images.shape), align_corners=False)
    return functional.grid_sample(images, where, align_corners=False)


def unlike(images: Tensor, color: Tensor) -> Tensor:
    """How far pixels and their neighbours are from a color (n, 3), (n, 32, 32)."""
    return functional.avg_pool2d((images - color[..., None, None]).abs().mean(1), 3, 1, 1)


def similar(images: Tensor, color: Tensor) -> Tensor:
    """How like a color (n, 3) pixels and their neighbours are, 0 to 1, (n, 32, 32)."""
    return ((0.14 - unlike(images, color)) / 0.04).sigmoid()


def border(images: Tensor) -> Tensor:
    """Pixels at the edges, (n, 3, 256)."""
    sides = images[:, :, :2], images[:, :, -2:], images[..., :2], images[..., -2:]
    return torch.cat([side.flatten(2) for side in sides], 2)


def silhouettes(birds: Tensor) -> Tensor:
    """Masks (n, 1, 32, 32) of what is unlike the border and near the middle."""
    x, y = places(birds)
    far = (birds - border(birds).median(2).values[..., None, None]).abs().mean(1, keepdim=True)
    bar = 0.5 * far.flatten(1).quantile(0.93, 1)[:, None, None, None]
    mask = ((far - bar) / 0.03).sigmoid() * torch.exp(-((x.square() + y.square()) / 0.55).square())
    return (mask + functional.avg_pool2d(mask, 3, 1, 1)) / 2


def axes(masks: Tensor) -> tuple[Tensor, Tensor]:
    """Centres (n, 2) of masks (n, 1, 32, 32), and short and long axis in the columns of (n, 2, 2)."""
    x, y = places(masks)
    at = torch.stack(torch.broadcast_tensors(x, y), 2).flatten(0, 1)  # (1024, 2)
    share = masks.flatten(1) / masks.flatten(1).sum(1, keepdim=True)
    centre = share @ at
    off = at - centre[:, None]
    values, vectors = torch.linalg.eigh((off * share[..., None]).transpose(1, 2) @ off)
    return centre, vectors * values.clamp(min=1e-4).sqrt()[:, None]


def ideal(like: Tensor) -> Tensor:
    """The mask (32, 32) that birds are chosen by: a straight edge at the left, feathers at the right, a tip."""
    x, y = places(like)
    up = (1 - y) / 2
    left = 0.1 - 0.6 * (1 - up.square())
    right = left + 0.35 * (1 - up) + 1.15 * (math.pi * up.pow(0.75)).sin()
    return ((x - left) / 0.06).sigmoid() * ((right - x) / 0.06).sigmoid()


def wings(birds: Tensor) -> tuple[Tensor, Tensor]:
    """Birds stretched along their axes into wings (n, 4, 32, 32), and each mask's soft IoU with the ideal, (n,)."""
    masks, wanted = silhouettes(birds), ideal(birds)
    centre, axis = axes(masks)
    upright = warped(torch.cat([masks, birds], 1), 1.75 * axis, centre)
    ways = torch.stack([upright.flip(flips) for flips in ((), (2,), (3,), (2, 3))])
    sharp = (4 * ways[:, :, 0] - 1.4).clamp(0, 1)
    like, way = (torch.minimum(sharp, wanted).sum((2, 3)) / torch.maximum(sharp, wanted).sum((2, 3))).max(0)
    wing = ways[way, torch.arange(len(birds), device=birds.device)]
    return torch.cat([(3 * wing[:, :1] - 0.9).clamp(0, 1), wing[:, 1:]], 1), like


def outline(horses: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Color of the sky (n, 3); the first row of each column that is unlike it (n, 32); the row of the back (n,)."""
    sky = horses[:, :, :8, 6:26].flatten(2).median(2).values
    far = unlike(horses, sky)
    seen = far > (0.55 * far[:, 12:22, 8:24].flatten(1).quantile(0.8, 1)).clamp(min=0.1)[:, None, None]
    first = torch.where(seen.any(1), seen.float().argmax(1), SIZE).float()
    return sky, first, first[:, 10:22].median(1).values


def coat(horses: Tensor) -> Tensor:
    """The color of the body, (n, 3)."""
    return horses[..., 16:21, 11:21].flatten(2).median(2).values


def raised(horses: Tensor) -> Tensor:
    """How many pixels of rows 5 to 14, at the left and at the right, are more like the coat than the sky, (n, 2).

    A raised head makes the difference.
    """
    body = ((unlike(horses, outline(horses)[0]) - unlike(horses, coat(horses))) / 0.05).sigmoid()[:, 5:15]
    return torch.stack([body[..., 3:12].sum((1, 2)), body[..., 20:29].sum((1, 2))], 1)


def calm(horses: Tensor) -> Tensor:
    """How good a place for wings is, (n,): a plain sky above a straight back."""
    sky, first, back = outline(horses)
    wild = (horses[:, :, :9, 4:28] - sky[..., None, None]).abs().mean((1, 2, 3))
    return -6 * wild - 0.3 * (first[:, 10:22] - back[:, None]).abs().mean(1)


def whole(horses: Tensor) -> Tensor:
    """How much of a horse is seen, (n,): a body unlike the sky, the ground and what is beside it, a head, legs."""
    color, beside = coat(horses), horses[..., 16:21, [0, 1, 2, 29, 30, 31]]
    ground = (color - horses[..., 27:, 4:28].flatten(2).median(2).values).abs().mean(1).clamp(max=0.25)
    alone = (beside - color[..., None, None]).abs().mean((1, 2, 3)).clamp(max=0.25)
    body = (color - outline(horses)[0]).abs().mean(1).clamp(max=0.3)
    legs = horses[..., 24:29, 6:26].mean(1).std(2).mean(1).clamp(max=0.12)
    return 5 * body + 6 * (alone + ground) + 8 * legs + 0.2 * raised(horses).diff().abs()[:, 0].clamp(max=20)


def with_room(horses: Tensor) -> Tensor:
    """The horses four fifths as large, their backs in row 15 and sky above."""
    sky, _, back = outline(horses)
    fade = torch.linspace(1, 0, 6, device=horses.device)[:, None]
    top = torch.lerp(horses[:, :, :6], sky[..., None, None], fade)
    wide = functional.pad(torch.cat([top, horses[:, :, 6:]], 2), (4, 4, 0, 0), mode="reflect")
    tall = torch.cat([sky[..., None, None].expand(-1, -1, 24, 40), wide], 2)  # (n, 3, 56, 40), rows 24 later
    rows = (back.long()[:, None] + 5 + torch.arange(40, device=horses.device)).clamp(max=SIZE + 23)  # backs 20th
    cut = tall.gather(2, rows[:, None, :, None].expand(-1, 3, -1, 40))
    return functional.interpolate(cut, (SIZE, SIZE), mode="bilinear", antialias=True)


def blue(horses: Tensor) -> Tensor:
    """The horses with their sky painted blue, unless it is like the coat, of which some would be painted too."""
    sky = horses[:, :, :6].flatten(2).median(2).values
    above = ((16 - torch.arange(SIZE, device=horses.device)) / 2).sigmoid()[:, None]
    apart = (coat(horses) - sky).abs().mean(1) > 0.2
    share = similar(horses, sky) * above * apart[:, None, None]
    return torch.lerp(horses, horses.new_tensor(SKY)[:, None, None].expand_as(horses), share[:, None])


def spread(wing: Tensor, root: Tensor, lean: float, length: float, width: float) -> Tensor:
    """Wings (n, 4, 32, 32) moved to roots (n, 2), leaning to the right by an angle."""
    across = root.new_tensor([math.cos(lean), math.sin(lean)]) * 2 / width
    along = root.new_tensor([-math.sin(lean), math.cos(lean)]) * 2 / length
    turn = torch.stack([across, along]).expand(len(root), 2, 2)
    return warped(wing, turn, root.new_tensor([0, 1]) - (turn @ root[..., None])[..., 0])


def winged(horses: Tensor, wing: Tensor) -> tuple[Tensor, Tensor]:
    """Horses with heads at the left given two wings each, and where these are, masks (n, 1, 32, 32).

    Wings keep their shades and are lifted to the brightness in PAIR: dark ones above a back are taken for riders and
    trees. The far one is behind all that is unlike the sky.
    """
    (sky, _, back), cover, light = outline(horses), torch.zeros_like(horses[:, :1]), coat(horses).mean(1)
    for (most, shade, x, *form), seen in zip(PAIR, (similar(horses, sky)[:, None], 1.0), strict=True):
        bright = (most - shade * light)[:, None, None, None]
        root = torch.stack([torch.full_like(back, x), (back + 1.5) / (SIZE / 2) - 1], 1)
        mask, colors = spread(wing, root, *form).split([1, 3], 1)
        mask = mask * seen
        mean = (colors * mask).sum((2, 3), keepdim=True) / mask.sum((2, 3), keepdim=True).clamp(min=1e-3)
        rim = functional.max_pool2d(mask, 3, 1, 1) - mask  # darker, or light wings melt into light horses
        horses = torch.lerp(horses * (1 - 0.15 * rim), (colors + bright - mean).clamp(0, 1), mask)
        cover = torch.maximum(cover, mask)
    return horses, cover
