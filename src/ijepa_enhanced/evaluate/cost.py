"""What running something costs: time and memory, meant the same on every device."""

from __future__ import annotations

import itertools
import os
import statistics
import time
from collections.abc import Callable, Sequence

import torch

from ijepa_enhanced.devices import synchronize


def peak_bytes(run: Callable[[], object], device: torch.device) -> int:
    """Return the most bytes of tensors that `run` holds at once, on top of what was there before it.

    The allocator of a GPU counts this itself; on the CPU PyTorch's profiler records every allocation. The peak of the
    process would not do: it never falls, and does not show freed memory that is used again. Scratch memory that a
    library such as oneDNN allocates for itself is not counted.
    """
    if device.type != "cpu":
        torch.accelerator.reset_peak_memory_stats(device)
        before = torch.accelerator.memory_allocated(device)
        run()
        return torch.accelerator.max_memory_allocated(device) - before
    with profiler(torch.profiler.ProfilerActivity.CPU, memory=True) as profile:
        run()
    assert profile.profiler is not None
    assert profile.profiler.kineto_results is not None
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    events.sort(key=lambda event: event.start_ns())
    return max(itertools.accumulate((event.nbytes() for event in events), initial=0))


def profiler(*activities: torch.profiler.ProfilerActivity, memory: bool = False) -> torch.profiler.profile:
    """Return PyTorch's profiler, kept from writing lines of its own to stderr.

    Args:
        activities: what to record.
        memory: record allocations too.
    """
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # read when the profiler is first used
    # One cycle is all that is recorded. Unless it keeps the events of several, PyTorch 2.11 warns about the others.
    return torch.profiler.profile(activities=activities, profile_memory=memory, acc_events=True)


def interleaved_seconds(runs: Sequence[Callable[[], object]], device: torch.device, turns: int = 5) -> list[float]:
    """Return the median time of each of `runs`, in seconds.

    A turn calls each of them once, after a first turn to warm up, so that other work of the machine slows all equally.
    """
    seconds: list[list[float]] = [[] for _ in runs]
    for turn in range(turns + 1):
        for run, times in zip(runs, seconds, strict=True):
            start = time.perf_counter()
            run()
            synchronize(device)
            if turn:
                times.append(time.perf_counter() - start)
    return [statistics.median(times) for times in seconds]
