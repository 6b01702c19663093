"""One feature an image, of a whole source: extracted once, scored by every protocol."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ijepa_enhanced.data.images import UnreadableImage, decode_views
from ijepa_enhanced.data.index import Index
from ijepa_enhanced.data.loader import PackDataset, make_loader
from ijepa_enhanced.data.plan import inference_packs
from ijepa_enhanced.data.sources import Source
from ijepa_enhanced.models.encoder import Encoder
from ijepa_enhanced.ops.pooling import segment_mean

TOKENS_PER_PACK = 16384
"""Tokens that an encoder sees at once."""


@dataclass(frozen=True)
class Features:
    """The features of the N readable images of a source, on the CPU."""

    values: Tensor
    """float32 [N, D]"""
    labels: Tensor | None
    """int64 [N], or None where the source has none."""
    image_ids: Tensor
    """int64 [N]: rows of the source, ascending."""
    unreadable: dict[int, str]
    """Row and reason of every image that could not be decoded."""
    seconds: float
    """From the first decoded image to the last feature."""


@torch.inference_mode()
def extract(
    encoder: Encoder,
    source: Source,
    index: Index,
    side: int | None,
    dtype: torch.dtype = torch.float32,
    tokens_per_pack: int = TOKENS_PER_PACK,
    merge_rate: float | Sequence[float] = 0.0,
    workers: int = 1,
    progress: Callable[[int], None] | None = None,
) -> Features:
    """The mean of each image's tokens: whole images, no crop.

    Args:
        encoder: in evaluation mode.
        source, index: the images.
        side: sqrt(height * width) in pixels after resizing, aspect ratio kept; None is native size.
        dtype: precision of the matrix products.
        tokens_per_pack: tokens in memory at once.
        merge_rate: see `Encoder.embed`.
        workers: processes that decode.
        progress: called with the number of images done.

    Raises:
        UnreadableImage: none of the images can be decoded.
        ValueError: a merge rate out of range.
    """
    device = encoder.pixel_scale.device
    config = encoder.config
    dataset = PackDataset(source, index, config.patch_size, depth=config.shape.depth, merge_rate=merge_rate)
    packs = inference_packs(index, side, config.patch_size, tokens_per_pack)
    values, image_ids, labels = [], [], []
    unreadable: dict[int, str] = {}
    start = time.perf_counter()
    for batch in make_loader(dataset, packs, workers, pin_memory=device.type == "cuda"):
        unreadable |= dict(batch.unreadable)
        if not len(batch.image_ids):
            continue
        packed = batch.packed.to(device, non_blocking=True)
        plan = batch.merge_plan and batch.merge_plan.to(device, non_blocking=True)
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            features = encoder(packed, plan)
        values.append(segment_mean(features, packed.segments.cu_seqlens).cpu())
        image_ids.append(batch.image_ids)
        if batch.labels is not None:
            labels.append(batch.labels)
        if progress:
            progress(sum(map(len, image_ids)))
    _need(values, source)
    return Features(
        torch.cat(values),
        torch.cat(labels) if labels else None,
        torch.cat(image_ids),
        unreadable,
        time.perf_counter() - start,
    )


def thumbnails(source: Source, index: Index, side: int = 16) -> Features:
    """The floor that any encoder must beat: each image squashed to `side` x `side` RGB pixels, [N, side * side * 3]."""
    start = time.perf_counter()
    values, kept, unreadable = [], [], {}
    for image, row in enumerate(index.rows.tolist()):
        box = np.array([[0, 0, index.heights[image], index.widths[image]]], dtype=np.float32)
        try:
            pixels = decode_views(source.open(row), box, np.array([[side, side]]))[0]
        except UnreadableImage as error:
            unreadable[row] = str(error)
            continue
        values.append(torch.from_numpy(pixels.reshape(-1)) / 255)
        kept.append(image)
    _need(values, source)
    rows = torch.from_numpy(index.rows[kept])
    labels = None if index.labels is None else torch.from_numpy(index.labels[kept])
    return Features(torch.stack(values), labels, rows, unreadable, time.perf_counter() - start)


def _need(values: list[Tensor], source: Source) -> None:
    if not values:
        raise UnreadableImage(f"None of the {len(source.keys)} images of {source.name} can be decoded.")
