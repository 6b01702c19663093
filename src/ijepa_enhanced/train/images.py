"""Open the images of a run, and plan their packs."""

from __future__ import annotations

import logging
from dataclasses import dataclass

from ijepa_enhanced.data.catalog import Catalog, open_catalog
from ijepa_enhanced.data.in_memory import InMemory
from ijepa_enhanced.data.loader import check_shared_memory
from ijepa_enhanced.data.plan import Outline, Plan
from ijepa_enhanced.data.sources.base import Source
from ijepa_enhanced.data.sources.open import open_source
from ijepa_enhanced.data.statistics import check_source
from ijepa_enhanced.devices import SHARED_MEMORY, free_memory, pins_memory, training_workers
from ijepa_enhanced.distributed import Ranks
from ijepa_enhanced.masks import MIN_TOKENS
from ijepa_enhanced.train.config import TrainConfig
from ijepa_enhanced.train.unreadable import Unreadable

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrainingImages:
    """The images of a run and the plan of their packs."""

    source: Source
    catalog: Catalog
    unreadable: Unreadable
    plan: Plan


def open_images(config: TrainConfig, ranks: Ranks, resume: bool) -> TrainingImages:
    """Open the source, plan its packs, and check that they fit into memory; errors as for `train`."""
    source = open_source(config.data.source)
    with ranks.one_first():  # one rank scans the images, and the others read its catalog
        # One more readable image changes the plan. So a resumed run keeps its images, and only rank 0 looks for more.
        catalog = open_catalog(source, retry=not resume and ranks.main, keep=resume)
    check_source(source, config.data.channels)
    unreadable = Unreadable(catalog, config.data.max_unreadable)
    plan = Plan(catalog, config.data, config.encoder.patch_size, config.seed)
    own_packs = plan.share(ranks.world)
    log_left_out(plan.outline, config)
    free = free_memory()
    ranks.wait()  # every rank measures before the first one allocates
    # A rank holds the packs of this step and of the last one. For a GPU they are pinned, which is not shared memory.
    held = 0 if pins_memory(ranks.device) else 2 * own_packs
    check_shared_memory(
        training_workers(config.data.workers, ranks.device),
        config.data.tokens_per_pack,
        config.encoder.patch_size,
        held,
        free.get(str(SHARED_MEMORY)),
        ranks.local_world_size,
        config.data.channels,
    )
    if config.data.cache == "memory":
        source = InMemory(source, free, ranks)
        ranks.wait()  # machines may read their images at different speeds
    return TrainingImages(source, catalog, unreadable, plan)


def log_left_out(epoch: Outline, config: TrainConfig) -> None:
    """Log how many images are too small to train on, and how many views are scaled down."""
    if epoch.too_small:
        logger.warning(
            "Skipped %d images that are too small (views with fewer than %d patches).",
            epoch.too_small,
            MIN_TOKENS,
        )
    if epoch.limited:
        logger.warning(
            "%d views per epoch exceed data.max_view_tokens and are scaled down to %d tokens.",
            epoch.limited,
            config.data.view_limit,
        )
