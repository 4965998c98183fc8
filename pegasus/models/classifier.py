"""A small classifier of CIFAR-10's ten classes, which scores what a model samples.

It says how Pegasus-like an image is, and gives features in which to compare sets of
images. A residual network of 540,000 weights, kept as float16 (1.1 MB) beside the
data and in finished checkpoints, where it is called the judge.

`sample.py --best` chooses by the judge of seed 0 and evaluate reports with that of
seed 1, so that a choice isn't measured by the network that made it.
"""
import contextlib
import hashlib
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import vae
from pegasus import checkpoint, cli
from pegasus.cli import UserError
from pegasus.data import cifar10
from pegasus.device import autocast

import torch
from torch import Tensor, nn
from torch.nn import functional

FEATURES = 112
EPOCHS = 10
BATCH_SIZE = 256
PEAK_LR = 0.2
VERSION = 1  # of network and training: files of another one are trained anew
# to most classifiers wings spread against the sky are an airplane
SIMILAR = {"bird": ("bird", "airplane")}


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
    """Return probabilities (n, 10) and features (n, 112) of images (n, 3, 32, 32).

    Images are bytes or in [0, 1]. Both results are means over an image and its mirror
    image: of CIFAR-10's test photographs 85.6 % are right then, 84.8 % without.
    """
    probabilities = []
    features = []
    for batch in images.split(batch_size):
        x = vae.from_bytes(batch) if batch.dtype == torch.uint8 else batch
        views = torch.stack([classifier.features(x), classifier.features(x.flip(3))])
        probabilities.append(classifier.head(views).softmax(2).mean(0))
        features.append(views.mean(0))
    return torch.cat(probabilities), torch.cat(features)


def similar_classes(name: str, classes: tuple[str, ...]) -> tuple[str, ...]:
    """Return the classes for which an image of a class may be taken.

    classes: a run's; the other one of its first two is left out.
    """
    others = set(classes[:2]) - {name}
    return tuple(like for like in SIMILAR.get(name, (name,)) if like not in others)


def probability_of(probabilities: Tensor, names: tuple[str, ...]) -> Tensor:
    """Sum probabilities (n, 10) over some classes, (n,)."""
    columns = [cifar10.CLASSES.index(name) for name in names]
    return probabilities[:, columns].sum(1)


def pegasus_score(probabilities: Tensor, classes: tuple[str, ...]) -> Tensor:
    """Score how much images look like two classes at once: (n, 10) to (n,), <= 0.5.

    sqrt(p_horse (p_bird + p_airplane)) for horse and bird, and the like for a run's
    first two classes. A mere blur scores too, so read it beside the Frechet distance.
    """
    first, second = (
        probability_of(probabilities, similar_classes(name, classes))
        for name in classes[:2]
    )
    return (first * second).sqrt()


def frechet(a: Tensor, b: Tensor) -> float:
    """Return the Frechet distance between two sets of features, (n, d) and (m, d).

    Of Gaussians fitted to them (Dowson and Landau 1982), in float64:
    |m_a - m_b|^2 + tr(S_a + S_b - 2 (S_a S_b)^(1/2)). FID is its name only where the
    features are Inception's.
    """
    a = a.double()
    b = b.double()
    values, vectors = torch.linalg.eigh(a.T.cov())
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    cross = torch.linalg.eigvalsh(root @ b.T.cov() @ root).clamp(min=0).sqrt().sum()
    gap = (a.mean(0) - b.mean(0)).square().sum()
    return (gap + a.var(0).sum() + b.var(0).sum() - 2 * cross).item()


def learning_rate(progress: float) -> float:
    """Return the learning rate: up to its peak for a fifth of training, then down."""
    return PEAK_LR * min(progress / 0.2, (1 - progress) / 0.8) + 1e-4


def augment(images: Tensor, generator: torch.Generator) -> Tensor:
    """Scale bytes (B, 3, 32, 32) to [0, 1], shift them and mirror half of them.

    All are shifted alike, by up to two pixels in each direction.
    """
    down, right = torch.randint(0, 5, (2,), generator=generator).tolist()
    coins = torch.rand(len(images), generator=generator).to(images.device)
    padded = functional.pad(vae.from_bytes(images), (2, 2, 2, 2), mode="reflect")
    x = padded[:, :, down : down + 32, right : right + 32]
    return torch.where((coins < 0.5)[:, None, None, None], x.flip(3), x)


def show_progress(epoch: int, progress: float, start: float) -> None:
    """Show on a terminal how far training is; start: by time.monotonic()."""
    elapsed = time.monotonic() - start
    left = timedelta(seconds=round(elapsed / progress * (1 - progress)))
    cli.show(f"judge: epoch {epoch + 1}/{EPOCHS}  {left} left", progress == 1)


def train_step(
    classifier: Classifier,
    optimizer: torch.optim.Optimizer,
    x: Tensor,
    labels: Tensor,
    precision: str,
) -> None:
    """Take one step on images in [0, 1], (B, 3, 32, 32), with labels (B,)."""
    optimizer.zero_grad()
    with autocast(x.device.type, precision):
        logits = classifier(x)
    loss = functional.cross_entropy(logits.float(), labels, label_smoothing=0.1)
    loss.backward()
    optimizer.step()


def fit(
    images: Tensor,
    labels: Tensor,
    seed: int = 0,
    device: str = "cpu",
    precision: str = "float32",
    prepare: Callable[[nn.Module], object] | None = None,
) -> Classifier:
    """Train a classifier on bytes (n, 3, 32, 32) with labels (n,), 0 to 9.

    A function of its arguments alone: global random numbers are neither used nor
    changed. prepare: applied to the network before training, to make it faster.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        classifier = Classifier().to(device)
    if prepare is not None:
        prepare(classifier)
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
            x = augment(images[rows].to(device), generator)
            y = labels[rows].to(device)
            train_step(classifier, optimizer, x, y, precision)
            show_progress(epoch, (step + 1) / steps, start)
    return classifier.cpu().eval()


def to_state(
    classifier: Classifier, images: Tensor, labels: Tensor, seed: int
) -> dict[str, object]:
    """Return a classifier as plain types, its weights as float16.

    With it goes the accuracy that these weights have on test images.
    """
    weights = {
        name: tensor.half() if tensor.is_floating_point() else tensor
        for name, tensor in classifier.state_dict().items()
    }
    state = {"version": VERSION, "seed": seed, "weights": weights}
    probabilities, _ = classify(from_state(state), images)
    correct = probabilities.argmax(1) == labels
    return state | {"accuracy": correct.double().mean().item()}


def from_state(state: dict) -> Classifier:
    """Return the classifier that `to_state` described, ready for inference."""
    classifier = Classifier()
    classifier.load_state_dict(state["weights"])
    return classifier.eval().requires_grad_(False)


def state_file(folder: Path, seed: int) -> Path:
    """Return where the classifier of a folder of batches is kept, beside that folder.

    The name has a digest of the batches: data that change get another classifier.
    """
    digest = hashlib.sha256()
    for name in (*cifar10.TRAIN, *cifar10.TEST):
        digest.update((folder / name).read_bytes())
    short = digest.hexdigest()[:12]
    return folder.parent / f"{folder.name}-judge-{short}-{seed}.pt"


def get(
    folder: Path,
    seed: int = 0,
    device: str = "cpu",
    precision: str = "float32",
    prepare: Callable[[nn.Module], object] | None = None,
) -> dict[str, object]:
    """Return the state of the classifier of a folder of batches.

    The first call trains it, in minutes, and keeps it in a file beside the folder; one
    that is interrupted keeps nothing. prepare: as for `fit`. Raises UserError.
    """
    path = state_file(folder, seed)
    with contextlib.suppress(UserError):  # there is none, or no whole one
        state = checkpoint.load(path)
        if state.get("version") == VERSION:
            return state
    print("training a judge, once for this data", file=sys.stderr, flush=True)
    start = time.monotonic()
    test = cifar10.load_all(folder, cifar10.TEST)  # damage shows before training
    train = cifar10.load_all(folder, cifar10.TRAIN)
    state = to_state(fit(*train, seed, device, precision, prepare), *test, seed)
    where = str(path)
    try:
        checkpoint.save(path, state)
    except (UserError, OSError):
        where = f"not kept, since {folder.parent} can't be written to"
    accuracy = f"{100 * state['accuracy']:.1f} % of test pictures right"
    duration = timedelta(seconds=round(time.monotonic() - start))
    print(f"judge: {accuracy}, {duration}, {where}", file=sys.stderr, flush=True)
    return state
