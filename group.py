"""Processes that train one model together, as `torchrun` starts them; alone, a group of one.

    torchrun --nproc-per-node 2 -- train.py --run runs/two      # without `--` torchrun takes --run for its own

Each process takes its contiguous rows of every batch. Processes add up sums, never means, so any number of them, with
uneven shares of a batch too, follows the same curve up to float rounding.
"""
import os
from collections.abc import Callable
from typing import TypeVar

from options import Fault

import torch
import torch.distributed as dist
import torch.distributed.nn  # before a group exists: its default arguments would keep the group and its threads alive
from torch import Tensor

T = TypeVar("T")


class Group:
    """This process's place among those that torchrun started."""

    def __init__(self, device: str):
        self.rank, self.size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        self.leads = self.rank == 0
        self.restarts = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))  # of the group, after a lost process
        if self.size > 1:
            self.join("nccl" if device == "cuda" else "gloo")

    def join(self, backend: str) -> None:
        """Form the group; after a restart under a prefix of its own: torchrun's store keeps the lost one's addresses.

        Raises Fault where processes outnumber the machine's GPUs.
        """
        gpu = None
        if backend == "nccl":
            place, gpus = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
            if place >= gpus:
                raise Fault(f"torchrun: process {place + 1} of this machine has no GPU to itself; wanted at most "
                            f"--nproc-per-node {gpus} here, or --device cpu")
            torch.cuda.set_device(gpu := torch.device("cuda", place))
        store, rank, size = next(dist.rendezvous("env://"))
        store = dist.PrefixStore(f"start {self.restarts}", store)
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, device_id=gpu)

    def share(self, n: int) -> slice:
        """The contiguous part of n rows that is this process's."""
        return slice(n * self.rank // self.size, n * (self.rank + 1) // self.size)

    def total(self, tensor: Tensor) -> Tensor:
        """The sum over all processes, in place."""
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor

    def total_gradients(self, parameters: list[Tensor]) -> None:
        """Sum gradients over all processes, in one piece; a process without rows has none and adds zeros."""
        if self.size == 1:
            return
        grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
        flat = self.total(torch.cat([grad.flatten().float() for grad in grads]))
        for p, part in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True):
            p.grad = torch.empty_like(p).copy_(part.view_as(p))  # in p's layout, which Adam takes for granted

    def first(self, work: Callable[[], T]) -> T:
        """Do something in process 0 before it is done in the others, who then find the files it made, or fail alike."""
        if self.size > 1 and self.rank > 0:
            dist.barrier()
        try:
            return work()
        finally:
            if self.size > 1 and self.rank == 0:
                dist.barrier()

    def leave(self) -> None:
        if self.size > 1:
            dist.destroy_process_group()
