"""Schedules: pure functions of the step, so that resuming needs no state and no replay."""

import math


def cosine(step: int, total: int, start: float, end: float) -> float:
    """Half a cosine from `start` at step 0 to `end` at the last step, `total - 1`."""
    progress = min(1.0, step / max(1, total - 1))
    return end + (start - end) * 0.5 * (1.0 + math.cos(math.pi * progress))


def linear(step: int, total: int, start: float, end: float) -> float:
    """A straight line from `start` at step 0 to `end` at the last step, `total - 1`."""
    progress = min(1.0, step / max(1, total - 1))
    return start + (end - start) * progress


def warmup_cosine(step: int, total: int, warmup: int, peak: float, final: float) -> float:
    """A straight line from `peak / warmup` up to `peak` over `warmup` steps, then half a cosine to `final`.

    Unlike I-JEPA (arXiv 2301.08243, appendix A.1: from 1e-4) the first step is never above `peak / warmup`,
    so a short warm-up is still a warm-up.
    """
    if step < warmup:
        return peak * (step + 1) / warmup
    return cosine(step - warmup, total - warmup, peak, final)
