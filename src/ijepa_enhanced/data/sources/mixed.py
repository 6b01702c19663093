"""Several sources as one, in given proportions."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ijepa_enhanced.data.listing import Listing, Names, Sizes
from ijepa_enhanced.data.opening import Opened
from ijepa_enhanced.data.sources.base import Source
from ijepa_enhanced.data.sources.labels import are_numbers, class_key, class_keys, repeated
from ijepa_enhanced.errors import SourceError


class MixedSource(Source):
    """The images of some sources one after another; keys begin with the number of the source, from 1, and a colon.

    An image is shown in `weight / largest weight` of the epochs: no epoch shows one twice. So with weights of 2 and 1
    an epoch has all images of the first source and half of those of the second, drawn again in each epoch.

    There are labels if all sources have some, and all of them name their classes or all of them number them. Classes
    of the same name are one, and are numbered in the order in which the sources name them. Each source has its own
    catalog.

    Args:
        sources: one or more.
        weights: one for each, above 0.
        name: what the user called them.
    """

    kind = "mixture"

    def __init__(self, sources: Sequence[Source], weights: Sequence[float], name: str) -> None:
        self.name = name
        self.sources = sources
        self.weights = weights

    def __getstate__(self) -> dict[str, Any]:
        """Leave out what another process can make from the catalogs of the sources."""
        return {name: value for name, value in vars(self).items() if name not in ("_listing", "_starts")}

    def attach(self, find: Callable[[Source], Listing]) -> None:
        """See `Source`."""
        for source in self.sources:
            source.attach(find)
        self._listing = self.make_listing()

    def make_listing(self) -> Listing:
        """See `Source`."""
        listings = [source.listing for source in self.sources]
        shares = np.repeat(np.array(self.weights) / max(self.weights), [len(listing) for listing in listings])
        labels, classes, notes = _joined_labels(listings, self.name, [source.name for source in self.sources])
        sizes = [listing.sizes for listing in listings if listing.sizes is not None]
        digest = hashlib.sha256("\n".join(listing.hash for listing in listings).encode())
        for values in (shares, labels):
            if values is not None:
                digest.update(values.data)
        return Listing(
            Chain([listing.keys for listing in listings], [f"{number}:" for number, _ in enumerate(listings, start=1)]),
            labels,
            classes,
            notes=(*(note for listing in listings for note in listing.notes), *notes),
            shares=shares,
            sizes=None if len(sizes) < len(listings) else _joined_sizes(sizes),
            hash=digest.hexdigest(),
        )

    @cached_property
    def _starts(self) -> NDArray[np.int64]:
        return np.cumsum([0, *(len(source) for source in self.sources)])[:-1]

    def _place(self, row: int) -> tuple[Source, int]:
        """Return the source of a row, and its row there."""
        number = int(np.searchsorted(self._starts, row, side="right")) - 1
        return self.sources[number], row - int(self._starts[number])

    def file_of(self, row: int) -> str | None:
        """See `Source`."""
        source, own = self._place(row)
        return source.file_of(own)

    def read(self, row: int) -> bytes:
        """See `Source`."""
        source, own = self._place(row)
        return source.read(own)

    def length(self, row: int) -> int:
        """See `Source`."""
        source, own = self._place(row)
        return source.length(own)

    def restore(self, row: int, data: bytes) -> Opened:
        """See `Source`."""
        source, own = self._place(row)
        return source.restore(own, data)

    def size(self, row: int) -> tuple[int, int]:
        """See `Source`."""
        source, own = self._place(row)
        return source.size(own)

    def identity(self) -> tuple[str, ...]:
        """See `Source`."""
        return ("mixture", *itertools.chain(*(source.identity() for source in self.sources)))

    def fingerprint(self) -> str:
        """See `Source`."""
        return hashlib.sha256("\n".join(source.fingerprint() for source in self.sources).encode()).hexdigest()


class Chain(Names):
    """Texts one after another, each with the prefix of its part."""

    def __init__(self, parts: Sequence[Names], prefixes: Sequence[str]) -> None:
        self.parts = parts
        self.prefixes = prefixes
        self.ends = np.cumsum([len(part) for part in parts])

    def __len__(self) -> int:
        return int(self.ends[-1])

    def __getitem__(self, row: int) -> str:
        number = int(np.searchsorted(self.ends, row, side="right"))
        part = self.parts[number]
        return self.prefixes[number] + part[row - int(self.ends[number]) + len(part)]


def _joined_labels(
    listings: Sequence[Listing], name: str, sources: Sequence[str]
) -> tuple[NDArray[np.int64] | None, list[str] | None, tuple[str, ...]]:
    """Return the labels and classes of a mixture, and what users must know about them.

    Raises:
        SourceError: a source has two classes of one name, and the sources do not list the same names.
    """
    if any(listing.labels is None for listing in listings):
        return None, None, ()
    names = [listing.classes for listing in listings if listing.classes is not None]
    if len(names) < len(listings):
        if not all(map(are_numbers, names)):
            note = f"{name} has no labels: some of its sources have class names, and others have class numbers."
            return None, None, (note,)
        return np.concatenate([_renumbered(listing, None) for listing in listings]), None, ()
    keys = class_keys(names[0])
    if all(class_keys(others) == keys for others in names):  # two classes of one name keep their numbers
        return np.concatenate([listing.labels for listing in listings if listing.labels is not None]), names[0], ()
    for source, classes in zip(sources, names, strict=True):
        for key in repeated(classes):
            raise SourceError(
                f"{name}: the source {source} has more than one class '{key}'. Give every class a unique name."
            )
    joined: dict[int | str, str] = {}
    for each in itertools.chain(*names):
        joined.setdefault(class_key(each), each)
    return np.concatenate([_renumbered(listing, [*joined]) for listing in listings]), [*joined.values()], ()


def _renumbered(listing: Listing, keys: list[int | str] | None) -> NDArray[np.int64]:
    """Return the labels of a source as places in `keys`, or if that is None, as the numbers that name its classes."""
    assert listing.labels is not None
    if listing.classes is None:
        return listing.labels
    numbers: list[Any] = [*class_keys(listing.classes)]
    if keys is not None:
        places = {key: place for place, key in enumerate(keys)}
        numbers = [places[key] for key in numbers]
    # The last number is that of -1, which is no label.
    return np.array([*numbers, -1], dtype=np.int64)[listing.labels]


def _joined_sizes(sizes: Sequence[Sizes]) -> Sizes:
    return Sizes(
        np.concatenate([each.heights for each in sizes]),
        np.concatenate([each.widths for each in sizes]),
        Chain([each.reasons for each in sizes], [""] * len(sizes)),
    )
