"""`ijepa scan`."""

from __future__ import annotations

from ijepa_enhanced.commands.options import SourceOptions
from ijepa_enhanced.commands.setup import print_counts, print_json
from ijepa_enhanced.data.catalog import open_catalog, scan
from ijepa_enhanced.data.sources.open import open_source


def run(options: SourceOptions) -> int:
    """Build the catalog of a source, and print what is in it."""
    source = open_source(options.source)
    counts = scan(source)
    print_counts(counts)
    for key, reason in open_catalog(source).unreadable:
        print(f"unreadable  {key}: {reason}")
    print_json(options, counts)
    return 0
