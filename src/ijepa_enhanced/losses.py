"""Losses on one vector per view: VICReg's, against collapse, and the contrastive loss between views of an image."""

import torch
import torch.nn.functional as F
from torch import Tensor

TEMPERATURE = 0.2
"""Temperature of `nt_xent`, the one of MoCo v3's code for ViT (arXiv 2104.02057)."""


def variance_covariance(z: Tensor) -> Tensor:
    """Return VICReg's variance and covariance terms (arXiv 2105.04906, equations 1 to 4): float32 scalar.

    The result is variance + covariance / 25, the paper's ratio of 25 to 1. The variance term is the mean over
    dimensions of max(0, 1 - sqrt(var + 1e-4)). The covariance term is the sum of the squared off-diagonal covariances,
    divided by D.

    Args:
        z: [V, D], one row for each view; V at least 2.

    Raises:
        ValueError: there are fewer than two rows.
    """
    views, width = z.shape
    if views < 2:
        raise ValueError(f"VICReg's variance needs at least 2 views, not {views}.")
    centered = z.float() - z.float().mean(dim=0)
    with torch.autocast(z.device.type, enabled=False):  # float32 under autocast too
        covariance = centered.T @ centered / (views - 1)  # [D, D]
    variance = torch.relu(1.0 - (covariance.diagonal() + 1e-4).sqrt()).mean()
    off_diagonal = covariance.square().sum() - covariance.diagonal().square().sum()
    return variance + off_diagonal / width / 25.0


def nt_xent(z: Tensor) -> Tensor:
    """Return SimCLR's contrastive loss NT-Xent (arXiv 2002.05709, equation 1) for any number of views: float32 scalar.

    Let s be the cosine similarity divided by `TEMPERATURE`. The loss of a positive pair, views i and j of one image, is

        -log(exp(s_ij) / (exp(s_ij) + sum of exp(s_ik) over all views k of other images))

    and the result is the mean over all ordered positive pairs. Other views of the same image are not negatives.

    Args:
        z: [N, M, K]: M views of each of N images, at least 2 of each.

    Raises:
        ValueError: there are fewer than two images or fewer than two views.
    """
    images, views, _ = z.shape
    if images < 2 or views < 2:
        raise ValueError(f"The contrastive loss needs at least 2 images and 2 views of each, not {images} and {views}.")
    with torch.autocast(z.device.type, enabled=False):
        directions = F.normalize(z.float().flatten(0, 1), dim=1)  # [N * M, K]
        similarities = directions @ directions.T / TEMPERATURE  # [N * M, N * M]
    index = torch.arange(len(directions), device=z.device)
    same_image = index[:, None] // views == index // views
    negatives = similarities.masked_fill(same_image, -torch.inf).logsumexp(dim=1, keepdim=True)  # [N * M, 1]
    losses = F.softplus(negatives - similarities)  # -log(e^s / (e^s + e^n)) = log(1 + e^(n - s))
    # A mask and a known count, since indexing with a mask would make the host wait for the device.
    positives = same_image & (index[:, None] != index)
    return (losses * positives).sum() / (images * views * (views - 1))
