"""How time and memory grow with the number of tokens."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import torch

from ijepa_enhanced.benchmarks.table import print_table

SHARE = 4
"""The most tokens that growth is measured at, as a multiple of the tokens that were asked for."""


def growth_tokens(counts: Sequence[int], tokens: int | None) -> list[int]:
    """Return those of `counts`, at least the first two, that go with `tokens`; None: all of them.

    Args:
        counts: in ascending order.
        tokens: of a stream or a pack, as the user asked for.
    """
    return [count for count in counts if tokens is None or count <= max(SHARE * tokens, counts[1])]


def grow(what: str, counts: Iterable[int], measure: Callable[[int], dict[str, Any]]) -> list[dict[str, Any]]:
    """Measure with more and more tokens until they no longer fit into memory.

    Args:
        what: the noun for so many tokens, such as "pack".
        counts: of tokens, in ascending order.
        measure: returns the row of a number of tokens, with `tokens`, `ms` and `peak_MB`.

    Raises:
        torch.OutOfMemoryError: not even the first fits.
    """
    rows: list[dict[str, Any]] = []
    for count in counts:
        try:
            rows.append(measure(count))
        except torch.OutOfMemoryError:
            if not rows:
                raise
            print(f"A {what} of {count:,} tokens does not fit in memory.")
            break
    return rows


def print_growth(title: str, rows: list[dict[str, Any]]) -> dict[str, float]:
    """Print the rows of `grow` and return the exponents of tokens that time and memory grow with; 1 is linear."""
    print(title)
    print_table(rows)
    time, memory = (exponent(rows, cost) for cost in ("ms", "peak_MB"))
    print(f"Time grows as tokens ** {time:.2f}, memory as tokens ** {memory:.2f}.")
    return {"time_exponent": time, "memory_exponent": memory}


def exponent(rows: list[dict[str, Any]], cost: str) -> float:
    """Return the slope of a straight line through log(cost) over log(tokens), fitted by least squares.

    It is not a number where all rows have equally many tokens, as packs of a few images have.
    """
    tokens, costs = (np.log([row[name] for row in rows]) for name in ("tokens", cost))
    if tokens.min() == tokens.max():
        return math.nan
    return float(np.polyfit(tokens, costs, 1)[0])
