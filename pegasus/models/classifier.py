"""The judges: small classifiers of CIFAR-10's ten classes, which score what a model draws.

    python -m pegasus.models.classifier --seed 1    # makes judge 1 again, in 12 minutes

A judge says how much an image looks like a class, and gives features in which to compare
sets of images. It is a residual network of 540,000 weights, kept as float16 (1.1 MB).
Four travel with the program, in judges/: `sample.py --best` chooses by that of CHOOSING,
evaluate reports by those of REPORTING, so that no choice is measured by what made it.
Made again they differ by rounding, which training magnifies: figures compare by one set.
Trained on photographs, they tell synthetic pictures apart less well.
"""
import functools
import time
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import vae
from pegasus import checkpoint, cli, streams
from pegasus.cli import UserError, option
from pegasus.data import cifar10, datasets
from pegasus.files import replace_file

import torch
from torch import Tensor, nn
from torch.nn import functional

FEATURES = 112
EPOCHS = 10
BATCH_SIZE = 256
PEAK_LR = 0.2
CHOOSING = 0  # seeds of the judges
REPORTING = (1, 2, 3)
FOLDER = Path(__file__).with_name("judges")


@dataclass(frozen=True)
class ClassifierConfig:
    seed: int = option(0, "decides everything random; names the file", least=0)
    data: str = option("auto", "photographs of all ten classes, as for train.py")
    out: str = option("", "file to write; by default the judge that is there")


def conv_norm_relu(inputs: int, outputs: int) -> list[nn.Module]:
    """Return a 3 x 3 convolution, a batch norm and a ReLU."""
    return [
        nn.Conv2d(inputs, outputs, 3, padding=1, bias=False),
        nn.BatchNorm2d(outputs),
        nn.ReLU(inplace=True),
    ]


class ResidualBlock(nn.Module):
    """relu(x + norm(conv(relu(norm(conv(x)))))), (B, channels, h, w)."""

    def __init__(self, channels: int):
        super().__init__()
        first = conv_norm_relu(channels, channels)
        second = conv_norm_relu(channels, channels)
        self.body = nn.Sequential(*first, *second[:2])

    def forward(self, x: Tensor) -> Tensor:
        return functional.relu_(x + self.body(x))


class Classifier(nn.Module):
    """Images (B, 3, 32, 32) in [0, 1] to logits of CIFAR-10's ten classes, (B, 10)."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(
            nn.PixelUnshuffle(2),  # (B, 12, 16, 16)
            *conv_norm_relu(12, 48),
            *conv_norm_relu(48, 96),
            nn.MaxPool2d(2),  # (B, 96, 8, 8)
            ResidualBlock(96),
            *conv_norm_relu(96, FEATURES),
            nn.MaxPool2d(2),  # (B, 112, 4, 4)
            ResidualBlock(FEATURES),
            nn.AdaptiveMaxPool2d(1),
            nn.Flatten(),
        )
        self.head = nn.Linear(FEATURES, len(cifar10.CLASSES))
        self.to(memory_format=torch.channels_last)

    def features(self, x: Tensor) -> Tensor:
        """Map images (B, 3, 32, 32) in [0, 1] to features (B, 112)."""
        x = 4 * x - 1.9  # about zero mean and unit variance
        return self.body(x.contiguous(memory_format=torch.channels_last))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x))


@torch.no_grad()
def classify(
    classifier: Classifier, images: Tensor, batch_size: int = 100
) -> tuple[Tensor, Tensor]:
    """Return probabilities (n, 10) and features (n, 112) of images (n, 3, h, w).

    Images are bytes or in [0, 1], looked at in 32 x 32. Both results are means over an
    image and its mirror image: of CIFAR-10's test photographs 85.6 % are right then, 84.8 %
    without.
    """
    probabilities = []
    features = []
    for batch in images.split(batch_size):
        x = vae.from_bytes(batch) if batch.dtype == torch.uint8 else batch
        x = vae.resize(x, 32)
        views = torch.stack([classifier.features(x), classifier.features(x.flip(3))])
        probabilities.append(classifier.head(views).softmax(2).mean(0))
        features.append(views.mean(0))
    return torch.cat(probabilities), torch.cat(features)


def knows(name: str) -> bool:
    """Return whether classifiers know a class."""
    return name in cifar10.CLASSES


def probability_of(probabilities: Tensor, name: str) -> Tensor:
    """Return the probabilities (n,) of a class, of (n, 10)."""
    return probabilities[:, cifar10.CLASSES.index(name)]


def learning_rate(progress: float) -> float:
    """Return the learning rate: up to its peak for a fifth of training, then down."""
    return PEAK_LR * min(progress / 0.2, (1 - progress) / 0.8) + 1e-4


def augment(images: Tensor, generator: torch.Generator) -> Tensor:
    """Scale bytes (B, 3, 32, 32) to [0, 1], shift them and mirror half of them.

    All are shifted alike, by up to two pixels in each direction.
    """
    down, right = torch.randint(0, 5, (2,), generator=generator).tolist()
    coins = torch.rand(len(images), generator=generator)
    padded = functional.pad(vae.from_bytes(images), (2, 2, 2, 2), mode="reflect")
    x = padded[:, :, down : down + 32, right : right + 32]
    return torch.where((coins < 0.5)[:, None, None, None], x.flip(3), x)


def show_progress(epoch: int, progress: float, start: float) -> None:
    """Show on a terminal how far training is; start: by time.monotonic()."""
    elapsed = time.monotonic() - start
    left = timedelta(seconds=round(elapsed / progress * (1 - progress)))
    streams.show(f"judge: epoch {epoch + 1}/{EPOCHS}  {left} left", progress == 1)


def train_step(
    classifier: Classifier, optimizer: torch.optim.Optimizer, x: Tensor, labels: Tensor
) -> None:
    """Take one step on images in [0, 1], (B, 3, 32, 32), with labels (B,)."""
    optimizer.zero_grad()
    logits = classifier(x)
    functional.cross_entropy(logits, labels, label_smoothing=0.1).backward()
    optimizer.step()


def fit(images: Tensor, labels: Tensor, seed: int = 0) -> Classifier:
    """Train a classifier on bytes (n, 3, 32, 32) with labels (n,), 0 to 9.

    A function of its arguments alone: global random numbers are neither used nor
    changed.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        classifier = Classifier()
    optimizer = torch.optim.SGD(
        classifier.parameters(), momentum=0.9, nesterov=True, weight_decay=5e-4
    )
    generator = torch.Generator().manual_seed(seed)
    batch_size = min(BATCH_SIZE, len(images) // 8 + 1)
    epoch_steps = len(images) // batch_size  # leaves out a different few each time
    steps = EPOCHS * epoch_steps
    start = time.monotonic()
    for epoch in range(EPOCHS):
        batches = torch.randperm(len(images), generator=generator).split(batch_size)
        for step, rows in enumerate(batches[:epoch_steps], epoch * epoch_steps):
            optimizer.param_groups[0]["lr"] = learning_rate(step / steps)
            train_step(classifier, optimizer, augment(images[rows], generator), labels[rows])
            show_progress(epoch, (step + 1) / steps, start)
    return classifier.eval()


def to_state(
    classifier: Classifier, images: Tensor, labels: Tensor, seed: int
) -> dict[str, object]:
    """Return a classifier as plain types, its weights as float16.

    With it goes the accuracy that these weights have on test images.
    """
    weights = checkpoint.to_dtype(classifier.state_dict(), torch.half)
    state = {"seed": seed, "weights": weights}
    probabilities, _ = classify(from_state(state), images)
    correct = probabilities.argmax(1) == labels
    return state | {"accuracy": correct.double().mean().item()}


def from_state(state: dict) -> Classifier:
    """Return the classifier that `to_state` described, ready for inference."""
    classifier = Classifier()
    classifier.load_state_dict(state["weights"])
    return classifier.eval().requires_grad_(False)


@functools.cache
def load(seed: int) -> Classifier:
    """Return a judge that travels with the program. Raises UserError where it is missing."""
    path = FOLDER / f"{seed}.pt"
    if not path.exists():
        raise UserError(
            f"{path}: no such judge; python -m pegasus.models.classifier --seed {seed} "
            "makes it, in 12 minutes"
        )
    return from_state(torch.load(path, weights_only=True))


def main(argv: list[str] | None = None) -> None:
    config, _ = cli.parse(ClassifierConfig, argv, __doc__)
    out = Path(config.out or FOLDER / f"{config.seed}.pt")
    if not out.parent.is_dir():
        raise UserError(f"--out: no folder {out.parent}; choose another place")
    folder = datasets.locate(config.data)
    test = cifar10.load_all(folder, cifar10.TEST)  # damage shows before training
    train = cifar10.load_all(folder, cifar10.TRAIN)
    if len(train[1].unique()) < len(cifar10.CLASSES):
        raise UserError(
            f"--data: {folder} has no pictures of some of CIFAR-10's ten classes, which a "
            "judge tells apart; use its photographs"
        )
    state = to_state(fit(*train, config.seed), *test, config.seed)
    with replace_file(out) as temporary:
        torch.save(state, temporary)
    print(f"{out}: {state['accuracy']:.1%} of the test photographs right")


if __name__ == "__main__":
    cli.run(main)
