"""What changes the views of an image in training: mirroring, blur, color. Every draw is the view's own."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ijepa_enhanced.batch import Colors
from ijepa_enhanced.data.config import AugmentConfig
from ijepa_enhanced.randomness import Purpose, view_draws

BRIGHTNESS, CONTRAST, SATURATION, HUE = 0.4, 0.4, 0.2, 0.1
"""How far each is drawn from 1, and the hue from 0, in turns (BYOL, arXiv 2006.07733, appendix B)."""
BLUR_SIGMA = (0.1, 2.0)
"""Standard deviation of the blur in pixels of a view of `BLUR_RESOLUTION` (BYOL, appendix B)."""
BLUR_RESOLUTION = 224
LUMA = np.array([0.299, 0.587, 0.114])
"""Weights of red, green and blue in gray (ITU-R BT.601)."""


@dataclass(frozen=True)
class Changes:
    """What is drawn for V views: [V] each."""

    flip: NDArray[np.bool_]
    sigma: NDArray[np.float64]
    """Standard deviation of the blur, in pixels of the view; 0 without blur."""
    recolor: NDArray[np.bool_]
    """Whether brightness to hue change. If not, their factors are 1, and the hue is 0."""
    brightness: NDArray[np.float64]
    contrast: NDArray[np.float64]
    saturation: NDArray[np.float64]
    hue: NDArray[np.float64]
    """In turns."""
    gray: NDArray[np.bool_]
    solarize: NDArray[np.bool_]

    @classmethod
    def draw(
        cls, config: AugmentConfig, seed: int, epoch: int, views: Iterable[tuple[int, int]], sizes: NDArray[np.integer]
    ) -> Changes:
        """Draw the changes of V views.

        Whatever happens, as many numbers are drawn, so that one probability does not change what another does.

        Args:
            config: how often each happens.
            seed, epoch: of the draws.
            views: row of the image and number of each view.
            sizes: [V, 2] height and width of each view in pixels.
        """
        drawn = view_draws(seed, Purpose.AUGMENT, epoch, views, 10)
        flip, color, gray, blur, solarize = (drawn[:, :5] < dataclasses.astuple(config)).T
        spread = np.array([BRIGHTNESS, CONTRAST, SATURATION, HUE]) * color[:, None]
        brightness, contrast, saturation, hue = (np.array([1, 1, 1, 0]) + spread * (2 * drawn[:, 5:9] - 1)).T
        low, high = BLUR_SIGMA
        sigma = (low + (high - low) * drawn[:, 9]) * np.sqrt(sizes.prod(axis=1)) / BLUR_RESOLUTION
        return cls(flip, np.where(blur, sigma, 0), color, brightness, contrast, saturation, hue, gray, solarize)

    def colors(self, means: NDArray[np.floating]) -> Colors:
        """Return the changes of color as one affine map of each view.

        Brightness scales; contrast scales distances from the view's mean luma, saturation those from a pixel's own
        luma; hue turns colors about the gray axis (Rodrigues' rotation); gray is luma in every channel. In this order,
        and cut off at the end alone: the code of SimCLR and BYOL draws the order and cuts off after each, and BYOL's
        adds to brightness instead of scaling.

        If the channels are not red, green and blue, luma and hue do not exist. Then brightness scales all channels, and
        contrast scales distances from the mean of each channel.

        Args:
            means: [V, C] the mean of each channel of each view, before any change. Only views that `recolor` need it.
        """
        solarized = torch.from_numpy(self.solarize.copy())
        channels = means.shape[1]
        if channels != len(LUMA):
            shifts = ((1 - self.contrast) * self.brightness)[:, None] * means
            scales = (self.brightness * self.contrast)[:, None, None] * np.eye(channels)
            return Colors(
                torch.from_numpy(np.concatenate([scales, shifts[..., None]], axis=2, dtype=np.float32)), solarized
            )
        eye, ones = np.eye(3), np.ones((3, 3))
        saturation, angle = self.saturation[:, None, None], math.tau * self.hue[:, None, None]
        saturate = saturation * eye + (1 - saturation) * LUMA * ones
        across = np.array([[0.0, -1.0, 1.0], [1.0, 0.0, -1.0], [-1.0, 1.0, 0.0]])
        turn = np.cos(angle) * eye + (1 - np.cos(angle)) / 3 * ones + np.sin(angle) / math.sqrt(3) * across
        matrix = (self.brightness * self.contrast)[:, None, None] * turn @ saturate
        matrix = np.where(self.gray[:, None, None], ones * (LUMA @ matrix)[:, None, :], matrix)
        # Saturation, hue and gray leave grays alone, so they leave the shift alone.
        shift = (1 - self.contrast) * self.brightness * (means @ LUMA)
        affine = np.concatenate([matrix, np.repeat(shift[:, None, None], 3, axis=1)], axis=2, dtype=np.float32)
        return Colors(torch.from_numpy(affine), solarized)


def channel_means(pixels: NDArray[Any]) -> NDArray[np.float64]:
    """Return the mean of each channel of a view [h, w, C]: float64 [C]."""
    height, width, channels = pixels.shape
    if pixels.dtype != np.uint8:
        return pixels.mean(axis=(0, 1), dtype=np.float64)
    # Rows first: NumPy adds whole rows at once, but pixels of three values one by one.
    sums = pixels.reshape(height, -1).sum(axis=0, dtype=np.uint32)
    return sums.reshape(width, channels).sum(axis=0) / (height * width)
