"""A source of images: it knows how to list its images, and how to read one by row number.

A source holds no open file, so it can be sent to worker processes, forked and used by threads.
"""

from __future__ import annotations

import hashlib
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import BinaryIO, ClassVar

import numpy as np
from numpy.typing import NDArray

from ijepa_enhanced.data.listing import Listing
from ijepa_enhanced.data.opening import Opened, open_image, upright_size
from ijepa_enhanced.errors import SourceError, UnreadableImage

CLASSES = "classes.txt"
"""File beside shards with the name of each label, one on each line."""

UNREAD = "cannot be read"
"""Beginning of the reason if the fault lies with the disk or the network, and not with the image."""

HEAD = 4096
"""Bytes that are read of an image at a time to learn its size; few headers are longer."""

THREADS = 16
"""Threads that read headers: each waits for the disk or the network most of the time."""

SAMPLE = 256
"""Most image files that `fingerprint` looks into; they are spread evenly over the source."""

SPOTS, SPOT = 8, 1024
"""Places of a file that `fingerprint_of` reads, from its beginning to its end, and the bytes of each."""


class Source(ABC):
    """N images in a fixed order."""

    name: str
    """What the user called it."""
    how_to_label: ClassVar[str] = "Give each of its sources labels."
    """Advice for sources without labels."""
    kind: ClassVar[str] = "images"
    """What it is, in words."""
    split: str = ""
    """Words for the split that was chosen, if there are several."""
    beside: dict[str, int] = {}  # noqa: RUF012 - replaced, never changed
    """Files in its folder that it does not read, by extension, see `count_kinds`; `listing` counts those inside."""
    _listing: Listing | None = None

    @property
    def listing(self) -> Listing:
        """Its images: mapped from its catalog after `open_catalog`, before that listed at the first use.

        Raises:
            SourceError: the source cannot be listed, or it holds no image.
        """
        if self._listing is None:
            self._listing = self.make_listing()
        return self._listing

    def attach(self, find: Callable[[Source], Listing]) -> None:
        """Set the listing that `find` returns, in sources that are made of others, to each of these."""
        self._listing = find(self)

    @abstractmethod
    def make_listing(self) -> Listing:
        """List all images, without their sizes; this may read every file of the source.

        Raises:
            SourceError: the source cannot be listed, or it holds no image.
        """

    @abstractmethod
    def identity(self) -> tuple[str, ...]:
        """Return what tells this source from all others on this machine: its kind, its place and its options."""

    @abstractmethod
    def fingerprint(self) -> str:
        """Return a text that changes when the images change; it costs a fraction of a second, so it is no proof."""

    def __len__(self) -> int:
        return len(self.listing)

    def key(self, row: int) -> str:
        """Return the name of an image, for messages: the same wherever the source lies."""
        return self.listing.keys[row]

    def file_of(self, row: int) -> str | None:
        """Return the absolute path of an image's file; None if it is not a file of its own."""
        return None

    @property
    def labels(self) -> NDArray[np.int64] | None:
        """int64 [N], -1 for images without a label; None if no image has one."""
        return self.listing.labels

    @property
    def classes(self) -> list[str] | None:
        """The name of each label, or None."""
        return self.listing.classes

    def open(self, row: int) -> Opened:
        """Read an image and its header; the pixels are decoded later.

        Raises:
            UnreadableImage: it cannot be read.
        """
        return self.restore(row, self.read(row))

    @abstractmethod
    def read(self, row: int) -> bytes:
        """Return what an image is made of: the bytes of its file, or its pixels if it has no file.

        Raises:
            UnreadableImage: it cannot be read.
        """

    @abstractmethod
    def length(self, row: int) -> int:
        """Return how many bytes `read` gives, without reading them; 0 if that is not known."""

    @abstractmethod
    def restore(self, row: int, data: bytes) -> Opened:
        """Return the image that `open` gives, from what `read` gave."""

    @abstractmethod
    def size(self, row: int) -> tuple[int, int]:
        """Return height and width of the upright image in pixels, without decoding it.

        Raises:
            UnreadableImage: its header cannot be read.
        """


class FileSource(Source):
    """Images that are bytes of files."""

    @abstractmethod
    def _open(self, row: int) -> BinaryIO:
        """Open an image file, or the part of a file that is one, with a buffer of `HEAD` bytes."""

    @abstractmethod
    def _length(self, row: int) -> int:
        """Return the bytes of an image file."""

    def read(self, row: int) -> bytes:
        """See `Source`."""
        try:
            with self._open(row) as file:
                return file.read()
        except UnreadableImage:
            raise
        except (OSError, ValueError) as error:  # a ValueError if the path cannot be a path
            raise _unread(error) from error

    def length(self, row: int) -> int:
        """See `Source`."""
        try:
            return self._length(row)
        except (OSError, ValueError):
            return 0

    def restore(self, row: int, data: bytes) -> Opened:
        """See `Source`."""
        return open_image(data)

    def size(self, row: int) -> tuple[int, int]:
        """See `Source`."""
        try:
            with self._open(row) as file:
                return upright_size(open_image(file))
        except UnreadableImage as error:
            if isinstance(error.__cause__, OSError) and error.__cause__.errno is not None:
                raise _unread(error.__cause__) from error  # from the disk, and not from Pillow
            raise
        except (OSError, ValueError) as error:
            raise _unread(error) from error


def _unread(error: Exception) -> UnreadableImage:
    return UnreadableImage(f"{UNREAD}: {error.strerror if isinstance(error, OSError) else error}")


def sample(count: int) -> list[int]:
    """Return up to `SAMPLE` of `count` rows, spread evenly."""
    return np.linspace(0, count - 1, min(count, SAMPLE)).astype(np.int64).tolist()


def class_names(folder: str | Path) -> list[str] | None:
    """Return the lines of `classes.txt` in a folder without empty lines at its end, or None if the file does not exist.

    Raises:
        SourceError: the file is not valid UTF-8.
    """
    path = Path(folder, CLASSES)
    try:
        return path.read_text(encoding="utf-8-sig").rstrip().splitlines() if path.is_file() else None
    except UnicodeDecodeError as error:
        raise SourceError(f"{path} is not valid UTF-8.") from error


def fingerprint_of(files: Iterable[tuple[str, str | Path]]) -> str:
    """Return the SHA-256 of the names, the sizes, the times and some of the bytes of files, given as (name, path).

    Archives and package stores set all times to the same value, so files may differ in their bytes alone. Images with a
    border and archives begin and end with the same bytes, so the bytes are those of `SPOTS` places.
    """
    digest = hashlib.sha256()
    for name, path in files:
        digest.update(f"{name}\0".encode("utf-8", "surrogateescape"))
        try:
            with open(path, "rb") as file:
                status = os.fstat(file.fileno())
                digest.update(f"{status.st_size}\0{status.st_mtime_ns}\0".encode())
                last = max(0, status.st_size - SPOT)
                for spot in range(SPOTS):
                    digest.update(os.pread(file.fileno(), SPOT, last * spot // (SPOTS - 1)))
        except (OSError, ValueError) as error:
            digest.update(_unread(error).args[0].encode())
        digest.update(b"\n")
    return digest.hexdigest()
