"""Ranks: the processes that `torchrun` starts, one for each device, which share the packs of a run or an evaluation.

In training they exchange a few numbers at every step, and PyTorch sums their gradients (`train.parallel`).
"""

from __future__ import annotations

import os
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._C._distributed_c10d import PrefixStore, Store
from torch.distributed.distributed_c10d import _set_pg_timeout
from torch.distributed.rendezvous import rendezvous

from ijepa_enhanced.devices import best_device
from ijepa_enhanced.errors import RankError

START_TIMEOUT = timedelta(minutes=30)
"""How long ranks wait for each other until the first step is done, because networks may be compiled. Later, how long
they wait for a rank that saves or scores. If a rank ends, the others notice at once."""
STEP_TIMEOUT = timedelta(minutes=10)
"""How long ranks wait for each other after the first step. It is longer than `train.faults.WORKER_TIMEOUT`, so that a
rank with a stuck worker names it before the others give up."""
WORK_TIMEOUT = timedelta(hours=12)
"""How long ranks wait for a rank that works alone, before the first step or without training. It scans a large source,
loads its images into memory, or scores."""


@dataclass(frozen=True)
class Ranks:
    """This process among the ranks of a run. By default it is the only one, and communication does nothing."""

    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    rank: int = 0
    world: int = 1
    local_world_size: int = 1
    """Number of ranks on this machine."""
    local_rank: int = 0
    """Number of this rank among those of its machine."""
    patient: dist.ProcessGroup | None = None
    """All ranks, with `WORK_TIMEOUT`; None if this rank is the only one."""

    @property
    def main(self) -> bool:
        """Return whether this rank writes the files of the run: logs, checkpoints, encoders."""
        return self.rank == 0

    def gather(self, value: Any, patient: bool = False) -> list[Any]:
        """Return the value of each rank, in order, on all ranks.

        Args:
            value: a picklable object on the host. It travels between the hosts, not between the GPUs.
            patient: whether one rank may take up to `WORK_TIMEOUT` until it calls this.

        Raises:
            RankError: another rank is gone.
        """
        if self.world == 1:
            return [value]
        values: list[Any] = [None] * self.world
        with _rank_errors():
            dist.all_gather_object(values, value, self.patient if patient else None)
        return values

    def gather_to_rank0(self, value: Any) -> list[Any]:
        """Return the value of each rank, in order, on rank 0, and an empty list on the others; see `gather`."""
        if self.world == 1:
            return [value]
        values = [None] * self.world if self.main else None
        with _rank_errors():
            dist.gather_object(value, values)
        return values or []

    def broadcast_from_rank0(self, tensors: Sequence[Tensor | None]) -> list[Tensor | None]:
        """Return the tensors of rank 0 on all ranks.

        Args:
            tensors: on the host. Those of other ranks are ignored, but there must be as many.

        Raises:
            RankError: another rank is gone.
        """
        if self.world == 1:
            return list(tensors)
        shapes = self.gather([None if each is None else (each.shape, each.dtype) for each in tensors])[0]
        received: list[Tensor | None] = []
        for own, shape in zip(tensors, shapes, strict=True):
            if shape is None:
                received.append(None)
                continue
            value = own.contiguous() if self.main and own is not None else torch.empty(shape[0], dtype=shape[1])
            with _rank_errors():
                dist.broadcast(value, 0)
            received.append(value)
        return received

    def agree(self, facts: dict[str, Any]) -> None:
        """Check that all ranks have the same facts.

        Raises:
            RankError: they differ; the message names the first fact that does.
        """
        by_rank = self.gather(facts)
        for name in facts:
            if len({str(each.get(name)) for each in by_rank}) > 1:
                raise RankError(
                    f"The processes of this run do not have the same {name}. All machines need the same images, the "
                    "same package versions and one shared run folder."
                )

    def sums(self, values: Sequence[float]) -> list[float]:
        """Return the sum of each number over all ranks, in float64, which holds whole numbers below 2**53.

        Raises:
            RankError: another rank is gone.
        """
        total = torch.tensor(values, dtype=torch.float64)
        if self.world > 1:
            with _rank_errors():
                dist.all_reduce(total)
        return total.tolist()

    def expect_steps(self) -> None:
        """From now on, wait at most `STEP_TIMEOUT` for other ranks, or `START_TIMEOUT` while a rank works alone."""
        if self.world > 1:
            _set_pg_timeout(STEP_TIMEOUT)
            _set_pg_timeout(START_TIMEOUT, self.patient)

    def sum_gradients(self, parameters: Sequence[nn.Parameter]) -> None:
        """Replace every gradient by its sum over all ranks. A gradient that no rank has stays None.

        Raises:
            RankError: another rank is gone.
        """
        if self.world == 1:
            return
        # A rank may lack a gradient that others have. All must sum the same tensors, or the all-reduce hangs.
        owners = self.sums([parameter.grad is not None for parameter in parameters])
        with_grad = [parameter for parameter, count in zip(parameters, owners, strict=True) if count]
        if not with_grad:
            return
        # One flat tensor: a single all-reduce is faster than one for each parameter.
        grads = [torch.zeros_like(each) if each.grad is None else each.grad for each in with_grad]
        flat = torch.cat([grad.flatten() for grad in grads])
        with _rank_errors():
            dist.all_reduce(flat)
        for parameter, total in zip(with_grad, flat.split([each.numel() for each in with_grad]), strict=True):
            parameter.grad = total.view_as(parameter)

    def wait(self) -> None:
        """Wait until all ranks are here, which may take one of them up to `WORK_TIMEOUT`.

        Raises:
            RankError: another rank is gone.
        """
        if self.world > 1:
            with _rank_errors():
                dist.barrier(self.patient)

    @contextmanager
    def one_first(self) -> Iterator[None]:
        """Run the body on rank 0, then on the first rank of each other machine, then on all other ranks.

        So each rank finds what an earlier one has put into a cache, on its machine or in a shared folder.
        """
        # Three turns with a barrier between them: a rank passes `turn` barriers before its body and the rest after it.
        turn = 0 if self.main else 1 if not self.local_rank else 2
        for _ in range(turn):
            self.wait()
        yield
        for _ in range(2 - turn):
            self.wait()


ALONE = Ranks()
"""The ranks of a process that was not started by torchrun."""


def is_one_of_many() -> bool:
    """Return whether `torchrun` started this process together with others."""
    return dist.is_torchelastic_launched() and os.environ["WORLD_SIZE"] != "1"


def is_restarted() -> bool:
    """Return whether `torchrun --max-restarts` started this process again after a failure."""
    return os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0"


def launch_id() -> str | None:
    """Return the name that torchrun gives to all processes of a job, also after restarts (`--rdzv-id`).

    It is "none" if the user has not chosen one. Return None if torchrun did not start this process.
    """
    return os.environ.get("TORCHELASTIC_RUN_ID")


def is_main() -> bool:
    """Return whether this process is rank 0. It can be called before `ranks_of_run`."""
    return not dist.is_torchelastic_launched() or os.environ["RANK"] == "0"


def own_part(store: Store, rank: int, world: int, timeout: timedelta) -> PrefixStore:
    """Return a part of torchrun's store that only the ranks of this start use.

    torchrun keeps the store when it restarts ranks, and each machine counts restarts separately. So ranks would find
    the addresses of ended ranks, and fail to connect. To avoid this, rank 0 makes a new part. Each rank asks for its
    name under a key of its own.

    Args:
        store: the store of torchrun.
        rank, world: this rank, and the number of ranks.
        timeout: how long to wait for the other ranks.

    Raises:
        RuntimeError: a rank has not started in time.
    """
    own, end = uuid.uuid4().hex, time.monotonic() + timeout.total_seconds()
    if rank:
        store.set(f"asks/{rank}", own)
        store.wait([own], timeout)
        part = store.get(own).decode()
        store.set(f"{part}/{rank}", "")
        return PrefixStore(part, store)
    others = range(1, world)
    while not all(store.check([f"{own}/{other}"]) for other in others):
        for other in others:
            if store.check([f"asks/{other}"]):
                store.set(store.get(f"asks/{other}").decode(), own)
        if time.monotonic() > end:
            raise RuntimeError(f"Not all of the {world} processes have started within {timeout}.")
        time.sleep(0.02)
    return PrefixStore(own, store)


@contextmanager
def ranks_of_run(timeout: timedelta = START_TIMEOUT) -> Iterator[Ranks]:
    """Join the process group if `torchrun` started this process, and leave it at the end.

    Args:
        timeout: how long ranks wait for each other, other than in `Ranks.wait`.

    Raises:
        RankError: this machine has more ranks than GPUs, or another rank cannot be reached.
    """
    if not dist.is_torchelastic_launched():
        yield Ranks(best_device())
        return
    device = best_device()
    gpus = 0 if device.type == "cpu" else torch.accelerator.device_count()
    local_rank, local_world_size = int(os.environ["LOCAL_RANK"]), int(os.environ["LOCAL_WORLD_SIZE"])
    if 0 < gpus < local_world_size:
        raise RankError(
            f"torchrun started {local_world_size} processes on this machine. Each needs its own GPU, but the machine "
            f"has only {gpus}. Use torchrun --nproc-per-node {gpus}."
        )
    if gpus:
        device = torch.device(device.type, local_rank)
        torch.accelerator.set_device_index(device)
    with _rank_errors():
        store, rank, world = next(rendezvous("env://", timeout=timeout))
        part = own_part(store, rank, world, timeout)
        # We use two backends: gloo sends objects between the hosts. NCCL (CUDA) or XCCL (XPU) sends gradients.
        backends = f"cpu:gloo,{device.type}:{dist.get_default_backend_for_device(device)}" if gpus else "gloo"
        dist.init_process_group(backends, timeout=timeout, store=part, rank=rank, world_size=world)
        patient = dist.new_group(backend="gloo", timeout=WORK_TIMEOUT)
    yield Ranks(device, rank, world, local_world_size, local_rank, patient)
    # Not in a `finally`: after an error the other ranks may wait for this one, and only the end of its process frees
    # them, because torchrun then stops them.
    dist.destroy_process_group()


@contextmanager
def _rank_errors() -> Iterator[None]:
    """Turn a failure to communicate into a RankError."""
    try:
        yield
    except torch.OutOfMemoryError:  # a RuntimeError too, but not the fault of another rank
        raise
    except RuntimeError as error:
        if str(error).startswith("DataLoader worker"):  # when a worker ends, it interrupts this process
            raise
        raise lost_connection(error) from error


def lost_connection(error: RuntimeError) -> RankError:
    """Return the error of a rank whose communication failed with `error`."""
    here = str(error).partition("\n")[0]
    return RankError(
        "Lost the connection to another process of this run. The log of that process tells why. Error in this process: "
        f"{here}"
    )
