"""Where networks run, and in which precision."""

import functools
import logging
import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch

logger = logging.getLogger(__name__)

CORES_PER_WORKER = 4
"""On a CPU that runs the network too."""


def best_device() -> torch.device:
    """A GPU where there is one that can be used, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def multiplies_bf16(device: torch.device) -> bool:
    """Whether the device has products in bfloat16."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    # Builds without oneDNN lack the question.
    return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()


def autocast_dtype(precision: str, device: torch.device) -> torch.dtype:
    """The precision of matrix products on `device`; `auto` takes bfloat16 where the hardware multiplies it.

    A GPU without it gets float32 whatever is asked for: it has no flash attention for half precision either.
    """
    if precision == "fp32":
        return torch.float32
    if device.type == "cuda" and not multiplies_bf16(device):
        say_too_old()
        return torch.float32
    return torch.bfloat16 if precision == "bf16" or multiplies_bf16(device) else torch.float32


@functools.cache
def say_too_old() -> None:
    """Once, not at every look at the precision."""
    logger.warning("This GPU is too old for bfloat16 and flash attention: float32 and padded attention instead.")


def autocast(device: torch.device, dtype: torch.dtype) -> torch.autocast:
    """While entered, matrix products on `device` are in `dtype`."""
    return torch.autocast(device.type, dtype, enabled=dtype != torch.float32)


def cores() -> int:
    """Return how many processor cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def own_cores() -> int:
    """Return how many cores are this process's share: those that `torchrun` starts on one machine divide its cores."""
    return max(1, cores() // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


def default_workers() -> int:
    """Return how many processes should decode images while a network runs.

    Beside a GPU all cores decode. On a CPU the network needs them: a ViT-S takes 34 ms an image of 224 px on one core
    (docs/evaluation.md) and decoding a few, so a quarter of the cores keeps up. Processes that `torchrun` starts on one
    machine share its cores.
    """
    own = own_cores()
    return own if best_device().type == "cuda" else max(1, own // CORES_PER_WORKER)


@contextmanager
def threads(count: int) -> Iterator[None]:
    """While entered, let PyTorch compute with so many threads on the CPU."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def all_cores() -> AbstractContextManager[None]:
    """Return what lets PyTorch compute with all cores while entered, unless OMP_NUM_THREADS says how many.

    Commands leave cores to the workers that decode; scoring begins when these have ended.
    """
    return nullcontext() if "OMP_NUM_THREADS" in os.environ else threads(own_cores())
