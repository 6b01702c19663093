"""One feature an image, of a whole source: extracted once, kept in a cache, scored by every protocol."""

from __future__ import annotations

import hashlib
import itertools
import json
import logging
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ijepa_enhanced.batch import Batch
from ijepa_enhanced.data.catalog import Catalog, cache_folder
from ijepa_enhanced.data.decode import decode_views
from ijepa_enhanced.data.sources.base import UNREAD, Source
from ijepa_enhanced.encoder import Encoder
from ijepa_enhanced.errors import UnreadableImage
from ijepa_enhanced.evaluate.tokens import InferenceConfig, LabelledSource, need_images, packs_of, reduced_packs
from ijepa_enhanced.files import replacing
from ijepa_enhanced.ops.pooling import segment_mean

logger = logging.getLogger(__name__)

LAYERS = 4
"""Last layers whose outputs are kept: those that I-JEPA (arXiv 2301.08243, appendix A.2) and DINOv2 (arXiv 2304.07193)
probe."""
PACKS_PER_PART = 16
"""Of a file of the cache, and so the most that an interruption loses: 1,300 images of 196 tokens, on a CPU 330."""
FORMAT = 2
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
    seconds: float
    """From the first decoded image to the last feature, when they were extracted."""
    layers: Tensor | None = None
    """float32 [N, L, D]: such a mean of the output of each of the last L layers, the last of which is `values`; L is
    `LAYERS`, or the encoder's depth where that is less. None where the features are no encoder's."""


def extract(
    encoder: Encoder,
    images: LabelledSource,
    setting: InferenceConfig,
    progress: Callable[[int], None] | None = None,
    cache: bool = False,
) -> Features:
    """The mean of each image's tokens: whole images, no crop.

    Args:
        encoder: in evaluation mode.
        images: the source.
        setting: how they are shown to the encoder. On other ranks than the main one what is returned is empty.
        progress: called with the number of images done.
        cache: keep what is found in the user's cache folder (see `open_catalog`) and read what is there, a file for
            every `PACKS_PER_PART` packs. They are found by a digest of all that features depend on: weights and
            architecture, the files and their catalog, and the setting. What cannot be read is made anew; what
            cannot be written is a warning.

    Raises:
        UnreadableImage: none of the images can be decoded.
        NotFiniteError: a feature is not finite; nothing of its part is cached.
        ValueError: a merge rate out of range.
    """
    catalog, ranks = images.catalog, setting.ranks
    packs = packs_of(encoder, catalog, setting)
    cuts = [packs[start : start + PACKS_PER_PART] for start in range(0, len(packs), PACKS_PER_PART)]
    found: list[_Part | None] = [None] * len(cuts)
    if cache and ranks.main:
        folder = cache_folder() / "features" / _digest(encoder, images, setting)
        found = [_Part.load(folder / f"{number:05d}.safetensors") for number in range(len(cuts))]
    wanted = ranks.gather([part is None for part in found])[0]
    missing = [pack for cut, want in zip(cuts, wanted, strict=True) if want for pack in cut]
    pooled = reduced_packs(encoder, images, missing, setting, _pooled, LAYERS)
    if not ranks.main:
        for _ in pooled:
            pass
        return Features(torch.empty(0, encoder.width), None, torch.empty(0, dtype=torch.int64), {}, 0.0)
    parts, done = [], 0
    for number, (cut, part) in enumerate(zip(cuts, found, strict=True)):
        if part is None:
            part = _Part.of(itertools.islice(pooled, len(cut)), done, progress)
            # What could not be read for a moment, as over a network, may be there the next time.
            if cache and not any(reason.startswith(UNREAD) for reason in part.unreadable.values()):
                part.save(folder / f"{number:05d}.safetensors")
        elif progress:
            progress(done + len(part.image_ids))
        parts.append(part)
        done += len(part.image_ids)
    need_images(done, images.source)
    layers = torch.cat([part.layers for part in parts if len(part.layers)])
    image_ids = torch.cat([part.image_ids for part in parts])
    readable = np.isin(catalog.rows, image_ids)
    return Features(
        layers[:, -1],
        None if catalog.labels is None else torch.from_numpy(catalog.labels[readable]),
        image_ids,
        {row: reason for part in parts for row, reason in part.unreadable.items()},
        sum(part.seconds for part in parts),
        layers,
    )


def _pooled(batch: Batch, layers: list[Tensor]) -> _Part:
    cu_seqlens = batch.packed.segments.cu_seqlens
    means = torch.stack([segment_mean(x, cu_seqlens) for x in layers], dim=1).cpu() if layers else torch.empty(0)
    return _Part(means, batch.image_ids.cpu(), dict(batch.unreadable), 0.0)


class _Part(NamedTuple):
    """The features of some packs: n images."""

    layers: Tensor
    """float32 [n, L, D], on the CPU."""
    image_ids: Tensor
    unreadable: dict[int, str]
    seconds: float

    @classmethod
    def of(cls, packs: Iterable[_Part], done: int, progress: Callable[[int], None] | None) -> _Part:
        """Some packs as one, and the time they take."""
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
        return cls(torch.cat(shown) if shown else torch.empty(0), torch.cat(image_ids), unreadable, seconds)

    @classmethod
    def load(cls, path: Path) -> _Part | None:
        try:
            with safe_open(path, "pt") as file:
                said = file.metadata()
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # it is no mapping
            unreadable = {int(row): reason for row, reason in json.loads(said["unreadable"]).items()}
            return cls(tensors["layers"], tensors["image_ids"], unreadable, float(said["seconds"]))
        except FileNotFoundError:
            return None
        except (OSError, SafetensorError) as error:
            logger.warning("The cached features %s cannot be read and are made anew: %s", path, error)
            return None

    def save(self, path: Path) -> None:
        tensors = {"layers": self.layers, "image_ids": self.image_ids}
        said = {"unreadable": json.dumps(self.unreadable), "seconds": repr(self.seconds)}
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with replacing(path) as temporary:
                save_file(tensors, temporary, said)
        except (OSError, SafetensorError) as error:
            logger.warning("The features cannot be cached in %s: %s", path.parent, error)


def _digest(encoder: Encoder, images: LabelledSource, setting: InferenceConfig) -> str:
    """The name of all that features depend on."""
    format_of = (FORMAT, LAYERS, PACKS_PER_PART)
    where = (encoder.config, encoder.device.type, images.source.fingerprint(), images.catalog.hash)
    limit = setting.tokens_per_pack
    shown = (setting.resolution, setting.dtype, limit, encoder.at_once(limit), setting.merge_rate)
    digest = hashlib.sha256(repr((*format_of, *where, *shown)).encode())
    digest.update(images.catalog.rows.tobytes())
    digest.update(hash_weights(encoder).encode())
    return digest.hexdigest()


def hash_weights(encoder: Encoder) -> str:
    """SHA-256 of all weights and their names."""
    digest = hashlib.sha256()
    for name, weights in encoder.state_dict().items():
        digest.update(name.encode())
        digest.update(weights.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def thumbnails(source: Source, catalog: Catalog, side: int = 16) -> Features:
    """The floor that any encoder must beat: each image squashed to `side` x `side` RGB pixels, [N, side * side * 3]."""
    start = time.perf_counter()
    values, kept, unreadable = [], [], {}
    for image, row in enumerate(catalog.rows.tolist()):
        box = np.array([[0, 0, catalog.heights[image], catalog.widths[image]]], dtype=np.float32)
        try:
            pixels = decode_views(source.open(row), box, np.array([[side, side]]))[0]
        except UnreadableImage as error:
            unreadable[row] = str(error)
            continue
        values.append(torch.from_numpy(pixels.reshape(-1)) / 255)
        kept.append(image)
    need_images(len(values), source)
    rows = torch.from_numpy(catalog.rows[kept])
    labels = None if catalog.labels is None else torch.from_numpy(catalog.labels[kept])
    return Features(torch.stack(values), labels, rows, unreadable, time.perf_counter() - start)
