"""Ranks: the processes that `torchrun` starts, one for each device, which share the packs of every step.

All have the same weights, so all that they tell each other of a step is numbers and the sum of their gradients. The
gradients are summed once, after the last backward pass of a step, and not by DistributedDataParallel's hooks during it:
a loss is a rank's share in that of the step, so nothing is to be averaged, and a rank whose images were all unreadable
has no backward pass that hooks could wait for.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn


@dataclass(frozen=True)
class Ranks:
    """This process among those of the run; alone by default, when all of these do nothing."""

    device: torch.device
    rank: int = 0
    world: int = 1
    local: int = 1
    """Ranks on this machine."""

    @property
    def main(self) -> bool:
        """Whether this process writes what there is one of: logs, checkpoints, encoders."""
        return self.rank == 0

    def sums(self, values: Sequence[float]) -> list[float]:
        """The sum of each number over all ranks, through the hosts: no device is waited for."""
        if self.world == 1:
            return list(values)
        total = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(total)
        return total.tolist()

    def any(self, value: bool) -> bool:
        """Whether it is true on one of them."""
        return self.sums([value])[0] > 0

    def gather(self, value: Any) -> list[Any]:
        """What each has, by rank, on all of them; small things that pickle."""
        if self.world == 1:
            return [value]
        found: list[Any] = [None] * self.world
        dist.all_gather_object(found, value)
        return found

    def sum_gradients(self, parameters: Sequence[nn.Parameter]) -> None:
        """Make every gradient the sum over all ranks; none counts as 0."""
        if self.world == 1:
            return
        for parameter in parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        flat = torch.cat([gradient.flatten() for gradient in gradients])
        dist.all_reduce(flat)
        parts = flat.split([gradient.numel() for gradient in gradients])
        torch._foreach_copy_(gradients, [part.view_as(own) for part, own in zip(parts, gradients, strict=True)])

    @contextmanager
    def main_first(self) -> Iterator[None]:
        """The main rank runs what is inside, then all others: they find in a cache what it has put there."""
        if not self.main:
            self.gather(None)
        yield
        if self.main:
            self.gather(None)


def is_main() -> bool:
    """Whether this process is the main rank, before the ranks have met."""
    return os.environ.get("RANK", "0") == "0"


@contextmanager
def joined() -> Iterator[Ranks]:
    """Meet the other ranks where `torchrun` started this process, and part from them in the end."""
    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))) if on_gpu else torch.device("cpu")
    if not dist.is_torchelastic_launched():
        yield Ranks(device)
        return
    if on_gpu:
        torch.cuda.set_device(device)
    # Numbers of the host travel by gloo beside the devices' gradients.
    dist.init_process_group("cpu:gloo,cuda:nccl" if on_gpu else "gloo")
    try:
        yield Ranks(device, dist.get_rank(), dist.get_world_size(), int(os.environ["LOCAL_WORLD_SIZE"]))
    finally:
        dist.destroy_process_group()
