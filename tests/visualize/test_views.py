"""The pictures show what the batch holds: context as it is, every target hatched in its color."""

import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

from ijepa_enhanced.batch import Batch, MaskedBatch
from ijepa_enhanced.data.decode import unpatchify
from ijepa_enhanced.data.loader import masks_of
from ijepa_enhanced.masks import MaskConfig, ViewMasks
from ijepa_enhanced.packed import Packed
from ijepa_enhanced.visualize.curves import draw_curves
from ijepa_enhanced.visualize.views import (
    COLORS,
    MARGIN,
    SHEET_WIDTH,
    VIEW_RESOLUTION,
    VIEWS_SHOWN,
    draw_masked_views,
    draw_pack,
)

ROWS, COLS, PATCH = 6, 8, 8
CELL = round(VIEW_RESOLUTION / (ROWS * COLS) ** 0.5)
GRAY = 100


def picture(path: Path) -> NDArray[np.uint8]:
    with Image.open(path) as image:
        assert image.format == "PNG"
        assert image.mode == "RGB"
        image.load()
        return np.asarray(image)


def block(top: int, left: int, height: int, width: int) -> NDArray[np.int64]:
    rows, cols = np.mgrid[top : top + height, left : left + width]
    return (rows * COLS + cols).ravel()


TARGETS = (block(0, 0, 2, 3), block(1, 2, 3, 2), block(4, 0, 2, 2), block(3, 5, 2, 3))
"""The first two overlap in one cell."""
HIDDEN = sorted({int(token) for target in TARGETS for token in target})
CONTEXT = np.array([token for token in range(ROWS * COLS - 3) if token not in HIDDEN])
"""The view's last three tokens are neither context nor target."""


@pytest.fixture
def masked_views() -> tuple[Batch, list[ViewMasks]]:
    """One view of one gray, and a second, smaller one, so that rows of the stream and tokens of a view differ."""
    packed = Packed.of_grids(np.full((4 + ROWS * COLS, PATCH * PATCH * 3), GRAY, np.uint8), np.array([[2, 2], [6, 8]]))
    masks = [ViewMasks(np.array([0, 3]), (np.array([1]), np.array([2]))), ViewMasks(CONTEXT, TARGETS)]
    return Batch(packed, torch.arange(2), None, (0, 0), ()), masks


@pytest.fixture
def cells(masked_views: tuple[Batch, list[ViewMasks]], tmp_path: Path) -> NDArray[np.uint8]:
    """The masked picture of the large view, cell by cell: [rows, cols, CELL, CELL, 3]."""
    draw_masked_views(*masked_views, PATCH, tmp_path / "masks.png")
    sheet = picture(tmp_path / "masks.png")
    small = 2 * round(VIEW_RESOLUTION / 2)
    # The small view and its masked self, then the large one, then what is masked of it.
    left = MARGIN + 2 * small + MARGIN // 2 + 2 * MARGIN + COLS * CELL + MARGIN // 2
    masked = sheet[MARGIN : MARGIN + ROWS * CELL, left : left + COLS * CELL]
    return masked.reshape(ROWS, CELL, COLS, CELL, 3).swapaxes(1, 2)


def test_context_shows_its_pixels_and_nothing_else(cells: NDArray[np.uint8]) -> None:
    for token in CONTEXT:
        assert (cells[divmod(int(token), COLS)] == GRAY).all(), token


def test_what_is_neither_context_nor_target_is_white(cells: NDArray[np.uint8]) -> None:
    for token in range(ROWS * COLS - 3, ROWS * COLS):
        assert (cells[divmod(token, COLS)] == 255).all(), token


@pytest.mark.parametrize("number", range(4))
def test_every_cell_of_every_target_is_hatched_in_its_color(cells: NDArray[np.uint8], number: int) -> None:
    """Also where two targets overlap: there both colors show."""
    inside = {divmod(int(token), COLS) for token in TARGETS[number]}
    for row in range(ROWS):
        for col in range(COLS):
            shown = (cells[row, col] == COLORS[number]).all(axis=2)
            if (row, col) in inside:
                # A line and its gap are 2 * HATCH pixels: a twelfth of a cell's pixels; less a crossing line's.
                assert shown.mean() > 1 / 24, (row, col)
                assert shown.mean() < 0.75, (row, col)
            else:
                assert not shown.any(), (row, col)


def test_a_target_is_white_between_its_lines(cells: NDArray[np.uint8]) -> None:
    """What the student does not see is not shown."""
    for token in HIDDEN:
        cell = cells[divmod(token, COLS)].reshape(-1, 3)
        colors = {tuple(color) for color in cell.tolist()}
        assert colors <= {(255, 255, 255), *(tuple(color) for color in COLORS[:4].tolist())}
        assert (255, 255, 255) in colors


def test_a_target_is_outlined(cells: NDArray[np.uint8]) -> None:
    whole = cells.swapaxes(1, 2).reshape(ROWS * CELL, COLS * CELL, 3)
    top, left, height, width = 3 * CELL, 5 * CELL, 2 * CELL, 3 * CELL
    for edge in (
        whole[top, left : left + width],
        whole[top + height - 1, left : left + width],
        whole[top : top + height, left],
        whole[top : top + height, left + width - 1],
    ):
        assert (edge == COLORS[3]).all()


def test_beside_it_the_view_is_whole(make_batch: Callable[..., MaskedBatch], tmp_path: Path) -> None:
    batch = make_batch([(ROWS, COLS)], 0)
    draw_masked_views(batch, masks_of(batch, MaskConfig(), 0), PATCH, tmp_path / "masks.png")
    sheet = picture(tmp_path / "masks.png")
    pixels = unpatchify(batch.packed.values.numpy(), ROWS, COLS, PATCH)
    expected = Image.fromarray(pixels).resize((COLS * CELL, ROWS * CELL), Image.Resampling.BICUBIC)
    assert (sheet[MARGIN : MARGIN + ROWS * CELL, MARGIN : MARGIN + COLS * CELL] == np.asarray(expected)).all()


def test_many_views_make_a_sheet_of_the_first_ones(make_batch: Callable[..., MaskedBatch], tmp_path: Path) -> None:
    grids = [(4, 4)] * VIEWS_SHOWN
    for name, shown in (("some", grids), ("more", [*grids, (4, 4), (9, 2)])):
        batch = make_batch(shown, 0)
        draw_masked_views(batch, masks_of(batch, MaskConfig(), 0), PATCH, tmp_path / f"{name}.png")
    assert np.array_equal(picture(tmp_path / "some.png"), picture(tmp_path / "more.png"))


@pytest.mark.parametrize("grid", [(1, 40), (40, 1), (1, 4)])
def test_a_line_of_patches_can_be_drawn(
    make_batch: Callable[..., MaskedBatch], tmp_path: Path, grid: tuple[int, int]
) -> None:
    batch = make_batch([grid], 0)
    draw_masked_views(batch, masks_of(batch, MaskConfig(), 0), PATCH, tmp_path / "masks.png")
    height, width = picture(tmp_path / "masks.png").shape[:2]
    cell = round(VIEW_RESOLUTION / (grid[0] * grid[1]) ** 0.5)
    assert height == grid[0] * cell + 2 * MARGIN
    assert width >= 2 * grid[1] * cell + 2 * MARGIN


def test_a_pack_shows_every_patch_framed_in_its_views_color(
    make_batch: Callable[..., MaskedBatch], tmp_path: Path
) -> None:
    grids = [(9, 9), (8, 9), (3, 2)]
    batch = make_batch(grids, 0)
    draw_pack(batch, PATCH, tmp_path / "pack.png")
    sheet = picture(tmp_path / "pack.png")
    across, box = SHEET_WIDTH // (PATCH + 2), PATCH + 2
    total = sum(rows * cols for rows, cols in grids)
    assert sheet.shape == (-(-total // across) * box, across * box, 3)
    patches = batch.packed.values.numpy().reshape(-1, PATCH, PATCH, 3)
    view_of = np.repeat([0, 1, 2], [rows * cols for rows, cols in grids])
    first = {0, 81, 153}
    for token in range(total):
        top, left = token // across * box, token % across * box
        cell = sheet[top : top + box, left : left + box]
        # The bar of a view's first patch covers the frame and one column of pixels.
        assert (cell[1:-1, 2:-1] == patches[token][:, 1:]).all(), token
        assert (cell[[0, -1], 2:] == COLORS[view_of[token]]).all(), token
        assert (cell[:, -1] == COLORS[view_of[token]]).all(), token
        bar = (cell[:, :2] == 0).all()
        assert bar == (token in first), token
    assert (sheet[-1, (total % across) * box :] == 255).all()


def test_local_views_are_drawn_after_the_others(
    make_batch: Callable[..., MaskedBatch], make_stream: Callable[..., Packed], tmp_path: Path
) -> None:
    batch, local = make_batch([(9, 9), (8, 9)], 0), make_stream([(2, 3), (3, 3)], 1)
    draw_pack(dataclasses.replace(batch, unmasked=local), PATCH, tmp_path / "pack.png")
    draw_pack(
        dataclasses.replace(batch, packed=Packed.concatenate([batch.packed, local])), PATCH, tmp_path / "joined.png"
    )
    assert (picture(tmp_path / "pack.png") == picture(tmp_path / "joined.png")).all()


LOG = [
    {
        "step": step,
        "loss": 1 / step,
        "prediction": 0.9 / step,
        "vicreg": 0.1 / step,
        "views_per_second": 100.0,
        "lr": 1e-3,
        "grad_norm": 1.0,
    }
    for step in (1, 2, 3)
]


def test_curves_are_drawn(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    assert draw_curves(LOG, tmp_path / "curves.png")
    assert draw_curves(
        [{name: value if name == "step" else 0.0 for name, value in line.items()} for line in LOG],
        tmp_path / "flat.png",
    )
    with Image.open(tmp_path / "curves.png") as curves, Image.open(tmp_path / "flat.png") as flat:
        assert curves.format == "PNG"
        assert curves.size == (1200, 300)
        assert (np.asarray(curves) != np.asarray(flat)).any()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["curves.png", "flat.png"]


def test_without_matplotlib_there_are_no_curves_but_a_word_about_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "matplotlib.figure", None)
    assert not draw_curves(LOG, tmp_path / "curves.png")
    (message,) = caplog.messages
    assert message == "curves.png was not written. Install matplotlib with: pip install 'ijepa-enhanced[plots]'"
    assert not (tmp_path / "curves.png").exists()
