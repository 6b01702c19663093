"""Measure what catalog and plan cost for N images: `python -m ijepa_enhanced.benchmarks.scale --images 100000000`.

The image sizes are simulated and resemble ImageNet's. The catalog is a real file, with one unreadable image in 1,000.
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
from ijepa_enhanced.data.listing import Listing, Sizes, Texts, map_listing, save_listing
from ijepa_enhanced.data.plan import Cursor, Plan
from ijepa_enhanced.devices import MEGABYTE

PART = 1_000_000
"""Number of images whose sizes are drawn. Further images repeat these sizes."""
UNREADABLE = 1000
"""One image in so many is unreadable."""
RANKS = 64
STEPS = 20
"""Number of steps in which the tokens of ranks are compared."""


def mapped_catalog(count: int, folder: Path) -> Catalog:
    """Return a catalog of `count` images without keys, mapped from a file in `folder`."""
    part = imagenet_like(min(count, PART))
    heights, widths = (np.resize(values.astype(np.int32), count) for values in (part.heights, part.widths))
    heights[::UNREADABLE] = widths[::UNREADABLE] = 0
    empty = Texts(np.zeros(count + 1, np.int64), np.empty(0, np.uint8))
    path = folder / "catalog.arrow"
    save_listing(Listing(empty, sizes=Sizes(heights, widths, empty)), path, "simulated")
    listing = map_listing(path)
    assert listing.sizes is not None
    rows, heights, widths = listing.sizes.readable()
    return Catalog(heights, widths, rows, None, None, "simulated")


def run(images: int = PART, csv: bool = False) -> None:
    """Print the memory, the seconds, and the spread of work between ranks for a number of images."""
    row: dict[str, Any] = {"images": images}
    with tempfile.TemporaryDirectory() as folder:
        catalog = mapped_catalog(images, Path(folder))
        row["catalog_MB_own"] = (
            sum(values.nbytes for values in (catalog.rows, catalog.heights, catalog.widths) if values.flags.owndata)
            / MEGABYTE
        )
        tracemalloc.start()  # NumPy reports its arrays to it
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
