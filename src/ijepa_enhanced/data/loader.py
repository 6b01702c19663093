"""The loader: packs of the plan become batches, in worker processes that hold no state."""

from __future__ import annotations

import signal
from collections.abc import Iterable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import DataLoader, Dataset, Sampler

from ijepa_enhanced.data.images import UnreadableImage, decode_views, patchify
from ijepa_enhanced.data.index import Index
from ijepa_enhanced.data.plan import Pack
from ijepa_enhanced.data.sources import Source
from ijepa_enhanced.masks import MaskConfig, ViewMasks, draw_masks
from ijepa_enhanced.merge_plan import plan_merges
from ijepa_enhanced.packed import Batch, MaskedBatch, Packed, Queries, Segments, Selection
from ijepa_enhanced.randomness import Purpose, generator


class PackDataset(Dataset[Batch]):
    """Makes the batch of a pack; the pack says everything, so a worker needs no state of the epoch.

    Args:
        source: where the images lie.
        index: their sizes and labels.
        patch_size: P.
        masks: how to mask training batches; None for whole views.
        seed: of the masks.
        depth: layers of the encoder, for which merging is planned.
        merge_rate: of the whole views, see `merge_plan.merged_lengths`.
        context_merge_rate: of their contexts.
    """

    def __init__(
        self,
        source: Source,
        index: Index,
        patch_size: int,
        masks: MaskConfig | None = None,
        seed: int = 0,
        depth: int = 0,
        merge_rate: float | Sequence[float] = 0.0,
        context_merge_rate: float = 0.0,
    ) -> None:
        self.source = source
        self.index = index
        self.patch_size = patch_size
        self.masks = masks
        self.seed = seed
        self.depth = depth
        self.merge_rate = merge_rate
        self.context_merge_rate = context_merge_rate

    def __getitem__(self, pack: Pack) -> Batch:
        """Decode, crop, resize, cut into patches, mask, and plan what merges.

        Images that cannot be decoded are left out and named.
        """
        tokens = pack.grids.prod(axis=1)
        patches = np.empty((int(tokens.sum()), self.patch_size**2 * 3), dtype=np.uint8)
        kept = np.ones(len(pack.images), dtype=np.bool_)
        unreadable = []
        first, filled = 0, 0
        while first < len(pack.images):
            image = pack.images[first]
            last = first + 1
            while last < len(pack.images) and pack.images[last] == image:
                last += 1
            try:
                row = int(self.index.rows[image])
                sizes = pack.grids[first:last] * self.patch_size
                for pixels in decode_views(self.source.open(row), pack.boxes[first:last], sizes):
                    view = patchify(pixels, self.patch_size)
                    patches[filled : filled + len(view)] = view
                    filled += len(view)
            except UnreadableImage as error:
                unreadable.append((row, str(error)))
                kept[first:last] = False
            first = last
        images, grids = pack.images[kept], pack.grids[kept]
        packed = Packed.of_grids(patches[:filled], grids)
        image_ids = torch.from_numpy(self.index.rows[images])
        labels = None if self.index.labels is None else torch.from_numpy(self.index.labels[images])
        plan = plan_merges(packed.segments.lengths, self.merge_rate, self.depth)
        if self.masks is None:
            return Batch(packed, image_ids, labels, pack.cursor, tuple(unreadable), merge_plan=plan)
        drawn = [
            draw_masks(
                int(rows),
                int(cols),
                self.masks,
                generator(self.seed, Purpose.MASKS, pack.cursor.epoch, int(row), int(view)),
            )
            for (rows, cols), row, view in zip(grids, image_ids, pack.views[kept], strict=True)
        ]
        context, queries, target_index = apply_masks(packed, drawn)
        return MaskedBatch(
            packed,
            image_ids,
            labels,
            pack.cursor,
            tuple(unreadable),
            context,
            queries,
            target_index,
            merge_plan=plan,
            context_merge_plan=plan_merges(context.segments.lengths, self.context_merge_rate, self.depth),
        )


def apply_masks(packed: Packed, masks: list[ViewMasks]) -> tuple[Selection, Queries, torch.Tensor]:
    """The context, the predictor's queries and the targets' rows (see `MaskedBatch`) of V masked views."""
    starts = np.cumsum([0, *packed.segments.lengths])
    context_lengths = [len(view.context) for view in masks]
    context_starts = np.cumsum([0, *context_lengths])
    context = [start + view.context for start, view in zip(starts[:-1], masks, strict=True)]
    source, places, answers, targets, lengths, views = [], [], [], [], [], []
    filled = 0
    for number, view in enumerate(masks):
        copied = np.arange(context_starts[number], context_starts[number + 1])
        for block in view.targets:
            source += [copied, np.full(len(block), context_starts[-1])]
            hidden = starts[number] + block
            places += [context[number], hidden]
            targets.append(hidden)
            answers.append(filled + len(copied) + np.arange(len(block)))
            lengths.append(len(copied) + len(block))
            views.append(number)
            filled += lengths[-1]
    queries = Queries(
        _joined(source),
        packed.positions[_joined(places)],
        packed.grids[torch.tensor(views, dtype=torch.int64)],
        Segments.of(lengths),
        _joined(answers),
    )
    return Selection(_joined(context), Segments.of(context_lengths)), queries, _joined(targets)


def _joined(parts: list[NDArray[np.int64]]) -> torch.Tensor:
    return torch.from_numpy(np.concatenate([np.empty(0, np.int64), *parts]))


class _Packs(Sampler[Pack]):
    """Hands the packs to the workers as they are."""

    def __init__(self, packs: Iterable[Pack]) -> None:
        self.packs = packs

    def __iter__(self):  # type: ignore[no-untyped-def]
        return iter(self.packs)


def make_loader(
    dataset: PackDataset, packs: Iterable[Pack], workers: int, pin_memory: bool = False
) -> DataLoader[Batch]:
    """A plain DataLoader over packs, in their order whatever the number of workers."""
    return DataLoader(
        dataset,
        sampler=_Packs(packs),
        batch_size=None,
        num_workers=workers,
        pin_memory=pin_memory,
        worker_init_fn=_leave_signals_to_the_trainer,
    )


def _leave_signals_to_the_trainer(worker: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
