"""Reparameterize and KL in one call, with noise that is a function of its arguments.

    import torch, reparam
    z, kl = reparam.reparameterize_kl(mu, logvar, seed=7)  # (B, D), (B,)
    q = reparam.DiagonalGaussian(mu, logvar)  # (B, ...), say (B, C, H, W)
    z, kl = q.rsample_kl(seed=7)  # (B, ...), (B,)

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
import operator
import os
import sys

import torch
from torch import Tensor
from torch.autograd import forward_ad

MASK = 0xFFFFFFFF
MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
WEYL = (0x9E3779B9, 0xBB67AE85)
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
GOLDEN = -0x61C8864680B583EB  # 2^64 / golden ratio, odd: its multiples are all different
Pair = tuple[Tensor, Tensor]


# ---- noise, in plain PyTorch ----


def philox(counter: list[int], key: list[int]) -> list[int]:
    """Compute a Philox4x32-10 block: 4 counter words and 2 key words to 4 words."""
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
    neighbouring runs would share noise. Raises TypeError for what is no whole number.
    """
    for name, number in (("seed", seed), ("step", step), ("purpose", purpose)):
        if not hasattr(number, "__index__"):
            raise TypeError(f"{name}: got {number!r:.60}, wanted an int")
    seed, step, purpose = map(operator.index, (seed, step, purpose))  # numpy's would overflow
    counter = [step & MASK, step >> 32 & MASK, purpose, 0]
    low, high, _, _ = philox(counter, [seed & MASK, seed >> 32 & MASK])
    return (high << 32 | low) - (high >> 31 << 64)


def words(rows: int, groups: int, seed: Tensor, row_offset: int = 0) -> Tensor:
    """Compute the noise's words, int64 (rows, groups, 4), on the seed's device.

    `philox` for all blocks at once. Words 0 and 2 of a block are one tensor, 1 and 3
    another; their high halves may hold anything until they are multiplied. Products
    wrap modulo 2^64, which leaves both halves right.
    """
    seed = seed.reshape(())
    row = torch.arange(row_offset, row_offset + rows, device=seed.device)[:, None]
    group = torch.arange(groups, device=seed.device)
    even = torch.stack(torch.broadcast_tensors(group, row))
    odd = even >> 32
    rounds = torch.arange(10, device=seed.device)[:, None]
    key = torch.stack([seed, seed >> 32]) + rounds * torch.tensor(WEYL, device=seed.device)
    multipliers = torch.tensor(MULTIPLIERS, device=seed.device)[:, None, None]
    for round_key in key[..., None, None].unbind():
        product = ((even & MASK) * multipliers).flip(0)
        even = (product >> 32) ^ odd ^ round_key
        odd = product
    return torch.stack([even[0], odd[0], even[1], odd[1]], -1) & MASK


def direction(word: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Map words to points of the unit circle, x and y.

    The low 30 bits are an angle, at most an eighth of a turn to either side of zero.
    Bit 31 is the sign of its cosine, and bit 30 exchanges cosine and sine: together
    they reach all four quarters, at less work than an angle of a whole turn has in the
    extension. Here the angle is turned instead.
    """
    signed = ((word & 0x3FFFFFFF) ^ 2**29) - 2**29
    angle = signed.to(dtype) * (math.pi / 2 * 2.0**-30)
    turn = word >> 30
    start = torch.tensor([0, 0.5, 1, -0.5], dtype=dtype, device=word.device) * math.pi
    sign = torch.tensor([1, -1, -1, 1], dtype=dtype, device=word.device)
    angle = start.take(turn) + sign.take(turn) * angle
    return angle.cos(), angle.sin()


def normals_from_words(word: Tensor, dtype: torch.dtype) -> Tensor:
    """Map words (..., 4) to normals (..., 4), after Box and Muller.

    The radius uses all 32 bits of a word, so the normals reach 6.66.
    """
    uniform = (word[..., 0::2].to(dtype) + 1) * 2.0**-32
    radius = uniform.log().mul(-2).sqrt()
    x, y = direction(word[..., 1::2], dtype)
    return torch.stack([radius * x, radius * y], -1).flatten(-2)


# ---- the op in plain PyTorch, and its checks ----


def kl_dtype(mu: Tensor) -> torch.dtype:
    """Return the dtype of kl and of all arithmetic: float32, or float64 for float64."""
    return torch.promote_types(mu.dtype, torch.float32)


def kl_of_elements(mu: Tensor, logvar: Tensor) -> Tensor:
    """Return each element's KL(N(mu, exp(logvar)) || N(0, 1)), in nats.

    exp(logvar) - 1 - logvar, written so that it keeps its digits where logvar is near
    zero, and is not negative there.
    """
    minus_one = torch.expm1(logvar / 2)
    return (minus_one * minus_one + mu * mu) / 2 + (minus_one - logvar / 2)


def reference(mu: Tensor, logvar: Tensor, seed: Tensor, row_offset: int = 0) -> Pair:
    """`reparameterize_kl` in plain PyTorch: the tests' oracle, and the fallback."""
    rows, columns = mu.shape
    dtype = kl_dtype(mu)
    word = words(rows, (columns + 3) // 4, seed, row_offset)
    eps = normals_from_words(word, dtype).flatten(1)[:, :columns]
    m = mu.to(dtype)
    v = logvar.to(dtype)
    z = m + (v / 2).exp() * eps
    return z.to(mu.dtype), kl_of_elements(m, v).sum(1)


def type_name(value: object) -> str:
    """Return a value's type as people write it, as in numpy.int64."""
    kind = type(value)
    return kind.__name__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__name__}"


def check_tensors(values: dict[str, Tensor]) -> None:
    """Raise unless mu and logvar are tensors of one shape, device and known dtypes."""
    for name, value in values.items():
        if not isinstance(value, Tensor):
            raise TypeError(f"{name}: got {type_name(value)}, wanted a tensor")
        if value.dtype not in DTYPES:
            wanted = ", ".join(map(str, DTYPES))
            raise TypeError(f"{name}: got {value.dtype}, wanted one of {wanted}")
    mu, logvar = values.values()
    if logvar.shape != mu.shape:
        got = tuple(logvar.shape)
        raise ValueError(f"logvar: got shape {got}, wanted mu's {tuple(mu.shape)}")
    if logvar.device != mu.device:
        raise ValueError(f"logvar: got device {logvar.device}, wanted mu's {mu.device}")


def check(mu: Tensor, logvar: Tensor, seed: Tensor) -> None:
    """Raise ValueError or TypeError naming the argument, what it is and should be."""
    if isinstance(mu, Tensor) and mu.dim() != 2:
        raise ValueError(f"mu: got shape {tuple(mu.shape)}, wanted two dimensions (B, D)")
    check_tensors({"mu": mu, "logvar": logvar})
    if seed.dtype != torch.int64 or seed.numel() != 1 or seed.device != mu.device:
        got = f"{seed.dtype} of {seed.numel()} elements on {seed.device}"
        wanted = f"torch.int64 of one element on {mu.device}"
        raise ValueError(f"seed: got {got}, wanted {wanted}")


def check_offset(row_offset: int, rows: int) -> None:
    """Raise where the rows' numbers are no int64."""
    if not isinstance(row_offset, int):
        raise TypeError(f"row_offset: got {type_name(row_offset)}, wanted an int")
    if not 0 <= row_offset <= 2**63 - 1 - rows:
        raise ValueError(f"row_offset: got {row_offset}, wanted 0 to 2^63 - 1 - B")


def check_int_seed(seed: int) -> None:
    """Raise where a seed is no int of 64 bits."""
    if not isinstance(seed, int) or isinstance(seed, bool):
        raise TypeError(f"seed: got {type_name(seed)}, wanted an int")
    if not -(2**63) <= seed < 2**63:
        raise ValueError(f"seed: got {seed}, wanted -2^63 to 2^63 - 1, as derive_seed gives")


def seed_tensor(seed: Tensor | int, device: torch.device) -> Tensor:
    """Return an int seed as a tensor on a device, a tensor as it is."""
    if isinstance(seed, Tensor):
        return seed
    check_int_seed(seed)
    return torch.full((), seed, dtype=torch.int64, device=device)


# ---- the extension: shapes and derivatives of its ops ----


def fake_forward(
    mu: Tensor, logvar: Tensor, seed: Tensor, row_offset: int = 0, with_kl: bool = True
) -> Pair:
    """Shapes and dtypes of `reparameterize_kl`, for the compiler."""
    check(mu, logvar, seed)
    rows = mu.shape[0] if with_kl else 0
    return mu.new_empty(mu.shape), mu.new_empty(rows, dtype=kl_dtype(mu))


def fake_backward(dz: Tensor, dkl: Tensor | None, mu: Tensor, *others: object) -> Pair:
    """Shapes and dtypes of the gradients, for the compiler."""
    return mu.new_empty(mu.shape), mu.new_empty(mu.shape)


def save_inputs(ctx, inputs: tuple, output: tuple) -> None:
    """Keep inputs and seed for the backward, which draws the noise again."""
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs[:3])
    ctx.row_offset = inputs[3]


def gradients(ctx, dz: Tensor | None, dkl: Tensor | None) -> tuple:
    """Gradients with respect to mu and logvar; None for the op's other arguments.

    dz or dkl is None where z or kl is not used.
    """
    return gradients_of(ctx.saved_tensors, ctx, dz, dkl)


def gradients_of(saved: tuple, ctx, dz: Tensor | None, dkl: Tensor | None) -> tuple:
    """`gradients`, of mu, logvar and seed."""
    mu, logvar, seed = saved
    if dz is None:
        dz = torch.zeros_like(mu)
    if ctx.needs_input_grad[1]:
        dmu, dlogvar = backward_op(dz, dkl, mu, logvar, seed, ctx.row_offset)
        return dmu, dlogvar, None, None, None
    dmu = dz if dkl is None else (dz + dkl[:, None] * mu).to(mu.dtype)
    return dmu, None, None, None, None


def no_second_derivative(ctx, *gradients_of_gradients: Tensor) -> None:
    """Refuse the backward of the backward."""
    raise RuntimeError(
        "reparameterize_kl: asked for a second derivative, which the extension does "
        "not have; PEGASUS_EXTENSION=0 takes the reference, which does"
    )


class Fused(torch.autograd.Function):
    """What the registered derivatives do, in eager mode, in half of their time."""

    @staticmethod
    def forward(ctx, *inputs):
        save_inputs(ctx, inputs, ())
        with torch._C._AutoDispatchBelowAutograd():
            return forward_op(*inputs)

    @staticmethod
    def backward(ctx, dz, dkl):
        saved = ctx.saved_tensors  # which checkpointing computes now, and needs autograd for
        if torch.is_grad_enabled():
            # create_graph=True: by the registered op, which refuses a second derivative
            return gradients_of(saved, ctx, dz, dkl)
        with torch._C._AutoDispatchBelowAutograd():
            return gradients_of(saved, ctx, dz, dkl)


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


def announce_fallback(device: torch.device) -> None:
    """Say once, on stderr, why the reference is used."""
    global silent
    if silent or torch.compiler.is_compiling():
        return
    silent = True
    reason = missing or f"the extension has no kernels for {device.type}"
    print(
        f"reparam: {reason}, so its slower PyTorch reference is used; in the repository "
        "`python setup.py build_ext --inplace --force`, or `pip install --force-reinstall "
        "--no-deps --no-build-isolation .`, builds it with a C++20 compiler, for CUDA where "
        "there is an nvcc of torch's CUDA.",
        file=sys.stderr,
    )


def has_kernels(mu: Tensor) -> bool:
    """Whether the extension computes on the tensor's device."""
    if extension is None:
        return False
    if mu.is_cuda:
        return bool(extension.cuda_architectures)
    return mu.is_cpu or mu.is_meta


def is_transformed(mu: Tensor, logvar: Tensor) -> bool:
    """Whether torch.func or forward-mode derivatives are at work.

    The extension has no rules for them; the reference needs none.
    """
    if torch._C._are_functorch_transforms_active():  # there is no public way to ask
        return True
    tangents = (forward_ad.unpack_dual(mu).tangent, forward_ad.unpack_dual(logvar).tangent)
    return tangents != (None, None)


def sample(
    mu: Tensor, logvar: Tensor, seed: Tensor | int, row_offset: int, with_kl: bool
) -> Pair:
    """Check the arguments; return z and kl, by the extension if it can."""
    if isinstance(mu, Tensor):
        seed = seed_tensor(seed, mu.device)
    check(mu, logvar, seed)
    if not torch.compiler.is_compiling():  # else the extension does, without a guard
        check_offset(row_offset, len(mu))
    if mu.dtype != logvar.dtype:
        dtype = torch.promote_types(mu.dtype, logvar.dtype)
        mu = mu.to(dtype)
        logvar = logvar.to(dtype)
    if not has_kernels(mu):
        announce_fallback(mu.device)
        return reference(mu, logvar, seed, row_offset)
    if is_transformed(mu, logvar):
        return reference(mu, logvar, seed, row_offset)
    if torch.compiler.is_compiling() or torch.jit.is_tracing():  # graphs want the op itself
        return forward_op(mu, logvar, seed, row_offset, with_kl)
    if torch.is_grad_enabled() and (mu.requires_grad or logvar.requires_grad):
        return Fused.apply(mu, logvar, seed, row_offset, with_kl)
    with torch._C._AutoDispatchBelowAutograd():
        return forward_op(mu, logvar, seed, row_offset, with_kl)


def reparameterize_kl(
    mu: Tensor, logvar: Tensor, seed: Tensor | int, row_offset: int = 0
) -> tuple[Tensor, Tensor]:
    """Sample z ~ N(mu, exp(logvar)); sum KL(N(mu, exp(logvar)) || N(0, I)) per row.

    Kingma and Welling, Auto-Encoding Variational Bayes (2014), section 2.4, appendix B:
    z = mu + exp(logvar / 2) * eps, kl_i = 1/2 sum_j [exp(logvar) + mu^2 - 1 - logvar].

    mu, logvar: (B, D), float32, float64, bfloat16 or float16, any row stride. Where their
    dtypes differ, the wider one is taken, as in PyTorch.
    seed: an int of 64 bits, or int64 of one element on the same device.
    row_offset: index of row 0 in the global batch; rows computed apart equal those
    computed together.

    Returns z (B, D) in mu's dtype and kl (B,), nats, float32 (float64 for float64).
    Raises ValueError or TypeError naming the argument that does not fit. A second
    derivative is an error, except under torch.func, which gets the reference, as
    forward-mode derivatives do.
    """
    return sample(mu, logvar, seed, row_offset, True)


def reparameterize(
    mu: Tensor, logvar: Tensor, seed: Tensor | int, row_offset: int = 0
) -> Tensor:
    """Sample z ~ N(mu, exp(logvar)), (B, D): `reparameterize_kl` without the KL."""
    return sample(mu, logvar, seed, row_offset, False)[0]


def normals(rows: int, columns: int, seed: Tensor | int, row_offset: int = 0) -> Tensor:
    """Sample float32 (rows, columns) on the seed's device: the noise of the op."""
    device = seed.device if isinstance(seed, Tensor) else "cpu"
    zeros = torch.zeros(rows, columns, dtype=torch.float32, device=device)
    return reparameterize(zeros, zeros, seed, row_offset)


class DiagonalGaussian:
    """The posterior N(mu, exp(logvar)) of independent elements.

    mu, logvar: (B, ...) with at least two dimensions, say an encoder's
    `output.chunk(2, 1)` of (B, 2 C, H, W), which is not copied. What stands behind the
    batch is one row of the op. Raises ValueError or TypeError for other arguments.
    """

    def __init__(self, mu: Tensor, logvar: Tensor):
        check_tensors({"mu": mu, "logvar": logvar})
        if mu.dim() < 2:
            got = tuple(mu.shape)
            raise ValueError(f"mu: got shape {got}, wanted two dimensions or more (B, ...)")
        self.mu = mu
        self.logvar = logvar

    def wide(self) -> Pair:
        """Return mu and logvar in the dtype of KL."""
        dtype = torch.promote_types(kl_dtype(self.mu), self.logvar.dtype)
        return self.mu.to(dtype), self.logvar.to(dtype)

    @property
    def stddev(self) -> Tensor:
        """The standard deviation, in mu's shape."""
        return (self.logvar / 2).exp()

    def mode(self) -> Tensor:
        """Return the most probable z, which is mu."""
        return self.mu

    def rsample(self, seed: Tensor | int, *, row_offset: int = 0) -> Tensor:
        """Sample z in mu's shape; gradients reach mu and logvar."""
        z = reparameterize(self.mu.flatten(1), self.logvar.flatten(1), seed, row_offset)
        return z.view(self.mu.shape)

    def rsample_kl(self, seed: Tensor | int, *, row_offset: int = 0) -> Pair:
        """Sample z in mu's shape and return it with `kl()`, (B,), in one pass."""
        mu = self.mu.flatten(1)
        z, kl = reparameterize_kl(mu, self.logvar.flatten(1), seed, row_offset)
        return z.view(self.mu.shape), kl

    def kl(self, reduction: str = "sum") -> Tensor:
        """Return KL to N(0, I) in nats: (B,), or with "none" of each element, (B, ...)."""
        if reduction not in ("sum", "none"):
            raise ValueError(f"reduction: got {reduction!r}, wanted 'sum' or 'none'")
        elements = kl_of_elements(*self.wide())
        return elements if reduction == "none" else elements.flatten(1).sum(1)

    def log_prob(self, z: Tensor) -> Tensor:
        """Return log q(z | x) in nats of z in mu's shape, (B,), or of (K, B, ...), (K, B).

        Raises ValueError for other shapes.
        """
        mu, logvar = self.wide()
        if z.shape[-mu.dim() :] != mu.shape:
            got, wanted = tuple(z.shape), tuple(mu.shape)
            raise ValueError(f"z: got shape {got}, wanted mu's {wanted}, or more before it")
        distance = (z.to(mu.dtype) - mu).square() * (-logvar).exp()
        elements = distance + logvar + math.log(2 * math.pi)
        return elements.flatten(1 - mu.dim()).sum(-1) / -2


class Reparameterize(torch.nn.Module):
    """`rsample_kl` with new noise at each call: a function of (seed, calls).

    The count of calls is a buffer, so a checkpoint has it. Under activation
    checkpointing a second forward would draw other noise: use DiagonalGaussian and
    a seed there.
    """

    def __init__(self, seed: int = 0):
        super().__init__()
        check_int_seed(seed)
        self.seed = seed
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))

    def forward(self, mu: Tensor, logvar: Tensor, row_offset: int = 0) -> Pair:
        """Return z in mu's shape (B, ...) and kl (B,)."""
        seed = self.calls * GOLDEN + self.seed
        self.calls += 1
        return DiagonalGaussian(mu, logvar).rsample_kl(seed, row_offset=row_offset)
