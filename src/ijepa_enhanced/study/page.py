"""What people read of a study: a table, and a verdict for each arm."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ijepa_enhanced.study.compare import summary
from ijepa_enhanced.study.config import StudyConfig
from ijepa_enhanced.study.rows import Row
from ijepa_enhanced.train.config import TrainConfig
from ijepa_enhanced.visualize.page import NOTHING, note, table
from ijepa_enhanced.visualize.report import write_report

HEAD = ("arm", "runs", "steps", "kNN-20 (gain)", "linear (gain)", "RankMe", "drop")
"""Columns of the table; the verdicts are long, so they are lines of their own on a terminal."""
EXPLANATION = (
    "Scores are in percent: mean ± standard deviation over the seeds.",
    "Gain: score minus the score of the encoder before training (start).",
    "Drop: best kNN score of the monitor during training minus its last one.",
    "Verdict: Welch's t-test over the seeds compares the kNN-20 and linear scores with those of the first arm. "
    "p-values are corrected for multiple tests (Holm): if no arm truly differs, the chance of any 'higher' or 'lower' "
    "verdict is at most 5%. This holds if you fix the seeds in advance, not if you add seeds after you have seen the "
    "verdicts. An arm with failed runs is not tested.",
)


def cells(line: dict[str, Any]) -> list[str]:
    """Return a line of `summary` as the cells of a row of the table."""
    problems = [f"{line[kind]} {kind}" for kind in ("failed", "collapsed") if line[kind]]
    return [
        line["arm"],
        f"{line['runs']} ({', '.join(problems)})" if problems else str(line["runs"]),
        f"{line['steps']:,}",
        *(f"{_percent(line, name)} ({_percent(line, f'{name}_gain')})" for name in ("knn20", "linear")),
        NOTHING if line["rankme"] is None else f"{line['rankme']:.1f}",
        _percent(line, "fall"),
    ]


def _percent(line: dict[str, Any], name: str) -> str:
    """Return a score as `12.3±0.4`, or without its spread if there is only one run."""
    value, spread = line[name], line[f"{name}_spread"]
    if value is None:
        return NOTHING
    return f"{100 * value:.1f}" + ("" if spread is None else f"±{100 * spread:.1f}")


def write_page(study: StudyConfig, rows: Sequence[Row], folder: Path) -> Path | None:
    """Write `report.html`, the page of a study: its table, then its runs compared.

    Args:
        study: what was run.
        rows: what became of it.
        folder: where the runs are, and the page.

    Returns:
        The page, or None if no run has scores: then there is nothing to compare.
    """
    page = folder / "report.html"
    scored = [folder / f"{row.arm}-{row.seed}" for row in rows if row.knn20 is not None]
    if not scored:
        return None
    lines = [[*cells(line), line["verdict"]] for line in summary(rows)]
    text = note(_scoring(study)) + table([*HEAD, "verdict"], lines) + note(" ".join(EXPLANATION))
    write_report(scored, page, dataclasses.asdict(TrainConfig()), {"Study": text})
    return page


def _scoring(study: StudyConfig) -> str:
    """Say how the runs of a study were scored."""
    if study.resolution is None:
        size = "at the resolution that each encoder was trained with"
    elif isinstance(study.resolution, int):
        size = f"at a resolution of {study.resolution} px"
    else:
        size = "at native resolution"
    learned = "the training images of the first arm" if study.train is None else study.train
    return f"Scored on {study.val} {size}. Probes were trained on {learned}."
