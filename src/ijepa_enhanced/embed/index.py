"""Approximate search with a graph of neighbors (HNSW, arXiv 1603.09320) by usearch, which is optional."""

from __future__ import annotations

import errno
import hashlib
import logging
import os
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from ijepa_enhanced.embed.folder import EmbeddingFolder
from ijepa_enhanced.embed.search import SCALE, Duplicate, Match, Report, chunks
from ijepa_enhanced.errors import RequestError
from ijepa_enhanced.files import remove_partials, replacing

if TYPE_CHECKING:  # an extra
    from usearch.index import Index

logger = logging.getLogger(__name__)

PREFIX, SUFFIX = "_index-", ".usearch"
"""Readers of Parquet folders ignore names that start with an underscore."""
SHAPE: dict[str, Any] = {
    "metric": "cos",
    "dtype": "f16",
    "connectivity": 32,
    "expansion_add": 128,
    "expansion_search": 128,
}
"""Of the graph. With these, recall@10 is 99.56% on 200,000 vectors of a random walk, and 94% if they form 200 separate
groups (docs/log.md, 2026-11-28)."""
NEIGHBORS = 16
"""Other images that each image is compared with to find near-duplicates."""


class SearchIndex:
    """The index of a folder, mapped from a file in it that is made if it is missing or older than the embeddings.

    Args:
        folder: what to search.
        report: called with the number of rows that were added to a new index.

    Raises:
        RequestError: usearch is not installed; or as `EmbeddingFolder.blocks`.
        OSError: the index cannot be written.
    """

    def __init__(self, folder: EmbeddingFolder, report: Report) -> None:
        try:
            from usearch.index import Index
        except ImportError as error:
            raise RequestError(
                f"Searching {folder.path} with an index requires usearch. Install it with: "
                "pip install 'ijepa-enhanced[search]'"
            ) from error
        self.folder = folder
        self.path = folder.path / f"{PREFIX}{digest(folder)}{SUFFIX}"
        self.index = self._mapped(self.path)
        if self.index is None:
            logger.info("Building %s.", self.path)
            remove_partials(folder.path, PREFIX)
            index = Index(ndim=folder.settings.width, **SHAPE)
            add_all(index, folder, report)
            with replacing(self.path) as temporary:
                with suppress(RuntimeError):  # usearch's word for a full disk, if it notices it
                    index.save(temporary)
                written = self._mapped(temporary)
                if written is None or len(written) != len(index):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.path))
            for other in folder.path.glob(f"{PREFIX}*{SUFFIX}"):
                if other != self.path:
                    other.unlink(missing_ok=True)
            self.index = index

    def _mapped(self, path: Path) -> Index | None:
        """Map the index in a file. Return None if the file is missing or damaged."""
        from usearch.index import Index

        if not path.is_file():
            return None
        try:
            return Index(path=path, view=True, ndim=self.folder.settings.width, **SHAPE)
        except (RuntimeError, ValueError):
            return None

    def nearest(self, queries: Tensor, own: Tensor, count: int) -> list[list[Match]]:
        """Return the most similar images of each query; see `search.nearest`, which this approximates."""
        # One more, for the query itself.
        return [
            [match for match in found if match.row != row][:count]
            for found, row in zip(self._search(queries, count + 1), own.tolist(), strict=True)
        ]

    def duplicates(self, threshold: float, report: Report) -> list[Duplicate]:
        """Return images that are similar to an earlier one; see `search.duplicates`, which this approximates.

        Only pairs one of which is among the `NEIGHBORS` nearest images of the other are found.
        """
        best: dict[int, tuple[float, int]] = {}
        for block in self.folder.blocks():
            for row, found in zip(block.rows.tolist(), self._search(block.vectors, NEIGHBORS + 1), strict=True):
                for match in found:
                    if match.row != row and match.score >= threshold:
                        later, earlier = max(row, match.row), min(row, match.row)
                        best[later] = max(best.get(later, (-1.0, 0)), (match.score, -earlier))
            report(len(block.rows))
        pairs = [Duplicate(row, -earlier, score) for row, (score, earlier) in best.items()]
        return sorted(pairs, key=lambda each: (-each.score, each.row))

    def _search(self, queries: Tensor, count: int) -> list[list[Match]]:
        """Return the `count` most similar images of each query, the best first; fewer if there are fewer."""
        assert self.index is not None
        found = self.index.search(queries.cpu().numpy(), count)
        # usearch returns no batch for a single query.
        batch: list[Any] = [found] if len(queries) == 1 else [found[number] for number in range(len(queries))]
        return [
            sorted(
                (
                    Match(int(row), round((1 - float(distance)) * SCALE) / SCALE)
                    for row, distance in zip(one.keys, one.distances, strict=True)
                ),
                key=lambda match: (-match.score, match.row),
            )
            for one in batch
        ]


def add_all(index: Index, folder: EmbeddingFolder, report: Report) -> None:
    """Add all images in random order.

    Neighbors in a source are often similar. In their own order, 5% of the vectors of a random walk end up where no
    search reaches them (docs/log.md, 2026-11-28).
    """
    rng = np.random.default_rng(0)
    for chunk in chunks(folder.blocks(rng.permutation(folder.files).tolist())):
        order = rng.permutation(len(chunk.rows))
        index.add(chunk.rows[order], chunk.vectors.numpy()[order])
        report(len(order))


def digest(folder: EmbeddingFolder) -> str:
    """Return what tells an index from those of other files, of another shape and of other versions of usearch."""
    texts = [version("usearch"), repr(SHAPE)]
    for file in folder.files:
        path = folder.path_of(file)
        status = path.stat()
        texts.append(f"{path.name} {status.st_size} {status.st_mtime_ns}")
    return hashlib.sha256("\n".join(texts).encode()).hexdigest()[:16]
