"""How many images one core prepares for training, part by part: `python -m ijepa_enhanced.benchmarks.loader`.

The views are those of the recipe `own-images`. Each row of the table does what the rows above it do and one thing more,
so the difference of two rows is the time of that thing. All run in turns, in one process, whose time on the processor
counts. The bare loop shows what the same libraries take for the same boxes and sizes: it has the files in
memory, decodes them whole, and resizes.
"""

import argparse
import io
import itertools
import pickle
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from PIL.ImageFile import ImageFile
from torch import Tensor

from ijepa_enhanced.benchmarks.table import print_table, write_csv
from ijepa_enhanced.data.augment import Changes
from ijepa_enhanced.data.catalog import open_catalog
from ijepa_enhanced.data.config import AugmentConfig, DataConfig
from ijepa_enhanced.data.decode import LONGEST, decode_pixels, decode_views, decode_whole
from ijepa_enhanced.data.loader import PackDataset, hand_over
from ijepa_enhanced.data.plan import Pack, Plan
from ijepa_enhanced.data.sources.base import Source
from ijepa_enhanced.data.sources.open import open_source
from ijepa_enhanced.devices import threads
from ijepa_enhanced.masks import MaskConfig

PATCH_SIZE = 16
DATA = DataConfig(tokens_per_pack=16384, global_views=1, local_views=4)
CHANGES = AugmentConfig(flip=0.5, color=0.8, gray=0.2, blur=0.3, solarize=0.1)
"""Views and their changes as in the recipe `own-images`."""
TURNS = 7
PACKS = 4
IMAGES = 400
"""Synthetic images that are written as JPEG files if no source is given."""


def run(source: str = "synthetic", csv: bool = False) -> dict[str, Any]:
    """Print the table, and return the `images_per_second` of a worker and its `ratio` to the bare loop.

    `milliseconds` has the time of each part for an image.
    """
    if source != "synthetic":
        return _run(source, source, csv)
    with TemporaryDirectory() as folder:
        images = open_source(source)
        for row in range(IMAGES):
            pixels = decode_whole(images.open(row), LONGEST)
            Image.fromarray(pixels).save(Path(folder, f"{row:04d}.jpg"), quality=90)
        return _run(folder, f"{source}, as JPEG", csv)


class Parts:
    """What is timed: each method prepares all images of the packs, up to the part that it is named after.

    Args:
        source: of the images.
    """

    def __init__(self, source: Source) -> None:
        self.source = source
        self.catalog = open_catalog(source, cache=False)
        epoch = Plan(self.catalog, DATA, PATCH_SIZE, seed=0).epoch(0)
        self.packs = [epoch[number] for number in range(min(PACKS, len(epoch)))]
        self.rows = [self.catalog.rows[pack.images] for pack in self.packs]
        self.files = {row: _bytes(source, row) for rows in self.rows for row in rows.tolist()}
        self.unmasked = PackDataset(source, self.catalog, PATCH_SIZE, changes=CHANGES)
        self.masked = PackDataset(source, self.catalog, PATCH_SIZE, MaskConfig(), changes=CHANGES)

    def images(self) -> Iterator[tuple[Pack, int, slice]]:
        """Yield the pack, the row and the views of each image."""
        for pack, rows in zip(self.packs, self.rows, strict=True):
            starts = np.flatnonzero(np.diff(pack.images, prepend=-1)).tolist()
            for first, last in itertools.pairwise([*starts, len(rows)]):
                yield pack, int(rows[first]), slice(first, last)

    def bare(self) -> None:
        """Decode whole files that are in memory, and resize."""
        for pack, row, views in self.images():
            pixels = np.asarray(Image.open(io.BytesIO(self.files[row])).convert("RGB"))
            sizes = (pack.grids[views] * PATCH_SIZE).tolist()
            for (top, left, height, width), size in zip(pack.boxes[views].astype(int).tolist(), sizes, strict=True):
                crop = pixels[top : top + height + 1, left : left + width + 1].copy()
                view = torch.from_numpy(crop).unsqueeze(0).permute(0, 3, 1, 2)
                F.interpolate(view, size, mode="bicubic", antialias=True)

    def decode(self) -> None:
        """Read and decode."""
        for pack, row, views in self.images():
            shrink = float((pack.boxes[views, 2:] / (pack.grids[views] * PATCH_SIZE)).min())
            decode_pixels(self.source.open(row), shrink)

    def resize(self) -> None:
        """Crop and resize too."""
        for pack, row, views in self.images():
            decode_views(self.source.open(row), pack.boxes[views], pack.grids[views] * PATCH_SIZE)

    def blur(self) -> None:
        """Draw all changes, mirror and blur too."""
        for pack, rows in zip(self.packs, self.rows, strict=True):
            keys = zip(rows.tolist(), pack.views.tolist(), strict=True)
            changes = Changes.draw(CHANGES, 0, 0, keys, pack.grids * PATCH_SIZE)
            starts = np.flatnonzero(np.diff(pack.images, prepend=-1)).tolist()
            for first, last in itertools.pairwise([*starts, len(rows)]):
                own = slice(first, last)
                sizes = pack.grids[own] * PATCH_SIZE
                image = self.source.open(int(rows[first]))
                decode_views(image, pack.boxes[own], sizes, changes.flip[own], changes.sigma[own])

    def patchify(self) -> None:
        """Cut patches into the memory of the pack and make its maps of colors too."""
        for pack in self.packs:
            self.unmasked[pack]

    def masks(self) -> None:
        """Draw masks too: all that a worker does for a batch."""
        for pack in self.packs:
            self.masked[pack]

    def handing_over(self) -> None:
        """Hand the batches over too, as a worker does, and take them, as its parent does."""
        for pack in self.packs:
            stream = io.BytesIO()
            pickler = ForkingPickler(stream)
            pickler.dispatch_table[Tensor] = hand_over
            pickler.dump(self.masked[pack])
            pickle.loads(stream.getbuffer())


def _run(source: str, name: str, csv: bool) -> dict[str, Any]:
    with threads(1):  # as in a worker
        parts = Parts(open_source(source))
        count = sum(1 for _ in parts.images())
        steps = [parts.decode, parts.resize, parts.blur, parts.patchify, parts.masks, parts.handing_over]
        bare, *times = _in_turns([parts.bare, *steps])
    titles = ["decode", "+ resize", "+ flip and blur", "+ patchify", "+ masks", "+ handing over"]
    alone = [after - before for before, after in itertools.pairwise([0.0, *times])]
    table = zip(["bare loop", *titles], [bare, *times], [bare, *alone], strict=True)
    rows = [
        {"source": name, "what": title, "images_per_second": count / total, "ms_an_image": 1000 * part / count}
        for title, total, part in table
    ]
    print_table(rows)
    rate, ratio = count / times[-1], bare / times[-1]
    views = DATA.masked_views + DATA.global_views + DATA.local_views
    print(
        f"A worker prepares {rate:,.0f} images/s of {views} views, {ratio:.1%} of the bare loop (median of {TURNS} "
        "runs)."
    )
    if csv:
        print(write_csv("loader", rows))
    milliseconds = {str(row["what"]).removeprefix("+ "): row["ms_an_image"] for row in rows}
    return {"images_per_second": rate, "ratio": ratio, "milliseconds": milliseconds}


def _in_turns(calls: Sequence[Callable[[], None]]) -> list[float]:
    """Return the median processor seconds of each call, which run one after another, `TURNS` times."""
    seconds: list[list[float]] = [[] for _ in calls]
    for _ in range(TURNS):
        for call, times in zip(calls, seconds, strict=True):
            start = time.process_time()
            call()
            times.append(time.process_time() - start)
    return [statistics.median(times) for times in seconds]


def _bytes(source: Source, row: int) -> bytes:
    file = cast(ImageFile, source.open(row)).fp
    assert isinstance(file, io.BytesIO)
    return file.getvalue()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--source", default="synthetic")
    parser.add_argument("--csv", action="store_true")
    run(**vars(parser.parse_args()))
