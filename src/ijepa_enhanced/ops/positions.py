"""Where a token lies in its view's grid, as vectors."""

import dataclasses

import torch
from torch import Tensor

from ijepa_enhanced.packed import Packed, segment_ids


def axis_coordinates(positions: Tensor, extents: Tensor, size: int) -> Tensor:
    """Return coordinates on a table of `size` entries of one axis: float32 [T].

    A grid no longer than the table is indexed as it is; a longer one is squeezed evenly onto it, which is linear
    interpolation of the table per axis (NaViT, arXiv 2307.06304, section 2.1).

    Args:
        positions: [T] row (or column) of each token, whole or fractional.
        extents: [T] rows (or columns) of the grid that each token belongs to.
        size: entries of the table.
    """
    squeeze = ((size - 1) / (extents - 1).clamp(min=1)).clamp(max=1.0)
    return positions * squeeze


def within_grid(packed: Packed, longest: tuple[int, int]) -> Packed:
    """Place the tokens of views with more than `longest` rows or columns evenly on a grid of that size.

    A network was trained on positions up to the longest grid that it was shown; those beyond are as they were drawn.
    Grids that are not longer keep their positions bit for bit.

    Args:
        packed: any stream.
        longest: rows and columns.
    """
    extents = packed.grids[segment_ids(packed.segments.cu_seqlens, packed.positions.shape[0])]
    places = [axis_coordinates(packed.positions[:, axis], extents[:, axis], longest[axis]) for axis in (0, 1)]
    grids = [packed.grids[:, axis].clamp(max=longest[axis]) for axis in (0, 1)]
    return dataclasses.replace(packed, positions=torch.stack(places, dim=1), grids=torch.stack(grids, dim=1))


def interpolation_weights(coordinates: Tensor, size: int) -> Tensor:
    """Linear interpolation as a matrix: [T] -> float32 [T, size], rows sum to 1 on [0, size - 1].

    `weights @ table` reads a table at fractional places, and its gradient is a matrix product too:
    deterministic and free of scattered additions.
    """
    entries = torch.arange(size, device=coordinates.device, dtype=torch.float32)
    return (1.0 - (coordinates.float()[:, None] - entries).abs()).clamp(min=0.0)


def sincos_2d(rows: Tensor, cols: Tensor, width: int) -> Tensor:
    """2-D sine-cosine positions: float32 [T, width].

    The first half encodes the column, the second the row; each is sin(w x) then cos(w x) with frequencies
    w = 10000 ** (-2 i / (width / 2)). The order and the base are those of MAE (arXiv 2111.06377) and of I-JEPA's
    released weights.

    Args:
        rows, cols: [T] coordinates, whole or fractional.
        width: D, a multiple of 4.

    Raises:
        ValueError: width is not a multiple of 4.
    """
    if width % 4:
        raise ValueError(f"2-D sine-cosine positions need a width that is a multiple of 4, not {width}.")
    frequencies = 10000.0 ** -(torch.arange(width // 4, device=rows.device, dtype=torch.float32) / (width // 4))
    angles = [axis.float()[:, None] * frequencies for axis in (cols, rows)]
    return torch.cat([wave for angle in angles for wave in (angle.sin(), angle.cos())], dim=1)
