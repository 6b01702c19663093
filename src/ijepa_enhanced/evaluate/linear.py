"""Classification by a linear layer on frozen features: what an encoder's features tell a small trained reader."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ijepa_enhanced.evaluate.knn import standardize
from ijepa_enhanced.randomness import Purpose, generator

STRENGTHS = tuple(10 ** (-power / 2) for power in range(2, 11))
"""Half decades of L2 regularisation from 0.1 to 1e-5, the strongest first. Measured best: 1e-3 to 1e-4."""
ITERATIONS = 100
"""Of L-BFGS at each strength. SGD with momentum and a grid of learning rates and weight decays took as long, and was
0.7 points worse on Imagenette: its features are ill conditioned (docs/evaluation.md)."""
TEMPERATURES = tuple(2 ** (power / 2) for power in range(-8, 17))
"""Half octaves from 1/16, for layers that were held near zero, to 256, for those that know their images by heart."""


@torch.no_grad()
def linear_probe(train: Tensor, train_labels: Tensor, queries: Tensor, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Softmax regression on standardised features (see `knn.standardize`).

    The strength of its regularisation is chosen on a fifth of `train`, stratified; the layer is then trained again on
    all of it. Choosing by `calibrated_loss` is what makes the score repeat over seeds: the best accuracy on so few
    images is often luck.

    Args:
        train: [N, D], any float type.
        train_labels: int64 [N], at least 0, not necessarily contiguous.
        queries: [M, D] on the same device.
        seed: of the held-out part.

    Returns:
        Logits float32 [M, C] of each query for the C labels that occur in `train_labels`, and these labels int64 [C],
        ascending.

    Raises:
        ValueError: as `knn.standardize`.
    """
    train, queries, classes, numbers = standardize(train, train_labels, queries)
    # The column of ones carries the bias.
    train, queries = F.pad(train, (0, 1), value=1.0), F.pad(queries, (0, 1), value=1.0)
    targets = F.one_hot(numbers, len(classes)).to(train.dtype)
    fitted, held_out = stratified_split(numbers, generator(seed, Purpose.HOLDOUT))
    layers = softmax_regression(train[fitted], targets[fitted], STRENGTHS)
    losses = torch.stack([calibrated_loss(train[held_out] @ layer, numbers[held_out]) for layer in layers])
    best = int(losses.argmin())
    return queries @ softmax_regression(train, targets, STRENGTHS[best : best + 1], layers[best])[0], classes


def stratified_split(numbers: Tensor, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
    """Rows to fit on and rows to hold out, int64: of each class in `numbers` [N] a fifth is held out, up or down.

    Of two to four images in all it is one, the last class's: there must be something to choose by.
    """
    order = torch.from_numpy(rng.permutation(len(numbers))).to(numbers.device)
    order = order[numbers[order].argsort(stable=True)]
    held_out = torch.arange(len(order), device=order.device) % 5 == min(4, max(1, len(order) - 1))
    return order[~held_out], order[held_out]


@torch.no_grad()
def softmax_regression(x: Tensor, targets: Tensor, strengths: Sequence[float], start: Tensor | None = None) -> Tensor:
    """Weights [S, D, C] of S linear layers, each of which minimises, by L-BFGS from where the one before it ended,

        mean over images of the cross-entropy + strength / 2 * sum of squared weights

    Args:
        x: float32 [N, D]. The weights of its last column, which should be ones, are not regularised.
        targets: float32 [N, C], the probability of each of C classes.
        strengths: S of them, best the strongest first.
        start: [D, C], where the first begins; None is at 0.
    """
    weights = x.new_zeros(x.shape[1], targets.shape[1]) if start is None else start.clone()
    found = []
    for strength in strengths:
        optimizer = torch.optim.LBFGS([weights], max_iter=ITERATIONS, line_search_fn="strong_wolfe")

        def loss(strength: float = strength) -> Tensor:
            # The gradient is short enough to write down, and features that were extracted in inference mode have no
            # autograd.
            held = strength * F.pad(weights[:-1], (0, 0, 0, 1))
            logs = torch.log_softmax(x @ weights, dim=1)
            weights.grad = x.T @ (logs.exp() - targets) / len(x) + held
            return -(targets * logs).sum() / len(x) + (held * weights).sum() / 2

        optimizer.step(loss)
        found.append(weights.clone())
    return torch.stack(found)


def calibrated_loss(logits: Tensor, y: Tensor) -> Tensor:
    """The cross-entropy of `logits` [N, C] for `y` int64 [N], summed, at the temperature that suits them best.

    Smooth like a loss, yet blind to over- and under-confidence as accuracy is (temperature scaling: Guo et al., arXiv
    1706.04599, section 4.2).
    """
    return torch.stack([F.cross_entropy(logits / t, y, reduction="sum") for t in TEMPERATURES]).min()
