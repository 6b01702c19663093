"""What every benchmark does with its figures: print them, and keep them with what they were measured on."""

import csv
import platform
import subprocess
import time
from pathlib import Path
from typing import Any

import numpy as np
import PIL
import torch

from ijepa_enhanced.devices import best_device, device_name
from ijepa_enhanced.files import replacing

RESULTS = Path("benchmarks/results")
"""Where a checkout keeps its CSVs, relative to its root."""
BAR = 40
"""Characters of a bar that stands for 1."""


def hardware() -> str:
    """Return a name for this machine's accelerator, or for its processor."""
    device = best_device()
    if device.type != "cpu":
        return device_name(device).replace(" ", "-")
    return f"{platform.machine()}-cpu-{torch.get_num_threads()}threads"


def print_table(rows: list[dict[str, Any]]) -> None:
    """Print rows of equal keys as a table on stdout."""
    cells = [list(rows[0]), *([_text(value) for value in row.values()] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    for line in cells:
        print("  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)))


def bar(share: float) -> str:
    """Return a share of 1 as a bar, for a column of its own."""
    return ("█" * round(BAR * share)).ljust(BAR)


def write_csv(theme: str, rows: list[dict[str, Any]]) -> Path:
    """Write `benchmarks/results/THEME_HARDWARE_DATE.csv` with versions and commit in every row."""
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    origin = {
        "hardware": hardware(),
        "commit": commit.stdout.strip(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "pillow": PIL.__version__,
    }
    RESULTS.mkdir(parents=True, exist_ok=True)
    path = RESULTS / f"{theme}_{hardware()}_{time.strftime('%Y-%m-%d')}.csv"
    with replacing(path) as temporary, temporary.open("w", newline="") as file:
        writer = csv.DictWriter(file, [*rows[0], *origin])
        writer.writeheader()
        writer.writerows(row | origin for row in rows)
    return path


def _text(value: Any) -> str:
    return f"{value:,.4g}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else str(value)
