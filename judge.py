"""A small classifier of all classes of the data: how Pegasus-like a picture is, and features to compare sets of them.

A residual network of 540,000 weights, kept as float16 (1.1 MB) beside the data and in finished checkpoints. `sample.py
--best` chooses by the one of seed 0, `evaluate.py` reports by another: who chooses is not asked how good the choice is.
"""
import contextlib
import hashlib
import sys
import time
from datetime import timedelta
from pathlib import Path

import options
import checkpoint
import cifar10
import fused
from options import Fault

import torch
from torch import Tensor, nn
from torch.nn import functional

FEATURES, EPOCHS, BATCH, PEAK = 112, 10, 256, 0.2
VERSION = 1  # of network and training: what an earlier one made is made anew
LIKE = {"bird": ("bird", "airplane")}  # wings spread against the sky are an airplane to most classifiers


def layers(before: int, after: int) -> list[nn.Module]:
    return [fused.Convolution(before, after, bias=False), nn.BatchNorm2d(after), nn.ReLU(inplace=True)]


class Residual(nn.Module):
    """relu(x + norm(conv(relu(norm(conv(x)))))), (B, channels, h, w)."""

    def __init__(self, channels: int):
        super().__init__()
        self.body = nn.Sequential(*layers(channels, channels), *layers(channels, channels)[:2])

    def forward(self, x: Tensor) -> Tensor:
        return functional.relu_(x + self.body(x))


class Judge(nn.Module):
    """Images (B, 3, 32, 32) in [0, 1] to logits of CIFAR-10's ten classes (B, 10)."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.PixelUnshuffle(2), *layers(12, 48), *layers(48, 96), nn.MaxPool2d(2),
                                  Residual(96), *layers(96, FEATURES), nn.MaxPool2d(2), Residual(FEATURES),
                                  nn.AdaptiveMaxPool2d(1), nn.Flatten())
        self.head = nn.Linear(FEATURES, len(cifar10.CLASSES))
        self.to(memory_format=torch.channels_last)

    def features(self, x: Tensor) -> Tensor:
        """Images (B, 3, 32, 32) in [0, 1] to (B, 112)."""
        return self.body((4 * x - 1.9).contiguous(memory_format=torch.channels_last))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x))


@torch.no_grad()
def classify(judge: Judge, images: Tensor, batch_size: int = 100) -> tuple[Tensor, Tensor]:
    """Probabilities (n, 10) and features (n, 112) of images (n, 3, 32, 32), bytes or in [0, 1].

    Both are means over an image and its mirror image: of CIFAR-10's test photographs 85.6 % are right, not 84.8. A
    hundred at a time take less memory than a step of training.
    """
    rows = []
    for part in images.split(batch_size):
        x = part / 255 if part.dtype == torch.uint8 else part
        features = torch.stack([judge.features(x), judge.features(x.flip(3))])
        rows.append((judge.head(features).softmax(2).mean(0), features.mean(0)))
    return tuple(torch.cat(part) for part in zip(*rows, strict=True))


def alike(name: str, classes: tuple[str, ...]) -> tuple[str, ...]:
    """What a picture of one of a run's first two classes may be taken for, the other of them left out."""
    return tuple(like for like in LIKE.get(name, (name,)) if like == name or like not in classes[:2])


def pegasus_score(probabilities: Tensor, classes: tuple[str, ...]) -> Tensor:
    """sqrt(p_horse (p_bird + p_airplane)), or what it is for a run's first two classes: (n, 10) to (n,), 0.5 at most.

    A mere blur scores too, so read it beside the Frechet distance.
    """
    sides = [[cifar10.CLASSES.index(like) for like in alike(name, classes)] for name in classes[:2]]
    first, second = (probabilities[:, side].sum(1) for side in sides)
    return (first * second).sqrt()


def frechet(a: Tensor, b: Tensor) -> float:
    """The Frechet distance between Gaussians fitted to two sets of features, (n, d) and (m, d).

    |m_a - m_b|^2 + tr(S_a + S_b - 2 (S_a S_b)^(1/2)) (Dowson and Landau 1982), in float64. It is called FID only when
    the features are Inception's.
    """
    a, b = a.double(), b.double()
    values, vectors = torch.linalg.eigh(a.T.cov())
    half = vectors * values.clamp(min=0).sqrt() @ vectors.T
    cross = torch.linalg.eigvalsh(half @ b.T.cov() @ half).clamp(min=0).sqrt().sum()
    gap = (a.mean(0) - b.mean(0)).square().sum()
    return (gap + a.var(0).sum() + b.var(0).sum() - 2 * cross).item()


def learning_rate(progress: float) -> float:
    """A fifth of the training up to the peak, then down on a straight line."""
    return PEAK * min(progress / 0.2, (1 - progress) / 0.8) + 1e-4


def augment(images: Tensor, generator: torch.Generator) -> Tensor:
    """Bytes (B, 3, 32, 32) to [0, 1], shifted by up to two pixels together, half of them mirrored."""
    down, right = torch.randint(0, 5, (2,), generator=generator).tolist()
    mirrored = torch.rand(len(images), generator=generator).to(images.device) < 0.5
    x = functional.pad(images.float() / 255, (2, 2, 2, 2), mode="reflect")[:, :, down:down + 32, right:right + 32]
    return torch.where(mirrored[:, None, None, None], x.flip(3), x)


@torch.no_grad()
def descend(weights: list[Tensor], momentum: list[Tensor], lr: float, keep: float = 0.9, decay: float = 5e-4) -> None:
    """One step of gradient descent with Nesterov's momentum and weight decay (Sutskever et al. 2013), in place.

    Bit for bit that of torch.optim.SGD, whose first use imports torch's compiler: 71 MB, and over a second.
    """
    for weight, mean in zip(weights, momentum, strict=True):
        gradient = weight.grad.add(weight, alpha=decay)
        mean.mul_(keep).add_(gradient)
        weight.add_(gradient.add(mean, alpha=keep), alpha=-lr)


def fit(images: Tensor | cifar10.Photographs, labels: Tensor, seed: int = 0, device: str = "cpu",
        precision: str = "float32") -> Judge:
    """A judge trained on bytes (n, 3, 32, 32) with labels (n,), 0 to 9; a function of these arguments alone.

    The global random numbers stay as they were.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        judge = Judge().to(device)
    generator, begun = torch.Generator().manual_seed(seed), time.monotonic()
    weights = list(judge.parameters())
    momentum = [torch.zeros_like(weight) for weight in weights]
    autocast = torch.autocast(device, torch.bfloat16, enabled=precision == "bfloat16")
    size = min(BATCH, len(images) // 8 + 1)
    each = len(images) // size  # steps an epoch, which leaves out a different few each time
    for step in range(EPOCHS * each):
        if step % each == 0:
            rows = torch.randperm(len(images), generator=generator).split(size)
        row = rows[step % each]
        x = augment(images[row].to(device), generator)
        with autocast:
            logits = judge(x)
        loss = functional.cross_entropy(logits.float(), labels[row].to(device), label_smoothing=0.1)
        judge.zero_grad()
        loss.backward()
        descend(weights, momentum, learning_rate(step / (EPOCHS * each)))
        done = (step + 1) / (EPOCHS * each)
        left = timedelta(seconds=round((time.monotonic() - begun) / done * (1 - done)))
        options.show(f"judge: epoch {step // each + 1}/{EPOCHS}  {left} left", done == 1)
    return judge.cpu().eval()


def to_state(judge: Judge, images: Tensor, labels: Tensor, seed: int) -> dict:
    """A judge as plain types, its weights as float16, with its accuracy, as float16, on test photographs."""
    weights = {name: value.half() if value.is_floating_point() else value for name, value in judge.state_dict().items()}
    state = {"version": VERSION, "seed": seed, "weights": weights}
    right = classify(from_state(state), images)[0].argmax(1) == labels
    return state | {"accuracy": right.double().mean().item()}


def from_state(state: dict) -> Judge:
    """The judge in what `to_state` made, ready to be asked."""
    judge = Judge()
    judge.load_state_dict(state["weights"])
    return judge.eval().requires_grad_(False)


def get(folder: Path, seed: int = 0, device: str = "cpu", precision: str = "float32") -> dict:
    """The state of the judge of a folder of batches: trained at the first call, then kept in a file beside the folder.

    It goes by what the batches hold, so data that change get a judge of their own. An interruption keeps nothing.
    """
    digest = hashlib.sha256()
    for name in (*cifar10.TRAIN, *cifar10.TEST):
        digest.update((folder / name).read_bytes())
    path = folder.parent / f"{folder.name}-judge-{digest.hexdigest()[:12]}-{seed}.pt"
    with contextlib.suppress(Fault):  # none is there that is whole
        if (found := checkpoint.load(path)).get("version") == VERSION:
            return found
    print("training a judge, once for this data", file=sys.stderr, flush=True)
    begun, all_classes = time.monotonic(), torch.arange(len(cifar10.CLASSES))
    cifar10.collect(folder, cifar10.TEST, all_classes)  # a damaged file is told before minutes of training
    photographs = cifar10.Photographs(folder, cifar10.TRAIN)
    judge = fit(photographs, photographs.labels, seed, device, precision)
    state = to_state(judge, *cifar10.collect(folder, cifar10.TEST, all_classes), seed)
    where = path
    try:
        checkpoint.save(path, state)
    except (Fault, OSError):
        where = f"not kept, since {folder.parent} can't be written to"
    print(f"judge: {100 * state['accuracy']:.1f} % of test pictures right, "
          f"{timedelta(seconds=round(time.monotonic() - begun))}, {where}", file=sys.stderr, flush=True)
    return state
