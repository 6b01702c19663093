"""How many tokens each layer leaves: the rule by decimal arithmetic, and the tiles that are made for it by hand."""

import itertools
import math
from decimal import ROUND_CEILING, Context, Decimal
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ijepa_enhanced.merge_plan import TILE, MergePlan, merged_lengths, plan_merges
from ijepa_enhanced.models.config import MergeConfig

RATES = [0.0, 1e-05, 0.01, 0.02, 0.05, 0.08, 0.1, 0.12, 0.25, 0.3, 1 / 3, 0.4999, 0.5]
LENGTHS = [*range(1, 300), 576, 1023, 1024, 4096, 16384]


def by_decimals(n: int, rates: list[float], floor: int) -> list[int]:
    """min(n, max(floor, ceil(n * product of (1 - rate)))) of every layer, in decimal numbers of any length."""
    exact = Context(prec=1000)
    left, found = Decimal(1), [n]
    for rate in rates:
        left = exact.multiply(left, exact.subtract(Decimal(1), Decimal(str(rate))))
        found.append(min(n, max(floor, int(exact.multiply(left, Decimal(n)).to_integral_value(ROUND_CEILING)))))
    return found


def test_lengths_by_hand() -> None:
    assert merged_lengths([10, 3, 1, 100], 0.1, 3).tolist() == [
        [10, 3, 1, 100],
        [9, 3, 1, 90],
        [9, 3, 1, 81],
        [8, 3, 1, 73],
    ]
    assert merged_lengths([10, 3, 1], [0.5, 0, 0.2], 3, floor=4).tolist() == [
        [10, 3, 1],
        [5, 3, 1],
        [5, 3, 1],
        [4, 3, 1],
    ]
    assert merged_lengths([7, 8], 0, 2).tolist() == [[7, 8]] * 3
    assert merged_lengths([], 0.1, 2).shape == (3, 0)


def test_a_rate_is_the_decimal_number_that_it_is_written_as() -> None:
    assert math.ceil(25 * (1 - 0.2) ** 2) == 17, "what floats make of 16"
    assert merged_lengths([25], 0.2, 2)[-1].tolist() == [16]
    # A float of 0.3 lies below it, so that its exact product would leave one more.
    assert math.ceil(10 * (1 - Fraction(0.3))) == 8
    assert merged_lengths([10], 0.3, 1)[-1].tolist() == [7]
    assert merged_lengths([10], np.float64(0.3), 1)[-1].tolist() == [7]


@pytest.mark.parametrize("floor", [1, 16, 200])
@pytest.mark.parametrize("rate", RATES)
def test_lengths_agree_with_decimal_arithmetic_over_forty_layers(rate: float, floor: int) -> None:
    found = merged_lengths(LENGTHS, rate, 40, floor)
    assert found.dtype == np.int64
    assert found.T.tolist() == [by_decimals(n, [rate] * 40, floor) for n in LENGTHS]


@settings(deadline=None, max_examples=100, derandomize=True)
@given(st.lists(st.sampled_from(RATES), min_size=1, max_size=12), st.integers(1, 50))
def test_any_list_of_rates_agrees_and_no_layer_merges_more_than_every_second_token(
    rates: list[float], floor: int
) -> None:
    found = merged_lengths(LENGTHS, rates, len(rates), floor)
    assert found.T.tolist() == [by_decimals(n, rates, floor) for n in LENGTHS]
    merged = found[:-1] - found[1:]
    assert (merged >= 0).all()
    assert (merged <= found[:-1] // 2).all(), "one for each that stays at an odd place"


def test_half_is_reached() -> None:
    assert merged_lengths([9, 8, 2], 0.5, 2).tolist() == [[9, 8, 2], [5, 4, 1], [3, 2, 1]]


@settings(deadline=None, max_examples=50, derandomize=True)
@given(st.lists(st.integers(1, 600), max_size=8), st.sampled_from(RATES), st.integers(1, 20))
def test_a_view_is_planned_the_same_alone_and_in_any_pack(lengths: list[int], rate: float, floor: int) -> None:
    pack = MergePlan.of(lengths, rate, 5, floor)
    alone = [MergePlan.of([length], rate, 5, floor) for length in lengths]
    for layer in range(6):
        assert pack.segments[layer].lengths == tuple(plan.segments[layer].lengths[0] for plan in alone)
        assert pack.totals[layer] == pack.segments[layer].total
    for layer in range(5):
        starts = [0, *itertools.accumulate(pack.segments[layer].lengths)]
        moved = [start + tile for start, plan in zip(starts, alone, strict=False) for tile in tiles_of(plan, layer)]
        assert [tile.tolist() for tile in tiles_of(pack, layer)] == [tile.tolist() for tile in moved]


def tiles_of(plan: MergePlan, layer: int) -> list[torch.Tensor]:
    return list(plan.tiles[plan.tile_bounds[layer] : plan.tile_bounds[layer + 1]])


@pytest.mark.parametrize(
    "lengths", [[1, 2, 3, 1, 127, 128, 129, 130, 131], [300], [257, 1, 255], [2 * TILE] * 3, [1, 1], []]
)
def test_tiles_hold_every_pair_of_an_even_and_an_odd_place_of_a_view_once(lengths: list[int]) -> None:
    plan = MergePlan.of(lengths, 0.25, 3)
    assert plan.tiles.shape == (plan.tile_bounds[-1], 2, 2)
    assert plan.tiles.dtype == torch.int64
    for layer in range(3):
        views = [range(start, stop) for start, stop in itertools.pairwise(plan.segments[layer].cu_seqlens.tolist())]
        expected = [pair for view in views for pair in itertools.product(view[::2], view[1::2])]
        covered: list[tuple[int, int]] = []
        for tile in tiles_of(plan, layer):
            sides = [range(first, min(last + 1, first + 2 * TILE), 2) for first, last in tile.tolist()]
            covered += itertools.product(*sides)
        assert sorted(covered) == sorted(expected)


def test_what_a_plan_says_of_layers_that_merge_nothing() -> None:
    plan = MergePlan.of([100, 5, 30], [0, 0.1, 0, 0.1], 4, floor=60)
    assert plan.active == (False, True, False, True), "the rates' affair, not the pack's"
    assert [segments.lengths for segments in plan.segments] == [(100, 5, 30)] * 2 + [(90, 5, 30)] * 2 + [(81, 5, 30)]
    assert plan.totals == (135, 135, 125, 125, 116)
    assert plan.tile_bounds == (0, 0, 3, 3, 6)
    never = MergePlan.of([100, 5], 0.0, 12)
    assert (set(never.active), len(never.tiles), set(never.totals)) == ({False}, 0, {105})


def test_plain_numbers_are_plain() -> None:
    plan = MergePlan.of(np.array([9, 4], dtype=np.uint8), 0.2, 2)
    assert {type(number) for number in (*plan.totals, *plan.tile_bounds)} == {int}
    assert {type(one) for one in plan.active} == {bool}


def test_all_of_a_plan_moves() -> None:
    plan = MergePlan.of([9, 4], 0.2, 2)
    moved = plan.to("meta")
    assert [segments.cu_seqlens.device.type for segments in moved.segments] == ["meta"] * 3
    assert moved.tiles.device.type == "meta"
    assert [segments.lengths for segments in moved.segments] == [segments.lengths for segments in plan.segments]
    assert (moved.totals, moved.active, moved.tile_bounds) == (plan.totals, plan.active, plan.tile_bounds)


@pytest.mark.parametrize("rate", [-0.01, 0.51, 1.0, math.nan, math.inf, [0.1, 0.6, 0.1]])
def test_a_rate_that_cannot_be_is_refused(rate: float | list[float]) -> None:
    wrong = rate[1] if isinstance(rate, list) else rate
    message = f"^A merge rate must be between 0 and 0.5, not {wrong}: a layer can merge at most half of its tokens\\.$"
    for plan in (MergePlan.of, merged_lengths):
        with pytest.raises(ValueError, match=message):
            plan([10], rate, 3)


@pytest.mark.parametrize("rates", [[], [0.1, 0.1], [0.1] * 4])
def test_a_list_of_another_length_than_the_depth_is_refused(rates: list[float]) -> None:
    message = f"^Merging needs one rate for each of the 3 layers, but the list has {len(rates)}\\.$"
    with pytest.raises(ValueError, match=message):
        MergePlan.of([10], rates, 3)


def test_a_floor_below_one_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^Merging must leave every view at least 1 token, not 0\.$"):
        MergePlan.of([10], 0.1, 3, floor=0)


def test_a_view_without_tokens_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^Every segment needs at least one token, but one has 0\.$"):
        MergePlan.of([10, 0], 0.1, 3)


def test_where_no_layer_merges_there_is_no_plan() -> None:
    assert plan_merges([10, 3], 0.0, 3) is None
    assert plan_merges([10, 3], [0.0, 0.0], 2) is None
    assert plan_merges([10, 3], 0.0, 0) is None
    plan = plan_merges([10, 3], [0.0, 0.5], 2)
    assert plan is not None
    assert [segments.lengths for segments in plan.segments] == [(10, 3), (10, 3), (5, 2)]


def test_a_plan_that_merges_nothing_is_checked_all_the_same() -> None:
    with pytest.raises(ValueError, match=r"^Merging needs one rate for each of the 3 layers, but the list has 2\.$"):
        plan_merges([10], [0.0, 0.0], 3)


def test_training_merges_nothing_unless_asked_to() -> None:
    assert MergeConfig() == MergeConfig(student_rate=0.0, teacher_rate=0.0)
    MergeConfig(student_rate=0.5, teacher_rate=0.5)


@pytest.mark.parametrize("name", ["student_rate", "teacher_rate"])
@pytest.mark.parametrize("rate", [-0.01, 0.51, math.nan])
def test_a_rate_of_training_that_cannot_be_is_refused(name: str, rate: float) -> None:
    with pytest.raises(ValueError, match=rf"^merging\.{name} must be between 0 and 0\.5, not {rate}\.$"):
        MergeConfig(**{name: rate})


@settings(deadline=None, max_examples=50)
@given(st.lists(st.integers(1, 200), min_size=1, max_size=5), st.sampled_from(RATES), st.integers(0, 5))
def test_class_tokens_and_registers_come_on_top(lengths: list[int], rate: float, prefix: int) -> None:
    expected = merged_lengths(lengths, rate, 3) + prefix
    assert np.array_equal(merged_lengths(np.array(lengths) + prefix, rate, 3, prefix=prefix), expected)
