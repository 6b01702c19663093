"""Schedules by hand-written small numbers."""

import math

import pytest

from ijepa_enhanced.schedules import cosine, linear, warmup_cosine

# A few roundings of numbers of size 1 to 8 in float64.
EXACT = {"rel": 1e-14, "abs": 1e-14}


def test_cosine_by_hand() -> None:
    # Five steps are four quarters of half a turn: (1 + cos) / 2 is 1, (2 + sqrt 2) / 4, 1 / 2, (2 - sqrt 2) / 4, 0.
    root = math.sqrt(2)
    expected = [8, 8 * (2 + root) / 4, 4, 8 * (2 - root) / 4, 0]
    assert [cosine(step, 5, 8.0, 0.0) for step in range(5)] == pytest.approx(expected, **EXACT)


def test_cosine_may_rise() -> None:
    assert [cosine(step, 3, 0.5, 1.0) for step in range(3)] == pytest.approx([0.5, 0.75, 1.0], **EXACT)


def test_linear_by_hand() -> None:
    assert [linear(step, 5, 2.0, 4.0) for step in range(5)] == pytest.approx([2, 2.5, 3, 3.5, 4], **EXACT)
    assert [linear(step, 3, 1.0, 0.0) for step in range(3)] == pytest.approx([1, 0.5, 0], **EXACT)


@pytest.mark.parametrize("schedule", [cosine, linear])
def test_first_and_last_step_are_exact_and_nothing_comes_after(schedule) -> None:  # type: ignore[no-untyped-def]
    assert schedule(0, 1000, 0.996, 1.0) == 0.996
    assert schedule(999, 1000, 0.996, 1.0) == 1.0
    assert schedule(1000, 1000, 0.996, 1.0) == 1.0
    assert schedule(10**6, 1000, 0.996, 1.0) == 1.0
    assert schedule(998, 1000, 0.996, 1.0) < 1.0


@pytest.mark.parametrize("schedule", [cosine, linear])
def test_a_run_of_one_step_starts_where_the_schedule_starts(schedule) -> None:  # type: ignore[no-untyped-def]
    assert schedule(0, 1, 0.25, 1.0) == 0.25
    assert schedule(1, 1, 0.25, 1.0) == 1.0


def test_warmup_climbs_by_equal_parts_then_falls() -> None:
    # Warm-up of 4 steps to 2, then (1 + cos) / 2 from 2 to 1 over steps 4 to 8.
    root = math.sqrt(2)
    expected = [0.5, 1.0, 1.5, 2.0, 2.0, 1 + (2 + root) / 4, 1.5, 1 + (2 - root) / 4, 1.0]
    assert [warmup_cosine(step, 9, 4, 2.0, 1.0) for step in range(9)] == pytest.approx(expected, **EXACT)
    assert warmup_cosine(9, 9, 4, 2.0, 1.0) == 1.0, "and stays there"


def test_without_warmup_the_first_step_is_the_peak() -> None:
    assert [warmup_cosine(step, 3, 0, 2.0, 1.0) for step in range(3)] == pytest.approx([2, 1.5, 1], **EXACT)


def test_a_run_that_is_all_warmup_reaches_its_peak() -> None:
    assert [warmup_cosine(step, 2, 2, 2.0, 1.0) for step in range(2)] == [1.0, 2.0]
    assert warmup_cosine(0, 2, 8, 2.0, 1.0) == 0.25, "a warm-up that is longer than the run keeps its slope"
