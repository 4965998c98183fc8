"""A run's log files and its line on the terminal."""
import csv
import sys
import time
from datetime import timedelta
from pathlib import Path
from typing import TextIO

from pegasus import files
from pegasus.cli import in_range
from pegasus.streams import is_terminal, print_or_stop

LOG_COLUMNS = (
    "epoch", "phase", "train_loss", "train_rate", "train_distortion", "test_loss",
    "test_rate", "test_distortion", "test_sse", "bits_per_dim", "skipped", "data",
)
SPEED_COLUMNS = ("epoch", "images_per_second", "seconds")
KEPT = "the last checkpoint is still there"
BEGIN_LINE = "\r\033[?7l"  # and without line wrap: a wrapped line could not be rewritten
END_LINE = "\033[K\033[?7h"


def check_row(row: dict) -> None:
    """Raise ValueError for what is no row of log.csv."""
    for name, value in row.items():
        if name in ("phase", "data"):
            fits = isinstance(value, str)
        else:
            fits = isinstance(value, int | float) and in_range(value)
        if not fits:
            raise ValueError(f"a row of the log has {name} {value!r:.60}")
    needed = {"epoch", "phase", "train_loss", "test_loss"}
    if row.get("phase") != "prior":
        needed |= {"train_rate", "train_distortion", "test_rate", "test_distortion"}
    if not needed <= set(row) <= set(LOG_COLUMNS):
        raise ValueError(f"a row of the log has the columns {', '.join(row)}")


def write_rows(file: TextIO, columns: tuple[str, ...], rows: list[dict]) -> None:
    """Write rows of a CSV file; floats get nine significant digits."""
    writer = csv.DictWriter(file, columns, lineterminator="\n")
    for row in rows:
        cells = {}
        for name, value in row.items():
            cells[name] = f"{value:.9g}" if isinstance(value, float) else value
        writer.writerow(cells)


def write_csv(path: Path, columns: tuple[str, ...], rows: list[dict]) -> None:
    """Write a CSV file, whole or not at all. Raises UserError."""
    with files.replace_file(path, KEPT) as temporary:
        with open(temporary, "w", newline="", encoding="utf-8") as file:
            file.write(",".join(columns) + "\n")
            write_rows(file, columns, rows)


def append_csv(path: Path, columns: tuple[str, ...], row: dict) -> None:
    """Append a row to a CSV file. Raises UserError."""
    with files.writing(path, KEPT), open(path, "a", newline="", encoding="utf-8") as file:
        write_rows(file, columns, [row])


class Progress:
    """A line that is rewritten on a terminal, or a line an epoch elsewhere; speed.csv."""

    def __init__(self, last_epoch: int, epochs: int, images: int, done: int, leads: bool):
        """last_epoch: of this stage. images: an epoch's. done: of all epochs, by now.

        leads: whether this process shows and writes anything.
        """
        self.last_epoch = last_epoch
        self.epochs = epochs
        self.images = images
        self.leads = leads
        self.terminal = leads and is_terminal(sys.stdout)
        self.start = time.monotonic()
        self.epoch_start = self.start
        self.training_seconds = 0.0  # of the epoch, up to its last step
        self.shown_at = 0.0
        self.images_at_start = done
        self.images_before_epoch = done

    def line(self, epoch: int, done: int, numbers: dict[str, float]) -> str:
        """Describe the run when so many images of all epochs are done."""
        elapsed = time.monotonic() - self.start
        each = elapsed / max(done - self.images_at_start, 1)
        left = timedelta(seconds=round(each * (self.last_epoch * self.images - done)))
        values = "  ".join(f"{name} {value:,.2f}" for name, value in numbers.items())
        speed = f"{self.images_per_second(done):,.0f} images/s"
        stage = f"{left} left to epoch {self.last_epoch}"
        return f"epoch {epoch}/{self.epochs}  {stage}  {speed}  {values}"

    def images_per_second(self, done: int) -> float:
        return (done - self.images_before_epoch) / max(self.training_seconds, 1e-9)

    def note_step(self) -> None:
        """Take the time: images a second are those up to the epoch's last step."""
        self.training_seconds = time.monotonic() - self.epoch_start

    def is_due(self) -> bool:
        """Return whether to rewrite the terminal's line: five times a second."""
        return self.terminal and time.monotonic() - self.shown_at > 0.2

    def show(self, epoch: int, done: int, numbers: dict[str, float]) -> None:
        """Rewrite the terminal's line. done: images of all epochs."""
        self.shown_at = time.monotonic()
        print_or_stop(BEGIN_LINE + self.line(epoch, done, numbers) + END_LINE, "")

    def end_epoch(self, epoch: int, numbers: dict[str, float], speed_path: Path) -> None:
        """Print the epoch's line and add to speed.csv.

        Images a second are up to the last step, seconds with the test.
        """
        if not self.leads:
            return
        now = time.monotonic()
        done = epoch * self.images
        speed = self.images_per_second(done)
        row = {"epoch": epoch, "images_per_second": speed, "seconds": now - self.epoch_start}
        append_csv(speed_path, SPEED_COLUMNS, row)
        line = self.line(epoch, done, numbers)
        self.images_before_epoch = done
        self.epoch_start = now
        if self.terminal:
            line = BEGIN_LINE + line + END_LINE
        stays = epoch == self.last_epoch or not self.terminal
        print_or_stop(line, "\n" if stays else "")
