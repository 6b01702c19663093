"""An encoder as a graph of plain operations (`torch.export`), from which files for other programs are made.

The network itself is traced, on a packed stream of views of one size. Its two custom operations, which find out the
lengths of views at run time, are replaced by plain ones that count on equal lengths.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn
from torch._ops import OpOverload
from torch.export import Dim, ExportedProgram

from ijepa_enhanced.encoder import Encoder
from ijepa_enhanced.errors import RunError
from ijepa_enhanced.merge_plan import MergePlan
from ijepa_enhanced.ops.merging import LOW
from ijepa_enhanced.ops.preprocess import CHANNELS
from ijepa_enhanced.packed import Packed, Segments

INPUT, OUTPUTS = "images", ("feature", "feature_map")
"""Names of the input and the outputs in files."""
BOUND = 1e-4
"""Largest norm of a difference between features, divided by the norm of the features. Kernels round float32 (6e-8) in
different orders. The largest difference that was seen is 6e-7, with 12 blocks (docs/weights.md)."""
TYPICAL_GRID = (14, 14)
"""Rows and columns of the grid of 224 px at 16 px a patch: to check an encoder without a trained resolution."""


@dataclass(frozen=True)
class Shape:
    """Which images a program takes, and how it computes their features."""

    batch: int = 1
    """Number of images, all of one size."""
    grid: tuple[int, int] | None = None
    """Rows and columns of patches of each image. None: any from 2 x 2 on."""
    merge_rate: float = 0.0
    """See `Encoder.embed`. Above 0, `grid` must be given."""


class EqualViews(nn.Module):
    """An encoder that takes images of one size, as a batch.

    Args:
        encoder: which is not copied.
        plan: for merging the tokens of this batch; None: nothing merges.
    """

    def __init__(self, encoder: Encoder, plan: MergePlan | None) -> None:
        super().__init__()
        self.encoder = encoder
        self.plan = plan

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return the feature of each image, and the features of its patches: float32 [V, D], [V, rows, columns, D].

        Args:
            images: uint8 [V, 3, rows * P, columns * P], RGB.
        """
        side, prefix = self.encoder.config.patch_size, self.encoder.config.prefix
        views, _, height, width = images.shape
        rows, cols = height // side, width // side
        length = prefix + rows * cols
        # The order of pixels in a patch: row, column, channel.
        patches = images.reshape(views, CHANNELS, rows, side, cols, side).permute(0, 2, 4, 3, 5, 1)
        values = patches.reshape(views, rows * cols, side * side * CHANNELS)
        places = torch.stack(
            [torch.arange(rows)[:, None].expand(rows, cols), torch.arange(cols).expand(rows, cols)], dim=2
        ).flatten(0, 1)  # [rows * columns, 2]
        packed = Packed(
            F.pad(values, (0, 0, prefix, 0)).flatten(0, 1),
            F.pad(places, (0, 0, prefix, 0)).repeat(views, 1),
            torch.stack([torch.full((views,), rows), torch.full((views,), cols)], dim=1),
            Segments((), (torch.arange(views + 1) * length).int(), 0),  # on a CPU, only the edges are read
            prefix,
        )
        features = self.encoder(packed, self.plan)
        maps = features.unflatten(0, (views, length))[:, prefix:].unflatten(1, (rows, cols))
        return self.encoder.pool(features, packed), maps


def equal_attention(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, cu_keys: Tensor, bias: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Compute `ops.attention.cpu_attention` for views of equal lengths, without the log-sum-exp, which is 0."""
    views = cu_seqlens.shape[0] - 1
    q, k, v = (x.unflatten(0, (views, -1)).transpose(1, 2) for x in (q, k, v))  # [V, H, length, K]
    mask = None if bias is None else bias.unflatten(0, (views, 1, 1, -1))
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(0, 1)
    return out, out.new_zeros(out.shape[:2])


def equal_matches(views: int, prefix: int) -> Callable[[Tensor, Tensor, int, int], Tensor]:
    """Return `ops.merging.best_matches` for views of equal lengths, with `prefix` tokens each that never merge."""

    def matches(directions: Tensor, tiles: Tensor, start: int, stop: int) -> Tensor:
        tokens = directions.unflatten(0, (views, -1))  # [V, length, K]
        length, least = tokens.shape[1], LOW - 2**63
        even, odd = tokens[:, prefix::2], tokens[:, prefix + 1 :: 2]
        similarity, column = torch.bmm(even, odd.transpose(1, 2)).max(dim=2)  # [V, even tokens]
        first_odd = torch.arange(views)[:, None] * length + prefix + 1
        # As whole numbers, cosines keep their order: they are exact from 1/128 on, and differ by 1e-9 below.
        ordered = (similarity.double() * 2**30).round().long()
        matches = ordered * 2**32 + (LOW - (first_odd + 2 * column))
        both = torch.stack([matches, torch.full_like(matches, least)], dim=2).flatten(1)[:, : length - prefix]
        return torch.cat([both.new_full((views, prefix), least), both], dim=1).flatten()

    return matches


def trace(
    encoder: Encoder, shape: Shape, more: Mapping[OpOverload, Callable[..., Any]] = MappingProxyType({})
) -> ExportedProgram:
    """Return an encoder as a graph that needs nothing but PyTorch; see `EqualViews.forward` for input and outputs.

    Args:
        encoder: on the CPU, which is not copied.
        shape: of the program.
        more: further operations to replace, and what replaces them.
    """
    side, prefix = encoder.config.patch_size, encoder.config.prefix
    # The sizes differ, because the tracer treats equal sizes as one size.
    rows, cols = shape.grid or (5, 7)
    segments = Segments.of([prefix + rows * cols] * shape.batch)
    module = EqualViews(encoder, encoder.merge_plan(segments, shape.merge_rate))
    images = torch.zeros(shape.batch, CHANNELS, rows * side, cols * side, dtype=torch.uint8)
    # A dimension of 1 would be traced for itself, because it is the one that broadcasts.
    sizes = {2: side * Dim("rows", min=2), 3: side * Dim("columns", min=2)}
    replaced = {
        torch.ops.ijepa_enhanced.cpu_attention.default: equal_attention,
        torch.ops.ijepa_enhanced.best_matches.default: equal_matches(shape.batch, prefix),
        **more,
    }
    with quiet(), torch.no_grad():
        dynamic = None if shape.grid else {INPUT: sizes}
        program = torch.export.export(module.eval(), (images,), dynamic_shapes=dynamic, strict=True)
        return program.run_decompositions(replaced)


@contextmanager
def quiet() -> Iterator[None]:
    """Hide what PyTorch 2.13 says to its own developers while it exports."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)  # they warn that torchvision is missing, and of lists that are empty
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*LeafSpec.*", FutureWarning)
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def check(encoder: Encoder, shape: Shape, run: Callable[[NDArray[np.uint8]], tuple[Tensor, Tensor]], by: str) -> float:
    """Compare a program with `Encoder.embed` and `Encoder.feature_maps`, and return the largest relative difference.

    The check uses five sizes if the program takes any size. If the program merges, it uses the median of five batches:
    rounding can exchange two pairs of tokens that are almost equally similar.

    Args:
        encoder: what was exported.
        shape: of the program.
        run: the program, from images [V, 3, height, width] to its outputs.
        by: what runs it, for the message.

    Raises:
        RunError: they differ by more than `BOUND`.
    """
    side, generator = encoder.config.patch_size, np.random.default_rng(0)
    found = []
    for rows, cols in checked_grids(encoder, shape):
        images = generator.integers(0, 256, (shape.batch, rows * side, cols * side, CHANNELS), np.uint8)
        with torch.no_grad():
            feature, maps = run(np.ascontiguousarray(images.transpose(0, 3, 1, 2)))
        limit = images[0].size
        expected = encoder.embed(images, "native", shape.merge_rate, tokens_per_pack=limit)
        expected_maps = torch.stack(encoder.feature_maps(images, "native", shape.merge_rate, tokens_per_pack=limit))
        found.append([distance(feature, expected), distance(maps, expected_maps)])
    # NumPy's maximum is nan if a number is nan. Python's `max` may ignore it.
    worst = float(np.median(np.max(found, axis=1)) if shape.merge_rate else np.max(found))
    if not worst < BOUND:  # nor if it is nan
        raise RunError(
            f"{by} computes other features than PyTorch: they differ by {worst:.1e}, relative to their norm, and "
            f"rounding explains at most {BOUND:.0e}. Nothing was written."
        )
    return worst


def checked_grids(encoder: Encoder, shape: Shape) -> list[tuple[int, int]]:
    """Return the grids of patches to check a program at: small and large ones, elongated both ways."""
    if shape.grid is not None:
        return [shape.grid] * (5 if shape.merge_rate else 1)
    size, _ = trained_grid(encoder) or TYPICAL_GRID
    return [(size, size), (size // 2 + 1, size), (size, size // 2 + 2), (3 * size // 2 + 1, size + 1), (2, size + 3)]


def trained_grid(encoder: Encoder) -> tuple[int, int] | None:
    """Return rows and columns of a square at the trained resolution; None if that is the native size of each image."""
    resolution = encoder.preprocessing.resolution
    if resolution is None:
        return None
    edge = max(1, round(resolution / encoder.config.patch_size))
    return edge, edge


def distance(found: Tensor, expected: Tensor) -> float:
    """Return the norm of a difference divided by the norm of what is expected."""
    return float((found - expected).norm() / expected.norm())
