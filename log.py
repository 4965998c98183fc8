"""A run's log files and its line on the terminal."""
import csv
import errno
import signal
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import options

COLUMNS = ("epoch", "phase", "train_loss", "train_rate", "train_distortion", "test_loss", "test_rate",
           "test_distortion", "test_sse", "bits_per_dim", "skipped", "data")  # of log.csv
BEGIN, END = "\r\033[?7l", "\033[K\033[?7h"  # around a line that is rewritten: one that wrapped would be two
SPEED = ("epoch", "images_per_second", "seconds")  # of speed.csv


def write(path: Path, columns: tuple[str, ...], rows: list[dict], mode: str = "w") -> None:
    """Write a CSV file, which is whole or as it was, or (mode "a") append rows; floats get nine significant digits.

    Raises Fault.
    """
    advice = "the last checkpoint is still there"
    with options.writing(path, advice) if mode == "a" else options.replacing(path, advice) as beside:
        with open(beside or path, mode, newline="") as file:
            writer = csv.DictWriter(file, columns, lineterminator="\n")
            if mode == "w":
                writer.writeheader()
            writer.writerows({k: f"{v:.9g}" if isinstance(v, float) else v for k, v in row.items()} for row in rows)


def tell(line: str, end: str) -> None:
    """Print at once; where nobody reads any more, stop this process as SIGTERM does, which may save first."""
    try:
        print(line, end=end, flush=True)
    except OSError as error:
        if error.errno not in (errno.EPIPE, errno.EIO):  # a pipe or a terminal that is gone
            raise
        options.hush()
        signal.raise_signal(signal.SIGTERM)


class Progress:
    """One line that is rewritten on a terminal, or a line an epoch elsewhere; and speed.csv."""

    def __init__(self, last: int, epochs: int, images: int, begun: float, later: float, speed: Path,
                 quiet: bool = False):
        """last: the phase's last epoch; begun: images done before this start; later: seconds, guessed, after it."""
        self.last, self.epochs, self.images, self.later, self.speed = last, epochs, images, later, speed
        self.begun = self.before = begun
        self.start = self.epoch_start = time.monotonic()
        self.training, self.shown = 0.0, 0.0
        self.terminal, self.quiet = bool(sys.stdout and sys.stdout.isatty() and not quiet), quiet

    def line(self, epoch: int, done: float, rate: float, numbers: dict[str, float]) -> str:
        """done: images of all epochs by now; rate: images a second; numbers: what to show."""
        elapsed = time.monotonic() - self.start
        left = elapsed / max(done - self.begun, 1) * (self.last * self.images - done) + self.later
        values = "  ".join(f"{name} {value:,.2f}" for name, value in numbers.items())
        return f"epoch {epoch}/{self.epochs}  {timedelta(seconds=round(left))} left  {rate:,.0f} images/s  {values}"

    def show(self, epoch: int, images: int, numbers: Callable[[], dict[str, float]]) -> None:
        """Rewrite the terminal's line, at most five times a second. images: of this epoch so far."""
        now = time.monotonic()
        self.training = now - self.epoch_start
        if self.terminal and now - self.shown > 0.2:
            self.shown, done = now, (epoch - 1) * self.images + images
            rate = (done - self.before) / max(self.training, 1e-9)
            tell(BEGIN + self.line(epoch, done, rate, numbers()) + END, "")

    def end_epoch(self, epoch: int, numbers: dict[str, float]) -> None:
        """Print the epoch's line; add images a second up to its last step, and seconds with its test, to speed.csv."""
        if self.quiet:
            return
        now, done = time.monotonic(), epoch * self.images
        rate = (done - self.before) / max(self.training, 1e-9)
        write(self.speed, SPEED, [dict(zip(SPEED, (epoch, rate, now - self.epoch_start), strict=True))], "a")
        self.before, self.epoch_start = done, now
        end = "\n" if epoch == self.last or not self.terminal else ""
        tell(BEGIN * self.terminal + self.line(epoch, done, rate, numbers) + END * self.terminal, end)
