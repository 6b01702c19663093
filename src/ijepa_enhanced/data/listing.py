"""The images of a source as columns, in memory or mapped from an Arrow file that all processes share.

N is the number of images. No column holds a Python object for each image.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from ijepa_enhanced.errors import RunError
from ijepa_enhanced.files import replacing

FORMAT = 6
"""Version of the file. Raise it when the meaning of a column or of the metadata changes, or more images are read."""

METADATA = b"ijepa_enhanced"
"""Key of the schema's metadata that holds all but the columns, as JSON."""


READABLE = ("readable_row", "readable_height", "readable_width")
"""Columns of `Readable`."""

_Number = TypeVar("_Number", np.int32, np.int64)


class Names(ABC):
    """N texts, each made when it is asked for."""

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def __getitem__(self, row: int) -> str: ...

    def __iter__(self) -> Iterator[str]:
        return (self[row] for row in range(len(self)))


class Texts(Names):
    """N texts in two arrays. File names that are not valid UTF-8 keep their bytes.

    Args:
        ends: int64 [N + 1]; text n is the bytes from ends[n] to ends[n + 1] of `data`.
        data: uint8.
    """

    def __init__(self, ends: NDArray[np.int64], data: NDArray[np.uint8]) -> None:
        self.ends = ends
        self.data = data

    @classmethod
    def of(cls, texts: Iterable[str]) -> Texts:
        """Copy texts into arrays."""
        encoded = [text.encode("utf-8", "surrogateescape") for text in texts]
        ends = np.zeros(len(encoded) + 1, dtype=np.int64)
        np.cumsum(np.fromiter(map(len, encoded), dtype=np.int64, count=len(encoded)), out=ends[1:])
        return cls(ends, np.frombuffer(b"".join(encoded), dtype=np.uint8))

    def __len__(self) -> int:
        return len(self.ends) - 1

    def __getitem__(self, row: int) -> str:
        return self.data[self.ends[row] : self.ends[row + 1]].tobytes().decode("utf-8", "surrogateescape")


class Readable(NamedTuple):
    """The M images whose header can be read."""

    rows: NDArray[np.int64]
    """[M] ascending."""
    heights: NDArray[np.int32]
    """[M] pixels of the upright image."""
    widths: NDArray[np.int32]
    """[M]"""


@dataclass(frozen=True, eq=False)
class Sizes:
    """What a scan of the headers found."""

    heights: NDArray[np.int32]
    """[N] pixels of the upright image; 0 where the header cannot be read."""
    widths: NDArray[np.int32]
    """[N]"""
    reasons: Names
    """N reasons why a header cannot be read; empty where it can."""
    mapped: Readable | None = None
    """The images that can be read, if they are mapped from a file."""

    def readable(self) -> Readable:
        """Return the images that can be read."""
        if self.mapped is not None:
            return self.mapped
        rows = np.flatnonzero(self.heights)
        return Readable(rows, self.heights[rows], self.widths[rows])


@dataclass(frozen=True)
class Statistics:
    """Statistics of the values of C channels, scaled to [0, 1]. Every measured image has the same weight."""

    mean: tuple[float, ...]
    std: tuple[float, ...]
    """Standard deviation."""
    images: int
    """Number of measured images."""


@dataclass(frozen=True, eq=False)
class Listing:
    """The images of a source in its order."""

    keys: Names
    """N names for messages and paths: the same wherever the source lies."""
    labels: NDArray[np.int64] | None = None
    """[N], -1 for images without a label; None if no image has one."""
    classes: list[str] | None = None
    """The name of each label; None if labels are only numbers, or there are none."""
    location: NDArray[np.int64] | None = None
    """[N, k] what the source needs besides the key to read an image; None if it needs nothing."""
    folders: tuple[str, ...] = ()
    """Folders whose times show that files were added or removed, relative to the source."""
    notes: tuple[str, ...] = ()
    """What users must know about these images, a sentence each."""
    shares: NDArray[np.float64] | None = None
    """[N] fraction of the epochs that show each image, in a mixture; None if all epochs show all images."""
    passed_over: dict[str, int] = dataclasses.field(default_factory=dict)
    """Number of files that are no images, by extension, see `count_kinds`."""
    fingerprint: str = ""
    """The state of the source's files when they were scanned, see `Source.fingerprint`."""
    sizes: Sizes | None = None
    """None until the headers are scanned."""
    hash: str = ""
    """SHA-256 of keys, labels and sizes, the same wherever the images lie; empty until the headers are scanned."""
    path: Path | None = None
    """The file that the columns are mapped from."""
    statistics: Statistics | None = None
    """Statistics of the channels. None until they are measured."""

    def __len__(self) -> int:
        return len(self.keys)

    def with_sizes(self, sizes: Sizes) -> Listing:
        """Return the listing with the sizes of its images, and the hash of both."""
        digest = hashlib.sha256()
        keys = _as_texts(self.keys)
        for values in (keys.ends, keys.data, self.labels, sizes.heights, sizes.widths):
            if values is not None:
                digest.update(np.ascontiguousarray(values).data)
        return dataclasses.replace(self, sizes=sizes, hash=digest.hexdigest(), path=None)

    def with_fingerprint(self, fingerprint: str) -> Listing:
        """Return the listing with the state of the files that it was made of."""
        return dataclasses.replace(self, fingerprint=fingerprint, path=None)

    def with_statistics(self, statistics: Statistics) -> Listing:
        """Return the listing with the statistics of its channels."""
        return dataclasses.replace(self, statistics=statistics, path=None)

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle the path of a mapped listing instead of its columns."""
        if self.path is not None:
            return _map_again, (self.path, self.hash)
        return Listing, tuple(getattr(self, field.name) for field in dataclasses.fields(self))


def save_listing(listing: Listing, path: Path, source: str) -> None:
    """Write a listing to an Arrow file, in one batch so that its columns can be mapped as arrays.

    Args:
        listing: with or without sizes.
        path: a file that is already there is replaced; processes that have mapped it keep the old one.
        source: what the listing is of, for people who look into the file.

    Raises:
        OSError: the file cannot be written.
    """
    import pyarrow as pa

    labels = np.full(len(listing), -1) if listing.labels is None else listing.labels
    columns = {"key": _to_arrow(listing.keys), "label": pa.array(labels)}
    if listing.location is not None:
        width = listing.location.shape[1]
        columns["location"] = pa.FixedSizeListArray.from_arrays(pa.array(listing.location.ravel()), width)
    if listing.sizes is not None:
        columns |= _columns_of(listing.sizes)
    facts = {
        name: getattr(listing, name) for name in ("classes", "folders", "notes", "passed_over", "fingerprint", "hash")
    }
    facts |= {"format": FORMAT, "source": source, "labelled": listing.labels is not None}
    facts["statistics"] = listing.statistics and dataclasses.asdict(listing.statistics)
    _write(path, columns, facts)


def map_listing(path: Path) -> Listing:
    """Map a listing from an Arrow file: none of its columns is read before it is used.

    Raises:
        FileNotFoundError: there is no such file.
        OSError, ValueError: the file is damaged, or was written by another version.
    """
    columns, facts = _map(path)
    if facts["format"] != FORMAT:
        raise ValueError("it was written by another version of ijepa-enhanced")
    location, measured = columns.get("location"), facts["statistics"]
    return Listing(
        _from_arrow(columns["key"]),
        _numbers(columns["label"], np.int64) if facts["labelled"] else None,
        facts["classes"],
        None if location is None else _numbers(location.values, np.int64).reshape(len(location), -1),
        tuple(facts["folders"]),
        tuple(facts["notes"]),
        None,
        facts["passed_over"],
        facts["fingerprint"],
        _sizes_of(columns) if "height" in columns else None,
        facts["hash"],
        path,
        measured and Statistics(tuple(measured["mean"]), tuple(measured["std"]), measured["images"]),
    )


def save_sizes(sizes: Sizes, path: Path) -> None:
    """Write what a scan has found so far.

    Raises:
        OSError: the file cannot be written.
    """
    _write(path, _columns_of(sizes), {})


def map_sizes(path: Path) -> Sizes:
    """Map what `save_sizes` wrote; raises errors as `map_listing` does."""
    return _sizes_of(_map(path)[0])


def _map_again(path: Path, expected: str) -> Listing:
    """Map a listing in another process; it must be the one that the first process mapped."""
    listing = map_listing(path)
    if listing.hash != expected:
        raise RunError(
            f"Another process scanned the images again, which changed the catalog {path}. Run the command again."
        )
    return listing


def _write(path: Path, columns: dict[str, Any], facts: dict[str, Any]) -> None:
    import pyarrow as pa

    batch = pa.RecordBatch.from_pydict(columns, metadata={METADATA: json.dumps(facts)})
    with replacing(path) as temporary, pa.ipc.new_file(str(temporary), batch.schema) as writer:
        writer.write_batch(batch)


def _map(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the columns of a file as Arrow arrays in mapped memory, and its metadata."""
    import pyarrow as pa

    try:
        reader = pa.ipc.open_file(pa.memory_map(str(path)))
        batch = reader.get_batch(0)
        batch.validate()
        facts = json.loads(batch.schema.metadata[METADATA])
    except (LookupError, TypeError) as error:
        raise ValueError("it is not a catalog") from error
    return dict(zip(batch.schema.names, batch.columns, strict=True)), facts


def _as_texts(names: Names) -> Texts:
    return names if isinstance(names, Texts) else Texts.of(names)


def _columns_of(sizes: Sizes) -> dict[str, Any]:
    import pyarrow as pa

    unreadable = np.packbits(sizes.heights == 0, bitorder="little")
    columns = {
        "height": pa.array(sizes.heights),
        "width": pa.array(sizes.widths),
        "reason": _to_arrow(sizes.reasons, unreadable),
    }
    # Again for the readable images alone, with zeros at the end: processes map these columns, and copy nothing.
    readable: tuple[NDArray[np.integer], ...] = sizes.readable()
    for name, values in zip(READABLE, readable, strict=True):
        columns[name] = pa.array(np.pad(values, (0, len(sizes.heights) - len(values))))
    return columns


def _sizes_of(columns: dict[str, Any]) -> Sizes:
    heights, widths = (_numbers(columns[name], np.int32) for name in ("height", "width"))
    reasons, (row, *size) = columns["reason"], READABLE
    count = reasons.null_count
    readable = Readable(
        _numbers(columns[row], np.int64)[:count], *(_numbers(columns[name], np.int32)[:count] for name in size)
    )
    return Sizes(heights, widths, _from_arrow(reasons), readable)


def _numbers(array: Any, dtype: type[_Number]) -> NDArray[_Number]:
    """Return an Arrow array as an array on the same memory; `to_numpy` would import pandas."""
    return np.frombuffer(array.buffers()[1], dtype=dtype)[: len(array)]


def _to_arrow(names: Names, valid: NDArray[np.uint8] | None = None) -> Any:
    """Return texts as an Arrow array; they are bytes there, since file names need not be UTF-8."""
    import pyarrow as pa

    texts = _as_texts(names)
    buffers = [None if valid is None else pa.py_buffer(valid), pa.py_buffer(texts.ends), pa.py_buffer(texts.data)]
    return pa.LargeBinaryArray.from_buffers(pa.large_binary(), len(texts), buffers)


def _from_arrow(array: Any) -> Texts:
    _, ends, data = array.buffers()
    ends = np.frombuffer(ends, dtype=np.int64)[: len(array) + 1]
    return Texts(ends, np.frombuffer(b"" if data is None else data, dtype=np.uint8))
