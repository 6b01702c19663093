"""The ways to embed images of mixed sizes that are compared with each other, with the weights of one encoder."""

import math
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from ijepa_enhanced.benchmarks.peers import (
    PEERS,
    TOKENS,
    Embed,
    Images,
    Prepare,
    transformers_ijepa,
    transformers_model,
)
from ijepa_enhanced.devices import kind_of
from ijepa_enhanced.encoder import Encoder
from ijepa_enhanced.models.config import Architecture

RATES = (0.0, 0.05, 0.12)
SQUARE = 224
"""Pixels along a side of the squares that most image processors make."""
OURS = "ours"


class Method(NamedTuple):
    """A way to embed images."""

    name: str
    merge_rate: float
    prepare: Prepare
    square: int | None = None
    """Pixels along a side of the squares that images are squashed to; None: they keep their shapes."""

    def shown(self, images: Images) -> Images:
        """Return the images that the network sees."""
        return images if self.square is None else [squashed(image, self.square) for image in images]


def methods_of(encoder: Encoder, patches: float, folder: str | None = None) -> tuple[list[Method], dict[str, str]]:
    """Return the methods that can be compared here, and why each other peer is absent.

    Args:
        encoder: whose weights all of them have.
        patches: of an image, on average.
        folder: of the same weights, if transformers can load them itself. Without it, the peers are networks of ours
            in their code.
    """
    side = encoder.config.patch_size
    squares = sorted({SQUARE // side * side, max(1, round(math.sqrt(patches))) * side})
    alone: dict[str, Callable[[Encoder], Prepare]] = PEERS
    one_size: Callable[..., Prepare] = transformers_ijepa
    if folder is not None:
        one_size = partial(transformers_model, folder=folder)
        alone = {"transformers AutoModel": one_size}
    peers: dict[tuple[str, int | None], Callable[[Encoder], Prepare]] = {
        (name, None): peer for name, peer in alone.items()
    }
    batched = partial(one_size, tokens=TOKENS[kind_of(encoder.device)])
    peers |= {(f"transformers squares of {square} px", square): batched for square in squares}
    methods = [Method(OURS, rate, partial(ours, encoder, rate)) for rate in RATES]
    absent: dict[str, str] = {}
    for (name, square), peer in peers.items():
        try:
            methods.append(Method(name, 0.0, peer(encoder), square))
        except ModuleNotFoundError as error:
            absent[name] = "not installed" if error.name in name.split() else f"needs {error.name}"
    return methods, absent


def ours(encoder: Encoder, rate: float, images: Images) -> Embed:
    """Return what `Encoder.embed` does once it has read the images."""
    device = encoder.device
    packs = []
    for packed in encoder.packs(images, "native"):
        plan = encoder.merge_plan(packed.segments, rate)
        packs.append((packed.to(device), plan and plan.to(device)))
    return lambda: torch.cat([encoder.pool(encoder(packed, plan), packed) for packed, plan in packs])


def squashed(image: NDArray[np.uint8], side: int) -> NDArray[np.uint8]:
    """Return an image as a square."""
    return np.array(Image.fromarray(image).resize((side, side), Image.Resampling.BICUBIC))


def patches_of(images: Images, config: Architecture) -> list[int]:
    """Return the number of patches of each image."""
    return [image.shape[0] * image.shape[1] // config.patch_size**2 for image in images]
