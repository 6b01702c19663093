"""From a command's options to what it works with: the configuration, an encoder, the device, labelled images."""

from __future__ import annotations

import argparse
import dataclasses
import json
import logging
import os
from typing import Any

import torch
from jsonargparse import ArgumentParser, Namespace
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from ijepa_enhanced.config import recipe_names
from ijepa_enhanced.distributed import is_main
from ijepa_enhanced.encoder import Encoder
from ijepa_enhanced.errors import RequestError
from ijepa_enhanced.train.config import TrainConfig

logger = logging.getLogger(__name__)


def add_configuration(command: ArgumentParser) -> None:
    """The options that make up a `TrainConfig`."""
    command.add_argument("--config", action="config", help=f"a recipe ({', '.join(recipe_names())}), or a YAML file")
    command.add_class_arguments(TrainConfig)
    for field in dataclasses.fields(TrainConfig):
        if dataclasses.is_dataclass(field.default_factory):
            # The parser takes a file for a whole group, and would not check its keys.
            command._option_string_actions[f"--{field.name}"].help = argparse.SUPPRESS


def add_encoder(command: ArgumentParser) -> None:
    """The options that say which encoder, at which size."""
    command.add_argument("run", type=str, help="a run, or a folder with an encoder")
    command.add_argument(
        "--resolution", type=int | None, default=224, help="sqrt(height * width) in pixels; null: native size"
    )


def train_config(options: Namespace) -> TrainConfig:
    """The configuration among a command's options.

    Raises:
        RequestError: a value is out of its range.
    """
    try:
        return TrainConfig(**{field.name: options[field.name] for field in dataclasses.fields(TrainConfig)})
    except ValueError as error:
        raise RequestError(str(error)) from error


def print_json(options: Namespace, values: dict[str, Any]) -> None:
    """The last line of stdout, for programs, where it is asked for."""
    if options.json:
        print(json.dumps(values))


def counting_bars() -> Progress:
    """Bars on stderr that count what is done, for as long as it is entered; nothing where stderr is no terminal."""
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    return Progress(*columns, console=console, transient=True, disable=not (console.is_terminal and is_main()))


def hush_others() -> None:
    """Let the main rank alone say what all ranks have to say, but for errors."""
    if not is_main():
        logging.getLogger("ijepa_enhanced").setLevel(logging.ERROR)


def print_counts(counts: dict[str, Any]) -> None:
    """Names and numbers, a line each; a dictionary of numbers is one line."""
    for name, value in counts.items():
        shown = "  ".join(f"{part} {number:g}" for part, number in value.items()) if isinstance(value, dict) else value
        print(f"{name:>12}  {shown}")


def check_setting(resolution: int | None, merge_rate: float) -> None:
    """Raise RequestError where an encoder cannot be run with them."""
    if resolution is not None and resolution < 1:
        raise RequestError(f"resolution must be at least 1, not {resolution}.")
    if not 0 <= merge_rate <= 0.5:
        raise RequestError(f"merge_rate must lie between 0 and 0.5, not {merge_rate}.")


def load_encoder(path: str) -> Encoder:
    """The encoder of a run, or in a folder, on the CPU.

    Raises:
        RequestError: there is none, or it cannot be read.
    """
    return Encoder.from_pretrained(path)


def share_cores(workers: int) -> None:
    """Leave a core to each worker, unless OMP_NUM_THREADS says otherwise, and say where there are not enough.

    All threads of a matrix product wait for the one whose core a worker holds: with one thread more, a quickstart on
    two cores is several times slower (docs/log.md).
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if workers > cores:
        logger.warning("%d workers share %d cores: fewer would wait less for each other.", workers, cores)
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, min(torch.get_num_threads(), cores - workers)))
