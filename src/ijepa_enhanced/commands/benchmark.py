"""`ijepa benchmark`."""

from __future__ import annotations

import importlib

from ijepa_enhanced.commands.options import BenchmarkOptions
from ijepa_enhanced.commands.setup import print_json


def run(options: BenchmarkOptions) -> int:
    """Run the benchmark of a theme, of which alone the module is imported."""
    theme = importlib.import_module(f"ijepa_enhanced.benchmarks.{options.theme}")
    source = {} if options.source is None else {"source": options.source}
    print_json(options, theme.run(**source, csv=options.csv))
    return 0
