"""Merge plans: how many tokens of each view every layer keeps, known before an image is decoded.

ToMe (arXiv 2210.09461) merges a fixed number of tokens in each layer, for images of one size. Here the number depends
only on a rate and the length of the view. So a view merges the same way in any pack, and the loader's worker can plan
every layer.
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
"""Rows and columns of one tile of a view's similarity matrix."""


def merged_lengths(
    lengths: Sequence[int] | NDArray[np.integer],
    rate: float | Sequence[float],
    depth: int,
    floor: int = 1,
    prefix: int = 0,
) -> NDArray[np.int64]:
    """Return the tokens of every view before the first layer and after each layer: int64 [depth + 1, V].

    After layer l, the n patches of a view are min(n, max(floor, ceil(n * product of (1 - rate)))) tokens, where the
    product runs over the layers up to l. Its class token and registers, which never merge, come on top. The arithmetic
    is exact: a rate is the decimal fraction that it is written as.
    A layer merges at most half of its tokens, rounded down: of N = ceil(p n) tokens it keeps at least
    ceil(p n / 2) >= ceil(N / 2), because p n > N - 1.

    Args:
        lengths: tokens of each of V views.
        rate: share of its tokens that a layer merges into others; one for all layers, or one for each.
        depth: number of layers.
        floor: no view's patches are merged to fewer tokens than this.
        prefix: tokens at the beginning of each view that are no patches (`Packed.prefix`); `lengths` include them.

    Raises:
        ValueError: a rate lies outside [0, 0.5], the number of rates is not `depth`, or the floor is below 1.
    """
    if floor < 1:
        raise ValueError(f"Merging must leave every view at least 1 token, not {floor}.")
    # Many views share a length: compute each length once.
    distinct, inverse = np.unique(np.asarray(lengths, dtype=np.int64) - prefix, return_inverse=True)
    kept, table = Fraction(1), [distinct.tolist()]
    for layer_rate in layer_rates(rate, depth):
        kept *= 1 - layer_rate
        # Python integers, since the product over 40 layers overflows int64. -(-a // b) rounds up.
        table.append([min(n, max(floor, -(-n * kept.numerator // kept.denominator))) for n in table[0]])
    return np.array(table, dtype=np.int64)[:, inverse] + prefix


def layer_rates(rate: float | Sequence[float], depth: int) -> list[Fraction]:
    """Return the exact rate of each layer; arguments and errors are those of `merged_lengths`."""
    rates = [rate] * depth if isinstance(rate, (int, float)) else list(rate)
    if len(rates) != depth:
        raise ValueError(f"Merging needs one rate for each of the {depth} layers, but the list has {len(rates)}.")
    for layer_rate in rates:
        if not 0 <= layer_rate <= 0.5:
            raise ValueError(
                f"A merge rate must be between 0 and 0.5, not {layer_rate}: a layer can merge at most half of its "
                "tokens."
            )
    return [Fraction(str(layer_rate)) for layer_rate in rates]  # through str: 0.1 becomes 1/10, not the nearest float


@dataclass(frozen=True)
class MergePlan(Movable):
    """How many tokens each layer of a network merges in one pack; made on the host, in the loader's worker.

    A compiled region may read everything but the `lengths` of `segments`.
    """

    segments: tuple[Segments, ...]
    """depth + 1 entries: the segments before the first layer and after each layer."""
    totals: tuple[int, ...]
    """depth + 1 entries: the tokens of all views before the first layer and after each layer."""
    active: tuple[bool, ...]
    """depth entries: whether the layer's rate is above 0. An inactive layer merges nothing."""
    tiles: Tensor
    """int64 [N, 2, 2]: tiles of the similarities between even and odd tokens of a view, for all layers.

    tiles[:, 0] describes the even tokens of a tile and tiles[:, 1] the odd ones, each by two rows of the layer's
    stream: the first row of the tile, from which every second row follows, and the last such row of the view."""
    tile_bounds: tuple[int, ...]
    """depth + 1 entries: layer l has tiles tile_bounds[l] to tile_bounds[l + 1]."""

    @classmethod
    def of(
        cls,
        lengths: Sequence[int] | NDArray[np.integer],
        rate: float | Sequence[float],
        depth: int,
        floor: int = 1,
        prefix: int = 0,
    ) -> MergePlan:
        """Return the plan of a pack of views, on the CPU; arguments and errors are those of `merged_lengths`."""
        table = merged_lengths(lengths, rate, depth, floor, prefix)
        active = tuple(layer_rate > 0 for layer_rate in layer_rates(rate, depth))
        # A layer at rate 0 gets no tiles.
        tiles = [_tiles(row if merges else row[:0], prefix) for row, merges in zip(table[:-1], active, strict=True)]
        return cls(
            tuple(Segments.of(row) for row in table),
            tuple(table.sum(axis=1).tolist()),
            active,
            torch.from_numpy(np.concatenate(tiles)),
            tuple(np.cumsum([0, *map(len, tiles)]).tolist()),
        )


def plan_merges(
    lengths: Sequence[int] | NDArray[np.integer], rate: float | Sequence[float], depth: int, prefix: int = 0
) -> MergePlan | None:
    """Return the plan of a pack of views, or None if no layer merges; see `MergePlan.of`."""
    return MergePlan.of(lengths, rate, depth, prefix=prefix) if any(layer_rates(rate, depth)) else None


def _tiles(lengths: NDArray[np.int64], prefix: int) -> NDArray[np.int64]:
    """Return one layer's part of `MergePlan.tiles`: the tiles of every view of at least two tokens beside the prefix.

    Views that merge nothing in this layer get tiles too: torch.compile specializes on whether there are any tiles, and
    that should not depend on the pack.
    """
    starts = np.cumsum(lengths) - lengths + prefix
    lengths = lengths - prefix
    tokens = np.stack([(lengths + 1) // 2, lengths // 2], axis=1)  # [V, 2]: even tokens, odd tokens
    grid = -(-tokens // TILE)  # [V, 2]: rows and columns of tiles
    counts = grid.prod(axis=1)
    view = np.repeat(np.arange(len(lengths)), counts)  # [N], the view of each tile
    index = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)  # of the tile in its view
    tile = np.stack(np.divmod(index, grid[view, 1]), axis=1)  # [N, 2], in tiles
    bounds = np.stack([tile * TILE, tokens[view] - 1], axis=2)  # [N, 2, 2], counted among the even or odd tokens
    return starts[view, None, None] + 2 * bounds + [[0], [1]]  # odd tokens start one row later
