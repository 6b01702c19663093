"""Classification by a linear layer on frozen features: what an encoder's features tell a small trained reader."""

from __future__ import annotations

import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ijepa_enhanced.evaluate.knn import comparable
from ijepa_enhanced.randomness import Purpose, generator

LEARNING_RATES = tuple(10 ** (power / 2) for power in range(-8, 1))
"""Half decades. At 1e-4 training hardly leaves its first direction, that of the class means, so lower rates would only
repeat it; the best rate of the worst conditioned problem measured was 0.3."""
STEPS, LEAST_EPOCHS, BATCH, MOMENTUM = 3000, 10, 256, 0.9
"""A number of steps, not of epochs, so that a learning rate means the same for four fifths of the images and for all;
ten epochs where that is more. On nine problems, three seeds each, top-1 was on average that of scikit-learn's L-BFGS
with L2 strength cross-validated, and at worst 0.7 points below it (mean of the seeds)."""
TEMPERATURES = tuple(2 ** (power / 2) for power in range(-8, 17))
"""Half octaves from 1/16, for layers that hardly moved from zero, to 256, for those that know their images by heart."""


@torch.no_grad()
def linear_probe(train: Tensor, train_labels: Tensor, queries: Tensor, seed: int = 0) -> Tensor:
    """The class of each query by softmax regression on standardised features (see `knn.comparable`).

    The protocol is DINOv2's (arXiv 2304.07193, appendix B.3): SGD, with the linear layers of a grid of learning rates
    trained at once. The rate is chosen on a fifth of `train`, stratified; the layer is then trained again on all of it.
    Choosing by `calibrated_loss` is what makes the score repeat over seeds: the best accuracy on so few images is often
    luck.

    Args:
        train: [N, D], any float type.
        train_labels: int64 [N], at least 0, not necessarily contiguous.
        queries: [M, D] on the same device.
        seed: of the held-out part and of the order of images in training.

    Returns:
        int64 [M], labels out of `train_labels`.

    Raises:
        ValueError: as `knn.comparable`.
    """
    train, queries, classes, numbers = comparable(train, train_labels, queries)
    # The column of ones carries the bias.
    train, queries = F.pad(train, (0, 1), value=1.0), F.pad(queries, (0, 1), value=1.0)
    rng = generator(seed, Purpose.HOLDOUT)
    fitted, held_out = stratified_split(numbers, rng)
    weights = softmax_regression(train[fitted], numbers[fitted], len(classes), LEARNING_RATES, rng)
    losses = torch.stack([calibrated_loss(train[held_out] @ head, numbers[held_out]) for head in weights.unbind(1)])
    best = LEARNING_RATES[int(losses.argmin())]
    weights = softmax_regression(train, numbers, len(classes), (best,), rng)
    return classes[(queries @ weights[:, 0]).argmax(dim=1)]


def stratified_split(numbers: Tensor, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
    """Rows to fit on and rows to hold out, int64: of each class in `numbers` [N] a fifth is held out, up or down."""
    order = torch.from_numpy(rng.permutation(len(numbers))).to(numbers.device)
    order = order[numbers[order].argsort(stable=True)]
    held_out = torch.arange(len(order), device=order.device) % 5 == 4
    return order[~held_out], order[held_out]


def softmax_regression(
    x: Tensor, y: Tensor, classes: int, rates: tuple[float, ...], rng: np.random.Generator
) -> Tensor:
    """Weights [D, H, C] of H linear layers, one for each learning rate, by SGD with momentum and a cosine schedule.

    Args:
        x: float32 [N, D]
        y: int64 [N] below `classes`, the C of the result.
        classes, rates: how many classes; the H learning rates at the start.
        rng: draws the order of images, the same for all layers.
    """
    weights = x.new_zeros(x.shape[1], len(rates), classes)
    velocity = torch.zeros_like(weights)
    rate = x.new_tensor(rates)[:, None]
    targets = F.one_hot(y, classes).to(x.dtype)[:, None]
    batches = math.ceil(len(x) / BATCH)
    epochs = max(LEAST_EPOCHS, math.ceil(STEPS / batches))
    orders = (torch.from_numpy(rng.permutation(len(x))).to(x.device) for _ in range(epochs))
    for step, rows in enumerate(rows for order in orders for rows in order.tensor_split(batches)):
        inputs = x[rows]
        # The gradient of softmax regression is short enough to write down, and features that were extracted in
        # inference mode have no autograd.
        errors = (inputs @ weights.flatten(1)).view(len(rows), *weights.shape[1:]).softmax(dim=2) - targets[rows]
        gradient = (inputs.T @ errors.flatten(1)).view_as(weights) / len(rows)
        velocity.mul_(MOMENTUM).add_(gradient)
        weights.addcmul_(velocity, rate, value=-0.5 * (1 + math.cos(math.pi * step / (epochs * batches))))
    return weights


def calibrated_loss(logits: Tensor, y: Tensor) -> Tensor:
    """The cross-entropy of `logits` [N, C] for `y` int64 [N], summed, at the temperature that suits them best.

    Smooth like a loss, yet blind to over- and under-confidence as accuracy is (temperature scaling: Guo et al., arXiv
    1706.04599, section 4.2).
    """
    return torch.stack([F.cross_entropy(logits / t, y, reduction="sum") for t in TEMPERATURES]).min()
