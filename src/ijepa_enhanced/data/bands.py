"""Images that Pillow cannot hold: any number of channels, 8 or 16 bits or floats, in NumPy, TIFF and PNG files."""

from __future__ import annotations

import io
import logging
import math
import tokenize
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ijepa_enhanced.errors import MissingReader, UnreadableImage

NUMPY = b"\x93NUMPY"
"""The first bytes of a file of `numpy.save`."""

NUMPY_HEADER = 12 + 10_000
"""Bytes of the longest header of a NumPy file that numpy reads (`max_header_size`), with what is before it."""

MISSING = "needs the extra"
"""Start of the reason if a reader is not installed. The next scan tries again to read the image."""

PNG_DEPTH, PNG_COLOR = 24, 25
"""Byte offsets of the bit depth and of the color type in a PNG file (ISO/IEC 15948, section 11.2.2)."""

PNG_CHANNELS = {2: 3, 4: 2, 6: 4}
"""Channels of each color type of PNG with more than one: RGB, gray with alpha, RGB with alpha."""

ORIENTATION = 274
"""TIFF tag of the orientation. It has the same values as in EXIF."""

TURNS: dict[int, Callable[[NDArray[Any]], NDArray[Any]]] = {
    2: lambda pixels: pixels[:, ::-1],
    3: lambda pixels: pixels[::-1, ::-1],
    4: lambda pixels: pixels[::-1],
    5: lambda pixels: pixels.swapaxes(0, 1),
    6: lambda pixels: pixels.swapaxes(0, 1)[:, ::-1],
    7: lambda pixels: pixels.swapaxes(0, 1)[::-1, ::-1],
    8: lambda pixels: pixels.swapaxes(0, 1)[::-1],
}


@dataclass(frozen=True)
class Bands:
    """An image file whose header is already read. Its pixels are read on demand."""

    height: int
    """Height of the upright image in pixels."""
    width: int
    channels: int
    dtype: np.dtype[Any]
    """uint8, uint16 or a float."""
    load: Callable[[], NDArray[Any]]
    """Returns the stored pixels, [h, w, C], or [h, w] if there is one channel."""
    orientation: int = 1
    """EXIF orientation of the stored pixels."""
    plain: Image.Image | None = None
    """The image as Pillow reads it, in 8 bits; None if it cannot."""

    def __post_init__(self) -> None:
        if self.dtype not in (np.uint8, np.uint16) and self.dtype.kind != "f":
            raise UnreadableImage(f"has values of type {self.dtype}: save them as uint8, uint16 or floats")
        if not (self.height and self.width and self.channels):
            raise UnreadableImage("has no pixels")

    @property
    def mode(self) -> str:
        """Return the channels and the type in words. Pillow's images have the same attribute."""
        return f"{self.channels} x {self.dtype}"

    def pixels(self) -> NDArray[Any]:
        """Return the upright pixels, [h, w, C].

        Raises:
            UnreadableImage: a value is NaN or infinite. Damaged files raise other errors too, see `decode.FAILURES`.
        """
        stored = self.load()
        stored = stored.reshape(*stored.shape[:2], self.channels)
        check_finite(stored)
        return turned(stored, self.orientation)


def check_finite(pixels: NDArray[Any]) -> None:
    """Raise UnreadableImage if a value is NaN or infinite."""
    if pixels.dtype.kind == "f" and not np.isfinite(pixels).all():
        raise UnreadableImage("contains NaN or infinite values: replace them")


def turned(pixels: NDArray[Any], orientation: int) -> NDArray[Any]:
    """Turn pixels [h, w, ...] upright according to their EXIF orientation."""
    return TURNS[orientation](pixels) if orientation in TURNS else pixels


def of_array(array: NDArray[Any]) -> Bands:
    """Return an array [h, w] or [h, w, C] as an image.

    Raises:
        UnreadableImage: the array has the wrong number of axes, or an unsupported type.
    """
    return Bands(*_shape_of(array.shape), array.dtype, lambda: array)


def open_npy(stream: BinaryIO) -> Bands:
    """Read the header of a file of `numpy.save`.

    Raises:
        UnreadableImage: the file holds Python objects, or an array of another shape than [h, w] or [h, w, C].
        ValueError: the header is damaged.
    """
    head = io.BytesIO(stream.read(NUMPY_HEADER))  # not the stream: numpy asks it for as much memory as a header says
    version = np.lib.format.read_magic(head)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    try:
        shape, by_columns, dtype = read(head)
    except tokenize.TokenError as error:  # it is not a ValueError
        raise ValueError("the header is not a Python dictionary") from error
    if dtype.hasobject:
        raise UnreadableImage("holds Python objects, which could run any code when loaded: save numbers instead")
    start = head.tell()

    def load() -> NDArray[Any]:
        stream.seek(0)
        # `numpy.load` is not used here: it allocates as many values as a damaged header says.
        values = np.frombuffer(stream.read(), dtype, math.prod(shape), start)
        return values.reshape(shape, order="F" if by_columns else "C")

    return Bands(*_shape_of(shape), dtype.newbyteorder("="), lambda: load().astype(dtype.newbyteorder("="), copy=False))


def open_tiff(stream: BinaryIO, plain: Image.Image | None = None) -> Bands:
    """Read the header of the first page of a TIFF file with tifffile.

    Args:
        stream: the file.
        plain: see `Bands`.

    Raises:
        MissingReader: tifffile is not installed.
        UnreadableImage: the page is not an image of pixels.
        Exception: the file is damaged. tifffile raises many types.
    """
    try:
        import tifffile
    except ImportError as error:
        raise missing("bands", "a TIFF image with channels that Pillow does not know") from error
    tifffile.logger().setLevel(logging.CRITICAL)  # its errors are raised too, and reported with the name of the file
    stream.seek(0)
    page = tifffile.TiffFile(stream).pages.first
    if page.dtype is None:
        raise UnreadableImage(f"has values of {page.bitspersample} bits, which are not read")
    if page.axes not in ("YX", "YXS", "SYX"):
        raise UnreadableImage(f"the first page has the axes {page.axes}: only height, width and channels are read")
    sides, channels = (int(page.imagelength), int(page.imagewidth)), int(page.samplesperpixel)
    orientation = page.tags.valueof(ORIENTATION, 1)
    orientation = orientation if orientation in TURNS else 1
    height, width = sides if orientation < 5 else sides[::-1]

    def load() -> NDArray[Any]:
        stored = page.asarray(maxworkers=1)  # several workers decode at the same time
        return np.moveaxis(stored, 0, 2) if page.axes == "SYX" else stored

    return Bands(height, width, channels, np.dtype(page.dtype), load, orientation, plain)


def open_png(stream: BinaryIO, plain: Image.Image, color: int, orientation: int) -> Bands:
    """Return a 16-bit PNG image. Pillow has already read its header.

    Args:
        stream: the file.
        plain: see `Bands`.
        color: its color type, a key of `PNG_CHANNELS`.
        orientation: EXIF orientation of the stored pixels.

    Raises:
        MissingReader: imagecodecs is not installed.
    """
    try:
        import imagecodecs
    except ImportError as error:
        raise missing("bands", "a PNG image with colors of 16 bits") from error
    sides = (plain.height, plain.width)
    height, width = sides if orientation < 5 else sides[::-1]

    def load() -> NDArray[Any]:
        stream.seek(0)
        return imagecodecs.png_decode(stream.read())

    return Bands(height, width, PNG_CHANNELS[color], np.dtype(np.uint16), load, orientation, plain)


def missing(extra: str, what: str) -> MissingReader:
    """Return the error of an image whose reader is not installed."""
    return MissingReader(
        f"{MISSING} '{extra}', as it is {what}: run pip install 'ijepa-enhanced[{extra}]', then `ijepa scan SOURCE`"
    )


def as_file(data: bytes | BinaryIO) -> BinaryIO:
    """Return bytes as a file."""
    return io.BytesIO(data) if isinstance(data, bytes) else data


def _shape_of(shape: tuple[int, ...]) -> tuple[int, int, int]:
    """Return height, width and channels of an array."""
    if len(shape) not in (2, 3):
        raise UnreadableImage(f"has the shape {[*shape]}: only [height, width] and [height, width, channels] are read")
    height, width, channels = (*shape, 1)[:3]
    return height, width, channels
