"""The images that a run is monitored on, and the metrics of what its teacher makes of them."""

from __future__ import annotations

import dataclasses

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ijepa_enhanced.batch import Batch
from ijepa_enhanced.data.loader import PackDataset
from ijepa_enhanced.data.plan import EpochPlan, Pack, Plan
from ijepa_enhanced.data.sources.base import Source
from ijepa_enhanced.distributed import Ranks
from ijepa_enhanced.encoder import Encoder
from ijepa_enhanced.evaluate.knn import knn_classify
from ijepa_enhanced.evaluate.rank import lidar, mean_cosine, rankme, spread
from ijepa_enhanced.models.config import EncoderConfig
from ijepa_enhanced.ops.pooling import segment_mean
from ijepa_enhanced.randomness import Purpose, generator

VIEWS = 8
"""q of LiDAR: crops of each object, drawn as in training."""
OBJECT_SHARE = 4
"""n of LiDAR is D / 4 objects, whose n (q - 1) = 7 D / 4 differences between views span the D dimensions."""


class ProbeSet:
    """A fixed set of images and crops, decoded when first needed and then kept as uint8 patches.

    Each rank decodes and keeps its share of the packs: P * P * C bytes a token, 80 MB for 512 images of 14 x 14 patches
    of 16 px.

    Args:
        source: the training images.
        plan: of the run: what is drawn depends on its seed, its catalog and how it cuts views.
        candidates: positions in the catalog of the images that are large enough to train on.
        images: the most to draw.
        encoder: the teacher's architecture.
        merge_rate: the teacher's, so that it is probed as the loss sees it, and as cheaply.

    Raises:
        PlanError: fewer than two images are large enough to crop.
    """

    def __init__(
        self,
        source: Source,
        plan: Plan,
        candidates: NDArray[np.int64],
        images: int,
        encoder: EncoderConfig,
        merge_rate: float,
    ) -> None:
        rng = generator(plan.seed, Purpose.PROBE)
        drawn = rng.permutation(np.sort(candidates))[:images]
        catalog = plan.catalog.select(drawn)
        objects = plan.catalog.select(drawn[: max(2, encoder.shape.width // OBJECT_SHARE)])
        seed = int(rng.integers(2**63))  # training draws from the run's
        crop = dataclasses.replace(plan.config, masked_views=1, global_views=0, local_views=0)
        whole = dataclasses.replace(crop, min_crop=1.0, max_crop=1.0, min_resolution=crop.max_resolution)
        # One view an image and epoch, since VIEWS views of one image may not fit a pack.
        cropping = Plan(objects, crop, plan.patch_size, seed)
        self.images = _packs(Plan(catalog, whole, plan.patch_size, seed).epoch(0))
        """Packs of whole images, at the largest resolution of training."""
        self.crops = [pack for epoch in range(VIEWS) for pack in _packs(cropping.epoch(epoch))]
        """Packs of crops as in training, VIEWS of each of the first D / OBJECT_SHARE images."""
        self.dataset = PackDataset(source, catalog, plan.patch_size, depth=encoder.shape.depth, merge_rate=merge_rate)
        self.decoded: dict[int, Batch] = {}

    @property
    def tokens(self) -> int:
        """Tokens that the teacher sees in one probe."""
        return sum(int(pack.grids.prod(axis=1).sum()) for pack in (*self.images, *self.crops))

    def metrics(self, encoder: Encoder, autocast: torch.autocast, ranks: Ranks) -> dict[str, float]:
        """Return metrics of what the encoder makes of the images, on the main rank; the others do their share.

        Returns:
            `rankme`, `spread` and `cosine` of whole images; `lidar` of the crops if two or more images have all of
            theirs; and `knn` if there are labels of two or more classes: the fraction of labelled images whose class
            their 20 nearest neighbors tell, the neighbors of each half being searched in the other half.
        """
        _, labels, features = self._pooled(self.images, encoder, autocast, ranks)
        rows, _, views = self._pooled(self.crops, encoder, autocast, ranks)
        if len(features) < 2:
            return {}
        metrics = {"rankme": rankme(features)}
        _, object_of, crops = rows.unique(return_inverse=True, return_counts=True)
        order = object_of.argsort(stable=True)
        objects = views[order[crops[object_of[order]] == VIEWS]].unflatten(0, (-1, VIEWS))
        if len(objects) >= 2:
            metrics["lidar"] = lidar(objects)
        metrics |= {"spread": spread(features), "cosine": mean_cosine(features)}
        return metrics | knn_of_halves(features[labels >= 0], labels[labels >= 0])

    def _pooled(
        self, packs: list[Pack], encoder: Encoder, autocast: torch.autocast, ranks: Ranks
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return what `pooled` gives of all packs, in their order, on the main rank, and nothing on the others."""
        own = [pooled(encoder, self.batch(pack), autocast) for pack in packs[ranks.rank :: ranks.world]]
        shares = ranks.gather_to_rank0(own)
        parts = [shares[number % ranks.world][number // ranks.world] for number in range(len(packs) if shares else 0)]
        no_rows = torch.empty(0, dtype=torch.int64)
        return (
            torch.cat([no_rows, *(rows for rows, _, _ in parts)]),
            torch.cat([no_rows, *(labels for _, labels, _ in parts)]),
            torch.cat([torch.empty(0, encoder.width), *(features for _, _, features in parts)]),
        )

    def batch(self, pack: Pack) -> Batch:
        """Return what a pack of the set shows, decoded once."""
        # In this process: a data loader would draw from PyTorch's global generator. What cannot be decoded is left out
        # here, and named when training comes to it.
        if id(pack) not in self.decoded:
            self.decoded[id(pack)] = self.dataset[pack]
        return self.decoded[id(pack)]


def _packs(plan: EpochPlan) -> list[Pack]:
    return [plan[number] for number in range(len(plan))]


@torch.no_grad()
def pooled(encoder: Encoder, batch: Batch, autocast: torch.autocast) -> tuple[Tensor, Tensor, Tensor]:
    """Return what a pack of V views shows and what `encoder` makes of it, on the CPU.

    Returns:
        Rows of the images int64 [V], their labels int64 [V], -1 if there are none, and the mean of each view's tokens
        float32 [V, D].
    """
    labels = torch.full_like(batch.image_ids, -1) if batch.labels is None else batch.labels
    if not len(batch.image_ids):
        return batch.image_ids, labels, torch.empty(0, encoder.width)
    packed, plan = batch.packed.to(encoder.device), batch.merge_plan and batch.merge_plan.to(encoder.device)
    with autocast:
        features = encoder(packed, plan)
    return batch.image_ids, labels, segment_mean(features, packed.segments.cu_seqlens).cpu()


def knn_of_halves(features: Tensor, labels: Tensor) -> dict[str, float]:
    """Return `knn`: the top-1 accuracy when each half of [N, D] votes on the other; nothing for a single class."""
    if len(labels.unique()) < 2:
        return {}
    halves = torch.arange(len(features)).tensor_split(2)
    right = [
        knn_classify(features[others], labels[others], features[half]) == labels[half]
        for half, others in (halves, halves[::-1])
    ]
    return {"knn": float(torch.cat(right).double().mean())}
