"""A study says that arms differ only if Welch's test with Holm's correction says so."""

import csv
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from ijepa_enhanced.study.compare import LEVEL, holm, incomplete_beta, summary, welch, write_summary
from ijepa_enhanced.study.rows import Row, read_rows, write_rows

ROWS = [
    Row("a", 0, "finished", 10, 1.0, 0.5, 0.6, 20.0, 0.25, 0.5, 0.5, 0.0),
    Row("a", 1, "collapsed", 10, 1.0, 0.25, 0.2, 10.0, 0.25, 0.5, 0.5, 0.25),
    Row("b", 0, "The loss is not finite.", 0, 1.0),
]


def test_a_summary_has_means_and_sample_deviations() -> None:
    first, second = summary(ROWS)
    assert (first["runs"], first["failed"], first["collapsed"], first["steps"]) == (2, 0, 1, 10)
    assert first["knn20"] == 0.375
    assert first["knn20_gain"] == 0.125
    assert first["linear_gain"] == pytest.approx(-0.1)
    # The sample deviation of two values is their distance divided by the square root of 2.
    assert first["knn20_spread"] == pytest.approx(0.25 / 2**0.5)
    assert first["fall_spread"] == pytest.approx(0.25 / 2**0.5)
    assert (second["runs"], second["failed"], second["knn20"], second["knn20_spread"]) == (1, 1, None, None)


def test_rows_are_read_as_they_were_written(tmp_path: Path) -> None:
    assert read_rows(tmp_path / "study.csv") == []
    write_rows(ROWS, tmp_path / "study.csv")
    assert read_rows(tmp_path / "study.csv") == ROWS


def study(**arms: Sequence[tuple[float, float]]) -> list[Row]:
    """Rows of arms, from the kNN-20 and the linear score of each seed."""
    return [
        Row(arm, seed, "finished", 10, 1.0, knn, linear, 20.0, 0.1, 0.1)
        for arm, scores in arms.items()
        for seed, (knn, linear) in enumerate(scores)
    ]


def verdicts(rows: Sequence[Row]) -> dict[str, str]:
    return {line["arm"]: line["verdict"] for line in summary(rows)}


BASE = [(0.300, 0.400), (0.310, 0.410), (0.305, 0.405)]


def test_a_verdict_says_which_score_is_higher_or_lower_and_how_surely(tmp_path: Path) -> None:
    rows = study(
        base=BASE,
        same=[(0.304, 0.404), (0.312, 0.412), (0.300, 0.400)],
        better=[(knn - 0.1, linear + 0.1) for knn, linear in BASE],
    )
    found = verdicts(rows)
    assert found["base"] == "baseline: all other arms are compared with it"
    assert found["same"].startswith("kNN-20 not different (p = ")
    assert ", linear not different (p = " in found["same"]
    # t is 0.1 / sqrt(2 / 3) / 0.005 = 24.5 at 4 degrees of freedom: p = 1.648e-5, the smallest of four tests.
    assert found["better"] == "kNN-20 lower (p < 0.001), linear higher (p < 0.001)"
    better = summary(rows)[2]
    assert better["linear_p"] == pytest.approx(4 * 1.64831e-5, rel=1e-5)
    write_summary(rows, tmp_path / "summary.csv")
    with (tmp_path / "summary.csv").open(newline="") as file:
        assert {line["arm"]: line["verdict"] for line in csv.DictReader(file)} == found


def test_what_cannot_be_tested_is_not_called_different() -> None:
    one = study(base=BASE[:1], other=[(0.9, 0.9)])
    assert verdicts(one)["other"] == "not tested: only one seed"
    failed = Row("failed", 3, "The loss is not finite.", 0, 1.0)
    better = [(knn + 0.1, linear + 0.1) for knn, linear in BASE]
    for rows in (study(base=BASE, failed=better), study(failed=better, base=BASE)):
        assert "p < 0.001" in summary(rows)[1]["verdict"], "or this test shows nothing"
        line = summary([*rows, failed])[1]
        assert (line["verdict"], line["linear_p"]) == ("not tested: failed runs of failed", None)
    frozen = study(base=[(0.5, 0.4), (0.5, 0.41)], other=[(0.6, 0.4), (0.6, 0.41)])
    assert verdicts(frozen)["other"] == "kNN-20 not tested (all scores equal), linear not different (p = 1)"


@pytest.mark.parametrize("arms", [2, 4])
def test_equal_arms_are_seldom_called_different(arms: int) -> None:
    """In at most 5% of 1,000 studies of three seeds, plus three standard errors of that share: 2.1%.

    The two scores of a run vary together, as they do in real runs, and the last arm varies three times as much. To ask
    instead whether the means are further apart than their spreads would be wrong in more than a fifth of studies.
    """
    rng = np.random.default_rng(0)
    studies, wrong, apart = 1000, 0, 0
    for _ in range(studies):
        common, own = rng.normal(size=(2, arms, 3))
        scores = 0.5 + 0.01 * np.stack([common, (common + own) / 2**0.5], axis=2)
        scores[-1] = 0.5 + 3 * (scores[-1] - 0.5)
        rows = study(**{f"arm{number}": [tuple(run) for run in runs] for number, runs in enumerate(scores.tolist())})
        first, *others = summary(rows)
        wrong += any("higher" in line["verdict"] or "lower" in line["verdict"] for line in others)
        apart += any(
            abs(line[name] - first[name]) > line[f"{name}_spread"] + first[f"{name}_spread"]
            for line in others
            for name in ("knn20", "linear")
        )
    assert wrong / studies <= LEVEL + 3 * (LEVEL * (1 - LEVEL) / studies) ** 0.5
    assert wrong / studies > LEVEL / 5, "and the test is not so strict that it can find nothing"
    assert apart / studies > 0.2


def test_a_difference_of_six_spreads_is_found_by_three_seeds() -> None:
    rng = np.random.default_rng(0)
    found = 0
    for _ in range(500):
        scores = 0.5 + 0.01 * rng.normal(size=(2, 3, 2)) + np.array([0.0, 0.06])[:, None, None]
        rows = study(a=[tuple(run) for run in scores[0].tolist()], b=[tuple(run) for run in scores[1].tolist()])
        found += "linear higher" in verdicts(rows)["b"]
    assert found > 0.9 * 500


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [
        # `scipy.stats.ttest_ind(first, second, equal_var=False).pvalue` of scipy 1.17.
        ([0.30, 0.31, 0.305], [0.32, 0.33, 0.31], 0.10447888668472186),
        ([1.0, 2.0, 3.0, 4.0], [10.0, 30.0], 0.3295277873929405),
        ([0.5, 0.6], [0.5, 0.6], 1.0),
        ([0.1, 0.1, 0.1], [0.2, 0.3, 0.25, 0.27], 0.0051534390485063536),
    ],
)
def test_welch_is_scipys(first: list[float], second: list[float], expected: float) -> None:
    assert welch(first, second) == pytest.approx(expected, rel=1e-9)


def test_welch_needs_two_values_of_each_and_some_spread() -> None:
    assert welch([1.0], [2.0, 3.0]) is None
    assert welch([], [2.0, 3.0]) is None
    assert welch([1.0, 1.0], [2.0, 2.0]) is None


def test_holm_is_its_definition() -> None:
    """The smallest of four times 4, the next times 3 and so on, never falling and never above 1."""
    assert holm([0.04, 0.01, 0.03, 0.6]) == pytest.approx([0.09, 0.04, 0.09, 0.6])
    assert holm([0.5, 0.9]) == pytest.approx([1.0, 1.0])
    assert holm([0.03]) == [0.03]
    assert holm([]) == []


def test_the_incomplete_beta_function_has_its_known_values() -> None:
    """I_x(a, 1) = x^a, I_x(1, b) = 1 - (1 - x)^b, and I_x(1/2, 1/2) = 2 / pi * arcsin(sqrt(x))."""
    for x in (0.0, 1e-9, 0.01, 0.3, 0.5, 0.77, 0.999, 1.0):
        assert incomplete_beta(2.5, 1.0, x) == pytest.approx(x**2.5, rel=1e-9)
        assert incomplete_beta(1.0, 3.5, x) == pytest.approx(-np.expm1(3.5 * np.log1p(-x)) if x < 1 else 1.0, rel=1e-9)
        assert incomplete_beta(0.5, 0.5, x) == pytest.approx(2 / np.pi * np.arcsin(x**0.5), rel=1e-7)
