"""A GPU for machines that have none: what is computed where, and nothing of a GPU's arithmetic or memory.

Tensors of the device `meta` hold CPU tensors that compute for them, and refuse to meet a CPU's own, as a GPU's do.
"""
import contextlib
from collections.abc import Callable, Iterator

import checkpoint
import recipe
import replay

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

aten = torch.ops.aten
MIXES = (aten.copy_.default, aten.index.Tensor, aten.index_put_.default)  # take a CPU's tensors beside a GPU's


class Remote(Tensor):
    """A tensor on the simulated GPU."""
    is_cuda, is_meta = True, False
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, inner: Tensor) -> "Remote":
        self = Tensor._make_wrapper_subclass(cls, inner.shape, strides=inner.stride(), dtype=inner.dtype, device="meta",
                                             storage_offset=inner.storage_offset())
        self.inner = inner
        return self

    @classmethod
    def __torch_dispatch__(cls, op: Callable, types: tuple, args: tuple = (), kwargs: dict | None = None) -> object:
        return dispatch(op, args, kwargs or {})


def each_tensor(change: Callable, value: object) -> object:
    """Arguments or results of an op with its tensors changed; pytree's own way takes most of a test's time."""
    if isinstance(value, Tensor):
        return change(value)
    return type(value)(each_tensor(change, each) for each in value) if type(value) in (tuple, list) else value


def dispatch(op: Callable, args: tuple, kwargs: dict) -> object:
    """Run an op on what its tensors hold."""
    given = []
    each_tensor(given.append, (*args, *kwargs.values()))
    remote = {id(each.inner): each for each in given if isinstance(each, Remote)}
    if remote and op not in MIXES and any(each.dim() for each in given if not isinstance(each, Remote)):
        raise RuntimeError(f"{op}: Expected all tensors to be on the same device")
    there = isinstance(given[0], Remote) if op in MIXES else bool(remote)
    if kwargs.get("device") is not None:
        there = torch.device(kwargs["device"]).type == "meta"
        kwargs = kwargs | {"device": torch.device("cpu")}
    args, values = each_tensor(lambda each: each.inner if isinstance(each, Remote) else each,
                               (args, tuple(kwargs.values())))
    result = op(*args, **dict(zip(kwargs, values, strict=True)))
    if not there:
        return result
    return each_tensor(lambda each: remote[id(each)] if id(each) in remote else Remote(each), result)


class Device(TorchDispatchMode):
    def __torch_dispatch__(self, op: Callable, types: tuple, args: tuple = (), kwargs: dict | None = None) -> object:
        return dispatch(op, args, kwargs or {})


class Autocast(torch.autocast):
    """Without effect on the simulated GPU."""

    def __init__(self, place: str, *args: object, **settings: object):
        super().__init__("cpu" if place == "meta" else place, *args, **settings | {"enabled": False})


@contextlib.contextmanager
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """`auto` is the simulated GPU; what torch decides below its Python level is decided here."""
    plain, save, tolist = torch.tensor, checkpoint.save, Tensor.tolist
    monkeypatch.setattr(torch, "tensor", lambda data, device="cpu", **kind: plain(data, **kind).to(device))
    monkeypatch.setattr(Tensor, "new_tensor", lambda self, data: plain(data, dtype=self.dtype).to(self.device))
    monkeypatch.setattr(Tensor, "tolist", lambda self: tolist(self.cpu()))
    monkeypatch.setattr(checkpoint, "save",  # as torch.save and load(map_location="cpu") do
                        lambda path, state: save(path, tree_map_only(Tensor, Tensor.cpu, state)))
    monkeypatch.setattr(torch, "autocast", Autocast)
    monkeypatch.setattr(replay, "capture", lambda function: function)
    monkeypatch.setattr(recipe, "device", lambda chosen: "cpu" if chosen.device == "cpu" else "meta")
    monkeypatch.setattr(recipe, "computes_bfloat16", lambda place: False)
    with Device():
        yield
