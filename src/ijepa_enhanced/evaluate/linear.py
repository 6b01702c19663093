"""Classification by a linear layer on frozen features: what they tell a small trained reader."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ijepa_enhanced.devices import threads
from ijepa_enhanced.evaluate.standardize import standardize
from ijepa_enhanced.randomness import Purpose, generator

STRENGTHS = tuple(10 ** (-power / 2) for power in range(2, 11))
"""Half decades of L2 regularization from 0.1 to 1e-5, the strongest first. Measured best: 1e-3 to 1e-4."""
ITERATIONS = 100
"""Of L-BFGS at each strength. SGD with momentum and a grid of learning rates and weight decays took as long and was
0.7 points worse on Imagenette, whose features are ill conditioned (docs/measurements.md)."""
BLOCK = 2**22
"""Logits in memory at once: 16 MiB of float32, and as much for each of the few tensors made from them."""
TEMPERATURES = tuple(2 ** (power / 2) for power in range(-8, 17))
"""Half octaves from 1/16, for layers that were held near zero, to 256, for layers that know their images by heart."""


@torch.no_grad()
def linear_probe(
    train: Tensor, train_labels: Tensor, queries: Tensor, seed: int = 0, device: torch.device | None = None
) -> tuple[Tensor, Tensor]:
    """Fit softmax regression on standardized features (see `standardize`).

    The strength of its regularization is chosen on a fifth of `train`, stratified; the layer is then trained again on
    all of it. The choice is by `calibrated_loss`, which makes scores repeat over seeds: the best accuracy on so few
    images is often luck. If no class has two images, nothing can be held out, and the strength is the middle one, 1e-3.

    Beside the features there is one standardized copy of `train`. Everything else is computed in blocks of fixed size.

    Args:
        train: [N, D], any float type.
        train_labels: int64 [N], at least 0, not necessarily contiguous.
        queries: [M, D].
        seed: of the held-out part.
        device: where to compute; None: where `train` is.

    Returns:
        On the host: logits float32 [M, C] of each query for the C labels that occur in `train_labels`, and these labels
        int64 [C], ascending.

    Raises:
        ValueError: as `standardize`.
    """
    # The column of ones carries the bias.
    x, queries, classes, numbers = standardize(train, train_labels, queries, device, ones=1)
    fitted, held_out = stratified_split(numbers, generator(seed, Purpose.HOLDOUT))
    layers = softmax_regression(x, numbers, STRENGTHS, rows=fitted)
    losses = torch.stack([_held_out_loss(x, numbers, held_out, layer) for layer in layers])
    best = int(losses.argmin()) if len(held_out) else len(STRENGTHS) // 2
    (layer,) = softmax_regression(x, numbers, STRENGTHS[best : best + 1], layers[best])
    logits = [block.to(layer.device) @ layer for block in queries.split(rows_at_once(len(classes)))]
    return torch.cat(logits).cpu(), classes.cpu()


def _held_out_loss(x: Tensor, numbers: Tensor, rows: Tensor, layer: Tensor) -> Tensor:
    """Return `calibrated_loss` of some rows of `x`, whose logits are never all in memory."""
    parts = [
        losses_by_temperature(block @ layer, numbers[some])
        for some, block in _blocks(x, rows, layer.shape[1], layer.device)
    ]
    return torch.stack(parts).sum(dim=0).min()


def stratified_split(numbers: Tensor, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
    """Return rows to fit on and rows to hold out, int64: a fifth of each class in `numbers` [N], rounded up or down.

    A class of a single image is only fitted on: without it, there would be no learning the class. Of two to four other
    images in all, one of the last class is held out: there must be something to choose by.
    """
    order = torch.from_numpy(rng.permutation(len(numbers))).to(numbers.device)
    order = order[numbers[order].argsort(stable=True)]
    several = numbers.bincount()[numbers[order]] > 1
    held_out = several & ((several.cumsum(0) - 1) % 5 == min(4, max(1, int(several.sum()) - 1)))
    return order[~held_out], order[held_out]


@torch.no_grad()
def softmax_regression(
    x: Tensor,
    targets: Tensor,
    strengths: Sequence[float],
    start: Tensor | None = None,
    rows: Tensor | None = None,
) -> Tensor:
    """Return the weights [S, D, C] of S linear layers, on the device of `targets`.

    Each layer minimizes, by L-BFGS from where the one before it ended,

        mean over images of the cross-entropy + strength / 2 * sum of squared weights

    Args:
        x: float32 [N, D], on any device. The weights of its last column, which should be ones, are not regularized.
        targets: int64 [N], the class of each image, every one of which occurs; or float32 [N, C], the probability of
            each of C classes.
        strengths: S of them, best the strongest first.
        start: [D, C], where the first begins; None: at 0.
        rows: int64 [n], the images to fit on; None: all.
    """
    classes = int(targets.max()) + 1 if targets.ndim == 1 else targets.shape[1]
    images = len(x) if rows is None else len(rows)
    # [C, D] and the products below: with few classes, MKL takes two to four times as long for [D, C] (docs/log.md).
    weights = torch.zeros(classes, x.shape[1], device=targets.device)
    if start is not None:
        weights.copy_(start.T)
    found = []
    for strength in strengths:
        optimizer = torch.optim.LBFGS([weights], max_iter=ITERATIONS, line_search_fn="strong_wolfe")

        def loss(strength: float = strength) -> Tensor:
            # The gradient is short enough to write down, and features that were extracted in inference mode have no
            # autograd.
            gradient, total = torch.zeros_like(weights), weights.new_zeros(())
            for some, block in _blocks(x, rows, classes, weights.device):
                error, entropy = _cross_entropy(block @ weights.T, targets[some])
                gradient += error.T @ block
                total += entropy
            held = strength * F.pad(weights[:, :-1], (0, 1))
            weights.grad = gradient / images + held
            return total / images + (held * weights).sum() / 2

        optimizer.step(loss)
        found.append(weights.T.clone())
    return torch.stack(found)


def _cross_entropy(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Return the gradient by `logits` [B, C] of the summed cross-entropy, [B, C], and that sum."""
    if targets.ndim == 1:
        targets = torch.zeros_like(logits).scatter_(1, targets[:, None], 1.0)
    logs = torch.log_softmax(logits, dim=1)
    entropies = targets * logs
    # Several threads would add in another order. A hundred iterations end short of the minimum, where that shows.
    with threads(1):
        total = -entropies.sum()
    return logs.exp_().sub_(targets), total


def _blocks(
    x: Tensor, rows: Tensor | None, classes: int, device: torch.device
) -> Iterator[tuple[slice | Tensor, Tensor]]:
    """Yield rows of `x`, all or some, in blocks of at most `BLOCK` logits: where they are, and what on `device`."""
    size = rows_at_once(classes)
    if rows is None:
        for start in range(0, len(x), size):
            yield slice(start, start + size), x[start : start + size].to(device)
    else:
        for some in rows.split(size):
            yield some, x.index_select(0, some.to(x.device)).to(device)  # several times as fast as x[some] on a CPU


def rows_at_once(classes: int) -> int:
    """Return how many rows have `BLOCK` logits."""
    return max(1, BLOCK // classes)


def calibrated_loss(logits: Tensor, y: Tensor) -> Tensor:
    """Return the cross-entropy of `logits` [N, C] for `y` int64 [N], summed, at the temperature that suits them best.

    It is smooth like a loss, yet blind to over- and under-confidence as accuracy is (temperature scaling: Guo et al.,
    arXiv 1706.04599, section 4.2).
    """
    return losses_by_temperature(logits, y).min()


def losses_by_temperature(logits: Tensor, y: Tensor) -> Tensor:
    """Return the summed cross-entropy of `logits` [N, C] for `y` int64 [N] at each of `TEMPERATURES`."""
    return torch.stack([F.cross_entropy(logits / t, y, reduction="sum") for t in TEMPERATURES])
