"""Decode an opened image into the pixels of its views."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image, JpegImagePlugin

from ijepa_enhanced.data.bands import Bands, turned
from ijepa_enhanced.data.colors import rgb, stored_values, to_srgb
from ijepa_enhanced.data.opening import (
    FAILURES,
    Opened,
    channels_of,
    check_channels,
    check_orientation,
    orientation_of,
    upright_size,
)
from ijepa_enhanced.errors import UnreadableImage
from ijepa_enhanced.ops.preprocess import CHANNELS

LONGEST = 65_500
"""Pixels along a side that a JPEG file can have."""

GAP = 2
"""Pixels for every output pixel that cheap reduction leaves to the bicubic filter, as in Pillow's `thumbnail`."""

TRIANGLES = math.sqrt(3)
"""How many times smaller than a view its blurred copy is, for a blur of one pixel. To shrink and to enlarge by s, the
linear filter weighs pixels by a triangle with variance s^2 / 6 each time, which makes s^2 / 3 in all."""


def decode_views(
    image: Opened,
    boxes: NDArray[np.floating | np.integer],
    sizes: NDArray[np.integer],
    flips: NDArray[np.bool_] | None = None,
    sigmas: NDArray[np.floating] | None = None,
    channels: int = CHANNELS,
) -> list[NDArray[Any]]:
    """Return V views of one image, decoded once. With 3 channels they are sRGB, with transparent pixels on white.

    Args:
        image: of any mode; only the first frame of an animation is shown. It keeps its size and can be used again.
        boxes: [V, 4] top, left, height, width in pixels of the upright image. Edges are moved to whole pixels.
        sizes: [V, 2] height and width to resize each box to, in pixels (bicubic, with antialiasing).
        flips: whether to mirror each view. None: no view.
        sigmas: standard deviation of the Gaussian blur of each view, in its pixels; 0 for none. None: no view.
        channels: C. With 3, gray images become RGB.

    Returns:
        V arrays [height, width, C]: uint8, or float32 if the image has more than 8 bits. 16-bit values are scaled to
        the range 0 to 255. Floats are multiplied by 255 and not clipped.

    Raises:
        UnreadableImage: the pixels cannot be decoded or are not finite, or the image does not have C channels.
    """
    pixels, scale = decode_pixels(image, float((boxes[:, 2:] / sizes).min()), channels)
    flips = np.zeros(len(boxes), dtype=np.bool_) if flips is None else flips
    sigmas = np.zeros(len(boxes)) if sigmas is None else sigmas
    views = zip((boxes / scale).tolist(), sizes.tolist(), flips.tolist(), sigmas.tolist(), strict=True)
    return [_view(pixels, *view) for view in views]


def decode_pixels(image: Opened, shrink: float, channels: int = CHANNELS) -> tuple[NDArray[Any], int]:
    """Return the upright pixels [h, w, C] for views at least `shrink` times smaller, and how much smaller they are.

    The array has the stored type: uint8, uint16 or float. Do not write to it. Errors as for `decode_views`.
    """
    check_channels(image, channels)
    try:
        if isinstance(image, Bands) and (plain := _plain(image, channels)) is not None:
            image = plain
        if isinstance(image, Bands):
            return _as_many(image.pixels(), channels), 1
        if channels == CHANNELS and not image.mode.startswith("I;16"):
            return _rgb_pixels(image, shrink)
        orientation = orientation_of(image)
        pixels = stored_values(image)
        check_orientation(image, orientation)
        return _as_many(turned(pixels, orientation), channels), 1
    except UnreadableImage:
        raise
    except FAILURES as error:
        raise UnreadableImage(f"cannot be decoded: {error}") from error


def _rgb_pixels(image: Image.Image, shrink: float) -> tuple[NDArray[np.uint8], int]:
    """Return the result of `decode_pixels` in sRGB."""
    orientation = orientation_of(image)
    pixels, scale = _reduced(image, shrink)
    pixels = rgb(pixels)
    pixels.load()
    check_orientation(image, orientation)
    if scale == 1 and shrink >= 2 * GAP:  # of a format without scales, the fewer pixels the faster
        scale = int(shrink / GAP)
        pixels = pixels.reduce(scale)
    return turned(np.asarray(pixels), orientation), scale


def _as_many(pixels: NDArray[Any], channels: int) -> NDArray[Any]:
    """Return pixels [h, w] or [h, w, C] as [h, w, channels]. One channel is repeated if three are asked for."""
    pixels = pixels.reshape(*pixels.shape[:2], -1)
    return np.broadcast_to(pixels, (*pixels.shape[:2], channels))


def _plain(image: Bands, channels: int) -> Image.Image | None:
    """Return the image as Pillow reads it, in 8 bits, if it must be converted to RGB from other channels or by an ICC
    profile."""
    if channels != CHANNELS or image.plain is None:
        return None
    profile = image.plain.info.get("icc_profile", b"")
    changed = bool(profile) and to_srgb(profile, image.plain.mode) is not None
    return image.plain if changed or image.channels not in (1, CHANNELS) else None


def _view(pixels: NDArray[Any], box: Sequence[float], size: Sequence[int], flip: bool, sigma: float) -> NDArray[Any]:
    """Return one view for `decode_views` from the pixels [h, w, C] of an image. The box is in these pixels."""
    top, left, bottom, right = (round(edge) for edge in (box[0], box[1], box[0] + box[2], box[1] + box[3]))
    top, left = min(top, len(pixels) - 1), min(left, pixels.shape[1] - 1)
    crop = _levels(pixels[top : max(bottom, top + 1), left : max(right, left + 1)])
    # PyTorch's filters for bytes are Pillow's, three times as fast (AVX2) where channels come last in memory.
    view = torch.from_numpy(crop).unsqueeze(0).permute(0, 3, 1, 2)
    if sigma:
        step = max(1.0, TRIANGLES * sigma)
        for shape in ([max(1, round(side / step)) for side in size], size):
            view = F.interpolate(view, shape, mode="bilinear", antialias=True)
    else:
        view = F.interpolate(view, size, mode="bicubic", antialias=True)
    if pixels.dtype == np.uint16:
        view = view.clamp_(0, 255)  # bicubic filters overshoot; PyTorch clamps bytes itself
    if flip:
        view = view.flip(3)
    return view.permute(0, 2, 3, 1)[0].numpy()


def _levels(pixels: NDArray[Any]) -> NDArray[Any]:
    """Return a copy with values from 0 to 255: uint8, or float32 if the pixels have more than 8 bits."""
    if pixels.dtype == np.uint8:
        return pixels.copy()
    return pixels / np.float32(257) if pixels.dtype == np.uint16 else pixels.astype(np.float32) * 255


def decode_whole(image: Opened, max_resolution: float, channels: int = CHANNELS) -> NDArray[Any]:
    """Return the whole image as `decode_views` does, [height, width, C], but shrunk if it exceeds `max_resolution`.

    Args:
        image, channels: see `decode_views`.
        max_resolution: sqrt(height * width) in pixels.

    Raises:
        UnreadableImage: see `decode_views`.
    """
    height, width = upright_size(image)
    scale = min(1.0, max_resolution / math.sqrt(height * width))
    size = np.rint([[height * scale, width * scale]]).clip(1, LONGEST).astype(np.int64)
    return decode_views(image, np.array([[0, 0, height, width]]), size, channels=channels)[0]


def picture_of(image: Opened, max_resolution: float) -> NDArray[np.uint8]:
    """Return the whole image for display, uint8 [height, width, 3]: see `displayed`. Arguments as for
    `decode_whole`."""
    return displayed(decode_whole(image, max_resolution, shown_channels(image)))


def shown_channels(image: Opened) -> int:
    """Return how many channels to decode before an image is `displayed`: 3 if it can become RGB, else all of them."""
    return channels_of(image) if isinstance(image, Bands) and image.plain is None else CHANNELS


def displayed(pixels: NDArray[Any]) -> NDArray[np.uint8]:
    """Return pixels [h, w, C] as RGB, uint8 [h, w, 3]. The first three channels become red, green and blue.

    If there are fewer than three channels, the first one becomes gray. Values of more than 8 bits are stretched in each
    channel: the 2nd percentile of the picture becomes black and the 98th white, because few cameras use all 16 bits.
    """
    shown = pixels[..., :CHANNELS] if pixels.shape[2] >= CHANNELS else pixels[..., :1].repeat(CHANNELS, axis=2)
    if shown.dtype == np.uint8:
        return shown
    low, high = np.percentile(shown, (2, 98), axis=(0, 1))
    return (255 * ((shown - low) / np.maximum(high - low, 1e-6)).clip(0, 1)).round().astype(np.uint8)


def patchify(pixels: NDArray[Any], patch_size: int, out: NDArray[Any] | None = None) -> NDArray[Any]:
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


def unpatchify(patches: NDArray[Any], rows: int, cols: int, patch_size: int) -> NDArray[Any]:
    """The inverse of `patchify`: [rows * cols, P * P * C] to [rows * P, cols * P, C]."""
    grid = patches.reshape(rows, cols, patch_size, patch_size, -1)
    return grid.swapaxes(1, 2).reshape(rows * patch_size, cols * patch_size, -1)


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
