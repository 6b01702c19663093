"""Ranks: the processes that `torchrun` starts, one for each device, which share the packs of a run or of an evaluation.

All have the same weights, so all that they tell each other of a step is numbers and the sum of their gradients. The
gradients are summed once, after the last backward pass of a step, and not by DistributedDataParallel's hooks during it:
a loss is a rank's share in that of the step, so nothing is to be averaged, and a rank whose images were all unreadable
has no backward pass that hooks could wait for.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ijepa_enhanced.devices import best_device
from ijepa_enhanced.errors import RankError

PATIENCE = timedelta(hours=12)
"""How long ranks wait for one that scans a large source, say; that one is gone they notice at once."""


@dataclass(frozen=True)
class Ranks:
    """This process among those of the run; alone by default, when nothing here does anything."""

    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    rank: int = 0
    world: int = 1
    local_world_size: int = 1
    """How many of them run on this machine."""
    local_rank: int = 0
    """The number of this one among those."""

    @property
    def main(self) -> bool:
        """Whether this process writes what there is one of: logs, checkpoints, encoders."""
        return self.rank == 0

    def gather(self, value: Any) -> list[Any]:
        """What each rank has, by rank, on all of them: what pickles and is on the host. It travels between the hosts.

        Raises:
            RankError: another rank is gone.
        """
        if self.world == 1:
            return [value]
        found: list[Any] = [None] * self.world
        with _together():
            dist.all_gather_object(found, value)
        return found

    def gather_to_rank0(self, value: Any) -> list[Any]:
        """What each rank has, by rank, on the main one, and nothing on the others; see `gather`."""
        if self.world == 1:
            return [value]
        found = [None] * self.world if self.main else None
        with _together():
            dist.gather_object(value, found)
        return found or []

    def broadcast_from_rank0(self, tensors: Sequence[Tensor | None]) -> list[Tensor | None]:
        """Return the main rank's tensors, which are on the host, on all ranks; those of the others are ignored.

        Raises:
            RankError: another rank is gone.
        """
        if self.world == 1:
            return list(tensors)
        shapes = self.gather([None if each is None else (each.shape, each.dtype) for each in tensors])[0]
        found: list[Tensor | None] = []
        for own, shape in zip(tensors, shapes, strict=True):
            if shape is None:
                found.append(None)
                continue
            value = own.contiguous() if self.main and own is not None else torch.empty(shape[0], dtype=shape[1])
            with _together():
                dist.broadcast(value, 0)
            found.append(value)
        return found

    def agree(self, facts: dict[str, Any]) -> None:
        """Check that all ranks are about to do the same.

        Raises:
            RankError: they are not; the message says what differs.
        """
        every = self.gather(facts)
        for name in facts:
            if len({str(each[name]) for each in every}) > 1:
                raise RankError(
                    f"The processes of this run differ in their {name}: all machines need the same images, the same "
                    "versions, and one folder of the run that they share."
                )

    def sums(self, values: Sequence[float]) -> list[float]:
        """The sum of each number over all ranks; see `gather`."""
        return [sum(parts) for parts in zip(*self.gather(values), strict=True)]

    def sum_gradients(self, parameters: Sequence[nn.Parameter]) -> None:
        """Make every gradient the sum over all ranks; one that no rank has stays none.

        Raises:
            RankError: another rank is gone.
        """
        if self.world == 1:
            return
        owners = self.sums([parameter.grad is not None for parameter in parameters])
        learned = [parameter for parameter, count in zip(parameters, owners, strict=True) if count]
        if not learned:
            return
        parts = [torch.zeros_like(each) if each.grad is None else each.grad for each in learned]
        flat = torch.cat([part.flatten() for part in parts])
        with _together():
            dist.all_reduce(flat)
        for parameter, total in zip(learned, flat.split([each.numel() for each in learned]), strict=True):
            parameter.grad = total.view_as(parameter)

    @contextmanager
    def one_first(self) -> Iterator[None]:
        """Run what is inside on rank 0, then on the first rank of each other machine, then on all others.

        What one of them puts into a cache the next ones find there, on their machine or in a folder that all share.
        """
        turn = 0 if self.main else 1 if not self.local_rank else 2
        for _ in range(turn):
            self.gather(None)
        yield
        for _ in range(2 - turn):
            self.gather(None)


def is_one_of_many() -> bool:
    """Whether `torchrun` started this process and others."""
    return dist.is_torchelastic_launched() and os.environ["WORLD_SIZE"] != "1"


def is_main() -> bool:
    """Whether this process is the main rank, before the ranks have met."""
    return not dist.is_torchelastic_launched() or os.environ["RANK"] == "0"


@contextmanager
def ranks_of_run() -> Iterator[Ranks]:
    """Meet the other ranks where `torchrun` started this process, and part from them in the end.

    Raises:
        RankError: there are more of them on this machine than GPUs.
    """
    if not dist.is_torchelastic_launched():
        yield Ranks(best_device())
        return
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    local_rank, local_world_size = int(os.environ["LOCAL_RANK"]), int(os.environ["LOCAL_WORLD_SIZE"])
    if 0 < gpus < local_world_size:
        raise RankError(
            f"torchrun started {local_world_size} processes here, and there are {gpus} GPUs: one each is needed."
        )
    device = torch.device("cuda", local_rank) if gpus else torch.device("cpu")
    if gpus:
        torch.cuda.set_device(device)
    # What the hosts tell each other goes by gloo, beside the gradients of the devices.
    dist.init_process_group("cpu:gloo,cuda:nccl" if gpus else "gloo", timeout=PATIENCE)
    yield Ranks(device, dist.get_rank(), dist.get_world_size(), local_world_size, local_rank)
    # Not after an error: the others may wait for this process, and only its end, which torchrun sees, frees them.
    dist.destroy_process_group()


@contextmanager
def _together() -> Iterator[None]:
    try:
        yield
    except torch.OutOfMemoryError:  # a RuntimeError too, but this process's own trouble
        raise
    except RuntimeError as error:
        here = str(error).partition("\n")[0]
        raise RankError(
            f"Another process of this run is gone or cannot be reached; what it said last says why. Here: {here}"
        ) from error
