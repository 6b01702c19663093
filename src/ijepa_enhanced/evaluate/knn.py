"""Classification by nearest neighbors: what the features of a frozen encoder tell without any training."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ijepa_enhanced.distributed import Ranks
from ijepa_enhanced.evaluate.standardize import BLOCK, standardize

QUERIES, IMAGES = 1024, 2**14
"""Queries and training images whose similarities are in memory at once: 64 MiB of float32."""


def knn_classify(
    train: Tensor, train_labels: Tensor, queries: Tensor, k: int = 20, temperature: float = 0.07
) -> Tensor:
    """Return the class of each query by the vote of one number of neighbors: int64 [M]; see `knn_votes`."""
    return knn_votes(train, train_labels, queries, (k,), temperature)[0]


@torch.no_grad()
def knn_votes(
    train: Tensor,
    train_labels: Tensor,
    queries: Tensor,
    ks: Sequence[int],
    temperature: float = 0.07,
    device: torch.device | None = None,
    ranks: Ranks | None = None,
) -> list[Tensor]:
    """Classify each query by the weighted vote of its k nearest training images, for several k in one pass.

    A neighbor of cosine similarity s votes with weight exp(s / temperature) (Wu et al., arXiv 1805.01978, section
    3.4, whose 0.07 is the default); k = 20 is DINO's (arXiv 2104.14294, section 3.2). Features are standardized
    first, see `standardize`. All images as similar as the k-th vote, so the answer does not depend on the order of
    `train`. Among classes of equal votes the smallest label wins.

    Beside the features there is one standardized copy of `train`. Everything else is computed in blocks of fixed size.

    Args:
        train: [N, D], any float type.
        train_labels: int64 [N], at least 0, not necessarily contiguous.
        queries: [M, D].
        ks: how many neighbors vote; all N if there are fewer.
        temperature: of the weights, in units of cosine similarity.
        device: where to compute; None: where `train` is.
        ranks: the processes that share the queries. All of them have the same arguments.

    Returns:
        For each k, int64 [M] on the host: labels out of `train_labels`.

    Raises:
        ValueError: a k or `temperature` is not positive, or as `standardize`.
    """
    if min(ks) < 1 or temperature <= 0:
        raise ValueError(f"k and temperature must be positive, not {min(ks)} and {temperature}.")
    device, ranks = device or train.device, ranks or Ranks()
    train, queries, classes, numbers = standardize(train, train_labels, queries, device)
    for block in (*train.split(BLOCK), *queries.split(BLOCK)):
        F.normalize(block, out=block)
    chunks = queries.split(QUERIES)
    # Whole chunks, so that products have the same shapes, and the same rounding, whatever the number of ranks.
    own = [
        torch.stack(_votes(train, numbers, len(classes), chunk.to(device), ks, temperature)).cpu()
        for chunk in chunks[ranks.rank :: ranks.world]
    ]
    shares = ranks.gather(own)
    predicted = [shares[number % ranks.world][number // ranks.world] for number in range(len(chunks))]
    return list(classes.cpu()[torch.cat(predicted, dim=1)])


def _votes(
    train: Tensor, numbers: Tensor, classes: int, queries: Tensor, ks: Sequence[int], temperature: float
) -> list[Tensor]:
    """Return the number of the class that wins with each k, int64 [Q], for normalized features."""
    most = min(max(ks), len(train))
    similarity, labels = _nearest(train, numbers, queries, most + 1)
    # Dividing all weights of a query by the largest keeps exp() from overflowing and changes no winner.
    weights = torch.exp((similarity - similarity[:, :1]) / temperature)
    kths = [similarity[:, min(k, most) - 1 : min(k, most)] for k in ks]
    votes = []
    for kth in kths:
        equals = queries.new_zeros(len(queries), classes).scatter_add_(1, labels, (similarity == kth).float())
        votes.append((equals, kth))
    # Of images as similar as the k-th, those beyond the list are counted in a second pass. It is rarely needed.
    if similarity.shape[1] > most and any((similarity[:, -1:] == kth).any() for kth in kths):
        votes = list(zip(_count_equals(train, numbers, classes, queries, kths), kths, strict=True))
    winners = []
    for equals, kth in votes:
        # From the nearest on, and the equals as one term: sums that do not depend on the order of `train`.
        total = torch.zeros_like(equals).scatter_add_(1, labels, weights * (similarity > kth))
        total += equals * torch.exp((kth - similarity[:, :1]) / temperature)
        winners.append(total.argmax(dim=1))
    return winners


def _nearest(train: Tensor, numbers: Tensor, queries: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Return the highest similarities of each query, descending, and their classes: [Q, count] each, or all N."""
    similarity = queries.new_empty(len(queries), 0)
    labels = numbers.new_empty(len(queries), 0)
    for block, block_numbers in zip(train.split(IMAGES), numbers.split(IMAGES), strict=True):
        here = (queries @ block.to(queries.device).T).topk(min(count, len(block)), dim=1)
        both = torch.cat([similarity, here.values], dim=1)
        similarity, order = both.topk(min(count, both.shape[1]), dim=1)
        labels = torch.cat([labels, block_numbers[here.indices]], dim=1).gather(1, order)
    return similarity, labels


def _count_equals(
    train: Tensor, numbers: Tensor, classes: int, queries: Tensor, kths: Sequence[Tensor]
) -> list[Tensor]:
    """Count the training images of each class whose similarity is exactly the k-th, for each k: [Q, C]."""
    counts = [queries.new_zeros(len(queries), classes) for _ in kths]
    for block, block_numbers in zip(train.split(IMAGES), numbers.split(IMAGES), strict=True):
        similarity = queries @ block.to(queries.device).T
        for count, kth in zip(counts, kths, strict=True):
            count.index_add_(1, block_numbers, (similarity == kth).float())
    return counts
