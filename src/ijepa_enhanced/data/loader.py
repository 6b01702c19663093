"""The loader: packs of the plan become batches, in worker processes that hold no state."""

from __future__ import annotations

import dataclasses
import itertools
import math
import multiprocessing
import os
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.reduction import ForkingPickler
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.multiprocessing.reductions import reduce_tensor
from torch.utils.data import DataLoader, Dataset

from ijepa_enhanced.batch import Batch, MaskedBatch
from ijepa_enhanced.data.augment import Changes, channel_means
from ijepa_enhanced.data.catalog import Catalog
from ijepa_enhanced.data.config import AugmentConfig
from ijepa_enhanced.data.decode import decode_views, patchify
from ijepa_enhanced.data.opening import Opened, upright_size
from ijepa_enhanced.data.plan import Pack
from ijepa_enhanced.data.sources.base import Source
from ijepa_enhanced.devices import MEGABYTE, SHARED_MEMORY, default_workers
from ijepa_enhanced.errors import SourceError, UnreadableImage
from ijepa_enhanced.masks import MaskConfig, ViewMasks, draw_masks
from ijepa_enhanced.merge_plan import plan_merges
from ijepa_enhanced.ops.preprocess import CHANNELS
from ijepa_enhanced.packed import Packed, Segments, Selection
from ijepa_enhanced.randomness import Purpose, generator

Item = TypeVar("Item")
"""What a dataset makes of a key."""
PREFETCH = 2
"""Packs that each worker makes ahead; PyTorch's default."""
SHARED_BYTES = 1 << 16
"""Tensors above it go from a worker to its parent in shared memory, others through the pipe, which holds as much."""
BESIDE_PATCH = 32
"""Bytes a token of a batch beside its patch, rounded up: 16, or 24 with both networks merging at 0.1 in 12 layers."""


@dataclass(eq=False)
class PackDataset(Dataset[Batch]):
    """Makes the batch of a pack; the pack says everything, so a worker needs no state of the epoch."""

    source: Source
    catalog: Catalog
    """The sizes and labels of its images."""
    patch_size: int
    """P."""
    masks: MaskConfig | None = None
    """How to mask views; None to leave them unmasked, as in evaluation."""
    seed: int = 0
    """Of the masks and of what changes pixels."""
    depth: int = 0
    """Layers of the network that sees `packed`, for which merging is planned."""
    merge_rate: float | Sequence[float] = 0.0
    """Of `packed`, see `merge_plan.merged_lengths`."""
    student_merge_rate: float = 0.0
    """Of what the student sees of them."""
    changes: AugmentConfig | None = None
    """How to change the pixels of views."""
    prefix: int = 0
    """Of `packed`, see `Packed.prefix`: that of the teacher, or of an encoder that is only run."""
    student_depth: int | None = None
    """Layers of the student; None: as many as `depth`."""
    student_prefix: int = 0
    """Of what the student sees."""
    channels: int = CHANNELS
    """C. Images with another number of channels are unreadable. For 3, see `decode_views`."""

    def __post_init__(self) -> None:
        if self.changes == AugmentConfig():  # drawing only to change nothing costs time too
            self.changes = None

    def __getitem__(self, pack: Pack) -> Batch:
        """Decode, crop, resize, cut into patches, mask, and plan what merges.

        Images that cannot be decoded are left out and named.
        """
        rows = self.catalog.rows[pack.images]
        changes = None
        if self.changes is not None:
            views = zip(rows.tolist(), pack.views.tolist(), strict=True)
            changes = Changes.draw(self.changes, self.seed, pack.cursor.epoch, views, pack.grids * self.patch_size)
        patches, means, unreadable = self._read(pack, rows, changes)
        kept = ~np.isin(rows, [row for row, _ in unreadable])
        masked_views, unmasked_views = kept & ~pack.unmasked, kept & pack.unmasked
        packed = Packed.of_grids(patches[0], pack.grids[masked_views], self.prefix)
        labels, some = self.catalog.labels, bool(pack.unmasked.any())
        colors = None
        if changes is not None and self.changes is not None and self.changes.recolors:
            colors = changes.colors(means)
        batch = Batch(
            packed,
            torch.from_numpy(rows[masked_views]),
            None if labels is None else torch.from_numpy(labels[pack.images[masked_views]]),
            pack.cursor,
            unreadable,
            unmasked=Packed.of_grids(patches[1], pack.grids[unmasked_views], self.student_prefix) if some else None,
            colors=None if colors is None else colors.select(torch.from_numpy(masked_views)),
            unmasked_colors=colors.select(torch.from_numpy(unmasked_views)) if colors is not None and some else None,
            merge_plan=plan_merges(packed.segments.lengths, self.merge_rate, self.depth, self.prefix),
        )
        if self.masks is None:
            return batch
        masks = masks_of(batch, self.masks, self.seed)
        depth = self.depth if self.student_depth is None else self.student_depth
        return masked(batch, masks, self.student_merge_rate, depth, self.student_prefix)

    def _read(
        self, pack: Pack, rows: NDArray[np.int64], changes: Changes | None
    ) -> tuple[list[NDArray[Any]], NDArray[np.float64], tuple[tuple[int, str], ...]]:
        """Return the patches of the masked and of the unmasked views, channel means [V, C], and the unreadable images.

        All patches are uint8, or all are float32 if an image has more than 8 bits.
        """
        tokens = pack.grids.prod(axis=1)
        width = self.patch_size**2 * self.channels
        patches: list[NDArray[Any]] = [
            np.empty((tokens[own].sum(), width), dtype=np.uint8) for own in (~pack.unmasked, pack.unmasked)
        ]
        filled = [0, 0]
        means = np.zeros((len(rows), self.channels))
        unreadable = []
        starts = np.flatnonzero(np.diff(pack.images, prepend=-1)).tolist()
        for first, last in itertools.pairwise([*starts, len(rows)]):
            own = slice(first, last)
            flips, sigmas = (None, None) if changes is None else (changes.flip[own], changes.sigma[own])
            try:
                image = self.source.open(int(rows[first]))
                check_unchanged(image, self.catalog, int(pack.images[first]))
                sizes = pack.grids[own] * self.patch_size
                views = decode_views(image, pack.boxes[own], sizes, flips, sigmas, self.channels)
            except UnreadableImage as error:
                unreadable.append((int(rows[first]), str(error)))
                continue
            if views[0].dtype != patches[0].dtype == np.uint8:
                patches = [part.astype(views[0].dtype) for part in patches]
            for view, pixels in enumerate(views, first):
                kind, count = int(pack.unmasked[view]), int(tokens[view])
                patchify(pixels, self.patch_size, patches[kind][filled[kind] : filled[kind] + count])
                filled[kind] += count
                if changes is not None and changes.recolor[view]:
                    means[view] = channel_means(pixels)
        return [own[:count] for own, count in zip(patches, filled, strict=True)], means, tuple(unreadable)


def check_unchanged(image: Opened, catalog: Catalog, position: int) -> None:
    """Check that an image still has the size that its boxes were made for.

    Raises:
        UnreadableImage: it was overwritten by one of another size after the scan.
    """
    size, scanned = upright_size(image), (int(catalog.heights[position]), int(catalog.widths[position]))
    if size != scanned:
        raise UnreadableImage(
            f"has changed since the scan, from {scanned[0]} x {scanned[1]} px to {size[0]} x {size[1]} px: "
            "run `ijepa scan SOURCE` to scan the images again"
        )


def masks_of(batch: Batch, config: MaskConfig, seed: int) -> list[ViewMasks]:
    """The masks of every view of a batch: a function of the seed, the epoch, the image and the view's number."""
    masks: list[ViewMasks] = []
    before, view = -1, 0
    for (rows, cols), image in zip(batch.packed.grids.tolist(), batch.image_ids.tolist(), strict=True):
        view = view + 1 if image == before else 0
        before = image
        masks.append(draw_masks(rows, cols, config, generator(seed, Purpose.MASKS, batch.cursor[0], image, view)))
    return masks


def masked(
    batch: Batch, masks: Sequence[ViewMasks], student_merge_rate: float = 0.0, depth: int = 0, prefix: int = 0
) -> MaskedBatch:
    """Return a batch with the masks of its V masked views.

    Args:
        batch: without masks.
        masks: of each view.
        student_merge_rate, depth: as for `PackDataset`.
        prefix: of the student, see `Packed.prefix`.
    """
    packed = batch.packed
    visible = [view.context for view in masks]
    context, in_context = _selection(packed, visible), None
    if prefix:
        # The network overwrites these rows, so that any will do: the stream may have fewer of them than the student.
        context = _selection(packed, [np.concatenate([np.repeat(view[:1], prefix), view]) for view in visible], prefix)
        starts = np.cumsum([0, *context.segments.lengths])[:-1] + prefix
        rows = [start + np.arange(len(view)) for start, view in zip(starts, visible, strict=True)]
        in_context = Selection(torch.from_numpy(np.concatenate(rows)), Segments.of([len(view) for view in visible]))
    seen = context.segments
    if batch.unmasked is not None:
        seen = Segments.of([*seen.lengths, *batch.unmasked.segments.lengths])
    return MaskedBatch(
        **{field.name: getattr(batch, field.name) for field in dataclasses.fields(batch)},
        context=context,
        in_context=in_context,
        targets=_selection(packed, [view.hidden for view in masks]),
        seen=seen,
        seen_merge_plan=plan_merges(seen.lengths, student_merge_rate, depth, prefix),
    )


def _selection(packed: Packed, patches: Sequence[NDArray[np.int64]], prefix: int = 0) -> Selection:
    """Return rows of the stream from the patches of each view, counted in the view; `prefix` as in `Selection`."""
    starts = np.cumsum([0, *packed.segments.lengths])[:-1] + packed.prefix
    rows = [start + view for start, view in zip(starts, patches, strict=True)]
    index = np.concatenate([np.empty(0, np.int64), *rows])
    return Selection(torch.from_numpy(index), Segments.of([len(view) for view in patches]), prefix)


def make_loader(
    dataset: Dataset[Item], keys: Iterable[Any], workers: int | None, pin_memory: bool = False, timeout: float = 0.0
) -> DataLoader[Item]:
    """Return a plain DataLoader over the items of a dataset, in the order of `keys`, for any number of workers.

    Args:
        dataset: makes an item of a key, such as a batch of a pack.
        keys: one for each item.
        workers: processes that make items; 0 makes them in this one, None means `default_workers`.
        pin_memory: copy items to pinned memory, for a GPU.
        timeout: seconds to wait for the next item of the workers before an error. 0 means no limit.
    """
    workers = default_workers() if workers is None else workers
    with warnings.catch_warnings():
        # More workers than cores is a matter of speed, and said once, where a command begins.
        warnings.filterwarnings("ignore", "This DataLoader will create", UserWarning)
        return DataLoader(
            dataset,
            sampler=keys,
            batch_size=None,
            num_workers=workers,
            prefetch_factor=PREFETCH if workers else None,
            pin_memory=pin_memory,
            worker_init_fn=serve_the_parent,
            timeout=timeout if workers else 0,
        )


def check_shared_memory(
    workers: int | None,
    tokens_per_pack: int,
    patch_size: int,
    held: int,
    free: int | None,
    ranks: int = 1,
    channels: int = CHANNELS,
) -> None:
    """Check that the packs which workers hand over fit into the shared memory of this machine.

    Each worker keeps up to `PREFETCH` packs there. A token needs P * P * C bytes for its patch and `BESIDE_PATCH` bytes
    for everything else. If C is not 3, a value counts as 4 bytes, because such images often have more than 8 bits. A
    container often has only 64 MB of shared memory, and the system kills a process that exceeds it without a message.

    Args:
        workers: of each rank; None means `default_workers`.
        tokens_per_pack: most tokens of a pack.
        patch_size: P.
        held: packs of each rank that stay there while they are computed with.
        free: bytes of free shared memory; None if it has no limit.
        ranks: on this machine.
        channels: C.

    Raises:
        SourceError: they do not fit; the message says what to set.
    """
    workers = default_workers() if workers is None else workers
    value = np.dtype(np.uint8 if channels == CHANNELS else np.float32).itemsize
    pack = ranks * tokens_per_pack * (patch_size**2 * channels * value + BESIDE_PATCH)
    needed = (held + workers * PREFETCH) * pack
    if workers and free is not None and needed > free:
        fit = max(0, (free // pack - held) // PREFETCH)
        raise SourceError(
            f"With {workers} workers, packs need up to {needed / MEGABYTE:,.0f} MB in {SHARED_MEMORY}, but only "
            f"{free / MEGABYTE:,.0f} MB are free. Set data.workers to {fit}, or make {SHARED_MEMORY} larger (for a "
            f"container, with --shm-size={math.ceil(needed / MEGABYTE)}m)."
        )


def serve_the_parent(worker: int) -> None:
    """Started in a worker: leaves the signals of a terminal, a scheduler or torchrun, and what to say, to the parent.

    And hands small tensors over in the pipe, without a connection and a file for each, and ends when the parent does.

    What fails in making a batch is raised in the parent. What is left to `sys.excepthook` is the thread that hands
    tensors over, when a parent that was interrupted no longer takes them.
    """
    os.setpgrp()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    sys.excepthook = lambda *_: None
    ForkingPickler.register(Tensor, hand_over)
    if sys.platform == "linux":
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})  # in all threads that start from here on
        threading.Thread(target=_end_by_the_parent, daemon=True).start()
    threading.Thread(target=_end_with_the_parent, daemon=True).start()


def _end_by_the_parent() -> None:
    """End at a SIGTERM of the parent. Ignore that of a scheduler, which goes to all processes of a control group."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent.pid:
        pass
    os._exit(0)


def _end_with_the_parent() -> None:
    """Within a second: PyTorch's own check would wait for ever until what is in the pipe is read."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    # Other processes that the parent has forked can keep `join` from seeing its end. The process above is another than
    # the parent where a server starts the workers, as from Python 3.14 on.
    above = os.getppid()
    while os.getppid() == above and parent.is_alive():
        parent.join(timeout=1)
    os._exit(1)


def hand_over(tensor: Tensor) -> tuple[Callable[..., Tensor], tuple[Any, ...]]:
    """How a worker pickles a tensor: in shared memory each costs a connection of its own, and a batch has 15."""
    if tensor.nbytes <= SHARED_BYTES:
        with suppress(TypeError, RuntimeError):  # of what NumPy cannot hold, such as bfloat16
            return torch.from_numpy, (tensor.numpy(),)
    return reduce_tensor(tensor)
