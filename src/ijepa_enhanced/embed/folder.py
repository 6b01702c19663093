"""A folder that `ijepa embed` wrote: its complete Parquet files, read a part at a time."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ijepa_enhanced.embed.rows import valid_text
from ijepa_enhanced.embed.run import missing_files, path_of
from ijepa_enhanced.embed.settings import EmbedSettings, load_settings
from ijepa_enhanced.errors import RequestError

if TYPE_CHECKING:
    import pyarrow as pa
    import pyarrow.parquet as pq

BLOCK = 2**14
"""Most rows of a block: 24 MiB of float32 if D = 384."""
COMPARED_KEYS = 5000
"""Keys that an unknown one is compared with, to suggest another: up to a second."""


class Block(NamedTuple):
    """The features of n images, on the host."""

    rows: NDArray[np.int64]
    """[n] rows of the source, ascending."""
    vectors: Tensor
    """float32 [n, D], each of length 1."""


class Row(NamedTuple):
    """What a folder tells about an image besides its features."""

    number: int
    """Its row in the source."""
    key: str
    path: str | None
    """Of its file at the time of `ijepa embed`; None if the image is not a file of its own."""
    label: str | None


@dataclass(frozen=True)
class EmbeddingFolder:
    """The complete files of a folder. Nothing of them is kept in memory."""

    path: Path
    settings: EmbedSettings
    files: tuple[int, ...]
    """Their numbers, ascending."""

    @classmethod
    def open(cls, path: Path) -> EmbeddingFolder:
        """Open a folder.

        Raises:
            RequestError: `ijepa embed` did not write it, or wrote another format, or has not completed a file yet.
        """
        settings = load_settings(path)
        if settings.file_format != "parquet":
            raise RequestError(
                f"{path} contains {settings.file_format} files, but only Parquet files can be searched. Run "
                "`ijepa embed` with --format parquet and another output folder."
            )
        missing = {*missing_files(path, settings, range(settings.files))}
        files = tuple(file for file in range(settings.files) if file not in missing)
        if not files:
            raise RequestError(f"{path} contains no complete file yet. Run `ijepa embed` with --resume.")
        return cls(path, settings, files)

    @property
    def images(self) -> int:
        """Return the number of rows of all files, readable or not."""
        return sum(len(self.settings.rows_of(file)) for file in self.files)

    def path_of(self, file: int) -> Path:
        """Return the path of a file."""
        return path_of(self.path, self.settings, file)

    def blocks(self, files: Iterable[int] | None = None) -> Iterator[Block]:
        """Yield the features of readable images, at least one and at most `BLOCK` at a time.

        Args:
            files: which, in the order to read them. None: all.

        Raises:
            RequestError: a file cannot be read, or a feature is not finite or is zero.
        """
        for file in self.files if files is None else files:
            start = self.settings.rows_of(file).start
            with self._opened(file) as opened:
                for batch in opened.iter_batches(BLOCK, columns=["embedding"]):
                    block = self._block(file, start, batch.column(0))
                    if len(block.rows):
                        yield block
                    start += len(batch)

    def vectors(self, numbers: Sequence[int]) -> Tensor:
        """Return the features of some rows: float32 [n, D], each of length 1.

        Raises:
            RequestError: an image has no feature because it cannot be decoded; or as `blocks`.
        """
        found: dict[int, Tensor] = {}
        for file, inside in self._by_file(numbers):
            with self._opened(file) as opened:
                table = opened.read(["key", "error", "embedding"])
            start = self.settings.rows_of(file).start
            block = self._block(file, start, table["embedding"].combine_chunks())
            for number in inside:
                position = int(np.searchsorted(block.rows, number))
                if position == len(block.rows) or block.rows[position] != number:
                    key, reason = (table[name][number - start].as_py() for name in ("key", "error"))
                    raise RequestError(f"{key} has no embedding, because it cannot be decoded: {reason}.")
                found[number] = block.vectors[position]
        return torch.stack([found[number] for number in numbers])

    def rows(self, numbers: Iterable[int]) -> dict[int, Row]:
        """Return what the folder tells about some rows.

        Raises:
            RequestError: a file cannot be read.
        """
        found: dict[int, Row] = {}
        for file, inside in self._by_file(numbers):
            with self._opened(file) as opened:
                table = opened.read(["key", "path", "label"])
            start = self.settings.rows_of(file).start
            values = table.take([number - start for number in inside]).to_pylist()
            found |= {number: Row(number, **row) for number, row in zip(inside, values, strict=True)}
        return found

    def find(self, keys: Sequence[str]) -> list[int]:
        """Return the row of each key; the first one if several images have this key.

        Raises:
            RequestError: there is no such key. The message suggests a similar one.
        """
        import pyarrow as pa
        import pyarrow.compute as pc

        keys = [valid_text(key) or "" for key in keys]
        found: dict[str, int] = {}
        known: list[str] = []
        for file in self.files:
            with self._opened(file) as opened:
                column = opened.read(["key"])["key"].combine_chunks()
            start = self.settings.rows_of(file).start
            for key, place in zip(keys, pc.index_in(pa.array(keys), value_set=column).to_pylist(), strict=True):
                if place is not None:
                    found.setdefault(key, start + place)
            if len(found) == len({*keys}):
                break
            known += column.slice(0, COMPARED_KEYS - len(known)).to_pylist()
        for key in keys:
            if key not in found:
                close = difflib.get_close_matches(key, known, n=1)
                hint = f" Did you mean '{close[0]}'?" if close else ""
                raise RequestError(f"{self.path} has no image with the key '{key}'.{hint}")
        return [found[key] for key in keys]

    def _by_file(self, numbers: Iterable[int]) -> Iterator[tuple[int, list[int]]]:
        """Yield each file that holds some of the rows, and these rows."""
        for file, inside in groupby(sorted({*numbers}), lambda number: number // self.settings.rows_per_file):
            yield file, [*inside]

    @contextmanager
    def _opened(self, file: int) -> Iterator[pq.ParquetFile]:
        """Open a file; what cannot be read raises RequestError."""
        import pyarrow.parquet as pq

        path, rows = self.path_of(file), len(self.settings.rows_of(file))
        try:
            with pq.ParquetFile(path) as opened:
                if opened.metadata.num_rows != rows:
                    raise ValueError(f"it has {opened.metadata.num_rows} rows, not {rows}")
                yield opened
        except (OSError, ValueError) as error:
            if isinstance(error, RequestError):
                raise
            raise RequestError(
                f"{path} cannot be read: {error}. Delete it and run `ijepa embed` with --resume."
            ) from error

    def _block(self, file: int, start: int, column: pa.FixedSizeListArray) -> Block:
        """Return the features of consecutive rows, the first of which is `start`; rows without a feature are left out.

        Raises:
            RequestError: a feature is not finite or is zero.
        """
        rows = start + np.flatnonzero(column.is_valid().to_numpy(zero_copy_only=False))
        values = column.flatten().to_numpy().astype(np.float32)  # a copy: Arrow's memory is read-only
        vectors, wrong = unit_vectors(values.reshape(len(rows), self.settings.width))
        if len(wrong):
            (row,) = self.rows([int(rows[wrong[0]])]).values()
            raise RequestError(
                f"The embedding of {row.key} in {self.path_of(file)} is zero or not finite, so it cannot be compared. "
                "Delete this file and run `ijepa embed` with --resume."
            )
        return Block(rows, vectors)


def unit_vectors(values: NDArray[np.float32]) -> tuple[Tensor, list[int]]:
    """Scale vectors [n, D] to length 1 in place; also return which cannot be: zero or not finite ones."""
    with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
        # On one thread: waiting for a second one takes longer than the sums of a thousand rows.
        norms = np.linalg.norm(values, axis=1, keepdims=True)
        values /= norms
    return torch.from_numpy(values), np.flatnonzero(~(np.isfinite(norms) & (norms > 0))).tolist()
