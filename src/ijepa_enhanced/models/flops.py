"""What networks compute, counted from the lengths of views."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ijepa_enhanced.merge_plan import layer_rates, merged_lengths
from ijepa_enhanced.models.config import EncoderConfig, PredictorConfig
from ijepa_enhanced.models.vit import CHANNELS, PATCH_MLP_RATIO

Lengths = Sequence[int] | NDArray[np.integer]
Counts = NDArray[np.int64]


def encoder_flops(config: EncoderConfig, lengths: Lengths, rate: float | Sequence[float] = 0.0) -> Counts:
    """Floating-point operations of a forward pass over each view: int64 [V].

    As PyTorch's own counter does, two for every multiply-add of a matrix product and none for anything else. A view of
    n patches that comes to a layer with b tokens and leaves it with a, of width D in H heads, costs

        n * 2 * (P * P * C * D)         patch embedding
        n * 2 * (P * P * C + D) * R * D or, with a hidden layer of R * D, this
        n * 2 * (2 * max_grid * D)      factorized positions: rows and columns
        b * 2 * (3 * D * D + D * D)     each layer: queries, keys and values; projection
        b * b * 2 * (D + D)             logits, and the sums of values
        (b / 2) * (b / 2) * 2 * (D / H) similarities, where the layer merges (one half rounded up, the other down)
        a * 2 * (D * M + M * D)         MLP with a hidden layer of M

    Args:
        config: the encoder.
        lengths: patches of each of V views.
        rate: the merge rate, one for all layers or one for each.

    Raises:
        ValueError: a merge rate out of range.
    """
    return _encoder(config, lengths, rate).forward


def predictor_flops(config: PredictorConfig, encoder: EncoderConfig, contexts: Lengths, targets: Lengths) -> Counts:
    """Operations of the predictor's forward pass over each view, counted as `encoder_flops` does: int64 [V].

    A view of c context and t target tokens costs a predictor of width W, for an encoder of width D,

        c * 2 * (D * W)                     context's features to the predictor's width
        (c + t) * 2 * (2 * max_grid * W)    factorized positions: rows and columns
        c * 2 * (W * W + W * W)             each layer: keys and values
        t * 2 * (W * W + W * W)             queries; projection
        t * c * 2 * (W + W)                 logits, and the sums of values
        t * 2 * (W * 4 * W + 4 * W * W)     MLP
        t * 2 * (W * D)                     to the encoder's width

    Args:
        config: the predictor.
        encoder: whose features it reads and predicts.
        contexts: context tokens of each of V views.
        targets: target tokens of each.
    """
    return _predictor(config, encoder, contexts, targets).forward


def step_flops(
    encoder: EncoderConfig,
    predictor: PredictorConfig,
    lengths: Lengths,
    contexts: Lengths,
    targets: Lengths,
    teacher_rate: float = 0.0,
    student_rate: float = 0.0,
) -> Counts:
    """Operations of a training step on each view, counted as `encoder_flops` does: int64 [V].

    The teacher runs forward. Student and predictor run forward and backward, where each product has two, for the
    gradients of its two factors; but pixels and places have no gradient, and matching has none at all. These are the
    operations of the model (PaLM, arXiv 2204.02311, appendix B): what a kernel computes once more in its backward pass
    is not among them, nor are the regularizers, which read one mean token a view.

    Args:
        encoder: of student and teacher.
        predictor: the predictor.
        lengths: patches of each of V views.
        contexts: those of them that the student sees.
        targets: those of them that are predicted.
        teacher_rate, student_rate: the rates at which they merge.

    Raises:
        ValueError: a merge rate out of range.
    """
    student = _encoder(encoder, contexts, student_rate)
    prediction = _predictor(predictor, encoder, contexts, targets)
    return encoder_flops(encoder, lengths, teacher_rate) + student.training + prediction.training


class _Parts(NamedTuple):
    """Operations of a forward pass over each view, int64 [V], by what a backward pass makes of them."""

    inputs: Counts
    """Products with what has no gradient."""
    layers: Counts
    matching: Counts

    @property
    def forward(self) -> Counts:
        """Of the forward pass."""
        return self.inputs + self.layers + self.matching

    @property
    def training(self) -> Counts:
        """Of the forward and the backward pass."""
        return 2 * self.inputs + 3 * self.layers + self.matching


def _encoder(config: EncoderConfig, lengths: Lengths, rate: float | Sequence[float]) -> _Parts:
    shape = config.shape
    width, hidden = shape.width, round(shape.width * shape.mlp_ratio)
    table = merged_lengths(lengths, rate, shape.depth)
    patches, before, after = table[0], table[:-1], table[1:]
    merges = np.array([share > 0 for share in layer_rates(rate, shape.depth)])[:, None]
    entries = 2 * config.max_grid if config.positions == "factorized" else 0
    pixels, second = config.patch_size**2 * CHANNELS, np.zeros_like(patches)
    if config.patch_embed == "mlp":
        pixels *= PATCH_MLP_RATIO
        second = patches * PATCH_MLP_RATIO * width**2
    embedding = patches * width * (pixels + entries)
    attention = before * 4 * width**2 + before**2 * 2 * width
    matching = merges * ((before + 1) // 2) * (before // 2) * (width // shape.heads)
    mlp = after * 2 * width * hidden
    return _Parts(2 * embedding, 2 * (second + (attention + mlp).sum(axis=0)), 2 * matching.sum(axis=0))


def _predictor(config: PredictorConfig, encoder: EncoderConfig, contexts: Lengths, targets: Lengths) -> _Parts:
    c, t = np.asarray(contexts, dtype=np.int64), np.asarray(targets, dtype=np.int64)
    width, ends = config.width, encoder.shape.width * config.width
    layer = c * 2 * width**2 + t * (2 + 8) * width**2 + t * c * 2 * width
    places = (c + t) * 2 * encoder.max_grid * width
    return _Parts(2 * places, 2 * ((c + t) * ends + config.depth * layer), np.zeros_like(c))
