"""Steps that are skipped because their loss or gradient is not finite."""
from pathlib import Path

from pegasus import device
from pegasus.cli import UserError
from pegasus.training.stages import SUMS

import torch
from torch import Tensor

PATIENCE = 10  # steps skipped in a row before a run stops
STEPS, IMAGES, IN_A_ROW = range(3)  # what is counted of skipped steps


class StepGuard:
    """Sums over an epoch's images, without those of skipped steps.

    All of it stays on the device, so that nothing waits for a GPU, and follows from what
    all processes share, so that all do the same.
    """

    def __init__(self, where: str):
        self.totals = torch.zeros(SUMS, dtype=device.widest_float(where), device=where)
        self.skipped = torch.zeros(3, dtype=torch.int64, device=where)

    def load(self, totals: Tensor, skipped: Tensor) -> None:
        """Go on from a checkpoint's sums and counts."""
        self.totals.copy_(totals)
        self.skipped.copy_(skipped)
        self.skipped[IN_A_ROW] %= PATIENCE  # so that a run saved as it gave up can go on

    def record(self, norm: Tensor, sums: Tensor, images: int) -> Tensor:
        """Add a step's sums; return 1.0 if the optimizer is to skip the step, else 0.0.

        norm: the length of all gradients. After PATIENCE skipped steps in a row none is
        taken any more, so that `check` may look late.
        """
        finite = (norm + sums.sum()).isfinite()
        bad = ~finite | (self.skipped[IN_A_ROW] >= PATIENCE)
        self.totals += torch.where(bad, 0, sums)
        self.skipped[STEPS] += bad
        self.skipped[IMAGES] += bad * images
        self.skipped[IN_A_ROW] += 1
        self.skipped[IN_A_ROW] *= bad  # 0 after a step that was taken
        return bad.float()

    def check(self, steps_done: int, steps_per_epoch: int, folder: Path, lr_flag: str) -> None:
        """Raise UserError where PATIENCE steps in a row were skipped.

        steps_done: as Run has it. Looks at the device only now and then.
        """
        step_in_epoch = steps_done % steps_per_epoch  # 0 after the last one
        if step_in_epoch % PATIENCE:
            return
        in_a_row = int(self.skipped[IN_A_ROW])
        if in_a_row >= PATIENCE:
            epoch, step = divmod(steps_done - in_a_row, steps_per_epoch)
            raise UserError(
                f"{folder}: gradient or loss not finite in {PATIENCE} steps in a row, from "
                f"epoch {epoch + 1}, step {step + 1} on; what was saved last is still "
                f"there; begin again with a lower {lr_flag}"
            )

    def means(self, images: int) -> list[float]:
        """Return means over the epoch's first `images` images."""
        return (self.totals / (images - self.skipped[IMAGES])).tolist()

    def end_epoch(self) -> int:
        """Begin another epoch; return how many steps of the last one were skipped."""
        skipped = int(self.skipped[STEPS])
        self.totals.zero_()
        self.skipped[STEPS] = 0
        self.skipped[IMAGES] = 0
        return skipped
