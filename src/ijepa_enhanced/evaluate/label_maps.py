"""Images with a label map each: what the protocol `dense` learns from and is scored on."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ijepa_enhanced.data import synthetic
from ijepa_enhanced.data.bands import Bands, turned
from ijepa_enhanced.data.catalog import open_catalog
from ijepa_enhanced.data.opening import FAILURES, open_image, orientation_of
from ijepa_enhanced.data.sources.folder import FolderSource
from ijepa_enhanced.data.sources.open import open_source
from ijepa_enhanced.data.sources.synthetic import NAMES
from ijepa_enhanced.errors import SourceError, UnreadableImage
from ijepa_enhanced.evaluate.tokens import LabelledSource

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class LabelledMaps(LabelledSource):
    """Images with the label of each of their pixels."""

    label_map: Callable[[int], NDArray[np.uint8]]
    """The labels [h, w] of the upright image in a row of the source; raises UnreadableImage."""
    orientation: Callable[[int], int] = lambda row: 1
    """The EXIF orientation of the image in a row, 1 to 8."""
    ambiguous: set[int] = field(default_factory=set)
    """Rows of images that are turned, and whose label map has the same size over the pixels as they are stored."""


def open_maps(spec: str, part: str) -> LabelledMaps:
    """Return the images and label maps that `spec` describes.

    Args:
        spec: `synthetic`, `synthetic-bands`, or a folder with images in `images` and for each of them a PNG of the same
            name in `labels`, of one channel, of one bit or with a palette. It lies over the upright image. Its values
            are the labels; pixels of 255 do not count. If `images` has folders named after splits, `labels` may have
            the same ones.
        part: of the synthetic images.

    Raises:
        SourceError: there are no such images.
    """
    if spec in NAMES:
        source = open_source(spec, part)
        return LabelledMaps(source, open_catalog(source), partial(synthetic.label_map, part))
    root = Path(spec).expanduser()
    if not ((root / "images").is_dir() and (root / "labels").is_dir()):
        raise SourceError(
            f"{spec} has no label maps. For the protocol dense, put the images into {root / 'images'} and a PNG of the "
            f"same name for each image into {root / 'labels'}, or use 'synthetic'."
        )
    source = open_source(str(root / "images"), part)
    catalog = open_catalog(source)
    labels = root / "labels"
    if isinstance(source, FolderSource) and (split := labels / source.root.relative_to(root / "images")).is_dir():
        labels = split
    return LabelledMaps(
        source,
        catalog,
        lambda row: _read_map((labels / source.key(row)).with_suffix(".png")),
        lambda row: orientation_of(source.open(row)),
    )


def _read_map(path: Path) -> NDArray[np.uint8]:
    try:
        image = open_image(path.read_bytes())
        stored = None if isinstance(image, Bands) else np.asarray(image, dtype=np.uint8)
    except FAILURES as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise UnreadableImage(f"The label map {path} cannot be read: {reason}.") from error
    if stored is None or image.mode not in ("1", "L", "P"):
        raise UnreadableImage(
            f"{path} is not a label map: its image mode must be L (one channel), P (palette) or 1 (one bit), not "
            f"{image.mode}."
        )
    return np.ascontiguousarray(turned(stored, orientation_of(image)))


def map_of(maps: LabelledMaps, row: int) -> NDArray[np.uint8]:
    """Return the labels [h, w] of the upright image in a row of the source.

    Raises:
        UnreadableImage: the label map cannot be read, or is not of its image's size.
    """
    labels = maps.label_map(row)
    image = int(np.searchsorted(maps.catalog.rows, row))
    size = int(maps.catalog.heights[image]), int(maps.catalog.widths[image])
    orientation = maps.orientation(row)
    if labels.shape != size:
        after = f" after its EXIF orientation ({orientation}) is applied" if orientation > 1 else ""
        raise UnreadableImage(
            f"The label map of {maps.source.key(row)} in {maps.source.name} is {labels.shape[0]} x {labels.shape[1]} "
            f"px, but its image is {size[0]} x {size[1]} px{after}."
        )
    if orientation > 1 and (orientation <= 4 or size[0] == size[1]):
        if not maps.ambiguous:
            logger.warning(
                "%s in %s is rotated or flipped by its EXIF orientation, and the size of its label map does not show "
                "whether the map needs the same change. Label maps are assumed to match the images after the EXIF "
                "orientation is applied.",
                maps.source.key(row),
                maps.source.name,
            )
        maps.ambiguous.add(row)
    return labels
