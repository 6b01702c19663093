"""Pictures of a source: a sheet of its images, their sizes and classes, and duplicates."""

from __future__ import annotations

import hashlib
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ijepa_enhanced.data.catalog import Catalog
from ijepa_enhanced.data.decode import picture_of
from ijepa_enhanced.data.sources.base import Source
from ijepa_enhanced.errors import UnreadableImage
from ijepa_enhanced.visualize.plot import plot
from ijepa_enhanced.visualize.tiles import EARLIER, Tile, draw_sheet
from ijepa_enhanced.visualize.views import save_png, sheet_of

MOST = 10_000
"""Most images that are decoded. They are chosen at random from a larger source."""
THUMBNAIL_SIZE = 128
"""sqrt(height * width) of images on the sheet, and of images that are compared, in pixels."""
SHOWN = 60
PAIRS_SHOWN = 24
NAMED = 12
"""Most classes whose names fit below their bars."""
NAME = 20
"""Most characters of such a name."""
NEAR = 10
"""Most bits, of 128, in which the hashes of near duplicates differ."""


@dataclass(frozen=True)
class Survey:
    """What decoding the images of a source has shown."""

    rows: list[int]
    """Rows of the images that were decoded, in the order of the source."""
    modes: dict[str, int]
    """How many of them have each of Pillow's modes, the most frequent first."""
    identical: list[tuple[int, int]]
    """Rows of an image and of an earlier one with the same size and, at `THUMBNAIL_SIZE`, the same pixels."""
    near: list[tuple[int, int]]
    """Rows of an image and of an earlier one that looks similar (`perceptual_hash`), identical ones left out."""
    unreadable: list[tuple[int, str]]
    """Rows of images that cannot be decoded, and why."""


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
            pixels = picture_of(image, THUMBNAIL_SIZE)
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
    """Return 128 bits, uint64 [2], that change little when an image is scaled, compressed or slightly recolored.

    For each cell of an 8 x 8 grid of gray levels they say whether it is brighter than its left neighbor, and whether
    it is brighter than its upper one: the "difference hash" (Krawetz, "Kind of like that", 2013) in both directions.
    """
    gray = np.asarray(Image.fromarray(pixels).convert("L").resize((9, 9), Image.Resampling.BOX))
    return np.packbits([gray[1:, 1:] > gray[1:, :-1], gray[1:, 1:] > gray[:-1, 1:]]).view(np.uint64)


def class_sizes(catalog: Catalog) -> dict[str, int]:
    """Return the number of images of each class, the largest first. Images without a label do not count."""
    if catalog.labels is None:
        return {}
    numbers, counts = np.unique(catalog.labels[catalog.labels >= 0], return_counts=True)
    names = map(catalog.class_name, numbers.tolist())
    return dict(sorted(zip(names, counts.tolist(), strict=True), key=lambda entry: -entry[1]))


def draw_survey(source: Source, catalog: Catalog, seen: Survey, folder: Path) -> list[Path]:
    """Write `images.png`, `duplicates.png` if there are any, and `sizes.png` if matplotlib is installed.

    Returns:
        The paths of the pictures.
    """
    shown = np.random.default_rng(0).permutation(seen.rows)[:SHOWN].tolist()
    pictures = [folder / "images.png"]
    save_png(sheet_of([_thumbnail(source, row) for row in shown]), pictures[0])
    pairs = (seen.identical + seen.near)[:PAIRS_SHOWN]
    if pairs:
        pictures.append(folder / "duplicates.png")
        kinds = ["identical"] * len(seen.identical) + ["near"] * len(seen.near)
        lines = [
            [_tile(source, earlier, EARLIER, framed=True), _tile(source, copy, kind)]
            for (copy, earlier), kind in zip(pairs, kinds, strict=False)
        ]
        draw_sheet(lines, pictures[-1], side_by_side=True)
    if _draw_sizes(catalog, folder / "sizes.png"):
        pictures.append(folder / "sizes.png")
    return pictures


def _near(hashes: dict[int, NDArray[np.uint64]]) -> list[tuple[int, int]]:
    """Return rows of images, each with the earlier one whose hash is most similar, if that is similar enough."""
    rows, values = list(hashes), np.array(list(hashes.values()))
    pairs = []
    for place in range(1, len(rows)):
        apart = np.bitwise_count(values[:place] ^ values[place]).sum(axis=1)
        nearest = int(apart.argmin())
        if apart[nearest] <= NEAR:
            pairs.append((rows[place], rows[nearest]))
    return pairs


def _thumbnail(source: Source, row: int) -> NDArray[np.uint8]:
    return picture_of(source.open(row), THUMBNAIL_SIZE)


def _tile(source: Source, row: int, title: str, framed: bool = False) -> Tile:
    return Tile(Image.fromarray(_thumbnail(source, row)), title, source.key(row), framed)


def short_name(name: str) -> str:
    """Return the beginning of a name that is longer than `NAME`."""
    return name if len(name) <= NAME else f"{name[: NAME - 1]}…"


def _draw_sizes(catalog: Catalog, path: Path) -> bool:
    """Draw histograms of resolutions and aspect ratios, and the sizes of classes; False if matplotlib is missing."""
    heights, widths = catalog.heights.astype(np.float64), catalog.widths.astype(np.float64)
    sizes = class_sizes(catalog)
    with plot(path, 12, 3) as figure:
        if figure is None:
            return False
        panels = figure.subplots(1, 3 if sizes else 2)
        for axes, values, title in (
            (panels[0], np.sqrt(heights * widths), "resolution in px: sqrt(height * width)"),
            (panels[1], widths / heights, "aspect ratio: width / height"),
        ):
            low, high = values.min(), values.max()
            axes.hist(values, bins=np.geomspace(low / 1.02, high * 1.02, 41))
            axes.set(xscale="log", xlabel=title, ylabel="images")
            ticks = np.geomspace(low, high, 5) if high > low else [low]
            axes.set_xticks(ticks, [f"{tick:.3g}" if tick < 100 else f"{tick:.0f}" for tick in ticks])
            axes.minorticks_off()
        if sizes:
            # The font of the plot has no letters beyond Latin, Greek and Cyrillic.
            named = len(sizes) <= NAMED and all(max(map(ord, name), default=0) < 0x530 for name in sizes)
            panels[2].bar(range(1, len(sizes) + 1), sizes.values(), width=0.8 if named else 1)
            panels[2].set(xlabel="classes, sorted by size", ylabel="images")
            if named:
                names = [short_name(name) for name in sizes]
                # A `$` is no formula.
                panels[2].set_xticks(range(1, len(sizes) + 1), names, rotation=30, ha="right", parse_math=False)
    return True
