"""Where networks run, and in which precision."""

import functools
import logging
import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch

logger = logging.getLogger(__name__)


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


def default_workers() -> int:
    """Return how many processes decode images: one for each core at hand, which the ranks of a machine share."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


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
    return nullcontext() if "OMP_NUM_THREADS" in os.environ else threads(default_workers())
