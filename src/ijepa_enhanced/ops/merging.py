"""Token merging within each view of a packed stream (ToMe, arXiv 2210.09461, section 3).

Of a view's tokens, those at places 0, 2, 4, ... each look for the most similar one at places 1, 3, 5, ...; the pairs
most alike, as many as the `MergePlan` says, become one token. Between equals the first place wins. What is left keeps
the stream's order. No view sees another, so a view merges the same alone and in any pack.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ijepa_enhanced.merge_plan import TILE, MergePlan
from ijepa_enhanced.packed import segment_ids

TILES_AT_ONCE = 256
"""Blocks of similarities computed together: at most 18 MB with keys of 64 numbers, however long a view is."""
LOW = 2**31 - 1
"""The lower half of a match holds a row, counted down from this."""


class Merge(NamedTuple):
    """Which rows of a stream become one."""

    origin: Tensor
    """int64 [T]: for every row of the stream the row of the merged stream that holds it."""
    rows: int
    """T', the rows of the merged stream."""


def match(metric: Tensor, plan: MergePlan, layer: int) -> Merge:
    """The merges of one layer: bipartite soft matching of each view by the cosine of `metric`.

    Args:
        metric: [T, K] of any floating type, compared in float32: the layer's keys, averaged over heads. No gradient
            flows to it. A row that is not finite counts as zero: similar to none.
        plan: of the pack, on the same device.
        layer: number of the layer, to which come the T tokens of `plan.segments[layer]`.
    """
    before, after = (plan.segments[number].cu_seqlens for number in (layer, layer + 1))
    directions = F.normalize(metric.detach().float(), dim=1).nan_to_num(nan=0.0)
    best = best_matches(directions, plan.tiles, *plan.tile_bounds[layer : layer + 2])
    view = segment_ids(before, best.shape[0])
    # By view, then the most similar first, then, as the sort is stable, by place.
    order = torch.argsort((view << 32) - (best >> 32), stable=True)
    rank = torch.arange(best.shape[0], device=best.device) - before[view]
    chosen = rank < (torch.diff(before) - torch.diff(after))[view]
    joins = torch.empty_like(chosen).scatter(0, order, chosen)
    row = (~joins).cumsum(0) - 1
    return Merge(torch.where(joins, row[LOW - (best & LOW)], row), plan.totals[layer + 1])


@torch.library.custom_op("ijepa_enhanced::best_matches", mutates_args=())
def best_matches(directions: Tensor, tiles: Tensor, start: int, stop: int) -> Tensor:
    """The best match of every row at an even place of its view: int64 [T].

    The upper half orders similarities, the lower half holds the other row as `LOW` minus it: the larger number is the
    better match, and of equally similar ones that of the lower row. Other rows hold the least similarity and row 0.

    Args:
        directions: float32 [T, K], of length 1 or 0.
        tiles: int64 [P, 2, 2], see `MergePlan.tiles`.
        start, stop: which of the tiles. Plain numbers, and all of it one node of a graph: a slice of `tiles`, and the
            number of rounds, would make other graphs for other packs.
    """
    best = torch.full(directions.shape[:1], LOW - 2**63, device=directions.device)
    steps = 2 * torch.arange(TILE, device=directions.device)
    for some in tiles[start:stop].split(TILES_AT_ONCE):
        # Past a view's end its last row repeats: tiles of one shape add their products in one order, so that equal
        # tokens are equally similar wherever they lie.
        rows = torch.minimum(some[:, :, :1] + steps, some[:, :, 1:])
        even, odd = directions.index_select(0, rows.flatten()).view(*rows.shape, directions.shape[1]).unbind(1)
        with torch.autocast(directions.device.type, enabled=False):
            similarity, place = torch.bmm(even, odd.transpose(1, 2)).max(dim=2)  # the first of equals
        bits = similarity.view(torch.int32)
        ordered = (bits ^ (bits >> 31 & LOW)).long()  # as floats are, once the negative ones are mirrored
        matches = (ordered << 32) + (LOW - rows[:, 1].gather(1, place))
        best.scatter_reduce_(0, rows[:, 0].flatten(), matches.flatten(), "amax")
    return best


@best_matches.register_fake
def _(directions: Tensor, tiles: Tensor, start: int, stop: int) -> Tensor:
    return directions.new_empty(directions.shape[:1], dtype=torch.int64)


def merge(x: Tensor, sizes: Tensor, merging: Merge) -> tuple[Tensor, Tensor]:
    """The size-weighted mean of the rows that become one; a row that stays alone is not changed by a bit.

    Summed in float32 at least. On CUDA the order of three or more rows is fixed only under
    `torch.use_deterministic_algorithms`.

    Args:
        x: [T, D] features, which get a gradient, or positions.
        sizes: float32 [T]: how many patches each row stands for.
        merging: from `match`, or several of them in `chain`.

    Returns:
        [T', D], of x's type or, for whole numbers, float32; and the sizes float32 [T'].
    """
    origin, rows = merging
    total = sizes.new_zeros(rows).index_add_(0, origin, sizes)
    shares = x * (sizes / total[origin])[:, None]
    mean = shares.new_zeros(rows, x.shape[1]).index_add_(0, origin, shares)
    return mean.to(x.dtype) if x.is_floating_point() else mean, total


def unmerge(x: Tensor, merging: Merge) -> Tensor:
    """Every row of the stream before merging gets what holds it: [T', ...] -> [T, ...]."""
    return x[merging.origin]


def chain(first: Merge, then: Merge) -> Merge:
    """Two layers' merges as one: of `first`'s stream into that of `then`."""
    return Merge(then.origin[first.origin], then.rows)
