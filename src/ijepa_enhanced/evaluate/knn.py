"""Classification by nearest neighbours: what a frozen encoder's features tell without any training."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def standardize(train: Tensor, train_labels: Tensor, queries: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What every probe starts from: standardised features and numbered classes.

    Each dimension is shifted and scaled to mean 0 and standard deviation 1 over `train`. One that is constant there
    becomes 0 in both: it tells nothing, and its scale is rounding.

    Args:
        train: [N, D], any float type.
        train_labels: int64 [N], at least 0, not necessarily contiguous.
        queries: [M, D].

    Returns:
        `train` float32 [N, D], `queries` float32 [M, D], the C labels that occur int64 [C] ascending, and the place
        of each training image's label among them int64 [N].

    Raises:
        ValueError: no training image, shapes that do not fit, a label below 0, or a feature that is not finite.
    """
    if train.ndim != 2 or queries.ndim != 2 or train.shape[1] != queries.shape[1]:
        raise ValueError(f"Features must be [N, D] and [M, D], not {[*train.shape]} and {[*queries.shape]}.")
    if not len(train) or train_labels.shape != train.shape[:1]:
        raise ValueError(f"{len(train)} training images with labels {[*train_labels.shape]}; need one each, and some.")
    if train_labels.min() < 0:
        raise ValueError(f"Labels start at 0, but one is {int(train_labels.min())}.")
    if not (train.isfinite().all() and queries.isfinite().all()):
        raise ValueError("Some features are not finite.")
    train, queries = train.float(), queries.float()
    std, mean = torch.std_mean(train, dim=0, correction=0)
    std = std.masked_fill((train == train[0]).all(dim=0), torch.inf)
    classes, numbers = torch.unique(train_labels, return_inverse=True)
    return (train - mean) / std, (queries - mean) / std, classes, numbers


@torch.no_grad()
def knn_classify(
    train: Tensor, train_labels: Tensor, queries: Tensor, k: int = 20, temperature: float = 0.07
) -> Tensor:
    """The class of each query by the weighted vote of its k nearest training images.

    A neighbour of cosine similarity s votes with weight exp(s / temperature) (Wu et al., arXiv 1805.01978, section
    3.4, whose 0.07 is the default); k = 20 is DINO's (arXiv 2104.14294, section 3.2). Features are standardised
    first, see `standardize`. All images as similar as the k-th vote, so that the answer never depends on the order of
    `train`; among classes of equal votes the smallest label wins.

    Args:
        train: [N, D], any float type.
        train_labels: int64 [N], at least 0, not necessarily contiguous.
        queries: [M, D] on the same device.
        k: neighbours that vote; all N where there are fewer.
        temperature: of the weights, in units of cosine similarity.

    Returns:
        int64 [M], labels out of `train_labels`.

    Raises:
        ValueError: `k` or `temperature` is not positive, or as `standardize`.
    """
    if k < 1 or temperature <= 0:
        raise ValueError(f"k and temperature must be positive, not {k} and {temperature}.")
    train, queries, classes, numbers = standardize(train, train_labels, queries)
    train, queries = F.normalize(train), F.normalize(queries)
    votes = F.one_hot(numbers, len(classes)).float()
    predicted = []
    # 2**24 similarities at a time are 64 MiB.
    for chunk in torch.split(queries, max(1, 2**24 // len(train))):
        similarity = chunk @ train.T
        kth = similarity.topk(min(k, len(train))).values[:, -1:]
        # Dividing all of a query's weights by their sum keeps exp() from overflowing and changes no winner.
        weights = similarity.masked_fill_(similarity < kth, -torch.inf).div_(temperature).softmax(dim=1)
        predicted.append((weights @ votes).argmax(dim=1))
    return classes[torch.cat(predicted)]
