"""Processes that train one model together, as `torchrun` starts them.

    torchrun --nproc-per-node 2 -- train.py --run runs/two

Without `--` torchrun takes --run for its own option. Each process takes its contiguous
rows of every batch. Processes add up sums, never means, so any number of them, with
uneven shares of a batch too, follows the same curve up to float rounding.
"""
import os
from collections.abc import Callable
from datetime import timedelta
from typing import TypeVar

from pegasus.cli import UserError

import torch
import torch.distributed as dist
import torch.distributed.nn  # unused; imported later its defaults would hold a group
from torch import Tensor

T = TypeVar("T")
PATIENCE = timedelta(hours=1)  # the others wait while the first one reads the data
# what torchrun tells each process
VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


def rank_and_size() -> tuple[int, int]:
    """Return this process's number and how many torchrun started; alone, 0 and 1.

    Raises UserError where another launcher has set some of torchrun's variables: a
    process must not take itself for one of several that do not exist.
    """
    given = {name: os.environ.get(name, "") for name in VARIABLES}
    if not given["RANK"] and not given["WORLD_SIZE"]:
        return 0, 1
    numbers = [given[name].isdigit() for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK")]
    whole = all(given.values()) and all(numbers)
    if whole and int(given["RANK"]) < int(given["WORLD_SIZE"]):
        return int(given["RANK"]), int(given["WORLD_SIZE"])
    got = ", ".join(f"{name}={value}" for name, value in given.items())
    raise UserError(
        f"got {got}; wanted all of them, as torchrun sets them, or neither of the first "
        "two (env -u RANK -u WORLD_SIZE)"
    )


class Workers:
    """This process's place among those that torchrun started; alone, a group of one."""

    def __init__(self, device: str):
        self.rank, self.size = rank_and_size()
        self.leads = self.rank == 0
        restarts = os.environ.get("TORCHELASTIC_RESTART_COUNT", "")
        self.restarts = int(restarts) if restarts.isdigit() else 0
        if self.size > 1 and device == "mps":
            raise UserError("torchrun: got --device mps, wanted cuda or cpu, or one process")
        if self.size > 1:
            self.join("nccl" if device == "cuda" else "gloo")

    def join(self, backend: str) -> None:
        """Form the group. Raises UserError where processes outnumber the GPUs.

        After a restart under a new prefix: torchrun's store keeps the addresses of lost
        processes.
        """
        gpu = own_gpu() if backend == "nccl" else None
        store, rank, size = next(dist.rendezvous("env://"))
        store = dist.PrefixStore(f"start {self.restarts}", store)
        dist.init_process_group(
            backend,
            store=store,
            rank=rank,
            world_size=size,
            device_id=gpu,
            timeout=PATIENCE,
        )

    def share(self, n: int) -> slice:
        """Return the contiguous part of n rows that is this process's."""
        return slice(n * self.rank // self.size, n * (self.rank + 1) // self.size)

    def sum_(self, tensor: Tensor) -> Tensor:
        """Sum a tensor over all processes, in place."""
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor

    def sum_gradients(self, parameters: list[Tensor]) -> None:
        """Sum gradients over all processes, in one piece.

        A process without rows has none and adds zeros.
        """
        if self.size == 1:
            return
        flat = []
        for p in parameters:
            grad = torch.zeros_like(p) if p.grad is None else p.grad
            flat.append(grad.flatten().float())
        total = self.sum_(torch.cat(flat))
        sizes = [p.numel() for p in parameters]
        for p, part in zip(parameters, total.split(sizes), strict=True):
            # in the weight's layout, which fused Adam takes for granted
            p.grad = torch.empty_like(p).copy_(part.view_as(p))

    def max(self, number: int, device: str) -> int:
        """Return the largest number of all processes, as in: was any asked to stop?"""
        if self.size == 1:  # without looking at a GPU, which would have to finish first
            return number
        largest = torch.tensor(number, device=device)
        dist.all_reduce(largest, dist.ReduceOp.MAX)
        return int(largest)

    def leader_first(self, work: Callable[[], T]) -> T:
        """Do something in process 0 before it is done in the others.

        These then find the files that it made, or fail alike.
        """
        if self.size > 1 and not self.leads:
            dist.barrier()
        try:
            return work()
        finally:
            if self.size > 1 and self.leads:
                dist.barrier()

    def leave(self) -> None:
        if self.size > 1:
            dist.destroy_process_group()


def own_gpu() -> torch.device:
    """Return the GPU of this process. Raises UserError where there are too few."""
    rank = int(os.environ["LOCAL_RANK"])
    count = torch.cuda.device_count()
    if rank >= count:
        raise UserError(
            f"torchrun: process {rank + 1} of this machine has no GPU to itself; wanted "
            f"at most --nproc-per-node {count} here, or --device cpu"
        )
    gpu = torch.device("cuda", rank)
    torch.cuda.set_device(gpu)
    return gpu
