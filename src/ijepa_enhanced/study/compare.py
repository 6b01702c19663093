"""Whether the arms of a study differ: means, spreads, and a test over the seeds.

Seeds differ too, so the means of two arms are never the same. An arm is called higher or lower than the first arm only
if a test says so: Welch's t-test over the runs of both, which allows the two arms different spreads. A study makes one
test for each further arm and each of `TESTED`, and Holm's correction covers all of them together: if no arm differs
from the first one, the chance that any verdict of the study says otherwise is at most 5%. That holds for seeds that are
fixed in advance, not for seeds that are added until a test says so. An arm with failed runs is not tested.
"""

from __future__ import annotations

import csv
import itertools
import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ijepa_enhanced.files import replacing
from ijepa_enhanced.study.rows import Row

TESTED = {"knn20": "kNN-20", "linear": "linear"}
"""Scores that verdicts are about, and what users call them."""
LEVEL = 0.05
"""Chance that a study of equal arms says of any of them that it differs."""


def summary(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Return a line for each arm: its runs, the mean and the spread of its scores over the seeds, and a verdict.

    `failed` counts runs without scores. NAME_spread is the sample standard deviation, None for a single run. NAME_gain
    is the score minus that of the start. NAME_p is the p-value of the test against the first arm, after Holm's
    correction; it is None if that cannot be tested. `verdict` says in words what the tests found.
    """
    runs = {arm: [row for row in rows if row.arm == arm] for arm in dict.fromkeys(row.arm for row in rows)}
    corrected = _p_values(runs)
    return [
        _statistics(arm, own)
        | {f"{score}_p": corrected.get((arm, score)) for score in TESTED}
        | {"verdict": _verdict(arm, runs, corrected)}
        for arm, own in runs.items()
    ]


def write_summary(rows: Sequence[Row], path: Path) -> None:
    """Write the summary of a study as CSV, one line for each arm, whole or not at all."""
    lines = summary(rows)
    with replacing(path) as temporary, temporary.open("w", newline="") as file:
        writer = csv.DictWriter(file, lines[0])
        writer.writeheader()
        writer.writerows(lines)


def _statistics(arm: str, runs: Sequence[Row]) -> dict[str, Any]:
    scored = [row for row in runs if row.knn20 is not None]
    line: dict[str, Any] = {
        "arm": arm,
        "runs": len(runs),
        "failed": len(runs) - len(scored),
        "collapsed": sum(row.outcome == "collapsed" for row in runs),
        "steps": round(statistics.mean(row.steps for row in scored)) if scored else 0,
    }
    for name in ("knn20", "linear", "rankme", "fall", "knn20_gain", "linear_gain"):
        values = _values(runs, name)
        line[name] = statistics.mean(values) if values else None
        line[f"{name}_spread"] = statistics.stdev(values) if len(values) > 1 else None
    return line


def _failed(runs: Sequence[Row]) -> bool:
    """Return whether any of some runs has no scores."""
    return any(row.linear is None for row in runs)


def _values(runs: Sequence[Row], name: str) -> list[float]:
    """Return a score of all runs that have it; NAME_gain is NAME minus that of the start."""
    score, gain, _ = name.partition("_gain")
    found: list[float] = []
    for row in runs:
        value, start = getattr(row, score), getattr(row, f"start_{score}") if gain else 0.0
        if value is not None and start is not None:
            found.append(value - start)
    return found


def _p_values(runs: dict[str, list[Row]]) -> dict[tuple[str, str], float]:
    """Return the corrected p-value of each test of the study that can be made, by arm and score.

    None is made of an arm with failed runs: those that did not fail may be the better ones.
    """
    first, *others = ([] if _failed(own) else own for own in runs.values())
    tests = {
        (own[0].arm, score): welch(_values(own, score), _values(first, score))
        for own, score in itertools.product(filter(None, others), TESTED)
    }
    made = {test: p for test, p in tests.items() if p is not None}
    return dict(zip(made, holm(list(made.values())), strict=True))


def _verdict(arm: str, runs: dict[str, list[Row]], corrected: dict[tuple[str, str], float]) -> str:
    """Say in words how an arm compares with the first one."""
    first = next(iter(runs))
    if arm == first:
        return "baseline: all other arms are compared with it"
    failed = [name for name in (first, arm) if _failed(runs[name])]
    if failed:
        return f"not tested: failed runs of {' and '.join(failed)}"
    if min(len(runs[name]) for name in (first, arm)) < 2:
        return "not tested: only one seed"
    said = []
    for score, title in TESTED.items():
        p = corrected.get((arm, score))
        own, other = (statistics.mean(_values(runs[name], score)) for name in (arm, first))
        if p is None:
            said.append(f"{title} not tested (all scores equal)")
        else:
            found = "not different" if p >= LEVEL else "higher" if own > other else "lower"
            said.append(f"{title} {found} ({'p < 0.001' if p < 0.001 else f'p = {p:.2g}'})")
    return ", ".join(said)


def welch(first: Sequence[float], second: Sequence[float]) -> float | None:
    """Return the two-sided p-value of Welch's t-test for equal means (Biometrika 34, 1947, page 28).

    With standard errors e1 and e2 of the means m1 and m2, t = (m1 - m2) / sqrt(e1^2 + e2^2) has about Student's
    distribution with (e1^2 + e2^2)^2 / (e1^4 / (n1 - 1) + e2^4 / (n2 - 1)) degrees of freedom.

    Args:
        first, second: n1 and n2 values.

    Returns:
        The p-value, or None if it cannot be tested: one side has fewer than two values, or neither side varies.
    """
    samples = (first, second)
    if min(map(len, samples)) < 2:
        return None
    errors = [statistics.variance(values) / len(values) for values in samples]
    if not any(errors):
        return None
    squared = (statistics.mean(first) - statistics.mean(second)) ** 2 / sum(errors)
    freedom = sum(errors) ** 2 / sum(e**2 / (len(values) - 1) for e, values in zip(errors, samples, strict=True))
    return incomplete_beta(freedom / 2, 0.5, freedom / (freedom + squared))


def holm(p: Sequence[float]) -> list[float]:
    """Return p-values corrected for their number (Holm, Scandinavian Journal of Statistics 6, 1979, page 65).

    Of m p-values the k-th smallest is multiplied by m - k + 1; none becomes smaller than one before it, or above 1.
    Of the tests whose null hypothesis is true, any has a corrected p-value below a level with at most that chance,
    however the tests depend on each other.
    """
    corrected, largest = [0.0] * len(p), 0.0
    for done, place in enumerate(sorted(range(len(p)), key=lambda place: p[place])):
        largest = max(largest, min(1.0, (len(p) - done) * p[place]))
        corrected[place] = largest
    return corrected


def incomplete_beta(a: float, b: float, x: float) -> float:
    """Return the regularized incomplete beta function I_x(a, b) for a, b > 0 and x from 0 to 1.

    By its continued fraction (NIST's Digital Library of Mathematical Functions, 8.17.22), which converges fast for
    x < (a + 1) / (a + b + 2); beyond that by I_x(a, b) = 1 - I_(1-x)(b, a).
    """
    if x in (0.0, 1.0):
        return x
    if x > (a + 1) / (a + b + 2):
        return 1 - incomplete_beta(b, a, 1 - x)
    front = math.exp(
        math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b) + a * math.log(x) + b * math.log1p(-x) - math.log(a)
    )
    # Evaluated from the far end, where 1 stands for what is left out: 200 terms are far more than small studies need.
    fraction = 1.0
    for number in range(200, 0, -1):
        half = number // 2
        if number % 2:
            term = -(a + half) * (a + b + half) / ((a + number - 1) * (a + number))
        else:
            term = half * (b - half) / ((a + number - 1) * (a + number))
        fraction = 1 + term * x / fraction
    return front / fraction
