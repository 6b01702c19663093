"""Standardized features: what every probe starts from."""

from __future__ import annotations

import torch
from torch import Tensor

BLOCK = 2**16
"""Rows that are converted, checked or scaled at once."""


def standardize(
    train: Tensor, train_labels: Tensor, queries: Tensor, device: torch.device | None = None, ones: int = 0
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Standardize features and number their classes.

    Each dimension is shifted and scaled to mean 0 and standard deviation 1 over `train`. One that is constant there
    becomes 0 in both: it carries no information, and its scale is rounding.

    Memory holds one float32 copy of each of the two, on `device` if both fill at most half of what is free there,
    else on the host.

    Args:
        train: [N, D], any float type.
        train_labels: int64 [N], at least 0, not necessarily contiguous.
        queries: [M, D].
        device: where they are computed with; None: where `train` is.
        ones: columns of ones to append.

    Returns:
        `train` float32 [N, D + ones] and `queries` float32 [M, D + ones]; and on `device`, the C labels that occur
        int64 [C], ascending, and the place of each training image's label among them int64 [N].

    Raises:
        ValueError: no training image, shapes that do not fit, a label below 0, or a feature that is not finite.
    """
    if train.ndim != 2 or queries.ndim != 2 or train.shape[1] != queries.shape[1]:
        raise ValueError(f"Features must be [N, D] and [M, D], not {[*train.shape]} and {[*queries.shape]}.")
    if not len(train) or train_labels.shape != train.shape[:1]:
        raise ValueError(
            f"train and train_labels must have the same nonzero length, not {len(train)} and {[*train_labels.shape]}."
        )
    if train_labels.min() < 0:
        raise ValueError(f"Labels start at 0, but one is {int(train_labels.min())}.")
    if not all(block.isfinite().all() for block in (*train.split(BLOCK), *queries.split(BLOCK))):
        raise ValueError("Some features are NaN or infinite, so the encoder cannot be used.")
    device = device or train.device
    mean, std = moments(train)
    place = roomiest(device, 4 * (len(train) + len(queries)) * (train.shape[1] + ones))
    classes, numbers = torch.unique(train_labels.to(device), return_inverse=True)
    scaled = [scale(features, mean, std, place, ones) for features in (train, queries)]
    return scaled[0], scaled[1], classes, numbers


def moments(train: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and standard deviation float32 [D] of features [N, D]; the deviation of a constant is infinite."""
    std, mean = torch.std_mean(train.float(), dim=0, correction=0)
    first = train[0].float()
    constant = torch.stack([(block.float() == first).all(dim=0) for block in train.split(BLOCK)]).all(dim=0)
    return mean, std.masked_fill(constant, torch.inf)


def scale(features: Tensor, mean: Tensor, std: Tensor, place: torch.device, ones: int = 0) -> Tensor:
    """Return (features - mean) / std and columns of ones, float32 [N, D + ones], on `place`."""
    width = features.shape[1]
    scaled = torch.ones(len(features), width + ones, device=place)
    mean, std = mean.to(place), std.to(place)
    for target, block in zip(scaled.split(BLOCK), features.split(BLOCK), strict=True):
        target[:, :width] = (block.to(place).float() - mean) / std
    return scaled


def roomiest(device: torch.device, size: int) -> torch.device:
    """Return `device` if `size` bytes fill at most half of what is free there, else the host."""
    if device.type != "cpu" and 2 * size > torch.accelerator.get_memory_info(device)[0]:
        return torch.device("cpu")
    return device
