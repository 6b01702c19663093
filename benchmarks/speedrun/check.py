"""Check the records of the speedrun, and print their table for README.md.

    python benchmarks/speedrun/check.py

If an entry breaks a rule of README.md that can be checked in its files, the script says so and returns exit code 2.
"""

from __future__ import annotations

import csv
import re
import statistics
import sys
from collections.abc import Sequence
from datetime import date
from pathlib import Path
from typing import Any, NamedTuple

from ijepa_enhanced.errors import RequestError
from ijepa_enhanced.study.compare import LEVEL, TESTED, summary
from ijepa_enhanced.study.config import StudyConfig, load_study
from ijepa_enhanced.study.rows import Row, read_rows

HERE = Path(__file__).parent
TRACKS = {name: load_study(HERE / f"{name}.yaml") for name in ("cpu", "gpu")}
"""Study file of each track. It sets the training time and the seeds."""
SHORTEST, LONGEST = 0.8, 1.25
"""Limits of the training time of a run, relative to that of its track. On a machine that others use too, runs took
longer than the study had timed."""
MORE_TIME = 1.05
"""Limit of the mean training time of an entry, relative to that of the record in the same study."""
HEAD = ("Track", "Date", "Arm", "kNN-20", "Linear", "Against the previous record", "Steps", "Machine", "Commit", "Runs")


class Entry(NamedTuple):
    """A line of records.csv."""

    track: str
    date: str
    arm: str
    flags: str
    commit: str
    machine: str
    study: str


def read_csv(path: Path, columns: Sequence[str]) -> list[list[str]]:
    """Return the lines of a CSV file below its header.

    Raises:
        RequestError: the file cannot be read, or has other columns.
    """
    try:
        with path.open(newline="", encoding="utf-8") as file:
            lines = list(csv.reader(file, strict=True))
    except (OSError, ValueError, csv.Error) as error:
        raise RequestError(f"{path.name} cannot be read: {error}.") from error
    if not lines or tuple(lines[0]) != tuple(columns):
        raise RequestError(f"{path.name} must have the columns {','.join(columns)}.")
    for number, line in enumerate(lines[1:], 2):
        if len(line) != len(columns):
            raise RequestError(f"{path.name}, line {number}, has {len(line)} values instead of {len(columns)}.")
    return lines[1:]


def check_entry(entry: Entry, previous: Entry | None) -> None:
    """Raise RequestError if a line of records.csv is wrong. `previous` is the record that it must beat."""
    try:
        day = date.fromisoformat(entry.date).isoformat()
    except ValueError:
        day = ""
    if day != entry.date:
        raise RequestError(f"date must be a day such as 2026-11-28, not '{entry.date}'.")
    if previous and day < previous.date:
        raise RequestError(f"the date {day} is earlier than that of the previous record, {previous.date}.")
    if not re.fullmatch("[0-9a-f]{7,40}", entry.commit):
        raise RequestError(f"commit must be 7 to 40 hexadecimal digits, not '{entry.commit}'.")
    if not re.fullmatch(r"[\w.+-]+\.csv", entry.study):
        raise RequestError(f"study must be the name of a CSV file in runs/, not '{entry.study}'.")
    if not entry.machine:
        raise RequestError("machine is empty. Name the processor or the GPU.")


def check_runs(rows: Sequence[Row], arms: Sequence[str], track: StudyConfig) -> None:
    """Raise RequestError if the runs of a study break a rule. `arms`: the record to beat, if any, and the entry."""
    found = list(dict.fromkeys(row.arm for row in rows))
    if found != list(arms):
        raise RequestError(f"the arms of the study must be {' and '.join(arms)}, not {' and '.join(found) or 'none'}.")
    for arm in arms:
        seeds = sorted(row.seed for row in rows if row.arm == arm)
        if seeds != sorted(track.seeds):
            raise RequestError(f"the seeds of {arm} must be {sorted(track.seeds)}, not {seeds}.")
    low, high = (round(part * (track.seconds or 0)) for part in (SHORTEST, LONGEST))
    for row in rows:
        run = f"seed {row.seed} of {row.arm}"
        if row.outcome != "finished":
            raise RequestError(f"the outcome of {run} must be 'finished', not '{row.outcome}'.")
        if not low <= row.seconds <= high:
            raise RequestError(f"the training time of {run} must be {low} to {high} s, not {row.seconds:.1f} s.")
        for score in TESTED:
            if (value := getattr(row, score)) is None or not 0 <= value <= 1:
                raise RequestError(f"{score} of {run} must be 0 to 1, not {value}.")
    times = [statistics.mean(row.seconds for row in rows if row.arm == arm) for arm in arms]
    if times[-1] > MORE_TIME * times[0]:
        raise RequestError(
            f"its mean training time, {times[-1]:.0f} s, is more than {MORE_TIME:g} times that of {arms[0]}, "
            f"{times[0]:.0f} s."
        )


def check_better(own: dict[str, Any], other: dict[str, Any]) -> None:
    """Raise RequestError if an entry does not beat the previous record. Both are lines of `summary`."""
    different = [score for score in TESTED if (p := own[f"{score}_p"]) is not None and p < LEVEL]
    if not different or any(own[score] < other[score] for score in different):
        needed = "At least one score must be significantly higher, and none significantly lower."
        raise RequestError(f"it does not beat {other['arm']}: {own['verdict']}. {needed}")


def cells(entry: Entry, rows: Sequence[Row]) -> list[str]:
    """Return a row of the table: mean ± sample standard deviation (score of each seed), in percent."""
    *others, own = summary(rows)
    runs = sorted((row for row in rows if row.arm == entry.arm), key=lambda row: row.seed)
    scores, changes = [], []
    for score, title in TESTED.items():
        single = ", ".join(f"{100 * getattr(row, score):.1f}" for row in runs)
        scores.append(f"{100 * own[score]:.1f} ± {100 * own[f'{score}_spread']:.1f} ({single})")
        for other in others:
            p = own[f"{score}_p"]
            said = "not tested" if p is None else "p < 0.001" if p < 0.001 else f"p = {p:.2g}"
            changes.append(f"{title} {100 * (own[score] - other[score]):+.1f} ({said})")
    arm = f"`{entry.arm}`" + (f" (`{entry.flags}`)" if entry.flags else "")
    last = [f"{own['steps']:,}", entry.machine, f"`{entry.commit}`", f"[CSV](./runs/{entry.study})"]
    return [entry.track, entry.date, arm, *scores, ", ".join(changes) or "first record", *last]


def table(folder: Path) -> str:
    """Return the Markdown table of the records in a folder.

    Raises:
        RequestError: the files break a rule.
    """
    records: dict[str, list[Entry]] = {track: [] for track in TRACKS}
    lines: dict[str, list[list[str]]] = {track: [] for track in TRACKS}
    for number, values in enumerate(read_csv(folder / "records.csv", Entry._fields), 2):
        entry = Entry(*values)
        try:
            if entry.track not in TRACKS:
                raise RequestError(f"track must be {' or '.join(TRACKS)}, not '{entry.track}'.")
            previous = records[entry.track][-1:]
            check_entry(entry, previous[0] if previous else None)
            read_csv(folder / "runs" / entry.study, Row._fields)
            rows = read_rows(folder / "runs" / entry.study)
            check_runs(rows, [record.arm for record in (*previous, entry)], TRACKS[entry.track])
            if previous:
                check_better(*reversed(summary(rows)))
        except ValueError as error:  # a RequestError, or text where a number belongs
            raise RequestError(f"records.csv, line {number} ({entry.arm}): {error}") from error
        records[entry.track].append(entry)
        lines[entry.track].append(cells(entry, rows))
    empty = [""] * (len(HEAD) - 2)
    body = [line for track in TRACKS for line in lines[track] or [[track, "not measured", *empty]]]
    escaped = ([cell.replace("|", r"\|") for cell in line] for line in (HEAD, ["---"] * len(HEAD), *body))
    return "\n".join(f"| {' | '.join(line)} |" for line in escaped)


def main(folder: Path = HERE) -> int:
    """Print the table, or why an entry is refused, and return the exit code."""
    try:
        print(table(folder))
    except RequestError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
