"""The packed stream: the one data structure that flows from the loader to the loss.

Views of any size lie one after another in one ragged stream without padding ("Patch n' Pack", NaViT,
arXiv 2307.06304). Shape legend, used by every docstring of the package (see docs/stream.md):

    T tokens   V views (segments)   D width   H heads   K head width   P patch side   C channels
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
    """Moving a dataclass moves every field that can be moved."""

    def _map(self, method: str, *args: Any, **kwargs: Any) -> Self:
        moved = {}
        for field in dataclasses.fields(self):  # type: ignore[arg-type]
            value = getattr(self, field.name)
            if isinstance(value, (Tensor, Movable)):
                moved[field.name] = getattr(value, method)(*args, **kwargs)
            elif isinstance(value, tuple) and all(isinstance(part, Movable) for part in value):
                moved[field.name] = tuple(getattr(part, method)(*args, **kwargs) for part in value)
        return dataclasses.replace(self, **moved)  # type: ignore[type-var]

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Self:
        """The same on `device`; host-side lengths stay on the host."""
        return self._map("to", device, non_blocking=non_blocking)

    def pin_memory(self) -> Self:
        """The same in page-locked memory, so that `to(..., non_blocking=True)` overlaps with computing."""
        return self._map("pin_memory")


@dataclass(frozen=True)
class Segments(Movable):
    """Where each view begins and ends in a stream of T tokens.

    `lengths` is for the host alone and is never read inside a compiled region, where every new value would
    make a new graph; kernels take `cu_seqlens` and `max_seqlen`.
    """

    lengths: tuple[int, ...]
    """Tokens of each view, V Python ints, each at least 1."""
    cu_seqlens: Tensor
    """int32 [V + 1] on the stream's device: view v is tokens cu_seqlens[v] to cu_seqlens[v + 1]."""
    max_seqlen: int
    """The longest view's tokens; 0 for an empty stream."""

    @classmethod
    def of(cls, lengths: Sequence[int] | NDArray[np.integer]) -> Segments:
        """Segments of the given lengths, on the CPU.

        Raises:
            ValueError: a length is below 1.
        """
        counts = np.asarray(lengths, dtype=np.int64)
        if counts.size and counts.min() < 1:
            raise ValueError(f"Every segment needs at least one token, but one has {counts.min()}.")
        cu_seqlens = np.zeros(counts.size + 1, dtype=np.int32)
        np.cumsum(counts, out=cu_seqlens[1:])
        return cls(tuple(counts.tolist()), torch.from_numpy(cu_seqlens), int(counts.max(initial=0)))

    def __len__(self) -> int:
        return len(self.lengths)

    @property
    def total(self) -> int:
        """T, the tokens of all views."""
        return sum(self.lengths)


def segment_ids(cu_seqlens: Tensor, total: int) -> Tensor:
    """The view of every token: int64 [T] from `cu_seqlens` [V + 1], without asking the device for a length."""
    tokens = torch.arange(total, device=cu_seqlens.device, dtype=cu_seqlens.dtype)
    # Not of cu_seqlens[1:]: before PyTorch 2.13 compiled graphs forget on CUDA where a slice begins (issue 182343).
    return torch.bucketize(tokens, cu_seqlens, right=True) - 1


@dataclass(frozen=True)
class Selection(Movable):
    """Some tokens of every view of a stream, in the stream's order."""

    index: Tensor
    """int64 [N]: the tokens' rows in the stream they are taken from."""
    segments: Segments
    """How the N tokens divide into the same V views."""


@dataclass(frozen=True)
class Packed(Movable):
    """A ragged stream of V views."""

    values: Tensor
    """[T, ...]: uint8 patches [T, P * P * C] from the loader, features [T, D] further on."""
    positions: Tensor
    """[T, 2]: each token's row and column in its own view's grid (integers until tokens are merged)."""
    grids: Tensor
    """int32 [V, 2]: rows and columns of each view's whole grid."""
    segments: Segments

    def select(self, selection: Selection) -> Packed:
        """The stream of the selected tokens; views keep their whole grids."""
        index = selection.index
        return Packed(self.values[index], self.positions[index], self.grids, selection.segments)

    def with_values(self, values: Tensor) -> Packed:
        """The same views with other values, one for each token: [T, ...]."""
        return dataclasses.replace(self, values=values)

    def split(self) -> list[Tensor]:
        """The values of each view: V tensors [tokens of the view, ...]."""
        return list(torch.split(self.values, list(self.segments.lengths)))

    @staticmethod
    def of_grids(values: NDArray[np.generic], grids: NDArray[np.integer]) -> Packed:
        """A stream of whole views on the CPU: `values` [T, ...] in row-major order of each of the `grids` [V, 2]."""
        grids = np.asarray(grids, dtype=np.int32).reshape(-1, 2)
        lengths = grids.prod(axis=1, dtype=np.int64)
        starts = np.cumsum(lengths) - lengths
        token = np.arange(lengths.sum()) - np.repeat(starts, lengths)
        cols = np.repeat(grids[:, 1], lengths)
        positions = np.stack([token // cols, token % cols], axis=1).astype(np.int32)
        return Packed(
            torch.from_numpy(values),
            torch.from_numpy(positions),
            torch.from_numpy(grids),
            Segments.of(lengths),
        )

    @staticmethod
    def concatenate(streams: Sequence[Packed], segments: Segments | None = None) -> Packed:
        """One stream of all views of `streams`, in order; all on the CPU or all on one device.

        Its `segments` are made on the host, and brought there, where they are not given.
        """
        values = torch.cat([stream.values for stream in streams])
        if segments is None:
            lengths = [length for stream in streams for length in stream.segments.lengths]
            segments = Segments.of(lengths).to(values.device)
        return Packed(
            values,
            torch.cat([stream.positions for stream in streams]),
            torch.cat([stream.grids for stream in streams]),
            segments,
        )
