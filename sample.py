"""Draw pictures from a checkpoint, which is all that is needed.

    python sample.py pegasus.pt out.png                         # 64 Pegasi
    python sample.py pegasus.pt out.png --mode horse            # 64 horses
    python sample.py pegasus.pt out.png --mode morph            # horse to Pegasus to bird
    python sample.py pegasus.pt out.png --best 8 --coat white   # 8 of 64, enlarged
    python sample.py pegasus.pt out.png --from photo.png        # of your own horse
    python sample.py pegasus.pt walk.gif --mode walk            # Pegasi, one into the next

`make train` writes a checkpoint of your own to runs/pegasus/last.pt.
"""
import math
from pathlib import Path

from pegasus import cli, files
from pegasus.cli import UserError
from pegasus.drawing import plots
from pegasus.drawing import sampler as sampling
from pegasus.drawing.sampler import SampleConfig, Sampler
from pegasus.models.classifier import CHOOSING
from pegasus.models.labels import PEGASUS
from pegasus.training.accelerate import accelerate

import reparam  # isort: skip  # after pegasus, which tells of a missing package

MOST_PIXELS = 2**28  # of a sheet, for memory


def check_sheet(config: SampleConfig) -> None:
    """Check, before anything is read, what can be said without the checkpoint.

    Raises UserError for a sheet that can't be written, shows more pictures than there
    are, or takes the place of what it is drawn from.
    """
    plots.check(Path(config.out))
    if plots.is_moving(config.out) and not sampling.is_walk(config):
        raise UserError(
            f"{config.out}: --mode {config.mode} does not move; end the name in .png, or use "
            "--mode walk or morph"
        )
    for name in (config.checkpoint, config.from_):
        if name is not None and files.is_same(Path(config.out), Path(name)):
            raise UserError(
                f"{config.out}: is what the sheet is drawn from, which would be lost; "
                "choose another name"
            )
    if config.best > config.n:
        raise UserError(
            f"--best: got {config.best} of the {config.n} of --n; ask for a larger --n"
        )


def check_pixels(config: SampleConfig, size: int, scale: int) -> None:
    """Raise UserError for a sheet, or pictures of a size, that are too large."""
    side = size * scale
    shown = config.best if config.best else config.n
    if not plots.is_moving(config.out):
        columns = min(config.columns, shown)
        shown = math.ceil(shown / columns) * columns
    pixels = shown * (side + plots.GAP) ** 2
    pixels = max(pixels, config.n * size**2)
    if pixels > MOST_PIXELS:
        raise UserError(
            f"--n, --columns, --scale: got a sheet of {pixels:,} pixels; "
            f"wanted at most {MOST_PIXELS:,}"
        )


def describe(sampler: Sampler, config: SampleConfig) -> dict[str, object]:
    """Return what a sheet's PNG says of itself: the model, and how it was sampled."""
    about = dict(sampler.about)
    for name in ("mode", "seed", "temperature", "blend", "coat"):
        about[name] = getattr(config, name)
    if sampler.prior is not None:
        about["steps"] = config.steps
        about["guidance"] = config.guidance
        if config.from_ is not None:
            about["from"] = config.from_
            about["keep"] = config.keep
    if config.best:
        about["best"] = f"of {config.n} by judge {CHOOSING}"
    return about


def summary(sampler: Sampler, config: SampleConfig, about: dict[str, object]) -> str:
    """Return the line that is printed of a sheet that was written."""
    count = f"{config.n} pictures"
    if config.best:
        count = f"the best {config.best} of {count}"
    if sampling.subject(config) == PEGASUS and sampler.prior is not None and not sampler.has_pegasi:
        count += (
            f" between {sampler.classes[0]} and {sampler.classes[1]}, hardly with wings "
            "(judge 0 does not know the first class, or did not with the second's wings)"
        )
    settings = [f"{key} {value}" for key, value in about.items() if key != "Software"]
    return f"{config.out}: {count}, {', '.join(settings)}"


def main(argv: list[str] | None = None) -> None:
    config, _ = cli.parse(SampleConfig, argv, __doc__)
    check_sheet(config)
    reparam.silent = True  # about the extension: drawing is as fast without it
    sampler = sampling.load(Path(config.checkpoint))
    size = sampler.model.image_shape[1]
    moving = plots.is_moving(config.out)
    enlarged = 2 if moving or config.best else 1
    scale = config.scale or enlarged * sampling.default_scale(size)
    check_pixels(config, size, scale)
    for network in (sampler.model, sampler.prior):
        if network is not None:
            accelerate(network)
    images = sampling.sample(sampler, config)
    about = describe(sampler, config)
    if moving:
        frames = [sampling.page(image[None], about, 1, scale) for image in images]
        plots.save_moving(frames, Path(config.out), about)
    else:
        sheet = sampling.page(images, about, config.columns, scale)
        plots.save(sheet, Path(config.out), about)
    print(summary(sampler, config, about))


if __name__ == "__main__":
    cli.run(main)
