"""Reading the headers of all images of a source: with threads, since headers wait for the disk, and in parts that are
kept, so that a scan that was stopped goes on where it was."""

from __future__ import annotations

import logging
import shutil
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np

from ijepa_enhanced.data.bands import MISSING
from ijepa_enhanced.data.listing import Listing, Sizes, Texts, map_listing, map_sizes, save_listing, save_sizes
from ijepa_enhanced.data.sources.base import THREADS, UNREAD, Source
from ijepa_enhanced.errors import UnreadableImage

logger = logging.getLogger(__name__)

CHUNK = 64
"""Images that a thread reads at a time: handing over one costs as much as reading it."""

BLOCK = 64 * CHUNK
"""Images after which a scan can stop and keep what it found."""

PATIENCE = 10.0
"""Seconds of scanning between two parts that are kept, and between two lines that say how far it is."""


_Found = tuple[int, int, str]
"""Height, width, and the reason why they are 0."""


class Unfinished:
    """What a scan has found so far, in a folder; nothing is kept if that is None or cannot be written to."""

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder

    def attach_listing(self, source: Source) -> bool:
        """Give a source the listing that an earlier scan kept, if the source has not changed since."""
        if self.folder is None:
            return False
        try:
            listing = map_listing(self.folder / "listing.arrow")
        except (OSError, ValueError):
            return False
        source.attach(lambda _: listing)
        return source.fingerprint() == listing.fingerprint

    def parts(self) -> Iterable[Sizes]:
        """Yield what was kept, in order, up to the first part that is missing or damaged."""
        start = 0
        while self.folder is not None:
            try:
                part = map_sizes(self._part(start))
            except (OSError, ValueError):
                return
            yield part
            start += len(part.heights)

    def keep(self, source: Source, part: Sizes, start: int) -> None:
        """Keep a part of the sizes, from row `start` on."""
        if self.folder is None or not len(part.heights):
            return
        try:
            if start == 0:
                self.remove()  # parts of an older state of the source
                self.folder.mkdir(parents=True)
                save_listing(source.listing, self.folder / "listing.arrow", source.name)
            save_sizes(part, self._part(start))
        except OSError:
            self.folder = None  # whoever saves the whole says why that cannot be done

    def remove(self) -> None:
        """Remove what was kept."""
        if self.folder is not None:
            shutil.rmtree(self.folder, ignore_errors=True)

    def _part(self, start: int) -> Path:
        assert self.folder is not None
        return self.folder / f"sizes-{start:012d}.arrow"


def list_and_scan(source: Source, unfinished: Unfinished) -> Listing:
    """List the images of a source and read their headers, or go on with that.

    Raises:
        SourceError: see `Source.listing`.
    """
    resumed = unfinished.attach_listing(source)
    if not resumed:
        source.attach(lambda leaf: leaf.make_listing())
        # From before the headers are read, and of a folder from before it is listed, so that later changes are noticed.
        fingerprint = source.listing.fingerprint or source.fingerprint()
        source.attach(lambda leaf: leaf.listing.with_fingerprint(fingerprint))
    return source.listing.with_sizes(_scan(source, unfinished, unfinished.parts() if resumed else ()))


def scan_again(source: Source, sizes: Sizes) -> Sizes | None:
    """Read again the headers that the last scan could not read because of the disk, the network or a missing extra.
    Return None if nothing has changed."""
    rows = [
        row for row in np.flatnonzero(sizes.heights == 0).tolist() if sizes.reasons[row].startswith((UNREAD, MISSING))
    ]
    found = _look(source, rows)
    if [reason for _, _, reason in found] == [sizes.reasons[row] for row in rows]:
        return None
    table = _Table(len(source))
    table.put_part(sizes, 0)
    table.put(rows, found)
    return table.sizes(0, len(source))


def _scan(source: Source, unfinished: Unfinished, parts: Iterable[Sizes]) -> Sizes:
    count = len(source)
    table = _Table(count)
    done = 0
    for part in parts:
        table.put_part(part, done)
        done += len(part.heights)
    if done:
        logger.info("Scanning %s: resuming after %d of %d images", source.name, done, count)
    kept, said = done, time.monotonic()
    with ThreadPoolExecutor(THREADS) as pool:
        try:
            while done < count:
                block = range(done, min(done + BLOCK, count))
                chunks = [block[start : start + CHUNK] for start in range(0, len(block), CHUNK)]
                for rows, found in zip(chunks, pool.map(partial(_look, source), chunks), strict=True):
                    table.put(rows, found)
                done = block.stop
                if time.monotonic() - said > PATIENCE:
                    logger.info("Scanning %s: %d of %d images", source.name, done, count)
                    unfinished.keep(source, table.sizes(kept, done), kept)
                    kept, said = done, time.monotonic()
        except BaseException:  # Ctrl-C above all
            unfinished.keep(source, table.sizes(kept, done), kept)
            raise
    return table.sizes(0, count)


class _Table:
    """Sizes of images that are filled in as they become known."""

    def __init__(self, count: int) -> None:
        self.heights, self.widths = np.zeros((2, count), dtype=np.int32)
        self.reasons = [""] * count

    def put(self, rows: Iterable[int], found: Iterable[_Found]) -> None:
        for row, (height, width, reason) in zip(rows, found, strict=True):
            self.heights[row], self.widths[row], self.reasons[row] = height, width, reason

    def put_part(self, part: Sizes, start: int) -> None:
        rows = slice(start, start + len(part.heights))
        self.heights[rows], self.widths[rows], self.reasons[rows] = part.heights, part.widths, part.reasons

    def sizes(self, start: int, stop: int) -> Sizes:
        return Sizes(self.heights[start:stop], self.widths[start:stop], Texts.of(self.reasons[start:stop]))


def _look(source: Source, rows: Iterable[int]) -> list[_Found]:
    """Return height, width and an empty reason of each image, or zeros and the reason why it cannot be read."""
    found: list[_Found] = []
    for row in rows:
        try:
            found.append((*source.size(row), ""))
        except UnreadableImage as error:
            found.append((0, 0, str(error)))
    return found
