"""Measure what catalog and plan cost for N images: `python -m ijepa_enhanced.benchmarks.scale --images 100000000`.

The image sizes are simulated and resemble ImageNet's. As in a real catalog, the columns are memory-mapped files.
"""

import argparse
import itertools
import tempfile
import time
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np

from ijepa_enhanced.benchmarks.packing import PATCH_SIZE, imagenet_like
from ijepa_enhanced.benchmarks.table import print_table, write_csv
from ijepa_enhanced.data.catalog import Catalog
from ijepa_enhanced.data.config import DataConfig
from ijepa_enhanced.data.plan import Cursor, Plan
from ijepa_enhanced.devices import MEGABYTE

PART = 1_000_000
"""Number of images whose sizes are drawn. Further images repeat these sizes."""
RANKS = 64
STEPS = 20
"""Number of steps in which the tokens of ranks are compared."""


def mapped_catalog(count: int, folder: Path) -> Catalog:
    """Return a catalog of `count` readable images. The files in `folder` hold their sizes."""
    part = imagenet_like(min(count, PART))
    columns = []
    for name, values in (("heights", part.heights), ("widths", part.widths)):
        path = folder / name
        with path.open("wb") as file:
            for start in range(0, count, PART):
                file.write(values[: count - start].astype(np.int32).tobytes())
        columns.append(np.memmap(path, np.int32, "r"))
    return Catalog(columns[0], columns[1], np.arange(count), None, None, "simulated")


def run(images: int = PART, csv: bool = False) -> None:
    """Print the memory, the seconds, and the spread of work between ranks for a number of images."""
    row: dict[str, Any] = {"images": images}
    with tempfile.TemporaryDirectory() as folder:
        tracemalloc.start()  # NumPy reports its arrays to it; mapped files do not count
        catalog = mapped_catalog(images, Path(folder))
        row["catalog_MB"] = tracemalloc.get_traced_memory()[0] / MEGABYTE
        for views, config in ((1, DataConfig(packs_per_step=RANKS)), (9, many_views())):
            plan = Plan(catalog, config, PATCH_SIZE, seed=0)
            tracemalloc.reset_peak()
            before = tracemalloc.get_traced_memory()[0]
            start = time.perf_counter()
            block = plan.block(0, 0)
            row |= {
                f"blocks_{views}": plan.blocks,
                f"block_seconds_{views}": time.perf_counter() - start,
                f"block_peak_MB_{views}": (tracemalloc.get_traced_memory()[1] - before) / MEGABYTE,
                f"fill_{views}": block.fill,
                f"spread_{views}": spread(plan),
            }
    print_table([row])
    if csv:
        print(write_csv("scale", [row]))


def many_views() -> DataConfig:
    """Return a configuration with nine views of each image."""
    return DataConfig(packs_per_step=RANKS, masked_views=1, global_views=2, local_views=6)


def spread(plan: Plan) -> float:
    """Return the spread of work: the difference between the most and the fewest tokens of a rank, divided by the mean
    over ranks, averaged over steps."""
    packs = itertools.islice(plan.packs(Cursor(0, 0)), RANKS * STEPS)
    tokens = np.array([pack.grids.prod(axis=1).sum() for pack in packs]).reshape(STEPS, RANKS)
    return float(np.mean((tokens.max(axis=1) - tokens.min(axis=1)) / tokens.mean(axis=1)))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=PART)
    parser.add_argument("--csv", action="store_true")
    run(**vars(parser.parse_args()))
