"""How well predicted labels agree with the true ones."""

from __future__ import annotations

import torch
from torch import Tensor


def top1(predicted: Tensor, labels: Tensor) -> float:
    """The fraction of images whose predicted label is right: both int64 [N].

    Raises:
        ValueError: no images, or shapes that differ.
    """
    return float(_right(predicted, labels).double().mean())


def mean_per_class(predicted: Tensor, labels: Tensor) -> float:
    """The mean over the classes that occur in `labels` of the fraction of their images that are right: both int64 [N].

    Raises:
        ValueError: no images, or shapes that differ.
    """
    right = _right(predicted, labels)
    classes, numbers = torch.unique(labels, return_inverse=True)
    images = numbers.bincount(minlength=len(classes))
    return float((numbers[right].bincount(minlength=len(classes)) / images).double().mean())


def _right(predicted: Tensor, labels: Tensor) -> Tensor:
    if predicted.shape != labels.shape or labels.ndim != 1 or not len(labels):
        raise ValueError(f"Need one prediction a label, and some, not {[*predicted.shape]} for {[*labels.shape]}.")
    return predicted == labels
