"""The runs of a study: one line of `study.csv` for each."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from ijepa_enhanced.files import replacing


class Row(NamedTuple):
    """One run of a study. Scores are fractions of 1, except RankMe; they are None if the run failed."""

    arm: str
    seed: int
    outcome: str
    """`finished`, `collapsed` (the monitor raised its alarm), or what went wrong."""
    steps: int
    seconds: float
    """Training time on this machine; of a run that was interrupted, the time since it was resumed."""
    knn20: float | None = None
    linear: float | None = None
    rankme: float | None = None
    start_knn20: float | None = None
    """kNN-20 of the start: the encoder before its first step."""
    start_linear: float | None = None
    """Linear score of the start."""
    best_knn: float | None = None
    """The highest kNN score that the monitor logged."""
    fall: float | None = None
    """How far the monitor's last kNN score lies below its best."""


def read_rows(path: Path) -> list[Row]:
    """Return the rows of a study's CSV, or none if there is no such file."""
    if not path.is_file():
        return []
    with path.open(newline="") as file:
        return [
            Row(
                line["arm"],
                int(line["seed"]),
                line["outcome"],
                int(line["steps"]),
                float(line["seconds"]),
                *(float(line[name]) if line[name] else None for name in Row._fields[5:]),
            )
            for line in csv.DictReader(file)
        ]


def write_rows(rows: Sequence[Row], path: Path) -> None:
    """Write a study's CSV, whole or not at all."""
    with replacing(path) as temporary, temporary.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(Row._fields)
        writer.writerows(rows)
