"""A GPU for machines that have none: what is computed where, nothing of its arithmetic.

Tensors of the device `meta` hold CPU tensors that compute for them, and refuse to meet a
CPU's own, as a GPU's do.
"""
import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

from pegasus import checkpoint, device
from pegasus.training import cuda_graph

import pytest
import torch
import torch.optim.optimizer as torch_optimizer
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

aten = torch.ops.aten
# take a CPU's tensors beside a GPU's
MIXES = (aten.copy_.default, aten.index.Tensor, aten.index_put_.default)


class Remote(Tensor):
    """A tensor on the simulated GPU."""

    is_cuda = True
    is_meta = False
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, inner: Tensor) -> "Remote":
        self = Tensor._make_wrapper_subclass(
            cls,
            inner.shape,
            strides=inner.stride(),
            dtype=inner.dtype,
            device="meta",
            storage_offset=inner.storage_offset(),
        )
        self.inner = inner
        return self

    @classmethod
    def __torch_dispatch__(
        cls, op: Callable, types: tuple, args: tuple = (), kwargs: dict | None = None
    ) -> object:
        return dispatch(op, args, kwargs or {})


def map_tensors(change: Callable, value: object) -> object:
    """Return arguments or results of an op with its tensors changed.

    pytree's own function takes most of a test's time.
    """
    if isinstance(value, Tensor):
        return change(value)
    if type(value) in (tuple, list):
        return type(value)(map_tensors(change, item) for item in value)
    return value


def to_inner(tensor: Tensor) -> Tensor:
    return tensor.inner if isinstance(tensor, Remote) else tensor


def dispatch(op: Callable, args: tuple, kwargs: dict) -> object:
    """Run an op on what its tensors hold."""
    tensors = []
    map_tensors(tensors.append, (*args, *kwargs.values()))
    remote = {id(t.inner): t for t in tensors if isinstance(t, Remote)}
    local = [t for t in tensors if not isinstance(t, Remote)]
    if remote and op not in MIXES and any(t.dim() for t in local):
        raise RuntimeError(f"{op}: Expected all tensors to be on the same device")
    there = isinstance(tensors[0], Remote) if op in MIXES else bool(remote)
    if kwargs.get("device") is not None:
        there = torch.device(kwargs["device"]).type == "meta"
        kwargs = kwargs | {"device": torch.device("cpu")}
    args, values = map_tensors(to_inner, (args, tuple(kwargs.values())))
    result = op(*args, **dict(zip(kwargs, values, strict=True)))
    if not there:
        return result

    def to_remote(tensor: Tensor) -> Remote:
        """Return the argument that an op changed in place, or a new tensor."""
        if tensor.dtype == torch.float64 and not Device.has_float64:
            raise TypeError(f"{op}: the device has no float64")
        return remote[id(tensor)] if id(tensor) in remote else Remote(tensor)

    return map_tensors(to_remote, result)


class Device(TorchDispatchMode):
    """Makes tensors on the simulated GPU where `device` asks for it."""

    has_float64 = True

    def __torch_dispatch__(
        self, op: Callable, types: tuple, args: tuple = (), kwargs: dict | None = None
    ) -> object:
        return dispatch(op, args, kwargs or {})


class Autocast(torch.autocast):
    """Without effect on the simulated GPU."""

    def __init__(self, place: str, *args: object, **settings: object):
        place = "cpu" if place == "meta" else place
        super().__init__(place, *args, **settings | {"enabled": False})


@contextlib.contextmanager
def gpu(monkeypatch: pytest.MonkeyPatch, has_float64: bool = True) -> Iterator[None]:
    """Make `auto` the simulated GPU; one without float64 is like Apple's.

    What torch decides below its Python level is decided here.
    """
    if not has_float64:
        monkeypatch.setattr(Device, "has_float64", False)
        monkeypatch.setattr(device, "widest_float", lambda place: torch.float32)
        monkeypatch.setattr(device, "has_graphs", lambda place: False)
    tensor = torch.tensor
    save = checkpoint.save
    tolist = Tensor.tolist
    supported = torch_optimizer._get_fused_kernels_supported_devices()

    def new_tensor(like: Tensor, data: object) -> Tensor:
        return tensor(data, dtype=like.dtype).to(like.device)

    def save_from_cpu(path: Path, state: dict) -> None:
        """Save as torch.save and load(map_location="cpu") do."""
        save(path, tree_map_only(Tensor, Tensor.cpu, state))

    monkeypatch.setattr(
        torch, "tensor", lambda data, device="cpu", **kind: tensor(data, **kind).to(device)
    )
    monkeypatch.setattr(Tensor, "new_tensor", new_tensor)
    monkeypatch.setattr(Tensor, "tolist", lambda self: tolist(self.cpu()))
    monkeypatch.setattr(torch, "autocast", Autocast)
    monkeypatch.setattr(
        torch_optimizer,
        "_get_fused_kernels_supported_devices",
        lambda: [*supported, "meta"],
    )
    monkeypatch.setattr(checkpoint, "save", save_from_cpu)
    monkeypatch.setattr(cuda_graph, "capture", lambda function: function)
    monkeypatch.setattr(
        device, "resolve_device", lambda name: "cpu" if name == "cpu" else "meta"
    )
    monkeypatch.setattr(device, "supports_bfloat16", lambda place: False)
    with Device():
        yield
