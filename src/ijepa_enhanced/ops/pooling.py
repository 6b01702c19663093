"""Reductions over each segment of a packed stream."""

import torch
from torch import Tensor

from ijepa_enhanced.packed import segment_ids


def segment_mean(x: Tensor, cu_seqlens: Tensor, prefix: int = 0) -> Tensor:
    """Return the mean of the tokens of each segment, summed in float32: [T, D] -> float32 [V, D].

    Args:
        x: [T, D].
        cu_seqlens: int32 [V + 1], see `Segments`.
        prefix: tokens at the beginning of each segment to leave out.
    """
    ids = segment_ids(cu_seqlens, x.shape[0])
    values = x.float()
    if prefix:
        places = torch.arange(x.shape[0], device=x.device) - cu_seqlens[ids]
        values = torch.where((places >= prefix)[:, None], values, 0.0)
    sums = x.new_zeros(cu_seqlens.shape[0] - 1, x.shape[1], dtype=torch.float32).index_add(0, ids, values)
    return sums / (torch.diff(cu_seqlens) - prefix)[:, None]


def segment_first(x: Tensor, cu_seqlens: Tensor) -> Tensor:
    """Return the first token of each segment: [T, D] -> float32 [V, D]."""
    return x.index_select(0, cu_seqlens[:-1]).float()


def pool(x: Tensor, cu_seqlens: Tensor, pooling: str, prefix: int = 0) -> Tensor:
    """Return the feature of each view: [T, D] -> float32 [V, D].

    Args:
        x: [T, D].
        cu_seqlens: int32 [V + 1], see `Segments`.
        pooling: `mean` of the patches, or `cls`, the class token, which is the first token.
        prefix: tokens of each view that are no patches.
    """
    return segment_first(x, cu_seqlens) if pooling == "cls" else segment_mean(x, cu_seqlens, prefix)
