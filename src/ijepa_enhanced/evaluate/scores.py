"""How well predicted labels agree with the true ones."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor


def classification(name: str, logits: Tensor, classes: Tensor, labels: Tensor) -> Iterator[tuple[str, float]]:
    """Every score of a classifier, fractions of 1: NAME is top-1.

    Further NAME_top5, NAME_mean_per_class, and NAME_low and NAME_high, the 95% interval of top-1.

    Args:
        name: of the protocol.
        logits: [N, C], the highest of which is the prediction, the first of equals.
        classes: int64 [C], the label of each column.
        labels: int64 [N], the true ones.

    Raises:
        ValueError: no images, or shapes that do not fit.
    """
    predicted = classes[logits.argmax(dim=1)]
    best = classes[logits.topk(min(5, len(classes)), dim=1).indices]
    yield name, top1(predicted, labels)
    yield f"{name}_top5", float((best == labels[:, None]).any(dim=1).double().mean())
    yield f"{name}_mean_per_class", mean_per_class(predicted, labels)
    low, high = interval(int((predicted == labels).sum()), len(labels))
    yield f"{name}_low", low
    yield f"{name}_high", high


def interval(right: int, images: int) -> tuple[float, float]:
    """The 95% bootstrap interval (percentiles 2.5 and 97.5) of the fraction of images that are right.

    Nothing is drawn: of `images` images drawn with replacement, the number that are right is binomial.

    Args:
        right: images that are right.
        images: of so many, at least 1.
    """
    share = right / images
    if share in (0, 1):
        return share, share
    k = torch.arange(images + 1, dtype=torch.float64)
    ways = math.lgamma(images + 1) - torch.lgamma(k + 1) - torch.lgamma(images - k + 1)
    chance = torch.exp(ways + k * math.log(share) + (images - k) * math.log1p(-share)).cumsum(0)
    low, high = torch.searchsorted(chance, torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return low / images, high / images


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
