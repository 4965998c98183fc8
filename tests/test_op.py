"""The extension against the reference: values, gradients, bits, autograd, the compiler."""
import hashlib
import os
import time

import reparam

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd import forward_ad

if reparam.extension is None:
    reason = "the extension is not built, or PEGASUS_EXTENSION=0"
    pytest.skip(reason, allow_module_level=True)

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
TOLERANCE = {
    torch.float32: 5e-6,
    torch.float64: 1e-12,
    torch.bfloat16: 8e-3,
    torch.float16: 1e-3,
}
FORWARD = torch.ops.pegasus.reparameterize_kl.default
BACKWARD = torch.ops.pegasus.reparameterize_kl_backward.default
# a sanitizer slows down child processes and stops compilers
SANITIZED = "libasan" in os.environ.get("LD_PRELOAD", "")


def draw(rows: int, columns: int, dtype: torch.dtype, extra: int = 0) -> tuple:
    """mu, logvar, dz (rows, columns) with rows `extra` elements further apart, dkl, seed."""
    generator = torch.Generator().manual_seed(rows * 1000 + columns)
    matrices = []
    for _ in range(3):
        whole = torch.randn(rows, columns + extra, generator=generator).to(dtype)
        matrices.append(whole[:, :columns])
    dkl = torch.randn(rows, generator=generator, dtype=reparam.kl_dtype(matrices[0]))
    return *matrices, dkl, torch.tensor(77)


def results(function, mu, logvar, dz, dkl, seed, row_offset=0) -> tuple[torch.Tensor, ...]:
    """z, kl, dmu, dlogvar."""
    mu = mu.detach().requires_grad_()
    logvar = logvar.detach().requires_grad_()
    z, kl = function(mu, logvar, seed, row_offset)
    gradients = torch.autograd.grad((z, kl), (mu, logvar), (dz, dkl))
    return z.detach(), kl.detach(), *gradients


def assert_agree(got, wanted, dtype, columns):
    for name, g, w in zip(("z", "kl", "dmu", "dlogvar"), got, wanted, strict=True):
        assert g.dtype == w.dtype and g.shape == w.shape
        tolerance = TOLERANCE[dtype]
        scale = 1
        if name == "kl":
            tolerance = TOLERANCE[g.dtype]
            scale = max(1, columns) ** 0.5
        torch.testing.assert_close(
            g, w, rtol=tolerance, atol=tolerance * scale, equal_nan=True,
            msg=lambda text, name=name: f"{name}: {text}",
        )


def assert_both_agree(arguments, dtype, columns):
    got = results(reparam.reparameterize_kl, *arguments)
    assert_agree(got, results(reparam.reference, *arguments), dtype, columns)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("columns", [1, 4, 31, 32, 128, 130, 1000])
def test_values_and_gradients(columns, dtype):
    assert_both_agree(draw(6, columns, dtype, extra=3), dtype, columns)


@settings(deadline=None, derandomize=True, max_examples=60)
@given(
    rows=st.integers(0, 9),
    columns=st.integers(0, 300),
    extra=st.integers(0, 5),
    dtype=st.sampled_from(DTYPES),
    offset=st.sampled_from([0, 1, 2**32 - 4, 2**62]),
    transposed=st.booleans(),
    chunked=st.booleans(),
)
def test_any_shape_stride_and_dtype(rows, columns, extra, dtype, offset, transposed, chunked):
    mu, logvar, dz, dkl, seed = draw(rows, columns, dtype, extra)
    if chunked and columns:  # an encoder's two halves
        mu, logvar = torch.cat([mu, logvar], 1).chunk(2, 1)
    if transposed:
        logvar = logvar.t().contiguous().t()
        dz = dz.t().contiguous().t()
    assert_both_agree((mu, logvar, dz, dkl, seed, offset), dtype, columns)


SPECIAL = [0.0, -0.0, float("inf"), float("-inf"), float("nan"), 1e-30]
SPECIAL += [90.0, -90.0, 180.0, -180.0, 1e20, -1e20, 3e38]
SPECIAL_VALUES = st.lists(st.sampled_from(SPECIAL), min_size=5, max_size=5)


@settings(deadline=None, derandomize=True, max_examples=60)
@given(
    mu=SPECIAL_VALUES,
    logvar=SPECIAL_VALUES,
    dz=st.sampled_from([0.0, 1.0, -2.0]),
    dkl=st.sampled_from([0.0, 1.0, -3.0]),
    columns=st.sampled_from([5, 65]),
    dtype=st.sampled_from(DTYPES),
)
def test_special_values_pass_as_in_eager(mu, logvar, dz, dkl, columns, dtype):
    mu = torch.tensor(mu).repeat(columns // 5).to(dtype)[None, :]
    logvar = torch.tensor(logvar).repeat(columns // 5).to(dtype)[None, :]
    dz = torch.full_like(mu, dz)
    dkl = torch.tensor([dkl], dtype=reparam.kl_dtype(mu))
    assert_both_agree((mu, logvar, dz, dkl, torch.tensor(3)), dtype, columns)


def test_exp_where_float32_ends():
    infinity = float("inf")
    values = [177.0, 178.0, 180.0, infinity, -200.0, -infinity, float("nan"), 0.0]
    logvar = torch.tensor([values])
    mu = torch.zeros_like(logvar)
    seed = torch.tensor(3)
    z, _ = reparam.reparameterize_kl(mu, logvar, seed)
    eps, _ = reparam.reparameterize_kl(mu, mu, seed)
    wanted = (logvar / 2).exp()
    torch.testing.assert_close(z / eps, wanted, rtol=1e-5, atol=1e-37, equal_nan=True)


@pytest.mark.parametrize("output", [0, 1])
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_gradients_of_one_output_alone(output, compiled, dtype):
    """z's are finite where exp(logvar) is not: with a zero for dkl they would be NaN."""
    high = [89.0, 120.0, 150.0] if dtype == torch.float32 and output == 0 else []
    logvar = torch.tensor([[*high, 1.0, 0.5, -3.0, -15.0]], dtype=dtype).requires_grad_()
    mu = torch.ones_like(logvar).requires_grad_()

    def loss(function):
        return 1000 * function(mu, logvar, torch.tensor(3))[output].float().sum()

    ours = torch.compile(loss, backend="aot_eager") if compiled else loss
    got = torch.autograd.grad(ours(reparam.reparameterize_kl), (mu, logvar))
    wanted = torch.autograd.grad(loss(reparam.reference), (mu, logvar))
    tolerance = 1e-5 if dtype == torch.float32 else 2e-3
    for g, w in zip(got, wanted, strict=True):
        assert w.isfinite().all()
        torch.testing.assert_close(g, w, rtol=tolerance, atol=0)


def digest(mu, logvar, dz, dkl, seed) -> bytes:
    """A digest of all that both ops compute."""
    outputs = (*FORWARD(mu, logvar, seed), *BACKWARD(dz, dkl, mu, logvar, seed))
    return hashlib.sha256(b"".join(t.numpy().tobytes() for t in outputs)).digest()


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("flush", [False, True])
def test_bits_do_not_depend_on_the_threads_float_state(threads, flush):
    before = torch.get_num_threads()
    flushed = torch.tensor(1e-39) * 1 == 0
    arguments = draw(700, 131, torch.float32)
    arguments[0][:, ::3] *= 1e-38  # denormals, which the state would flush to zero
    arguments[2][:, ::2] *= 1e-38
    wanted = digest(*arguments)
    try:
        torch.set_num_threads(threads)
        torch.set_flush_denormal(flush)
        got = digest(*arguments)
    finally:
        torch.set_flush_denormal(bool(flushed))
        torch.set_num_threads(before)
    assert got == wanted


def test_batch_splits_change_no_bit_of_the_gradients():
    mu, logvar, dz, dkl, seed = draw(10, 77, torch.float32)
    function = reparam.reparameterize_kl
    whole = results(function, mu, logvar, dz, dkl, seed, 9)
    parts = []
    for rows in (slice(0, 1), slice(1, 8), slice(8, 10)):
        some = (mu[rows], logvar[rows], dz[rows], dkl[rows])
        parts.append(results(function, *some, seed, 9 + rows.start))
    for i, wanted in enumerate(whole):
        assert torch.equal(wanted, torch.cat([part[i] for part in parts]))


def test_the_build_says_what_it_holds():
    assert reparam.extension.simd_level in ("baseline", "avx2", "avx512")
    assert isinstance(reparam.extension.cuda_architectures, str)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_saved_for_backward_are_the_inputs_and_the_seed(dtype):
    mu, logvar, _, _, seed = draw(4, 8, dtype)
    mu = mu.clone().requires_grad_()
    logvar = logvar.clone().requires_grad_()
    saved = []

    def pack(tensor):
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        reparam.reparameterize_kl(mu, logvar, seed)
    assert [t.data_ptr() for t in saved] == [t.data_ptr() for t in (mu, logvar, seed)]


@pytest.mark.parametrize("function", [reparam.reparameterize_kl, FORWARD])
def test_a_second_derivative_is_an_error(function):
    mu, logvar, _, _, seed = draw(2, 4, torch.float64)
    mu.requires_grad_()
    logvar.requires_grad_()
    z, kl = function(mu, logvar, seed)
    first, = torch.autograd.grad(z.pow(2).sum() + kl.sum(), mu, create_graph=True)
    with pytest.raises(RuntimeError, match="second derivative"):
        first.sum().backward()


# opcheck's own warning, in torch 2.14
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.parametrize("grad", [False, True])
def test_opcheck(grad):
    for dtype in (torch.float32, torch.bfloat16):
        mu, logvar, dz, dkl, seed = draw(3, 6, dtype, extra=2)
        mu = mu.clone().requires_grad_(grad)
        logvar = logvar.clone().requires_grad_(grad)
        torch.library.opcheck(FORWARD, (mu, logvar, seed, 4))
        if not grad:  # the derivative of the backward is an error by design
            torch.library.opcheck(FORWARD, (mu, logvar, seed, 4, False))
            torch.library.opcheck(BACKWARD, (dz, dkl, mu, logvar, seed, 4))


@pytest.mark.skipif(SANITIZED, reason="torch.compile's compiler fails under a sanitizer")
def test_compiles_whole_with_one_graph_for_all_batch_sizes():
    @torch.compile(fullgraph=True, dynamic=True)
    def loss(mu, logvar, seed, row_offset):
        z, kl = reparam.reparameterize_kl(mu * 2, logvar, seed, row_offset)
        return (z.sin().sum(1) + kl).sum()

    for rows, offset in ((4, 0), (6, 10)):
        gradients = []
        for function in (loss, loss._torchdynamo_orig_callable):
            mu, logvar, _, _, seed = draw(rows, 12, torch.float32)
            mu.requires_grad_()
            logvar.requires_grad_()
            value = function(mu, logvar, seed, offset)
            gradients.append((value, *torch.autograd.grad(value, (mu, logvar))))
        torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-5)


class Module(torch.nn.Module):
    def forward(self, mu, logvar, seed):
        return reparam.reparameterize_kl(mu, logvar, seed)


def test_exports_whole():
    mu, logvar, _, _, seed = draw(4, 12, torch.float32)
    rows = torch.export.Dim("rows", min=2)
    shapes = ({0: rows}, {0: rows}, None)
    program = torch.export.export(Module(), (mu, logvar, seed), dynamic_shapes=shapes)
    targets = [node.target for node in program.graph.nodes if node.op == "call_function"]
    assert FORWARD in targets
    mu, logvar, _, _, seed = draw(7, 12, torch.float32)
    got = program.module()(mu, logvar, seed)
    assert all(map(torch.equal, got, FORWARD(mu, logvar, seed)))


def test_work_is_shared_among_threads():
    """Of one long row too: the others' time is what the process has beyond this thread's."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        for shape in ((2048, 256), (1, 2**19)):
            zeros = torch.zeros(shape)
            FORWARD(zeros, zeros, torch.tensor(1))
            own = time.thread_time()
            whole = time.process_time()
            for _ in range(20):
                FORWARD(zeros, zeros, torch.tensor(1))
            own = time.thread_time() - own
            whole = time.process_time() - whole
            assert whole - own > 0.3 * own, shape
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("use", [0, 1])
@pytest.mark.parametrize("which", [0, 1])
def test_only_one_input_requires_grad_and_unused_outputs(use, which):
    mu, logvar, dz, dkl, seed = draw(3, 5, torch.float64)
    gradients = []
    for function in (reparam.reparameterize_kl, reparam.reference):
        x = [mu.clone(), logvar.clone()]
        x[which].requires_grad_()
        output = function(*x, seed)[use]
        gradients.append(torch.autograd.grad(output, x[which], (dz, dkl)[use])[0])
    torch.testing.assert_close(*gradients)


def test_what_is_not_asked_for_is_not_computed(monkeypatch):
    mu, logvar, dz, dkl, seed = draw(3, 5, torch.float32)
    assert FORWARD(mu, logvar, seed, 0, False)[1].shape == (0,)
    asked = []

    def forward(*arguments):
        asked.append(arguments[4])
        return FORWARD(*arguments)

    monkeypatch.setattr(reparam, "forward_op", forward)
    monkeypatch.setattr(reparam, "backward_op", None)
    reparam.reparameterize(mu, logvar, seed)
    mu = mu.clone().requires_grad_()
    z, kl = reparam.reparameterize_kl(mu, logvar, seed)
    got, = torch.autograd.grad((z, kl), mu, (dz, dkl))  # without the noise
    torch.testing.assert_close(got, dz + dkl[:, None] * mu)
    assert asked == [False, True]


def batched_gradient(f, m):
    gradient = torch.func.grad(lambda x: f(x).sum())
    return torch.func.vmap(gradient)(torch.stack([m, 2 * m]))


@pytest.mark.parametrize("transform", [
    lambda f, m: torch.func.jvp(f, (m,), (torch.ones_like(m),)),
    lambda f, m: torch.func.jacfwd(f)(m),
    lambda f, m: torch.func.grad(lambda x: f(x).sum())(m),
    lambda f, m: torch.func.jacrev(f)(m),
    lambda f, m: torch.func.hessian(lambda x: f(x).sum())(m),
    batched_gradient,
])
def test_functional_transforms_and_forward_derivatives(transform):
    mu, logvar, _, _, seed = draw(3, 5, torch.float64)
    for use in (0, 1):
        def ours(m, use=use):
            return reparam.reparameterize_kl(m, logvar, seed, 2)[use]

        def reference(m, use=use):
            return reparam.reference(m, logvar, seed, 2)[use]

        torch.testing.assert_close(transform(ours, mu), transform(reference, mu))


def test_dual_numbers_have_tangents():
    mu, logvar, _, _, seed = draw(3, 5, torch.float64)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(mu, torch.ones_like(mu))
        _, kl = reparam.reparameterize_kl(dual, logvar, seed)
        torch.testing.assert_close(forward_ad.unpack_dual(kl).tangent, mu.sum(1))


def test_the_fused_noise_is_the_references():
    """Every column of a long row, so every lane of a vector, has the reference's words."""
    zeros = torch.zeros(3, 1027, dtype=torch.float64)
    seed = torch.tensor(2**63 - 1)
    word = reparam.words(3, 257, seed, 2**33)
    for dtype in (torch.float64, torch.float32):
        eps, _ = FORWARD(zeros.to(dtype), zeros.to(dtype), seed, 2**33)
        wanted = reparam.normals_from_words(word, dtype).flatten(1)[:, :1027]
        torch.testing.assert_close(eps, wanted, rtol=0, atol=3e-6)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("columns", [1, 31, 128, 2051])
def test_cuda_agrees_with_the_cpu(columns, dtype):
    arguments = draw(6, columns, dtype, extra=3)
    wanted = results(reparam.reparameterize_kl, *arguments)
    for function in (reparam.reparameterize_kl, reparam.reference):
        got = results(function, *(a.cuda() for a in arguments))
        assert_agree([g.cpu() for g in got], wanted, dtype, columns)
