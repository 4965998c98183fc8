"""What the extensions' ops refuse: tensors that the Python code would not give them."""
import reparam

import pytest
import torch

if reparam.extension is None:
    reason = "the extension is not built, or PEGASUS_EXTENSION=0"
    pytest.skip(reason, allow_module_level=True)

STEP = torch.ops.pegasus_step


@pytest.fixture
def step() -> None:
    """Load the ops of pegasus_step, or skip the test."""
    pytest.importorskip("pegasus_step")


def images(*shape: int) -> torch.Tensor:
    return torch.zeros(*shape).contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("name,value,message", [
    ("x", torch.zeros(2, 16, 3, 3), "channels_last"),
    ("x", images(2, 8, 3, 3), "C a multiple of 16"),
    ("x", torch.zeros(2, 16), "four dimensions"),
    ("x", None, "x: got None"),
    ("x", images(2, 16, 3, 3).double(), "x: got torch.float64"),
    ("weight", torch.zeros(3, 16), "weight"),
    ("weight", torch.zeros(2, 16, dtype=torch.float64), "weight: got torch.float64"),
    ("bias", None, "bias: got None"),
    ("y", torch.zeros(2, 16, 3, 3), "strides"),
    ("y", images(2, 16, 3, 3).bfloat16(), "y: got torch.bfloat16 .*torch.float32"),
    ("stats", torch.zeros(3), "stats"),
    ("stats", torch.zeros(2, 2, 2).mT, "stats"),
    ("groups", 3, "groups"),
])
def test_silu_group_norm(step: None, name: str, value: object, message: str) -> None:
    x = images(2, 16, 3, 3)
    arguments = {
        "x": x,
        "weight": torch.zeros(2, 16),
        "bias": torch.zeros(2, 16),
        "y": torch.empty_like(x),
        "stats": torch.zeros(2, 2, 2),
        "groups": 2,
        "epsilon": 1e-5,
    }
    STEP.silu_group_norm(**arguments)
    arguments[name] = value
    with pytest.raises(RuntimeError, match=message):
        STEP.silu_group_norm(**arguments)


@pytest.mark.parametrize("name,value,message", [
    ("dy", torch.zeros(2, 16, 3, 3), "dy: got .*strides"),
    ("dx", images(2, 16, 3, 3).bfloat16(), "dx: got torch.bfloat16"),
    ("dweight", torch.zeros(16, 2).mT, "dweight: got .* 32 contiguous elements"),
    ("dbias", torch.zeros(3), "dbias"),
])
def test_silu_group_norm_backward(step: None, name: str, value: object, message: str) -> None:
    x = images(2, 16, 3, 3)
    arguments = {
        "dy": torch.zeros_like(x),
        "x": x,
        "weight": torch.zeros(2, 16),
        "bias": torch.zeros(2, 16),
        "stats": torch.zeros(2, 2, 2),
        "dx": torch.empty_like(x),
        "dweight": torch.empty(2, 16),
        "dbias": torch.empty(2, 16),
        "groups": 2,
    }
    STEP.silu_group_norm_backward(**arguments)
    arguments[name] = value
    with pytest.raises(RuntimeError, match=message):
        STEP.silu_group_norm_backward(**arguments)


@pytest.mark.parametrize("name,value,message", [
    ("x", torch.zeros(2, 16, 4, 8), "channels_last"),
    ("x", images(2, 16, 6, 4), "H and W of 4"),
    ("x", images(0, 16, 4, 8), "not empty"),
    ("x", images(2, 24, 4, 8), "multiple of 16"),
    ("x", images(3, 16, 4, 8), "as many"),
    ("x", images(2, 16, 8, 4), "as large"),
    ("x", images(2, 16, 4, 8).double(), "images: got torch.float64"),
    ("weight", images(16, 32, 3, 3), r"weight: got .* wanted \(32, 16, 3, 3\)"),
    ("weight", torch.zeros(32, 16, 3, 3), r"weight: got .* in channels_last"),
    ("weight", images(32, 16, 3, 3).double(), "weight: got torch.float64"),
    ("weight", None, "weight: got None"),
    ("block", 0, "block: .*1 or more"),
])
def test_winograd(step: None, name: str, value: object, message: str) -> None:
    arguments = {"x": images(2, 16, 4, 8), "weight": images(32, 16, 3, 3), "block": 3}
    arguments[name] = value
    x, weight, block = arguments.values()
    y = images(2, 32, 4, 8)
    with pytest.raises(RuntimeError, match=message):
        STEP.winograd(x, weight, torch.zeros(0), y, block)
    results = (torch.empty_like(x), images(32, 16, 3, 3))
    with pytest.raises(RuntimeError, match=message):
        STEP.winograd_backward(y, x, weight, *results, block)


def test_winograd_with_another_bias(step: None) -> None:
    weight = images(32, 16, 3, 3)
    with pytest.raises(RuntimeError, match="bias: got"):
        STEP.winograd(images(2, 16, 4, 8), weight, torch.zeros(8), images(2, 32, 4, 8), 1)


@pytest.mark.parametrize("name,value,message", [
    ("dx", torch.zeros(2, 16, 4, 8), "dx: got .*strides"),
    ("dx", images(2, 16, 4, 8).double(), "dx: got torch.float64"),
    ("dweight", images(16, 32, 3, 3), "dweight"),
    ("dweight", torch.zeros(32, 16, 3, 3), "dweight: got .*strides"),
])
def test_winograd_backward_with_other_results(
    step: None, name: str, value: torch.Tensor, message: str
) -> None:
    x = images(2, 16, 4, 8)
    weight = images(32, 16, 3, 3)
    results = {"dx": torch.empty_like(x), "dweight": torch.empty_like(weight)}
    results[name] = value
    with pytest.raises(RuntimeError, match=message):
        STEP.winograd_backward(images(2, 32, 4, 8), x, weight, *results.values(), 1)


def call_on_cpu(op, arguments: dict) -> object:
    """Call an op's CPU kernel, which other tensors than the CPU's do not reach otherwise."""
    cpu = torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)
    return op.redispatch(cpu, **arguments)


@pytest.mark.parametrize("name,value,message", [
    ("mu", None, r"mu: got None, wanted two dimensions \(B, D\)"),
    ("mu", torch.zeros(3), r"mu: got torch.float32 of shape \(3\) on cpu, wanted two"),
    ("mu", torch.zeros(2, 3).int(), "mu: got torch.int32 of .*, wanted a floating-point type"),
    ("logvar", torch.zeros(2, 4), r"logvar: got .*\(2, 4\).*, wanted mu's .*\(2, 3\)"),
    ("logvar", torch.zeros(2, 3).double(), "logvar: got torch.float64 .*mu's torch.float32"),
    ("logvar", torch.zeros(2, 3, device="meta"), "logvar: got .*, wanted mu's .* on cpu"),
    ("seed", None, "seed: got None, wanted torch.int64"),
    ("seed", torch.tensor(1.0), "seed: got torch.float32 .*, wanted torch.int64"),
    ("seed", torch.tensor([1, 2]), r"seed: got .*\(2\).*, wanted .* one element"),
    ("seed", torch.zeros(1, dtype=torch.int64, device="meta"), "seed: got .* on mu's device"),
    ("row_offset", -1, "row_offset: got -1, wanted 0 to"),
    ("row_offset", 2**63 - 2, "row_offset: got 9223372036854775806, wanted 0 to"),
    ("dz", torch.zeros(2, 4), r"dz: got .*\(2, 4\).*, wanted mu's"),
    ("dz", torch.zeros(2, 3).double(), "dz: got torch.float64 .*, wanted mu's torch.float32"),
    ("dz", torch.zeros(2, 3, device="meta"), "dz: got .*, wanted mu's .* on cpu"),
    ("dkl", torch.zeros(3), r"dkl: got .*\(3\).*, wanted torch.float32 of shape \(B,\)"),
    ("dkl", torch.zeros(2, 1), r"dkl: got .*\(2, 1\).*, wanted"),
    ("dkl", torch.zeros(2).double(), "dkl: got torch.float64 .*, wanted torch.float32"),
    ("dkl", torch.zeros(2, device="meta"), "dkl: got .* on mu's device"),
])
def test_the_op(name: str, value: torch.Tensor | int | None, message: str) -> None:
    """Called as torch.ops, without reparam.py's own checks."""
    x = torch.zeros(2, 3)
    seed = torch.tensor(1)
    arguments = {"dz": x, "dkl": torch.zeros(2), "mu": x, "logvar": x, "seed": seed}
    arguments |= {"row_offset": 0, name: value}
    with pytest.raises(RuntimeError, match=message):
        call_on_cpu(torch.ops.pegasus.reparameterize_kl_backward.default, arguments)
    if name in ("mu", "logvar", "seed", "row_offset"):
        forward = {key: arguments[key] for key in ("mu", "logvar", "seed", "row_offset")}
        with pytest.raises(RuntimeError, match=message):
            call_on_cpu(torch.ops.pegasus.reparameterize_kl.default, forward)
