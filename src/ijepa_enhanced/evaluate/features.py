"""One feature an image, for a whole source: extracted once, kept in a cache, scored by every protocol."""

from __future__ import annotations

import hashlib
import itertools
import platform
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial

import numpy as np
import PIL
import torch
from torch import Tensor
from torch.utils.data import Dataset

from ijepa_enhanced.batch import Batch
from ijepa_enhanced.data.catalog import Catalog
from ijepa_enhanced.data.decode import decode_views
from ijepa_enhanced.data.loader import check_unchanged, make_loader
from ijepa_enhanced.data.sources.base import UNREAD
from ijepa_enhanced.devices import device_name
from ijepa_enhanced.encoder import Encoder, hash_weights
from ijepa_enhanced.errors import UnreadableImage
from ijepa_enhanced.evaluate.cache import FeatureCache, Part, cache_limit
from ijepa_enhanced.evaluate.tokens import InferenceConfig, LabelledSource, need_images, packs_of, reduced_packs
from ijepa_enhanced.ops.preprocess import CHANNELS

LAYERS = 4
"""Last layers that `linear4` reads: those that I-JEPA (arXiv 2301.08243, appendix A.2) and DINOv2 (arXiv 2304.07193)
probe."""
PACKS_PER_PART = 16
"""Of a file of the cache, and so the most that an interruption loses: 1,300 images of 196 tokens, on a CPU 330."""
THUMBNAILS = 64
"""Images that a worker hands over at once: one by one, handing over takes as long as decoding."""
FORMAT = 5
"""Raised when a cached file means something else, or an encoder of the same weights computes something else."""


@dataclass(frozen=True)
class Features:
    """The features of the N readable images of a source, on the CPU."""

    values: Tensor
    """float32 [N, D]: the mean of each image's tokens."""
    labels: Tensor | None
    """int64 [N], or None where the source has none."""
    image_ids: Tensor
    """int64 [N]: rows of the source, ascending."""
    unreadable: dict[int, str]
    """Row and reason of every image that could not be decoded."""
    seconds: float | None
    """From the first decoded image to the last feature, when they were extracted; None if some of them were extracted
    on another machine or device, or with another number of processes."""
    layers: Tensor | None = None
    """float32 [N, L, D]: such a mean of the output of each of the last L layers, the last of which is `values`. None if
    only that was asked for, or if no encoder made the features."""


def extract(
    encoder: Encoder,
    images: LabelledSource,
    config: InferenceConfig,
    progress: Callable[[int], None] | None = None,
    cache: bool = False,
    layers: int = 1,
) -> Features:
    """Return the mean of each image's tokens: whole images, no crop.

    Args:
        encoder: in evaluation mode.
        images: the source.
        config: how they are shown to the encoder. On ranks other than the main one, the result is empty.
        progress: called with the number of images done.
        cache: keep the result in the user's cache folder (see `open_catalog`), a file for every `PACKS_PER_PART`
            packs, and read what is there. A folder is named by a digest of all that features depend on: weights and
            architecture, the files and their catalog, the configuration, and the versions of PyTorch and Pillow. What
            cannot be read is computed again; what cannot be written is a warning. `FeatureCache.evict` says what is
            deleted.
        layers: last layers to keep; all of them if the encoder has fewer.

    Raises:
        UnreadableImage: none of the images can be decoded.
        NotFiniteError: a feature is not finite; nothing of its part is cached.
        RequestError: the limit of the cache is not a number.
        ValueError: a merge rate out of range.
    """
    ranks, count = config.ranks, min(layers, encoder.config.depth)
    packs = packs_of(encoder, images.catalog, config)
    cuts = [packs[start : start + PACKS_PER_PART] for start in range(0, len(packs), PACKS_PER_PART)]
    found: list[Part | None] = [None] * len(cuts)
    store = None
    if cache:
        cache_limit()  # what is wrong with it should be said before the work
        if ranks.main:
            store = FeatureCache(_digest(encoder, images, config), count)
            found = [store.load(number) for number in range(len(cuts))]
    wanted = ranks.gather([part is None for part in found])[0]
    missing = [pack for cut, want in zip(cuts, wanted, strict=True) if want for pack in cut]
    pooled = reduced_packs(encoder, images, missing, config, partial(_pooled, encoder), count)
    if not ranks.main:
        for _ in pooled:
            pass
        return Features(torch.empty(0, encoder.width), None, torch.empty(0, dtype=torch.int64), {}, 0.0)
    parts, done, here = [], 0, _where(encoder, config)
    for number, (cut, part) in enumerate(zip(cuts, found, strict=True)):
        if part is None:
            part = _joined(itertools.islice(pooled, len(cut)), done, progress)._replace(made_on=here)
            # What could not be read for a moment, as over a network, may be there the next time.
            if store and not any(reason.startswith(UNREAD) for reason in part.unreadable.values()):
                store.save(number, part)
        elif progress:
            progress(done + len(part.image_ids))
        parts.append(part)
        done += len(part.image_ids)
    if store and missing:
        store.evict()
    need_images(done, images.source)
    found_here = all(part.made_on == here for part in parts)
    return _features(parts, images.catalog, layers > 1, sum(part.seconds for part in parts) if found_here else None)


def _where(encoder: Encoder, config: InferenceConfig) -> str:
    """Return what the time of an extraction depends on beside the work itself."""
    return f"{platform.node()}, {config.ranks.world} x {device_name(encoder.device)}, {config.workers} workers"


def _features(parts: list[Part], catalog: Catalog, several: bool, seconds: float | None) -> Features:
    """Return all parts of a source as one, with their labels; with all layers or the last alone."""
    layers = torch.cat([part.layers for part in parts if len(part.layers)])
    image_ids = torch.cat([part.image_ids for part in parts])
    readable = np.isin(catalog.rows, image_ids)
    return Features(
        layers[:, -1],
        None if catalog.labels is None else torch.from_numpy(catalog.labels[readable]),
        image_ids,
        {row: reason for part in parts for row, reason in part.unreadable.items()},
        seconds,
        layers if several else None,
    )


def _pooled(encoder: Encoder, batch: Batch, layers: list[Tensor]) -> Part:
    pooled = torch.stack([encoder.pool(x, batch.packed) for x in layers], dim=1).cpu() if layers else torch.empty(0)
    return Part(pooled, batch.image_ids.cpu(), dict(batch.unreadable), 0.0, "")


def _joined(packs: Iterable[Part], done: int, progress: Callable[[int], None] | None) -> Part:
    """Return some packs as one part, and the time they take; `done` images came before."""
    start = time.perf_counter()
    shown, image_ids = [], [torch.empty(0, dtype=torch.int64)]
    unreadable: dict[int, str] = {}
    for pack in packs:
        unreadable |= pack.unreadable
        if not len(pack.image_ids):
            continue
        shown.append(pack.layers)
        image_ids.append(pack.image_ids)
        done += len(pack.image_ids)
        if progress:
            progress(done)
    seconds = time.perf_counter() - start
    return Part(torch.cat(shown) if shown else torch.empty(0), torch.cat(image_ids), unreadable, seconds, "")


def _digest(encoder: Encoder, images: LabelledSource, config: InferenceConfig) -> str:
    """Return the name of all that features depend on."""
    format_of = (FORMAT, PACKS_PER_PART, torch.__version__, PIL.__version__)
    where = (encoder.config, encoder.preprocessing, encoder.device.type)
    what = (images.source.fingerprint(), images.catalog.hash)
    limit = config.tokens_per_pack
    shown = (config.resolution, config.dtype, limit, encoder.at_once(limit), config.merge_rate)
    digest = hashlib.sha256(repr((*format_of, *where, *what, *shown)).encode())
    digest.update(images.catalog.rows.tobytes())
    digest.update(hash_weights(encoder).encode())
    return digest.hexdigest()


def thumbnails(
    images: LabelledSource,
    workers: int,
    side: int = 16,
    progress: Callable[[int], None] | None = None,
    channels: int = CHANNELS,
) -> Features:
    """Return the floor that any encoder must beat: images squashed to `side` x `side` pixels, [N, C * side**2].

    Args:
        images: the source.
        workers: processes that decode.
        side: of the squares, in pixels.
        progress: called with the number of images done.
        channels: C, see `decode_views`.

    Raises:
        UnreadableImage: none of the images can be decoded.
    """
    start = time.perf_counter()
    catalog = images.catalog
    values: list[Tensor] = []
    unreadable: dict[int, str] = {}
    positions = torch.arange(len(catalog.rows)).split(THUMBNAILS)
    for part, (pixels, failed) in zip(
        positions, make_loader(_Thumbnails(images, side, channels), positions, workers), strict=True
    ):
        values.append(pixels.flatten(1) / 255)
        unreadable |= failed
        if progress:
            progress(int(part[-1]) + 1)
    found = torch.cat(values)
    need_images(len(found), images.source)
    kept = np.isin(catalog.rows, list(unreadable), invert=True)
    labels = None if catalog.labels is None else torch.from_numpy(catalog.labels[kept])
    ids = torch.from_numpy(catalog.rows[kept])
    return Features(found, labels, ids, unreadable, time.perf_counter() - start)


class _Thumbnails(Dataset[tuple[Tensor, dict[int, str]]]):
    """Return the pixels [n, side, side, C] of some images of the catalog, and row and reason of each unreadable
    image."""

    def __init__(self, images: LabelledSource, side: int, channels: int) -> None:
        self.images = images
        self.side = side
        self.channels = channels

    def __getitem__(self, positions: Tensor) -> tuple[Tensor, dict[int, str]]:
        source, catalog = self.images.source, self.images.catalog
        size = np.array([[self.side, self.side]])
        pixels, unreadable = [np.empty((0, self.side, self.side, self.channels), np.uint8)], {}
        for image in positions.tolist():
            box = np.array([[0, 0, catalog.heights[image], catalog.widths[image]]], dtype=np.float32)
            row = int(catalog.rows[image])
            try:
                opened = source.open(row)
                check_unchanged(opened, catalog, image)
                pixels.append(np.stack(decode_views(opened, box, size, channels=self.channels)))
            except UnreadableImage as error:
                unreadable[row] = str(error)
        return torch.from_numpy(np.concatenate(pixels)), unreadable
