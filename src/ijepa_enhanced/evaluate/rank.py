"""Whether features use the room they have: collapse shows without labels."""

from __future__ import annotations

import torch
from torch import Tensor


@torch.no_grad()
def rankme(z: Tensor) -> float:
    """RankMe, the smooth rank of a feature matrix (arXiv 2210.02885, equation 1): from 1 (collapsed) to min(N, D).

    exp(-sum_k p_k log p_k) with p_k = s_k / sum(s) + 1e-7 over the singular values s of `z`, which is not centred. The
    paper takes the epsilon from float32's precision; here it is the paper's number, with singular values in float64.

    Args:
        z: [N, D], any float type. The paper takes 25600 images.

    Raises:
        ValueError: `z` is no matrix, is empty or all zero, or is not finite.
    """
    if z.ndim != 2 or not z.isfinite().all() or not z.any():
        raise ValueError(f"RankMe needs a finite matrix with an entry other than 0, not {[*z.shape]}.")
    s = torch.linalg.svdvals(z.double())
    p = s / s.sum() + 1e-7
    return float(torch.exp(-(p * p.log()).sum()))
