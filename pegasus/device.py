"""Where to compute and in which precision; memory given back to the system."""
import contextlib
import ctypes

from pegasus.cli import UserError

import torch
from torch import Tensor


def resolve_device(name: str) -> str:
    """Return a device by its name; for "auto" "cuda" where there is one, else "cpu".

    Raises UserError where torch finds none of that name.
    """
    available = {
        "cpu": True,
        "cuda": torch.cuda.is_available(),
        "mps": torch.backends.mps.is_available(),
    }
    if name == "auto":
        return "cuda" if available["cuda"] else "cpu"
    if not available[name]:
        raise UserError(
            f"--device: got {name}, but torch finds no {name.upper()} device; use --device cpu"
        )
    return name


def has_graphs(device: str) -> bool:
    """Return whether a device runs CUDA graphs."""
    return device not in ("cpu", "mps")


def widest_float(device: str) -> torch.dtype:
    """Return a device's most exact dtype: float64, which Apple's GPUs do not have."""
    return torch.float32 if device == "mps" else torch.float64


def supports_bfloat16(device: str) -> bool:
    """Return whether a device multiplies matrices faster in bfloat16 than in float32.

    Of x86-64 processors those with AVX512_BF16 do. oneDNN counts others too, which
    emulate it or have no gradients in it.
    """
    if device == "cuda":
        return torch.cuda.is_bf16_supported(False)
    if device == "mps":
        return False  # not measured
    is_x86 = torch.cpu._is_avx2_supported()
    if is_x86 and not torch.cpu._is_avx512_bf16_supported():
        return False
    return torch.ops.mkldnn._is_mkldnn_bf16_supported()


def fastest_precision(device: str) -> str:
    """Return "bfloat16" or "float32", in which a device multiplies matrices faster."""
    return "bfloat16" if supports_bfloat16(device) else "float32"


def autocast(device: str, precision: str) -> torch.autocast:
    """Return a context in which matrix products have a precision."""
    return torch.autocast(device, torch.bfloat16, enabled=precision == "bfloat16")


def fast_autocast(like: Tensor) -> torch.autocast:
    """Return a context with bfloat16 products where a tensor's device has them."""
    device = like.device.type
    return autocast(device, fastest_precision(device))


def to_device(numbers: list, device: str) -> Tensor:
    """Copy numbers to a tensor on a device without waiting for a busy GPU."""
    pinned = torch.tensor(numbers, pin_memory=device == "cuda")
    return pinned.to(device, non_blocking=device == "cuda")


def inference_batch(device: str, cpu_size: int) -> int:
    """Return how many images to take at once without gradients."""
    return 1000 if device == "cuda" else cpu_size  # a GPU takes hardly longer


def trim_memory() -> None:
    """Give free memory back to the system: glibc keeps 200 MB of pieces otherwise."""
    with contextlib.suppress(AttributeError, OSError, TypeError):  # no glibc, no name
        ctypes.CDLL(None).malloc_trim(0)
