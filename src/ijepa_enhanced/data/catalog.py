"""The catalog: key, label, location and size of every image of a source, in one file that all processes map.

The file is made once, by one process, and lies in the user's cache folder. `ijepa scan` makes it again.
"""

from __future__ import annotations

import dataclasses
import fcntl
import hashlib
import itertools
import logging
import os
import shlex
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ijepa_enhanced.data.headers import Unfinished, list_and_scan, scan_again
from ijepa_enhanced.data.listing import Listing, Statistics, map_listing, save_listing
from ijepa_enhanced.data.sources.base import UNREAD, Source
from ijepa_enhanced.data.sources.mixed import MixedSource
from ijepa_enhanced.data.sources.names import listed

logger = logging.getLogger(__name__)

LISTED = 20
"""Unreadable images that are named before the rest is only counted."""

QUANTILES = (5, 25, 50, 75, 95)
"""Percentiles in `summary`."""


@dataclass(frozen=True, eq=False)
class Catalog:
    """The N readable images of a source in its order, or some of them in an order of their own."""

    heights: NDArray[np.int32]
    """[N] pixels of the upright image."""
    widths: NDArray[np.int32]
    """[N]"""
    rows: NDArray[np.int64]
    """[N] each image's row in the source, ascending in a whole catalog."""
    labels: NDArray[np.int64] | None
    """[N], -1 for images without a label; None if no image of the source has one."""
    classes: list[str] | None
    """The name of each label, or None."""
    hash: str
    """SHA-256 of keys, labels, sizes and shares: the same wherever the images lie. A part of a catalog keeps the hash
    of the whole."""
    shares: NDArray[np.float64] | None = None
    """[N] fraction of the epochs that show each image, in a mixture; None if all epochs show all images."""
    source: Source | None = None
    """Knows the keys, and which images are unreadable; None for sizes without images."""

    def key(self, position: int) -> str:
        """Return the name of an image for messages."""
        row = int(self.rows[position])
        return str(row) if self.source is None else self.source.key(row)

    @cached_property
    def unreadable(self) -> Unreadable:
        """All images of the source whose header cannot be read."""
        return Unreadable(self.source)

    def class_name(self, label: int) -> str:
        """Return what users call a class: its name, or if classes have no names, its number."""
        if label < 0:
            return "no label"
        return str(label) if self.classes is None else self.classes[label]

    def select(self, positions: NDArray[np.integer]) -> Catalog:
        """Return some of the images, in the order of `positions`; every epoch shows all of them."""
        return dataclasses.replace(
            self,
            heights=self.heights[positions],
            widths=self.widths[positions],
            rows=self.rows[positions],
            labels=None if self.labels is None else self.labels[positions],
            shares=None,
        )

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle the source alone if these are all its readable images: its mapped listing holds the columns."""
        if self.source is not None:
            whole = _catalog_of(self.source)
            same = (np.array_equal(getattr(self, name), getattr(whole, name)) for name in ("rows", "labels", "shares"))
            if self.hash == whole.hash and all(same):
                return _catalog_of, (self.source,)
        return Catalog, tuple(getattr(self, field.name) for field in dataclasses.fields(self))


class Unreadable:
    """Key and reason of every image of a source whose header cannot be read, each made when it is asked for."""

    def __init__(self, source: Source | None) -> None:
        self.source = source
        sizes = None if source is None else source.listing.sizes
        self.rows = np.empty(0, np.int64) if sizes is None else np.flatnonzero(sizes.heights == 0)

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[tuple[str, str]]:
        for row in self.rows.tolist():
            assert self.source is not None
            assert self.source.listing.sizes is not None
            yield self.source.key(row), self.source.listing.sizes.reasons[row]


def open_catalog(source: Source, cache: bool = True, retry: bool = False, keep: bool = False) -> Catalog:
    """Map the catalog of a source, or make it: list the images and read their headers.

    If several processes ask for a catalog that is not there, one of them makes it and the others wait. A scan that was
    stopped goes on where it was. A catalog that is damaged, or older than the images or this program, is made again;
    `Source.fingerprint` tells which changes of the images are noticed.

    Args:
        source: the images. It reads them by means of the catalog from now on.
        cache: keep the catalog in `cache_folder`. If that cannot be written to, a warning says so.
        retry: read the headers again that the disk or the network did not give at the last scan. One more readable
            image is another catalog hash, so that runs on these images cannot resume.
        keep: use the catalog even if images were added or removed since, so that a run can resume. A warning is logged.

    Raises:
        SourceError: the source cannot be listed, or holds no image.
    """
    source.attach(partial(_listing_of, cache=cache, retry=retry, keep=keep))
    return _catalog_of(source)


def keep_statistics(source: Source, statistics: Statistics) -> None:
    """Store the channel statistics of a source in its catalog file. Do nothing if the catalog is not a file."""

    def kept(leaf: Source) -> Listing:
        listing = leaf.listing.with_statistics(statistics)
        return listing if leaf.listing.path is None else _kept(listing, catalog_path(leaf), leaf.name)

    source.attach(kept)


def scan(source: Source) -> dict[str, Any]:
    """Make the catalog of a source again, and return its `summary`; raises errors as `open_catalog` does."""
    source.attach(partial(_listing_of, again=True))
    report_notes(source)
    return summary(_catalog_of(source))


def report_notes(source: Source) -> None:
    """Log what was read of a source, and what users must know about it, such as shards that are cut off."""
    for leaf in source.sources if isinstance(source, MixedSource) else (source,):
        logger.info("Images: %s", taken(leaf))
    for note in source.listing.notes:
        logger.warning("%s", note)


def taken(source: Source) -> str:
    """Return what was read of a source: its kind, split, images and classes, and the files that were ignored."""
    listing = source.listing
    facts = [source.kind, *([source.split] if source.split else []), _counted(len(listing), "image")]
    if listing.labels is None:
        facts.append("no labels")
    else:
        labelled = listing.labels[listing.labels >= 0]
        facts.append(_counted(len(np.unique(labelled)), "class", "es"))
        if len(labelled) < len(listing):
            facts.append(f"{_counted(len(listing) - len(labelled), 'image')} without a label")
    ignored = Counter(source.beside) + Counter(listing.passed_over)
    return f"{source.name}: {', '.join(facts)}" + (f"; ignored: {listed(ignored)}" if ignored else "")


def _counted(count: int, what: str, plural: str = "s") -> str:
    return f"{count:,} {what}{'' if count == 1 else plural}"


def report_unreadable(catalog: Catalog, source: str = "") -> None:
    """Log the notes of a source and the images whose header cannot be read, the first `LISTED` with the reason.

    Opening a catalog says nothing, since a command may open it several times: call this once for each command.

    Args:
        catalog: of the source.
        source: what the user called it, for commands that read several.
    """
    of = f" of {source}" if source else ""
    name = "SOURCE" if catalog.source is None else shlex.quote(catalog.source.name)
    if catalog.source is not None:
        report_notes(catalog.source)
    for key, reason in itertools.islice(catalog.unreadable, LISTED):
        logger.warning("Skipped %s%s: %s", key, of, reason)
    if len(catalog.unreadable) > LISTED:
        more = len(catalog.unreadable) - LISTED
        logger.warning("Skipped %d more images%s. Run `ijepa scan %s` to list them.", more, of, name)
    if any(reason.startswith(UNREAD) for _, reason in catalog.unreadable):
        logger.warning(
            "Some images could not be read from the disk or network. Run `ijepa scan %s` to try again.", name
        )


def summary(catalog: Catalog) -> dict[str, Any]:
    """Return what `ijepa scan` shows.

    Returns:
        `images`, `unreadable` and `labels` (different ones) are counts; `resolution` (sqrt(height * width) in pixels)
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
        "labels": 0 if catalog.labels is None else int(np.count_nonzero(np.unique(catalog.labels) >= 0)),
        "resolution": quantiles(np.sqrt(heights * widths)),
        "aspect": quantiles(widths / heights),
    }


def cache_folder() -> Path:
    """Return the user's cache folder.

    It is `$IJEPA_CACHE`, or `ijepa_enhanced` in `$XDG_CACHE_HOME` or `~/.cache`, or for a user without a home a folder
    among the temporary files.
    """
    if chosen := os.environ.get("IJEPA_CACHE"):
        return Path(chosen)
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "ijepa_enhanced")
    except RuntimeError:
        return Path(tempfile.gettempdir(), f"ijepa_enhanced-{os.getuid()}")


def catalog_path(source: Source) -> Path:
    """Return the file of a source's catalog."""
    identity = hashlib.sha256("\0".join(source.identity()).encode("utf-8", "surrogateescape")).hexdigest()
    return cache_folder() / f"catalog-{identity[:32]}.arrow"


def _catalog_of(source: Source) -> Catalog:
    listing = source.listing
    assert listing.sizes is not None
    rows, heights, widths = listing.sizes.readable()
    labels, shares = listing.labels, listing.shares
    if len(rows) < len(listing):
        labels = None if labels is None else labels[rows]
        shares = None if shares is None else shares[rows]
    return Catalog(heights, widths, rows, labels, listing.classes, listing.hash, shares, source)


def _listing_of(
    source: Source, cache: bool = True, retry: bool = False, again: bool = False, keep: bool = False
) -> Listing:
    """Return the listing of a source with sizes, mapped from its catalog if that can be kept."""
    if not cache:
        return list_and_scan(source, Unfinished(None))
    path = catalog_path(source)
    listing = None if again else _find(source, path, keep)[0]
    if listing is None:
        with _alone(path, source.name):
            # Another process may have made it while this one waited.
            listing, why_not = (None, "") if again else _find(source, path, keep)
            if listing is None:
                if why_not:
                    logger.info("%s", why_not)
                unfinished = Unfinished(path.with_suffix(".partial"))
                listing = _kept(list_and_scan(source, unfinished), path, source.name)
                unfinished.remove()
    elif retry and listing.sizes is not None and (sizes := scan_again(source, listing.sizes)) is not None:
        listing = _kept(listing.with_sizes(sizes), path, source.name)
    return listing


def _find(source: Source, path: Path, keep: bool) -> tuple[Listing | None, str]:
    """Return the kept listing of a source. If it cannot be used, return None and the reason, if there is one.

    Args:
        source: the images.
        path: file of its catalog.
        keep: use it even if the images have changed since.
    """
    try:
        listing = map_listing(path)
    except (FileNotFoundError, NotADirectoryError, PermissionError):
        return None, ""
    except (OSError, ValueError) as error:
        return None, f"Rebuilding the catalog of {source.name}: {path} cannot be used ({error})."
    source.attach(lambda _: listing)
    if source.fingerprint() != listing.fingerprint:
        if keep:
            logger.warning(
                "%s has changed since the last scan. The run continues with the images that it has; those that are "
                "gone count as unreadable.",
                source.name,
            )
            return listing, ""
        return None, f"{source.name} has changed since the last scan. Scanning again."
    return listing, ""


def _kept(listing: Listing, path: Path, name: str) -> Listing:
    """Save a listing and map it, or return it as it is if that cannot be done."""
    try:
        save_listing(listing, path, name)
        return map_listing(path)
    except OSError as error:
        logger.warning("The catalog of %s cannot be saved (%s). Every command will scan the images again.", name, error)
        return listing


@contextmanager
def _alone(path: Path, name: str) -> Iterator[None]:
    """Wait until no other process makes the catalog `path`; without a wait if its folder cannot be written to."""
    lock = None
    with suppress(OSError):  # the folder cannot be written to, or the file system has no locks
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = os.open(path.with_name(f".{path.name}.lock"), os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            logger.info("Another process is scanning %s. Waiting for it.", name)
            fcntl.flock(lock, fcntl.LOCK_EX)
    try:
        yield
    finally:
        if lock is not None:
            os.close(lock)
