"""The collapse watch: what the teacher's features of the same images say of a run, which its loss does not say.

A run that collapses has the lowest loss of all. So now and then the teacher is shown a fixed set of images and crops,
and what it makes of them goes to the log: RankMe, LiDAR, spread and mean cosine (evaluate/rank.py), and where there are
labels the accuracy of nearest neighbours. They raise the alarm and choose the encoder in `best/`; docs/evaluation.md
says how to read them.
"""

from __future__ import annotations

import dataclasses
import logging
import math
import time
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ijepa_enhanced.batch import Batch
from ijepa_enhanced.data.catalog import Catalog
from ijepa_enhanced.data.loader import PackDataset
from ijepa_enhanced.data.plan import EpochPlan, Pack, Plan
from ijepa_enhanced.data.sources.base import Source
from ijepa_enhanced.encoder import Encoder
from ijepa_enhanced.errors import PlanError
from ijepa_enhanced.evaluate.knn import knn_classify
from ijepa_enhanced.evaluate.rank import lidar, mean_cosine, rankme, spread
from ijepa_enhanced.models.config import EncoderConfig
from ijepa_enhanced.ops.pooling import segment_mean
from ijepa_enhanced.randomness import Purpose, generator
from ijepa_enhanced.train.config import MonitorConfig

logger = logging.getLogger(__name__)

COST = 0.03
"""Most of a run's computing that the watch may take where it chooses its own steps."""
PASSES = 2
"""What a step costs at least, in passes of the teacher over all its tokens: one by the teacher itself, and three by the
student (forward, and twice that backward) over the context, which is on average 0.43 of the tokens with four targets
and 0.62 with two (grids of 7 x 7 to 10 x 18). That is 2.3 and more, and the predictor is not counted."""
MOST_LOOKS = 100
"""A long run is not better known for being looked at more often."""
FALL, FALLEN, PATIENCE = 1 / 4, 2, 2
"""The alarm: at two looks in a row, two signs or more are below a quarter of their peak. What it was tried on stands in
docs/evaluation.md."""
FEWEST, MOST, A_CLASS = 512, 4096, 20
"""Images that are looked at, where the configuration does not say."""
VIEWS = 8
"""q of LiDAR: crops of each object, drawn as in training."""
OBJECT_SHARE = 4
"""n of LiDAR is D / 4 objects, whose n (q - 1) = 7 D / 4 differences between views span the D dimensions."""


class Probe:
    """A fixed set of images and crops, decoded when first looked at and then kept as uint8 patches.

    Its memory is P * P * C bytes a token: 80 MB for 512 images of 14 x 14 patches of 16 px.

    Args:
        source: the training images.
        plan: the run's: what is drawn depends on its seed, its catalog and how it cuts views.
        candidates: positions in the catalog of the images that are large enough to train on.
        images: the most to draw.
        encoder: the teacher's architecture.
        merge_rate: the teacher's, so that it is looked at as the loss sees it, and as cheaply.

    Raises:
        PlanError: crops of fewer than two images are large enough.
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
        self.image_packs = _packs(Plan(catalog, whole, plan.patch_size, seed).epoch(0))
        self.crop_packs = [pack for epoch in range(VIEWS) for pack in _packs(cropping.epoch(epoch))]
        self.dataset = PackDataset(source, catalog, plan.patch_size, depth=encoder.shape.depth, merge_rate=merge_rate)

    @property
    def tokens(self) -> int:
        """Tokens that the teacher sees in one look."""
        return sum(int(pack.grids.prod(axis=1).sum()) for pack in (*self.image_packs, *self.crop_packs))

    @cached_property
    def images(self) -> list[Batch]:
        """Packs of whole images, at the largest side of training."""
        return self._decoded(self.image_packs)

    @cached_property
    def crops(self) -> list[Batch]:
        """Packs of crops as in training, VIEWS of each of the first D / OBJECT_SHARE images."""
        return self._decoded(self.crop_packs)

    def _decoded(self, packs: list[Pack]) -> list[Batch]:
        # In this process: a data loader would draw from PyTorch's global generator. What cannot be decoded is left out,
        # and named when training comes to it.
        return [batch for batch in map(self.dataset.__getitem__, packs) if len(batch.image_ids)]

    def signs(self, teacher: Encoder, autocast: torch.autocast) -> dict[str, float]:
        """What the teacher makes of them.

        Returns:
            `rankme`, `spread` and `cosine` of the images, `lidar` of the crops where two or more images have them all,
            and `knn` where the images are of two or more classes: the fraction of them whose class their 20 nearest
            neighbours tell, those of one half being looked for in the other.
        """
        _, labels, features = pooled(teacher, self.images, autocast)
        if len(features) < 2:
            return {}
        signs = {"rankme": rankme(features)}
        rows, _, views = pooled(teacher, self.crops, autocast)
        _, object_of, crops = rows.unique(return_inverse=True, return_counts=True)
        order = object_of.argsort(stable=True)
        objects = views[order[crops[object_of[order]] == VIEWS]].unflatten(0, (-1, VIEWS))
        if len(objects) >= 2:
            signs["lidar"] = lidar(objects)
        signs |= {"spread": spread(features), "cosine": mean_cosine(features)}
        if labels is not None and len(labels.unique()) > 1:
            halves = torch.arange(len(features)).tensor_split(2)
            right = [
                knn_classify(features[others], labels[others], features[half]) == labels[half]
                for half, others in (halves, halves[::-1])
            ]
            signs["knn"] = float(torch.cat(right).double().mean())
        return signs


@torch.no_grad()
def pooled(teacher: Encoder, batches: list[Batch], autocast: torch.autocast) -> tuple[Tensor, Tensor | None, Tensor]:
    """What `batches` show and what `teacher` makes of it, on the CPU: V views in all.

    Returns:
        Rows of the images int64 [V], their labels int64 [V] or None, and the mean of each view's tokens float32 [V, D].
    """
    device = teacher.device
    means = [torch.empty(0, teacher.width)]
    for batch in batches:
        packed, plan = batch.packed.to(device), batch.merge_plan and batch.merge_plan.to(device)
        with autocast:
            features = teacher(packed, plan)
        means.append(segment_mean(features, packed.segments.cu_seqlens).cpu())
    labels = [batch.labels for batch in batches if batch.labels is not None]
    rows = torch.cat([torch.empty(0, dtype=torch.int64), *(batch.image_ids for batch in batches)])
    return rows, torch.cat(labels) if labels else None, torch.cat(means)


def _packs(plan: EpochPlan) -> list[Pack]:
    return [plan[number] for number in range(len(plan))]


def steps_between_looks(config: MonitorConfig, look_tokens: int, steps: int, step_tokens: float, log_every: int) -> int:
    """`monitor.every`, or what null stands for; 0 is never.

    L looks pass L * look_tokens tokens through the teacher, and a run costs at least as much as passing
    PASSES * step_tokens * steps of them. So L = COST * PASSES * step_tokens * steps / look_tokens, rounded down, looks
    cost no more than COST. One is before the first step and one after the last; they are spread evenly, over steps at
    which the log is written anyway.

    Args:
        config: of the watch.
        look_tokens: tokens of a look.
        steps: of the whole run.
        step_tokens: mean tokens of a step.
        log_every: steps between lines of the log.
    """
    if config.every is not None:
        return config.every
    looks = min(MOST_LOOKS, int(COST * PASSES * step_tokens * steps / look_tokens) - 1)
    return math.ceil(math.ceil(steps / looks) / log_every) * log_every if looks > 0 else 0


def default_images(catalog: Catalog) -> int:
    """How many images are looked at, see `MonitorConfig.images`."""
    classes = 0 if catalog.labels is None else len(np.unique(catalog.labels))
    return min(MOST, max(FEWEST, A_CLASS * classes))


@dataclass
class History:
    """What the looks so far amount to: whether the run collapses, and which teacher was the best."""

    peaks: dict[str, float] = field(default_factory=dict)
    """The highest value of each sign of room, that before training included."""
    low: int = 0
    """The last looks in a row at which `FALLEN` or more of them were below `FALL` of their peak."""
    best: float = 0.0
    """The highest merit of a teacher, see `add`."""
    best_step: int = 0
    """Its step; 0: none yet."""

    def add(self, step: int, signs: dict[str, float]) -> list[str]:
        """Take in the signs of one look, and return the names of those that have fallen.

        Signs of room are those that are least where all features are alike. The merit of a teacher is `knn`, and
        without labels the product of its signs of room, so that none of them buys the loss of another. Where they have
        fallen a teacher has no merit: nearest neighbours, whose features are standardised, do not see a collapse.
        """
        room = {name: value for name, value in signs.items() if name in ("rankme", "lidar", "spread")}
        room |= {"1 - cosine": 1 - signs["cosine"]} if "cosine" in signs else {}
        for name, value in room.items():
            self.peaks[name] = max(value, self.peaks.get(name, value))
        fallen = [name for name, value in room.items() if value < FALL * self.peaks[name]]
        self.low = self.low + 1 if len(fallen) >= FALLEN else 0
        merit = signs.get("knn", math.prod(room.values()))
        # Of equals the later has learnt longer. The start has learnt nothing.
        if step and room and not self.low and merit >= self.best:
            self.best, self.best_step = merit, step
        return fallen

    @property
    def alarm(self) -> bool:
        """Whether the run collapses."""
        return self.low >= PATIENCE


class Watch:
    """Looks at the teacher of a run now and then; see `start_watch`."""

    def __init__(self, probe: Probe, every: int, steps: int, history: History) -> None:
        self.probe = probe
        self.every = every
        self.steps = steps
        self.history = history

    def due(self, step: int) -> bool:
        """Whether there is a look after that many steps."""
        return step % self.every == 0 or step == self.steps

    def look(self, step: int, teacher: Encoder, autocast: torch.autocast) -> dict[str, float]:
        """Look at the teacher after `step` steps, say what is seen, and return it for the log.

        Returns:
            The signs (see `Probe.signs`); `alarm`, 1 while the run collapses and else 0; `best`, the step of the best
            teacher so far, where there is one; and `watch_seconds`, what looking took.
        """
        start = time.perf_counter()
        signs = self.probe.signs(teacher, autocast)
        fallen = self.history.add(step, signs)
        history = self.history
        seen = ", ".join(f"{name} {value:.3g}" for name, value in signs.items())
        logger.info(
            "Watch, step %d: %s%s", step, seen, "; the best so far" if step and history.best_step == step else ""
        )
        if history.low == PATIENCE:
            logger.warning(
                "The run collapses: at the last %d looks %s were below a quarter of their peak. "
                "The encoder no longer tells images apart. %s Raise objective.vicreg_weight or lower optim.lr.",
                PATIENCE,
                " and ".join(fallen),
                f"Step {history.best_step} is kept in best/." if history.best_step else "No step was worth keeping.",
            )
        values = signs | {"alarm": float(history.alarm), "watch_seconds": time.perf_counter() - start}
        return values | ({"best": history.best_step} if history.best_step else {})


def start_watch(
    config: MonitorConfig,
    source: Source,
    plan: Plan,
    first_epoch: EpochPlan,
    encoder: EncoderConfig,
    merge_rate: float,
    steps: int,
    log_every: int,
    history: History,
) -> Watch | None:
    """The watch of a run, or None where there is none.

    Args:
        config: of the watch.
        source: the training images.
        plan, first_epoch: of the run.
        encoder: the teacher's architecture.
        merge_rate: the teacher's.
        steps: of the whole run.
        log_every: steps between lines of the log.
        history: of what was seen before the run was resumed; it goes on in it.
    """
    if config.every == 0:
        return None
    try:
        images = config.images or default_images(plan.catalog)
        probe = Probe(source, plan, first_epoch.images, images, encoder, merge_rate)
    except PlanError:
        logger.warning("No collapse watch: too few images are large enough to crop.")
        return None
    step_tokens = float(first_epoch.pack_tokens.mean()) * plan.config.packs_per_step
    every = steps_between_looks(config, probe.tokens, steps, step_tokens, log_every)
    if not every:
        # Not worth a line of every short trial.
        logger.debug("No collapse watch: it would cost more than 3% of so short a run. monitor.every forces it.")
        return None
    looks = 1 + math.ceil(steps / every)
    logger.info(
        "Collapse watch: every %d steps, at most %.1f%% of the computing.",
        every,
        100 * looks * probe.tokens / (PASSES * step_tokens * steps),
    )
    return Watch(probe, every, steps, history)
