"""From the size of an image to its patch grid."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def fit_grids(
    heights: NDArray[np.number],
    widths: NDArray[np.number],
    resolution: NDArray[np.floating] | float | None,
    patch_size: int,
    limit: NDArray[np.integer] | int,
) -> NDArray[np.int64]:
    """The patch grid of each view: int64 [..., 2] rows and columns, at least 1 x 1 and at most `limit` tokens.

    Args:
        heights, widths: [...] pixels of what is shown.
        resolution: sqrt(height * width) after resizing, [...] or one for all; None is native size.
        patch_size: P.
        limit: most tokens of a view, [...] or one for all.

    When one axis is clamped to a single patch the other is recomputed from the area: otherwise 1 x 4000 px
    at resolution 224 would have 885 tokens of 16 px instead of 196.
    """
    area = heights * widths if resolution is None else np.broadcast_to(np.square(resolution), heights.shape)
    tokens = np.minimum(area / patch_size**2, limit)
    aspect = heights / widths
    rows = np.rint(np.sqrt(tokens * aspect))
    cols = np.rint(np.sqrt(tokens / aspect))
    line = np.maximum(1, np.rint(tokens))
    rows, cols = (
        np.where(rows == 0, 1, np.where(cols == 0, line, rows)),
        np.where(cols == 0, 1, np.where(rows == 0, line, cols)),
    )
    # Rounding both axes up can step over the limit; the longer axis gives way, which bends the shape least.
    over = rows * cols > limit
    tall = rows >= cols
    rows, cols = (
        np.where(over & tall, limit // cols, rows),
        np.where(over & ~tall, limit // rows, cols),
    )
    return np.stack([rows, cols], axis=-1).astype(np.int64)
