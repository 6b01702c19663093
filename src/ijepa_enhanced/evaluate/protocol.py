"""The protocols that score features: each takes those of two labelled sources and yields names and values."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch

from ijepa_enhanced.evaluate.features import Features
from ijepa_enhanced.evaluate.knn import knn_classify
from ijepa_enhanced.evaluate.linear import linear_probe
from ijepa_enhanced.evaluate.rank import rankme
from ijepa_enhanced.evaluate.scores import classification, mean_per_class, top1
from ijepa_enhanced.randomness import Purpose, generator

NEIGHBOURS = (1, 5, 20)
"""k of the kNN scores; 20 is the one that papers report (DINO, arXiv 2104.14294)."""
SHARES = (1, 10)
"""Percent of the training labels that low-shot probes see (I-JEPA, arXiv 2301.08243, section 5: 1%)."""

Scores = Iterator[tuple[str, float]]


def knn(train: Features, val: Features, seed: int) -> Scores:
    """`knn1`, `knn5` and `knn20`, top-1, and each one's mean per class."""
    labels, known = _labels(val), _labels(train)
    for k in NEIGHBOURS:
        predicted = knn_classify(train.values, known, val.values, k)
        yield f"knn{k}", top1(predicted, labels)
        yield f"knn{k}_mean_per_class", mean_per_class(predicted, labels)


def linear(train: Features, val: Features, seed: int) -> Scores:
    """`linear`: the last layer; see `scores.classification` for what comes with it."""
    logits, classes = linear_probe(train.values, _labels(train), val.values, seed)
    yield from classification("linear", logits, classes, _labels(val))


def linear4(train: Features, val: Features, seed: int) -> Scores:
    """`linear4_average` and `linear4_concat`: the last four layers' average and concatenation, as for `linear`.

    Features that are no encoder's have no layers, and no such scores.
    """
    if train.layers is None or val.layers is None:
        return
    for name, known, asked in (
        ("linear4_average", train.layers.mean(dim=1), val.layers.mean(dim=1)),
        ("linear4_concat", train.layers.flatten(1), val.layers.flatten(1)),
    ):
        logits, classes = linear_probe(known, _labels(train), asked, seed)
        yield from classification(name, logits, classes, _labels(val))


def lowshot(train: Features, val: Features, seed: int) -> Scores:
    """`lowshot1` and `lowshot10`: `linear` with 1% and 10% of the training labels."""
    for percent in SHARES:
        few = few_labels(_labels(train), percent, seed)
        logits, classes = linear_probe(train.values[few], _labels(train)[few], val.values, seed)
        yield from classification(f"lowshot{percent}", logits, classes, _labels(val))


def few_labels(labels: torch.Tensor, percent: int, seed: int) -> torch.Tensor:
    """The images that a low-shot probe sees: rows int64, ascending, of `labels` int64 [N].

    Of each class of n images they are max(1, round(n * percent / 100)), drawn by `seed` alone: the same ones for every
    encoder, and those of a smaller share are among those of a larger one.
    """
    order = torch.from_numpy(generator(seed, Purpose.LOWSHOT).permutation(len(labels)))
    rows = [order[labels[order] == label] for label in labels.unique()]
    return torch.cat([some[: max(1, round(len(some) * percent / 100))] for some in rows]).sort().values


FEATURE_PROTOCOLS: dict[str, Callable[[Features, Features, int], Scores]] = {
    "knn": knn,
    "linear": linear,
    "linear4": linear4,
    "lowshot": lowshot,
}
"""By the names that users give them."""


def score(train: Features, val: Features, seed: int = 0, protocols: Sequence[str] = ("knn", "linear")) -> Scores:
    """Name and value of each score, fractions of 1 but for RankMe.

    Args:
        train: features the probes are fitted on, with labels.
        val: features they are scored on, with labels.
        seed: of the linear probes' held-out part and of the low-shot lists.
        protocols: of `FEATURE_PROTOCOLS`.
    """
    for name in protocols:
        yield from FEATURE_PROTOCOLS[name](train, val, seed)
    yield "rankme", rankme(val.values)


def _labels(features: Features) -> torch.Tensor:
    assert features.labels is not None
    return features.labels
