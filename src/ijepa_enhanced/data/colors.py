"""Convert the colors of Pillow's images: to sRGB with 8 bits, or gray with 16 bits."""

from __future__ import annotations

import io
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageCms, TiffImagePlugin

from ijepa_enhanced.data.bands import check_finite
from ijepa_enhanced.errors import UnreadableImage

SAME_COLOR = 3
"""Largest difference, in levels of 255, between lcms's sRGB and profiles that are sRGB. Their curves are rounded."""

_COLORS = np.stack(np.meshgrid(*[np.arange(0, 256, 51, dtype=np.uint8)] * 3), axis=-1).reshape(1, -1, 3)
"""A grid of RGB colors, [1, 216, 3]."""

_PHOTOMETRIC = 0x0106
"""TIFF tag of the photometric interpretation. Its value 0 means that 0 is white."""


def rgb(image: Image.Image) -> Image.Image:
    """Return an image in sRGB with 8 bits, transparent pixels on white.

    Raises:
        UnreadableImage: a value is NaN or infinite.
        Exception: the pixels are damaged, see `decode.FAILURES`.
    """
    if image.mode in ("I", "F"):
        # These images have no white point. So the darkest and the brightest pixel set the scale.
        values = np.asarray(image, dtype=np.float64)
        check_finite(values)
        low, high = values.min(), values.max()
        return Image.fromarray(((values - low) / ((high - low) or 1) * 255).round().astype(np.uint8)).convert("RGB")
    transparent = image.has_transparency_data
    profile = image.info.get("icc_profile", b"")
    if transparent:
        image = image.convert("RGBA")
    elif image.mode not in ("L", "RGB", "CMYK"):
        image = image.convert("RGB")
    if profile:
        transform = to_srgb(profile, image.mode)
        image = image if transform is None else transform.apply(image)
    if transparent:
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image if image.mode == "RGB" else image.convert("RGB")


def stored_values(image: Image.Image) -> NDArray[Any]:
    """Return the stored values of an image, [h, w] or [h, w, C]. A palette becomes RGB, and single bits become bytes.

    Raises:
        UnreadableImage: the values are 32-bit integers, or a value is NaN or infinite.
        Exception: the pixels are damaged, see `decode.FAILURES`.
    """
    if image.mode == "I":
        raise UnreadableImage("has signed integers or more than 16 bits: save the values as uint16 or floats")
    if not image.mode.startswith("I;16"):
        values = np.asarray(image.convert({"P": "RGB", "1": "L"}[image.mode]) if image.mode in ("P", "1") else image)
        check_finite(values)
        return values
    stored = values = np.asarray(image).astype(np.uint16)  # in the byte order of this machine
    if isinstance(image, TiffImagePlugin.TiffImageFile) and image.tag_v2.get(_PHOTOMETRIC) == 0:
        values = 65535 - values  # 0 is white. Pillow inverts such images itself only up to 8 bits.
    if (transparent := image.info.get("transparency")) is not None:
        values = np.where(stored == transparent, np.uint16(65535), values)
    return values


@lru_cache(maxsize=32)
def to_srgb(profile: bytes, mode: str) -> ImageCms.ImageCmsTransform | None:
    """Return the transform from the colors of an ICC profile to sRGB.

    Return None if it changes no channel by more than `SAME_COLOR`, or if the profile is damaged or does not fit the
    mode.
    """
    shown = "RGBA" if mode == "RGBA" else "RGB"
    try:
        colors = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        transform = ImageCms.buildTransform(colors, ImageCms.createProfile("sRGB"), mode, shown)
        # Compare results, not names: "Linear sRGB" is not sRGB.
        samples = Image.fromarray(_COLORS).convert(mode)
        before = np.asarray(samples.convert("RGB"), np.int16)
        after = np.asarray(transform.apply(samples).convert("RGB"), np.int16)
    except (ImageCms.PyCMSError, OSError, ValueError):
        return None
    return transform if np.abs(after - before).max() > SAME_COLOR else None
