"""The tokens of a frozen encoder over a whole source, pack after pack: what every protocol starts from."""

from __future__ import annotations

import itertools
import logging
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor

from ijepa_enhanced.batch import Batch
from ijepa_enhanced.data.catalog import Catalog, cache_folder
from ijepa_enhanced.data.loader import PackDataset, make_loader
from ijepa_enhanced.data.plan import Pack, inference_packs
from ijepa_enhanced.data.sources.base import Source
from ijepa_enhanced.devices import autocast, default_workers, pins_memory
from ijepa_enhanced.distributed import Ranks
from ijepa_enhanced.encoder import TOKENS_PER_PACK, Encoder
from ijepa_enhanced.errors import NotFiniteError, RequestError, UnreadableImage
from ijepa_enhanced.packed import segment_ids

logger = logging.getLogger(__name__)

TOKEN_BYTES = 2
"""Of each number of a stored token: bfloat16."""

Item = TypeVar("Item")
Reduced = TypeVar("Reduced")
"""What is kept of a pack."""

Counting = Callable[[str, int], AbstractContextManager[Callable[[int], None]]]
"""Opens a progress bar of a title and a total; what it gives is called with how many are done."""


class Clock:
    """Measures how long the encoder waits for the workers that decode."""

    def __init__(self) -> None:
        self.waited = 0.0
        """Seconds."""

    def timed(self, items: Iterable[Item]) -> Iterator[Item]:
        """Yield the items, and count the time that each takes to arrive."""
        arriving = iter(items)
        while True:
            start = time.perf_counter()
            try:
                item = next(arriving)
            except StopIteration:
                return
            finally:
                self.waited += time.perf_counter() - start
            yield item


@contextmanager
def uncounted(title: str, total: int) -> Iterator[Callable[[int], None]]:
    """No bar at all."""
    yield lambda done: None


@dataclass(frozen=True)
class InferenceConfig:
    """How an encoder is run over a source: whole images, no crop."""

    resolution: int | None
    """sqrt(height * width) in pixels after resizing, aspect ratio kept; None is native size."""
    dtype: torch.dtype = torch.float32
    """Precision of the matrix products."""
    merge_rate: float | Sequence[float] = 0.0
    """See `Encoder.embed`."""
    workers: int = field(default_factory=default_workers)
    """Processes that decode."""
    tokens_per_pack: int = TOKENS_PER_PACK
    """Tokens in memory at once."""
    ranks: Ranks = field(default_factory=Ranks)
    """The processes that share the packs, each with the encoder on a device of its own. All of them call the same
    functions in the same order; the main one gets the results."""


@dataclass(frozen=True)
class LabelledSource:
    """A source and its catalog."""

    source: Source
    catalog: Catalog


def packs_of(encoder: Encoder, catalog: Catalog, config: InferenceConfig) -> list[Pack]:
    """Every image of the catalog once, whole, in order, in packs that suit the encoder's device."""
    limit = config.tokens_per_pack
    return inference_packs(catalog, config.resolution, encoder.config.patch_size, limit, encoder.at_once(limit))


def reduced_packs(
    encoder: Encoder,
    images: LabelledSource,
    packs: Iterable[Pack],
    config: InferenceConfig,
    reduce: Callable[[Batch, list[Tensor]], Reduced],
    layers: int = 1,
    clock: Clock | None = None,
) -> Iterator[Reduced]:
    """Yield what `reduce` keeps, on the host, of each pack and its tokens (see `token_batches`), in order.

    Each rank runs the encoder on its share of the packs. The main rank gets all results; the others get nothing, and
    must iterate all the same to do their part.
    """
    ranks = config.ranks
    counted, loaded = itertools.tee(packs)  # the loader is a few packs ahead
    own = token_batches(encoder, images, itertools.islice(loaded, ranks.rank, None, ranks.world), config, layers, clock)
    for _ in itertools.islice(counted, 0, None, ranks.world):
        found = [reduce(*tokens) for tokens in itertools.islice(own, 1)]
        yield from itertools.chain(*ranks.gather_to_rank0(found))


def token_batches(
    encoder: Encoder,
    images: LabelledSource,
    packs: Iterable[Pack],
    config: InferenceConfig,
    layers: int = 1,
    clock: Clock | None = None,
) -> Iterator[tuple[Batch, list[Tensor]]]:
    """Yield each pack on the encoder's device, and its outputs; see `last_outputs`.

    Raises:
        NotFiniteError: a feature of the last layer is not finite.
    """
    network = encoder.config
    dataset = PackDataset(
        images.source,
        images.catalog,
        network.patch_size,
        depth=network.depth,
        merge_rate=config.merge_rate,
        prefix=network.prefix,
        channels=network.channels,
    )
    loader = make_loader(dataset, packs, config.workers, pin_memory=pins_memory(encoder.device))
    for batch in loader if clock is None else clock.timed(loader):
        yield last_outputs(encoder, images.source, batch, config.dtype, layers)


@torch.inference_mode()
def last_outputs(
    encoder: Encoder, source: Source, batch: Batch, dtype: torch.dtype, layers: int = 1
) -> tuple[Batch, list[Tensor]]:
    """Return a batch on the encoder's device, and the outputs [T, D] of the last `layers` blocks for its patches.

    Outputs are after the last LayerNorm, with the class token and registers (`Packed.prefix`). With merging, each
    patch has that of the token that holds it. The list is empty for a pack none of whose images can be decoded.

    Raises:
        NotFiniteError: a feature of the last layer is not finite.
    """
    moved = batch.to(encoder.device, non_blocking=True)
    if not len(batch.image_ids):
        return moved, []
    with autocast(encoder.device, dtype):
        outputs = encoder.last_layers(moved.packed, moved.merge_plan, layers)
    finite = outputs[-1].isfinite().all(dim=1)
    if not finite.all():
        view = segment_ids(moved.packed.segments.cu_seqlens, len(finite))[~finite][0]
        key = source.key(int(batch.image_ids[int(view)]))
        raise NotFiniteError(
            f"The features of {key} in {source.name} contain NaN or infinite values, so this encoder cannot be used. "
            "Use an encoder from another run, or RUN/best if the run has one."
        )
    return moved, outputs


class Tokens(NamedTuple):
    """The tokens of N images, one image after another."""

    values: Tensor
    """bfloat16 [T, D], mapped from a file: what memory cannot hold stays on the disk."""
    lengths: Tensor
    """int64 [N]: tokens of each image."""
    grids: Tensor
    """int32 [N, 2]: rows and columns of each image."""
    image_ids: Tensor
    """int64 [N]: rows of the source."""
    labels: Tensor | None
    """int64 [N], or None where the source has none."""


def check_space(protocol: str, encoder: Encoder, sources: Iterable[LabelledSource], config: InferenceConfig) -> None:
    """Check that the tokens of all sources fit on the main rank's disk, before any is computed.

    Raises:
        RequestError: they do not fit; the message gives both figures.
    """
    tokens = sum(
        int(pack.grids.prod(axis=1).sum()) for images in sources for pack in packs_of(encoder, images.catalog, config)
    )
    folder = cache_folder()
    exists = next(place for place in (folder, *folder.absolute().parents) if place.is_dir())
    needed, free = TOKEN_BYTES * encoder.width * tokens, config.ranks.gather(shutil.disk_usage(exists).free)[0]
    if needed > free:
        raise RequestError(
            f"{protocol} needs {needed / 1e9:,.1f} GB in {folder} for the features of {tokens:,} patches, but only "
            f"{free / 1e9:,.1f} GB are free. Lower --resolution, use fewer images, or set IJEPA_CACHE to a folder on a "
            "larger disk."
        )


@contextmanager
def stored_tokens(
    encoder: Encoder, images: LabelledSource, config: InferenceConfig, counting: Counting
) -> Iterator[Tokens]:
    """Give the tokens of all images after the last LayerNorm, for as long as the context lasts, to the main rank.

    They take 2 * D bytes each, in a file in the user's cache folder that has no name there: it disappears with the
    process, whatever ends it.

    Raises:
        UnreadableImage: none of the images can be decoded.
        OSError: the disk is full.
    """
    source, catalog = images.source, images.catalog
    parts: list[Tokens] = []
    unreadable: dict[int, str] = {}
    folder = cache_folder()
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=folder) as file:
        with counting(source.name, len(catalog.rows)) as progress:
            for part, left_out in _tokens_of_packs(encoder, images, config):
                unreadable |= left_out
                if len(part.image_ids):
                    file.write(part.values.view(torch.uint8).numpy().data)
                    parts.append(part._replace(values=torch.empty(0)))
                    progress(sum(len(part.image_ids) for part in parts))
        file.flush()
        warn_of_unreadable(source, unreadable)
        need_images(len(parts), source)
        # Copied on writing, which torch wants to be possible.
        values = torch.from_numpy(np.memmap(file, np.int16, "c")).view(torch.bfloat16)
        labels = [part.labels for part in parts if part.labels is not None]
        yield Tokens(
            values.view(-1, encoder.width),
            torch.cat([part.lengths for part in parts]),
            torch.cat([part.grids for part in parts]),
            torch.cat([part.image_ids for part in parts]),
            torch.cat(labels) if labels else None,
        )


def help_store(encoder: Encoder, sources: Iterable[LabelledSource], config: InferenceConfig) -> None:
    """Do what every other rank does while the main one enters `stored_tokens` of these, one after the other."""
    for images in sources:
        for _ in _tokens_of_packs(encoder, images, config):
            pass


def _tokens_of_packs(
    encoder: Encoder, images: LabelledSource, config: InferenceConfig
) -> Iterator[tuple[Tokens, dict[int, str]]]:
    """Yield the tokens of each pack's images, on the CPU, and row and reason of those that could not be decoded."""

    def reduce(batch: Batch, layers: list[Tensor]) -> tuple[Tokens, dict[int, str]]:
        values = layers[-1][batch.packed.patches].to("cpu", torch.bfloat16) if layers else torch.empty(0)
        shown = batch.to("cpu")
        lengths = torch.tensor(shown.packed.segments.lengths) - shown.packed.prefix
        return Tokens(values, lengths, shown.packed.grids, shown.image_ids, shown.labels), dict(batch.unreadable)

    return reduced_packs(encoder, images, packs_of(encoder, images.catalog, config), config, reduce)


def warn_of_unreadable(source: Source, unreadable: Mapping[int, str]) -> None:
    """Log row and reason of each image that could not be decoded."""
    for row, reason in unreadable.items():
        logger.warning("Skipped %s of %s: %s", source.key(row), source.name, reason)


def need_images(images: int, source: Source) -> None:
    """Raise UnreadableImage where there are no images."""
    if not images:
        raise UnreadableImage(f"None of the {len(source)} images of {source.name} can be decoded.")
