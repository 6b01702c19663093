"""How full packs are, and what planning them costs: `python -m ijepa_enhanced.benchmarks.packing --source SOURCE`."""

import argparse
import resource
import time
from typing import Any

import numpy as np

from ijepa_enhanced.benchmarks.table import print_table, write_csv
from ijepa_enhanced.data.catalog import Catalog, open_catalog
from ijepa_enhanced.data.config import DataConfig
from ijepa_enhanced.data.loader import PackDataset
from ijepa_enhanced.data.plan import EpochPlan, Plan
from ijepa_enhanced.data.sources.open import open_source

IMAGENET_IMAGES = 1_281_167
SAMPLE = 100_000
PATCH_SIZE = 16
PACKS_LOADED = 8
"""Packs that are decoded, to count padding in what the trainer gets."""


def imagenet_like(count: int) -> Catalog:
    """Return sizes like ImageNet's: most photographs at 500 px on the longer side in 4:3, the rest spread log-normally.

    The mean is near the 469 x 387 px that is often quoted for its training set; only the spread matters here.
    """
    rng = np.random.default_rng(0)
    longer = np.where(rng.random(count) < 0.7, 500, np.clip(rng.lognormal(6.1, 0.5, count), 32, 4000)).astype(np.int32)
    aspect = np.where(rng.random(count) < 0.6, 0.75, rng.uniform(0.4, 1.0, count))
    shorter = np.maximum(1, longer * aspect).astype(np.int32)
    upright = rng.random(count) < 0.27
    return Catalog(
        heights=np.where(upright, longer, shorter),
        widths=np.where(upright, shorter, longer),
        rows=np.arange(count),
        labels=None,
        classes=None,
        hash="imagenet-like",
    )


def run(source: str = "synthetic", csv: bool = False) -> dict[str, Any]:
    """Print the table and return `budget_use` and `padding_tokens` of `source`."""
    opened = open_source(source)
    catalog = open_catalog(opened)
    native = DataConfig(min_resolution=None, max_resolution=None, max_crop=1.0, min_crop=1.0)
    rows, padding_tokens = [], 0
    for name, sizes, config in (
        (source, catalog, native),
        (source, catalog, DataConfig()),
        ("ImageNet-like", imagenet_like(SAMPLE), native),
        ("ImageNet-like", imagenet_like(SAMPLE), DataConfig()),
        ("ImageNet-like", imagenet_like(IMAGENET_IMAGES), DataConfig()),
    ):
        start = time.perf_counter()
        plan = Plan(sizes, config, PATCH_SIZE, seed=0)
        epoch = plan.epoch(0)
        rows.append(_row(name, config, epoch, time.perf_counter() - start))
        if sizes is catalog:
            dataset = PackDataset(opened, catalog, PATCH_SIZE)
            for number in range(min(PACKS_LOADED, len(epoch))):
                batch = dataset[epoch[number]]
                padding_tokens += len(batch.packed.values) - sum(batch.packed.segments.lengths)
    print_table(rows)
    print(f"Padding tokens in the packs of {source} that were decoded: {padding_tokens}")
    if csv:
        print(write_csv("packing", rows))
    return {"budget_use": rows[0]["budget_use"], "padding_tokens": padding_tokens}


def _row(name: str, config: DataConfig, epoch: EpochPlan, seconds: float) -> dict[str, Any]:
    lengths = epoch.grids.prod(axis=2).ravel()
    padded = sum(len(group) * int(group.max()) for group in np.array_split(lengths, max(1, len(lengths) // 64)))
    return {
        "images": len(epoch.images),
        "source": name,
        "resolution": "native" if config.min_resolution is None else f"{config.min_resolution}-{config.max_resolution}",
        "packs": len(epoch),
        "budget_use": epoch.budget_use,
        "fill": epoch.fill,
        "fill_ceiling": epoch.fill_ceiling,
        "padded_batches_of_64_use": float(lengths.sum() / padded),
        "seconds": seconds,
        "peak_GB": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6,
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--source", default="synthetic")
    parser.add_argument("--csv", action="store_true")
    run(**vars(parser.parse_args()))
