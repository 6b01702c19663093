"""What changes the pixels of a view in training: mirroring, color, blur. Every draw is the view's own."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFilter

from ijepa_enhanced.data.config import AugmentConfig

BRIGHTNESS, CONTRAST, SATURATION, HUE = 0.4, 0.4, 0.2, 0.1
"""How far each is drawn from 1, and the hue from 0, in turns (BYOL, arXiv 2006.07733, appendix B)."""
BLUR_SIGMA = (0.1, 2.0)
"""Standard deviation of the blur in pixels of a view of `BLUR_RESOLUTION` (BYOL, appendix B)."""
BLUR_RESOLUTION = 224
SOLARIZE_FROM = 128
"""Values from here on are inverted (BYOL, appendix B)."""
LUMA = np.array([0.299, 0.587, 0.114])
"""Weights of red, green and blue in gray (ITU-R BT.601)."""


def augment(pixels: NDArray[np.uint8], config: AugmentConfig, rng: np.random.Generator) -> NDArray[np.uint8]:
    """A view, changed: uint8 [h, w, 3] -> uint8 [h, w, 3].

    Whatever happens, as many numbers are drawn, so that one probability does not change what another does.
    """
    flip, color, gray, blur, solarize = rng.random(5) < dataclasses.astuple(config)
    brightness, contrast, saturation, hue, sigma = rng.random(5)
    if flip:
        pixels = pixels[:, ::-1]
    if color or gray:
        matrix, shift = np.eye(3), 0.0
        if color:
            matrix, shift = color_map(
                1 + BRIGHTNESS * (2 * brightness - 1),
                1 + CONTRAST * (2 * contrast - 1),
                1 + SATURATION * (2 * saturation - 1),
                HUE * (2 * hue - 1),
                float(pixels.mean(axis=(0, 1)) @ LUMA),
            )
        if gray:
            matrix = LUMA @ matrix * np.ones((3, 1))
        changed = pixels @ matrix.T.astype(np.float32) + np.float32(shift)
        pixels = np.rint(changed.clip(0, 255)).astype(np.uint8)
    if blur:
        low, high = BLUR_SIGMA
        resolution = math.sqrt(pixels.shape[0] * pixels.shape[1])
        radius = float(low + (high - low) * sigma) * resolution / BLUR_RESOLUTION
        blurred = Image.fromarray(np.ascontiguousarray(pixels)).filter(ImageFilter.GaussianBlur(radius))
        pixels = np.asarray(blurred)
    if solarize:
        pixels = np.where(pixels < SOLARIZE_FROM, pixels, 255 - pixels)
    return np.ascontiguousarray(pixels)


def color_map(
    brightness: float, contrast: float, saturation: float, hue: float, mean_luma: float
) -> tuple[NDArray[np.float64], float]:
    """A change of colors as one affine map: rgb -> matrix [3, 3] @ rgb + shift.

    Brightness scales; contrast scales distances from the view's mean luma, saturation those from a pixel's own luma;
    hue turns colors about the gray axis (Rodrigues' rotation). In this order, and cut off at the end alone: the code
    of SimCLR and BYOL draws the order and cuts off after each, and BYOL's adds to brightness instead of scaling.

    Args:
        brightness, contrast, saturation: factors; 1 changes nothing.
        hue: in turns; 1/3 makes red green, green blue and blue red.
        mean_luma: of the view, as it is.
    """
    saturate = saturation * np.eye(3) + (1 - saturation) * LUMA * np.ones((3, 1))
    cos, sin = math.cos(math.tau * hue), math.sin(math.tau * hue)
    across = np.array([[0.0, -1.0, 1.0], [1.0, 0.0, -1.0], [-1.0, 1.0, 0.0]])
    turn = cos * np.eye(3) + (1 - cos) / 3 * np.ones((3, 3)) + sin / math.sqrt(3) * across
    # Saturation and hue leave grays alone, so they leave the shift alone.
    return brightness * contrast * turn @ saturate, (1 - contrast) * brightness * mean_luma
