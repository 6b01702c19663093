"""What encoders make of some images, for a page: feature maps, and nearest neighbours."""

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

from ijepa_enhanced.data.decode import decode_views, upright_size
from ijepa_enhanced.data.sources.base import Source
from ijepa_enhanced.devices import autocast_dtype, best_device
from ijepa_enhanced.errors import UnreadableImage
from ijepa_enhanced.evaluate.features import Features, extract
from ijepa_enhanced.evaluate.tokens import InferenceConfig, LabelledSource
from ijepa_enhanced.visualize.features import pca_maps
from ijepa_enhanced.visualize.page import key, note, picture
from ijepa_enhanced.visualize.run import Run

SAMPLES = 8
"""Images whose features are shown."""
GALLERY = 512
"""Images among which neighbours are looked for: enough to be telling, and seconds to a minute of work on a CPU."""
NEIGHBOURS = 8
SAMPLE_SIDE, THUMBNAIL_SIDE = 150, 84
"""sqrt(height * width) of pictures on the page, in its pixels."""
SHARPNESS = 1.5
"""Pixels of a picture for each of the page's, along a side: screens show more than they say."""

Neighbours = dict[int, list[tuple[int, float]]]
"""Rows of other images and their similarities, the nearest first, by the row of an image."""


def sample_sections(runs: Sequence[Run]) -> dict[str, str]:
    """Title and HTML of what every encoder makes of the same images, those of the first run that still has them.

    Nothing where there is no encoder or no image.
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
            samples[row] = _thumbnail(images.source, row, SAMPLE_SIDE)
        if len(samples) == SAMPLES:
            break
    device = best_device()
    maps: list[list[NDArray[np.uint8]]] = []
    neighbours: list[Neighbours] = []
    try:
        for _, run, encoder in trained:
            resolution, workers = run.config["data"]["max_resolution"], run.config["data"]["workers"]
            features = extract(
                encoder.to(device),
                gallery,
                InferenceConfig(resolution, autocast_dtype("auto", device), workers=workers),
            )
            neighbours.append(nearest(features, list(samples), NEIGHBOURS))
            maps.append(pca_maps(encoder.feature_maps([images.source.open(row) for row in samples], resolution)))
    except (UnreadableImage, ValueError) as error:
        return {"Feature maps": note(f"There are no feature maps and no neighbours: {error}")}
    keys = [key(place, run.name) if len(runs) > 1 else "" for place, run, _ in trained]
    return {
        "Feature maps": _feature_maps(images, samples, maps, keys),
        "Nearest neighbours": _neighbours(images, neighbours, len(gallery.catalog.rows), keys),
    }


def nearest(features: Features, rows: Sequence[int], count: int) -> Neighbours:
    """Those of the images whose features have the highest cosine similarity with some of them, themselves left out.

    Args:
        features: of N images.
        rows: of some of these in their source.
        count: neighbours of each; N - 1 where that is less.
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
    """A figure for each sample: the image, and its map by each of the encoders."""
    figures = []
    for (row, thumbnail), *of_runs in zip(samples.items(), *maps, strict=True):
        parts = [_shown(thumbnail, images.source.key(row))]
        for colours in of_runs:
            alt = f"its features, {colours.shape[0]} x {colours.shape[1]} patches"
            parts.append(picture(Image.fromarray(colours), alt, round(thumbnail.height / SHARPNESS), exact=True))
        caption = escape(" · ".join(filter(None, [images.source.key(row), _label(images, row)])))
        figures.append(f'<figure><div class="row">{"".join(parts)}</div><figcaption>{caption}</figcaption></figure>')
    text = (
        "The first three principal components of the features of all patches of these images, as red, green and blue: "
        "patches of one colour are alike to the encoder."
    )
    order = f"From left to right: an image of {escape(images.source.name)}, {', '.join(keys)}."
    return (
        note(text)
        + (f'<p class="note">{order}</p>' if any(keys) else "")
        + f'<div class="pictures">{"".join(figures)}</div>'
    )


def _neighbours(images: LabelledSource, found: Sequence[Neighbours], among: int, keys: Sequence[str]) -> str:
    """A line for each sample and encoder: the image, and those nearest to it."""
    labels = images.source.labels
    shown = functools.cache(lambda row: _shown(_thumbnail(images.source, row, THUMBNAIL_SIDE), images.source.key(row)))
    lines = []
    for row in found[0]:
        for name, of_run in zip(keys, found, strict=True):
            caption = " ".join(filter(None, [name, escape(_label(images, row))]))
            figures = [f'<figure class="query">{shown(row)}<figcaption>{caption}</figcaption></figure>']
            for other, cosine in of_run[row]:
                same = ' class="same"' if labels is not None and labels[other] == labels[row] else ""
                caption = escape(f"{_label(images, other)} {cosine:.2f}".strip())
                figures.append(f"<figure>{shown(other)}<figcaption{same}>{caption}</figcaption></figure>")
            lines.append(f'<div class="near">{"".join(figures)}</div>')
    text = f"Left an image, then those nearest to it of {among:,}, by the cosine of their features, which stands below."
    shares = ""
    if labels is not None:
        agreeing = [np.mean([labels[near] == labels[row] for row in rows for near, _ in rows[row]]) for rows in found]
        listed = ", ".join(f"{share:.0%} {name}".strip() for share, name in zip(agreeing, keys, strict=True))
        shares = f'<p class="note">Green: of the same class ({listed}).</p>'
    return note(text) + shares + "".join(lines)


def _thumbnail(source: Source, row: int, resolution: int) -> Image.Image:
    """An image of `resolution`, sqrt(height * width) in pixels of the page, at its own aspect ratio.

    Raises:
        UnreadableImage: it cannot be decoded.
    """
    image = source.open(row)
    height, width = upright_size(image)
    scale = SHARPNESS * resolution / math.sqrt(height * width)
    size = np.maximum(1, np.rint([[height * scale, width * scale]])).astype(np.int64)
    return Image.fromarray(decode_views(image, np.array([[0, 0, height, width]]), size)[0])


def _shown(thumbnail: Image.Image, alt: str) -> str:
    return picture(thumbnail, alt, round(thumbnail.height / SHARPNESS))


def _label(images: LabelledSource, row: int) -> str:
    """The name of an image's class, or its number; empty where there are none."""
    labels = images.source.labels
    return "" if labels is None else images.catalog.class_name(int(labels[row]))
