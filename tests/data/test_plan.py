"""The plan: whole grids within limits, balanced packs, and one endless sequence however many ranks share it."""

import dataclasses
import itertools
import math
from collections import Counter
from collections.abc import Iterable
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from ijepa_enhanced.data.catalog import Catalog
from ijepa_enhanced.data.config import DataConfig
from ijepa_enhanced.data.geometry import fit_grids
from ijepa_enhanced.data.packing import balance, cut_into_packs
from ijepa_enhanced.data.plan import Cursor, EpochPlan, Pack, Plan, inference_packs
from ijepa_enhanced.errors import PlanError


def make_index(sizes: Iterable[tuple[int, int]], name: str = "an index") -> Catalog:
    heights, widths = np.array(list(sizes), dtype=np.int32).reshape(-1, 2).T
    rows = np.arange(len(heights), dtype=np.int64)
    return Catalog(heights, widths, rows, None, None, name)


def photographs(count: int, seed: int = 0) -> list[tuple[int, int]]:
    """Sizes as people have them: mostly one common size, the rest spread over two octaves, a quarter upright."""
    rng = np.random.default_rng(seed)
    longer = np.where(rng.random(count) < 0.5, 500, np.exp(rng.uniform(np.log(200), np.log(800), count)))
    shorter = longer * np.where(rng.random(count) < 0.5, 0.75, rng.uniform(0.4, 1.0, count))
    upright = rng.random(count) < 0.25
    sizes = np.stack([np.where(upright, longer, shorter), np.where(upright, shorter, longer)], axis=1)
    return [(height, width) for height, width in sizes.round().astype(int).tolist()]


def one(height: float, width: float, side: float | None, patch_size: int, limit: int) -> tuple[int, int]:
    rows, cols = fit_grids(np.array([height]), np.array([width]), side, patch_size, limit)[0].tolist()
    return rows, cols


SMALL = DataConfig(tokens_per_pack=512, packs_per_step=6, max_view_tokens=240)
SIZES = photographs(150)


def make_plan(config: DataConfig = SMALL, sizes: Iterable[tuple[int, int]] = SIZES, seed: int = 0) -> Plan:
    return Plan(make_index(sizes), config, 16, seed)


def content(pack: Pack) -> tuple[Any, ...]:
    return pack.cursor, *(values.tobytes() for values in (pack.images, pack.views, pack.boxes, pack.grids))


def first(plan: Plan, count: int, cursor: Cursor = Cursor(0, 0), rank: int = 0, world: int = 1) -> list[Any]:  # noqa: B008
    return [content(pack) for pack in itertools.islice(plan.packs(cursor, rank, world), count)]


# --- grids


@pytest.mark.parametrize(
    ("height", "width", "side", "patch_size", "limit", "grid"),
    [
        (500, 500, 224, 16, 10**6, (14, 14)),
        (375, 500, 224, 16, 10**6, (12, 16)),
        (500, 375, 224, 16, 10**6, (16, 12)),
        (100, 400, 224, 14, 10**6, (8, 32)),
        (1, 4000, 224, 16, 10**6, (1, 196)),  # not 885 tokens
        (4000, 1, 224, 16, 10**6, (196, 1)),
        (480, 640, None, 16, 10**6, (30, 40)),
        (480, 640, None, 16, 300, (15, 20)),  # scaled down by 2 on each axis
        (8, 8, None, 16, 10**6, (1, 1)),  # never less than a patch
        (1, 1, None, 16, 10**6, (1, 1)),
        (1, 4000, None, 16, 10**6, (1, 16)),
        (224, 224, 224, 16, 100, (10, 10)),
        (224, 232, 224, 16, 195, (13, 14)),  # not the 14 x 14 that both axes round to
        (3, 4000, 224, 16, 60, (1, 60)),
    ],
)
def test_grids_by_hand(
    height: int, width: int, side: float | None, patch_size: int, limit: int, grid: tuple[int, int]
) -> None:
    assert one(height, width, side, patch_size, limit) == grid


@settings(deadline=None, max_examples=500)
@given(
    st.integers(1, 5000),
    st.integers(1, 5000),
    st.none() | st.floats(16, 1000),
    st.sampled_from([8, 14, 16]),
    st.integers(4, 4096),
)
@example(1, 4000, 224.0, 16, 196)
@example(7, 4990, 224.0, 16, 196)  # the short axis is just above half a patch
def test_a_grid_keeps_its_limit_and_its_shape_to_half_a_patch(
    height: int, width: int, side: float | None, patch_size: int, limit: int
) -> None:
    grid = one(height, width, side, patch_size, limit)
    assert min(grid) >= 1
    assert math.prod(grid) <= limit
    tokens = min((height * width if side is None else side**2) / patch_size**2, limit)
    exact = (math.sqrt(tokens * height / width), math.sqrt(tokens * width / height))
    half = 0.5 + 1e-9
    shorter, longer = (0, 1) if grid[0] < grid[1] else (1, 0)
    if min(exact) < half:
        # One axis is a single patch; the other has the area, or is rounded too where the short axis just made it.
        assert grid[shorter] == 1
        on_the_line = grid[longer] in {max(1, round(tokens + error)) for error in (-1e-9, 0, 1e-9)}
        assert on_the_line or (min(exact) > 0.5 - 1e-9)
    elif all(abs(n - x) <= half for n, x in zip(grid, exact, strict=True)):
        pass  # both axes are the nearest
    else:
        # Both rounded up beyond the limit: the longer axis is the longest that fits beside the other.
        assert round(exact[0]) * round(exact[1]) > limit
        assert any(abs(grid[a] - exact[a]) <= half and grid[1 - a] == limit // grid[a] for a in (0, 1))


def test_grids_of_many_views_are_those_of_each() -> None:
    heights, widths = np.array([[375, 500], [1, 100]]), np.array([[500, 500], [4000, 400]])
    sides = np.array([[224.0, 112.0], [224.0, 300.0]])
    grids = fit_grids(heights, widths, sides, 16, 10**6)
    assert grids.dtype == np.int64
    for place in np.ndindex(2, 2):
        assert tuple(grids[place].tolist()) == one(heights[place], widths[place], sides[place], 16, 10**6)


# --- runs of views


@pytest.mark.parametrize(
    ("tokens", "runs"),
    [
        ([], []),
        ([4], [(0, 1)]),
        ([4, 6], [(0, 2)]),
        ([4, 6, 1], [(0, 2), (2, 3)]),
        ([4, 7, 3, 1], [(0, 1), (1, 3), (3, 4)]),
        ([12, 3, 30], [(0, 1), (1, 2), (2, 3)]),  # what is longer than the budget runs alone
    ],
)
def test_runs_hold_at_most_ten_tokens(tokens: list[int], runs: list[tuple[int, int]]) -> None:
    assert cut_into_packs(np.array(tokens, dtype=np.int64), 10) == runs


def test_inference_shows_every_image_once_whole_and_in_order() -> None:
    index = make_index(SIZES)
    packs = inference_packs(index, 160, 16, 512, 512)
    assert np.concatenate([pack.images for pack in packs]).tolist() == list(range(len(SIZES)))
    assert [pack.cursor for pack in packs] == [(0, number) for number in range(len(packs))]
    assert len(packs) > 10
    for pack in packs:
        assert pack.grids.prod(axis=1).sum() <= 512
        assert pack.views.tolist() == [0] * len(pack.images)
        sizes = [SIZES[image] for image in pack.images]
        assert pack.boxes.tolist() == [[0, 0, height, width] for height, width in sizes]
        assert [tuple(grid) for grid in pack.grids.tolist()] == [one(*size, 160, 16, 512) for size in sizes]


def test_a_view_longer_than_the_budget_is_a_pack_of_its_own() -> None:
    packs = inference_packs(make_index([(64, 64), (128, 96), (64, 64), (64, 64)]), None, 16, 48, 40)
    assert [pack.grids.tolist() for pack in packs] == [[[4, 4]], [[8, 6]], [[4, 4], [4, 4]]]


# --- balance


def sums(tokens: np.ndarray[Any, Any], packs: np.ndarray[Any, Any]) -> list[int]:
    return np.bincount(packs, weights=tokens).astype(int).tolist()


@settings(deadline=None, max_examples=200)
@given(st.lists(st.integers(1, 64), min_size=1, max_size=200), st.integers(64, 300), st.integers(0, 1000))
def test_no_pack_is_above_its_budget_and_none_is_empty(counts: list[int], budget: int, seed: int) -> None:
    tokens = np.array(counts)
    packs = balance(tokens, budget, np.random.default_rng(seed))
    assert packs.shape == tokens.shape
    used = sums(tokens, packs)
    assert max(used) <= budget
    assert min(used) > 0
    assert math.ceil(sum(counts) / budget) <= len(used) <= len(counts)


@pytest.mark.parametrize("seed", range(5))
def test_packs_of_a_usual_set_are_as_few_as_can_be_and_even(seed: int) -> None:
    # 20,000 photographs at the default settings: some 130 packs of 16,384 tokens.
    epoch = make_plan(DataConfig(), photographs(20_000, seed), seed).epoch(0)
    total = int(epoch.grids.prod(axis=2).sum())
    assert len(epoch) == math.ceil(total / 16_384)
    assert epoch.pack_tokens.sum() == total
    assert epoch.pack_tokens.max() <= 16_384
    assert epoch.budget_use >= 0.995
    assert epoch.budget_use == epoch.pack_tokens.mean() / epoch.pack_tokens.max()


def test_dealing_is_random_and_the_same_for_the_same_generator() -> None:
    tokens = np.random.default_rng(0).integers(1, 40, 500)
    first, again, other = (balance(tokens, 256, np.random.default_rng(seed)) for seed in (1, 1, 2))
    assert first.tolist() == again.tolist()
    # Two deals into some 40 packs agree by chance on 1 of 40 images.
    assert (first == other).mean() < 0.2


def test_large_images_get_packs_of_their_own() -> None:
    # No two of them fit one pack, so that ceil(total / budget) packs cannot hold them.
    packs = balance(np.full(9, 6), 10, np.random.default_rng(0))
    assert sorted(packs.tolist()) == list(range(9))


def test_an_image_above_the_budget_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^An image of 11 tokens does not fit into a pack of 10 tokens\.$"):
        balance(np.array([3, 11, 4]), 10, np.random.default_rng(0))


# --- one epoch


@pytest.mark.parametrize("config", [SMALL, DataConfig(tokens_per_pack=512, masked_views=3, min_crop=0.1, max_crop=0.4)])
def test_an_epoch_shows_every_image_once_and_all_its_views_side_by_side(config: DataConfig) -> None:
    epoch = make_plan(config).epoch(0)
    packs = [epoch[number] for number in range(len(epoch))]
    images = np.concatenate([pack.images for pack in packs])
    assert Counter(images.tolist()) == dict.fromkeys(range(len(SIZES)), config.masked_views)
    for number, pack in enumerate(packs):
        assert pack.cursor == (0, number)
        assert 0 < pack.grids.prod(axis=1).sum() == epoch.pack_tokens[number] <= 512
        assert pack.views.tolist() == list(range(config.masked_views)) * (len(pack.images) // config.masked_views)
        blocks = pack.images.reshape(-1, config.masked_views)
        assert (blocks == blocks[:, :1]).all()
        assert len(np.unique(blocks[:, 0])) == len(blocks)
    assert [len(epoch.offsets), epoch.offsets[0], epoch.offsets[-1]] == [len(packs) + 1, 0, len(SIZES)]


@pytest.mark.parametrize(
    "config",
    [
        DataConfig(tokens_per_pack=8192),
        DataConfig(tokens_per_pack=8192, masked_views=2, min_crop=0.01, max_crop=0.01),
        DataConfig(tokens_per_pack=8192, min_resolution=None, max_resolution=None, min_crop=1.0),
    ],
)
def test_crops_lie_inside_their_image_with_the_area_asked_for_and_its_aspect(config: DataConfig) -> None:
    sizes = np.array([*SIZES, (1, 4000), (4000, 1), (64, 64)])
    epoch = make_plan(config, sizes.tolist()).epoch(0)
    top, left, height, width = np.moveaxis(epoch.boxes.astype(np.float64), 2, 0)
    whole_height, whole_width = sizes[epoch.images].T[:, :, None]
    rounding = 2**-22  # two roundings to float32, of the place and of the extent
    assert min(top.min(), left.min()) >= 0
    assert (top + height <= whole_height * (1 + rounding)).all()
    assert (left + width <= whole_width * (1 + rounding)).all()
    assert min(height.min(), width.min()) >= 1, "a whole pixel at least"
    # Of one pixel nothing can be cut, so that these views have a larger part and another aspect.
    free = (height > 1) & (width > 1)
    assert free.sum() >= len(SIZES)
    parts = (height * width / (whole_height * whole_width))[free]
    assert parts.min() >= config.min_crop * (1 - 4 * rounding)
    assert parts.max() <= config.max_crop * (1 + 4 * rounding)
    np.testing.assert_allclose(
        (height / width)[free], (whole_height / whole_width + 0 * height)[free], rtol=2 * rounding
    )
    # Crops lie anywhere: with 150 images some within a tenth of the free room from each side (0.9 ** 150 = 1e-7).
    if config.max_crop > config.min_crop or config.max_crop < 1:
        room = (whole_height - height)[free]
        place = top[free][room > 1] / room[room > 1]
        assert place.min() < 0.1
        assert place.max() > 0.9


def test_local_views_are_small_crops_at_half_the_side_beside_their_images_others() -> None:
    config = DataConfig(
        tokens_per_pack=8192,
        masked_views=2,
        local_views=3,
        min_resolution=160,
        max_resolution=320,
        min_crop=0.4,
        max_view_tokens=400,
    )
    epoch = make_plan(config, [(1000, 1000)] * 200).epoch(0)
    sides, areas = np.sqrt(epoch.grids.prod(axis=2)) * 16, epoch.boxes[..., 2:].prod(axis=2) / 1000**2
    assert sides.shape == areas.shape == (200, 5)
    # A grid rounds to 16 px. 600 uniform draws come within 5% of both ends but for a chance of 4 * 0.95 ** 600 = 2e-13.
    assert 80 - 8 <= sides[:, 2:].min() < 80 + 0.05 * 80 + 8
    assert 160 + 8 >= sides[:, 2:].max() > 160 - 0.05 * 80 - 8
    assert sides[:, :2].min() >= 160 - 8
    assert 0.05 <= areas[:, 2:].min() * (1 + 1e-6) < 0.05 + 0.05 * 0.35
    assert 0.4 >= areas[:, 2:].max() * (1 - 1e-6) > 0.4 - 0.05 * 0.35
    assert areas[:, :2].min() * (1 + 1e-6) >= 0.4
    pack = epoch[0]
    assert pack.unmasked.tolist() == [False, False, True, True, True] * (len(pack.images) // 5)
    assert pack.grids.prod(axis=1).sum() == epoch.pack_tokens[0] <= 8192, "they take their room in the pack"
    masked, small = pack.select(~pack.unmasked), pack.select(pack.unmasked)
    assert (masked.views.max(), small.views.min()) == (1, 2)
    assert (masked.boxes == pack.boxes[~pack.unmasked]).all()


def test_global_views_are_cropped_and_sized_as_masked_ones_and_stand_between_them_and_local_ones() -> None:
    config = DataConfig(
        tokens_per_pack=8192,
        masked_views=1,
        global_views=1,
        local_views=1,
        min_resolution=160,
        max_resolution=320,
        min_crop=0.4,
        max_view_tokens=400,
    )
    epoch = make_plan(config, [(1000, 1000)] * 200).epoch(0)
    plain = dataclasses.replace(config, masked_views=2, global_views=0)
    other = make_plan(plain, [(1000, 1000)] * 200).epoch(0)
    # The same draws, so the same views; images are dealt alike too.
    assert (epoch.boxes == other.boxes).all()
    assert (epoch.grids == other.grids).all()
    assert epoch[0].unmasked.tolist() == [False, True, True] * (len(epoch[0].images) // 3)
    assert other[0].unmasked.tolist() == [False, False, True] * (len(other[0].images) // 3)


def test_a_view_that_is_not_masked_may_be_of_one_token() -> None:
    """2 x 2 patches can be masked; the crop of another view may be a single one."""
    config = DataConfig(
        tokens_per_pack=64, masked_views=1, global_views=1, min_resolution=None, max_resolution=None, min_crop=0.05
    )
    plan = make_plan(config, [(40, 40)] * 300)
    epoch = plan.epoch(0)
    masked, whole = epoch.grids.prod(axis=2).T
    assert masked.min() >= 4
    assert whole.min() < 4
    assert 0 < epoch.too_small < 300


def test_local_views_need_not_be_large_enough_to_mask_and_have_a_quarter_of_the_limit() -> None:
    config = DataConfig(
        tokens_per_pack=512, local_views=2, min_resolution=32, max_resolution=32, min_crop=1.0, max_view_tokens=20
    )
    epoch = make_plan(config, [(64, 64)] * 4).epoch(0)
    assert epoch.too_small == 0
    assert epoch.grids.prod(axis=2).tolist() == [[4, 1, 1]] * 4
    large = dataclasses.replace(config, min_resolution=320, max_resolution=320)
    epoch = make_plan(large, [(64, 64)] * 4).epoch(0)
    assert epoch.grids.prod(axis=2).tolist() == [[16, 4, 4]] * 4, "the largest squares within 20 and 5 tokens"
    assert epoch.limited == 12


def test_sides_and_crops_use_the_whole_of_their_ranges() -> None:
    config = DataConfig(min_resolution=160, max_resolution=640, min_crop=0.2, max_crop=0.8)
    epoch = make_plan(config, [(1000, 1000)] * 400).epoch(0)
    sides = np.sqrt(epoch.grids.prod(axis=2)) * 16
    crops = epoch.boxes[..., 2:].prod(axis=2) / 1000**2
    # 400 uniform draws come within 5% of both ends but for a chance of 4 * 0.95 ** 400 = 5e-9; a grid rounds to 16 px.
    assert 160 - 8 <= sides.min() < 160 + 0.05 * 480 + 8
    assert 640 + 8 >= sides.max() > 640 - 0.05 * 480 - 8
    assert crops.min() < 0.2 + 0.05 * 0.6
    assert crops.max() > 0.8 - 0.05 * 0.6
    # Uniform: the mean of 400 within five standard errors, 5 / sqrt(12 * 400), of the middle; half a patch is no bias.
    assert abs(sides.mean() - 400) < 480 * 5 / math.sqrt(12 * 400)
    assert abs(crops.mean() - 0.5) < 0.6 * 5 / math.sqrt(12 * 400)
    assert abs(np.corrcoef(sides[:, 0], crops[:, 0])[0, 1]) < 5 / math.sqrt(400), "independent: five standard errors"


def test_native_views_have_the_size_of_their_crop_and_are_never_enlarged() -> None:
    config = DataConfig(tokens_per_pack=8 * 4096, min_resolution=None, max_resolution=None, min_crop=1.0)
    epoch = make_plan(config, [(160, 320), (320, 160), (48, 48)]).epoch(0)
    order = np.argsort(epoch.images)
    assert epoch.grids[order, 0].tolist() == [[10, 20], [20, 10], [3, 3]]
    assert epoch.limited == 0


def every(epoch: EpochPlan) -> tuple[bytes, ...]:
    return tuple(values.tobytes() for values in (epoch.images, epoch.offsets, epoch.boxes, epoch.grids))


def test_an_epoch_is_a_function_of_seed_and_number() -> None:
    plan = make_plan()
    second, first = every(plan.epoch(1)), every(plan.epoch(0))
    assert first == every(make_plan().epoch(0))
    assert second == every(make_plan().epoch(1))
    other = every(make_plan(seed=1).epoch(0))
    for one_of_three, another in itertools.combinations((first, second, other), 2):
        for number in (0, 2, 3):  # order, boxes and grids are all drawn anew
            assert one_of_three[number] != another[number]


def test_images_whose_views_are_too_small_are_left_out_and_counted() -> None:
    config = DataConfig(tokens_per_pack=512, min_resolution=None, max_resolution=None, min_crop=1.0)
    # Patches of 16 px: 3 tokens, 4 tokens, none, 2 x 2, 1 x 3.
    epoch = make_plan(config, [(16, 48), (16, 64), (5, 5), (32, 32), (8, 50)]).epoch(0)
    assert sorted(epoch.images.tolist()) == [1, 3]
    assert (epoch.too_small, epoch.limited) == (3, 0)


def test_an_image_is_left_out_when_any_of_its_views_is_too_small() -> None:
    config = DataConfig(tokens_per_pack=512, masked_views=2, min_resolution=None, max_resolution=None, min_crop=0.5)
    epoch = make_plan(config, [(40, 40)] * 200).epoch(0)
    # 40 px are 2 x 2 patches from a crop of 24 px on, sqrt(0.5) = 28 px: all have enough.
    assert epoch.too_small == 0
    config = DataConfig(tokens_per_pack=512, masked_views=2, min_resolution=None, max_resolution=None, min_crop=0.1)
    epoch = make_plan(config, [(40, 40)] * 400).epoch(0)
    # Below 0.36 of the area it is 1 x 1: 0.26 / 0.9 of the views, so 1 - (1 - 0.289) ** 2 = 49% of the images.
    bound = 5 * math.sqrt(0.25 / 400)
    assert abs(epoch.too_small / 400 - 0.494) < bound
    assert len(epoch.images) == 400 - epoch.too_small
    assert (epoch.grids.prod(axis=2) >= 4).all()


def test_views_that_are_scaled_down_to_the_limit_are_counted() -> None:
    config = DataConfig(tokens_per_pack=800, min_resolution=None, max_resolution=None, min_crop=1.0)
    assert config.view_limit == 100
    epoch = make_plan(config, [(160, 160), (161, 160), (320, 320), (64, 64), (5, 5)]).epoch(0)
    assert (epoch.limited, epoch.too_small) == (2, 1)
    assert epoch.grids.prod(axis=2).max() == 100


def test_fill_and_its_ceiling_by_hand() -> None:
    boxes = np.zeros((3, 1, 4), dtype=np.float32)
    grids = np.array([[[3, 3]], [[2, 3]], [[2, 4]]])
    epoch = EpochPlan(0, np.arange(3), np.array([0, 2, 3]), boxes, grids, masked=1, budget=20, too_small=0, limited=0)
    assert epoch.pack_tokens.tolist() == [15, 8]
    assert epoch.budget_use == 11.5 / 15
    assert epoch.fill == 11.5 / 20
    assert epoch.fill_ceiling == 23 / 40


# --- what cannot be planned


@pytest.mark.parametrize(
    ("sizes", "have", "more"),
    [
        ([], "there are only 0", ""),
        ([(500, 500)], "there is only 1", ""),
        (
            [(16, 16), (500, 500), (16, 47)],
            "only 1 of 3 images is large enough",
            " or raise data.min_resolution",
        ),
    ],
)
def test_fewer_than_two_images_that_are_large_enough_is_no_plan(
    sizes: list[tuple[int, int]], have: str, more: str
) -> None:
    config = DataConfig(tokens_per_pack=512, min_resolution=None, max_resolution=None, min_crop=1.0)
    with pytest.raises(PlanError) as error:
        make_plan(config, sizes).epoch(0)
    assert str(error.value) == (
        f"Training needs at least 2 images whose views have 4 or more patches of 16 x 16 px, but {have}. Add "
        f"images{more}."
    )
    assert isinstance(error.value, ValueError)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"tokens_per_pack": 0}, "data.tokens_per_pack must be at least 1, not 0."),
        ({"packs_per_step": 0}, "data.packs_per_step must be at least 1, not 0."),
        ({"masked_views": -1}, "data.masked_views must be at least 1, not -1."),
        ({"workers": -1}, "data.workers must be at least 0, not -1."),
        (
            {"min_resolution": None},
            "data.min_resolution and data.max_resolution must both be numbers, or both null for native size.",
        ),
        (
            {"max_resolution": None},
            "data.min_resolution and data.max_resolution must both be numbers, or both null for native size.",
        ),
        (
            {"min_resolution": 300},
            "data.min_resolution (300) must be at least 1 and at most data.max_resolution (224).",
        ),
        (
            {"min_resolution": 0},
            "data.min_resolution (0) must be at least 1 and at most data.max_resolution (224).",
        ),
        (
            {"min_crop": 0.0},
            "data.min_crop (0.0) and data.max_crop (1.0) must be in ascending order, above 0 and at most 1.",
        ),
        (
            {"max_crop": 1.5},
            "data.min_crop (0.3) and data.max_crop (1.5) must be in ascending order, above 0 and at most 1.",
        ),
        (
            {"max_crop": 0.2},
            "data.min_crop (0.3) and data.max_crop (0.2) must be in ascending order, above 0 and at most 1.",
        ),
        ({"max_unreadable": -0.1}, "data.max_unreadable must be between 0 and 1, not -0.1."),
        ({"max_unreadable": 1.1}, "data.max_unreadable must be between 0 and 1, not 1.1."),
        (
            {"tokens_per_pack": 1000, "masked_views": 4, "max_view_tokens": 300},
            "data.tokens_per_pack (1000) is too small for the views of one image: 4 views of up to 300 tokens. "
            "Raise it to at least 1200, or lower data.max_view_tokens.",
        ),
        (
            {"masked_views": 9},
            "data.tokens_per_pack (16384) is too small for the views of one image: 9 views of up to 2048 tokens. "
            "Set data.max_view_tokens to less than 2048, or use fewer views.",
        ),
        ({"global_views": -1}, "data.global_views must be at least 0, not -1."),
        ({"local_views": -1}, "data.local_views must be at least 0, not -1."),
        (
            {"tokens_per_pack": 1000, "masked_views": 2, "local_views": 6, "max_view_tokens": 300},
            "data.tokens_per_pack (1000) is too small for the views of one image: 2 views of up to 300 tokens and 6 "
            "local views of up to 75. Raise it to at least 1050, or lower data.max_view_tokens.",
        ),
        (
            {"tokens_per_pack": 31},
            "data.tokens_per_pack (31) is too small: without data.max_view_tokens, a view has at most "
            "data.tokens_per_pack / 8 = 3 tokens, but masking needs at least 4. Set it to at least 32.",
        ),
        (
            {"max_view_tokens": 3},
            "data.max_view_tokens must be null or at least 4, not 3: masking needs 4 tokens.",
        ),
    ],
)
def test_settings_that_cannot_be_met_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=r".") as error:
        DataConfig(**settings)
    assert str(error.value) == message


def test_settings_at_their_bounds_are_taken() -> None:
    config = DataConfig(
        tokens_per_pack=32,
        masked_views=8,
        min_resolution=1,
        max_resolution=1,
        min_crop=1.0,
        max_crop=1.0,
        max_unreadable=0.0,
        workers=0,
    )
    assert config.view_limit == 4
    assert DataConfig(tokens_per_pack=1000, masked_views=4, max_view_tokens=250).view_limit == 250


# --- the hash


CHANGES: dict[str, dict[str, Any]] = {
    "tokens_per_pack": {"tokens_per_pack": 520},
    "packs_per_step": {"packs_per_step": 3},
    "masked_views": {"masked_views": 2},
    "global_views": {"global_views": 1},
    "local_views": {"local_views": 2},
    "min_resolution": {"min_resolution": 100},
    "max_resolution": {"max_resolution": 230},
    "min_crop": {"min_crop": 0.4},
    "max_crop": {"max_crop": 0.9},
    "max_view_tokens": {"max_view_tokens": 60},
}
FREE: dict[str, dict[str, Any]] = {
    "source": {"source": "/elsewhere"},
    "channels": {"channels": 6},
    "max_unreadable": {"max_unreadable": 0.5},
    "workers": {"workers": 7},
    "cache": {"cache": "memory"},
}


@pytest.mark.parametrize("name", CHANGES)
def test_the_hash_changes_with_every_setting_that_changes_the_plan(name: str) -> None:
    changed = make_plan(dataclasses.replace(SMALL, **CHANGES[name]))
    assert changed.hash != make_plan().hash
    if name != "packs_per_step":  # which only says where a step ends
        assert every(changed.epoch(0)) != every(make_plan().epoch(0))


@pytest.mark.parametrize("name", FREE)
def test_the_hash_does_not_know_where_the_images_lie_or_who_reads_them(name: str) -> None:
    changed = make_plan(dataclasses.replace(SMALL, **FREE[name]))
    assert changed.hash == make_plan().hash
    assert every(changed.epoch(0)) == every(make_plan().epoch(0))


def test_the_hash_does_not_know_whether_a_number_was_written_with_a_point() -> None:
    hashes = {make_plan(dataclasses.replace(SMALL, max_crop=one)).hash for one in (1, 1.0)}
    assert len(hashes) == 1


def test_every_setting_is_known_to_change_the_plan_or_not() -> None:
    assert {field.name for field in dataclasses.fields(DataConfig)} == {*CHANGES, *FREE}


def test_the_hash_knows_the_seed_the_patch_size_and_the_images() -> None:
    index = make_index(SIZES)
    hashes = {
        Plan(index, SMALL, 16, 0).hash,
        Plan(index, SMALL, 16, 1).hash,
        Plan(index, SMALL, 14, 0).hash,
        Plan(make_index(SIZES, "another"), SMALL, 16, 0).hash,
    }
    assert len(hashes) == 4
    assert {len(digest) for digest in hashes} == {64}
    assert Plan(make_index(SIZES), SMALL, 16, 0).hash in hashes


# --- the endless sequence


def test_packs_go_on_from_epoch_to_epoch_without_end() -> None:
    plan = make_plan()
    counts = [len(plan.epoch(epoch)) for epoch in range(3)]
    assert all(count % 6 for count in counts[:2]), "or no step straddles two epochs"
    cursors = [pack[0] for pack in first(plan, sum(counts) + 1)]
    assert cursors == [*((e, number) for e in range(3) for number in range(counts[e])), (3, 0)]
    assert first(plan, counts[0]) == [content(plan.epoch(0)[number]) for number in range(counts[0])]


@pytest.mark.parametrize("world", [1, 2, 3, 6])
@pytest.mark.parametrize("steps", [0, 4])
def test_ranks_share_the_packs_of_every_step_in_order(world: int, steps: int) -> None:
    # Ranks that take turns give the sequence of one process, over three epochs or more and from any step on.
    plan = make_plan()
    count = 6 * ((len(plan.epoch(0)) + len(plan.epoch(1)) + 12) // 6)
    alone = first(plan, 6 * steps + count)
    cursor = Cursor(*alone[6 * steps][0])
    ranks = [first(plan, count // world, cursor, rank, world) for rank in range(world)]
    assert [pack for turn in zip(*ranks, strict=True) for pack in turn] == alone[6 * steps :]
    assert len({pack[0][0] for pack in alone[6 * steps :]}) >= 3
    # So each rank has the same number of packs of each step.
    for step in range(count // 6):
        own = {pack[0] for pack in alone[6 * (steps + step) : 6 * (steps + step + 1)]}
        for packs in ranks:
            assert {pack[0] for pack in packs[step * 6 // world : (step + 1) * 6 // world]} <= own


@settings(deadline=None, max_examples=15)
@given(st.integers(0, 25), st.sampled_from([(0, 1), (0, 2), (1, 2), (2, 3)]))
def test_a_resumed_sequence_goes_on_where_it_stopped(steps: int, place: tuple[int, int]) -> None:
    rank, world = place
    plan = make_plan()
    alone = first(plan, 6 * steps + 1)
    cursor = Cursor(*alone[6 * steps][0])
    each = 6 // world
    whole = first(plan, each * (steps + 8), rank=rank, world=world)
    # Another process makes the plan anew.
    assert first(make_plan(), each * 8, cursor, rank, world) == whole[each * steps :]


def test_an_epoch_in_blocks_shows_every_image_once_and_goes_on_from_any_pack(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ijepa_enhanced.data.plan.BLOCK", 60)
    plan = make_plan()
    assert plan.blocks == 3
    blocks = [plan.block(0, number) for number in range(3)]
    epoch = plan.epoch(0)
    assert sorted(epoch.images.tolist()) == list(range(150))
    # A random part of the images in each block, another one in each epoch.
    assert len({position // 50 for position in blocks[0].images.tolist()}) == 3
    assert set(plan.block(1, 0).images.tolist()) != set(blocks[0].images.tolist())
    # Within the differences of blocks of 50 images.
    assert plan.outline.packs == pytest.approx(len(epoch), rel=0.15)
    assert plan.outline.tokens == pytest.approx(epoch.grids.prod(axis=2).sum(), rel=0.15)
    alone = first(plan, 2 * len(epoch))
    assert [pack[0] for pack in alone[: len(epoch)]] == [(0, number) for number in range(len(epoch))]
    assert alone[: len(epoch)] == [content(epoch[number]) for number in range(len(epoch))]
    for done in (0, 1, len(blocks[0]), len(blocks[0]) + 1, len(epoch) - 1):
        assert first(make_plan(), 8, Cursor(0, done)) == alone[done : done + 8]


@pytest.mark.parametrize("world", [4, 5, 12])
def test_ranks_that_cannot_share_a_step_evenly_are_refused(world: int) -> None:
    with pytest.raises(ValueError, match=r".") as error:
        next(make_plan().packs(Cursor(0, 0), 0, world))
    assert str(error.value) == (
        f"data.packs_per_step (6) must be a multiple of the number of processes ({world}), for example {world}."
    )
