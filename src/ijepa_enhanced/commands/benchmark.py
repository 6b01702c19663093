"""`ijepa benchmark`."""

from __future__ import annotations

from jsonargparse import ArgumentParser, Namespace

from ijepa_enhanced.benchmarks import attention, embed, loader, merging, packing, step
from ijepa_enhanced.commands import Command
from ijepa_enhanced.commands.setup import print_json

THEMES = {
    "packing": packing,
    "loader": loader,
    "attention": attention,
    "merging": merging,
    "step": step,
    "embed": embed,
}


def add_options(command: ArgumentParser) -> None:
    """The options of `ijepa benchmark`."""
    command.add_argument("theme", choices=list(THEMES))
    command.add_argument("--source", type=str, default="synthetic", help="a folder, tar shards, or synthetic")
    command.add_argument("--csv", action="store_true", help="write benchmarks/results/THEME_HARDWARE_DATE.csv")


def run(options: Namespace) -> int:
    """Run the benchmark of a theme."""
    print_json(options, THEMES[options.theme].run(options.source, csv=options.csv))
    return 0


COMMAND = Command("Measure speed.", add_options, run)
