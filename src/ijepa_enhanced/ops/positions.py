"""Position embeddings: from the row and column of a token in its view's grid to a vector."""

import dataclasses

import torch
from torch import Tensor

from ijepa_enhanced.packed import Packed, segment_ids


def axis_coordinates(positions: Tensor, extents: Tensor, size: int) -> Tensor:
    """Return the coordinates of tokens on a table of `size` entries, along one axis: float32 [T].

    A grid no longer than the table keeps its positions. A longer grid is squeezed evenly onto the table, so that the
    table is interpolated linearly, axis by axis (NaViT, arXiv 2307.06304, section 2.1).

    Args:
        positions: [T] row (or column) of each token; may be fractional.
        extents: [T] rows (or columns) of each token's grid.
        size: entries of the table.
    """
    # The last position, extent - 1, lands on the last entry, size - 1. The first clamp avoids a division by zero, the
    # second leaves short grids as they are.
    squeeze = ((size - 1) / (extents - 1).clamp(min=1)).clamp(max=1.0)
    return positions * squeeze


def within_grid(packed: Packed, longest: tuple[int, int]) -> Packed:
    """Squeeze the positions of views with more than `longest` rows or columns evenly onto a grid of that size.

    A network learns the positions of the longest grid that it is trained on. Those beyond it stay as initialized.
    Shorter grids keep the exact bits of their positions.

    Args:
        packed: any stream.
        longest: rows and columns of the longest grid of training.
    """
    # [T, 2]: the grid of each token.
    extents = packed.grids[segment_ids(packed.segments.cu_seqlens, packed.positions.shape[0])]
    places = [axis_coordinates(packed.positions[:, axis], extents[:, axis], longest[axis]) for axis in (0, 1)]
    grids = [packed.grids[:, axis].clamp(max=longest[axis]) for axis in (0, 1)]
    return dataclasses.replace(packed, positions=torch.stack(places, dim=1), grids=torch.stack(grids, dim=1))


def interpolation_weights(coordinates: Tensor, size: int) -> Tensor:
    """Return linear interpolation as a matrix: [T] -> float32 [T, size]; rows sum to 1 on [0, size - 1].

    `weights @ table` reads a table at fractional coordinates. Its gradient is a matrix product too, which is
    deterministic and needs no scattered additions.
    """
    entries = torch.arange(size, device=coordinates.device, dtype=torch.float32)
    return (1.0 - (coordinates.float()[:, None] - entries).abs()).clamp(min=0.0)


def sincos_2d(rows: Tensor, cols: Tensor, width: int) -> Tensor:
    """Return 2-D sine-cosine positions: float32 [T, width].

    The first half of the channels encodes the column and the second half the row. Each half is sin(w x), then cos(w x),
    with frequencies w = 10000 ** (-2 i / (width / 2)). Order and base are those of MAE (arXiv 2111.06377) and of
    I-JEPA's released weights.

    Args:
        rows, cols: [T] coordinates; may be fractional.
        width: D, a multiple of 4.

    Raises:
        ValueError: `width` is not a multiple of 4.
    """
    if width % 4:
        raise ValueError(f"2-D sine-cosine positions need a width that is a multiple of 4, not {width}.")
    frequencies = 10000.0 ** -(torch.arange(width // 4, device=rows.device, dtype=torch.float32) / (width // 4))
    angles = [axis.float()[:, None] * frequencies for axis in (cols, rows)]  # [T, D / 4] each
    return torch.cat([wave for angle in angles for wave in (angle.sin(), angle.cos())], dim=1)
