"""Reductions over each segment of a packed stream."""

import torch
from torch import Tensor

from ijepa_enhanced.packed import segment_ids


def segment_mean(x: Tensor, cu_seqlens: Tensor) -> Tensor:
    """Return the mean of the tokens of each segment, summed in float32: [T, D] -> float32 [V, D]."""
    sums = x.new_zeros(cu_seqlens.shape[0] - 1, x.shape[1], dtype=torch.float32)
    sums = sums.index_add(0, segment_ids(cu_seqlens, x.shape[0]), x.float())
    return sums / torch.diff(cu_seqlens)[:, None]
