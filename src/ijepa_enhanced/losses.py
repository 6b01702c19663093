"""Terms on one vector a view: what keeps the representation from collapsing, and what makes views of an image alike."""

import torch
import torch.nn.functional as F
from torch import Tensor

TEMPERATURE = 0.2
"""Of the cosines of `nt_xent`; MoCo v3 takes it for ViT, in its code (arXiv 2104.02057)."""


def variance_covariance(z: Tensor) -> Tensor:
    """VICReg's variance and covariance terms (arXiv 2105.04906, equations 1 to 4): float32 scalar.

    variance + covariance / 25, the paper's ratio of 25 to 1, where variance is the mean over dimensions of
    max(0, 1 - sqrt(var + 1e-4)) and covariance the sum of the squared off-diagonal covariances over D.

    Args:
        z: [V, D], V at least 2: one row a view.

    Raises:
        ValueError: fewer than two rows, which have no variance.
    """
    views, width = z.shape
    if views < 2:
        raise ValueError(f"Variance needs at least 2 views in a pack, not {views}.")
    centred = z.float() - z.float().mean(dim=0)
    with torch.autocast(z.device.type, enabled=False):
        covariance = centred.T @ centred / (views - 1)
    variance = torch.relu(1.0 - (covariance.diagonal() + 1e-4).sqrt()).mean()
    off_diagonal = covariance.square().sum() - covariance.diagonal().square().sum()
    return variance + off_diagonal / width / 25.0


def nt_xent(z: Tensor) -> Tensor:
    """How well each view tells the others of its image from the views of all other images of a pack: float32 scalar.

    For two views i and j of one image, with s the cosine over `TEMPERATURE`: minus the logarithm of exp(s_ij) over
    exp(s_ij) plus the sum of exp(s_ik) over all views k of other images. The mean of it over all ordered pairs is
    SimCLR's NT-Xent (arXiv 2002.05709, equation 1) for any number of views, where an image's further views are left
    out below the line: they are no negatives.

    Args:
        z: [N, M, K], N at least 2: M views, at least 2, of N images.

    Raises:
        ValueError: one image or one view.
    """
    images, views, _ = z.shape
    if images < 2 or views < 2:
        raise ValueError(f"Views agree or not from 2 images and 2 views on, not {images} and {views}.")
    with torch.autocast(z.device.type, enabled=False):
        directions = F.normalize(z.float().flatten(0, 1), dim=1)
        similarities = directions @ directions.T / TEMPERATURE
    number = torch.arange(len(directions), device=z.device)
    same = number[:, None] // views == number // views
    others = similarities.masked_fill(same, -torch.inf).logsumexp(dim=1, keepdim=True)
    losses = F.softplus(others - similarities)
    # By weights and a known count: to pick the pairs out, the host would wait for the device.
    pairs = same & (number[:, None] != number)
    return (losses * pairs).sum() / (images * views * (views - 1))
