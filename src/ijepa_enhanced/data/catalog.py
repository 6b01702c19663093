"""The catalog: the size and label of every readable image of a source, from one scan of headers, cached."""

from __future__ import annotations

import dataclasses
import hashlib
import logging
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ijepa_enhanced.data.sources.base import UNREAD, Source
from ijepa_enhanced.errors import UnreadableImage
from ijepa_enhanced.files import replacing

logger = logging.getLogger(__name__)

FORMAT = 2
"""Raised when a cached file means something else than before."""

LISTED = 20
"""Unreadable images that are named before the rest is only counted."""

PATIENCE = 10.0
"""Seconds between two lines about a scan."""

QUANTILES = (5, 25, 50, 75, 95)
"""Percent, of `summary`."""


@dataclass(frozen=True)
class Catalog:
    """The N readable images of a source, in its order."""

    heights: NDArray[np.int32]
    """[N] pixels of the upright image."""
    widths: NDArray[np.int32]
    """[N]"""
    rows: NDArray[np.int64]
    """[N] each image's row in the source, ascending."""
    labels: NDArray[np.int64] | None
    """[N], or None where the source has none."""
    classes: list[str] | None
    """The name of each label, or None."""
    keys: list[str]
    """N names for messages."""
    unreadable: tuple[tuple[str, str], ...]
    """(key, reason) of every image whose header cannot be read."""
    hash: str
    """SHA-256 of rows, sizes, labels, shares and keys: equal wherever the images lie. A part of a catalog keeps the
    whole's."""
    shares: NDArray[np.float64] | None = None
    """[N] the fraction of the epochs that show each image, or None where that is all of them."""

    def class_name(self, label: int) -> str:
        """What users call a class: its name, or where classes have none, its number."""
        return str(label) if self.classes is None else self.classes[label]

    def select(self, images: NDArray[np.integer]) -> Catalog:
        """Some of the images, by position, in that order; every epoch shows all of them."""
        return dataclasses.replace(
            self,
            heights=self.heights[images],
            widths=self.widths[images],
            rows=self.rows[images],
            labels=None if self.labels is None else self.labels[images],
            keys=[self.keys[image] for image in images.tolist()],
            shares=None,
        )


def open_catalog(source: Source, cache: bool = True) -> Catalog:
    """Scan the headers of a source, or read what an earlier scan of the same files found.

    Args:
        source: the images.
        cache: read and write the user's cache folder (`$IJEPA_CACHE`, else `ijepa_enhanced` in `$XDG_CACHE_HOME` or
            `~/.cache`). A cache that cannot be read is made anew; one that cannot be written is a warning.
    """
    path = cache_folder() / f"index-{FORMAT}-{source.fingerprint()}.parquet"
    scan = _load(path) if cache else None
    if scan is None:
        scan = _scan(source)
        # What could not be read for a moment, as over a network, may be there the next time.
        if cache and not any(reason is not None and reason.startswith(UNREAD) for reason in scan[2]):
            _save(path, scan)
    heights, widths, reasons = scan
    readable = np.array([reason is None for reason in reasons], dtype=np.bool_)
    rows = np.flatnonzero(readable)
    labels = None if source.labels is None else source.labels[rows]
    shares = None if source.shares is None else source.shares[rows]
    keys = [source.keys[row] for row in rows.tolist()]
    unreadable = [(key, reason) for key, reason in zip(source.keys, reasons, strict=True) if reason is not None]
    heights, widths = heights[rows], widths[rows]
    digest = hashlib.sha256(os.fsencode("\0".join(keys)))
    for values in (rows, heights, widths, labels, shares):
        digest.update(b"" if values is None else values.tobytes())
    return Catalog(heights, widths, rows, labels, source.classes, keys, tuple(unreadable), digest.hexdigest(), shares)


def report_unreadable(catalog: Catalog, heading: str = "Left out") -> None:
    """Log the images whose header cannot be read, the first `LISTED` with their reason."""
    for key, reason in catalog.unreadable[:LISTED]:
        logger.warning("%s: %s: %s", heading, key, reason)
    if len(catalog.unreadable) > LISTED:
        logger.warning("%s: %d more, which `ijepa index` lists.", heading, len(catalog.unreadable) - LISTED)


def summary(catalog: Catalog) -> dict[str, Any]:
    """What `ijepa index` shows.

    Returns:
        `images`, `unreadable` and `labels` (distinct ones) are counts; `resolution` (sqrt(height * width) in pixels)
        and `aspect` (width / height) map "5%" to "95%" to quantiles, and are empty without images.
    """
    heights, widths = catalog.heights.astype(np.float64), catalog.widths.astype(np.float64)

    def quantiles(values: NDArray[np.float64]) -> dict[str, float]:
        if not len(values):
            return {}
        return {f"{percent}%": round(float(np.percentile(values, percent)), 3) for percent in QUANTILES}

    return {
        "images": len(catalog.rows),
        "unreadable": len(catalog.unreadable),
        "labels": 0 if catalog.labels is None else len(np.unique(catalog.labels)),
        "resolution": quantiles(np.sqrt(heights * widths)),
        "aspect": quantiles(widths / heights),
    }


def cache_folder() -> Path:
    """Where indices are cached."""
    if chosen := os.environ.get("IJEPA_CACHE"):
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "ijepa_enhanced")


_Scan = tuple[NDArray[np.int32], NDArray[np.int32], list[str | None]]


def _scan(source: Source) -> _Scan:
    """Height, width and reason of every image of the source; the sizes of unreadable ones are 0."""
    sizes = np.zeros((2, len(source.keys)), dtype=np.int32)
    reasons: list[str | None] = [None] * len(source.keys)
    said = time.monotonic()
    for row in range(len(source.keys)):
        try:
            sizes[:, row] = source.size(row)
        except UnreadableImage as error:
            reasons[row] = str(error)
        if time.monotonic() - said > PATIENCE:
            said = time.monotonic()
            logger.info("Scanning %s: %d of %d images", source.name, row + 1, len(reasons))
    return sizes[0], sizes[1], reasons


def _load(path: Path) -> _Scan | None:
    import pyarrow.parquet as pq

    try:
        table = pq.read_table(path, columns=["height", "width", "reason"])
        return (table["height"].to_numpy(), table["width"].to_numpy(), table["reason"].to_pylist())
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        logger.warning("The cached catalog %s cannot be read and is made anew: %s", path, error)
        return None


def _save(path: Path, scan: _Scan) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    heights, widths, reasons = scan
    table = pa.table({"height": heights, "width": widths, "reason": pa.array(reasons, pa.string())})
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as partial:
            pq.write_table(table, partial)
    except OSError as error:
        logger.warning("The catalog cannot be cached in %s: %s", path.parent, error)
