"""Unreadable images, and how many of them a run tolerates."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterable

import numpy as np

from ijepa_enhanced.data.catalog import LISTED, Catalog, report_unreadable
from ijepa_enhanced.errors import RunError

logger = logging.getLogger(__name__)


class Unreadable:
    """The unreadable images of a run, each counted once.

    Args:
        catalog: of the training images. Images whose header cannot be read count from the start.
        limit: fraction of the images that may be unreadable.

    Raises:
        RunError: more headers than the limit allows cannot be read.
    """

    def __init__(self, catalog: Catalog, limit: float) -> None:
        self.catalog = catalog
        self.limit = limit
        self.found: dict[int, str] = {}
        """Row and reason of each image whose header can be read but whose pixels cannot."""
        self._check()
        report_unreadable(catalog)

    def __len__(self) -> int:
        return len(self.catalog.unreadable) + len(self.found)

    def add(self, unreadable: Iterable[tuple[int, str]]) -> None:
        """Count images that could not be decoded, given by row and reason, and log those that are new.

        Raises:
            RunError: there are now more unreadable images than the limit allows.
        """
        for row, reason in unreadable:
            if row not in self.found:
                self.found[row] = reason
                logger.warning("Skipped %s: %s", self.key(row), reason)
                self._check()

    def key(self, row: int) -> str:
        """Return the key of a row of the source."""
        # Rows of the catalog ascend, with gaps where a header cannot be read.
        return self.catalog.key(int(np.searchsorted(self.catalog.rows, row)))

    def _check(self) -> None:
        """Raise RunError, with the first images and their reasons, if there are more than the limit allows."""
        images = len(self.catalog.rows) + len(self.catalog.unreadable)
        if len(self) <= self.limit * images:
            return
        decoded = ((self.key(row), reason) for row, reason in self.found.items())
        shown = itertools.islice(itertools.chain(self.catalog.unreadable, decoded), LISTED)
        listed = "\n".join(f"  {key}: {reason}" for key, reason in shown)
        more = f"\n  and {len(self) - LISTED} more" if len(self) > LISTED else ""
        raise RunError(
            f"{len(self)} of {images} images cannot be read, but data.max_unreadable = {self.limit} allows only "
            f"{100 * self.limit:.4g}%. Unreadable images:\n{listed}{more}\nRemove these images, or raise "
            "--data.max_unreadable."
        )
