"""The probe set: the images that a run is monitored on, and the metrics of the teacher's features of them."""

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
from ijepa_enhanced.errors import RunError
from ijepa_enhanced.evaluate.knn import knn_classify
from ijepa_enhanced.evaluate.rank import lidar, mean_cosine, rankme, spread
from ijepa_enhanced.models.config import Architecture
from ijepa_enhanced.randomness import Purpose, generator

VIEWS = 8
"""LiDAR's q: crops of each object (image), drawn as in training."""
OBJECT_SHARE = 4
"""LiDAR's n is D / 4 objects: their n (q - 1) = 7 D / 4 differences between crops span the D dimensions."""


class ProbeSet:
    """A fixed set of images and crops, decoded when first needed and then kept as uint8 patches.

    Each rank decodes and keeps its share of the packs, P * P * C bytes per token. In all, 512 images of 14 x 14 patches
    of 16 px take 80 MB.

    Args:
        source: the training images.
        plan: of the run. Its seed, its catalog and its geometry determine the set.
        candidates: positions in the catalog of the images that are large enough to train on.
        images: number of images to draw, at most.
        encoder: architecture of the teacher.
        merge_rate: of the teacher, so that a probe sees the same features as the loss, at the same cost.

    Raises:
        PlanError: fewer than two images are large enough to crop.
    """

    def __init__(
        self,
        source: Source,
        plan: Plan,
        candidates: NDArray[np.int64],
        images: int,
        encoder: Architecture,
        merge_rate: float,
    ) -> None:
        rng = generator(plan.seed, Purpose.PROBE)
        drawn = rng.permutation(np.sort(candidates))[:images]
        catalog = plan.catalog.select(drawn)
        objects = plan.catalog.select(drawn[: max(2, encoder.width // OBJECT_SHARE)])
        seed = int(rng.integers(2**63))  # not the seed of the run, whose numbers training draws
        crop = dataclasses.replace(plan.config, masked_views=1, global_views=0, local_views=0)
        whole = dataclasses.replace(crop, min_crop=1.0, max_crop=1.0, min_resolution=crop.max_resolution)
        # One crop of each image in each of VIEWS epochs, because VIEWS crops of one image may not fit into a pack.
        cropping = Plan(objects, crop, plan.patch_size, seed)
        self.images = _packs(Plan(catalog, whole, plan.patch_size, seed).epoch(0))
        """Packs of uncropped images, at the largest resolution of training."""
        self.crops = [pack for epoch in range(VIEWS) for pack in _packs(cropping.epoch(epoch))]
        """Packs of crops as in training: `VIEWS` of each of the first D / `OBJECT_SHARE` images."""
        self.dataset = PackDataset(
            source,
            catalog,
            plan.patch_size,
            depth=encoder.depth,
            merge_rate=merge_rate,
            prefix=encoder.prefix,
            channels=encoder.channels,
        )
        self.decoded: dict[int, Batch] = {}

    @property
    def tokens(self) -> int:
        """Return the number of tokens that the teacher embeds in one probe."""
        return sum(int(pack.grids.prod(axis=1).sum()) for pack in (*self.images, *self.crops))

    def metrics(self, encoder: Encoder, autocast: torch.autocast, ranks: Ranks) -> dict[str, float]:
        """Return the metrics of the encoder's features. All ranks call this and share the work.

        Returns:
            On rank 0, the following; on other ranks, nothing.

            - `rankme`, `spread` and `cosine`, of uncropped images
            - `lidar`, of the crops, if at least two images have all of theirs
            - `knn`, if there are labels of at least two classes: the accuracy of a vote of the 20 nearest neighbors,
              where each half of the labeled images votes on the other half

        Raises:
            RunError: features are not finite.
        """
        _, labels, features = self._pooled(self.images, encoder, autocast, ranks)
        rows, _, crop_features = self._pooled(self.crops, encoder, autocast, ranks)
        if not (features.isfinite().all() and crop_features.isfinite().all()):
            raise RunError(
                "Training has diverged: the features of the teacher are NaN or infinite. Start a new run with a lower "
                "--optim.lr or a higher --optim.warmup."
            )
        if len(features) < 2:
            return {}
        metrics = {"rankme": rankme(features)}
        # Group the crops by image, and leave out images of which a crop could not be decoded: [n, VIEWS, D].
        _, object_of, crops = rows.unique(return_inverse=True, return_counts=True)
        order = object_of.argsort(stable=True)
        objects = crop_features[order[crops[object_of[order]] == VIEWS]].unflatten(0, (-1, VIEWS))
        if len(objects) >= 2:
            metrics["lidar"] = lidar(objects)
        metrics |= {"spread": spread(features), "cosine": mean_cosine(features)}
        return metrics | knn_of_halves(features[labels >= 0], labels[labels >= 0])

    def _pooled(
        self, packs: list[Pack], encoder: Encoder, autocast: torch.autocast, ranks: Ranks
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return the results of `pooled` for all packs, in their order, on rank 0; on other ranks, nothing."""
        # Rank r embeds the packs r, r + world, r + 2 world, ...
        own = [pooled(encoder, self.batch(pack), autocast) for pack in packs[ranks.rank :: ranks.world]]
        shares = ranks.gather_to_rank0(own)
        parts = [shares[number % ranks.world][number // ranks.world] for number in range(len(packs) if shares else 0)]
        no_rows = torch.empty(0, dtype=torch.int64)  # torch.cat refuses an empty list
        return (
            torch.cat([no_rows, *(rows for rows, _, _ in parts)]),
            torch.cat([no_rows, *(labels for _, labels, _ in parts)]),
            torch.cat([torch.empty(0, encoder.width), *(features for _, _, features in parts)]),
        )

    def batch(self, pack: Pack) -> Batch:
        """Return the batch of a pack of the set. It is decoded at the first call."""
        # In this process, because a DataLoader would draw from PyTorch's global generator and change the run. Images
        # that cannot be decoded are left out here and reported when training reaches them.
        if id(pack) not in self.decoded:
            self.decoded[id(pack)] = self.dataset[pack]
        return self.decoded[id(pack)]


def _packs(plan: EpochPlan) -> list[Pack]:
    return [plan[number] for number in range(len(plan))]


@torch.no_grad()
def pooled(encoder: Encoder, batch: Batch, autocast: torch.autocast) -> tuple[Tensor, Tensor, Tensor]:
    """Embed a pack of V views, and return the result on the CPU.

    Returns:
        Rows of the images, int64 [V]; their labels, int64 [V], -1 if there are none; and the mean of each view's
        tokens, float32 [V, D].
    """
    labels = torch.full_like(batch.image_ids, -1) if batch.labels is None else batch.labels
    if not len(batch.image_ids):
        return batch.image_ids, labels, torch.empty(0, encoder.width)
    packed, plan = batch.packed.to(encoder.device), batch.merge_plan and batch.merge_plan.to(encoder.device)
    with autocast:
        features = encoder(packed, plan)
    return batch.image_ids, labels, encoder.pool(features, packed).cpu()


def knn_of_halves(features: Tensor, labels: Tensor) -> dict[str, float]:
    """Return `knn`, the top-1 accuracy if each half of `features` [N, D] votes on the other; nothing for one class."""
    if len(labels.unique()) < 2:
        return {}
    halves = torch.arange(len(features)).tensor_split(2)
    right = [
        knn_classify(features[others], labels[others], features[half]) == labels[half]
        for half, others in (halves, halves[::-1])
    ]
    return {"knn": float(torch.cat(right).double().mean())}
