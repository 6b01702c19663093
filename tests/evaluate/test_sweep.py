"""Which settings are worth taking, and what a point of the sweep counts."""

import csv
import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ijepa_enhanced.data.catalog import Catalog, open_catalog
from ijepa_enhanced.data.sources.open import open_source
from ijepa_enhanced.encoder import Encoder
from ijepa_enhanced.evaluate import sweep
from ijepa_enhanced.evaluate.cost import peak_bytes
from ijepa_enhanced.evaluate.sweep import Point, advice, choose, frontier, network_costs, write_points
from ijepa_enhanced.models.config import EncoderConfig
from ijepa_enhanced.models.flops import encoder_flops
from ijepa_enhanced.models.preprocessing import Preprocessing
from ijepa_enhanced.packed import Packed

WIDTH = 0.01
"""Of the 95% interval of an accuracy: its standard error of about 0.003 is less than half a point."""


def point(
    linear: float, speed: float, resolution: int | None = 224, rate: float = 0.0, knn: float = 0.5, other: float = 0.4
) -> Point:
    """A setting whose linear accuracy is `linear` on the half that chooses and `other` on the half that is reported."""
    return Point(
        resolution,
        rate,
        knn,
        knn,
        linear,
        other,
        other - WIDTH / 2,
        other + WIDTH / 2,
        other,
        10.0,
        speed / 2,
        speed,
        1.0,
        100.0,
    )


@pytest.mark.parametrize("order", [[0, 1, 2, 3, 4], [4, 3, 2, 1, 0], [2, 0, 4, 1, 3]])
def test_the_frontier_by_hand(order: list[int]) -> None:
    """The third is slower and worse than the second, the fifth as fast as the first but worse."""
    accuracies, speeds = (0.70, 0.68, 0.67, 0.60, 0.69), (100, 200, 150, 400, 100)
    points = [point(0.5, speed, other=accuracy) for accuracy, speed in zip(accuracies, speeds, strict=True)]
    assert frontier([points[number] for number in order], "linear") == [points[3], points[1], points[0]]


@given(
    st.lists(st.tuples(st.integers(0, 4), st.integers(1, 5), st.integers(0, 4)), min_size=1, max_size=8, unique=True)
)
def test_the_frontier_is_what_nothing_beats(made: list[tuple[int, int, int]]) -> None:
    points = [point(0.5, speed, knn=knn / 4, other=linear / 4) for linear, speed, knn in made]
    for score in ("linear", "knn20"):
        kept = frontier(points, score)
        for one in points:
            here = (getattr(one, score), one.network_images_per_second)
            others = [(getattr(other, score), other.network_images_per_second) for other in points]
            beaten = any(other[0] >= here[0] and other[1] >= here[1] and other != here for other in others)
            if beaten:
                assert one not in kept
            else:
                assert here in [(getattr(other, score), other.network_images_per_second) for other in kept]


def test_the_fastest_of_those_within_half_a_point_is_chosen() -> None:
    best, edge, beyond = point(0.7, 100), point(0.695, 230, 160, 0.05), point(0.694, 900, 112)
    assert choose([best, edge, beyond]) is edge
    assert choose([best, beyond]) is best
    assert advice([best, edge, beyond]) == (
        "Recommended: resolution 160, merge rate 0.05. Linear accuracy 69.5%, 2.3x as fast as the most accurate "
        "setting (resolution 224, merge rate 0: 70.0%); differences up to 0.5 points count as equal. This choice used "
        "one half of the validation images; on the other half, the linear accuracy is 40.0% (95% confidence interval "
        "39.5% to 40.5%)."
    )
    assert advice([beyond, dataclasses.replace(best, resolution=None)]) == (
        "Recommended: resolution native, merge rate 0. Linear accuracy 70.0%; no faster setting comes within 0.5 "
        "points of it. This choice used one half of the validation images; on the other half, the linear accuracy is "
        "40.0% (95% confidence interval 39.5% to 40.5%)."
    )


def test_with_few_images_a_standard_error_is_as_good_as_equal() -> None:
    # 92 images: the interval of 93% is about 0.118 wide, and the standard error 0.03.
    best, within, beyond = (
        dataclasses.replace(point(*at), linear_low=0.84, linear_high=0.958)
        for at in ((0.935, 100, 96), (0.906, 200, 64), (0.904, 300, 48))
    )
    assert choose([best, within, beyond]) is within
    assert "differences up to 3.0 points count as equal" in advice([best, within, beyond])
    assert "no faster setting comes within 3.0 points" in advice([best, beyond])


def test_of_equally_accurate_settings_the_fastest_is_the_best() -> None:
    slow, fast = point(0.7, 100, rate=0.0), point(0.7, 200, rate=0.1)
    assert choose([slow, fast]) is fast
    assert advice([slow, fast]).startswith("Recommended: resolution 224, merge rate 0.1. Linear accuracy 70.0%; no")


def test_a_csv_has_every_point_and_says_which_are_on_the_frontier(tmp_path: Path) -> None:
    points = [point(0.70, 100), point(0.60, 90, None, 0.05), point(0.68, 200)]
    write_points(points, tmp_path / "sweep.csv")
    with (tmp_path / "sweep.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row.pop("frontier") for row in rows] == ["1", "0", "1"]
    assert rows == [
        {name: "" if value is None else str(value) for name, value in dataclasses.asdict(one).items()} for one in points
    ]


@pytest.fixture(scope="module")
def index(pictures: Path) -> Catalog:
    return open_catalog(open_source(str(pictures)))


def test_operations_are_a_mean_over_the_images_of_all_sources(index: Catalog) -> None:
    encoder = Encoder.random(EncoderConfig("Ti", 8, 2).architecture, Preprocessing(32), 0)
    shapes = [(36, 56), (20, 200)]
    (packed,) = encoder.packs([np.zeros((*shape, 3), np.uint8) for shape in shapes], 40)
    expected = encoder_flops(encoder.config, packed.segments.lengths, 0.2)
    assert len(set(expected.tolist())) == 2
    both, first = (of_sizes(index, shapes[:count]) for count in (2, 1))
    (one,), (other,) = (
        network_costs(encoder, indices, [(40, 0.2)], torch.float32) for indices in ([both], [both, first])
    )
    assert one["gflops_per_image"] == pytest.approx(expected.mean() / 1e9)
    assert other["gflops_per_image"] == pytest.approx((expected.sum() + expected[0]) / 3e9)


def of_sizes(index: Catalog, shapes: list[tuple[int, int]]) -> Catalog:
    """An index of images of other heights and widths."""
    heights, widths = np.array(shapes, np.int32).T
    return dataclasses.replace(index, heights=heights, widths=widths, rows=np.arange(len(shapes)))


def test_memory_is_that_of_the_fullest_pack(index: Catalog, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sweep, "TOKENS_PER_PACK", 1000)
    encoder = Encoder.random(EncoderConfig("Ti", 8, 1).architecture, Preprocessing(32), 0)
    large = of_sizes(index, [(200, 200)] * 3)
    # 625 patches each, of which two do not fit one pack; the ten images of the index have 22 to 32.
    packed = Packed.of_grids(np.zeros((625, 192), np.uint8), np.array([[25, 25]]))
    with torch.inference_mode():
        expected = peak_bytes(lambda: encoder(packed), torch.device("cpu")) / 1e6
    settings = [(None, 0.0), (None, 0.5)]
    plain, merged = (cost["peak_megabytes"] for cost in network_costs(encoder, [index, large], settings, torch.float32))
    assert plain == pytest.approx(expected, rel=0.01)
    # Attention, which comes before the merging, now holds most.
    assert merged < 0.95 * expected
    # All ten in one pack.
    (few,) = network_costs(encoder, [index], settings[:1], torch.float32)
    assert 0.2 * expected < few["peak_megabytes"] < 0.6 * expected


def test_speed_is_in_images_of_the_mean_number_of_patches(index: Catalog, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever images the timed pack holds: here two seconds a pack, of 625 patches, are given."""
    monkeypatch.setattr(sweep, "interleaved_seconds", lambda runs, device: [2.0] * len(runs))
    monkeypatch.setattr(sweep, "TOKENS_PER_PACK", 1000)
    encoder = Encoder.random(EncoderConfig("Ti", 8, 1).architecture, Preprocessing(32), 0)
    sizes = of_sizes(index, [(200, 200), (200, 200), (80, 80)])
    (cost,) = network_costs(encoder, [sizes], [(None, 0.0)], torch.float32)
    # The last two fit one pack.
    assert cost["network_images_per_second"] == pytest.approx((625 + 100) / ((625 + 625 + 100) / 3) / 2)
