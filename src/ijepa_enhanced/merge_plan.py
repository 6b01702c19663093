"""Token merging in numbers: how many tokens every layer leaves of every view, known before a pixel is decoded.

ToMe (arXiv 2210.09461) merges r tokens a layer, for images of one size. Here r follows from a rate and the view's own
length alone, so that a view merges the same in any pack and the loader's worker can prepare every layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ijepa_enhanced.packed import Movable, Segments

TILE = 64
"""Tokens on each side of a block of similarities."""


def merged_lengths(
    lengths: Sequence[int] | NDArray[np.integer], rate: float | Sequence[float], depth: int, floor: int = 1
) -> NDArray[np.int64]:
    """Tokens of every view before the first layer and after each: int64 [depth + 1, V].

    After layer l a view of n tokens has min(n, max(floor, ceil(n * product of (1 - rate)))), the product over the
    layers up to l: exact, with the rate taken as the decimal fraction that it is written as. A layer thus merges at
    most half of what it finds, rounded down: if N = ceil(p n) it leaves at least ceil(p n / 2) >= ceil(N / 2),
    as p n > N - 1.

    Args:
        lengths: tokens of each of V views.
        rate: the share of its tokens that a layer merges into others, one for all layers or one for each.
        depth: number of layers.
        floor: no view is merged to fewer tokens than these.

    Raises:
        ValueError: a rate outside [0, 0.5], a list that is not of `depth` rates, or a floor below 1.
    """
    if floor < 1:
        raise ValueError(f"Merging must leave every view at least 1 token, not {floor}.")
    distinct, place = np.unique(np.asarray(lengths, dtype=np.int64), return_inverse=True)
    left, table = Fraction(1), [distinct.tolist()]
    for share in layer_rates(rate, depth):
        left *= 1 - share
        # In Python's integers: the product of 40 layers overflows any other.
        table.append([min(n, max(floor, -(-n * left.numerator // left.denominator))) for n in table[0]])
    return np.array(table, dtype=np.int64)[:, place]


def layer_rates(rate: float | Sequence[float], depth: int) -> list[Fraction]:
    """The exact rate of each layer; arguments and errors are those of `merged_lengths`."""
    rates = [rate] * depth if isinstance(rate, (int, float)) else list(rate)
    if len(rates) != depth:
        raise ValueError(f"Merging needs one rate for each of the {depth} layers, but the list has {len(rates)}.")
    for one in rates:
        if not 0 <= one <= 0.5:
            raise ValueError(
                f"A merge rate must lie between 0 and 0.5, not {one}: a layer merges at most every second token."
            )
    return [Fraction(str(one)) for one in rates]


@dataclass(frozen=True)
class MergePlan(Movable):
    """What the layers of a network do to one pack; made on the host, in the loader's worker.

    A compiled region may read the plain numbers, layer by layer; of `segments`, as ever, not the lengths.
    """

    segments: tuple[Segments, ...]
    """depth + 1: the views before the first layer and after each."""
    totals: tuple[int, ...]
    """depth + 1: the tokens of all views, alike."""
    active: tuple[bool, ...]
    """depth: whether the layer's rate is above 0. A layer that is not active has nothing to do."""
    tiles: Tensor
    """int64 [P, 2, 2]: the blocks of similarities of all layers. Each has a side of even and a side of odd places of a
    view: its first row in the layer's stream, from which every second one follows, and the side's last in the view."""
    tile_bounds: tuple[int, ...]
    """depth + 1: layer l has the tiles from tile_bounds[l] to tile_bounds[l + 1]."""

    @classmethod
    def of(
        cls, lengths: Sequence[int] | NDArray[np.integer], rate: float | Sequence[float], depth: int, floor: int = 1
    ) -> MergePlan:
        """The plan of a pack of views, on the CPU; arguments and errors are those of `merged_lengths`."""
        table = merged_lengths(lengths, rate, depth, floor)
        active = tuple(share > 0 for share in layer_rates(rate, depth))
        tiles = [_tiles(row if merges else row[:0]) for row, merges in zip(table[:-1], active, strict=True)]
        return cls(
            tuple(Segments.of(row) for row in table),
            tuple(table.sum(axis=1).tolist()),
            active,
            torch.from_numpy(np.concatenate(tiles)),
            tuple(np.cumsum([0, *map(len, tiles)]).tolist()),
        )


def plan_merges(
    lengths: Sequence[int] | NDArray[np.integer], rate: float | Sequence[float], depth: int
) -> MergePlan | None:
    """The plan of a pack of views, or None where no layer merges; see `MergePlan.of`."""
    return MergePlan.of(lengths, rate, depth) if any(layer_rates(rate, depth)) else None


def _tiles(lengths: NDArray[np.int64]) -> NDArray[np.int64]:
    """One layer's part of `MergePlan.tiles`, from every view of two tokens or more.

    Also from one that merges nothing here: torch.compile tells no tiles from some, which should not hang on the pack.
    """
    starts = np.cumsum(lengths) - lengths
    tokens = np.stack([(lengths + 1) // 2, lengths // 2], axis=1)  # at even places, at odd ones
    grid = -(-tokens // TILE)
    counts = grid.prod(axis=1)
    view = np.repeat(np.arange(len(lengths)), counts)
    number = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
    block = np.stack(np.divmod(number, grid[view, 1]), axis=1)
    places = np.stack([block * TILE, tokens[view] - 1], axis=2)  # first and last among its side's
    return starts[view, None, None] + 2 * places + [[0], [1]]
