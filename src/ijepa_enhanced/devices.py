"""Devices: where networks run, in which precision, and with how many cores."""

import functools
import logging
import os
import shutil
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

logger = logging.getLogger(__name__)

CGROUPS = Path("/sys/fs/cgroup")
"""Control groups: how Docker, Kubernetes and Slurm limit a container or a job. In the folder of a group, `cpu.max`
holds the microseconds of computing in each period, and the period. `memory.max` holds the bytes of memory that the
group may use, and `memory.current` the bytes that it uses."""
OWN_CGROUP = Path("/proc/self/cgroup")
"""File that names the control group of this process, in a line `0::/PATH`."""
SHARED_MEMORY = Path("/dev/shm")
"""Where Linux keeps memory that processes share."""
MEGABYTE = 10**6
AMPERE = 8
"""The first major compute capability of CUDA that FlashAttention 2 runs on."""


def best_device() -> torch.device:
    """Return the GPU if PyTorch can use one (CUDA, XPU or MPS), else the CPU."""
    return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")


def kind_of(device: torch.device) -> Literal["cpu", "gpu"]:
    """Return whether a device is a CPU or any other, which benchmarks choose their sizes by."""
    return "cpu" if device.type == "cpu" else "gpu"


def device_name(device: torch.device) -> str:
    """Return the name of a GPU's model if PyTorch knows it, else the type of the device, such as cpu or mps."""
    backend = torch.get_device_module(device)
    return backend.get_device_name(device) if hasattr(backend, "get_device_name") else device.type


def multiplies_bf16(device: torch.device) -> bool:
    """Return whether the hardware is known to multiply bfloat16 matrices."""
    if device.type == "cpu":
        # Checked first: builds without oneDNN do not have the second function.
        return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    backend = torch.get_device_module(device)
    # CUDA and XPU can tell, MPS cannot. An emulation gains nothing.
    return hasattr(backend, "is_bf16_supported") and backend.is_bf16_supported(including_emulation=False)


def has_varlen_attention(device: torch.device) -> bool:
    """Return whether PyTorch's attention over packed streams (FlashAttention 2) runs on the device."""
    return device.type == "cuda" and torch.cuda.get_device_properties(device).major >= AMPERE


def pins_memory(device: torch.device) -> bool:
    """Return whether copies to the device are faster from pinned memory. MPS shares the memory of the host."""
    return device.type in ("cuda", "xpu")


class HostCopy:
    """A small tensor on its way to the host.

    The copy is queued at once, so `read` waits only for what the device got before it, and not for a later step.

    Args:
        value: on any device.
    """

    def __init__(self, value: Tensor) -> None:
        device = value.device
        queued = pins_memory(device)
        self.value = value.detach().to("cpu", non_blocking=queued)  # PyTorch pins the memory of such a copy
        self.copied = torch.Event(device) if queued else None
        if self.copied is not None:
            self.copied.record()

    def read(self) -> Tensor:
        """Return the tensor on the host when it has arrived."""
        if self.copied is not None:
            self.copied.synchronize()
        return self.value


def synchronize(device: torch.device) -> None:
    """Wait until the device has computed what was asked of it; a CPU already has."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def autocast_dtype(precision: str, device: torch.device) -> torch.dtype:
    """Return the precision of matrix products on `device`.

    A GPU without bfloat16 always computes in float32, because it has no FlashAttention for half precision either.

    Args:
        precision: auto, bf16 or fp32. `auto` is bfloat16 if the hardware multiplies it, else float32.
        device: where the network runs.
    """
    if precision == "fp32":
        return torch.float32
    if device.type == "cuda" and not multiplies_bf16(device):
        say_too_old()
        return torch.float32
    return torch.bfloat16 if precision == "bf16" or multiplies_bf16(device) else torch.float32


@functools.cache
def say_too_old() -> None:
    """Warn, once in a process, that the GPU has neither bfloat16 nor FlashAttention."""
    logger.warning(
        "This GPU does not support bfloat16 and FlashAttention. Using float32 and attention on padded batches instead, "
        "which is slower and needs more memory."
    )


def autocast(device: torch.device, dtype: torch.dtype) -> torch.autocast:
    """Return a context in which matrix products on `device` are in `dtype`."""
    return torch.autocast(device.type, dtype, enabled=dtype != torch.float32)


def own_cgroups() -> list[Path]:
    """Return the folders of the control groups that limit this process: its own group and the groups above it."""
    inner = CGROUPS
    with suppress(OSError):  # not on Linux
        for line in OWN_CGROUP.read_text().splitlines():
            if line.startswith("0::"):
                inner = CGROUPS / line.removeprefix("0::/")
    return [inner, *(folder for folder in inner.parents if folder.is_relative_to(CGROUPS))]


CORES_PER_WORKER = 6
"""Cores for each worker that decodes for training, on a machine without a GPU. An estimate, from measurements on two
cores (docs/measurements.md): with fewer cores, it is as fast or faster if the training process decodes."""


def default_workers() -> int:
    """Return how many processes decode images: one for each core at hand, which the ranks of a machine share."""
    # A container or scheduler may allow fewer cores than the machine has; macOS and Windows cannot tell.
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    for group in own_cgroups():
        with suppress(OSError, ValueError):  # not a group, or one without a limit: "max"
            quota, period = (group / "cpu.max").read_text().split()
            cores = min(cores, int(quota) // int(period))
    return max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


def training_workers(workers: int | None, device: torch.device) -> int:
    """Return how many processes decode images for training on a device: `workers`, or the default if it is None.

    The default is `default_workers` with a GPU. On a CPU, a worker takes a core from the network, and decoding takes
    about a tenth of the computation (docs/measurements.md). So there is one worker for every `CORES_PER_WORKER` cores,
    and none on a small machine.
    """
    return default_workers() // (CORES_PER_WORKER if device.type == "cpu" else 1) if workers is None else workers


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Let PyTorch compute with `count` threads on the CPU while entered."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def all_cores() -> AbstractContextManager[None]:
    """Return a context in which PyTorch computes with all cores, unless OMP_NUM_THREADS is set.

    For scoring, which starts after the workers that decode have ended.
    """
    return nullcontext() if "OMP_NUM_THREADS" in os.environ else threads(default_workers())


def free_memory() -> dict[str, int]:
    """Return the bytes that are free, by place: `memory`, and `SHARED_MEMORY` where that is limited on its own.

    In a container or a job, the free memory is what its limit leaves, if the machine does not have less.
    """
    try:
        (available,) = (line for line in Path("/proc/meminfo").read_text().splitlines() if "MemAvailable" in line)
        memory = int(available.split()[1]) * 1024
    except (OSError, ValueError):
        memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    for group in own_cgroups():
        with suppress(OSError, ValueError):  # not a group, or one without a limit, which is the word `max`
            limit, used = (int((group / name).read_text()) for name in ("memory.max", "memory.current"))
            stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
            # The group counts cached files as used, but the system frees them when memory is needed.
            memory = min(memory, max(0, limit - used + int(stat.get("inactive_file", 0))))
    free = {"memory": memory}
    if SHARED_MEMORY.is_dir():
        free[str(SHARED_MEMORY)] = shutil.disk_usage(SHARED_MEMORY).free
    return free
