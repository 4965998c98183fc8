"""Train 2,000 epochs on 500 pictures, saving all the while; memory and open files must stay what they were.

    python tests/soak.py            # about ten minutes on one core
    python tests/soak.py 300        # epochs
"""
import os
import statistics
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
import options
import drawn
import train

WINDOW = 25  # epochs that a median is taken of


def memory() -> float:
    """Resident memory of this process, MB."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6


def main() -> int:
    epochs, seen, end_epoch = int(sys.argv[1]) if sys.argv[1:] else 2000, [], train.Training.end_epoch

    def watched(self: train.Training, progress: object) -> None:
        end_epoch(self, progress)
        seen.append((memory(), len(os.listdir("/proc/self/fd"))))

    train.Training.end_epoch = watched
    with tempfile.TemporaryDirectory() as place:
        drawn.write(Path(place, "data"), train=625, test=125)  # four in five are horses or birds
        train.main(["--run", f"{place}/run", "--data", f"{place}/data", "--arch", "mlp", "--threads", "1",
                    "--epochs", str(epochs), "--save-seconds", "5", "--no-judge"])
    first = epochs // 4  # by then it has saved a few times, which takes room once
    (before, files), (after, files_after) = (
        [statistics.median(column) for column in zip(*seen[end - WINDOW:end], strict=True)] for end in (first, epochs))
    change = after / before - 1
    print(f"resident memory {before:.1f} MB after {first} epochs, {after:.1f} MB after {epochs} ({change:+.2%}), at "
          f"most {max(m for m, _ in seen):.1f} MB; open files {files:g} and {files_after:g}")
    return 0 if change < 0.02 and files_after <= files else 1


if __name__ == "__main__":
    options.run(main)
