"""What the training step's kernels refuse, called with tensors that fused.py would not give them."""
import fused

import pytest
import torch

if not fused.BUILT:
    pytest.skip("the extension is not built, or PEGASUS_EXTENSION=0", allow_module_level=True)


@pytest.mark.parametrize("change,complaint", [
    ({"x": torch.zeros(2, 16, 3, 3)}, "channels_last"), ({"x": torch.zeros(2, 3, 3, 8).permute(0, 3, 1, 2)}, "16"),
    ({"x": torch.zeros(2, 16)}, "four dimensions"), ({"weight": torch.zeros(3, 16)}, "weight"),
    ({"weight": torch.zeros(2, 16, dtype=torch.float64)}, "weight: got torch.float64"),
    ({"y": torch.zeros(2, 16, 3, 3)}, "strides"), ({"stats": torch.zeros(3)}, "stats"), ({"groups": 3}, "groups"),
    ({"stats": torch.zeros(2, 2, 2).mT}, "stats"), ({"x": None}, "x: got None"), ({"bias": None}, "bias: got None"),
    ({"y": torch.zeros(2, 3, 3, 16).bfloat16().permute(0, 3, 1, 2)}, "y: got torch.bfloat16, wanted torch.float32")])
def test_kernels_refuse_what_does_not_fit(change, complaint):
    x = torch.zeros(2, 16, 3, 3).contiguous(memory_format=torch.channels_last)
    arguments = {"x": x, "weight": torch.zeros(2, 16), "bias": torch.zeros(2, 16), "y": torch.empty_like(x),
                 "stats": torch.zeros(2, 2, 2), "groups": 2, "epsilon": 1e-5}
    torch.ops.pegasus.silu_group_norm(**arguments)
    with pytest.raises(RuntimeError, match=complaint):
        torch.ops.pegasus.silu_group_norm(**arguments | change)


def pictures(n: int, channels: int, *size: int) -> torch.Tensor:
    return torch.zeros(n, channels, *size).contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("change,complaint", [
    ({"x": torch.zeros(2, 16, 4, 8)}, "channels_last"), ({"x": pictures(2, 16, 6, 4)}, "H and W of 4"),
    ({"x": pictures(0, 16, 4, 8)}, "not empty"), ({"x": pictures(2, 24, 4, 8)}, "multiple of 16"),
    ({"x": pictures(3, 16, 4, 8)}, "as many"), ({"x": pictures(2, 16, 8, 4)}, "as large"),
    ({"x": pictures(2, 16, 4, 8).double()}, "images: got torch.float64"),
    ({"kernels": torch.zeros(36, 32, 16)}, r"kernels: got .* wanted \(36, 16, 32\)"), ({"block": 0}, "1 or more")])
def test_convolutions_refuse_what_does_not_fit(change, complaint):
    given = {"x": pictures(2, 16, 4, 8), "kernels": torch.zeros(36, 16, 32), "block": 3} | change
    y, dx = pictures(2, 32, 4, 8), torch.empty_like(given["x"])
    with pytest.raises(RuntimeError, match=complaint):
        torch.ops.pegasus.winograd(given["x"], given["kernels"], torch.zeros(0), y, given["block"])
    with pytest.raises(RuntimeError, match=complaint.replace("16, 32", "32, 16")):
        torch.ops.pegasus.winograd_backward(y, given["x"], given["kernels"].mT, dx, torch.zeros(36, 512),
                                            given["block"])


def test_convolutions_refuse_what_they_cannot_fill():
    x, y, kernels = pictures(2, 16, 4, 8), pictures(2, 32, 4, 8), torch.zeros(36, 16, 32)
    with pytest.raises(RuntimeError, match="bias: got"):
        torch.ops.pegasus.winograd(x, kernels, torch.zeros(8), y, 1)
    kept = torch.zeros(36, 512)
    for dx, sums, complaint in ((torch.zeros(2, 16, 4, 8), kept, "strides"), (x.double(), kept, "dx: got"),
                                (x, kept[0], "dkernels"), (x, torch.zeros(512, 36).t(), "dkernels")):
        with pytest.raises(RuntimeError, match=complaint):
            torch.ops.pegasus.winograd_backward(y, x, kernels.mT, dx, sums, 1)


def test_adam_refuses_what_does_not_fit():
    weight, moments = torch.zeros(4, 6), torch.zeros(2, 4, 6)
    numbers = (1e-3, 1.0, 0.9, 0.999, 1e-8, 1.0)
    for grad, complaint in ((torch.zeros(6, 4).t(), "strides"), (torch.zeros(4, 5), "grad"),
                            (torch.zeros(4, 6, dtype=torch.float16), "float16")):
        with pytest.raises(RuntimeError, match=complaint):
            torch.ops.pegasus.adam(weight, grad, *moments, weight, *numbers)
    for values, complaint in ((torch.ones(8)[::2], "without gaps"), (torch.ones(1).expand(99), "without gaps"),
                              (None, "values: got None, wanted a tensor")):
        with pytest.raises(RuntimeError, match=complaint):
            torch.ops.pegasus.add_squares(values, torch.zeros(()))
    assert not weight.any() and not moments.any()


def test_squared_error_refuses_what_does_not_fit():
    x = torch.zeros(2, 6, 4, 4)
    for logits, complaint in ((torch.zeros(4, 3, 4, 4), "logits: got"), (torch.zeros(2, 6, 4, 4).mT, "contiguous")):
        with pytest.raises(RuntimeError, match=complaint):
            torch.ops.pegasus.squared_error(logits, x, torch.zeros(2))


def test_the_op_refuses_none():
    x = torch.zeros(2, 3)
    with pytest.raises(RuntimeError, match="seed: got None"):
        torch.ops.pegasus.reparameterize_kl(x, x, None)
    with pytest.raises(RuntimeError, match="dkl: got None"):
        torch.ops.pegasus.reparameterize_kl_backward(x, None, x, x, torch.tensor(1))
