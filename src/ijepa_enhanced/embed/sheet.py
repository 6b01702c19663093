"""A contact sheet: each query, and to the right of it the images that are similar to it."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from PIL import Image

from ijepa_enhanced.data.catalog import open_catalog
from ijepa_enhanced.data.decode import picture_of
from ijepa_enhanced.data.opening import Opened, open_image
from ijepa_enhanced.data.sources.base import Source
from ijepa_enhanced.data.sources.open import open_source
from ijepa_enhanced.embed.folder import Row
from ijepa_enhanced.embed.settings import EmbedSettings
from ijepa_enhanced.errors import RequestError, UserError
from ijepa_enhanced.visualize.tiles import TILE, Tile

logger = logging.getLogger(__name__)

QUERY = "query"
"""Title of the tile of a query. Those of its matches are scores."""


@dataclass
class Pictures:
    """Reads the images of a folder's rows: from their files, or else from the source that was embedded."""

    settings: EmbedSettings
    failed: list[str] = field(default_factory=list)
    """Why images could not be read."""

    def of_row(self, row: Row, title: str, framed: bool = False) -> Tile:
        """Return the tile of an image of the folder."""
        try:
            return Tile(self.read(row), title, row.key, framed)
        except (UserError, OSError) as error:
            self.failed.append(f"{row.key}: {error}")
            return Tile(None, title, row.key, framed)

    def read(self, row: Row) -> Image.Image:
        """Return the image of a row, see `small`.

        Raises:
            UserError: it cannot be decoded, or its source is not there any more.
            OSError: its file cannot be read.
        """
        return small(self.source.open(row.number) if row.path is None else open_image(Path(row.path).read_bytes()))

    @cached_property
    def source(self) -> Source:
        """Return the source that was embedded.

        Raises:
            RequestError: it is not there any more, or its images have changed.
        """
        source = open_source(self.settings.source)
        open_catalog(source)
        if source.listing.hash != self.settings.source_hash:
            raise RequestError(f"the images of {self.settings.source} have changed since they were embedded")
        return source

    def report(self) -> None:
        """Warn if images could not be read."""
        if self.failed:
            logger.warning(
                "%d images cannot be read any more, so the contact sheet shows gray tiles. The first: %s",
                len(self.failed),
                self.failed[0],
            )


def query_tile(path: str) -> Tile:
    """Return the tile of a query that is an image file."""
    return Tile(small(open_image(Path(path).read_bytes())), QUERY, path, framed=True)


def small(image: Opened) -> Image.Image:
    """Return an image in RGB, shrunk to about twice the size of a tile if it is larger.

    Raises:
        UnreadableImage: the pixels cannot be decoded.
    """
    return Image.fromarray(picture_of(image, 2 * TILE))
