"""The two stages of a run: the autoencoder's -ELBO, then the prior's flow matching.

A stage gives the loss of a batch and tests what was trained; train.py owns the loop.
"""
import itertools
from typing import NamedTuple

import reparam
import vae
from pegasus import device
from pegasus.data.datasets import Dataset
from pegasus.models import flow_prior, gaussians, labels
from pegasus.models.composites import Composites
from pegasus.models.flow_prior import FlowPrior
from pegasus.training.config import TrainConfig, first_stage_epochs, learning_rate
from pegasus.training.distributed import Workers
from vae import VAE

import torch
from torch import Tensor, nn

# purposes of the seeds derived from the run's: their numbers decide every run's bits
ORDER, FLIP, NOISE, TEST, TIME, LABEL = range(6)
SUMS = 3  # sums over images that a stage's loss returns


class Batch(NamedTuple):
    """The images of a step, or one process's part of them."""
    rows: Tensor  # of the training images, int64 (B,)
    mirrored: Tensor | None  # which of them are mirrored, bool (B,)
    size: int  # images of the whole step
    row_offset: int  # of this part's first row in the step
    seeds: Tensor  # one for each of the stage's purposes
    progress: Tensor  # of the stage, 0 to 1

    def part(self, share: slice) -> "Batch":
        """Return the rows of one process."""
        mirrored = None if self.mirrored is None else self.mirrored[share]
        return self._replace(rows=self.rows[share], mirrored=mirrored, row_offset=share.start)


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
    """Pick rows of byte images (n, 3, h, w), mirror some; return float32 in [0, 1]."""
    x = images.flatten(1).index_select(0, rows).view(-1, *images.shape[1:])
    if mirrored is not None:
        # eight bytes at once: bytes one by one take longer than all else here
        flipped = x.flip(3).view(torch.int64)
        choice = mirrored[:, None, None, None]
        x = torch.where(choice, flipped, x.view(torch.int64)).view(torch.uint8)
    return vae.from_bytes(x)


def derived_seeds(seed: int, step: int, purposes: tuple[int, ...], where: str) -> Tensor:
    """Return the seeds of some purposes at one step of a run, int64, on a device."""
    seeds = [reparam.derive_seed(seed, step, purpose) for purpose in purposes]
    return device.to_device(seeds, where)


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
        self.image_count = len(data.images)
        self.first_epoch = 0
        self.last_epoch = first_stage_epochs(config)

    def learning_rate(self, progress: float) -> float:
        return learning_rate(self.config.schedule, self.config.lr, progress)

    def beta(self, progress: Tensor) -> Tensor | float:
        """Return the rate's weight, which rises over the warm-up.

        At full weight from the start more latents are given up, and stay so.
        """
        if self.config.warm_up == 0:
            return self.config.beta
        return self.config.beta * (progress / self.config.warm_up).clamp(max=1)

    def loss(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return this process's part of the loss, and sums over its rows.

        The sums are of distortion, rate and squared error. The variance is the mean
        squared error of all processes' rows: with its own alone, each process would
        minimize a different loss.
        """
        terms = self.forward(batch)
        sse = self.workers.sum_(terms.sse.detach().sum())
        variance = sse / (batch.size * self.network.image_values)
        distortion = self.network.distortion(terms.sse, variance)
        beta = self.beta(batch.progress)
        loss = (distortion + beta * terms.rate).sum() / batch.size
        parts = (distortion, terms.rate, terms.sse)
        return loss, torch.stack([part.detach().sum() for part in parts])

    def forward(self, batch: Batch) -> vae.Terms:
        x = gather(self.images, batch.rows, batch.mirrored)
        if len(x) == 0:  # convolutions take no empty batch: compute one, count none
            x = x.new_zeros(1, *self.network.image_shape)
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
        """Set the pixel variance to the epoch's mean squared error, then test.

        means: over the epoch's images. Returns columns of the log.
        """
        values = self.network.image_values
        variance = self.network.variance.fill_(means[2] / values).cpu().double()
        rate, sse = self.test_terms()
        distortion = self.network.distortion(sse, variance)
        columns = {f"train_{name}": value for name, value in self.metrics(means).items()}
        columns["test_loss"] = (distortion + self.config.beta * rate).item()
        columns["test_rate"] = rate.item()
        columns["test_distortion"] = distortion.item()
        columns["test_sse"] = sse.item()
        columns["bits_per_dim"] = vae.bits_per_dim(sse, rate, variance, values).item()
        return columns

    def test_terms(self) -> Tensor:
        """Return mean rate and squared error of the test images, float64 (2,), on the CPU.

        Their noise is that of seed 0, so that all epochs and runs test alike.
        """
        where = self.config.device
        seed = derived_seeds(0, 0, (TEST,), where)
        share = self.workers.share(len(self.test_images))
        totals = torch.zeros(2, dtype=device.widest_float(where), device=where)
        # convolutions take 64 KB an image and layer
        size = device.inference_batch(where, 500 if self.config.arch == "mlp" else 128)
        for first in range(share.start, share.stop, size):
            images = self.test_images[first : min(first + size, share.stop)]
            with device.autocast(where, self.config.precision):
                terms = self.network(vae.from_bytes(images), seed, first)
            totals += torch.stack([terms.rate.sum(), terms.sse.sum()])
        return self.workers.sum_(totals).cpu().double() / len(self.test_images)

    def fit_gaussians(self) -> dict[str, list[Tensor]]:
        """Return the Gaussians of the classes' latents as they are now."""
        data = self.data
        with device.autocast(self.config.device, self.config.precision):
            return gaussians.fit_classes(self.network, data.images, data.labels, data.classes)


class PriorStage:
    """The flow prior, trained on the latents of an autoencoder that stays as it is.

    It keeps posteriors instead of pictures: those of photographs and composites, with
    --flip followed by those of their mirror images. The training loss is of both, the test
    loss of photographs alone.
    """

    name = "prior"
    lr_flag = "--prior-lr"
    max_norm = 1.0
    purposes = (NOISE, TIME, LABEL)

    def __init__(
        self,
        config: TrainConfig,
        data: Dataset,
        composites: Composites,
        model: VAE,
        prior: FlowPrior,
        workers: Workers,
    ):
        self.config = config
        self.prior = prior
        self.network = prior.velocity
        self.workers = workers
        self.first_epoch = first_stage_epochs(config)
        self.last_epoch = config.epochs
        images = (data.images, composites.images)
        choices = [
            labels.of_photographs(data.images, data.labels, data.classes),
            labels.of_composites(composites.coats, data.classes),
        ]
        self.image_count = sum(map(len, images))
        self.posteriors = encode_all(model, images, config, config.flip)
        self.test_posteriors = encode_all(model, (data.test_images,), config)
        self.choices = torch.cat(choices).to(config.device)
        self.test_labels = data.test_labels.to(config.device)  # without coats
        if not prior.mean.any():  # else it was measured when the stage began
            prior.measure(*self.posteriors)

    def learning_rate(self, progress: float) -> float:
        return learning_rate("onecycle", self.config.prior_lr, progress)

    def matching_loss(
        self,
        velocity: nn.Module,
        posteriors: Tensor,
        numbers: Tensor,
        times: Tensor,
        noise_seed: Tensor,
        row_offset: int,
    ) -> Tensor:
        """Return flow matching's squared error of each latent, a mean over its numbers.

        Each picture's path leads from noise to its posterior, so that what a sample of
        it adds is no noise in the target. posteriors: mu and logvar, (2, B, d).
        numbers: of classes, (B,).
        """
        mu, logvar = posteriors.float()
        mean = self.prior.normalize(mu)
        variance = logvar.exp() / self.prior.std.square()
        noise = reparam.normals(*mean.shape, noise_seed, row_offset)
        spread = ((1 - times).square() + times.square() * variance).sqrt()
        z = times * mean + spread * noise
        with device.autocast(self.config.device, self.config.precision):
            v = velocity(z, times[:, 0], numbers)
        target = flow_prior.direction(z, times, mean, variance)
        return (v - target).square().mean(1)

    def loss(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return this process's part of the loss, and its sum of squared errors."""
        n = len(batch.rows)
        rows = batch.rows if n else batch.rows.new_zeros(1)  # compute one, count none
        posterior_rows = rows
        if batch.mirrored is not None and n:
            posterior_rows = rows + batch.mirrored * (self.posteriors.shape[1] // 2)
        choices = self.choices[rows]
        noise_seed, time_seed, label_seed = batch.seeds
        numbers = flow_prior.choose_labels(choices, label_seed, batch.row_offset)
        times = flow_prior.even_times(len(rows), batch.size, time_seed, batch.row_offset)
        posteriors = self.posteriors[:, posterior_rows]
        error = self.matching_loss(
            self.network, posteriors, numbers, times, noise_seed, batch.row_offset
        )[:n]
        weights = flow_prior.label_weights(numbers, choices)[:n]
        total = error.detach().sum()
        sums = torch.stack([total, *total.new_zeros(SUMS - 1)])  # the others are unused
        return (weights * error).sum() / batch.size, sums

    def after_step(self, steps: Tensor) -> None:
        """Update the moving average of the weights after so many steps."""
        self.prior.update_ema(steps)

    def metrics(self, means: list[float]) -> dict[str, float]:
        return {"prior loss": means[0]}

    @torch.no_grad()
    def test(self, means: list[float]) -> dict[str, float]:
        """Test the averaged weights on photographs; returns columns of the log."""
        where = self.config.device
        n = self.test_posteriors.shape[1]
        share = self.workers.share(n)
        total = torch.zeros(1, dtype=device.widest_float(where), device=where)
        noise_seed, time_seed = derived_seeds(0, 0, (NOISE, TIME), where)
        size = device.inference_batch(where, 100)
        for first in range(share.start, share.stop, size):
            rows = slice(first, min(first + size, share.stop))
            posteriors = self.test_posteriors[:, rows]
            numbers = self.test_labels[rows]
            times = flow_prior.even_times(len(numbers), n, time_seed, first)
            error = self.matching_loss(
                self.prior.ema, posteriors, numbers, times, noise_seed, first
            )
            total += error.sum()
        mean = self.workers.sum_(total) / n
        return {"train_loss": means[0], "test_loss": mean.item()}

    def fit_gaussians(self) -> dict[str, list[Tensor]]:
        """Return none: a learned prior draws without."""
        return {}


# What train.py needs of a stage: name, image_count, first_epoch, last_epoch, network (what
# is trained), config, purposes (of its seeds), learning_rate(progress), loss(batch),
# max_norm, lr_flag, after_step(steps), metrics(means), test(means) and fit_gaussians().
Stage = AutoencoderStage | PriorStage


@torch.no_grad()
def encode_all(
    model: VAE, parts: tuple[Tensor, ...], config: TrainConfig, flip: bool = False
) -> Tensor:
    """Return mu and logvar of images of bytes, float16 (2, n, d), on the run's device.

    parts: the images, some behind others, each (m, 3, h, w). With `flip` (2, 2 n, d): mirror
    images in the second half. Written in place: 60,000 images would take a gigabyte
    otherwise.
    """
    where = config.device
    shape = (2, 1 + flip, sum(map(len, parts)), model.latent_size)
    result = torch.empty(shape, dtype=torch.half, device=where)
    size = device.inference_batch(where, 100)
    first = 0
    for batch in itertools.chain(*(images.split(size) for images in parts if len(images))):
        x = vae.from_bytes(batch.to(where))
        for view in range(1 + flip):
            with device.autocast(where, config.precision):
                posterior = model.encode(x.flip(3) if view else x)
            result[:, view, first : first + len(batch)] = torch.stack(posterior)
        first += len(batch)
    return result.flatten(1, 2)
