"""The protocols that score features: each classifies the images of one labelled source with those of another."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from ijepa_enhanced.devices import all_cores
from ijepa_enhanced.distributed import Ranks
from ijepa_enhanced.evaluate.features import LAYERS, Features
from ijepa_enhanced.evaluate.knn import knn_votes
from ijepa_enhanced.evaluate.labelled import share_of_classes
from ijepa_enhanced.evaluate.linear import linear_probe
from ijepa_enhanced.evaluate.rank import rankme
from ijepa_enhanced.evaluate.scores import classification, mean_per_class, top1
from ijepa_enhanced.randomness import Purpose, generator

NEIGHBORS = (1, 5, 20)
"""k of the kNN scores; 20 is the one that papers report (DINO, arXiv 2104.14294)."""
SHARES = (1, 10)
"""Percent of the training labels that low-shot probes see (I-JEPA, arXiv 2301.08243, section 5: 1%)."""

Scores = Iterator[tuple[str, float]]


@dataclass(frozen=True)
class Scoring:
    """How and where scores are computed."""

    seed: int = 0
    """Of the linear probes' held-out part and of the low-shot lists."""
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    """Where to compute, such as the encoder's device."""
    ranks: Ranks = field(default_factory=Ranks)
    """The processes that share the queries of kNN; the main one does the rest. All of them must ask for the scores,
    though only the main one has features. The gradient of a linear probe stays on the main rank: an iteration is
    a few matrix products, and summing them over ranks would make the score depend on how many there are."""


class Answer(NamedTuple):
    """What a classifier says of M images, on the host."""

    name: str
    predicted: Tensor | None
    """Labels int64 [M], where there are no logits."""
    logits: Tensor | None = None
    """[M, C]"""
    classes: Tensor | None = None
    """int64 [C], the label of each column."""

    def scores(self, labels: Tensor, rows: Tensor) -> Scores:
        """Yield name and value of each score of some of the images, whose labels are among int64 [M]."""
        if self.predicted is not None:
            yield self.name, top1(self.predicted[rows], labels[rows])
            yield f"{self.name}_mean_per_class", mean_per_class(self.predicted[rows], labels[rows])
        else:
            assert self.logits is not None
            assert self.classes is not None
            yield from classification(self.name, self.logits[rows], self.classes, labels[rows])


def knn(train: Features, val: Features, how: Scoring) -> Iterator[Answer]:
    """Yield `knn1`, `knn5` and `knn20`; on other ranks than the main one, work with it and yield nothing."""
    values, labels, queries = how.ranks.broadcast_from_rank0([train.values, train.labels, val.values])
    assert values is not None
    assert labels is not None
    assert queries is not None
    votes = knn_votes(values, labels, queries, NEIGHBORS, device=how.device, ranks=how.ranks)
    if how.ranks.main:
        for k, predicted in zip(NEIGHBORS, votes, strict=True):
            yield Answer(f"knn{k}", predicted)


def linear(train: Features, val: Features, how: Scoring) -> Iterator[Answer]:
    """Yield `linear`: the last layer."""
    yield _linear("linear", train.values, _labels(train), val.values, how)


def linear4(train: Features, val: Features, how: Scoring) -> Iterator[Answer]:
    """Yield `linear4_average` and `linear4_concat`: the last four layers' average and concatenation.

    Features that no encoder made have no layers, and no such scores.
    """
    if train.layers is None or val.layers is None:
        return
    labels = _labels(train)
    yield _linear("linear4_average", train.layers.mean(dim=1), labels, val.layers.mean(dim=1), how)
    yield _linear("linear4_concat", train.layers.flatten(1), labels, val.layers.flatten(1), how)


def lowshot(train: Features, val: Features, how: Scoring) -> Iterator[Answer]:
    """Yield `lowshot1` and `lowshot10`: `linear` with 1% and 10% of the training labels."""
    for percent in SHARES:
        few = few_labels(_labels(train), percent, how.seed)
        yield _linear(f"lowshot{percent}", train.values[few], _labels(train)[few], val.values, how)


def _linear(name: str, train: Tensor, labels: Tensor, queries: Tensor, how: Scoring) -> Answer:
    logits, classes = linear_probe(train, labels, queries, how.seed, how.device)
    return Answer(name, None, logits, classes)


def few_labels(labels: Tensor, percent: int, seed: int) -> Tensor:
    """Return the images that a low-shot probe sees: rows int64, ascending, of `labels` int64 [N].

    Each class of n images has max(1, round(n * percent / 100)) of them, drawn by `seed` alone: the same ones for every
    encoder, and those of a smaller share are among those of a larger one.
    """
    order = generator(seed, Purpose.LOWSHOT).permutation(len(labels))
    return torch.from_numpy(share_of_classes(labels.numpy(), percent, order))


FEATURE_PROTOCOLS: dict[str, Callable[[Features, Features, Scoring], Iterator[Answer]]] = {
    "knn": knn,
    "linear": linear,
    "linear4": linear4,
    "lowshot": lowshot,
}
"""By the names that users give them."""
SHARED = ("knn",)
"""Protocols whose work the ranks share."""


def layers_for(protocols: Sequence[str]) -> int:
    """Return how many layers `extract` must keep for these protocols."""
    return LAYERS if "linear4" in protocols else 1


def score(
    train: Features, val: Features, protocols: Sequence[str] = ("knn", "linear"), how: Scoring | None = None
) -> dict[str, float]:
    """Return the value of each score by name, all fractions of 1 except RankMe; nothing on other ranks than the main.

    Args:
        train: features the probes are fitted on, with labels.
        val: features they are scored on, with labels.
        protocols: of `FEATURE_PROTOCOLS`.
        how: see `Scoring`.
    """
    found = score_parts(train, val, [torch.arange(len(val.values))], protocols, how)
    return found[0]


def score_parts(
    train: Features,
    val: Features,
    parts: Sequence[Tensor],
    protocols: Sequence[str] = ("knn", "linear"),
    how: Scoring | None = None,
) -> list[dict[str, float]]:
    """Return what `score` does of each of several parts of `val`, given as rows int64, from one training of the probes.

    Each of the arguments but `parts` is as for `score`.
    """
    how = how or Scoring()
    answers: list[Answer] = []
    with all_cores():
        for name in protocols:
            if how.ranks.main or name in SHARED:
                answers += FEATURE_PROTOCOLS[name](train, val, how)
    if not how.ranks.main:
        return [{} for _ in parts]
    labels = _labels(val)
    return [
        {key: value for answer in answers for key, value in answer.scores(labels, rows)}
        | {"rankme": rankme(val.values[rows])}
        for rows in parts
    ]


def halves(val: Features) -> list[Tensor]:
    """Return two halves of the images, rows int64, the same for all features of a source: to choose by, and to report.

    Every other image of each class is in the first, in an order that depends on the rows of the source alone, so that
    images that lie next to each other are not split by a pattern.
    """
    order = torch.from_numpy(generator(0, Purpose.HOLDOUT).permutation(int(val.image_ids.max()) + 1))
    place = order[val.image_ids].argsort()
    place = place[_labels(val)[place].argsort(stable=True)]
    return [place[start::2].sort().values for start in range(2)]


def _labels(features: Features) -> Tensor:
    assert features.labels is not None
    return features.labels
