"""Whether features use the room they have: collapse shows without labels."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

EPSILON = 1e-7
"""Added to every share of a spectrum: RankMe's number for float32 (arXiv 2210.02885)."""
DELTA = 1e-4
"""Added to the diagonal of LiDAR's scatter within objects, so that it can be inverted: the number of the public
implementation in stable-pretraining. The paper's own is not known to us."""


@torch.no_grad()
def rankme(z: Tensor) -> float:
    """RankMe, the smooth rank of a feature matrix (arXiv 2210.02885): from 1 (collapsed) to min(N, D).

    exp(-sum_k p_k log p_k) with p_k = s_k / sum(s) + 1e-7 over the singular values s of `z`, which is not centerd. The
    epsilon is that of float32's precision, as in public implementations; here singular values are in float64.

    Args:
        z: [N, D], any float type. The paper takes 25600 images.

    Raises:
        ValueError: `z` is no matrix, is empty or all zero, or is not finite.
    """
    if z.ndim != 2:
        raise ValueError(f"RankMe features must have shape [N, D], not {[*z.shape]}.")
    if not z.isfinite().all():
        raise ValueError("RankMe features contain NaN or infinite values.")
    if not z.any():
        raise ValueError("RankMe features are empty or all zero.")
    return _smooth_rank(torch.linalg.svdvals(z.double()))


@torch.no_grad()
def lidar(z: Tensor) -> float:
    """LiDAR, the smooth rank of what tells objects apart (arXiv 2312.04000): from 1 to min(n - 1, D).

    An object is an image, and its q views are what a good encoder should see the same in. With m_i the mean of object
    i's views and m the mean of those,

        between = mean_i (m_i - m)(m_i - m)^T
        within = mean_ij (z_ij - m_i)(z_ij - m_i)^T + DELTA * I

    and LiDAR is exp(-sum_k p_k log p_k) with p_k = l_k / sum(l) + EPSILON over the min(n, D) largest eigenvalues l of
    within^-1/2 between within^-1/2; the others are 0. Unlike RankMe it does not count directions in which only views
    differ. It is blind to a common scale until that nears DELTA. Where n (q - 1) is below D, there are directions in
    which no views differ and DELTA alone is the scatter. Values compare at equal n, q and D.

    Args:
        z: [n, q, D], any float type: q at least 2 views of each of at least 2 objects.

    Returns:
        The rank; 1 where the objects do not differ at all.

    Raises:
        ValueError: there are fewer views or objects, or some feature is not finite.
    """
    if z.ndim != 3 or min(z.shape[:2], default=0) < 2:
        raise ValueError(
            f"LiDAR features must have shape [n, q, D] with n >= 2 objects and q >= 2 views, not {[*z.shape]}."
        )
    if not z.isfinite().all():
        raise ValueError("LiDAR features contain NaN or infinite values.")
    z = z.double()
    objects, views, width = z.shape
    means = z.mean(dim=1)
    apart = means - means.mean(dim=0)
    if not apart.any():
        return 1.0
    inner = (z - means[:, None]).flatten(0, 1)
    within = inner.T @ inner / (objects * views) + DELTA * torch.eye(width, dtype=z.dtype, device=z.device)
    # With within = L L^T, the eigenvalues are the squared singular values of L^-1 apart^T, up to 1 / n.
    whitened = torch.linalg.solve_triangular(torch.linalg.cholesky(within), apart.T, upper=False)
    return _smooth_rank(torch.linalg.svdvals(whitened).square())


@torch.no_grad()
def spread(z: Tensor) -> float:
    """How far the features of images lie apart: the mean over dimensions of their standard deviation, 0 if collapsed.

    In the features' own units, so it sees a common scale, to which the other metrics are blind.

    Args:
        z: [N, D], any float type, N at least 1.
    """
    return float(z.double().std(dim=0, correction=0).mean())


@torch.no_grad()
def mean_cosine(z: Tensor) -> float:
    """The mean cosine of the features of two different images, over all pairs: 1 if they all point the same way.

    Args:
        z: [N, D], any float type, N at least 2. A row of zeros has cosine 0 with all.
    """
    z = F.normalize(z.double(), dim=1)
    images = len(z)
    return float((z.sum(dim=0).square().sum() - z.square().sum()) / (images * (images - 1)))


def _smooth_rank(spectrum: Tensor) -> float:
    """The exponential of the entropy of a spectrum, each share of it raised by EPSILON."""
    p = spectrum / spectrum.sum() + EPSILON
    return float(torch.exp(-(p * p.log()).sum()))
