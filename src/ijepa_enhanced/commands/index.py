"""`ijepa index`."""

from __future__ import annotations

from jsonargparse import ArgumentParser, Namespace

from ijepa_enhanced.commands import Command
from ijepa_enhanced.commands.setup import print_counts, print_json
from ijepa_enhanced.data.catalog import open_catalog, summary
from ijepa_enhanced.data.sources.open import open_source


def add_options(command: ArgumentParser) -> None:
    """The options of `ijepa index`."""
    command.add_argument("source", type=str, help="a folder, tar shards, Parquet, a list, hf://NAME, or synthetic")


def run(options: Namespace) -> int:
    """Scan a source and print what is in it."""
    catalog = open_catalog(open_source(options.source))
    counts = summary(catalog)
    print_counts(counts)
    for key, reason in catalog.unreadable:
        print(f"  unreadable  {key}: {reason}")
    print_json(options, counts)
    return 0


COMMAND = Command("Scan a source: counts, sizes, unreadable images.", add_options, run)
