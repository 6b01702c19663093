"""Position embeddings: from the row and column of a token in its view's grid to a vector."""

import dataclasses
import math
from typing import Literal

import torch
from torch import Tensor

from ijepa_enhanced.packed import Packed, segment_ids

Resampling = Literal["squeeze", "linear", "bicubic", "bicubic-antialias", "none"]
"""How a view of another grid reads positions; see `axis_weights`. none: only fixed positions, which need no table."""

CUBIC_SHARPNESS, ANTIALIAS_SHARPNESS = -0.75, -0.5
"""The parameter of the cubic kernel in `F.interpolate`, without and with `antialias`."""


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


def axis_weights(positions: Tensor, extents: Tensor, size: int, resampling: Resampling) -> Tensor:
    """Return how tokens read a learned table along one axis, as a matrix: float32 [T, size].

    `weights @ table` is the embedding of each token. So `F.interpolate` of a table needs no loop over views, and its
    gradient is a matrix product too, which is deterministic.

    Args:
        positions: [T] row (or column) of each token.
        extents: [T] rows (or columns) of each token's grid.
        size: entries of the table.
        resampling: `squeeze` as `axis_coordinates`. Others resize the table to the grid as `F.interpolate` does with
            `align_corners=False`: `linear`, `bicubic`, or `bicubic-antialias`.
    """
    if resampling == "squeeze":
        return interpolation_weights(axis_coordinates(positions, extents, size), size)
    # Pixel centers: position p of n lies at (p + 1/2) * size / n on the table. Only the division rounds.
    center = (positions + 0.5) * size / extents - 0.5  # [T]
    if resampling == "bicubic-antialias":
        # A kernel that widens where the table shrinks, normalized over the entries that exist.
        stretch = (size / extents).clamp(min=1.0)[:, None]
        distance = (torch.arange(size, device=positions.device) - center[:, None]) / stretch
        weights = _cubic(distance.abs(), ANTIALIAS_SHARPNESS)
        return weights / weights.sum(dim=1, keepdim=True)
    if resampling == "linear":
        return interpolation_weights(center.clamp(0, size - 1), size)
    first = center.floor() - 1
    taps = first[:, None] + torch.arange(4, device=positions.device)  # [T, 4]
    weights = _cubic((taps - center[:, None]).abs(), CUBIC_SHARPNESS)
    # Taps beyond the table read its last entry.
    places = taps.long().clamp(0, size - 1)
    return weights.new_zeros(len(positions), size).scatter_add(1, places, weights)


def _cubic(distance: Tensor, sharpness: float) -> Tensor:
    """Return the cubic convolution kernel (Keys, 1981) at distances of 0 or more."""
    near = ((sharpness + 2) * distance - (sharpness + 3)) * distance * distance + 1
    far = ((distance - 5) * distance + 8) * distance - 4
    return torch.where(distance <= 1, near, torch.where(distance < 2, sharpness * far, 0.0))


def rotations(coordinates: Tensor, head_width: int, base: float) -> tuple[Tensor, Tensor]:
    """Return cosine and sine of axial rotary positions (DINOv3, arXiv 2508.10104): float32 [T, K] each.

    Half of the frequencies encode the row and half the column. A token at (0, 0) is not rotated.

    Args:
        coordinates: [T, 2] on [-1, 1], see `centered`.
        head_width: K, a multiple of 4.
        base: of the frequencies base ** -(i / (K / 4)).
    """
    count = head_width // 4
    frequencies = base ** -(torch.arange(count, device=coordinates.device, dtype=torch.float32) / count)
    angles = (2 * math.pi * coordinates[:, :, None] * frequencies).flatten(1).tile(2)  # [T, K]
    return angles.cos(), angles.sin()


def rotate(x: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
    """Rotate the pairs (i, i + K / 2) of the channels of each head: [T, H, K] -> [T, H, K]."""
    cosine, sine = (part[:, None].to(x.dtype) for part in rotation)
    first, second = x.chunk(2, dim=2)
    return x * cosine + torch.cat([-second, first], dim=2) * sine


def centered(packed: Packed) -> Tensor:
    """Return the center of each patch on [-1, 1], from one edge of its view to the other: float32 [T, 2].

    A class token and registers are at (0, 0).
    """
    extents = packed.grids[segment_ids(packed.segments.cu_seqlens, packed.positions.shape[0])]
    places = 2 * (packed.positions + 0.5) / extents - 1
    return torch.where(packed.patches[:, None], places, 0.0) if packed.prefix else places


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
