"""Places in a grid as vectors: table look-ups, their interpolation, and sine-cosine in MAE's order."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ijepa_enhanced.ops.positions import axis_coordinates, interpolation_weights, sincos_2d, within_grid
from ijepa_enhanced.packed import Packed


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
