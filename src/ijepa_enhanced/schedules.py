"""Schedules: pure functions of the step, so that a resumed run needs no scheduler state."""

import math


def cosine(step: int, total: int, start: float, end: float) -> float:
    """Return the value at `step` of half a cosine from `start` at step 0 to `end` at the last step, `total - 1`."""
    progress = min(1.0, step / max(1, total - 1))
    return end + (start - end) * 0.5 * (1.0 + math.cos(math.pi * progress))


def linear(step: int, total: int, start: float, end: float) -> float:
    """Return the value at `step` of a straight line from `start` at step 0 to `end` at the last step, `total - 1`."""
    progress = min(1.0, step / max(1, total - 1))
    return start + (end - start) * progress


def warmup_cosine(step: int, total: int, warmup: int, peak: float, final: float) -> float:
    """Return the value at `step` of a linear warmup to `peak` over `warmup` steps, then half a cosine to `final`.

    The first step has `peak / warmup`, so the rate rises whatever the peak. I-JEPA (arXiv 2301.08243, appendix A.1)
    starts at 1e-4 instead.
    """
    if step < warmup:
        return peak * (step + 1) / warmup  # step + 1: a learning rate of 0 would waste the first step
    return cosine(step - warmup, total - warmup, peak, final)
