"""I-JEPA's masks on any grid: what every draw must keep, and the bugs of other implementations."""

import math
from collections import Counter

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from ijepa_enhanced import masks
from ijepa_enhanced.masks import MaskConfig, ViewMasks, block_shape, draw_block, draw_masks
from ijepa_enhanced.randomness import Purpose, generator

GRIDS = st.tuples(st.integers(1, 40), st.integers(1, 40)).filter(lambda grid: grid[0] * grid[1] >= 4)
THIN = [(1, 12), (12, 1), (2, 2), (1, 4), (4, 1)]


def ranges(low: float, high: float) -> st.SearchStrategy[list[float]]:
    return st.lists(st.floats(low, high), min_size=2, max_size=2).map(sorted)


CONFIGS = st.builds(
    lambda targets, area, aspect, context: MaskConfig(targets, *area, *aspect, *context),
    st.integers(1, 6),
    ranges(0.01, 1.0),
    ranges(0.1, 10.0),
    ranges(0.01, 1.0),
)


def draw(rows: int, cols: int, number: int = 0, config: MaskConfig | None = None) -> ViewMasks:
    return draw_masks(rows, cols, config or MaskConfig(), generator(0, Purpose.MASKS, image=number))


def extent(block: NDArray[np.int64], cols: int) -> tuple[int, int, int, int]:
    """Top, left, height and width of a block; it must be a whole rectangle."""
    rows, columns = np.divmod(block, cols)
    top, left = int(rows.min()), int(columns.min())
    height, width = int(rows.max()) - top + 1, int(columns.max()) - left + 1
    assert height * width == len(block)
    return top, left, height, width


def check(drawn: ViewMasks, rows: int, cols: int, targets: int) -> None:
    """What holds for every draw."""
    assert 1 <= len(drawn.targets) <= targets
    assert len(drawn.context) > 0
    for tokens in (drawn.context, *drawn.targets):
        assert tokens.dtype == np.int64
        assert len(tokens) > 0
        assert (np.diff(tokens) > 0).all(), "ascending, none twice"
        assert tokens[0] >= 0
        assert tokens[-1] < rows * cols
    assert not set(drawn.context.tolist()) & {token for block in drawn.targets for token in block.tolist()}


@settings(deadline=None, max_examples=200)
@given(GRIDS, st.integers(0, 2**32))
@example((2, 2), 0)
@example((1, 4), 0)
@example((1, 12), 0)
@example((40, 1), 0)
def test_every_draw_gives_blocks_and_a_context_apart_from_them(grid: tuple[int, int], number: int) -> None:
    rows, cols = grid
    drawn = draw(rows, cols, number)
    check(drawn, rows, cols, targets=4)
    for block in drawn.targets:
        extent(block, cols)


@settings(deadline=None, max_examples=200)
@given(GRIDS, CONFIGS, st.integers(0, 2**32))
@example((2, 2), MaskConfig(6, 1.0, 1.0), 0)
@example((1, 4), MaskConfig(1, 1.0, 1.0, 0.1, 0.1, 0.01, 0.01), 0)
def test_drawing_ends_with_a_context_whatever_is_asked_for(
    grid: tuple[int, int], config: MaskConfig, number: int
) -> None:
    check(draw(*grid, number, config), *grid, config.targets)


def test_the_same_generator_draws_the_same_masks_and_another_draws_others() -> None:
    first, again = draw(14, 14), draw(14, 14)
    for one, other in zip((first.context, *first.targets), (again.context, *again.targets), strict=True):
        np.testing.assert_array_equal(one, other)
    assert len({draw(14, 14, number).context.tobytes() for number in range(50)}) == 50


def test_all_four_targets_are_drawn_where_there_is_room() -> None:
    assert {len(draw(14, 14, number).targets) for number in range(300)} == {4}
    assert len(draw(14, 14, config=MaskConfig(targets=7)).targets) == 7


@pytest.mark.parametrize(("rows", "cols"), [(400, 400), (200, 800), (900, 150)])
def test_area_and_aspect_are_those_asked_for_relative_to_the_view(rows: int, cols: int) -> None:
    blocks = [extent(block, cols) for number in range(150) for block in draw(rows, cols, number).targets]
    heights, widths = np.array(blocks, dtype=np.float64)[:, 2:].T
    area = heights * widths / (rows * cols)
    aspect = heights / widths / (rows / cols)
    # Half a patch of rounding on the height, on the width, and on the height again, of the smallest block.
    slack = 1 / heights.min() + 0.5 / widths.min()
    assert slack < 0.02, "otherwise this grid is too small to tell"
    assert area.min() > 0.15 * (1 - slack)
    assert area.max() < 0.2 * (1 + slack)
    assert aspect.min() > 0.75 * (1 - slack)
    assert aspect.max() < 1.5 * (1 + slack)
    # 600 uniform draws come within 3% of both ends, but for a chance of 4 * 0.97 ** 600 = 5e-8.
    assert area.min() < 0.15 + 0.03 * 0.05 + 0.2 * slack
    assert area.max() > 0.2 - 0.03 * 0.05 - 0.2 * slack
    assert aspect.min() < 0.75 + 0.03 * 0.75 + 1.5 * slack
    assert aspect.max() > 1.5 - 0.03 * 0.75 - 1.5 * slack


@pytest.mark.parametrize(("rows", "cols"), [(300, 300), (100, 900)])
def test_the_context_block_has_the_aspect_and_area_asked_for(rows: int, cols: int) -> None:
    config = MaskConfig(targets=1, min_target_area=1e-6, max_target_area=1e-6)  # a single token
    for number in range(50):
        drawn = draw(rows, cols, number, config)
        assert [len(block) for block in drawn.targets] == [1]
        rows_seen, cols_seen = np.divmod(drawn.context, cols)
        height, width = int(np.ptp(rows_seen)) + 1, int(np.ptp(cols_seen)) + 1
        assert height * width - len(drawn.context) in (0, 1), "a whole block, less the target where it lies inside"
        # Half a patch of rounding: once in the area, and in the aspect for each of height, width, height again.
        assert 0.85 * (1 - 0.5 / min(height, width)) < height * width / (rows * cols) <= 1.0
        assert height / width == pytest.approx(rows / cols, rel=1.5 / height + 1 / width)


@settings(deadline=None, max_examples=300)
@given(st.integers(1, 60), st.integers(1, 60), st.floats(0.01, 1.0), st.floats(0.05, 20.0))
def test_a_block_fits_and_has_its_area_to_half_a_line(rows: int, cols: int, area: float, aspect: float) -> None:
    height, width = block_shape(rows, cols, area, aspect)
    assert 1 <= height <= rows
    assert 1 <= width <= cols
    wanted = area * rows * cols
    if wanted < 0.5:
        assert (height, width) == (1, 1)
    else:
        # The last axis to be computed is rounded to a whole line of the other.
        assert abs(height * width - wanted) <= max(height, width) / 2 + 1e-9


@pytest.mark.parametrize(
    ("grid", "area", "aspect", "shape"),
    [
        ((10, 10), 0.16, 1.0, (4, 4)),
        ((10, 10), 0.18, 2.0, (6, 3)),
        ((10, 10), 0.18, 0.5, (3, 6)),
        ((10, 40), 0.16, 1.0, (4, 16)),
        ((40, 10), 0.16, 1.0, (16, 4)),
        ((10, 10), 1.0, 1.0, (10, 10)),
        ((10, 10), 0.5, 8.0, (10, 5)),  # 20 rows do not fit: as many columns as the area needs
        ((10, 10), 0.5, 0.125, (5, 10)),  # nor do 20 columns
        ((1, 12), 0.17, 1.0, (1, 2)),
        ((12, 1), 0.17, 1.0, (2, 1)),
    ],
)
def test_block_shapes_by_hand(grid: tuple[int, int], area: float, aspect: float, shape: tuple[int, int]) -> None:
    assert block_shape(*grid, area, aspect) == shape


def test_every_place_of_a_block_is_equally_likely() -> None:
    rng = np.random.default_rng(0)
    draws = 16_000
    places = Counter(extent(np.flatnonzero(draw_block(5, 5, 0.16, 1.0, rng)), 5) for _ in range(draws))
    assert set(places) == {(top, left, 2, 2) for top in range(4) for left in range(4)}
    # Five standard deviations of a binomial count; all sixteen stay inside but for a chance of 1e-5.
    bound = 5 * math.sqrt(draws / 16 * (15 / 16))
    assert all(abs(count - draws / 16) < bound for count in places.values())


@pytest.mark.parametrize(("rows", "cols"), [(14, 14), (7, 24), (24, 7), (1, 12), (12, 1), (2, 2), (1, 4), (3, 5)])
def test_every_token_can_be_a_target_and_can_be_context(rows: int, cols: int) -> None:
    # A context block of less than the view, so that the last row is not simply always in it.
    config = MaskConfig(max_context_area=0.85)
    draws = 600
    target, context = np.zeros(rows * cols), np.zeros(rows * cols)
    for number in range(draws):
        drawn = draw(rows, cols, number, config)
        target[np.unique(np.concatenate(drawn.targets))] += 1
        context[drawn.context] += 1
    # The rarest is a corner as a target: 4 blocks, each at 1 of some 100 places. Never in 600 draws: 0.96 ** 600.
    assert (target > 0).all()
    assert (context > 0).all()
    # First and last are alike: they differ by less than five standard deviations of each, however they are correlated.
    for counts in (target, context):
        shares = counts.reshape(rows, cols) / draws
        deviations = np.sqrt(shares * (1 - shares) / draws)
        for turned in (np.flipud, np.fliplr):
            assert (np.abs(shares - turned(shares)) <= 5 * (deviations + turned(deviations))).all()


def test_scale_and_aspect_are_drawn_independently() -> None:
    blocks = [extent(block, 400) for number in range(500) for block in draw(400, 400, number).targets]
    heights, widths = np.array(blocks, dtype=np.float64)[:, 2:].T
    correlation = np.corrcoef(heights * widths, np.log(heights / widths))[0, 1]
    # Four standard errors of the correlation of 2,000 independent pairs; rounding adds nothing at 400 patches.
    assert abs(correlation) < 4 / math.sqrt(2000)


@pytest.mark.parametrize(("rows", "cols", "tokens"), [(1, 12, 2), (12, 1, 2), (2, 2, 1), (1, 4, 1), (4, 1, 1)])
def test_thin_grids_get_targets_of_the_area_asked_for(rows: int, cols: int, tokens: int) -> None:
    # 0.15 to 0.2 of 12 tokens is 1.8 to 2.4, and of 4 is 0.6 to 0.8: one rounding, not 41% of the view.
    for number in range(100):
        drawn = draw(rows, cols, number)
        check(drawn, rows, cols, targets=4)
        assert {len(block) for block in drawn.targets} == {tokens}


@pytest.mark.parametrize(("rows", "cols"), THIN)
def test_thin_grids_keep_several_targets(rows: int, cols: int) -> None:
    counts = Counter(len(draw(rows, cols, number).targets) for number in range(200))
    assert counts.most_common(1)[0][0] == 4


@pytest.mark.parametrize(("rows", "cols"), [(1, 1), (1, 3), (3, 1), (1, 2)])
def test_a_view_of_fewer_than_four_tokens_is_refused(rows: int, cols: int) -> None:
    message = f"^A view of {rows} x {cols} tokens is too small to mask\\. It needs at least 4\\.$"
    with pytest.raises(ValueError, match=message):
        draw(rows, cols)


def test_one_target_that_covers_the_view_keeps_its_first_half() -> None:
    for targets in (1, 4):
        drawn = draw(3, 5, config=MaskConfig(targets=targets, min_target_area=1.0, max_target_area=1.0))
        assert [block.tolist() for block in drawn.targets] == [list(range(7))]
        assert drawn.context.tolist() == list(range(7, 15))


TOP = [[1, 1], [0, 0]]
BOTTOM = [[0, 0], [1, 1]]
LEFT = [[1, 0], [1, 0]]
ALL = [[1, 1], [1, 1]]


@pytest.mark.parametrize(
    ("blocks", "context", "kept", "left"),
    [
        ([TOP, LEFT], ALL, [TOP, LEFT], [3]),
        ([TOP, LEFT], LEFT, [TOP, LEFT], [3]),  # they cover the context block: the context is what they leave
        ([TOP, LEFT, BOTTOM], ALL, [TOP, LEFT], [3]),  # they cover the view: the last one is given up, no more
        ([TOP, BOTTOM, LEFT], ALL, [TOP], [2, 3]),  # and so on until something is left
        ([ALL, TOP, LEFT], ALL, [TOP], [2, 3]),  # half of the only one that stays
    ],
)
def test_what_gives_way_when_nothing_is_left_for_the_context(
    monkeypatch: pytest.MonkeyPatch,
    blocks: list[list[list[int]]],
    context: list[list[int]],
    kept: list[list[list[int]]],
    left: list[int],
) -> None:
    drawn = iter([*blocks, context])
    monkeypatch.setattr(masks, "draw_block", lambda *_: np.array(next(drawn), dtype=np.bool_))
    result = draw_masks(2, 2, MaskConfig(targets=len(blocks)), np.random.default_rng(0))
    assert [block.tolist() for block in result.targets] == [np.flatnonzero(block).tolist() for block in kept]
    assert result.context.tolist() == left


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"targets": 0}, "masks.targets must be at least 1, not 0."),
        (
            {"min_target_area": 0.3},
            "masks.min_target_area (0.3) and masks.max_target_area (0.2) must be in ascending order, above 0 "
            "and at most 1.",
        ),
        (
            {"max_target_area": 1.5},
            "masks.min_target_area (0.15) and masks.max_target_area (1.5) must be in ascending order, above 0 "
            "and at most 1.",
        ),
        (
            {"min_target_aspect": 0.0},
            "masks.min_target_aspect (0) and masks.max_target_aspect (1.5) must be in ascending order, above 0 "
            "and finite.",
        ),
        (
            {"max_target_aspect": math.inf},
            "masks.min_target_aspect (0.75) and masks.max_target_aspect (inf) must be in ascending order, above 0 "
            "and finite.",
        ),
        (
            {"min_context_area": -0.5},
            "masks.min_context_area (-0.5) and masks.max_context_area (1) must be in ascending order, above 0 "
            "and at most 1.",
        ),
        (
            {"max_context_area": 1.01},
            "masks.min_context_area (0.85) and masks.max_context_area (1.01) must be in ascending order, above 0 "
            "and at most 1.",
        ),
        (
            {"max_context_area": math.nan},
            "masks.min_context_area (0.85) and masks.max_context_area (nan) must be in ascending order, above 0 "
            "and at most 1.",
        ),
    ],
)
def test_settings_that_cannot_be_met_are_refused(settings: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=r".") as error:
        MaskConfig(**settings)  # type: ignore[arg-type]
    assert str(error.value) == message


def test_settings_at_their_bounds_are_taken() -> None:
    assert MaskConfig(1, 1.0, 1.0, 9.0, 9.0, 1.0, 1.0).max_target_aspect == 9.0
