"""`ijepa train`."""

from __future__ import annotations

import dataclasses
import logging
import time
from pathlib import Path

import yaml
from jsonargparse import ArgumentParser, Namespace

from ijepa_enhanced.batch import Batch
from ijepa_enhanced.commands import Command
from ijepa_enhanced.commands.setup import add_configuration, hush_others, print_json, share_cores, train_config
from ijepa_enhanced.data.catalog import open_catalog, report_unreadable
from ijepa_enhanced.data.loader import PackDataset, masks_of
from ijepa_enhanced.data.plan import Plan
from ijepa_enhanced.data.sources.open import open_source
from ijepa_enhanced.distributed import is_main
from ijepa_enhanced.errors import RequestError
from ijepa_enhanced.train.config import TrainConfig
from ijepa_enhanced.train.logging import read_log
from ijepa_enhanced.train.loop import train
from ijepa_enhanced.train.saved import check_resumable, check_unchanged, load_config
from ijepa_enhanced.visualize.curves import draw_curves
from ijepa_enhanced.visualize.report import write_report
from ijepa_enhanced.visualize.views import draw_masked_views

logger = logging.getLogger(__name__)


def add_options(command: ArgumentParser) -> None:
    """The options of `ijepa train`."""
    add_configuration(command)
    command.add_argument("--run", type=str, default=None, help="folder to make for the run (default: runs/TIME)")
    command.add_argument("--resume", type=str, default=None, metavar="RUN", help="folder of a run to go on with")
    command.add_argument("--print_config", action="store_true", help="print the configuration as YAML, and no more")


def run(options: Namespace) -> int:
    """Train, and show how it went."""
    config = train_config(options)
    if options.print_config:
        print(yaml.safe_dump(dataclasses.asdict(config), sort_keys=False), end="")
        return 0
    if options.resume:
        if options.run:
            raise RequestError("--resume goes on in the run's own folder: leave --run out.")
        folder = Path(options.resume)
        check_resumable(load_config(folder), config, folder)
        check_unchanged(folder)
    else:
        folder = Path(options.run or f"runs/{time.strftime('%Y%m%d-%H%M%S')}")
        if folder.exists() and is_main():
            raise RequestError(f"{folder} already exists. Go on with it by --resume {folder}, or name another --run.")
    hush_others()
    share_cores(config.data.workers)
    outcome = train(config, folder, resume=bool(options.resume))
    if not is_main():
        return 0
    if not outcome.finished:
        logger.warning("Stopped after step %d. Go on with: ijepa train --resume %s", outcome.steps, folder)
    try:
        pictures = show(config, folder)
    except (OSError, ValueError, RuntimeError) as error:  # what was learned is kept whatever becomes of its pictures
        logger.warning("Not all pictures could be made; ijepa report %s tries again: %s", folder, error)
        pictures = []
    print(folder, *pictures, sep="\n")
    print_json(options, {"run": str(folder), "steps": outcome.steps, "images_seen": outcome.images})
    return 0 if outcome.finished else 1


def show(config: TrainConfig, folder: Path) -> list[Path]:
    """Draw what a run trained on and how it went, and write its page; the files made."""
    pictures = [folder / "masks.png", folder / "curves.png"]
    batch = first_batch(config, config.data.source)
    draw_masked_views(batch, masks_of(batch, config.masks, config.seed), config.encoder.patch_size, pictures[0])
    if not draw_curves(read_log(folder), pictures[1]):
        pictures.pop()
    pictures.append(folder / "report.html")
    write_report([folder], pictures[-1], dataclasses.asdict(TrainConfig()))
    return pictures


def first_batch(config: TrainConfig, source: str) -> Batch:
    """The first pack that a run of `config` on `source` trains on, without its masks."""
    opened = open_source(source)
    catalog = open_catalog(opened)
    plan = Plan(catalog, config.data, config.encoder.patch_size, config.seed)
    dataset = PackDataset(opened, catalog, config.encoder.patch_size, seed=config.seed, changes=config.augment)
    batch = dataset[plan.epoch(0)[0]]
    report_unreadable(catalog)
    for row, reason in batch.unreadable:
        logger.warning("Left out: %s: %s", opened.key(row), reason)
    return batch


COMMAND = Command("Train an encoder.", add_options, run)
