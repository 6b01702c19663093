"""`ijepa benchmark`."""

from __future__ import annotations

import importlib
import inspect

from jsonargparse import ArgumentParser, Namespace

from ijepa_enhanced.commands import Command
from ijepa_enhanced.commands.setup import print_json
from ijepa_enhanced.errors import RequestError

THEMES = ("packing", "loader", "attention", "merging", "step", "embed")


def add_options(command: ArgumentParser) -> None:
    """The options of `ijepa benchmark`."""
    command.add_argument("theme", choices=THEMES)
    command.add_argument("--source", type=str, default=None, help="a folder, tar shards, or synthetic (the default)")
    command.add_argument("--csv", action="store_true", help="write benchmarks/results/THEME_HARDWARE_DATE.csv")


def run(options: Namespace) -> int:
    """Run the benchmark of a theme.

    Raises:
        RequestError: `--source` is given to a theme that reads no images.
    """
    theme = importlib.import_module(f"ijepa_enhanced.benchmarks.{options.theme}")
    source = {} if options.source is None else {"source": options.source}
    if source and "source" not in inspect.signature(theme.run).parameters:
        raise RequestError(f"ijepa benchmark {options.theme} reads no images: leave --source out.")
    print_json(options, theme.run(**source, csv=options.csv))
    return 0


COMMAND = Command("Measure speed.", add_options, run)
