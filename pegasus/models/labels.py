"""The classes that a learned prior knows, by number, and the pictures that belong to them.

Behind a run's own classes come "pegasus", of composites (composites.py), and coats: white
and dark ones of the first class and of the composites.
"""
import torch
from torch import Tensor

PEGASUS = "pegasus"
COATS = ("white", "dark")


def with_coat(name: str, coat: str) -> str:
    """Return a class's name with a coat, or without one for "any"."""
    return name if coat == "any" else f"{coat} {name}"


def names(classes: tuple[str, ...]) -> tuple[str, ...]:
    """Return the names of all classes of a prior, in the order of their numbers."""
    coats = [with_coat(name, coat) for name in (classes[0], PEGASUS) for coat in COATS]
    return (*classes, PEGASUS, *coats)


def number(classes: tuple[str, ...], name: str, coat: str = "any") -> int:
    """Return the number of a class with a coat."""
    return names(classes).index(with_coat(name, coat))


def center_brightness(images: Tensor) -> Tensor:
    """Return the mean of the central pixels, where most bodies are, float32 (n,).

    Coats of photographs go by it; those of composites, and `--best`, by
    `composites.coat_scores`, for which yellow is not white.
    """
    unit = images.shape[-1] / 32
    rows = slice(round(10 * unit), round(22 * unit))
    columns = slice(round(8 * unit), round(24 * unit))
    return images[..., rows, columns].float().flatten(1).mean(1)


def class_rows(images: Tensor, labels: Tensor, classes: tuple[str, ...]) -> dict[str, Tensor]:
    """Return the rows (m,) of each class and of the first class's coats, on the CPU.

    A coat is the lightest or darkest quarter.
    """
    rows = {}
    for position, name in enumerate(classes):
        rows[name] = (labels == position).cpu().nonzero()[:, 0]
    first = rows[classes[0]]
    light = center_brightness(images[first.to(images.device)]).cpu()
    order = first[light.argsort(stable=True)]
    quarter = max(len(order) // 4, 1)
    rows[with_coat(classes[0], "white")] = order[-quarter:].sort().values
    rows[with_coat(classes[0], "dark")] = order[:quarter].sort().values
    return rows


def of_photographs(images: Tensor, labels: Tensor, classes: tuple[str, ...]) -> Tensor:
    """Return three class numbers an image, int64 (n, 3).

    Its class, its coat, and "any": what it is called where the class is hidden. An image
    without a coat has its class twice.
    """
    unknown = torch.full_like(labels, len(names(classes)))
    choices = torch.stack([labels, labels, unknown], 1)
    rows = class_rows(images, labels, classes)
    for coat in COATS:
        choices[rows[with_coat(classes[0], coat)], 1] = number(classes, classes[0], coat)
    return choices


def of_composites(coats: Tensor, classes: tuple[str, ...]) -> Tensor:
    """Return three class numbers a composite, as `of_photographs`.

    coats: 0 for none, else behind its position in COATS, (n,). The class is never hidden:
    "any" stands for photographs.
    """
    numbers = [number(classes, PEGASUS, coat) for coat in ("any", *COATS)]
    with_coats = torch.tensor(numbers)[coats]
    name = torch.full_like(coats, numbers[0])
    return torch.stack([name, with_coats, name], 1)
