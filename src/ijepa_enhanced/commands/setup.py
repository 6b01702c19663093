"""What several commands share: the configuration of a run, tables and counts, progress bars, cores."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, TextColumn, TimeRemainingColumn
from rich.table import Table

from ijepa_enhanced.commands.options import Common, TrainOptions
from ijepa_enhanced.config import as_options, build, either, find_config, keys_of
from ijepa_enhanced.devices import best_device, default_workers, training_workers
from ijepa_enhanced.distributed import is_main
from ijepa_enhanced.encoder import Encoder
from ijepa_enhanced.errors import RequestError
from ijepa_enhanced.models.variants import PATCH_SIZES
from ijepa_enhanced.train.config import TrainConfig
from ijepa_enhanced.train.saved import config_of_run, read_train_config

logger = logging.getLogger(__name__)

TITLES = {
    "labels": "classes",
    "resolution": "resolution (px, percentiles)",
    "aspect": "width / height (percentiles)",
    "modes": "color modes",
    "looked_at": "images decoded",
    "identical": "identical pairs",
    "near": "near duplicates",
    "dropped": "skipped",
}
"""What users read instead of some keys of the JSON."""

SMALLEST = 0.75
"""Lowest resolution of training from weights, a multiple of theirs: that of the recipe own-images-cpu."""


def train_config(options: TrainOptions) -> tuple[TrainConfig, Encoder | None]:
    """Return the configuration that `ijepa train` is asked for: a recipe or a run that is resumed, and flags on top.

    The encoder is that of --init, which the configuration depends on. None: without --init, or if a run is resumed.

    Raises:
        RequestError: there is no such recipe or run, or a value is out of its range.
    """
    given = dict(options.given)
    if options.source is not None:
        if "data.source" in given:
            raise RequestError("SOURCE and --data.source both set the images. Use only one of them.")
        given["data.source"] = options.source
    if options.resume is not None:
        return configuration(options.config, given, read_train_config(config_of_run(Path(options.resume)))), None
    recipe = options.config
    if options.source is not None and recipe is None:
        recipe = "from-teacher" if given.get("teacher") else "continue" if given.get("init") else recipe_of_machine()
    config = configuration(recipe, given)
    return (config, None) if config.init is None else config_from_weights(config.init, recipe, given)


def config_from_weights(weights: str, recipe: str | None, given: Mapping[str, Any]) -> tuple[TrainConfig, Encoder]:
    """Return the configuration of a run that starts from weights, and the encoder with these weights.

    The patch size is that of the weights. Resolutions that neither flags nor the recipe set follow from the resolution
    that the weights were trained at.

    Raises:
        RequestError: an option of the encoder is given too, training does not support the patch size, or as for
            `configuration`.
        EncoderError: the weights cannot be loaded.
    """
    for key in given:
        if key.startswith("encoder."):
            raise RequestError(
                f"--{key} has no effect with --init, because the weights determine the encoder. Remove it."
            )
    encoder = Encoder.from_pretrained(weights)
    patch_size, resolution = encoder.config.patch_size, encoder.preprocessing.resolution
    if patch_size not in PATCH_SIZES:
        raise RequestError(
            f"{weights} has patches of {patch_size} px. Training supports only {either([*map(str, PATCH_SIZES)])} px."
        )
    smallest = None if resolution is None else max(1, round(SMALLEST * resolution))
    resolutions = {"data.min_resolution": smallest, "data.max_resolution": resolution}
    return configuration(recipe, {**given, "encoder.patch_size": patch_size}, resolutions), encoder


def recipe_of_machine() -> str:
    """Return the recipe for images without --config, and log it."""
    gpu = best_device().type != "cpu"
    recipe = "own-images" if gpu else "own-images-cpu"
    why = "this machine has a GPU" if gpu else "no GPU was found"
    logger.info("Using the recipe %s, because %s. Use --config NAME for another one.", recipe, why)
    return recipe


def configuration(recipe: str | None, given: Mapping[str, Any], saved: Mapping[str, Any] | None = None) -> TrainConfig:
    """Return the configuration of a recipe by its name or file, with the values of flags on top.

    Args:
        recipe: None is the defaults.
        given: values by dotted names.
        saved: values below the recipe's.

    Raises:
        RequestError: there is no such recipe, or a value is out of its range.
    """
    values = dict(saved or {}) | (read_train_config(find_config(recipe)) if recipe is not None else {}) | dict(given)
    values.pop("run", None)  # where a run goes is not how it is trained
    try:
        return build(TrainConfig, values)
    except RequestError as error:
        message = str(error)
        key = message.split()[0]
        if recipe is not None and key in values and key not in given:  # the file sets it
            raise RequestError(f"{recipe}: {message}") from error
        raise RequestError(as_options(message, keys_of(TrainConfig))) from error


def check_files(paths: Sequence[str]) -> None:
    """Raise RequestError if one of these is not a file."""
    for path in paths:
        if Path(path).is_dir():
            raise RequestError(f"{path} is a folder. Give the paths of image files.")
        if not Path(path).is_file():
            raise RequestError(f"No such file: {path}.")


def print_json(options: Common, values: dict[str, Any]) -> None:
    """Print the last line of stdout, for programs, if it is asked for."""
    if options.json:
        print(json.dumps(values))


def print_table(table: Table) -> None:
    """Print a table on stdout. Brackets in names are shown as they are, not read as markup."""
    Console(markup=False, emoji=False, highlight=False).print(table)


def counting_bars(*more: ProgressColumn) -> Progress:
    """Return bars on stderr that count what is done while they are entered; silent if stderr is not a terminal.

    Args:
        more: columns to add at the end.
    """
    console = Console(stderr=True)
    title = TextColumn("{task.description}", markup=False)
    columns = (title, BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), *more)
    return Progress(*columns, console=console, transient=True, disable=not (console.is_terminal and is_main()))


def hush_others() -> None:
    """Let only the main rank log what all ranks would log, except errors."""
    if not is_main():
        logging.getLogger("ijepa_enhanced").setLevel(logging.ERROR)


def print_counts(counts: Mapping[str, Any]) -> None:
    """Print titles and numbers in two columns; a dictionary of numbers is one line."""
    titles = {name: TITLES.get(name, name) for name in counts}
    width = max(map(len, titles.values()))
    for name, value in counts.items():
        shown = "  ".join(f"{part}: {number:g}" for part, number in value.items()) if isinstance(value, dict) else value
        print(f"{titles[name]:<{width}}  {shown}")


def check_workers(workers: int, option: str = "--data.workers") -> None:
    """Warn if there are more workers than cores, and name the option."""
    cores = default_workers()
    if workers > cores:
        logger.warning(
            "There are more workers (%d) than CPU cores (%d), so they slow each other down. Set %s to %d.",
            workers,
            cores,
            option,
            cores,
        )


def share_cores(workers: int | None) -> None:
    """Leave a core to each worker and half of all cores to torch at least, unless OMP_NUM_THREADS is set.

    This is for training, whose workers are busy: all threads of a matrix product wait for the one whose core a worker
    holds. With one thread more, training on two cores can be several times slower (docs/log.md). Workers that only
    decode for an encoder are mostly idle, and all cores are best for torch (docs/log.md, "Cores for embedding").
    """
    cores = default_workers()
    workers = training_workers(workers, best_device())
    check_workers(workers)
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, min(torch.get_num_threads(), max(cores - workers, cores // 2))))
