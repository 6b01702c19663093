"""Pictures of token merging: which patches of an image have become one token, after several layers."""

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from ijepa_enhanced.data.decode import displayed, unpatchify
from ijepa_enhanced.data.inputs import ImageLike
from ijepa_enhanced.encoder import Encoder, Resolution
from ijepa_enhanced.models.vit import patches_to_tokens
from ijepa_enhanced.visualize.views import enlarged, sheet_of

DEPTHS = 3
"""Layers shown, spread evenly; the last one is the last layer."""
RESOLUTION = 230
"""sqrt(height * width) of each picture, in pixels."""
CAPTION = 18
"""Height of the line of text above a picture, in pixels."""


@torch.inference_mode()
def regions(
    encoder: Encoder, image: ImageLike, resolution: Resolution, merge_rate: float
) -> tuple[NDArray[np.uint8], list[NDArray[np.int64]]]:
    """Return the pixels of an image that an encoder sees, and which token holds each patch after each layer.

    Args:
        encoder, image, resolution: as for `Encoder.embed`.
        merge_rate: share of its tokens that each layer merges into others, above 0.

    Returns:
        The pixels uint8 [rows * P, cols * P, 3], see `displayed`; and for each layer int64 [rows, cols]: the number of
        the token, from 0 in each layer.

    Raises:
        UnreadableImage: the image cannot be decoded.
        ValueError: the merge rate is 0 or out of range.
    """
    (packed,) = encoder.packs([image], resolution)
    plan = encoder.merge_plan(packed.segments, merge_rate)
    if plan is None:
        raise ValueError("merge_rate must be above 0: at 0 no tokens merge, so there is nothing to draw.")
    device = encoder.device
    _, merges = encoder.network.tokens(encoder.preprocess(packed.to(device)), plan.to(device))
    rows, cols = packed.grids[0].tolist()
    pixels = displayed(unpatchify(packed.values.numpy(), rows, cols, encoder.config.patch_size))
    stages = [merge.origin.cpu().numpy() for merge in patches_to_tokens(merges) if merge is not None]
    return pixels, [stage.reshape(rows, cols) for stage in stages]


def draw_merges(encoder: Encoder, image: ImageLike, resolution: Resolution, merge_rate: float) -> Image.Image:
    """Return an image as the encoder sees it, and beside it the regions that its tokens cover after several layers.

    The patches of a token have their mean color and one outline, white around dark regions and black around light
    ones. Patches of a token need not touch. Arguments and errors are those of `regions`.
    """
    pixels, stages = regions(encoder, image, resolution, merge_rate)
    rows, cols = stages[0].shape
    cell = max(4, round(RESOLUTION / (rows * cols) ** 0.5))
    whole = Image.fromarray(pixels).resize((cols * cell, rows * cell), Image.Resampling.BICUBIC)
    pictures = [_captioned(np.asarray(whole), f"{rows * cols} patches")]
    for number in np.linspace(0, len(stages), min(DEPTHS, len(stages)) + 1)[1:].round().astype(int).tolist():
        stage = stages[number - 1]
        pictures.append(_captioned(_filled(pixels, stage, cell), f"layer {number}: {stage.max() + 1} tokens"))
    return sheet_of(pictures)


def _filled(pixels: NDArray[np.uint8], stage: NDArray[np.int64], cell: int) -> NDArray[np.uint8]:
    """Draw regions [rows, cols] in their mean colors, with outlines: uint8 [rows * cell, cols * cell, 3]."""
    rows, cols = stage.shape
    patches = pixels.reshape(rows, len(pixels) // rows, cols, -1, 3).mean(axis=(1, 3)).reshape(-1, 3)
    sums = np.stack([np.bincount(stage.ravel(), channel) for channel in patches.T], axis=1)
    colors = (sums / np.bincount(stage.ravel())[:, None]).round().astype(np.uint8)
    large = enlarged(stage, cell)
    around = np.pad(large, 1, constant_values=-1)
    height, width = large.shape
    edge = np.zeros(large.shape, np.bool_)
    for dy, dx in ((0, 1), (2, 1), (1, 0), (1, 2)):
        edge |= around[dy : dy + height, dx : dx + width] != large
    outlines = np.where(colors.mean(axis=1, keepdims=True) < 128, 255, 0).astype(np.uint8).repeat(3, axis=1)
    return np.where(edge[..., None], outlines[large], colors[large])


def _captioned(picture: NDArray[np.uint8], text: str) -> NDArray[np.uint8]:
    strip = Image.new("RGB", (picture.shape[1], CAPTION), "white")
    ImageDraw.Draw(strip).text((0, 0), text, fill="black")
    return np.concatenate([np.asarray(strip), picture])
