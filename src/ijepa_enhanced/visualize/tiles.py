"""A sheet of pictures with two lines of text below each: matches of queries, pairs of duplicates."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont, ImageOps

from ijepa_enhanced.visualize.views import MARGIN, SHEET_WIDTH, save_png, sheet_of

TILE = 128
"""Width and height in pixels of the box that an image is scaled to fit into."""
FRAME = 3
"""Width in pixels of the frame of a query."""
TEXT_SIZE = 11
"""Of the two lines below an image, in pixels."""
HEIGHT = TILE + 2 * FRAME + 2 * TEXT_SIZE + 6
"""Of a tile with its text, in pixels."""
GAP = np.full((HEIGHT, MARGIN, 3), 255, np.uint8)
BLUE, GRAY = (0, 114, 178), (210, 210, 210)
EARLIER = "earlier image"
"""Title of the first tile of two duplicates."""


@dataclass(frozen=True)
class Tile:
    """An image on the sheet with two lines below it."""

    image: Image.Image | None
    """None is drawn gray."""
    title: str
    name: str
    framed: bool = False


def draw_sheet(lines: Sequence[Sequence[Tile]], path: Path, side_by_side: bool = False) -> None:
    """Write a PNG with one line of tiles for each query, the query first.

    Args:
        lines: at least one.
        path: the PNG.
        side_by_side: whether short lines may share a line of the sheet.
    """
    pictures = [np.concatenate([part for tile in line for part in (drawn(tile), GAP)][:-1], axis=1) for line in lines]
    if not side_by_side:
        whole = SHEET_WIDTH - 2 * MARGIN
        pictures = [_widened(picture, whole) for picture in pictures]
    save_png(sheet_of(pictures), path)


def _widened(picture: NDArray[np.uint8], width: int) -> NDArray[np.uint8]:
    """Return a picture with white at its right if it is narrower than `width`."""
    missing = max(0, width - picture.shape[1])
    return np.pad(picture, ((0, 0), (0, missing), (0, 0)), constant_values=255)


def drawn(tile: Tile) -> NDArray[np.uint8]:
    """Return a tile as uint8 [height, width, 3]: the image in the middle of a box, and its score and name below."""
    side = TILE + 2 * FRAME
    canvas = Image.new("RGB", (side, HEIGHT), "white")
    draw, font = ImageDraw.Draw(canvas), ImageFont.load_default(TEXT_SIZE)
    image = Image.new("RGB", (TILE, TILE), GRAY) if tile.image is None else tile.image
    image = ImageOps.contain(image, (TILE, TILE))
    left, top = (side - image.width) // 2, (side - image.height) // 2
    canvas.paste(image, (left, top))
    if tile.framed:
        box = (left - FRAME, top - FRAME, left + image.width + FRAME - 1, top + image.height + FRAME - 1)
        draw.rectangle(box, outline=BLUE, width=FRAME)
    draw.text((FRAME, side), tile.title, "black", font)
    draw.text((FRAME, side + TEXT_SIZE + 2), shortened(tile.name, font), "black", font)
    return np.asarray(canvas)


def shortened(name: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> str:
    """Return the end of a name that fits below an image."""
    if font.getlength(name) <= TILE:
        return name
    while font.getlength(f"…{name}") > TILE:
        name = name[1:]
    return f"…{name}"
