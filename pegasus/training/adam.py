"""Adam for devices whose own kernel does not know which step to skip: Apple's."""
import torch
from torch.optim import Adam


class SkippingAdam(Adam):
    """Adam that heeds `found_inf` and `grad_scale` itself, as fused kernels elsewhere do.

    found_inf: 1.0 to skip the step. grad_scale: what gradients are divided by, or None.
    """

    @torch.no_grad()
    def step(self) -> None:
        skip = bool(self.found_inf)
        divisor = self.grad_scale
        self.found_inf = self.grad_scale = None  # torch takes them with its kernel alone
        if skip:
            return
        group = self.param_groups[0]
        group["lr"] = float(group["lr"])
        if divisor is not None:
            torch._foreach_div_([weight.grad for weight in group["params"]], divisor)
        super().step()
