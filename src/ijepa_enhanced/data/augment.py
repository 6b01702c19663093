"""Random colours and mirroring of a view: what the class of a photograph does not depend on."""

import numpy as np
from numpy.typing import NDArray

LUMA = np.array([0.299, 0.587, 0.114])
"""Grey of red, green and blue (ITU-R BT.601), as Pillow's `convert("L")`."""
TO_YIQ = np.array([LUMA, [0.596, -0.274, -0.322], [0.211, -0.523, 0.312]])
"""Hue is an angle in the plane of I and Q."""

BRIGHTNESS, CONTRAST, SATURATION, HUE = 0.4, 0.4, 0.2, 0.1
JITTER_PROBABILITY, GREY_PROBABILITY, MIRROR_PROBABILITY = 0.8, 0.2, 0.5
"""Ranges and probabilities of BYOL (arXiv 2006.07733, appendix B), which DINO and LeJEPA took over."""


def draw_colours(rng: np.random.Generator) -> tuple[NDArray[np.float64], float]:
    """A random change of colours: a matrix [3, 3] on RGB, and a contrast about the mean that it leaves."""
    brightness, contrast, saturation, hue = rng.uniform(-1, 1, 4) * (BRIGHTNESS, CONTRAST, SATURATION, HUE)
    jitter, grey = rng.random(2)
    matrix = np.eye(3)
    if jitter < JITTER_PROBABILITY:
        cos, sin = np.cos(2 * np.pi * hue), np.sin(2 * np.pi * hue)
        turn = np.array([[1, 0, 0], [0, cos, -sin], [0, sin, cos]])
        matrix = (1 + brightness) * _saturate(1 + saturation) @ np.linalg.inv(TO_YIQ) @ turn @ TO_YIQ
    else:
        contrast = 0.0
    if grey < GREY_PROBABILITY:
        matrix = _saturate(0.0) @ matrix
    return matrix, 1 + contrast


def augment(pixels: NDArray[np.uint8], rng: np.random.Generator) -> NDArray[np.uint8]:
    """[h, w, 3] in other colours and, half of the time, mirrored left to right."""
    matrix, contrast = draw_colours(rng)
    if rng.random() < MIRROR_PROBABILITY:
        pixels = pixels[:, ::-1]
    recoloured = pixels.astype(np.float32) @ matrix.T.astype(np.float32)
    mean = recoloured.mean() if contrast != 1 else 0.0
    return ((recoloured - mean) * contrast + mean + 0.5).clip(0, 255).astype(np.uint8)


def _saturate(factor: float) -> NDArray[np.float64]:
    return factor * np.eye(3) + (1 - factor) * np.outer(np.ones(3), LUMA)
