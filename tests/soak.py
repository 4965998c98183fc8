"""Train 2,000 epochs on 500 pictures; memory and open files must stay what they were.

    python tests/soak.py            # about ten minutes on one core
    python tests/soak.py 300        # epochs

It saves all the while.
"""
import os
import statistics
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
import train
from pegasus import cli
from pegasus.data import synthetic

WINDOW = 25  # epochs that a median is taken of
MOST_GROWTH = 0.02  # of memory, from a quarter of the run to its end


def memory() -> float:
    """Return this process's resident memory, MB."""
    pages = Path("/proc/self/statm").read_text().split()[1]
    return int(pages) * os.sysconf("SC_PAGE_SIZE") / 1e6


def open_files() -> int:
    return len(os.listdir("/proc/self/fd"))


def measure(epochs: int) -> list[tuple[float, int]]:
    """Train; return memory and open files after each epoch."""
    measured = []
    finish_epoch = train.finish_epoch

    def log_and_measure(*args: object) -> None:
        finish_epoch(*args)
        measured.append((memory(), open_files()))

    train.finish_epoch = log_and_measure
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder, "data")
        synthetic.write(data, train=625, test=125)  # four in five are horses or birds
        argv = ["--run", f"{folder}/run", "--data", str(data), "--arch", "mlp"]
        argv += ["--threads", "1", "--epochs", str(epochs), "--save-seconds", "5"]
        train.main(argv)
    return measured


def medians(measured: list[tuple[float, int]]) -> tuple[float, float]:
    """Return the medians of memory and of open files over the last epochs."""
    memories, files = zip(*measured[-WINDOW:], strict=True)
    return statistics.median(memories), statistics.median(files)


def main() -> int:
    epochs = int(sys.argv[1]) if sys.argv[1:] else 2000
    measured = measure(epochs)
    first = epochs // 4  # by then it has saved a few times, which takes room once
    before, files_before = medians(measured[:first])
    after, files_after = medians(measured)
    most = max(size for size, _ in measured)
    growth = after / before - 1
    print(
        f"resident memory {before:.1f} MB after {first} epochs, {after:.1f} MB after "
        f"{epochs} ({growth:+.2%}), at most {most:.1f} MB; "
        f"open files {files_before:g} and {files_after:g}"
    )
    return 0 if growth < MOST_GROWTH and files_after <= files_before else 1


if __name__ == "__main__":
    cli.run(main)
