"""The packed stream: the one data structure that flows from the loader to the loss.

Views of any size lie one after another in a ragged stream without padding ("Patch n' Pack", NaViT, arXiv 2307.06304).
Every docstring of the package uses this shape legend (see docs/stream.md):

    T tokens   V views (segments)   D width   H heads   K head width   P patch size   C channels
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


class Movable:
    """A dataclass mixin: `to` and `pin_memory` move every field that can be moved."""

    def _map(self, method: str, *args: Any, **kwargs: Any) -> Self:
        moved = {}  # all other fields, such as Python ints and None, are kept as they are
        for field in dataclasses.fields(self):  # type: ignore[arg-type]
            value = getattr(self, field.name)
            if isinstance(value, (Tensor, Movable)):
                moved[field.name] = getattr(value, method)(*args, **kwargs)
            elif isinstance(value, tuple) and all(isinstance(part, Movable) for part in value):
                moved[field.name] = tuple(getattr(part, method)(*args, **kwargs) for part in value)
        return dataclasses.replace(self, **moved)  # type: ignore[type-var]

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Self:
        """Return a copy with its tensors on `device`. Lengths stay on the host."""
        return self._map("to", device, non_blocking=non_blocking)

    def pin_memory(self) -> Self:
        """Return a copy in page-locked memory, so that `to(..., non_blocking=True)` overlaps with computation."""
        return self._map("pin_memory")


@dataclass(frozen=True)
class Segments(Movable):
    """The boundaries of the views in a stream of T tokens.

    Read `lengths` on the host only, and never inside a compiled region: every new value would compile a new graph.
    Kernels take `cu_seqlens` and `max_seqlen`.
    """

    lengths: tuple[int, ...]
    """Tokens of each view: V Python ints, each at least 1."""
    cu_seqlens: Tensor
    """int32 [V + 1] on the stream's device. View v is tokens cu_seqlens[v] to cu_seqlens[v + 1]."""
    max_seqlen: int
    """Tokens of the longest view; 0 for an empty stream."""

    @classmethod
    def of(cls, lengths: Sequence[int] | NDArray[np.integer]) -> Segments:
        """Return the segments of the given lengths, on the CPU.

        Raises:
            ValueError: a length is below 1.
        """
        counts = np.asarray(lengths, dtype=np.int64)
        # An empty segment has nothing to attend to and no mean.
        if counts.size and counts.min() < 1:
            raise ValueError(f"Every segment needs at least one token, but one has {counts.min()}.")
        cu_seqlens = np.zeros(counts.size + 1, dtype=np.int32)  # the type that FlashAttention takes
        np.cumsum(counts, out=cu_seqlens[1:])
        return cls(tuple(counts.tolist()), torch.from_numpy(cu_seqlens), int(counts.max(initial=0)))

    def __len__(self) -> int:
        return len(self.lengths)

    @property
    def total(self) -> int:
        """Return T, the number of tokens of all views."""
        return sum(self.lengths)


def segment_ids(cu_seqlens: Tensor, total: int) -> Tensor:
    """Return the view of every token: int64 [T].

    Args:
        cu_seqlens: int32 [V + 1], see `Segments`.
        total: T, given by the host so that it need not wait for the device.
    """
    tokens = torch.arange(total, device=cu_seqlens.device, dtype=cu_seqlens.dtype)
    # Not `cu_seqlens[1:]`: before PyTorch 2.13, compiled code on CUDA ignores the offset of a slice (issue 182343).
    return torch.bucketize(tokens, cu_seqlens, right=True) - 1


@dataclass(frozen=True)
class Selection(Movable):
    """A subset of N tokens of a stream, some of every view, in the order of the stream."""

    index: Tensor
    """int64 [N]: rows of the tokens in the stream."""
    segments: Segments
    """How the N tokens divide into the V views of the stream."""
    prefix: int = 0
    """How many of the tokens of each view are no patches, see `Packed.prefix`."""


@dataclass(frozen=True)
class Packed(Movable):
    """A ragged stream of V views."""

    values: Tensor
    """[T, ...]: patches of pixels [T, P * P * C] from the loader, features [T, D] after the network."""
    positions: Tensor
    """[T, 2]: row and column of each token in the grid of its view; whole numbers in the streams of the loader."""
    grids: Tensor
    """int32 [V, 2]: rows and columns of each view's grid, also where only some of its tokens are in the stream."""
    segments: Segments
    prefix: int = 0
    """Number of rows at the beginning of each view that are no patches: the network puts its class token and registers
    there. Their values and positions are 0. Budgets of packs do not count them."""

    def select(self, selection: Selection) -> Packed:
        """Return the stream of the selected tokens. Each view keeps its whole grid."""
        index = selection.index
        return Packed(self.values[index], self.positions[index], self.grids, selection.segments, selection.prefix)

    @property
    def patches(self) -> Tensor:
        """Return which rows are patches: bool [T]."""
        ids = segment_ids(self.segments.cu_seqlens, len(self.positions))
        place = torch.arange(len(ids), device=ids.device) - self.segments.cu_seqlens[ids]
        return place >= self.prefix

    def with_values(self, values: Tensor) -> Packed:
        """Return the same views with other values [T, ...], one for each token."""
        return dataclasses.replace(self, values=values)

    def split(self) -> list[Tensor]:
        """Return the values of each view: V tensors [tokens of the view, ...]."""
        return list(torch.split(self.values, list(self.segments.lengths)))

    @staticmethod
    def of_grids(values: NDArray[np.generic], grids: NDArray[np.integer], prefix: int = 0) -> Packed:
        """Return a stream of whole views, on the CPU.

        Args:
            values: [T, ...], of the patches alone, row by row within each view.
            grids: [V, 2] rows and columns of each view.
            prefix: see `Packed.prefix`.
        """
        grids = np.asarray(grids, dtype=np.int32).reshape(-1, 2)
        lengths = grids.prod(axis=1, dtype=np.int64)  # [V]
        starts = np.cumsum(lengths) - lengths
        token = np.arange(lengths.sum()) - np.repeat(starts, lengths)  # [T], counted from the start of its view
        cols = np.repeat(grids[:, 1], lengths)
        positions = np.stack([token // cols, token % cols], axis=1).astype(np.int32)
        if prefix:
            places = np.repeat(starts, prefix)  # np.insert counts in the array without the new rows
            values, positions = (np.insert(x, places, 0, axis=0) for x in (values, positions))
        return Packed(
            torch.from_numpy(values),
            torch.from_numpy(positions),
            torch.from_numpy(grids),
            Segments.of(lengths + prefix),
            prefix,
        )

    @staticmethod
    def concatenate(streams: Sequence[Packed], segments: Segments | None = None) -> Packed:
        """Return one stream with the views of all `streams`, in order.

        Args:
            streams: all on the same device.
            segments: those of the result, on that device; None: they are made here.
        """
        values = torch.cat([stream.values for stream in streams])
        if segments is None:
            # Made on the host and copied: a training step avoids that by taking them from the loader.
            lengths = [length for stream in streams for length in stream.segments.lengths]
            segments = Segments.of(lengths).to(values.device)
        return Packed(
            values,
            torch.cat([stream.positions for stream in streams]),
            torch.cat([stream.grids for stream in streams]),
            segments,
            streams[0].prefix,
        )
