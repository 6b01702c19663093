"""Token merging within each view of a packed stream (ToMe, arXiv 2210.09461, section 3).

In each view, every even token (0, 2, 4, ...) is matched with the most similar odd token (1, 3, 5, ...). Counting starts
at the first patch: a class token and registers never merge. Of these pairs, the most similar ones are merged into one
token each, as many as the `MergePlan` says. Ties go to the earlier token. The merged stream keeps the order of its
tokens. Views do not interact, so a view merges the same way alone and in any pack.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ijepa_enhanced.merge_plan import TILE, MergePlan
from ijepa_enhanced.packed import segment_ids

TILES_AT_ONCE = 256
"""Tiles of similarities computed together: at most 18 MB if keys have 64 channels, however long a view is."""
LOW = 2**31 - 1
"""The lower 32 bits of a match hold `LOW` minus a row number."""


class Merge(NamedTuple):
    """An assignment of the T rows of a stream to the T' rows of the merged stream."""

    origin: Tensor
    """int64 [T]: the row of the merged stream that holds each row of the stream."""
    rows: int
    """T', the number of rows of the merged stream."""


def match(metric: Tensor, plan: MergePlan, layer: int) -> Merge:
    """Choose the merges of one layer: bipartite soft matching within each view, by the cosine similarity of `metric`.

    Args:
        metric: [T, K] of any floating type, compared in float32: the keys of the layer, averaged over heads. No
            gradient flows to it. A row that is not finite has a similarity of 0 to all others.
        plan: of the pack, on the same device.
        layer: number of the layer, whose T input tokens are those of `plan.segments[layer]`.
    """
    before, after = (plan.segments[number].cu_seqlens for number in (layer, layer + 1))
    directions = F.normalize(metric.detach().float(), dim=1).nan_to_num(nan=0.0)
    best = best_matches(directions, plan.tiles, *plan.tile_bounds[layer : layer + 2])  # [T]
    view = segment_ids(before, best.shape[0])
    # Sort by view, then by descending similarity, then by position, because the sort is stable.
    order = torch.argsort((view << 32) - (best >> 32), stable=True)
    # The first n of each view in this order are merged away, where n is what the plan says for its length.
    rank = torch.arange(best.shape[0], device=best.device) - before[view]
    chosen = rank < (torch.diff(before) - torch.diff(after))[view]
    merged = torch.empty_like(chosen).scatter(0, order, chosen)  # [T], back in stream order
    row = (~merged).cumsum(0) - 1  # [T], the new row of each token that stays
    return Merge(torch.where(merged, row[LOW - (best & LOW)], row), plan.totals[layer + 1])


@torch.library.custom_op("ijepa_enhanced::best_matches", mutates_args=())
def best_matches(directions: Tensor, tiles: Tensor, start: int, stop: int) -> Tensor:
    """Return the best match of every even token of a view: int64 [T].

    A match packs two numbers into 64 bits, so that the larger one is the better match. The upper 32 bits order the
    similarity. The lower 32 bits hold `LOW` minus the row of the odd token, so that ties go to the lower row. Odd
    tokens, class tokens and registers hold the least similarity and row 0.

    Args:
        directions: float32 [T, K], of length 1 or 0.
        tiles: int64 [N, 2, 2], see `MergePlan.tiles`.
        start, stop: which of the tiles. These are plain numbers, and the loop is a single node of a compiled graph,
            because a slice of `tiles` or an unrolled loop would compile a new graph for other packs.
    """
    best = torch.full(directions.shape[:1], LOW - 2**63, device=directions.device)  # the least match: row 0
    steps = 2 * torch.arange(TILE, device=directions.device)
    for some in tiles[start:stop].split(TILES_AT_ONCE):
        # Past the end of a view its last row repeats. All tiles have one shape and thus one order of summation, so
        # equal tokens are equally similar wherever they lie.
        rows = torch.minimum(some[:, :, :1] + steps, some[:, :, 1:])  # [N, 2, TILE]
        even, odd = directions.index_select(0, rows.flatten()).view(*rows.shape, directions.shape[1]).unbind(1)
        with torch.autocast(directions.device.type, enabled=False):
            similarity, column = torch.bmm(even, odd.transpose(1, 2)).max(dim=2)  # [N, TILE], the first of equals
        # The bits of floats, read as integers, sort as the floats do once the negative ones are mirrored.
        bits = similarity.view(torch.int32)
        ordered = (bits ^ (bits >> 31 & LOW)).long()
        matches = (ordered << 32) + (LOW - rows[:, 1].gather(1, column))
        # An even token of a long view is in several tiles: keep the best of its matches.
        best.scatter_reduce_(0, rows[:, 0].flatten(), matches.flatten(), "amax")
    return best


@best_matches.register_fake
def _(directions: Tensor, tiles: Tensor, start: int, stop: int) -> Tensor:
    return directions.new_empty(directions.shape[:1], dtype=torch.int64)


def merge(x: Tensor, sizes: Tensor, merging: Merge) -> tuple[Tensor, Tensor]:
    """Replace the rows that merge by their size-weighted mean. A row that does not merge keeps its exact bits.

    Sums are at least float32. On CUDA, the order in which three or more rows are summed is deterministic only under
    `torch.use_deterministic_algorithms`.

    Args:
        x: [T, D] features, which get a gradient, or positions.
        sizes: float32 [T]: patches that each row stands for.
        merging: from `match`, or several merges joined by `chain`.

    Returns:
        Merged rows [T', D], of the type of `x`, or float32 if `x` holds integers; and their sizes, float32 [T'].
    """
    origin, rows = merging
    total = sizes.new_zeros(rows).index_add_(0, origin, sizes)  # [T']
    shares = x * (sizes / total[origin])[:, None]  # weights of 1 for rows that do not merge
    mean = shares.new_zeros(rows, x.shape[1]).index_add_(0, origin, shares)
    return mean.to(x.dtype) if x.is_floating_point() else mean, total


def unmerge(x: Tensor, merging: Merge) -> Tensor:
    """Give every row of the stream before merging the value of the row that holds it: [T', ...] -> [T, ...]."""
    return x[merging.origin]


def chain(first: Merge, then: Merge) -> Merge:
    """Join the merges of two layers into one, from the input of `first` to the output of `then`."""
    return Merge(then.origin[first.origin], then.rows)
