"""A source whose images are read once, into memory that all processes share."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping

import numpy as np
import torch

from ijepa_enhanced.data.listing import Listing
from ijepa_enhanced.data.opening import Opened
from ijepa_enhanced.data.sources.base import Source
from ijepa_enhanced.devices import MEGABYTE, free_memory
from ijepa_enhanced.errors import SourceError, UnreadableImage

logger = logging.getLogger(__name__)

SHARE = 0.8
"""Of what is free that may be taken; the rest is for the run itself."""


class InMemory(Source):
    """Another source with its images in shared memory: the bytes of their files, or drawn pixels; never decoded ones.

    Processes that are forked or spawned share the one copy. It takes the bytes of all images of the source, and 16
    more for each. Its file has no name from the start, so the system frees it with the last process, however that
    ends. What cannot be read, or is not as long as it was said to be, is left to the source.

    Args:
        source: all of it is read here.
        free: what `free_memory` said when it is to count; None: now.
        copies: processes on this machine that each make one.

    Raises:
        SourceError: it takes more than `SHARE` of the memory that is free.
    """

    def __init__(self, source: Source, free: Mapping[str, int] | None = None, copies: int = 1) -> None:
        self.source = source
        self.name = source.name
        rows = range(len(source))
        self.lengths = np.array([source.length(row) for row in rows], dtype=np.int64)
        self.ends = np.cumsum(self.lengths)
        total = int(self.ends[-1])
        for place, room in (free or free_memory()).items():
            if copies * total > SHARE * room:
                raise SourceError(
                    f"The images of {source.name} need {copies * total / MEGABYTE:,.0f} MB, but a run can use only "
                    f"{SHARE:.0%} of the {room / MEGABYTE:,.0f} MB that are free in {place}. Set data.cache to none, "
                    "or shrink the images with ijepa prepare."
                )
        logger.info("Reading %d images into memory: %.0f MB.", len(rows), total / MEGABYTE)
        self.memory = torch.empty(total, dtype=torch.uint8).share_memory_()
        for row in rows:
            try:
                data = source.read(row)
            except UnreadableImage:
                data = b""
            if len(data) == self.lengths[row]:
                self._place(row).numpy()[:] = np.frombuffer(data, dtype=np.uint8)
            else:
                self.lengths[row] = 0

    @property
    def listing(self) -> Listing:
        """See `Source`."""
        return self.source.listing

    def attach(self, find: Callable[[Source], Listing]) -> None:
        """See `Source`."""
        self.source.attach(find)

    def make_listing(self) -> Listing:
        """See `Source`."""
        return self.source.make_listing()

    def identity(self) -> tuple[str, ...]:
        """See `Source`."""
        return self.source.identity()

    def _place(self, row: int) -> torch.Tensor:
        end = int(self.ends[row])
        return self.memory[end - int(self.lengths[row]) : end]

    def read(self, row: int) -> bytes:
        """See `Source`."""
        return self._place(row).numpy().tobytes() if self.lengths[row] else self.source.read(row)

    def length(self, row: int) -> int:
        """See `Source`."""
        return self.source.length(row)

    def restore(self, row: int, data: bytes) -> Opened:
        """See `Source`."""
        return self.source.restore(row, data)

    def size(self, row: int) -> tuple[int, int]:
        """See `Source`."""
        return self.source.size(row)

    def fingerprint(self) -> str:
        """See `Source`."""
        return self.source.fingerprint()
