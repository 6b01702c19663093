"""How well predicted labels agree with the true ones."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

Z = 1.959963984540054
"""The normal distribution lies between -Z and Z with probability 0.95."""


def classification(name: str, logits: Tensor, classes: Tensor, labels: Tensor) -> Iterator[tuple[str, float]]:
    """Yield every score of a classifier, fractions of 1: NAME is top-1.

    The others are NAME_top5, NAME_mean_per_class, and NAME_low and NAME_high, the 95% interval of top-1.

    Args:
        name: of the protocol.
        logits: [N, C]. The highest is the prediction, the first of equals.
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
    """Return the 95% interval of the chance to be right, from the images that were: Wilson's (JASA 22, 1927).

    It says how much chance lies in the choice of the images. Unlike the interval of resampling it has a width where
    all images are right or none are.

    Args:
        right: images that are right.
        images: all of them, at least 1.
    """
    share = right / images
    center = share + Z**2 / (2 * images)
    spread = Z * math.sqrt(share * (1 - share) / images + (Z / (2 * images)) ** 2)
    low, high = ((center + sign * spread) / (1 + Z**2 / images) for sign in (-1, 1))
    # At the ends the formula gives 0 and 1 up to rounding.
    return 0.0 if right == 0 else low, 1.0 if right == images else high


def mcnemar(right: Tensor, others: Tensor) -> float:
    """Return how likely two classifiers differ at least as much as these if they are equally good.

    Only images on which one is right and the other wrong tell them apart. If both are equally good, each of these is as
    likely to favor one as the other: McNemar's test (Psychometrika 12, 1947), exact and two-sided.

    Args:
        right: bool [N], the images that one classifier gets right.
        others: bool [N], those that the other one does.
    """
    better, worse = int((right & ~others).sum()), int((others & ~right).sum())
    count = better + worse
    tail = sum(math.comb(count, number) for number in range(min(better, worse) + 1))
    return min(1.0, 2 * tail / 2**count)


def top1(predicted: Tensor, labels: Tensor) -> float:
    """Return the fraction of images whose predicted label is right: both int64 [N].

    Raises:
        ValueError: no images, or shapes that differ.
    """
    return float(_right(predicted, labels).double().mean())


def mean_per_class(predicted: Tensor, labels: Tensor) -> float:
    """Return the fraction of images that are right, averaged over the classes that occur in `labels`: both int64 [N].

    Raises:
        ValueError: no images, or shapes that differ.
    """
    right = _right(predicted, labels)
    classes, numbers = torch.unique(labels, return_inverse=True)
    images = numbers.bincount(minlength=len(classes))
    return float((numbers[right].bincount(minlength=len(classes)) / images).double().mean())


def _right(predicted: Tensor, labels: Tensor) -> Tensor:
    if predicted.shape != labels.shape or labels.ndim != 1 or not len(labels):
        raise ValueError(
            f"predicted and labels must have the same nonzero length, not {[*predicted.shape]} and {[*labels.shape]}."
        )
    return predicted == labels
