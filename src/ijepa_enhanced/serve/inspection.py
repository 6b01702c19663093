"""What the page draws of images: pixels, principal components, merged regions, features and neighbors."""

from __future__ import annotations

import base64
import io
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from ijepa_enhanced.data.decode import displayed, unpatchify
from ijepa_enhanced.serve.engine import Answer
from ijepa_enhanced.serve.gallery import Gallery
from ijepa_enhanced.visualize.features import pca_maps

QUALITY = 90
"""Of the JPEG file that shows what the encoder sees."""


def inspect(answers: Sequence[Answer], patch_size: int, gallery: Gallery | None) -> dict[str, Any]:
    """Return what the page draws, ready for JSON.

    Args:
        answers: for each image, with maps.
        patch_size: P.
        gallery: where to look for neighbors.
    """
    outputs = [answer.made.output for answer in answers]
    maps = [output.maps for output in outputs if output.maps is not None]
    start = time.perf_counter()
    colors = pca_maps([torch.from_numpy(each.features) for each in maps])
    mapping = time.perf_counter() - start
    neighbors = gallery.nearest(np.stack([output.vector for output in outputs])) if gallery else [[] for _ in outputs]
    searching = time.perf_counter() - start - mapping
    images = [
        {
            "grid": answer.made.output.grid,
            "pixels": pixels_of(answer, patch_size),
            "colors": encoded(color),
            "features": encoded(each.features.astype("<f2")),
            "regions": [encoded(layer.astype("<u2")) for layer in each.regions],
            "tokens": answer.made.output.tokens,
            "pack": {"images": answer.made.pack.images, "tokens": answer.made.pack.tokens},
            "milliseconds": {
                "decode": 1000 * answer.decoding,
                "wait": 1000 * answer.made.waited,
                "encode": 1000 * answer.made.pack.seconds,
            },
            "neighbors": [near._asdict() for near in found],
        }
        for answer, color, each, found in zip(answers, colors, maps, neighbors, strict=True)
    ]
    return {"images": images, "milliseconds": {"colors": 1000 * mapping, "neighbors": 1000 * searching}}


def pixels_of(answer: Answer, patch_size: int) -> str:
    """Return the image as the encoder sees it, as a data URI."""
    assert answer.image.patches is not None
    pixels = displayed(unpatchify(answer.image.patches, *answer.made.output.grid, patch_size))
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", quality=QUALITY)
    return f"data:image/jpeg;base64,{encoded(file.getvalue())}"


def encoded(data: bytes | NDArray[Any]) -> str:
    """Return bytes, or those of an array, in base64."""
    return base64.b64encode(data if isinstance(data, bytes) else data.tobytes()).decode()
