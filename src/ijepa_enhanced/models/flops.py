"""What an encoder computes, counted from the lengths of its views."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from ijepa_enhanced.merge_plan import layer_rates, merged_lengths
from ijepa_enhanced.models.encoder import CHANNELS, EncoderConfig


def encoder_flops(
    config: EncoderConfig, lengths: Sequence[int] | NDArray[np.integer], rate: float | Sequence[float] = 0.0
) -> NDArray[np.int64]:
    """Floating-point operations of a forward pass over each view: int64 [V].

    As PyTorch's own counter does, two for every multiply-add of a matrix product and none for anything else. A view of
    n patches that comes to a layer with b tokens and leaves it with a, of width D in H heads, costs

        n * 2 * (P * P * C * D)         patch embedding
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
    shape = config.shape
    width, hidden = shape.width, round(shape.width * shape.mlp_ratio)
    table = merged_lengths(lengths, rate, shape.depth)
    patches, before, after = table[0], table[:-1], table[1:]
    merges = np.array([share > 0 for share in layer_rates(rate, shape.depth)])[:, None]
    entries = 2 * config.max_grid if config.positions == "factorized" else 0
    embedding = patches * width * (config.patch_size**2 * CHANNELS + entries)
    attention = before * 4 * width**2 + before**2 * 2 * width
    matching = merges * ((before + 1) // 2) * (before // 2) * (width // shape.heads)
    mlp = after * 2 * width * hidden
    return 2 * (embedding + (attention + matching + mlp).sum(axis=0))
