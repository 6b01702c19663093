"""`ijepa train`."""

from __future__ import annotations

import dataclasses
import logging
import time
from pathlib import Path

import yaml

from ijepa_enhanced.batch import Batch
from ijepa_enhanced.commands.options import TrainOptions
from ijepa_enhanced.commands.setup import hush_others, print_json, share_cores, train_config
from ijepa_enhanced.config import find_config
from ijepa_enhanced.data.catalog import Catalog, open_catalog
from ijepa_enhanced.data.loader import PackDataset, masks_of
from ijepa_enhanced.data.plan import Plan
from ijepa_enhanced.data.sources.base import Source
from ijepa_enhanced.data.sources.open import open_source
from ijepa_enhanced.devices import best_device
from ijepa_enhanced.distributed import is_main, is_one_of_many
from ijepa_enhanced.errors import RequestError
from ijepa_enhanced.train.config import TrainConfig
from ijepa_enhanced.train.logging import read_log
from ijepa_enhanced.train.loop import train
from ijepa_enhanced.train.saved import check_resumable, check_unchanged, load_config, read_train_config
from ijepa_enhanced.visualize.curves import draw_curves
from ijepa_enhanced.visualize.report import write_report
from ijepa_enhanced.visualize.views import draw_masked_views

logger = logging.getLogger(__name__)

MOST_CPU_TOKENS = 16384
"""Largest number of tokens in a step of a recipe for a CPU. One core trains a ViT-Ti on 3,000 to 16,000 tokens per
second (docs/measurements.md)."""


def run(options: TrainOptions) -> int:
    """Train, draw how it went, and print what was written; the exit code is 1 if the run was interrupted."""
    hush_others()
    config, initial = train_config(options)
    if options.print_config:
        print(yaml.safe_dump(dataclasses.asdict(config), sort_keys=False), end="")
        return 0
    folder, resume = folder_of(options, config)
    if not resume and options.config is not None:
        check_recipe(options, options.config, config)
    share_cores(config.data.workers)
    outcome = train(config, folder, resume, initial)
    if not is_main():
        return 0 if outcome.finished else 1  # after 0, torchrun would take the work of this machine as done
    if not outcome.finished:
        logger.warning("Stopped after step %d. Continue with: ijepa train --resume %s", outcome.steps, folder)
    try:
        pictures = draw(config, folder)
    except (OSError, ValueError, RuntimeError) as error:  # the trained encoder is saved whatever becomes of pictures
        logger.warning("The report could not be written (%s). Run `ijepa report %s` to try again.", error, folder)
        pictures = []
    print(folder, *pictures, sep="\n")
    print_json(options, {"run": str(folder), "steps": outcome.steps, "images_seen": outcome.images})
    return 0 if outcome.finished else 1


def check_recipe(options: TrainOptions, recipe: str, config: TrainConfig) -> None:
    """Check that a new run has images, and warn if it uses a recipe for a GPU on a machine without one.

    Raises:
        RequestError: neither the recipe nor an option names images.
    """
    values = read_train_config(find_config(recipe))
    if options.source is None and "data.source" not in {*values, *options.given}:
        raise RequestError(
            f"{recipe} names no images. Add yours: ijepa train SOURCE --config {recipe}. For the built-in images, "
            "SOURCE is synthetic."
        )
    tokens = config.data.tokens_per_pack * config.data.packs_per_step
    if tokens > MOST_CPU_TOKENS and best_device().type == "cpu":
        logger.warning(
            "No GPU was found, and each step of %s has %s tokens, which is slow on a CPU. The recipe for a CPU is "
            "own-images-cpu.",
            recipe,
            f"{tokens:,}",
        )


def folder_of(options: TrainOptions, config: TrainConfig) -> tuple[Path, bool]:
    """Return the folder of the run, and whether the command resumes this run.

    Raises:
        RequestError: the folder has no name, or the run to resume was started with another configuration.
    """
    if options.resume is not None and options.run is not None:
        raise RequestError("--resume continues in the folder of the run. Remove --run.")
    named = options.resume or options.run
    if named is None and options.config is not None:
        named = read_train_config(find_config(options.config)).get("run")
    if named is None and is_one_of_many():
        raise RequestError("Under torchrun, set --run: all processes need one folder, and a restart must find it.")
    folder = Path(named or f"runs/{time.strftime('%Y%m%d-%H%M%S')}")
    if options.resume is not None:
        check_resumable(load_config(folder), config, folder)
        check_unchanged(folder)
    return folder, options.resume is not None


def draw(config: TrainConfig, folder: Path) -> list[Path]:
    """Draw what a run trained on and how it went, write its page, and return the files."""
    pictures = [folder / "masks.png", folder / "curves.png"]
    source = open_source(config.data.source)
    batch = first_batch(config, source, open_catalog(source))
    draw_masked_views(batch, masks_of(batch, config.masks, config.seed), config.encoder.patch_size, pictures[0])
    if not draw_curves(read_log(folder), pictures[1]):
        pictures.pop()
    pictures.append(folder / "report.html")
    write_report([folder], pictures[-1], dataclasses.asdict(TrainConfig()))
    return pictures


def first_batch(config: TrainConfig, source: Source, catalog: Catalog) -> Batch:
    """Return the first pack that a run of `config` on a source trains on, without its masks."""
    plan = Plan(catalog, config.data, config.encoder.patch_size, config.seed)
    dataset = PackDataset(
        source,
        catalog,
        config.encoder.patch_size,
        seed=config.seed,
        changes=config.augment,
        channels=config.data.channels,
    )
    return dataset[plan.epoch(0)[0]]
