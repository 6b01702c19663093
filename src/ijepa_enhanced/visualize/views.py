"""Pictures of a batch as it is trained on: the masks of its views, and the patches of the pack."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from ijepa_enhanced.batch import Batch, Colors
from ijepa_enhanced.data.decode import displayed, unpatchify
from ijepa_enhanced.files import make_folder, replacing
from ijepa_enhanced.masks import ViewMasks
from ijepa_enhanced.ops.preprocess import recolor
from ijepa_enhanced.packed import Packed

_Scalar = TypeVar("_Scalar", bound=np.generic)

COLORS = np.array(
    [[230, 159, 0], [86, 180, 233], [0, 158, 115], [213, 94, 0], [204, 121, 167], [240, 228, 66], [0, 114, 178]],
    dtype=np.uint8,
)
"""Okabe and Ito's palette, which color-blind people can tell apart too."""

SHEET_WIDTH = 1200
"""Pixels across a picture."""
VIEW_RESOLUTION = 176
"""sqrt(height * width) of a view in the picture of masks, in pixels."""
VIEWS_SHOWN = 12
MARGIN = 12
HATCH = 6
"""Pixels from one line of a hatching to the next."""


def draw_masked_views(batch: Batch, masks: Sequence[ViewMasks], patch_size: int, path: Path) -> None:
    """Write a PNG of the first views: each view, and beside it what the student sees, with every target hatched.

    Everything that the student does not see is white.

    Args:
        batch: its masked views are drawn, at most `VIEWS_SHOWN`.
        masks: the mask of each view.
        patch_size: P.
        path: the PNG.
    """
    bounds = batch.packed.segments.cu_seqlens.numpy()
    patches = _in_color(batch.packed, batch.colors)
    pictures = []
    for view in range(min(VIEWS_SHOWN, len(batch.packed.segments))):
        start, stop = bounds[view : view + 2]
        rows, cols = batch.packed.grids[view].tolist()
        pixels = displayed(unpatchify(patches[start:stop], rows, cols, patch_size))
        cell = max(1, round(VIEW_RESOLUTION / (rows * cols) ** 0.5))
        whole = np.asarray(Image.fromarray(pixels).resize((cols * cell, rows * cell), Image.Resampling.BICUBIC))
        masked = np.where(enlarged(_area(masks[view].context, rows, cols), cell)[..., None], whole, 255)
        targets = masks[view].targets
        for number, target in enumerate(targets):
            _hatch(masked, enlarged(_area(target, rows, cols), cell), number, len(targets))
        pictures.append(np.concatenate([whole, np.full((len(whole), MARGIN // 2, 3), 255, np.uint8), masked], axis=1))
    save_png(sheet_of(pictures), path)


def draw_pack(batch: Batch, patch_size: int, path: Path) -> None:
    """Write a PNG of all patches of a pack in the order of the stream, line by line; unmasked views come last.

    Each patch has a frame in the color of its view. A black bar marks the first patch of a view.
    """
    cell = max(6, min(16, patch_size))
    across = SHEET_WIDTH // (cell + 2)
    stream, patches = batch.packed, _in_color(batch.packed, batch.colors)
    if batch.unmasked is not None:
        stream = Packed.concatenate([batch.packed, batch.unmasked])
        patches = np.concatenate([patches, _in_color(batch.unmasked, batch.unmasked_colors)])
    total = stream.segments.total
    down = -(-total // across)
    patches = displayed(patches.reshape(total * patch_size, patch_size, -1)).reshape(total, patch_size, patch_size, 3)
    sheet = np.full((down * (cell + 2), across * (cell + 2), 3), 255, np.uint8)
    bounds = stream.segments.cu_seqlens.numpy()
    view_of = np.repeat(np.arange(len(bounds) - 1), np.diff(bounds))
    pick = np.linspace(0, patch_size - 1, cell).round().astype(int)
    for token in range(total):
        top, left = (token // across) * (cell + 2), (token % across) * (cell + 2)
        sheet[top : top + cell + 2, left : left + cell + 2] = COLORS[view_of[token] % len(COLORS)]
        sheet[top + 1 : top + cell + 1, left + 1 : left + cell + 1] = patches[token][pick][:, pick]
        if token in bounds:
            sheet[top : top + cell + 2, left : left + 2] = 0
    save_png(Image.fromarray(sheet), path)


def _in_color(packed: Packed, colors: Colors | None) -> NDArray[Any]:
    """Return the patches [T, P * P * C] as the network gets them, before normalization."""
    values = packed.values if colors is None else recolor(packed, colors)
    if packed.values.dtype == torch.uint8:
        values = values.round().clamp(0, 255).to(torch.uint8)
    return values.numpy()


def _area(tokens: NDArray[np.int64], rows: int, cols: int) -> NDArray[np.bool_]:
    """Return the places of tokens of a view as bool [rows, cols]."""
    inside = np.zeros(rows * cols, dtype=np.bool_)
    inside[tokens] = True
    return inside.reshape(rows, cols)


def enlarged(cells: NDArray[_Scalar], cell: int) -> NDArray[_Scalar]:
    """Enlarge each of [rows, columns, ...] to a square of `cell` pixels."""
    return cells.repeat(cell, axis=0).repeat(cell, axis=1)


def _hatch(pixels: NDArray[np.uint8], inside: NDArray[np.bool_], number: int, count: int) -> None:
    """Hatch and outline a block in place. The lines of the `count` blocks differ, so overlaps show all of them."""
    height, width = inside.shape
    y, x = np.indices(inside.shape)
    direction = x + y if number % 2 else x - y
    lines = direction % (HATCH * 2) == (number // 2) * (HATCH * 2) // max(1, -(-count // 2))
    edge = np.pad(inside, 2)
    core = np.logical_and.reduce([edge[2 + dy :, 2 + dx :][:height, :width] for dy in (-2, 1) for dx in (-2, 1)])
    pixels[inside & (lines | ~core)] = COLORS[number % len(COLORS)]


def sheet_of(pictures: list[NDArray[np.uint8]]) -> Image.Image:
    """Arrange pictures like words, in lines of at most `SHEET_WIDTH` pixels; a wider picture has a line of its own.

    The sheet is as wide as its longest line.
    """
    places, left, top, line = [], MARGIN, MARGIN, 0
    for picture in pictures:
        height, width = picture.shape[:2]
        if left > MARGIN and left + width + MARGIN > SHEET_WIDTH:
            left, top, line = MARGIN, top + line + MARGIN, 0
        places.append((left, top))
        left, line = left + width + 2 * MARGIN, max(line, height)
    width = max(x + picture.shape[1] + MARGIN for (x, _), picture in zip(places, pictures, strict=True))
    sheet = Image.new("RGB", (width, top + line + MARGIN), "white")
    for place, picture in zip(places, pictures, strict=True):
        sheet.paste(Image.fromarray(picture), place)
    return sheet


def save_png(picture: Image.Image, path: Path) -> None:
    """Write a picture, whole or not at all; its folder is created if it is missing."""
    make_folder(path.parent)
    with replacing(path) as temporary:
        picture.save(temporary, format="PNG")
