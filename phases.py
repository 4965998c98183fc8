"""The two phases of a run, and what a step of each minimises: the autoencoder's -ELBO, then the prior's flow matching.

Each phase has `optimizer`, `schedule` and `lr`, `max_norm` (to which gradients are clipped), `first` and `epochs` (its
part of the run's), `backward` (gradients of some rows of a batch, and sums of their losses), `purposes` (of its
seeds), `metrics` (for the terminal) and `end_epoch` (tests, and gives the log's columns).
"""
import contextlib
import ctypes

import density
import fused
import prior
import recipe
import reparam
import source
import vae
from group import Group
from recipe import Options

import torch
from torch import Tensor

ORDER, FLIP, NOISE, TEST, START, TIME, LABEL = range(7)  # purposes of the seeds derived from the run's
SUMS = 3  # how many sums a phase keeps of an epoch


def epoch_order(seed: int, epoch: int, n: int) -> Tensor:
    """The permutation of n pictures, a function of (seed, epoch) alone."""
    return torch.randperm(n, generator=torch.Generator().manual_seed(reparam.derive_seed(seed, epoch, ORDER)))


def coins(seed: int, epoch: int, n: int) -> Tensor:
    """n fair coins, bool (n,): whether the epoch's k-th picture is mirrored."""
    return reparam.words(n, 1, torch.tensor(reparam.derive_seed(seed, epoch, FLIP)))[:, 0, 0] % 2 == 1


def gather(images: Tensor, rows: Tensor, mirrored: Tensor | None) -> Tensor:
    """Some images (n, 3, 32, 32) of bytes as a batch in [0, 1], some of them mirrored."""
    x = images.flatten(1).index_select(0, rows).view(-1, *vae.IMAGE)
    if mirrored is not None:
        words = torch.where(mirrored[:, None, None, None], x.flip(3).view(torch.int64), x.view(torch.int64))
        x = words.view(torch.uint8)  # eight bytes at once: bytes one by one take longer than all else here
    return vae.from_bytes(x)


def autocast(chosen: Options) -> torch.autocast:
    return torch.autocast(chosen.device, torch.bfloat16, enabled=chosen.precision == "bfloat16")


def to_device(numbers: list, device: str) -> Tensor:
    """A tensor on a device, copied without waiting for what a GPU still has to do."""
    return torch.tensor(numbers, pin_memory=device == "cuda").to(device, non_blocking=True)


def purpose_seeds(chosen: Options, step: int, *purposes: int) -> Tensor:
    """The seeds of some purposes at one step of a run, int64, where the run computes."""
    return to_device([reparam.derive_seed(chosen.seed, step, purpose) for purpose in purposes], chosen.device)


def pace(phase: "Autoencoder | Prior", done: int, steps: int) -> Tensor:
    """Learning rate and progress, 0 to 1, of a phase when a run has done so many steps, `steps` an epoch."""
    progress = (done - phase.first * steps) / (phase.epochs * steps)
    return to_device([recipe.learning_rate(phase.schedule, phase.lr, progress), progress], phase.options.device)


def forward_batch(chosen: Options, pictures: int) -> int:
    """How many pictures to take at once without gradients: `pictures`; on a GPU 1000, which take hardly longer."""
    return 1000 if chosen.device == "cuda" else pictures


def trim() -> None:
    """Give the system back what is free: after many steps the C library, if it is glibc, keeps 200 MB of pieces."""
    with contextlib.suppress(AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


class Autoencoder:
    """The first phase: encoder and decoder, from photographs."""
    name, flag, max_norm, purposes = "autoencoder", "--lr", None, (NOISE,)

    def __init__(self, chosen: Options, data: source.Pictures, model: vae.VAE, workers: Group):
        self.options, self.model, self.workers = chosen, model, workers
        self.schedule, self.lr = chosen.schedule, chosen.lr
        self.images, self.test_images = data.images.to(chosen.device), data.test_images.to(chosen.device)
        self.first, self.epochs = 0, recipe.split(chosen)
        self.optimizer = fused.Adam(model, chosen.precision == "bfloat16")

    def backward(self, rows: Tensor, mirrored: Tensor | None, batch: int, first: int, seeds: Tensor,
                 progress: Tensor) -> Tensor:
        """Gradients from this process's rows of a batch of `batch` photographs, its rows from `first` on.

        progress: of the phase, 0 to 1. Returns the rows' sums of distortion, rate and squared error. The variance is
        the mean squared error of all processes' rows: by its own, each would train another objective.
        """
        x = gather(self.images, rows, mirrored)
        with autocast(self.options):
            # convolutions take no empty batch: a process without rows computes one and counts none
            here = x if len(x) else x.new_zeros(1, *vae.IMAGE)
            terms = vae.Terms(*(term[:len(x)] for term in self.optimizer.trained(here, seeds, first, progress)))
        sse = self.workers.total(terms.sse.detach().sum())
        distortion = self.model.distortion(terms.sse, sse / (batch * vae.PIXELS))
        ((distortion + self.options.beta * terms.rate).sum() / batch).backward()
        return torch.stack([distortion.detach().sum(), terms.rate.detach().sum(), terms.sse.detach().sum()])

    def metrics(self, means: list[float]) -> dict[str, float]:
        """What the progress line shows, of an epoch's means over its images."""
        distortion, rate, _ = means
        return {"loss": distortion + self.options.beta * rate, "rate": rate, "distortion": distortion}

    @torch.no_grad()
    def end_epoch(self, means: list[float]) -> dict[str, float]:
        """Set the variance to the epoch's mean squared error, and test; the log's columns."""
        variance = self.model.variance.fill_(means[2] / vae.PIXELS).double()
        share, totals = self.workers.share(len(self.test_images)), self.test_images.new_zeros(2, dtype=torch.float64)
        seed = purpose_seeds(Options(device=self.options.device), 0, TEST)  # of seed 0: all runs test alike
        size = forward_batch(self.options, 500 if self.options.arch == "mlp" else 128)  # 64 KB a picture and layer
        for first in range(share.start, share.stop, size):
            part = self.test_images[first:min(first + size, share.stop)]
            with autocast(self.options):
                terms = self.model(vae.from_bytes(part), seed, first)
            totals += torch.stack([terms.rate.sum(), terms.sse.sum()])
        rate, sse = self.workers.total(totals) / len(self.test_images)
        distortion = self.model.distortion(sse, variance)
        tested = {"test_loss": distortion + self.options.beta * rate, "test_rate": rate, "test_distortion": distortion,
                  "test_sse": sse, "bits_per_dim": vae.bits_per_dim(sse, rate, variance)}
        return ({f"train_{name}": value for name, value in self.metrics(means).items()}
                | {name: value.item() for name, value in tested.items()})


class Prior:
    """The second phase: flow matching in the latent space of the autoencoder, whose weights are frozen."""
    name, flag, max_norm, purposes = "prior", "--prior-lr", 1.0, (START, NOISE, TIME, LABEL)

    def __init__(self, chosen: Options, data: source.Pictures, model: vae.VAE, learned: prior.Learned, workers: Group):
        self.options, self.model, self.learned, self.workers = chosen, model, learned, workers
        self.schedule, self.lr = "onecycle", chosen.prior_lr
        self.first, self.epochs = recipe.split(chosen), chosen.epochs - recipe.split(chosen)
        self.optimizer = fused.Adam(learned.velocity, chosen.precision == "bfloat16")
        self.mu, self.logvar = self.posteriors(data.images, chosen.flip)
        self.labels = density.labels_and_coats(data.images, data.labels, data.classes).to(chosen.device)
        self.test_mu, self.test_logvar = self.posteriors(data.test_images)
        self.test_labels = data.test_labels.to(chosen.device)
        if not learned.mean.any():  # else as it was when the phase began
            learned.measure(self.mu, self.logvar)

    @torch.no_grad()
    def posteriors(self, images: Tensor, flip: bool = False) -> tuple[Tensor, Tensor]:
        """Mean and logvar (n, latent) of images of bytes; with `flip` (2n, latent), mirror images in the second half.

        float16, and written in place: 60,000 images would take a gigabyte otherwise.
        """
        both = torch.empty(2, 1 + flip, len(images), self.model.latent, dtype=torch.half, device=self.options.device)
        size = forward_batch(self.options, 100)
        for first in range(0, len(images), size):
            part = images[first:first + size].to(self.options.device)
            for view in range(1 + flip):
                with autocast(self.options):
                    found = self.model.encode(vae.from_bytes(part.flip(3) if view else part))
                both[:, view, first:first + size] = torch.stack(found)
        return both.flatten(1, 2).unbind()

    def loss(self, velocity: prior.Velocity, mu: Tensor, logvar: Tensor, labels: Tensor, seeds: Tensor,
             first: int) -> Tensor:
        """Flow matching's squared error of each latent, mean over its dimensions, (B,)."""
        start, end, clock = seeds
        z1 = self.learned.normalised(reparam.reparameterize_kl(mu.float(), logvar.float(), end, first)[0])
        z0 = reparam.normals(*z1.shape, start, first)
        t = reparam.normals(len(z1), 1, clock, first).sigmoid()
        with autocast(self.options):
            v = velocity(torch.lerp(z0, z1, t), t[:, 0], labels)
        return (v - (z1 - z0)).square().mean(1)

    def backward(self, rows: Tensor, mirrored: Tensor | None, batch: int, first: int, seeds: Tensor,
                 _progress: Tensor) -> Tensor:
        """As `Autoencoder.backward`; returns the sum of squared errors."""
        here = rows if len(rows) else rows.new_zeros(1)
        at = here if mirrored is None or not len(rows) else here + mirrored * (len(self.mu) // 2)
        labels = prior.drop_labels(self.labels[here], self.learned.none, seeds[3], first)
        loss = self.loss(self.optimizer.trained, self.mu[at], self.logvar[at], labels, seeds[:3], first)[:len(rows)]
        weights = prior.label_weights(labels, self.labels[here])[:len(rows)]
        ((weights * loss).sum() / batch).backward()
        return torch.stack([loss.detach().sum(), *loss.new_zeros(SUMS - 1)])

    def metrics(self, means: list[float]) -> dict[str, float]:
        return {"prior loss": means[0]}

    @torch.no_grad()
    def end_epoch(self, means: list[float]) -> dict[str, float]:
        """Test the averaged weights; the log's columns."""
        share, total = self.workers.share(len(self.test_mu)), self.test_mu.new_zeros(1, dtype=torch.float64)
        seeds = purpose_seeds(Options(device=self.options.device), 0, START, NOISE, TIME)
        size = forward_batch(self.options, 100)  # on a CPU less room than a step of training takes
        for first in range(share.start, share.stop, size):
            part = slice(first, min(first + size, share.stop))
            total += self.loss(self.learned.average, self.test_mu[part], self.test_logvar[part], self.test_labels[part],
                               seeds, first).sum()
        return {"train_loss": means[0], "test_loss": (self.workers.total(total) / len(self.test_mu)).item()}
