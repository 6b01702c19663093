"""Terms on one vector a view: what keeps the representation from collapsing, and what makes views of an image alike."""

import torch
from torch import Tensor


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


def views_agree(z: Tensor) -> Tensor:
    """Invariance of the views of an image, and variance and covariance of each of them: float32 scalar.

    The mean squared difference between two views of one image, by half: VICReg's invariance (arXiv 2105.04906, equation
    5, but a mean over the K dimensions too, as in the paper's code) for any number of views. Plus `variance_covariance`
    of the first views of all images, of the second, and so on, in their mean: half of the paper's sum over two views.

    Args:
        z: [N, M, K], N at least 2: M views, at least 2, of N images.

    Raises:
        ValueError: one image or one view.
    """
    images, views, _ = z.shape
    if images < 2 or views < 2:
        raise ValueError(f"Views agree or not from 2 images and 2 views on, not {images} and {views}.")
    spread = z.float().var(dim=1).mean()
    return spread + torch.stack([variance_covariance(z[:, view]) for view in range(views)]).mean()
