"""Several sources as one, in given proportions."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ijepa_enhanced.data.sources.base import Source


class MixedSource(Source):
    """The images of some sources one after another; keys begin with the number of the source, from 1, and a colon.

    An image is shown in `weight / largest weight` of the epochs: no epoch shows one twice. So with weights of 2 and 1
    an epoch has all images of the first source and half of those of the second, drawn anew each time.

    There are labels where all sources have some, and all or none of them have classes. Classes of one name are one, and
    are numbered in the order in which the sources name them.

    Args:
        sources: one or more.
        weights: one for each, above 0.
        name: what the user called them.
    """

    def __init__(self, sources: Sequence[Source], weights: Sequence[float], name: str) -> None:
        self.name = name
        self.sources = sources
        self.keys = [f"{number}:{key}" for number, source in enumerate(sources, start=1) for key in source.keys]
        counts = [len(source.keys) for source in sources]
        self.starts = np.cumsum([0, *counts])[:-1]
        self.shares = np.repeat(np.array(weights) / max(weights), counts)
        named = [source.classes is not None for source in sources]
        if all(source.labels is not None for source in sources) and all(named) == any(named):
            if all(named):
                self.classes = list(dict.fromkeys(itertools.chain(*(source.classes or () for source in sources))))
            self.labels = np.concatenate([_renumbered(source, self.classes) for source in sources])

    def _place(self, row: int) -> tuple[Source, int]:
        """The source of a row, and its row there."""
        number = int(np.searchsorted(self.starts, row, side="right")) - 1
        return self.sources[number], row - int(self.starts[number])

    def read(self, row: int) -> bytes:
        """See `Source`."""
        source, own = self._place(row)
        return source.read(own)

    def length(self, row: int) -> int:
        """See `Source`."""
        source, own = self._place(row)
        return source.length(own)

    def restore(self, row: int, data: bytes) -> Image.Image:
        """See `Source`."""
        source, own = self._place(row)
        return source.restore(own, data)

    def size(self, row: int) -> tuple[int, int]:
        """See `Source`."""
        source, own = self._place(row)
        return source.size(own)

    def fingerprint(self) -> str:
        """See `Source`."""
        return hashlib.sha256("\n".join(source.fingerprint() for source in self.sources).encode()).hexdigest()


def _renumbered(source: Source, classes: list[str] | None) -> NDArray[np.int64]:
    """The labels of a source as numbers of `classes`, where there are any."""
    assert source.labels is not None
    if classes is None or source.classes is None:
        return source.labels
    # The last is that of -1, which is no label.
    numbers = np.array([*map(classes.index, source.classes), -1], dtype=np.int64)
    return numbers[source.labels]
