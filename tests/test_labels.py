"""The classes that a learned prior knows, by number."""
from pegasus.models import labels

import torch

CLASSES = ("horse", "bird")
NAMES = ("horse", "bird", "pegasus", "white horse", "dark horse", "white pegasus", "dark pegasus")


def test_numbers_follow_the_names():
    assert labels.names(CLASSES) == NAMES
    for number, name in enumerate(NAMES):
        coat, _, bare = name.rpartition(" ")
        assert labels.number(CLASSES, bare, coat or "any") == number


def test_class_numbers_of_photographs():
    """The darkest horse is dark, the lightest white; others have their class twice."""
    light = torch.arange(8, dtype=torch.uint8)[:, None, None, None] * 20
    images = light.expand(-1, 3, 32, 32)
    choices = labels.of_photographs(images, torch.tensor([0, 1] * 4), CLASSES)
    assert choices[:, 0].tolist() == [0, 1] * 4
    assert choices[:, 1].tolist() == [4, 1, 0, 1, 0, 1, 3, 1]
    assert choices[:, 2].tolist() == [len(NAMES)] * 8


def test_class_numbers_of_composites():
    """Their class is never hidden."""
    wanted = [[2, 6, 2], [2, 2, 2], [2, 5, 2]]
    assert labels.of_composites(torch.tensor([2, 0, 1]), CLASSES).tolist() == wanted
