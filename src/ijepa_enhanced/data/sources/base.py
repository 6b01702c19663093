"""What a source of images is: N images read at random by row number.

A source holds no open file, so it can be sent to worker processes, forked and used by threads.
"""

from __future__ import annotations

import hashlib
import os
from abc import ABC, abstractmethod
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ijepa_enhanced.data.decode import open_image, upright_size
from ijepa_enhanced.errors import SourceError, UnreadableImage

EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif")
"""Of files and members that are taken for images, in small or capital letters."""

PARTS = ("train", "val", "test")
"""What files of a folder and splits of a data set may be named after."""

CLASSES = "classes.txt"
"""Beside shards: the name of each label, a line each."""

UNREAD = "cannot be read"
"""How the reason begins where the fault is not the image's but the disk's or the network's."""
HEAD = 64 * 1024
"""Bytes in which nearly every header ends: all that is read of an image to learn its size."""


class Source(ABC):
    """N images in a fixed order."""

    name: str
    """What the user called it."""
    keys: list[str]
    """N names for messages, the same wherever the source lies."""
    labels: NDArray[np.int64] | None = None
    """int64 [N], or None; -1 where an image lacks the label that others have, which makes it unreadable."""
    classes: list[str] | None = None
    """The name of each label, or None."""
    shares: NDArray[np.float64] | None = None
    """float64 [N] in (0, 1]: the fraction of the epochs of training that show an image; None is all of them."""

    def open(self, row: int) -> Image.Image:
        """An image with its header read, to be decoded later.

        Raises:
            UnreadableImage: it cannot be read.
        """
        return self.restore(row, self.read(row))

    @abstractmethod
    def read(self, row: int) -> bytes:
        """What an image is made of: its file, or where there is none, its pixels.

        Raises:
            UnreadableImage: it cannot be read.
        """

    @abstractmethod
    def length(self, row: int) -> int:
        """How many bytes `read` gives, without reading them; 0 where that is not known."""

    @abstractmethod
    def restore(self, row: int, data: bytes) -> Image.Image:
        """The image that `open` gives, from what `read` gave."""

    @abstractmethod
    def size(self, row: int) -> tuple[int, int]:
        """Height and width of the upright image in pixels, without decoding it.

        Raises:
            UnreadableImage: its header cannot be read.
        """

    @abstractmethod
    def fingerprint(self) -> str:
        """Changes when a file's name, size or time does, or what is drawn."""


class FileSource(Source):
    """Images that are bytes of files."""

    @abstractmethod
    def _read(self, row: int, limit: int = -1) -> bytes:
        """The first `limit` bytes of an image file, or all of it."""

    @abstractmethod
    def _length(self, row: int) -> int:
        """Bytes of an image file."""

    def read(self, row: int, limit: int = -1) -> bytes:
        """See `Source`; of `limit` bytes at most."""
        try:
            data = self._read(row, limit)
        except UnreadableImage:
            raise
        except (OSError, ValueError) as error:  # ValueError: of what cannot be a path
            reason = error.strerror if isinstance(error, OSError) else error
            raise UnreadableImage(f"{UNREAD}: {reason}") from error
        if self.labels is not None and self.labels[row] < 0:
            raise UnreadableImage("no label, which others have")
        return data

    def length(self, row: int) -> int:
        """See `Source`."""
        try:
            return self._length(row)
        except (OSError, ValueError):
            return 0

    def restore(self, row: int, data: bytes) -> Image.Image:
        """See `Source`."""
        return open_image(data)

    def size(self, row: int) -> tuple[int, int]:
        """See `Source`."""
        head = self.read(row, HEAD)
        try:
            return upright_size(open_image(head))
        except UnreadableImage:
            if len(head) < HEAD:
                raise
            return upright_size(self.open(row))


def fingerprint_of(files: Iterable[tuple[str, Path]]) -> str:
    """SHA-256 of the names, sizes and times of files, and of which cannot be read by this user."""
    digest = hashlib.sha256()
    for name, path in files:
        try:
            status = os.stat(path)
            state = f"{status.st_size}\0{status.st_mtime_ns}"
            if not os.access(path, os.R_OK):
                state += "\0closed"  # neither size nor time changes when it is opened
        except (OSError, ValueError):
            state = "missing"
        digest.update(os.fsencode(f"{name}\0{state}\n"))
    return digest.hexdigest()


def number_labels(
    written: list[str | None], classes: list[str] | None, source: str
) -> tuple[NDArray[np.int64], list[str] | None]:
    """Labels as int64 [N], -1 where there is none, and the class names or None.

    Labels that are all whole numbers stand for themselves. Names are numbered as in `classes`, or where that is None,
    in the order of the alphabet.

    Raises:
        SourceError: a label is beyond `classes`, or no number that int64 has.
    """
    found = sorted({label for label in written if label is not None})
    if all(label.isdecimal() for label in found):
        numbers = {label: int(label) for label in found}
    else:
        classes = found if classes is None else classes
        numbers = {name: number for number, name in enumerate(classes)}
    for label in found:
        if classes is not None and numbers.get(label, len(classes)) >= len(classes):
            raise SourceError(f"{source} has the label '{label}', which is none of the {len(classes)} in classes.txt.")
    return label_array([-1 if label is None else numbers[label] for label in written], source), classes


def label_array(labels: list[int], source: str) -> NDArray[np.int64]:
    """Labels as int64 [N].

    Raises:
        SourceError: one is no number that int64 has.
    """
    try:
        return np.array(labels, dtype=np.int64)
    except OverflowError as error:
        raise SourceError(f"{source} has the label {max(labels)}, which is too large a number.") from error
