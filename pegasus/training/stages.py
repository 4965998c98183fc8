"""The two stages of a run: the autoencoder's -ELBO, then the prior's flow matching.

A stage gives the loss of a batch and tests what was trained; train.py owns the loop.
"""
from typing import NamedTuple

import reparam
import vae
from pegasus import device
from pegasus.data.datasets import Dataset
from pegasus.models import flow_prior, gaussians
from pegasus.models.flow_prior import FlowPrior
from pegasus.training.config import TrainConfig, learning_rate, split
from pegasus.training.distributed import Workers
from vae import VAE

import torch
from torch import Tensor, nn

# purposes of the seeds derived from the run's
ORDER, FLIP, NOISE, TEST, START, TIME, LABEL = range(7)
SUMS = 3  # sums over an epoch's images that are kept


class Batch(NamedTuple):
    """The images of a step, or one process's part of them."""
    rows: Tensor  # of the training images, int64 (B,)
    mirrored: Tensor | None  # which of them are mirrored, bool (B,)
    size: int  # images in all processes' rows together
    row_offset: int  # of the part's first row
    seeds: Tensor  # one for each of the stage's purposes
    progress: Tensor  # of the stage, 0 to 1

    def part(self, share: slice) -> "Batch":
        """Return the rows of one process."""
        mirrored = None if self.mirrored is None else self.mirrored[share]
        return self._replace(
            rows=self.rows[share], mirrored=mirrored, row_offset=share.start
        )


def epoch_order(seed: int, epoch: int, n: int) -> Tensor:
    """Return the permutation of n images, a function of (seed, epoch) alone."""
    generator = torch.Generator()
    generator.manual_seed(reparam.derive_seed(seed, epoch, ORDER))
    return torch.randperm(n, generator=generator)


def epoch_flips(seed: int, epoch: int, n: int) -> Tensor:
    """Return whether the epoch's k-th image is mirrored, fair coins, bool (n,)."""
    flip_seed = torch.tensor(reparam.derive_seed(seed, epoch, FLIP))
    return reparam.words(n, 1, flip_seed)[:, 0, 0] % 2 == 1


def gather(images: Tensor, rows: Tensor, mirrored: Tensor | None) -> Tensor:
    """Return some of the images (n, 3, 32, 32) of bytes in [0, 1], some mirrored."""
    x = images.flatten(1).index_select(0, rows).view(-1, *vae.IMAGE)
    if mirrored is not None:
        # eight bytes at once: bytes one by one take longer than all else here
        flipped = x.flip(3).view(torch.int64)
        choice = mirrored[:, None, None, None]
        x = torch.where(choice, flipped, x.view(torch.int64)).view(torch.uint8)
    return vae.from_bytes(x)


def derived_seeds(seed: int, step: int, purposes: tuple[int, ...], place: str) -> Tensor:
    """Return the seeds of some purposes at one step of a run, int64, on a device."""
    seeds = [reparam.derive_seed(seed, step, purpose) for purpose in purposes]
    return device.to_device(seeds, place)


class AutoencoderStage:
    """Encoder and decoder, trained on photographs."""

    name = "autoencoder"
    lr_flag = "--lr"
    max_norm = None  # to which gradients are clipped
    purposes = (NOISE,)

    def __init__(self, config: TrainConfig, data: Dataset, model: VAE, workers: Workers):
        self.config = config
        self.data = data
        self.network = model
        self.workers = workers
        self.images = data.images.to(config.device)
        self.test_images = data.test_images.to(config.device)
        self.first_epoch = 0
        self.last_epoch = split(config)

    def learning_rate(self, progress: float) -> float:
        return learning_rate(self.config.schedule, self.config.lr, progress)

    def loss(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return this process's part of the loss, and sums over its rows.

        The sums are of distortion, rate and squared error. The variance is the mean
        squared error of all processes' rows: by its own, each would train another
        objective.
        """
        terms = self.forward(batch)
        sse = self.workers.sum(terms.sse.detach().sum())
        variance = sse / (batch.size * vae.PIXELS)
        distortion = self.network.distortion(terms.sse, variance)
        loss = (distortion + self.config.beta * terms.rate).sum() / batch.size
        parts = (distortion, terms.rate, terms.sse)
        return loss, torch.stack([part.detach().sum() for part in parts])

    def forward(self, batch: Batch) -> vae.Terms:
        x = gather(self.images, batch.rows, batch.mirrored)
        if len(x) == 0:  # convolutions take no empty batch: compute one, count none
            x = x.new_zeros(1, *vae.IMAGE)
        with device.autocast(self.config.device, self.config.precision):
            terms = self.network(x, batch.seeds, batch.row_offset, batch.progress)
        n = len(batch.rows)
        return vae.Terms(terms.rate[:n], terms.sse[:n])

    def after_step(self, steps: Tensor) -> None:
        """Do nothing: no average of the weights is kept."""

    def metrics(self, means: list[float]) -> dict[str, float]:
        """Return what the progress line shows, of means over images."""
        distortion, rate, _ = means
        loss = distortion + self.config.beta * rate
        return {"loss": loss, "rate": rate, "distortion": distortion}

    @torch.no_grad()
    def test(self, means: list[float]) -> dict[str, float]:
        """Set the pixel variance to the epoch's mean squared error, and test.

        Returns columns of the log.
        """
        variance = self.network.variance.fill_(means[2] / vae.PIXELS).double()
        rate, sse = self.test_terms()
        distortion = self.network.distortion(sse, variance)
        columns = {f"train_{name}": value for name, value in self.metrics(means).items()}
        columns["test_loss"] = (distortion + self.config.beta * rate).item()
        columns["test_rate"] = rate.item()
        columns["test_distortion"] = distortion.item()
        columns["test_sse"] = sse.item()
        columns["bits_per_dim"] = vae.bits_per_dim(sse, rate, variance).item()
        return columns

    def test_terms(self) -> Tensor:
        """Return mean rate and squared error of the test images, float64 (2,).

        Their noise is that of seed 0, so that all epochs and runs test alike.
        """
        place = self.config.device
        seed = derived_seeds(0, 0, (TEST,), place)
        share = self.workers.share(len(self.test_images))
        totals = self.test_images.new_zeros(2, dtype=torch.float64)
        # convolutions take 64 KB an image and layer
        size = device.inference_batch(place, 500 if self.config.arch == "mlp" else 128)
        for first in range(share.start, share.stop, size):
            images = self.test_images[first : min(first + size, share.stop)]
            with device.autocast(place, self.config.precision):
                terms = self.network(vae.from_bytes(images), seed, first)
            totals += torch.stack([terms.rate.sum(), terms.sse.sum()])
        return self.workers.sum(totals) / len(self.test_images)

    def fit_gaussians(self) -> dict[str, list[Tensor]]:
        """Return the Gaussians of the classes' latents as they are now."""
        data = self.data
        with device.autocast(self.config.device, self.config.precision):
            return gaussians.fit_classes(
                self.network, data.images, data.labels, data.classes
            )


class PriorStage:
    """The flow prior, trained on the latents of an autoencoder that stays as it is.

    It keeps posteriors instead of photographs: those of the images, with --flip followed
    by those of their mirror images.
    """

    name = "prior"
    lr_flag = "--prior-lr"
    max_norm = 1.0
    purposes = (START, NOISE, TIME, LABEL)

    def __init__(
        self,
        config: TrainConfig,
        data: Dataset,
        model: VAE,
        prior: FlowPrior,
        workers: Workers,
    ):
        place = config.device
        self.config = config
        self.prior = prior
        self.network = prior.velocity
        self.workers = workers
        self.first_epoch = split(config)
        self.last_epoch = config.epochs
        # first, for memory: before there are posteriors
        self.gaussians = AutoencoderStage(config, data, model, workers).fit_gaussians()
        self.posteriors = encode_all(model, data.images, config, config.flip)
        self.test_posteriors = encode_all(model, data.test_images, config)
        labels = gaussians.labels_with_coats(data.images, data.labels, data.classes)
        self.labels = labels.to(place)
        self.test_labels = data.test_labels.to(place)
        if not prior.mean.any():  # else as it was when the stage began
            prior.measure(*self.posteriors)

    def learning_rate(self, progress: float) -> float:
        return learning_rate("onecycle", self.config.prior_lr, progress)

    def matching_loss(
        self,
        velocity: nn.Module,
        posteriors: Tensor,
        labels: Tensor,
        seeds: Tensor,
        row_offset: int,
    ) -> Tensor:
        """Return flow matching's squared error of each latent, a mean over its numbers.

        posteriors: mu and logvar, (2, B, d).
        """
        start, end, clock = seeds
        mu, logvar = posteriors.float()
        z, _ = reparam.reparameterize_kl(mu, logvar, end, row_offset)
        z1 = self.prior.normalize(z)
        z0 = reparam.normals(*z1.shape, start, row_offset)
        t = reparam.normals(len(z1), 1, clock, row_offset).sigmoid()
        with device.autocast(self.config.device, self.config.precision):
            v = velocity(torch.lerp(z0, z1, t), t[:, 0], labels)
        return (v - (z1 - z0)).square().mean(1)

    def loss(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return this process's part of the loss, and its sum of squared errors."""
        n = len(batch.rows)
        rows = batch.rows if n else batch.rows.new_zeros(1)  # compute one, count none
        at = rows
        if batch.mirrored is not None and n:
            at = rows + batch.mirrored * (self.posteriors.shape[1] // 2)
        both = self.labels[rows]
        none = self.prior.none
        labels = flow_prior.drop_labels(both, none, batch.seeds[3], batch.row_offset)
        error = self.matching_loss(
            self.network, self.posteriors[:, at], labels, batch.seeds[:3], batch.row_offset
        )[:n]
        weights = flow_prior.label_weights(labels, both)[:n]
        total = error.detach().sum()
        sums = torch.stack([total, *total.new_zeros(SUMS - 1)])
        return (weights * error).sum() / batch.size, sums

    def after_step(self, steps: Tensor) -> None:
        """Update the moving average of the weights after so many steps."""
        self.prior.update_ema(steps)

    def metrics(self, means: list[float]) -> dict[str, float]:
        return {"prior loss": means[0]}

    @torch.no_grad()
    def test(self, means: list[float]) -> dict[str, float]:
        """Test the averaged weights; returns columns of the log."""
        place = self.config.device
        n = self.test_posteriors.shape[1]
        share = self.workers.share(n)
        total = torch.zeros(1, dtype=torch.float64, device=place)
        seeds = derived_seeds(0, 0, (START, NOISE, TIME), place)
        size = device.inference_batch(place, 100)
        for first in range(share.start, share.stop, size):
            rows = slice(first, min(first + size, share.stop))
            posteriors = self.test_posteriors[:, rows]
            labels = self.test_labels[rows]
            error = self.matching_loss(self.prior.ema, posteriors, labels, seeds, first)
            total += error.sum()
        mean = self.workers.sum(total) / n
        return {"train_loss": means[0], "test_loss": mean.item()}

    def fit_gaussians(self) -> dict[str, list[Tensor]]:
        """Return the Gaussians of the classes' latents, which no longer change."""
        return self.gaussians


@torch.no_grad()
def encode_all(
    model: VAE, images: Tensor, config: TrainConfig, flip: bool = False
) -> Tensor:
    """Return mu and logvar of images of bytes, float16 (2, n, d), on the run's device.

    With `flip` (2, 2 n, d): mirror images in the second half. Written in place: 60,000
    images would take a gigabyte otherwise.
    """
    place = config.device
    shape = (2, 1 + flip, len(images), model.latent_size)
    result = torch.empty(shape, dtype=torch.half, device=place)
    size = device.inference_batch(place, 100)
    for first in range(0, len(images), size):
        x = vae.from_bytes(images[first : first + size].to(place))
        for view in range(1 + flip):
            with device.autocast(place, config.precision):
                posterior = model.encode(x.flip(3) if view else x)
            result[:, view, first : first + size] = torch.stack(posterior)
    return result.flatten(1, 2)
