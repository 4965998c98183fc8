"""Reparameterize and KL in one call, with noise that is a function of its arguments.

    import torch, reparam
    z, kl = reparam.reparameterize_kl(mu, logvar, torch.tensor(7))  # (B, D), (B,)

Row r, columns 4g to 4g+3 take their normals from one block of Philox4x32-10 (Salmon et al. 2011):
counter (g low, g high, r low, r high), key (seed low, seed high), 32-bit words; the block's words w0..w3
become radius(w0) * direction(w1) and radius(w2) * direction(w3), two normals each, by Box and Muller's method.

The work is done by the extension `pegasus_op` where it is built (python setup.py build_ext --inplace) for the tensors'
device, otherwise by `reference`, to the same noise. PEGASUS_EXTENSION=0 takes the reference anyway;
PEGASUS_SIMD=baseline|avx2|avx512 forces the extension's instruction set, which changes no bit of the result.
"""
import math
import os
import sys

import torch
from torch import Tensor
from torch.autograd import forward_ad

MASK = 0xFFFFFFFF
MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
WEYL = (0x9E3779B9, 0xBB67AE85)
UNWANTED = os.environ.get("PEGASUS_EXTENSION", "1") == "0"


def philox(counter: list, key: list) -> list:
    """Philox4x32-10: four counter words and two key words to four words, each below 2^32.

    Words are Python ints or int64 tensors; products wrap modulo 2^64, which leaves both halves right.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        p0, p1 = c0 * MULTIPLIERS[0], c2 * MULTIPLIERS[1]
        c0, c1, c2, c3 = (p1 >> 32 & MASK) ^ c1 ^ k0, p1 & MASK, (p0 >> 32 & MASK) ^ c3 ^ k1, p0 & MASK
        k0, k1 = k0 + WEYL[0] & MASK, k1 + WEYL[1] & MASK
    return [c0, c1, c2, c3]


def derive_seed(seed: int, step: int, purpose: int) -> int:
    """A seed for one purpose at one step of a run: key = seed, counter = (step, purpose), as a signed 64-bit int.

    Unlike `seed + step`, neighbouring runs and steps share no noise.
    """
    w0, w1, _, _ = philox([step & MASK, step >> 32 & MASK, purpose, 0], [seed & MASK, seed >> 32 & MASK])
    return (w1 << 32 | w0) - (w1 >> 31 << 64)


def words(rows: int, groups: int, seed: Tensor, row_offset: int = 0) -> Tensor:
    """The 32-bit words of the noise, int64 of shape (rows, groups, 4), on the seed's device."""
    seed = seed.reshape(())
    row = torch.arange(row_offset, row_offset + rows, device=seed.device)[:, None]
    group = torch.arange(groups, device=seed.device)[None, :]
    counter = [group & MASK, group >> 32, row & MASK, row >> 32 & MASK]
    return torch.stack(torch.broadcast_tensors(*philox(counter, [seed & MASK, seed >> 32 & MASK])), -1)


def direction(word: Tensor, dtype: torch.dtype) -> Tensor:
    """Words (...) to points of the unit circle (..., 2).

    The low 30 bits are an angle within an eighth of a turn to either side of zero; bit 31 is the sign of its cosine,
    and bit 30 exchanges cosine and sine: together they reach all four quarters, at less work than a whole turn.
    """
    signed = (word & 0x3FFFFFFF) - (word >> 29 & 1) * 2**30
    angle = signed.to(dtype) * (math.pi / 2 * 2.0**-30)
    point = torch.stack([angle.cos() * (1 - (word >> 31) * 2), angle.sin()], -1)
    return torch.where((word >> 30 & 1 == 1)[..., None], point.flip(-1), point)


def normals_from_words(word: Tensor, dtype: torch.dtype) -> Tensor:
    """Box-Muller: words (..., 4) to normals (..., 4). The radius uses all 32 bits, so |eps| reaches 6.66."""
    radius = ((word[..., 0::2].to(dtype) + 1) * 2.0**-32).log().mul(-2).clamp(min=0).sqrt()
    return (radius[..., None] * direction(word[..., 1::2], dtype)).flatten(-2)


def reference(mu: Tensor, logvar: Tensor, seed: Tensor, row_offset: int = 0) -> tuple[Tensor, Tensor]:
    """`reparameterize_kl` in plain PyTorch: the oracle of the tests, and the fallback without the extension."""
    rows, columns = mu.shape
    dtype = torch.float64 if mu.dtype == torch.float64 else torch.float32
    eps = normals_from_words(words(rows, (columns + 3) // 4, seed, row_offset), dtype).flatten(1)[:, :columns]
    m, v = mu.to(dtype), logvar.to(dtype)
    z = m + (v / 2).exp() * eps
    kl = (v.exp() + m * m - 1 - v).sum(1) / 2
    return z.to(mu.dtype), kl


def check(mu: Tensor, logvar: Tensor, seed: Tensor) -> None:
    """Raise an error that names the argument, what it is and what was wanted."""
    dtypes = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
    if mu.dim() != 2:
        raise ValueError(f"mu: got shape {tuple(mu.shape)}, wanted two dimensions (B, D)")
    if mu.dtype not in dtypes:
        raise TypeError(f"mu: got {mu.dtype}, wanted one of {', '.join(map(str, dtypes))}")
    if logvar.shape != mu.shape:
        raise ValueError(f"logvar: got shape {tuple(logvar.shape)}, wanted mu's {tuple(mu.shape)}")
    for name in ("dtype", "device"):
        if getattr(logvar, name) != getattr(mu, name):
            raise ValueError(f"logvar: got {name} {getattr(logvar, name)}, wanted mu's {getattr(mu, name)}")
    if seed.dtype != torch.int64 or seed.numel() != 1 or seed.device != mu.device:
        got = f"{seed.dtype} of {seed.numel()} elements on {seed.device}"
        raise ValueError(f"seed: got {got}, wanted torch.int64 of one element on {mu.device}")


def fake_forward(mu: Tensor, logvar: Tensor, seed: Tensor, row_offset: int = 0) -> tuple[Tensor, Tensor]:
    """Shapes and dtypes of `reparameterize_kl`, for the compiler."""
    check(mu, logvar, seed)
    return mu.new_empty(mu.shape), mu.new_empty(mu.shape[:1], dtype=torch.promote_types(mu.dtype, torch.float32))


def fake_backward(dz: Tensor, dkl: Tensor, mu: Tensor, logvar: Tensor, seed: Tensor,
                  row_offset: int = 0) -> tuple[Tensor, Tensor]:
    """Shapes and dtypes of the gradients, for the compiler."""
    return mu.new_empty(mu.shape), mu.new_empty(mu.shape)


def save_inputs(ctx, inputs: tuple, output: tuple | None) -> None:
    """Keep the inputs and the seed for the backward, which draws the noise again; nothing else of z's size."""
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs[:3])
    ctx.row_offset = inputs[3]


def gradients(ctx, dz: Tensor | None, dkl: Tensor | None) -> tuple:
    """Gradients with respect to mu and logvar; None for seed and row_offset. dz, dkl: None where z, kl is unused."""
    mu, logvar, seed = ctx.saved_tensors
    dz = torch.zeros_like(mu) if dz is None else dz
    if dkl is None:  # a zero in its place would be NaN where exp(logvar) is infinite
        wide = torch.promote_types(mu.dtype, torch.float32)
        std_eps, _ = forward_op(torch.zeros_like(mu, dtype=wide), logvar.to(wide), seed, ctx.row_offset)
        return dz, (std_eps * dz / 2).to(mu.dtype), None, None
    return *backward_op(dz, dkl, mu, logvar, seed, ctx.row_offset), None, None


def no_second_derivative(ctx, *gradients_of_gradients: Tensor) -> None:
    """The backward of the backward."""
    raise RuntimeError("reparameterize_kl: asked for a second derivative, which the extension does not have; "
                       "PEGASUS_EXTENSION=0 takes the reference, which does")


class Fused(torch.autograd.Function):
    """What register_autograd does for the op, at two thirds of its cost a call: for eager mode alone."""

    @staticmethod
    def forward(ctx, *inputs):
        save_inputs(ctx, inputs, None)
        with torch._C._AutoDispatchBelowAutograd():
            return forward_op(*inputs)

    @staticmethod
    def backward(ctx, dz, dkl):
        if torch.is_grad_enabled():  # create_graph=True: through the registered op, which refuses what may follow
            return gradients(ctx, dz, dkl)
        with torch._C._AutoDispatchBelowAutograd():
            return gradients(ctx, dz, dkl)


apply_fused = super(torch.autograd.Function, Fused).apply  # Function.apply without its 5 us of care for torch.func
extension, missing = None, ""  # the module `pegasus_op`, where it is built and wanted; why there is none
try:
    if not UNWANTED:
        import pegasus_op as extension
except ModuleNotFoundError:
    missing = "the extension is not built"
except ImportError as error:
    if "PEGASUS_SIMD" in str(error):
        raise
    missing = f"the extension can't be loaded ({error})"  # say, of a CUDA that is gone
if extension:  # importing it has defined the ops; here are their shapes and derivatives
    torch.library.register_fake("pegasus::reparameterize_kl", fake_forward)
    torch.library.register_fake("pegasus::reparameterize_kl_backward", fake_backward)
    torch.library.register_autograd("pegasus::reparameterize_kl", gradients, setup_context=save_inputs)
    torch.library.register_autograd("pegasus::reparameterize_kl_backward", no_second_derivative)
    forward_op = torch.ops.pegasus.reparameterize_kl.default
    backward_op = torch.ops.pegasus.reparameterize_kl_backward.default
silent = UNWANTED


def fallback(mu: Tensor, logvar: Tensor, seed: Tensor, row_offset: int) -> tuple[Tensor, Tensor]:
    """The checked reference; says once, on stderr, what it stands in for."""
    global silent
    if not silent and not torch.compiler.is_compiling():
        silent = True
        reason = missing or f"the extension has no kernels for {mu.device.type}"
        print(f"reparam: {reason}, so its slower PyTorch reference is used; `python setup.py build_ext --inplace "
              "--force` builds it, for CUDA where there is an nvcc of torch's CUDA.", file=sys.stderr)
    check(mu, logvar, seed)
    return reference(mu, logvar, seed, row_offset)


def reparameterize_kl(mu: Tensor, logvar: Tensor, seed: Tensor, row_offset: int = 0) -> tuple[Tensor, Tensor]:
    """Draw z ~ N(mu, exp(logvar)) and sum KL(N(mu, exp(logvar)) || N(0, I)) per row, in nats.

    Kingma and Welling, Auto-Encoding Variational Bayes (2014), sections 2.4 and appendix B:
    z = mu + exp(logvar / 2) * eps and kl_i = 1/2 sum_j [exp(logvar) + mu^2 - 1 - logvar].

    mu, logvar: (B, D), float32, float64, bfloat16 or float16, any row stride. seed: int64, one element, same device.
    row_offset: index of row 0 in the global batch; rows computed apart equal those computed together.
    Returns z (B, D) in mu's dtype and kl (B,) in float32 (float64 for float64).
    Raises ValueError or TypeError naming the argument that does not fit. A second derivative through kl is an error,
    except under torch.func, which gets the reference, as forward-mode derivatives do.
    """
    if extension is None or not (mu.is_cpu or mu.is_meta or (mu.is_cuda and extension.cuda_architectures)):
        return fallback(mu, logvar, seed, row_offset)
    if torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0:
        check(mu, logvar, seed)
        return reference(mu, logvar, seed, row_offset)  # has derivatives of all kinds
    if torch.compiler.is_compiling():
        return forward_op(mu, logvar, seed, row_offset)
    try:
        if torch.is_grad_enabled() and (mu.requires_grad or logvar.requires_grad):
            return apply_fused(mu, logvar, seed, row_offset)
        with torch._C._AutoDispatchBelowAutograd():
            return forward_op(mu, logvar, seed, row_offset)
    except RuntimeError:
        check(mu, logvar, seed)  # the same complaint with a type of its own
        raise


def normals(rows: int, columns: int, seed: Tensor, row_offset: int = 0) -> Tensor:
    """Standard normals, float32 (rows, columns), on the seed's device: the noise of `reparameterize_kl`."""
    zeros = torch.zeros(rows, columns, device=seed.device)
    return reparameterize_kl(zeros, zeros, seed, row_offset)[0]
