"""From the bytes of an image file to the pixels of its views."""

from __future__ import annotations

import io
import math
import struct
import warnings
from collections.abc import Sequence
from functools import lru_cache
from typing import BinaryIO

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import (
    AvifImagePlugin,
    BmpImagePlugin,
    ExifTags,
    GifImagePlugin,
    Image,
    ImageCms,
    ImageFile,
    Jpeg2KImagePlugin,
    JpegImagePlugin,
    PngImagePlugin,
    TiffImagePlugin,
    WebPImagePlugin,
)

from ijepa_enhanced.errors import ImageTooLarge, UnreadableImage

MAX_PIXELS = 89_478_485
"""Larger images are refused: Pillow's own limit against files that decompress to more than memory holds."""

LONGEST = 65_500
"""Pixels along a side that a JPEG file can have."""

GAP = 2
"""Pixels for every output pixel that cheap reduction leaves to the bicubic filter, as in Pillow's `thumbnail`."""

TRIANGLES = math.sqrt(3)
"""How many times smaller than a view its blurred copy is, for a blur of one pixel. To shrink and to enlarge by s, the
linear filter weighs pixels by a triangle with variance s^2 / 6 each time, which makes s^2 / 3 in all."""

SAME_COLOR = 3
"""Levels of 255 by which profiles that call themselves sRGB differ from lcms's sRGB, by rounding of their curves."""

_COLORS = np.stack(np.meshgrid(*[np.arange(0, 256, 51, dtype=np.uint8)] * 3), axis=-1).reshape(1, -1, 3)
"""A grid of RGB colors, [1, 216, 3]."""

_PHOTOMETRIC = 0x0106
"""TIFF tag; 0 means that 0 is white."""

LONGEST_BRANDS = 1024
"""Bytes in which the brands of an AVIF or HEIC file end."""

# Called directly, because `Image.open` warns or fails on large images before it tells their size.
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
    b"II+\0": TiffImagePlugin.TiffImageFile,  # BigTIFF; Pillow cannot read the big-endian one
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
"""What 100,000 randomly damaged files made Pillow raise, then what its readers themselves take for damage."""

# Pillow warns of damage in metadata, which does not keep an image from being read. Not by `catch_warnings`, which is
# not safe in the threads that scan a source.
warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\.")

_SIDEWAYS = (5, 6, 7, 8)
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def open_image(file: bytes | BinaryIO, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Read the header of a JPEG, PNG, WebP, GIF, BMP, TIFF, AVIF or JPEG 2000 file; the pixels are decoded later.

    Args:
        file: all bytes of it, or a file that can be sought in, of which no more is read than the header.
        max_pixels: larger images are refused.

    Raises:
        ImageTooLarge: it has more than `max_pixels`.
        UnreadableImage: it is no such file, or its header is damaged.
    """
    stream = io.BytesIO(file) if isinstance(file, bytes) else file
    start = stream.read(LONGEST_BRANDS)
    if not start:
        raise UnreadableImage("empty file")
    reader = _reader(start)
    if reader is None:
        raise UnreadableImage("not a JPEG, PNG, WebP, GIF, BMP, TIFF, AVIF or JPEG 2000 image")
    stream.seek(0)
    try:
        image = reader(stream)
    except FAILURES as error:
        raise UnreadableImage(f"damaged header: {error}") from error
    if image.width * image.height > max_pixels:
        raise ImageTooLarge(f"{image.width} x {image.height} px is above the limit of {max_pixels:,} px")
    return image


def orientation_of(image: Image.Image) -> int:
    """Return the EXIF orientation, 1 to 8, from the header.

    It is where `ImageOps.exif_transpose` finds it: in EXIF data of any form, or in XMP data. Not `image.getexif`, which
    decodes a whole PNG to see whether EXIF data follows the pixels. Pillow itself turns TIFF images. An image that the
    caller has turned by a quarter is upright.
    """
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
    return found if found in _TURNS else 1


def upright_size(image: Image.Image) -> tuple[int, int]:
    """Height and width in pixels after the EXIF orientation is applied, from the header alone."""
    return (image.width, image.height) if orientation_of(image) in _SIDEWAYS else (image.height, image.width)


def upright(image: Image.Image) -> Image.Image:
    """Return the image, turned by its EXIF orientation."""
    turn = _TURNS.get(orientation_of(image))
    return image if turn is None else image.transpose(turn)


def decode_views(
    image: Image.Image,
    boxes: NDArray[np.floating | np.integer],
    sizes: NDArray[np.integer],
    flips: NDArray[np.bool_] | None = None,
    sigmas: NDArray[np.floating] | None = None,
) -> list[NDArray[np.uint8]]:
    """V views of one image, decoded once, in sRGB, transparent pixels on white.

    Args:
        image: of any mode; only the first frame of an animation is shown. It keeps its size and can be used again.
        boxes: [V, 4] top, left, height, width in pixels of the upright image. Edges are moved to whole pixels.
        sizes: [V, 2] height and width to resize each box to, in pixels (bicubic, with antialiasing).
        flips: whether to mirror each view. None: no view.
        sigmas: standard deviation of the Gaussian blur of each view, in its pixels; 0 for none. None: no view.

    Returns:
        V arrays uint8 [height, width, 3].

    Raises:
        UnreadableImage: the pixels cannot be decoded.
    """
    pixels, scale = decode_pixels(image, float((boxes[:, 2:] / sizes).min()))
    flips = np.zeros(len(boxes), dtype=np.bool_) if flips is None else flips
    sigmas = np.zeros(len(boxes)) if sigmas is None else sigmas
    views = zip((boxes / scale).tolist(), sizes.tolist(), flips.tolist(), sigmas.tolist(), strict=True)
    return [_view(pixels, *view) for view in views]


def decode_pixels(image: Image.Image, shrink: float) -> tuple[NDArray[np.uint8], int]:
    """The upright pixels [h, w, 3] for views at least `shrink` times smaller, and how many times smaller they are.

    The array is not to be written to. Errors as for `decode_views`.
    """
    orientation = orientation_of(image)
    turn = _TURNS.get(orientation)
    try:
        pixels, scale = _reduced(image, shrink)
        pixels = _rgb(pixels)
        pixels.load()
    except FAILURES as error:
        raise UnreadableImage(f"cannot be decoded: {error}") from error
    if isinstance(image, PngImagePlugin.PngImageFile) and _late_orientation(image) != orientation:
        raise UnreadableImage(
            "the EXIF orientation is stored after the pixel data, where it is not read: save the image again with the "
            "EXIF data before the pixels"
        )
    if scale == 1 and shrink >= 2 * GAP:  # of a format without scales, the fewer pixels the faster
        scale = int(shrink / GAP)
        pixels = pixels.reduce(scale)
    if turn is not None:
        pixels = pixels.transpose(turn)
    return np.asarray(pixels), scale


def _view(
    pixels: NDArray[np.uint8], box: Sequence[float], size: Sequence[int], flip: bool, sigma: float
) -> NDArray[np.uint8]:
    """One view of `decode_views` from the pixels [h, w, 3] of an image, with a box in these pixels."""
    top, left, bottom, right = (round(edge) for edge in (box[0], box[1], box[0] + box[2], box[1] + box[3]))
    top, left = min(top, len(pixels) - 1), min(left, pixels.shape[1] - 1)
    crop = pixels[top : max(bottom, top + 1), left : max(right, left + 1)].copy()
    # PyTorch's filters for bytes are Pillow's, three times as fast (AVX2) where channels come last in memory.
    view = torch.from_numpy(crop).unsqueeze(0).permute(0, 3, 1, 2)
    if sigma:
        step = max(1.0, TRIANGLES * sigma)
        for shape in ([max(1, round(side / step)) for side in size], size):
            view = F.interpolate(view, shape, mode="bilinear", antialias=True)
    else:
        view = F.interpolate(view, size, mode="bicubic", antialias=True)
    if flip:
        view = view.flip(3)
    return view.permute(0, 2, 3, 1)[0].numpy()


def decode_whole(image: Image.Image, max_resolution: float) -> NDArray[np.uint8]:
    """The whole image as `decode_views` shows it, [height, width, 3], shrunk where it is larger than `max_resolution`.

    Args:
        image: see `decode_views`.
        max_resolution: sqrt(height * width) in pixels.

    Raises:
        UnreadableImage: the pixels cannot be decoded.
    """
    height, width = upright_size(image)
    scale = min(1.0, max_resolution / math.sqrt(height * width))
    size = np.rint([[height * scale, width * scale]]).clip(1, LONGEST).astype(np.int64)
    return decode_views(image, np.array([[0, 0, height, width]]), size)[0]


def patchify(pixels: NDArray[np.uint8], patch_size: int, out: NDArray[np.uint8] | None = None) -> NDArray[np.uint8]:
    """Cut [h, w, C] into a grid of P x P patches: [rows * cols, P * P * C], both in row-major order.

    Args:
        pixels: of a view.
        patch_size: P.
        out: contiguous memory to write the patches to. None: new memory.

    Raises:
        ValueError: a side is no multiple of `patch_size`.
    """
    height, width, channels = pixels.shape
    if height % patch_size or width % patch_size:
        raise ValueError(f"{height} x {width} px cannot be cut into patches of {patch_size} px.")
    rows, cols = height // patch_size, width // patch_size
    if out is None:
        out = np.empty((rows * cols, patch_size**2 * channels), dtype=pixels.dtype)
    grid = pixels.reshape(rows, patch_size, cols, patch_size * channels).swapaxes(1, 2)
    out.reshape(grid.shape)[...] = grid
    return out


def unpatchify(patches: NDArray[np.uint8], rows: int, cols: int, patch_size: int) -> NDArray[np.uint8]:
    """The inverse of `patchify`: [rows * cols, P * P * C] to [rows * P, cols * P, C]."""
    grid = patches.reshape(rows, cols, patch_size, patch_size, -1)
    return grid.swapaxes(1, 2).reshape(rows * patch_size, cols * patch_size, -1)


def _reader(data: bytes) -> type[ImageFile.ImageFile] | None:
    if data[4:8] == b"ftyp":
        # The brands of the file, of which the first may be that of the container alone.
        brands = data[8 : int.from_bytes(data[:4])]
        if b"avif" in brands or b"avis" in brands:
            return AvifImagePlugin.AvifImageFile
        if b"hei" in brands or b"hev" in brands or b"mif1" in brands:
            raise UnreadableImage("a HEIC image, which is not read: convert it to JPEG")
    return next((reader for magic, reader in _READERS.items() if data.startswith(magic)), None)


def _late_orientation(image: Image.Image) -> int:
    """Return the orientation of a PNG whose pixels are loaded, and with them what its file holds after them."""
    plain = Image.Image()
    plain.info = image.info
    return orientation_of(plain)


def _reduced(image: Image.Image, shrink: float) -> tuple[Image.Image, int]:
    """The image for views at least `shrink` times smaller, and how many times smaller than `image` it is.

    Only JPEG can be decoded at a fraction of its size. `draft` changes the image, so it is done to another one.
    """
    scale = max((scale for scale in (2, 4, 8) if scale * GAP <= shrink), default=1)
    if scale > 1 and isinstance(image, JpegImagePlugin.JpegImageFile) and isinstance(image.fp, io.BytesIO):
        smaller = JpegImagePlugin.JpegImageFile(io.BytesIO(image.fp.getvalue()))
        if smaller.draft(None, (image.width // scale, image.height // scale)):
            return smaller, scale
    return image, 1


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I;16"):
        return _rgb_of_16_bits(image)
    if image.mode in ("I", "F"):
        # These have no white point: the darkest and brightest pixel are all there is to go by.
        values = np.asarray(image, dtype=np.float64)
        finite = values[np.isfinite(values)]
        low, high = (finite.min(), finite.max()) if finite.size else (0.0, 0.0)
        values = np.nan_to_num((values - low) / ((high - low) or 1)).clip(0, 1)  # not a number is black
        return Image.fromarray((values * 255).round().astype(np.uint8)).convert("RGB")
    transparent = image.has_transparency_data
    profile = image.info.get("icc_profile", b"")
    if transparent:
        image = image.convert("RGBA")
    elif image.mode not in ("L", "RGB", "CMYK"):
        image = image.convert("RGB")
    if profile:
        transform = _to_srgb(profile, image.mode)
        image = image if transform is None else transform.apply(image)
    if transparent:
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image if image.mode == "RGB" else image.convert("RGB")


def _rgb_of_16_bits(image: Image.Image) -> Image.Image:
    """Return a gray image of 16 bits as RGB: the high byte of each value, as Pillow does with colors."""
    values = np.asarray(image)
    if isinstance(image, TiffImagePlugin.TiffImageFile) and image.tag_v2.get(_PHOTOMETRIC) == 0:
        values = 65535 - values  # 0 is white, which Pillow heeds up to 8 bits
    gray = (values >> 8).astype(np.uint8)
    if (transparent := image.info.get("transparency")) is not None:
        gray[values == transparent] = 255
    return Image.fromarray(gray).convert("RGB")


@lru_cache(maxsize=32)
def _to_srgb(profile: bytes, mode: str) -> ImageCms.ImageCmsTransform | None:
    """Return the transform from the colors of an ICC profile to sRGB.

    None if it would change no channel by more than `SAME_COLOR`, or if the profile is damaged or not for the mode.
    """
    shown = "RGBA" if mode == "RGBA" else "RGB"
    try:
        colors = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        transform = ImageCms.buildTransform(colors, ImageCms.createProfile("sRGB"), mode, shown)
        # By what it does, not by its name: "Linear sRGB" is not sRGB.
        samples = Image.fromarray(_COLORS).convert(mode)
        before = np.asarray(samples.convert("RGB"), np.int16)
        after = np.asarray(transform.apply(samples).convert("RGB"), np.int16)
    except (ImageCms.PyCMSError, OSError, ValueError):
        return None
    return transform if np.abs(after - before).max() > SAME_COLOR else None
