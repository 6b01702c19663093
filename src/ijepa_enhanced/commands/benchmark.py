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
        RequestError: `--source` is given to a theme that reads no images.
    """
    theme = importlib.import_module(f"ijepa_enhanced.benchmarks.{options.theme}")
    source = {} if options.source is None else {"source": options.source}
    if source and "source" not in inspect.signature(theme.run).parameters:
        raise RequestError(f"ijepa benchmark {options.theme} reads no images. Remove --source.")
    print_json(options, theme.run(**source, csv=options.csv))
    return 0
