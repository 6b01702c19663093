"""The sections of a report that show what encoders learned: feature maps and nearest neighbors of some images."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from contextlib import suppress
from html import escape

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image

from ijepa_enhanced.data.decode import decode_views, displayed, shown_channels
from ijepa_enhanced.data.opening import upright_size
from ijepa_enhanced.data.sources.base import Source
from ijepa_enhanced.devices import autocast_dtype, best_device
from ijepa_enhanced.encoder import Encoder
from ijepa_enhanced.errors import UnreadableImage
from ijepa_enhanced.evaluate.features import Features, extract
from ijepa_enhanced.evaluate.tokens import InferenceConfig, LabelledSource
from ijepa_enhanced.visualize.chart import key
from ijepa_enhanced.visualize.features import pca_maps
from ijepa_enhanced.visualize.page import note, picture
from ijepa_enhanced.visualize.run import Run

SAMPLES = 8
"""Images whose features are shown."""
GALLERY = 512
"""Images that are searched for neighbors: seconds to a minute of work on a CPU."""
NEIGHBORS = 8
SAMPLE_SIZE, THUMBNAIL_SIZE = 150, 84
"""sqrt(height * width) of pictures on the page, in pixels of the page."""
SHARPNESS = 1.5
"""Pixels of a picture for each pixel of the page, along an edge: many screens have more pixels than they report."""

Neighbors = dict[int, list[tuple[int, float]]]
"""For the row of each image: the rows of other images and their similarities, the most similar first."""


def sample_sections(runs: Sequence[Run]) -> dict[str, str]:
    """Return title and HTML of both sections; none without an encoder or without images.

    All encoders are shown the same images, those of the first run that still has them, each encoder at the resolution
    that it was trained at.
    """
    trained = [(place, run, run.encoder) for place, run in enumerate(runs) if run.encoder is not None]
    images = next((run.images for run in runs if run.images is not None), None)
    if images is None or not trained:
        return {}
    count = len(images.catalog.rows)
    chosen = np.random.default_rng(0).choice(count, min(GALLERY, count), replace=False)
    gallery = LabelledSource(images.source, images.catalog.select(np.sort(chosen)))
    samples: dict[int, Image.Image] = {}
    for row in images.catalog.rows[chosen].tolist():
        with suppress(UnreadableImage):
            samples[row] = _thumbnail(images.source, row, SAMPLE_SIZE)
        if len(samples) == SAMPLES:
            break
    device = best_device()
    maps: list[list[NDArray[np.uint8]]] = []
    neighbors: list[Neighbors] = []
    try:
        for _, run, folder in trained:
            encoder = Encoder.from_pretrained(folder).to(device)
            resolution, workers = encoder.preprocessing.resolution, run.config["data"]["workers"]
            config = InferenceConfig(resolution, autocast_dtype("auto", device), workers=workers)
            features = extract(encoder, gallery, config)
            neighbors.append(nearest(features, list(samples), NEIGHBORS))
            maps.append(pca_maps(encoder.feature_maps([images.source.open(row) for row in samples])))
    except (UnreadableImage, ValueError) as error:
        return {"Feature maps": note(f"Feature maps and nearest neighbors cannot be shown: {error}")}
    keys = [key(place, run.name) if len(runs) > 1 else "" for place, run, _ in trained]
    return {
        "Feature maps": _feature_maps(images, samples, maps, keys),
        "Nearest neighbors": _neighbors(images, neighbors, len(features.image_ids) - 1, keys),
    }


def nearest(features: Features, rows: Sequence[int], count: int) -> Neighbors:
    """Return the images whose features have the highest cosine similarity with each of some images.

    Args:
        features: features of N images.
        rows: some of their rows in the source.
        count: neighbors of each image, at most N - 1; an image is not its own neighbor.
    """
    directions = F.normalize(features.values, dim=1)
    places = torch.searchsorted(features.image_ids, torch.tensor(rows))
    similarities = directions[places] @ directions.T
    similarities[torch.arange(len(rows)), places] = -torch.inf
    found = similarities.topk(min(count, len(directions) - 1))
    return {
        row: list(zip(features.image_ids[where].tolist(), values.tolist(), strict=True))
        for row, where, values in zip(rows, found.indices, found.values, strict=True)
    }


def _feature_maps(
    images: LabelledSource,
    samples: dict[int, Image.Image],
    maps: Sequence[list[NDArray[np.uint8]]],
    keys: Sequence[str],
) -> str:
    """Return a figure for each sample: the image, and its map by each of the encoders. `keys` are HTML."""
    figures = []
    for (row, thumbnail), *of_runs in zip(samples.items(), *maps, strict=True):
        name = _name(images, row)
        parts = [_shown(thumbnail, name)]
        for colors in of_runs:
            alt = f"feature map of {name}, {colors.shape[0]} x {colors.shape[1]} patches"
            parts.append(picture(Image.fromarray(colors), alt, round(thumbnail.height / SHARPNESS), exact=True))
        caption = escape(" · ".join(filter(None, [name, _label(images, row)])))
        figures.append(f'<figure><div class="row">{"".join(parts)}</div><figcaption>{caption}</figcaption></figure>')
    text = (
        "Each image with a map of the teacher's patch features. Red, green and blue are the first three principal "
        "components of the features, over all patches shown here. Similar colors mean similar features."
    )
    several = ""
    if any(keys):
        order = f"From left to right: the image, then its map for {', '.join(keys)}."
        several = f'<p class="note">{order} Colors can be compared between images, but not between runs.</p>'
    return note(text) + several + f'<div class="pictures">{"".join(figures)}</div>'


def _neighbors(images: LabelledSource, found: Sequence[Neighbors], others: int, keys: Sequence[str]) -> str:
    """Return a line for each sample and encoder: the image, and those nearest to it. `keys` are HTML."""
    shown = functools.cache(lambda row: _shown(_thumbnail(images.source, row, THUMBNAIL_SIZE), _name(images, row)))
    lines = []
    for row in found[0]:
        for run, of_run in zip(keys, found, strict=True):
            caption = " ".join(filter(None, [run, escape(_label(images, row))]))
            figures = [f'<figure class="query">{shown(row)}<figcaption>{caption}</figcaption></figure>']
            for other, cosine in of_run[row]:
                same = ' class="same"' if _same_class(images, row, other) else ""
                caption = escape(f"{_label(images, other)} {cosine:.2f}".strip())
                figures.append(f"<figure>{shown(other)}<figcaption{same}>{caption}</figcaption></figure>")
            lines.append(f'<div class="near">{"".join(figures)}</div>')
    text = (
        f"Left: a training image. Right: the most similar of {others:,} other training images. The number is the "
        "cosine similarity of the two features."
    )
    shares = ""
    if any(_label(images, row) for row in found[0]):
        agreeing = [
            np.mean([_same_class(images, row, near) for row in rows for near, _ in rows[row]]) for rows in found
        ]
        listed = ", ".join(f"{share:.0%} {run}".strip() for share, run in zip(agreeing, keys, strict=True))
        green = f"Green: same class as the image on the left. Neighbors of the same class: {listed}."
        shares = f'<p class="note">{green}</p>'
    return note(text) + shares + "".join(lines)


def _name(images: LabelledSource, row: int) -> str:
    return images.source.key(row)


def _label(images: LabelledSource, row: int) -> str:
    """Return the name of an image's class, or its number; nothing for an image without a label."""
    labels = images.source.labels
    return "" if labels is None or labels[row] < 0 else images.catalog.class_name(int(labels[row]))


def _same_class(images: LabelledSource, row: int, other: int) -> bool:
    return bool(_label(images, row)) and _label(images, row) == _label(images, other)


def _thumbnail(source: Source, row: int, size: int) -> Image.Image:
    """Return an image with its aspect ratio kept.

    Args:
        source, row: the image.
        size: sqrt(height * width) on the page, in pixels of the page.

    Raises:
        UnreadableImage: the image cannot be decoded.
    """
    image = source.open(row)
    height, width = upright_size(image)
    scale = SHARPNESS * size / math.sqrt(height * width)
    pixels = np.maximum(1, np.rint([[height * scale, width * scale]])).astype(np.int64)
    box, channels = np.array([[0, 0, height, width]]), shown_channels(image)
    return Image.fromarray(displayed(decode_views(image, box, pixels, channels=channels)[0]))


def _shown(thumbnail: Image.Image, alt: str) -> str:
    return picture(thumbnail, alt, round(thumbnail.height / SHARPNESS))
