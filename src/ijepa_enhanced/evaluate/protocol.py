"""All scores of one encoder on one pair of labelled sources."""

from __future__ import annotations

from collections.abc import Iterator

from ijepa_enhanced.evaluate.features import Features
from ijepa_enhanced.evaluate.knn import knn_classify
from ijepa_enhanced.evaluate.linear import linear_probe
from ijepa_enhanced.evaluate.rank import rankme
from ijepa_enhanced.evaluate.scores import mean_per_class, top1


def score(train: Features, val: Features, seed: int = 0) -> Iterator[tuple[str, float]]:
    """Name and value of each score, fractions of 1 but for RankMe.

    Args:
        train: features the probes are fitted on.
        val: features they are scored on.
        seed: of the linear probe's held-out part.
    """
    assert train.labels is not None
    assert val.labels is not None
    predicted = knn_classify(train.values, train.labels, val.values)
    yield "knn20", top1(predicted, val.labels)
    yield "knn20_mean_per_class", mean_per_class(predicted, val.labels)
    predicted = linear_probe(train.values, train.labels, val.values, seed)
    yield "linear", top1(predicted, val.labels)
    yield "linear_mean_per_class", mean_per_class(predicted, val.labels)
    yield "rankme", rankme(val.values)
