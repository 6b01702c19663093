"""What a device can compute at most, and which kernels it spends its time on."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch.profiler import ProfilerActivity

from ijepa_enhanced.devices import kind_of
from ijepa_enhanced.evaluate.cost import profiler
from ijepa_enhanced.ops.linear import Linear

PRODUCT_WIDTH = {"cpu": 1024, "gpu": 8192}
PRODUCTS = 10
KERNELS, KERNEL_NAME = 15, 60
"""Rows of a profile, and the most characters of a kernel's name: on CUDA some have hundreds."""


def matrix_products(device: torch.device, dtype: torch.dtype) -> tuple[Callable[[], None], int]:
    """Return a function that computes a few large matrix products, and its number of floating-point operations.

    Their rate stands for the most that the device reaches.
    """
    width = PRODUCT_WIDTH[kind_of(device)]
    x, layer = torch.randn(width, width, device=device, dtype=dtype), Linear(width, width, device=device, dtype=dtype)

    @torch.no_grad()
    def multiply() -> None:
        for _ in range(PRODUCTS):
            layer(x)

    return multiply, PRODUCTS * 2 * width**3


def kernel_rows(encoder: str, step: Callable[[], object], device: torch.device) -> list[dict[str, Any]]:
    """Return a row for each kernel that takes most of a step's time on the device, and one for all other kernels.

    On a CPU the rows are of PyTorch's operations.
    """
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.type == "cuda" else [])]
    with profiler(*activities) as profile:
        step()
    time_of = "self_device_time_total" if device.type == "cuda" else "self_cpu_time_total"
    kind = device.type.upper()
    # Ranges that code marks, as the optimizer does, are events of the GPU too. They contain kernels, so leave them out.
    events = [e for e in profile.key_averages() if e.device_type.name == kind and not e.is_user_annotation]
    events.sort(key=lambda event: getattr(event, time_of), reverse=True)
    total = sum(getattr(event, time_of) for event in events)

    def row(name: str, some: list[Any]) -> dict[str, Any]:
        taken = sum(getattr(event, time_of) for event in some)
        return {
            "encoder": encoder,
            "kernel": name,
            "calls": sum(event.count for event in some),
            "ms": taken / 1e3,
            "share": taken / (total or math.nan),
        }

    rows = [row(event.key[:KERNEL_NAME], [event]) for event in events[:KERNELS]]
    return [*rows, row("all others", events[KERNELS:])]
