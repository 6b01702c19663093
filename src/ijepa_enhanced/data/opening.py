"""Open image files: find their format and read their headers."""

from __future__ import annotations

import logging
import multiprocessing
import struct
import warnings
from functools import cache
from typing import BinaryIO

from PIL import (
    AvifImagePlugin,
    BmpImagePlugin,
    ExifTags,
    GifImagePlugin,
    Image,
    ImageFile,
    Jpeg2KImagePlugin,
    JpegImagePlugin,
    PngImagePlugin,
    TiffImagePlugin,
    WebPImagePlugin,
)

from ijepa_enhanced.data.bands import (
    NUMPY,
    PNG_CHANNELS,
    PNG_COLOR,
    PNG_DEPTH,
    TURNS,
    Bands,
    as_file,
    missing,
    open_npy,
    open_png,
    open_tiff,
)
from ijepa_enhanced.errors import ImageTooLarge, MissingReader, UnreadableImage
from ijepa_enhanced.ops.preprocess import CHANNELS

logger = logging.getLogger(__name__)

Opened = Image.Image | Bands
"""An image whose header is already read: a Pillow image, or `Bands` if Pillow cannot hold it."""

MAX_PIXELS = 89_478_485
"""Most pixels of an image. This is Pillow's own limit against files that decompress to more than fits in memory."""

_BITS, _SAMPLES = 258, 277
"""TIFF tags: bits per value of each channel, and number of channels."""

LONGEST_BRANDS = 1024
"""The brands of an AVIF or HEIC file end within this many bytes."""

# We call these classes directly, because `Image.open` warns or fails on large images before it returns their size.
_READERS: dict[bytes, type[ImageFile.ImageFile]] = {
    b"\xff\xd8\xff": JpegImagePlugin.JpegImageFile,
    b"\x89PNG\r\n\x1a\n": PngImagePlugin.PngImageFile,
    b"RIFF": WebPImagePlugin.WebPImageFile,
    b"GIF8": GifImagePlugin.GifImageFile,
    b"BM": BmpImagePlugin.BmpImageFile,
    b"II*\0": TiffImagePlugin.TiffImageFile,
    b"MM\0*": TiffImagePlugin.TiffImageFile,
    b"\0\0\0\x0cjP  \r\n\x87\n": Jpeg2KImagePlugin.Jpeg2KImageFile,
    b"\xff\x4f\xff\x51": Jpeg2KImagePlugin.Jpeg2KImageFile,  # without a container
    b"II+\0": TiffImagePlugin.TiffImageFile,  # BigTIFF
    b"MM\0+": TiffImagePlugin.TiffImageFile,  # which only tifffile reads
}

FAILURES = (
    OSError,
    SyntaxError,
    ValueError,
    TypeError,
    Image.DecompressionBombError,
    LookupError,
    EOFError,
    RuntimeError,
    ArithmeticError,
    struct.error,
)
"""Exceptions that Pillow raised for 100,000 randomly damaged files, then those that its own readers treat as damage."""

# Pillow warns of damaged metadata, but the image can still be read. `catch_warnings` is not safe here, because threads
# scan a source.
warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\.")

_SIDEWAYS = (5, 6, 7, 8)


def open_image(file: bytes | BinaryIO, max_pixels: int = MAX_PIXELS) -> Opened:
    """Read the header of an image file. The pixels are decoded later.

    The file is a JPEG, PNG, WebP, GIF, BMP, TIFF, AVIF, JPEG 2000, HEIC or NumPy file.

    Args:
        file: all its bytes, or a seekable file. Only the header of a seekable file is read.
        max_pixels: larger images are refused.

    Raises:
        ImageTooLarge: it has more than `max_pixels`.
        MissingReader: the package that reads it is not installed.
        UnreadableImage: it has another format, or its header is damaged.
    """
    stream = as_file(file)
    start = stream.read(LONGEST_BRANDS)
    if not start:
        raise UnreadableImage("empty file")
    stream.seek(0)
    try:
        image = _opened(stream, start)
    except UnreadableImage:
        raise
    except FAILURES as error:
        raise UnreadableImage(f"damaged header: {error}") from error
    if image.width * image.height > max_pixels:
        raise ImageTooLarge(f"{image.width} x {image.height} px is above the limit of {max_pixels:,} px")
    return image


def orientation_of(image: Opened) -> int:
    """Return the EXIF orientation, 1 to 8, from the header.

    It looks in the same places as `ImageOps.exif_transpose`: in EXIF data of any form, and in XMP data. It does not
    call `image.getexif`, which decodes a whole PNG to see whether EXIF data follows the pixels. Pillow itself turns
    TIFF images. An image that the caller has turned by 90 degrees counts as upright.
    """
    if isinstance(image, Bands):
        return image.orientation
    if isinstance(image, TiffImagePlugin.TiffImageFile):
        return 1
    try:
        exif = Image.Image.getexif(image)
        found = exif.get(ExifTags.Base.Orientation, 1)
        if found in _SIDEWAYS and not isinstance(image, ImageFile.ImageFile):
            # `rotate` and `transpose` keep the EXIF data of the image that they turn, with its size.
            stored = exif.get_ifd(ExifTags.IFD.Exif)
            width, height = (stored.get(tag) for tag in (ExifTags.Base.ExifImageWidth, ExifTags.Base.ExifImageHeight))
            if width and height and (width < height) != (image.width < image.height):
                return 1
    except FAILURES:  # damaged
        return 1
    return found if found in TURNS else 1


def upright_size(image: Opened) -> tuple[int, int]:
    """Return height and width in pixels, after the EXIF orientation is applied. Only the header is read."""
    if isinstance(image, Bands):
        return image.height, image.width
    return (image.width, image.height) if orientation_of(image) in _SIDEWAYS else (image.height, image.width)


def channels_of(image: Opened) -> int:
    """Return how many channels an image has. Only the header is read. A palette counts as RGB."""
    if isinstance(image, Bands):
        return image.channels
    return CHANNELS if image.mode == "P" else len(image.getbands())


def check_channels(image: Opened, channels: int) -> None:
    """Check that an image has this number of channels. Any image that Pillow reads can become RGB.

    Raises:
        UnreadableImage: it has another number.
    """
    found = channels_of(image)
    as_rgb = not isinstance(image, Bands) or image.plain is not None or found == 1
    if found != channels and not (channels == CHANNELS and as_rgb):
        raise UnreadableImage(f"has {found} channel{'s' * (found > 1)} instead of {channels} (data.channels)")


def _opened(stream: BinaryIO, start: bytes) -> Opened:
    """Read the header of a file that begins with `start`; errors as for `open_image`, or one of `FAILURES`."""
    if start.startswith(NUMPY):
        return open_npy(stream)
    reader = _reader(start)
    try:
        image = reader(stream)
    except FAILURES:
        if reader is not TiffImagePlugin.TiffImageFile:
            raise
        return open_tiff(stream)
    try:
        if isinstance(image, TiffImagePlugin.TiffImageFile) and _has_more(image):
            return open_tiff(stream, image if _is_rgb(image) else None)
        if reader is PngImagePlugin.PngImageFile and start[PNG_DEPTH] == 16 and start[PNG_COLOR] in PNG_CHANNELS:
            return open_png(stream, image, start[PNG_COLOR], orientation_of(image))
    except MissingReader:  # fall back to Pillow
        _warn_of_8_bits()
    return image


def _has_more(image: TiffImagePlugin.TiffImageFile) -> bool:
    """Return whether a TIFF file has channels or bits that Pillow ignores."""
    bits, samples = image.tag_v2.get(_BITS, (1,)), image.tag_v2.get(_SAMPLES, 1)
    return samples > 1 and (max(bits) > 8 or samples != len(image.getbands()))


def _is_rgb(image: TiffImagePlugin.TiffImageFile) -> bool:
    """Return whether Pillow reads a TIFF file with several channels as RGB or gray, with at most one extra channel."""
    samples = image.tag_v2.get(_SAMPLES, 1)
    return samples == 2 or (samples <= CHANNELS + 1 and len(image.getbands()) >= CHANNELS)


@cache
def _warn_of_8_bits() -> None:
    """Warn once, not in each worker, that Pillow reads only a part of the bits or channels of some images."""
    if multiprocessing.parent_process() is None:
        logger.warning(
            "Some images have 16-bit colors, or more channels than RGB. They are read as 8-bit RGB only. To "
            "read all, run pip install 'ijepa-enhanced[bands]'."
        )


def _reader(data: bytes) -> type[ImageFile.ImageFile]:
    """Return the reader of a file that begins with `data`; errors as for `open_image`."""
    if data[4:8] == b"ftyp":
        # All brands of the file: the first one may name only the container format.
        brands = data[8 : int.from_bytes(data[:4])]
        if b"avif" in brands or b"avis" in brands:
            return AvifImagePlugin.AvifImageFile
        if b"hei" in brands or b"hev" in brands or b"mif1" in brands:
            return _heic()
    for magic, reader in _READERS.items():
        if data.startswith(magic):
            return reader
    raise UnreadableImage("not a JPEG, PNG, WebP, GIF, BMP, TIFF, AVIF, JPEG 2000, HEIC or NumPy file")


def _heic() -> type[ImageFile.ImageFile]:
    try:
        from pillow_heif import HeifImageFile
    except ImportError as error:
        raise missing("heic", "a HEIC image") from error
    return HeifImageFile


def check_orientation(image: Image.Image, orientation: int) -> None:
    """Raise UnreadableImage if a PNG stores another orientation after its pixels than before them. The pixels are
    loaded."""
    if isinstance(image, PngImagePlugin.PngImageFile) and _late_orientation(image) != orientation:
        raise UnreadableImage(
            "the EXIF orientation is stored after the pixel data, where it is not read: save the image again with the "
            "EXIF data before the pixels"
        )


def _late_orientation(image: Image.Image) -> int:
    """Return the orientation of a PNG whose pixels, and the metadata after them, are loaded."""
    plain = Image.Image()
    plain.info = image.info
    return orientation_of(plain)
