"""Images that `ijepa embed` has embedded, in which the page finds the neighbors of an image."""

from __future__ import annotations

import io
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from ijepa_enhanced.embed.folder import EmbeddingFolder, unit_vectors
from ijepa_enhanced.embed.index import SearchIndex
from ijepa_enhanced.embed.search import nearest
from ijepa_enhanced.embed.settings import hash_encoder
from ijepa_enhanced.embed.sheet import Pictures
from ijepa_enhanced.encoder import Encoder
from ijepa_enhanced.errors import RequestError, UserError

IN_MEMORY = 100_000
"""Galleries of at most this many images are kept in memory: 154 MB if D = 384. Larger ones need an index."""
COUNT = 8
"""Neighbors of an image."""
QUALITY = 85
"""Of JPEG thumbnails."""


class Neighbor(NamedTuple):
    """An image of the gallery that is similar to a query."""

    row: int
    key: str
    label: str | None
    score: float
    """Cosine similarity."""


class Gallery:
    """A folder of embeddings that is searched many times.

    Args:
        path: the folder.
        encoder: the one that made it.

    Raises:
        RequestError: it is no such folder, or another encoder made it, or it needs an index and usearch is missing.
    """

    def __init__(self, path: Path, encoder: Encoder) -> None:
        self.folder = EmbeddingFolder.open(path)
        if self.folder.settings.encoder_hash != hash_encoder(encoder):
            raise RequestError(
                f"--gallery {path} contains embeddings of another encoder ({self.folder.settings.encoder}), which "
                "cannot be compared. Run `ijepa embed` with this encoder and another output folder."
            )
        self.pictures = Pictures(self.folder.settings)
        small = self.folder.images <= IN_MEMORY
        self._blocks = list(self.folder.blocks()) if small else []
        self._index = None if small else SearchIndex(self.folder, lambda rows: None)

    def nearest(self, vectors: NDArray[np.float32]) -> list[list[Neighbor]]:
        """Return the `COUNT` most similar images of each of n features [n, D]; none for a feature that is zero."""
        queries, wrong = unit_vectors(vectors.copy())
        own = torch.full((len(queries),), -1)
        if self._index is not None:
            found = self._index.nearest(queries, own, COUNT)
        else:
            found = nearest(queries, own, self._blocks, COUNT, torch.device("cpu"), lambda rows: None)
        found = [[] if number in wrong else matches for number, matches in enumerate(found)]
        rows = self.folder.rows(match.row for matches in found for match in matches)
        return [
            [Neighbor(match.row, rows[match.row].key, rows[match.row].label, match.score) for match in matches]
            for matches in found
        ]

    def thumbnail(self, row: int) -> bytes | None:
        """Return an image as a small JPEG file; None if there is no such row, or its image cannot be read any more."""
        settings = self.folder.settings
        if not 0 <= row < settings.images or row // settings.rows_per_file not in self.folder.files:
            return None
        try:
            image = self.pictures.read(self.folder.rows([row])[row])
        except (UserError, OSError):
            return None
        file = io.BytesIO()
        image.save(file, "JPEG", quality=QUALITY)
        return file.getvalue()
