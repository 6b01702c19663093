"""Which images lie in which file, and which packs fill it."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np

from ijepa_enhanced.data.catalog import Catalog
from ijepa_enhanced.data.plan import Pack, inference_packs
from ijepa_enhanced.embed.settings import EmbedSettings


@dataclass(frozen=True)
class EmbedPlan:
    """The packs of every file. No pack crosses the border of a file, so files do not depend on each other."""

    settings: EmbedSettings
    catalog: Catalog
    """All readable images of the source."""
    patch_size: int
    """P."""
    limit: int
    """Most tokens of an image."""
    budget: int
    """Most tokens of a pack, unless one image alone has more."""

    def packs(self, file: int) -> list[Pack]:
        """Return the packs of a file: its readable images, once each, in order."""
        part = self.readable(file)
        images = self.catalog.select(np.arange(part.start, part.stop))
        packs = inference_packs(images, self.settings.resolution, self.patch_size, self.limit, self.budget)
        return [dataclasses.replace(pack, images=pack.images + part.start) for pack in packs]

    def readable(self, file: int) -> slice:
        """Return the positions in the catalog of a file's readable images."""
        rows = self.settings.rows_of(file)
        return slice(*np.searchsorted(self.catalog.rows, [rows.start, rows.stop]).tolist())

    def stream(self, files: Iterable[int]) -> Iterator[Pack]:
        """Yield the packs of some files, one file after another. Only those of one file are in memory."""
        for file in files:
            yield from self.packs(file)


def files_of_shard(files: int, shard: tuple[int, int]) -> range:
    """Return the files that the i-th of n processes writes, i from 1: neighbors, and as many as the others' but one."""
    number, count = shard
    return range(files * (number - 1) // count, files * number // count)
