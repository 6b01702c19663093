"""`ijepa scan`."""

from __future__ import annotations

from ijepa_enhanced.commands.options import ScanOptions
from ijepa_enhanced.commands.setup import print_counts, print_json
from ijepa_enhanced.data.catalog import open_catalog, scan
from ijepa_enhanced.data.sources.open import open_source
from ijepa_enhanced.data.statistics import statistics_of


def run(options: ScanOptions) -> int:
    """Build the catalog of a source, and print what is in it."""
    source = open_source(options.source)
    counts = scan(source)
    if options.stats:
        measured = statistics_of(source)
        for name in ("mean", "std"):
            counts[name] = {str(number): value for number, value in enumerate(getattr(measured, name), start=1)}
    print_counts(counts)
    for key, reason in open_catalog(source).unreadable:
        print(f"unreadable  {key}: {reason}")
    print_json(options, counts)
    return 0
