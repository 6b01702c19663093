"""What is in a source, at a glance: a sheet of images, their sizes and classes, and which are there twice."""

from __future__ import annotations

import hashlib
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ijepa_enhanced.data.catalog import Catalog
from ijepa_enhanced.data.decode import decode_whole
from ijepa_enhanced.data.sources.base import Source
from ijepa_enhanced.errors import UnreadableImage
from ijepa_enhanced.visualize.plot import plot
from ijepa_enhanced.visualize.views import save_png, sheet_of

MOST = 10_000
"""Images that are decoded; of a larger source these are chosen at random."""
THUMBNAIL_SIDE = 128
"""sqrt(height * width) of images on the sheet, and of those that are compared, in pixels."""
SHOWN = 60
PAIRS_SHOWN = 24
NEAR = 10
"""Bits of 128 by which the hashes of near duplicates differ at most."""


@dataclass(frozen=True)
class Survey:
    """What the pixels of a source say."""

    rows: list[int]
    """Of the images that were decoded, in the order of the source."""
    modes: dict[str, int]
    """How many of them are of each of Pillow's modes, the most frequent first."""
    identical: list[tuple[int, int]]
    """Rows of an image and of an earlier one of the same size and, at `THUMBNAIL_SIDE`, the same pixels."""
    near: list[tuple[int, int]]
    """Rows of an image and of the earlier one that it resembles, by `perceptual_hash`; none that is identical."""
    unreadable: list[tuple[int, str]]
    """Rows that cannot be decoded, and why."""


def survey(source: Source, catalog: Catalog) -> Survey:
    """Decode the images of a source, at most `MOST`, and compare them with each other."""
    count = len(catalog.rows)
    chosen = np.sort(np.random.default_rng(0).choice(count, min(MOST, count), replace=False))
    rows: list[int] = []
    modes: Counter[str] = Counter()
    unreadable: list[tuple[int, str]] = []
    identical: list[tuple[int, int]] = []
    first: dict[bytes, int] = {}
    hashes: dict[int, NDArray[np.uint64]] = {}
    for position in chosen.tolist():
        row = int(catalog.rows[position])
        try:
            image = source.open(row)
            pixels = decode_whole(image, THUMBNAIL_SIDE)
        except UnreadableImage as error:
            unreadable.append((row, str(error)))
            continue
        rows.append(row)
        modes[image.mode] += 1
        size = np.array([catalog.heights[position], catalog.widths[position]])
        same = first.setdefault(hashlib.sha256(size.tobytes() + pixels.tobytes()).digest(), row)
        if same == row:
            hashes[row] = perceptual_hash(pixels)
        else:
            identical.append((row, same))
    return Survey(rows, dict(modes.most_common()), identical, _near(hashes), unreadable)


def perceptual_hash(pixels: NDArray[np.uint8]) -> NDArray[np.uint64]:
    """128 bits, uint64 [2], that scaling, compression and small changes of colour leave nearly alone.

    They say of an 8 x 8 grid of grey levels which are brighter than their left and which than their upper neighbour:
    the "difference hash" (Krawetz, "Kind of like that", 2013) in both directions.
    """
    grey = np.asarray(Image.fromarray(pixels).convert("L").resize((9, 9), Image.Resampling.BOX))
    return np.packbits([grey[1:, 1:] > grey[1:, :-1], grey[1:, 1:] > grey[:-1, 1:]]).view(np.uint64)


def class_sizes(catalog: Catalog) -> dict[str, int]:
    """How many images each class has, the largest first; empty where there are no labels."""
    if catalog.labels is None:
        return {}
    numbers, counts = np.unique(catalog.labels, return_counts=True)
    names = map(catalog.class_name, numbers.tolist())
    return dict(sorted(zip(names, counts.tolist(), strict=True), key=lambda entry: -entry[1]))


def draw_survey(source: Source, catalog: Catalog, seen: Survey, folder: Path) -> list[Path]:
    """Write `images.png`, `duplicates.png` where there are any, and, with matplotlib, `sizes.png`; their paths."""
    shown = np.random.default_rng(0).permutation(seen.rows)[:SHOWN].tolist()
    pictures = [folder / "images.png"]
    save_png(sheet_of([_thumbnail(source, row) for row in shown]), pictures[0])
    pairs = (seen.identical + seen.near)[:PAIRS_SHOWN]
    if pairs:
        pictures.append(folder / "duplicates.png")
        save_png(sheet_of([_side_by_side(*(_thumbnail(source, row) for row in pair)) for pair in pairs]), pictures[-1])
    if _draw_sizes(catalog, folder / "sizes.png"):
        pictures.append(folder / "sizes.png")
    return pictures


def _near(hashes: dict[int, NDArray[np.uint64]]) -> list[tuple[int, int]]:
    """Rows of images, each with the earlier one of the nearest hash, if that is near enough."""
    rows, values = list(hashes), np.array(list(hashes.values()))
    pairs = []
    for place in range(1, len(rows)):
        apart = np.bitwise_count(values[:place] ^ values[place]).sum(axis=1)
        nearest = int(apart.argmin())
        if apart[nearest] <= NEAR:
            pairs.append((rows[place], rows[nearest]))
    return pairs


def _thumbnail(source: Source, row: int) -> NDArray[np.uint8]:
    return decode_whole(source.open(row), THUMBNAIL_SIDE)


def _side_by_side(left: NDArray[np.uint8], right: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Two pictures on white, with nothing between them."""
    height = max(len(left), len(right))
    padded = [np.pad(side, ((0, height - len(side)), (0, 0), (0, 0)), constant_values=255) for side in (left, right)]
    return np.concatenate(padded, axis=1)


def _draw_sizes(catalog: Catalog, path: Path) -> bool:
    """Histograms of sides, aspect ratios and classes; False without matplotlib."""
    heights, widths = catalog.heights.astype(np.float64), catalog.widths.astype(np.float64)
    sizes = list(class_sizes(catalog).values())
    with plot(path, 12, 3) as figure:
        if figure is None:
            return False
        panels = figure.subplots(1, 3 if sizes else 2)
        for axes, values, title in (
            (panels[0], np.sqrt(heights * widths), "sqrt(height * width), pixels"),
            (panels[1], widths / heights, "width / height"),
        ):
            low, high = values.min(), values.max()
            axes.hist(values, bins=np.geomspace(low / 1.02, high * 1.02, 41))
            axes.set(xscale="log", xlabel=title, ylabel="images")
            ticks = np.geomspace(low, high, 5) if high > low else [low]
            axes.set_xticks(ticks, [f"{tick:.3g}" for tick in ticks])
            axes.minorticks_off()
        if sizes:
            panels[2].bar(range(1, len(sizes) + 1), sizes, width=1)
            panels[2].set(xlabel="classes, the largest first", ylabel="images")
    return True
