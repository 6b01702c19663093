"""Share a model with PyTorch's data parallelism: each rank computes its packs, and the backward pass sums gradients.

`ddp` keeps whole weights on every rank. `fsdp` keeps a shard of weights, gradients and moments on each rank, and
gathers the weights of a block when they are needed.
"""

import itertools
import logging
import warnings
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._C._distributed_c10d import GradBucket
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
from torch.futures import Future
from torch.nn.parallel import DistributedDataParallel

from ijepa_enhanced.distributed import Ranks
from ijepa_enhanced.encoder import Encoder
from ijepa_enhanced.jepa import JEPA
from ijepa_enhanced.models.vit import VisionTransformer
from ijepa_enhanced.train.config import Parallel

logger = logging.getLogger(__name__)


def parallelize(model: JEPA, kind: Parallel, ranks: Ranks) -> nn.Module:
    """Share a model among the ranks, and return a module with the same `forward` as `model`.

    All ranks start with the weights and buffers of rank 0. A backward pass sums gradients over the ranks. It does not
    average them, because the loss of a pack is already its share of the loss of the step.

    Args:
        model: a model on the device of this rank. `fsdp` shards it in place, so create the optimizer afterwards.
        kind: how to share it.
        ranks: the processes that share it.
    """
    if ranks.world == 1:
        if kind == "fsdp":
            logger.warning("parallel = fsdp shards nothing, because this run has one process.")
        return model
    for tensor in weights_of(model):
        dist.broadcast(tensor.detach(), 0)
    if kind == "fsdp":
        shard(model, mesh_of(ranks))
        return model
    return replicate(model)


def replicate(model: JEPA) -> nn.Module:
    """Return a module that sums the gradients of `model` over the ranks, which hold the same weights."""
    with warnings.catch_warnings():
        # PyTorch 2.13 renames the option, and 2.11 does not know the new name.
        warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated", FutureWarning)
        replicated = DistributedDataParallel(
            model, init_sync=False, broadcast_buffers=False, gradient_as_bucket_view=True
        )
    replicated.register_comm_hook(None, summed)
    return replicated


def weights_of(model: JEPA) -> Iterator[Tensor]:
    """Yield all parameters and buffers, including those of a frozen teacher, which is not a submodule."""
    modules: list[nn.Module] = [model, model.teacher] if model.frozen else [model]
    for module in modules:
        yield from itertools.chain(module.parameters(), module.buffers())


def summed(_: None, bucket: GradBucket) -> Future[Tensor]:
    """Sum a bucket of gradients over the ranks. This is a communication hook of DDP, which averages by default."""
    work = dist.all_reduce(bucket.buffer(), async_op=True)
    assert work is not None
    return work.get_future().then(lambda done: done.value()[0])


def mesh_of(ranks: Ranks) -> DeviceMesh:
    """Return the mesh to shard weights on: all ranks, or with several machines the ranks of each machine.

    Shards stay within a machine, where ranks exchange weights fast, and machines exchange gradients only.
    """
    machines, rest = divmod(ranks.world, ranks.local_world_size)
    if machines > 1 and not rest and ranks.local_world_size > 1:
        shape, names = (machines, ranks.local_world_size), ("machines", "shards")
        return init_device_mesh(ranks.device.type, shape, mesh_dim_names=names)
    return init_device_mesh(ranks.device.type, (ranks.world,))


def shard(model: JEPA, mesh: DeviceMesh) -> None:
    """Shard student, teacher and predictor. Each block is a unit, and everything outside of blocks is another one."""
    blocks: list[nn.Module] = [*model.student.blocks.layers, *model.teacher.blocks.layers]
    if model.predictor is not None:
        blocks += model.predictor.layers
    # A frozen teacher is not a submodule of the model, so it is sharded on its own.
    modules: list[nn.Module] = [*blocks, model.teacher, model] if model.frozen else [*blocks, model]
    for module in modules:
        sharded = fully_shard(module, mesh=mesh)
        sharded.set_gradient_divide_factor(1.0)
        sharded.set_force_sum_reduction_for_comms(True)


def sync_gradients(module: nn.Module, sync: bool) -> None:
    """Set whether the next backward pass sums gradients over ranks. With several packs, only the last one needs to.

    Args:
        module: from `parallelize`.
        sync: whether it sums them.
    """
    if isinstance(module, DistributedDataParallel):
        module.require_backward_grad_sync = sync
    elif isinstance(module, FSDPModule):
        module.set_requires_gradient_sync(sync)


def whole(encoder: Encoder) -> Encoder:
    """Return an encoder with whole weights: a copy if its weights are sharded. All ranks call this."""
    weights: dict[str, Any] = encoder.network.state_dict()
    if not any(isinstance(value, DTensor) for value in weights.values()):
        return encoder
    with torch.device("meta"):
        network = VisionTransformer(encoder.config)
    network.load_state_dict({name: whole_tensor(value) for name, value in weights.items()}, assign=True)
    return Encoder(network.eval(), encoder.preprocessing, encoder.origin)


def whole_tensor(value: Tensor) -> Tensor:
    """Return a tensor with the shards of all ranks, if it is sharded. All ranks call this."""
    return value.full_tensor() if isinstance(value, DTensor) else value


def local(value: Tensor) -> Tensor:
    """Return what this rank holds of a tensor: its shard, or all of it."""
    return value.to_local() if isinstance(value, DTensor) else value
