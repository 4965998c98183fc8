"""Reparameterize and KL in one call, with noise that is a function of its arguments.

    import torch, reparam
    z, kl = reparam.reparameterize_kl(mu, logvar, torch.tensor(7))  # (B, D), (B,)

Row r, columns 4g to 4g+3 take their normals from one block of Philox4x32-10 (Salmon et
al. 2011): counter (g low, g high, r low, r high), key (seed low, seed high), 32-bit
words. The block's words w0..w3 become radius(w0) * direction(w1) and
radius(w2) * direction(w3), two normals each (Box and Muller 1958).

The extension `pegasus_op` does the work where it is built for the tensors' device
(python setup.py build_ext --inplace). Elsewhere `reference` does, with the same noise.
PEGASUS_EXTENSION=0 takes the reference anyway. PEGASUS_SIMD=baseline|avx2|avx512 forces
the extension's instruction set, which changes no bit of the result.
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
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
Pair = tuple[Tensor, Tensor]


# ---- noise, in plain PyTorch ----


def philox(counter: list, key: list) -> list:
    """Compute a Philox4x32-10 block: 4 counter words and 2 key words to 4 words.

    Words are Python ints or int64 tensors, below 2^32. Products wrap modulo 2^64, which
    leaves both halves right.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        product0 = c0 * MULTIPLIERS[0]
        product1 = c2 * MULTIPLIERS[1]
        c0 = (product1 >> 32 & MASK) ^ c1 ^ k0
        c1 = product1 & MASK
        c2 = (product0 >> 32 & MASK) ^ c3 ^ k1
        c3 = product0 & MASK
        k0 = k0 + WEYL[0] & MASK
        k1 = k1 + WEYL[1] & MASK
    return [c0, c1, c2, c3]


def derive_seed(seed: int, step: int, purpose: int) -> int:
    """Derive a seed for one purpose at one step of a run, a signed 64-bit int.

    It is Philox's output for key = seed, counter = (step, purpose). With `seed + step`
    neighbouring runs would share noise.
    """
    counter = [step & MASK, step >> 32 & MASK, purpose, 0]
    low, high, _, _ = philox(counter, [seed & MASK, seed >> 32 & MASK])
    return (high << 32 | low) - (high >> 31 << 64)


def words(rows: int, groups: int, seed: Tensor, row_offset: int = 0) -> Tensor:
    """Compute the noise's words, int64 (rows, groups, 4), on the seed's device."""
    seed = seed.reshape(())
    device = seed.device
    row = torch.arange(row_offset, row_offset + rows, device=device)[:, None]
    group = torch.arange(groups, device=device)[None, :]
    counter = [group & MASK, group >> 32, row & MASK, row >> 32 & MASK]
    block = philox(counter, [seed & MASK, seed >> 32 & MASK])
    return torch.stack(torch.broadcast_tensors(*block), -1)


def direction(word: Tensor, dtype: torch.dtype) -> Tensor:
    """Map words (...) to points of the unit circle (..., 2).

    The low 30 bits are an angle, at most an eighth of a turn to either side of zero.
    Bit 31 is the sign of its cosine, and bit 30 exchanges cosine and sine: together
    they reach all four quarters, at less work than an angle of a whole turn.
    """
    signed = (word & 0x3FFFFFFF) - (word >> 29 & 1) * 2**30
    angle = signed.to(dtype) * (math.pi / 2 * 2.0**-30)
    sign = 1 - (word >> 31) * 2
    point = torch.stack([angle.cos() * sign, angle.sin()], -1)
    exchange = (word >> 30 & 1 == 1)[..., None]
    return torch.where(exchange, point.flip(-1), point)


def normals_from_words(word: Tensor, dtype: torch.dtype) -> Tensor:
    """Map words (..., 4) to normals (..., 4), after Box and Muller.

    The radius uses all 32 bits of a word, so the normals reach 6.66.
    """
    uniform = (word[..., 0::2].to(dtype) + 1) * 2.0**-32
    radius = uniform.log().mul(-2).clamp(min=0).sqrt()
    return (radius[..., None] * direction(word[..., 1::2], dtype)).flatten(-2)


# ---- the op in plain PyTorch, and its checks ----


def kl_dtype(mu: Tensor) -> torch.dtype:
    """Return the dtype of kl and of all arithmetic: float32, or float64 for float64."""
    return torch.promote_types(mu.dtype, torch.float32)


def reference(mu: Tensor, logvar: Tensor, seed: Tensor, row_offset: int = 0) -> Pair:
    """`reparameterize_kl` in plain PyTorch: the tests' oracle, and the fallback."""
    rows, columns = mu.shape
    dtype = kl_dtype(mu)
    word = words(rows, (columns + 3) // 4, seed, row_offset)
    eps = normals_from_words(word, dtype).flatten(1)[:, :columns]
    m = mu.to(dtype)
    v = logvar.to(dtype)
    z = m + (v / 2).exp() * eps
    kl = (v.exp() + m * m - 1 - v).sum(1) / 2
    return z.to(mu.dtype), kl


def check(mu: Tensor, logvar: Tensor, seed: Tensor) -> None:
    """Raise ValueError or TypeError naming the argument, what it is and should be."""
    shape = tuple(mu.shape)
    if len(shape) != 2:
        raise ValueError(f"mu: got shape {shape}, wanted two dimensions (B, D)")
    if mu.dtype not in DTYPES:
        wanted = ", ".join(map(str, DTYPES))
        raise TypeError(f"mu: got {mu.dtype}, wanted one of {wanted}")
    if logvar.shape != mu.shape:
        got = tuple(logvar.shape)
        raise ValueError(f"logvar: got shape {got}, wanted mu's {shape}")
    if logvar.dtype != mu.dtype:
        raise ValueError(f"logvar: got dtype {logvar.dtype}, wanted mu's {mu.dtype}")
    if logvar.device != mu.device:
        raise ValueError(f"logvar: got device {logvar.device}, wanted mu's {mu.device}")
    if seed.dtype != torch.int64 or seed.numel() != 1 or seed.device != mu.device:
        got = f"{seed.dtype} of {seed.numel()} elements on {seed.device}"
        wanted = f"torch.int64 of one element on {mu.device}"
        raise ValueError(f"seed: got {got}, wanted {wanted}")


# ---- the extension: shapes and derivatives of its ops ----


def fake_forward(mu: Tensor, logvar: Tensor, seed: Tensor, row_offset: int = 0) -> Pair:
    """Shapes and dtypes of `reparameterize_kl`, for the compiler."""
    check(mu, logvar, seed)
    return mu.new_empty(mu.shape), mu.new_empty(mu.shape[:1], dtype=kl_dtype(mu))


def fake_backward(dz: Tensor, dkl: Tensor, mu: Tensor, *others: object) -> Pair:
    """Shapes and dtypes of the gradients, for the compiler."""
    return mu.new_empty(mu.shape), mu.new_empty(mu.shape)


def save_inputs(ctx, inputs: tuple, output: tuple | None) -> None:
    """Keep inputs and seed for the backward, which draws the noise again."""
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs[:3])
    ctx.row_offset = inputs[3]


def gradients(ctx, dz: Tensor | None, dkl: Tensor | None) -> tuple:
    """Gradients with respect to mu and logvar; None for seed and row_offset.

    dz or dkl is None where z or kl is not used.
    """
    mu, logvar, seed = ctx.saved_tensors
    if dz is None:
        dz = torch.zeros_like(mu)
    if dkl is not None:
        dmu, dlogvar = backward_op(dz, dkl, mu, logvar, seed, ctx.row_offset)
        return dmu, dlogvar, None, None
    # a dkl of zero would give NaN where exp(logvar) is infinite
    dtype = kl_dtype(mu)
    zeros = torch.zeros_like(mu, dtype=dtype)
    std_eps, _ = forward_op(zeros, logvar.to(dtype), seed, ctx.row_offset)
    return dz, (std_eps * dz / 2).to(mu.dtype), None, None


def no_second_derivative(ctx, *gradients_of_gradients: Tensor) -> None:
    """Refuse the backward of the backward."""
    raise RuntimeError(
        "reparameterize_kl: asked for a second derivative, which the extension does "
        "not have; PEGASUS_EXTENSION=0 takes the reference, which does"
    )


class Fused(torch.autograd.Function):
    """register_autograd's work for eager mode, at two thirds of its cost a call."""

    @staticmethod
    def forward(ctx, *inputs):
        save_inputs(ctx, inputs, None)
        with torch._C._AutoDispatchBelowAutograd():
            return forward_op(*inputs)

    @staticmethod
    def backward(ctx, dz, dkl):
        if torch.is_grad_enabled():
            # create_graph=True: by the registered op, which refuses a second derivative
            return gradients(ctx, dz, dkl)
        with torch._C._AutoDispatchBelowAutograd():
            return gradients(ctx, dz, dkl)


# Function.apply without the 5 us that it takes for torch.func
apply_fused = super(torch.autograd.Function, Fused).apply

extension = None  # the module pegasus_op, where it is built and wanted
missing = ""  # why there is none
silent = os.environ.get("PEGASUS_EXTENSION", "1") == "0"  # about the reference's use
try:
    if not silent:
        import pegasus_op as extension
except ModuleNotFoundError:
    missing = "the extension is not built"
except ImportError as error:
    if "PEGASUS_SIMD" in str(error):
        raise
    missing = f"the extension can't be loaded ({error})"  # say, CUDA was removed
if extension:
    # importing it has defined the ops; here are their shapes and derivatives
    forward_op = torch.ops.pegasus.reparameterize_kl.default
    backward_op = torch.ops.pegasus.reparameterize_kl_backward.default
    torch.library.register_fake(forward_op, fake_forward)
    torch.library.register_fake(backward_op, fake_backward)
    torch.library.register_autograd(forward_op, gradients, setup_context=save_inputs)
    torch.library.register_autograd(backward_op, no_second_derivative)


# ---- what others call ----


def fallback(mu: Tensor, logvar: Tensor, seed: Tensor, row_offset: int) -> Pair:
    """Check the arguments and use the reference; say so once, on stderr."""
    global silent
    if not silent and not torch.compiler.is_compiling():
        silent = True
        reason = missing or f"the extension has no kernels for {mu.device.type}"
        print(
            f"reparam: {reason}, so its slower PyTorch reference is used; "
            "`python setup.py build_ext --inplace --force` builds it, for CUDA where "
            "there is an nvcc of torch's CUDA.",
            file=sys.stderr,
        )
    check(mu, logvar, seed)
    return reference(mu, logvar, seed, row_offset)


def has_kernels(mu: Tensor) -> bool:
    """Whether the extension computes on the tensor's device."""
    if mu.is_cuda:
        return bool(extension.cuda_architectures)
    return mu.is_cpu or mu.is_meta


def reparameterize_kl(
    mu: Tensor, logvar: Tensor, seed: Tensor, row_offset: int = 0
) -> tuple[Tensor, Tensor]:
    """Sample z ~ N(mu, exp(logvar)); sum KL(N(mu, exp(logvar)) || N(0, I)) per row.

    Kingma and Welling, Auto-Encoding Variational Bayes (2014), section 2.4, appendix B:
    z = mu + exp(logvar / 2) * eps, kl_i = 1/2 sum_j [exp(logvar) + mu^2 - 1 - logvar].

    mu, logvar: (B, D), float32, float64, bfloat16 or float16, any row stride.
    seed: int64, one element, on the same device.
    row_offset: index of row 0 in the global batch; rows computed apart equal those
    computed together.

    Returns z (B, D) in mu's dtype and kl (B,), nats, float32 (float64 for float64).
    Raises ValueError or TypeError naming the argument that does not fit. A second
    derivative is an error, except under torch.func, which gets the reference, as
    forward-mode derivatives do.
    """
    if extension is None or not has_kernels(mu):
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
        check(mu, logvar, seed)  # the same error, with a type of its own
        raise


def normals(rows: int, columns: int, seed: Tensor, row_offset: int = 0) -> Tensor:
    """Sample float32 (rows, columns) on the seed's device: the noise of the op."""
    zeros = torch.zeros(rows, columns, device=seed.device)
    return reparameterize_kl(zeros, zeros, seed, row_offset)[0]
