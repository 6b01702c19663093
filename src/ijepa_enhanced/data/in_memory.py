"""A source whose images are read once, into memory that all processes share."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping

import numpy as np
import torch
from torch import Tensor

from ijepa_enhanced.data.listing import Listing
from ijepa_enhanced.data.opening import Opened
from ijepa_enhanced.data.sources.base import Source
from ijepa_enhanced.devices import MEGABYTE, free_memory
from ijepa_enhanced.distributed import ALONE, Ranks
from ijepa_enhanced.errors import SourceError, UnreadableImage

logger = logging.getLogger(__name__)

SHARE = 0.8
"""Share of the free memory that the images may use. The rest is for the run itself."""


def handle_of(shared: Tensor) -> tuple[int, int, int]:
    """Return what another process of this machine needs to open a tensor in shared memory: process, file and bytes."""
    file, size = shared.untyped_storage()._share_fd_cpu_()
    return os.getpid(), file, size


def opened(process: int, file: int, size: int) -> Tensor:
    """Open a tensor that another process shares, from the result of its `handle_of`: uint8 [size]."""
    own = os.open(f"/proc/{process}/fd/{file}", os.O_RDWR)
    try:
        storage = torch.UntypedStorage._new_shared_fd_cpu(own, size)  # type: ignore[attr-defined]
    finally:
        os.close(own)
    return torch.tensor([], dtype=torch.uint8).set_(storage)


class InMemory(Source):
    """Another source with its images in shared memory: the bytes of their files, or drawn pixels; never decoded ones.

    The ranks of a machine share one copy, and so do processes that are forked or spawned. It needs the bytes of all
    images of the source, and 16 more for each image. Its files have no names, so the system frees them when the last
    process ends, even if it is killed. If an image cannot be read, or its length is not as stated, the source reads it
    later.

    Args:
        source: the first rank of each machine reads all of it here.
        free: what `free_memory` said when it is to count; None: now.
        ranks: all of them call this.

    Raises:
        SourceError: it takes more than `SHARE` of the memory that is free.
    """

    def __init__(self, source: Source, free: Mapping[str, int] | None = None, ranks: Ranks = ALONE) -> None:
        self.source = source
        self.name = source.name
        first = ranks.rank - ranks.local_rank  # of this machine
        shared = self._fill(free) if ranks.rank == first else None
        if ranks.world > 1:
            # The ranks exchange file numbers: a process can open a file that another process of the same user has open.
            handles = ranks.gather(shared and [handle_of(part) for part in shared], patient=True)[first]
            shared = shared or [opened(*handle) for handle in handles]
        assert shared is not None
        self.memory = shared[0]
        self.ends, self.lengths = (part.view(torch.int64).numpy() for part in shared[1:])

    def _fill(self, free: Mapping[str, int] | None) -> list[Tensor]:
        """Read all images, and return their bytes, where each ends and how long it is, in shared memory: uint8."""
        source, rows = self.source, range(len(self.source))
        lengths = torch.tensor([source.length(row) for row in rows], dtype=torch.int64)
        ends = lengths.cumsum(0)
        total = int(ends[-1])
        for place, room in (free or free_memory()).items():
            if total > SHARE * room:
                raise SourceError(
                    f"The images of {source.name} need {total / MEGABYTE:,.0f} MB, but a run can use only "
                    f"{SHARE:.0%} of the {room / MEGABYTE:,.0f} MB that are free in {place}. Set data.cache to none, "
                    "or shrink the images with ijepa prepare."
                )
        logger.info("Reading %d images into memory: %.0f MB.", len(rows), total / MEGABYTE)
        memory = torch.empty(total, dtype=torch.uint8).share_memory_()
        for row, (end, length) in enumerate(zip(ends.tolist(), lengths.tolist(), strict=True)):
            try:
                data = source.read(row)
            except UnreadableImage:
                data = b""
            if len(data) == length:
                memory[end - length : end].numpy()[:] = np.frombuffer(data, dtype=np.uint8)
            else:
                lengths[row] = 0
        return [memory, *(part.view(torch.uint8).share_memory_() for part in (ends, lengths))]

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

    def read(self, row: int) -> bytes:
        """See `Source`."""
        end, length = int(self.ends[row]), int(self.lengths[row])
        return self.memory[end - length : end].numpy().tobytes() if length else self.source.read(row)

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
