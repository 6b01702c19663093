"""`ijepa benchmark`."""

from __future__ import annotations

import importlib
import inspect

from ijepa_enhanced.commands.options import BenchmarkOptions
from ijepa_enhanced.commands.setup import print_json
from ijepa_enhanced.errors import RequestError


def run(options: BenchmarkOptions) -> int:
    """Run the benchmark of a theme.

    Raises:
        RequestError: `--source` is given to a theme that reads no images, or `--tokens` are too few.
    """
    theme = importlib.import_module(f"ijepa_enhanced.benchmarks.{options.theme}")
    given = {"source": options.source, "tokens": options.tokens}
    chosen = {name: value for name, value in given.items() if value is not None}
    if options.source is not None and "source" not in inspect.signature(theme.run).parameters:
        raise RequestError(f"`ijepa benchmark {options.theme}` does not use --source. Remove it.")
    print_json(options, theme.run(**chosen, csv=options.csv))
    return 0
