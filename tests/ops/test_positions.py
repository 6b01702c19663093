"""Places in a grid as vectors: table look-ups, their interpolation, and sine-cosine in MAE's order."""

import cmath
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from ijepa_enhanced.models.blocks import FactorizedPositions, SinCosPositions, TablePositions
from ijepa_enhanced.ops.positions import (
    Resampling,
    axis_coordinates,
    axis_weights,
    centered,
    interpolation_weights,
    rotate,
    rotations,
    sincos_2d,
    within_grid,
)
from ijepa_enhanced.packed import Packed, Segments


def line(extent: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Positions 0 to extent - 1 of one axis, and that extent for each."""
    return torch.arange(extent, dtype=torch.int32), torch.full((extent,), extent, dtype=torch.int32)


@pytest.mark.parametrize(("extent", "size"), [(1, 1), (1, 8), (5, 8), (8, 8)])
def test_a_grid_that_fits_is_looked_up_exactly(extent: int, size: int) -> None:
    coordinates = axis_coordinates(*line(extent), size)
    assert coordinates.tolist() == list(range(extent))
    table = torch.randn(size, 3, generator=torch.Generator().manual_seed(0))
    assert torch.equal(interpolation_weights(coordinates, size) @ table, table[:extent])


@pytest.mark.parametrize(
    ("extent", "size", "expected"),
    [
        (5, 3, [0, 0.5, 1, 1.5, 2]),
        (9, 5, [0, 0.5, 1, 1.5, 2, 2.5, 3, 3.5, 4]),
        (4, 1, [0, 0, 0, 0]),
        (5, 4, [0, 0.75, 1.5, 2.25, 3]),
    ],
)
def test_a_longer_grid_is_squeezed_evenly_onto_the_table(extent: int, size: int, expected: list[float]) -> None:
    # All are sums of few powers of 2, so float32 has them exactly.
    assert axis_coordinates(*line(extent), size).tolist() == expected


def test_every_token_has_the_extent_of_its_own_view() -> None:
    positions = torch.tensor([0, 1, 2, 0, 4, 8])
    extents = torch.tensor([3, 3, 3, 9, 9, 9])
    assert axis_coordinates(positions, extents, 5).tolist() == [0, 1, 2, 0, 2, 4]


def test_merged_tokens_lie_between() -> None:
    assert axis_coordinates(torch.tensor([0.5, 3.5]), torch.tensor([5, 5]), 3).tolist() == [0.25, 1.75]


def test_weights_by_hand() -> None:
    weights = interpolation_weights(torch.tensor([0.0, 0.25, 1.5, 2.0]), 3)
    assert weights.tolist() == [[1, 0, 0], [0.75, 0.25, 0], [0, 0.5, 0.5], [0, 0, 1]]
    assert weights.dtype == torch.float32


@settings(deadline=None, max_examples=100)
@given(st.integers(1, 200), st.integers(1, 64))
def test_rows_of_the_weights_sum_to_one_on_every_grid(extent: int, size: int) -> None:
    coordinates = axis_coordinates(*line(extent), size)
    weights = interpolation_weights(coordinates, size)
    assert weights.shape == (extent, size)
    assert (weights >= 0).all()
    assert ((weights > 0).sum(dim=1) <= 2).all()
    # Coordinates below 64 are off by up to 4 roundings of 64 * 2 ** -24; their fractions inherit that.
    torch.testing.assert_close(weights.sum(dim=1), torch.ones(extent), rtol=0, atol=4 * 64 * 2**-24)
    # Reading the table of the entries' own numbers gives the coordinate back.
    entries = torch.arange(size, dtype=torch.float32)[:, None]
    torch.testing.assert_close((weights @ entries)[:, 0], coordinates, rtol=0, atol=64 * 4 * 64 * 2**-24)
    assert coordinates[-1].item() == pytest.approx(min(extent, size) - 1, rel=2**-22), "the last is the last"


def test_interpolation_of_a_learned_table_by_hand() -> None:
    table = torch.tensor([[0.0, 10.0], [2.0, 20.0], [6.0, 0.0]])
    read = interpolation_weights(axis_coordinates(*line(5), 3), 3) @ table
    assert read.tolist() == [[0, 10], [1, 15], [2, 20], [4, 10], [6, 0]]


def test_sincos_2d_is_the_formula_columns_first_sines_before_cosines() -> None:
    places = [(0, 0), (0, 1), (1, 0), (3, 2), (2.5, 13.25)]
    width = 8
    expected = []
    for row, col in places:
        vector = []
        for axis in (col, row):
            angles = [axis / 10000 ** (i / (width // 4)) for i in range(width // 4)]
            vector += [math.sin(angle) for angle in angles] + [math.cos(angle) for angle in angles]
        expected.append(vector)
    rows, cols = torch.tensor(places).unbind(1)
    found = sincos_2d(rows, cols, width)
    assert found.dtype == torch.float32
    # Angles up to 13 in float32, 2 roundings of 16 * 2 ** -24, and one of the wave.
    torch.testing.assert_close(found, torch.tensor(expected), rtol=0, atol=3 * 16 * 2**-24)


def test_sincos_2d_of_the_first_places_by_hand() -> None:
    one, zero = [math.sin(1), math.cos(1)], [0.0, 1.0]
    found = sincos_2d(torch.tensor([0, 0, 1]), torch.tensor([0, 1, 0]), 4)
    assert found.flatten().tolist() == pytest.approx([*zero, *zero, *one, *zero, *zero, *one], abs=2**-24)


@pytest.mark.parametrize("width", [2, 6, 193])
def test_a_width_that_is_no_multiple_of_four_is_refused(width: int) -> None:
    message = f"^2-D sine-cosine positions need a width that is a multiple of 4, not {width}\\.$"
    with pytest.raises(ValueError, match=message):
        sincos_2d(torch.zeros(1), torch.zeros(1), width)


def test_longer_grids_lie_evenly_on_the_longest_and_others_do_not_move() -> None:
    packed = Packed.of_grids(np.zeros((5 * 2 + 3 * 2, 1), np.uint8), np.array([[5, 2], [3, 2]]))
    found = within_grid(packed, (3, 4))
    assert found.grids.tolist() == [[3, 2], [3, 2]]
    assert found.positions[:10, 0].tolist() == [row for row in (0, 0.5, 1, 1.5, 2) for _ in range(2)]
    assert torch.equal(found.positions[10:], packed.positions[10:].float())
    assert torch.equal(found.positions[:, 1], packed.positions[:, 1].float())


INTERPOLATE = {
    "linear": {"mode": "linear"},
    "bicubic": {"mode": "bicubic"},
    "bicubic-antialias": {"mode": "bicubic", "antialias": True},
}
"""The arguments of `F.interpolate` that each resampling is named after."""


def interpolated(table: torch.Tensor, size: tuple[int, int], resampling: Resampling) -> torch.Tensor:
    """A table [rows, columns, D] resized by `F.interpolate`."""
    options = INTERPOLATE[resampling]
    if resampling == "linear":  # one axis at a time
        for axis, extent in enumerate(size):
            lines = table.movedim(axis, 2)  # F.interpolate resizes the last axis
            table = F.interpolate(lines, size=extent, align_corners=False, **options).movedim(2, axis)
        return table
    if size[1] == 1 < size[0]:  # PyTorch 2.13 on a CPU repeats the first row when `antialias` resizes to one column
        return interpolated(table.transpose(0, 1), (1, size[0]), resampling).transpose(0, 1)
    resized = F.interpolate(table.permute(2, 0, 1)[None], size=size, align_corners=False, **options)
    return resized[0].permute(1, 2, 0)


@pytest.mark.parametrize("resampling", ["linear", "bicubic", "bicubic-antialias"])
@settings(deadline=None, max_examples=100)
@given(st.integers(1, 40), st.integers(1, 16))
def test_a_resampled_axis_is_that_of_interpolate(resampling: Resampling, extent: int, size: int) -> None:
    table = torch.randn(size, 1, 3, generator=torch.Generator().manual_seed(size))
    found = axis_weights(*line(extent), size, resampling) @ table[:, 0]
    # Numbers up to 4, read at places up to 16 whose rounding of 2 ** -20 the kernel's slope, at most 2, scales.
    torch.testing.assert_close(found, interpolated(table, (extent, 1), resampling)[:, 0], rtol=0, atol=4 * 2**-18)


@pytest.mark.parametrize("resampling", ["squeeze", "linear", "bicubic", "bicubic-antialias"])
def test_a_table_of_the_grids_size_is_read_exactly(resampling: Resampling) -> None:
    for size in range(1, 40):
        assert torch.equal(axis_weights(*line(size), size, resampling), torch.eye(size))


@pytest.mark.parametrize("resampling", ["bicubic", "bicubic-antialias"])
def test_a_table_of_positions_is_interpolated_as_a_picture(resampling: Resampling) -> None:
    """Views of several sizes in one stream, smaller, larger and elongated."""
    grids = [(5, 7), (2, 3), (9, 4), (12, 1), (1, 1)]
    positions = TablePositions(6, (5, 7), resampling)
    with torch.no_grad():
        positions.table.normal_(generator=torch.Generator().manual_seed(0))
    packed = Packed.of_grids(np.zeros((sum(rows * cols for rows, cols in grids), 1), np.uint8), np.array(grids))
    found = positions(packed.positions, packed.grids, packed.segments.cu_seqlens).split(packed.segments.lengths)
    for grid, view in zip(grids, found, strict=True):
        expected = interpolated(positions.table, grid, resampling).flatten(0, 1)
        torch.testing.assert_close(view, expected, rtol=0, atol=4 * 2**-18)


def test_an_antialiased_table_that_shrinks_reads_all_its_entries() -> None:
    few = axis_weights(*line(2), 16, "bicubic")
    all_of_them = axis_weights(*line(2), 16, "bicubic-antialias")
    assert (few != 0).sum(dim=1).tolist() == [4, 4]
    assert (all_of_them != 0).sum(dim=1).min() > 8


def test_views_that_keep_their_shape_read_both_axes_by_the_longer_one() -> None:
    """A view of 2 rows and 6 columns reads the first third of the rows of a table of 6 rows."""
    positions = FactorizedPositions(2, (6, 6), "linear", square=True)
    with torch.no_grad():
        positions.rows.copy_(torch.stack([torch.arange(6.0), torch.zeros(6)], dim=1))
        positions.cols.copy_(torch.stack([torch.zeros(6), torch.arange(6.0)], dim=1))
    packed = Packed.of_grids(np.zeros((12 + 3, 1), np.uint8), np.array([[2, 6], [3, 1]]))
    found = positions(packed.positions, packed.grids, packed.segments.cu_seqlens)
    assert found[:12].tolist() == [[row, col] for row in range(2) for col in range(6)]
    # Three rows span the table: their centers lie at 1/6, 3/6 and 5/6 of it.
    assert found[12:].tolist() == [[0.5, 0.5], [2.5, 0.5], [4.5, 0.5]]


def test_rotations_by_the_formula() -> None:
    """Pairs (i, i + K / 2): the first half of the pairs turns with the row, the second half with the column."""
    width, base = 8, 100.0
    coordinates = torch.tensor([[0.0, 0.0], [0.5, -0.25], [-1.0, 0.75]])
    x = torch.randn(3, 2, width, generator=torch.Generator().manual_seed(0))
    found = rotate(x, rotations(coordinates, width, base))
    expected = torch.empty_like(x)
    for token, place in enumerate(coordinates.tolist()):
        for pair in range(width // 2):
            axis, number = divmod(pair, width // 4)
            angle = 2 * math.pi * place[axis] * base ** -(number / (width // 4))
            for head in range(2):
                number = complex(x[token, head, pair], x[token, head, pair + width // 2]) * cmath.exp(1j * angle)
                expected[token, head, pair], expected[token, head, pair + width // 2] = number.real, number.imag
    # Angles up to 2 pi in float32 are off by 2 ** -21, times numbers up to 3.
    torch.testing.assert_close(found, expected, rtol=0, atol=3 * 2**-21)
    assert torch.equal(found[0], x[0]), "the center does not turn"


def test_the_centers_of_patches_lie_between_the_edges_of_their_own_view() -> None:
    packed = Packed.of_grids(np.zeros((2 * 4 + 1, 1), np.uint8), np.array([[2, 4], [1, 1]]), prefix=2)
    rows, cols = [-0.5, 0.5], [-0.75, -0.25, 0.25, 0.75]
    view = [[row, col] for row in rows for col in cols]
    assert centered(packed).tolist() == [[0, 0]] * 2 + view + [[0, 0]] * 3


def test_fixed_positions_without_a_limit_are_never_squeezed() -> None:
    places, extents = torch.cartesian_prod(torch.arange(40), torch.arange(3)), torch.tensor([[40, 3]])
    found = SinCosPositions(8, (4, 4), "none")(places, extents, Segments.of([120]).cu_seqlens)
    assert torch.equal(found, sincos_2d(places[:, 0], places[:, 1], 8))
