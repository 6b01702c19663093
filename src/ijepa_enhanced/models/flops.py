"""Floating-point operations of the networks, counted from the lengths of views."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ijepa_enhanced.merge_plan import layer_rates, merged_lengths
from ijepa_enhanced.models.config import Architecture, PredictorConfig
from ijepa_enhanced.models.vit import PATCH_MLP_RATIO

Lengths = Sequence[int] | NDArray[np.integer]
Counts = NDArray[np.int64]


def encoder_flops(config: Architecture, lengths: Lengths, rate: float | Sequence[float] = 0.0) -> Counts:
    """Return the operations of a forward pass over each view: int64 [V].

    Each multiply-add of a matrix product counts as two operations, and nothing else counts, as in
    `torch.utils.flop_counter`. A view of n tokens, its patches and its prefix, costs

        n * 2 * (P * P * C * D)             patch embedding, linear
        n * 2 * (P * P * C + D) * R * D     patch embedding, with a hidden layer of width R * D
        n * 2 * ((rows + columns) * D)      factorized positions, with tables of so many entries
        n * 2 * (rows * columns * D)        positions in a table of so many entries

    and, in each layer that it enters with b tokens and leaves with a,

        b * 2 * (3 * D * D + D * D)         queries, keys and values; projection
        b * b * 2 * (D + D)                 logits; weighted sums of values
        (p / 2) * (p / 2) * 2 * (D / H)     similarities, if the layer merges: p of the b tokens are no prefix (one half
                                            rounded up, the other down)
        a * 2 * (D * M + M * D)             MLP with a hidden layer of width M; SwiGLU: half as much again

    Args:
        config: the encoder.
        lengths: patches of each of V views.
        rate: merge rate; one for all layers, or one for each.

    Raises:
        ValueError: a merge rate is out of range.
    """
    return _encoder(config, lengths, rate).forward


def predictor_flops(config: PredictorConfig, encoder: Architecture, contexts: Lengths, targets: Lengths) -> Counts:
    """Return the operations of the predictor's forward pass over each view: int64 [V]; see `encoder_flops`.

    For a predictor of width W and an encoder of width D, a view of c context tokens and t target tokens costs

        c * 2 * (D * W)                     from the encoder's width
        (c + t) * 2 * (rows + columns) * W  factorized positions, with tables of so many entries
        t * 2 * (W * D)                     to the encoder's width

    and, in each layer,

        c * 2 * (W * W + W * W)             keys and values
        t * 2 * (W * W + W * W)             queries; projection
        t * c * 2 * (W + W)                 logits; weighted sums of values
        t * 2 * (W * 4 * W + 4 * W * W)     MLP

    Args:
        config: the predictor.
        encoder: the encoder whose features it reads and predicts.
        contexts: context tokens of each of V views.
        targets: target tokens of each view.
    """
    return _predictor(config, encoder, contexts, targets).forward


def step_flops(
    encoder: Architecture,
    predictor: PredictorConfig,
    lengths: Lengths,
    contexts: Lengths,
    targets: Lengths,
    teacher_rate: float = 0.0,
    student_rate: float = 0.0,
) -> Counts:
    """Return the operations of a training step on each view: int64 [V]; see `encoder_flops`.

    The teacher runs forward only. Student and predictor run forward and backward. In the backward pass each product
    costs two products, for the gradients of its two factors. Pixels and positions need no gradient, and matching has
    none at all.

    These are model FLOPs (PaLM, arXiv 2204.02311, appendix B): they leave out what a kernel recomputes in its backward
    pass. They also leave out the VICReg and contrastive losses, which read one mean token of each view.

    Args:
        encoder: architecture of student and teacher.
        predictor: the predictor.
        lengths: patches of each of V views.
        contexts: context tokens of each view, which the student sees.
        targets: target tokens of each view.
        teacher_rate, student_rate: their merge rates.

    Raises:
        ValueError: a merge rate is out of range.
    """
    student = _encoder(encoder, contexts, student_rate)
    prediction = _predictor(predictor, encoder, contexts, targets)
    return encoder_flops(encoder, lengths, teacher_rate) + student.training + prediction.training


class _Parts(NamedTuple):
    """Operations of a forward pass over each view, int64 [V], grouped by what the backward pass costs."""

    inputs: Counts
    """Products of weights with inputs that need no gradient. Backward costs as much as forward."""
    layers: Counts
    """All other products. Backward costs twice as much as forward."""
    matching: Counts
    """Similarities for merging, which have no backward pass."""

    @property
    def forward(self) -> Counts:
        """Return the operations of the forward pass."""
        return self.inputs + self.layers + self.matching

    @property
    def training(self) -> Counts:
        """Return the operations of the forward and the backward pass."""
        return 2 * self.inputs + 3 * self.layers + self.matching


def _encoder(config: Architecture, lengths: Lengths, rate: float | Sequence[float]) -> _Parts:
    """Count as `encoder_flops` says."""
    width, prefix = config.width, config.prefix
    table = merged_lengths(np.asarray(lengths, np.int64) + prefix, rate, config.depth, prefix=prefix)  # [depth + 1, V]
    tokens, before, after = table[0], table[:-1], table[1:]
    merges = np.array([layer_rate > 0 for layer_rate in layer_rates(rate, config.depth)])[:, None]
    # All counts below are multiply-adds, and doubled at the end.
    entries = {"factorized": sum(config.position_grid), "table": math.prod(config.position_grid)}
    pixels, second_layer = config.patch_size**2 * config.channels, np.zeros_like(tokens)
    if config.patch_embed == "mlp":
        pixels *= PATCH_MLP_RATIO
        # Its input, the hidden layer, needs a gradient, so it does not count among the inputs.
        second_layer = tokens * PATCH_MLP_RATIO * width**2
    embedding = tokens * width * (pixels + entries.get(config.positions, 0))
    attention = before * 4 * width**2 + before**2 * 2 * width
    even, odd = (before - prefix + 1) // 2, (before - prefix) // 2
    matching = merges * even * odd * (width // config.heads)
    mlp = after * (3 if config.gated else 2) * width * config.hidden
    return _Parts(2 * embedding, 2 * (second_layer + (attention + mlp).sum(axis=0)), 2 * matching.sum(axis=0))


def _predictor(config: PredictorConfig, encoder: Architecture, contexts: Lengths, targets: Lengths) -> _Parts:
    """Count as `predictor_flops` says."""
    c, t = np.asarray(contexts, dtype=np.int64), np.asarray(targets, dtype=np.int64)
    width, ends = config.width, encoder.width * config.width  # ends: `embed` and `head`
    layer = c * 2 * width**2 + t * (2 + 8) * width**2 + t * c * 2 * width  # 2 + 8: attention and MLP
    positions = (c + t) * sum(encoder.position_grid) * width
    return _Parts(2 * positions, 2 * ((c + t) * ends + config.depth * layer), np.zeros_like(c))
