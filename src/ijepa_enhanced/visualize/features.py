"""Pictures of features: their principal components as colors, and how similar patches are."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from ijepa_enhanced.data.decode import displayed, unpatchify
from ijepa_enhanced.data.inputs import ImageLike
from ijepa_enhanced.encoder import Encoder, Resolution
from ijepa_enhanced.visualize.views import MARGIN, enlarged, save_png, sheet_of

RESOLUTION = 280
"""sqrt(height * width) of each picture, in pixels."""
COMPONENTS = 3
"""Red, green and blue."""
TAIL = 2.0
"""Percent of patches at each end of a component that are drawn at the darkest or the brightest level."""
RAMP = np.array([[0, 0, 20], [85, 15, 110], [185, 55, 85], [250, 140, 10], [252, 255, 165]])
"""Colors from the least similar patch to the chosen one: dark to bright, which color-blind people can read too."""
MARK = np.array([0, 255, 255], np.uint8)
"""Color of the outline of the chosen patch: cyan, which is not in `RAMP`."""


@torch.no_grad()
def pca_maps(maps: Sequence[Tensor]) -> list[NDArray[np.uint8]]:
    """Return the first three principal components of all patches together, as red, green and blue.

    Similar colors mean similar features, within an image and between images. Each component runs from 0 to 255 between
    its 2nd and 98th percentile; a component without variance is a medium gray. The sign of a component is chosen so
    that its largest loading is positive, which makes the colors repeatable.

    Args:
        maps: N feature maps [rows, cols, D], of any mix of sizes; at least one.

    Returns:
        N arrays uint8 [rows, cols, 3].

    Raises:
        ValueError: a feature is not finite.
    """
    tokens = torch.cat([features.flatten(0, 1) for features in maps]).cpu().double()
    if not tokens.isfinite().all():
        raise ValueError("Some features are NaN or infinite, so the encoder cannot be used.")
    centered = tokens - tokens.mean(dim=0)
    variances, directions = torch.linalg.eigh(centered.T @ centered)
    variances, directions = variances.flip(0)[:COMPONENTS], directions.flip(1)[:, :COMPONENTS]
    largest = directions.abs().argmax(dim=0, keepdim=True)
    directions = directions * directions.gather(0, largest).sign()
    scores = np.full((len(tokens), COMPONENTS), 0.5)
    # Below this a component is rounding, not variance.
    for number in np.flatnonzero(variances > 1e-10 * tokens.square().sum()).tolist():
        score = (centered @ directions[:, number]).numpy()
        low, high = np.percentile(score, (TAIL, 100 - TAIL))
        # A component that only a few patches have is constant between its percentiles: show its whole range.
        low, high = (low, high) if high > low else (score.min(), score.max())
        scores[:, number] = ((score - low) / (high - low)).clip(0, 1)
    ends = np.cumsum([features.shape[0] * features.shape[1] for features in maps])
    colors = np.split((255 * scores).round().astype(np.uint8), ends[:-1])
    return [color.reshape(*features.shape[:2], COMPONENTS) for color, features in zip(colors, maps, strict=True)]


def similarity_map(features: Tensor, row: int, col: int) -> Tensor:
    """Return the cosine similarity of every patch to one of them: [rows, cols, D] -> float32 [rows, cols].

    Raises:
        ValueError: there is no such patch.
    """
    rows, cols = features.shape[:2]
    if not (0 <= row < rows and 0 <= col < cols):
        raise ValueError(
            f"Patch ({row}, {col}) is outside the grid of {rows} x {cols} patches. Rows go from 0 to {rows - 1}, "
            f"columns from 0 to {cols - 1}."
        )
    directions = F.normalize(features.float(), dim=2)
    return directions @ directions[row, col]


def draw_features(
    encoder: Encoder,
    images: Sequence[ImageLike],
    path: Path,
    patch: tuple[int, int] | None = None,
    resolution: Resolution = None,
) -> list[tuple[int, int]]:
    """Write a PNG with each image as the encoder sees it (see `displayed`), and its features to the right of it.

    First come their principal components over all images (`pca_maps`). If a `patch` is chosen, then comes how similar
    every patch is to it (`similarity_map`), from dark, the least similar in the image, to bright; it is outlined.

    Args:
        encoder: in evaluation mode.
        images: at least one.
        path: the PNG.
        patch: row and column, from 0, in the grid of every image.
        resolution: as for `Encoder.embed`; None is the trained one.

    Returns:
        Rows and columns of each image's grid of patches.

    Raises:
        UnreadableImage: an image cannot be decoded.
        ValueError: an image has no such patch, or a feature is not finite.
    """
    maps = encoder.feature_maps(images, resolution)
    grids = [(features.shape[0], features.shape[1]) for features in maps]
    views = [view for packed in encoder.packs(images, resolution) for view in packed.split()]
    pictures = []
    for patches, features, colors in zip(views, maps, pca_maps(maps), strict=True):
        rows, cols = features.shape[:2]
        cell = max(4, round(RESOLUTION / (rows * cols) ** 0.5))
        pixels = displayed(unpatchify(patches.numpy(), rows, cols, encoder.config.patch_size))
        shown = [
            np.array(Image.fromarray(pixels).resize((cols * cell, rows * cell), Image.Resampling.BICUBIC)),
            enlarged(colors, cell),
        ]
        if patch is not None:
            shown.append(enlarged(_ramp(similarity_map(features, *patch)), cell))
            for picture in (shown[0], shown[2]):
                _outline(picture, *patch, cell)
        gap = np.full((rows * cell, MARGIN // 2, 3), 255, np.uint8)
        pictures.append(np.concatenate([part for picture in shown for part in (picture, gap)][:-1], axis=1))
    save_png(sheet_of(pictures), path)
    return grids


def _ramp(similarity: Tensor) -> NDArray[np.uint8]:
    """Return similarities [rows, cols] as colors uint8 [rows, cols, 3], from the lowest of them to 1."""
    values = similarity.cpu().numpy()
    low = float(values.min())
    places = (values - low) / max(1 - low, 1e-6) * (len(RAMP) - 1)
    channels = [np.interp(places, np.arange(len(RAMP)), channel) for channel in RAMP.T]
    return np.stack(channels, axis=2).round().astype(np.uint8)


def _outline(picture: NDArray[np.uint8], row: int, col: int, cell: int) -> None:
    """Outline a patch in place."""
    inside = picture[row * cell : (row + 1) * cell, col * cell : (col + 1) * cell]
    width = max(1, cell // 10)
    for edge in (inside[:width], inside[-width:], inside[:, :width], inside[:, -width:]):
        edge[:] = MARK
