"""What the loader keeps of a bare Pillow loop's rate: `python -m ijepa_enhanced.benchmarks.loader --source SOURCE`.

Both decode, crop and resize the same boxes to the same sizes, in one process and in turns. Their work differs. The bare
loop has the files in memory, decodes them whole, and resizes with the bicubic filter alone. The loader reads the files.
If the views are several times smaller than the image, it decodes a JPEG at a fraction of its size and averages pixels
before the filter. It also cuts patches and packs them. In training it draws masks too, which has a row of its own.
"""

import argparse
import statistics
import time
from functools import partial
from io import BytesIO
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, cast

import numpy as np
from PIL import Image
from PIL.ImageFile import ImageFile

from ijepa_enhanced.benchmarks.table import print_table, write_csv
from ijepa_enhanced.data.catalog import open_catalog
from ijepa_enhanced.data.config import DataConfig
from ijepa_enhanced.data.loader import PackDataset
from ijepa_enhanced.data.plan import Plan
from ijepa_enhanced.data.sources.base import Source
from ijepa_enhanced.data.sources.open import open_source
from ijepa_enhanced.masks import MaskConfig

PATCH_SIZE = 16
TURNS = 7
PACKS = 4
IMAGES = 2000
"""Synthetic images that are written as JPEG files if no source is given."""


def run(source: str = "synthetic", csv: bool = False) -> dict[str, Any]:
    """Print the table and return the loader's `images_per_second` and its `ratio` to the bare loop, also with masks."""
    if source != "synthetic":
        return _run(source, source, csv)
    with TemporaryDirectory() as folder:
        images = open_source(source)
        for row in range(IMAGES):
            images.open(row).save(Path(folder, f"{row:04d}.jpg"), quality=90)
        return _run(folder, f"{source}, as JPEG", csv)


def _run(source: str, name: str, csv: bool) -> dict[str, Any]:
    opened = open_source(source)
    catalog = open_catalog(opened, cache=False)
    config = DataConfig(tokens_per_pack=8192)
    datasets = {
        "loader": PackDataset(opened, catalog, PATCH_SIZE),
        "loader with masks": PackDataset(opened, catalog, PATCH_SIZE, MaskConfig()),
    }
    epoch = Plan(catalog, config, PATCH_SIZE, seed=0).epoch(0)
    packs = [epoch[number] for number in range(min(PACKS, len(epoch)))]
    files = {row: _bytes(opened, row) for pack in packs for row in catalog.rows[pack.images].tolist()}
    images = sum(len(pack.images) for pack in packs)

    def bare() -> None:
        for pack in packs:
            sizes = (pack.grids * PATCH_SIZE).tolist()
            for row, (top, left, height, width), (rows, cols) in zip(
                catalog.rows[pack.images].tolist(), pack.boxes.tolist(), sizes, strict=True
            ):
                image = Image.open(BytesIO(files[row])).convert("RGB")
                box = (left, top, min(left + width, image.width), min(top + height, image.height))
                np.asarray(image.resize((cols, rows), Image.Resampling.BICUBIC, box))

    def ours(dataset: PackDataset) -> None:
        for pack in packs:
            dataset[pack]

    turns = {"bare Pillow loop": bare} | {name: partial(ours, dataset) for name, dataset in datasets.items()}
    seconds: dict[str, list[float]] = {title: [] for title in turns}
    for _ in range(TURNS):
        for title, turn in turns.items():
            start = time.perf_counter()
            turn()
            seconds[title].append(time.perf_counter() - start)
    bare_times, *our_times = seconds.values()
    ratio, with_masks = (
        statistics.median(theirs / own for theirs, own in zip(bare_times, times, strict=True)) for times in our_times
    )
    rows = [
        {"source": name, "what": title, "images_per_second": images / statistics.median(times)}
        for title, times in seconds.items()
    ]
    print_table(rows)
    print(
        f"The loader reaches {ratio:.1%} of the speed of the bare Pillow loop, or {with_masks:.1%} with masks "
        f"(median of {TURNS} runs)."
    )
    if csv:
        print(write_csv("loader", rows))
    return {"images_per_second": rows[1]["images_per_second"], "ratio": ratio, "ratio_with_masks": with_masks}


def _bytes(source: Source, row: int) -> bytes:
    file = cast(ImageFile, source.open(row)).fp
    assert isinstance(file, BytesIO)
    return file.getvalue()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--source", default="synthetic")
    parser.add_argument("--csv", action="store_true")
    run(**vars(parser.parse_args()))
