"""`benchmarks/speedrun/check.py` accepts records that follow the rules of the speedrun, and refuses all others."""

import csv
import re
import runpy
import shlex
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from ijepa_enhanced.commands.flags import parse
from ijepa_enhanced.commands.study import configure
from ijepa_enhanced.study.compare import summary
from ijepa_enhanced.study.config import load_study
from ijepa_enhanced.study.rows import Row, write_rows

SPEEDRUN = Path(__file__).parents[2] / "benchmarks" / "speedrun"
CHECK = runpy.run_path(str(SPEEDRUN / "check.py"))
README = (SPEEDRUN / "README.md").read_text()
COLUMNS = ("track", "date", "arm", "flags", "commit", "machine", "study")

FIRST = ("cpu", "2026-11-28", "first", "--config own-images-cpu", "0123abc", "Xeon", "first.csv")
SECOND = ("cpu", "2026-11-29", "second", "--config own-images-cpu --optim.lr 0.002", "0123abd", "Xeon", "second.csv")
NOISE = (0.004, -0.003, 0.0, 0.002, -0.003)
"""What the five seeds add to a score; the sum is 0."""


def arm(name: str, knn20: float, linear: float, seconds: float = 2400) -> list[Row]:
    return [
        Row(name, seed, "finished", 6000, seconds, knn20 + noise, linear - noise) for seed, noise in enumerate(NOISE)
    ]


BASE = arm("first", 0.68, 0.71)
BETTER = arm("second", 0.70, 0.71)


def write(folder: Path, *entries: tuple[Sequence[str], Sequence[Row]], columns: Sequence[str] = COLUMNS) -> Path:
    """Write records.csv and runs/ for pairs of a line and the rows of its study."""
    (folder / "runs").mkdir(exist_ok=True)
    with (folder / "records.csv").open("w", newline="") as file:
        csv.writer(file).writerows([columns, *(line for line, _ in entries)])
    for line, rows in entries:
        if Path(line[6]).parent == Path():
            write_rows(rows, folder / "runs" / line[6])
    return folder


Refused = Callable[[Path], str]


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str]) -> Refused:
    """Run the check, which must fail with one line; return it."""

    def run(folder: Path) -> str:
        assert CHECK["main"](folder) == 2
        output = capsys.readouterr()
        assert output.out == ""
        assert len(output.err.splitlines()) == 1
        return output.err

    return run


def cells(folder: Path, capsys: pytest.CaptureFixture[str]) -> dict[str, list[str]]:
    """Run the check, which must succeed; return the cells of each row below the head, by the arm in it."""
    assert CHECK["main"](folder) == 0
    lines = capsys.readouterr().out.splitlines()
    rows = [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]
    assert {len(row) for row in rows} == {10}
    return {row[2].partition(" ")[0]: row for row in rows[2:] if row[2]}


def test_a_first_record_is_shown_with_the_score_of_every_seed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = cells(write(tmp_path, (FIRST, BASE[::-1])), capsys)
    # The sample deviation of NOISE is sqrt(38 / 4) = 3.08 thousandths.
    assert found["`first`"] == [
        *("cpu", "2026-11-28", "`first` (`--config own-images-cpu`)"),
        *("68.0 ± 0.3 (68.4, 67.7, 68.0, 68.2, 67.7)", "71.0 ± 0.3 (70.6, 71.3, 71.0, 70.8, 71.3)"),
        *("first record", "6,000", "Xeon", "`0123abc`", "[CSV](./runs/first.csv)"),
    ]


def test_a_better_entry_is_shown_with_the_p_values_of_its_study(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    better = arm("second", 0.686, 0.7105)
    better[0] = better[0]._replace(seconds=2990)  # the mean counts, and it is below 1.05 times that of the record
    own = summary([*BASE, *better])[1]
    assert 0.001 < own["knn20_p"] < 0.05 < own["linear_p"]
    line = (*SECOND[:5], "Xeon | AMX", SECOND[6])
    found = cells(write(tmp_path, (FIRST, BASE), (line, [*BASE, *better])), capsys)
    changes = f"kNN-20 +0.6 (p = {own['knn20_p']:.2g}), linear +0.1 (p = {own['linear_p']:.2g})"
    assert found["`second`"][5] == changes
    assert found["`second`"][7] == r"Xeon \| AMX"


def test_a_track_without_records_is_shown_as_not_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert CHECK["main"](write(tmp_path, (FIRST, BASE))) == 0
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.startswith("| gpu | not measured | ")


def test_each_track_has_records_of_its_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    gpu = ("gpu", "2026-11-01", "other", "", "0123abc", "H100", "other.csv")
    found = cells(write(tmp_path, (FIRST, BASE), (gpu, arm("other", 0.5, 0.5, 600))), capsys)
    assert [found[name][5] for name in ("`first`", "`other`")] == ["first record", "first record"]


@pytest.mark.parametrize(("track", "low", "high"), [("cpu", 1920, 3000), ("gpu", 480, 750)])
def test_the_limits_of_the_time(
    track: str, low: int, high: int, tmp_path: Path, refused: Refused, capsys: pytest.CaptureFixture[str]
) -> None:
    line = (track, *FIRST[1:])
    for seconds in (low, high):
        cells(write(tmp_path, (line, arm("first", 0.68, 0.71, seconds))), capsys)
    for seconds in (low - 1, high + 1, float("nan")):
        rows = arm("first", 0.68, 0.71, low)
        rows[3] = rows[3]._replace(seconds=seconds)
        expected = f"the training time of seed 3 of first must be {low} to {high} s, not {seconds:.1f} s."
        assert expected in refused(write(tmp_path, (line, rows)))
    minutes = f"| `{track}` | {low / 60:g} minutes | {high / 60:g} minutes |"
    assert minutes in README


def changed(**values: object) -> list[Row]:
    return [*BASE[:2], BASE[2]._replace(**values), *BASE[3:]]


RUNS = {
    "no runs": ([], "the arms of the study must be first, not none."),
    "another arm": ([*BASE, *BETTER], "the arms of the study must be first, not first and second."),
    "a seed is missing": (BASE[:4], "the seeds of first must be [0, 1, 2, 3, 4], not [0, 1, 2, 3]."),
    "a seed twice": ([*BASE, BASE[0]], "the seeds of first must be [0, 1, 2, 3, 4], not [0, 0, 1, 2, 3, 4]."),
    "another seed": (changed(seed=5), "the seeds of first must be [0, 1, 2, 3, 4], not [0, 1, 3, 4, 5]."),
    "a collapsed run": (changed(outcome="collapsed"), "seed 2 of first must be 'finished', not 'collapsed'."),
    "a failed run": (
        changed(outcome="Bad loss."),
        "the outcome of seed 2 of first must be 'finished', not 'Bad loss.'",
    ),
    "no score": (changed(linear=None), "linear of seed 2 of first must be 0 to 1, not None."),
    "a score in percent": (changed(knn20=68.0), "knn20 of seed 2 of first must be 0 to 1, not 68.0."),
    "a score that is no number": (changed(knn20=float("nan")), "knn20 of seed 2 of first must be 0 to 1, not nan."),
    "seeds that are no integers": (changed(seed=2.5), "invalid literal for int() with base 10: '2.5'"),
}


@pytest.mark.parametrize(("rows", "message"), RUNS.values(), ids=RUNS)
def test_runs_that_break_a_rule(rows: Sequence[Row], message: str, tmp_path: Path, refused: Refused) -> None:
    said = refused(write(tmp_path, (FIRST, rows)))
    assert said.startswith("records.csv, line 2 (first): ")
    assert message in said


SECOND_RUNS = {
    "without the record": (BETTER, "the arms of the study must be first and second, not second."),
    "before the record": ([*BETTER, *BASE], "must be first and second, not second and first."),
    "with a third arm": (
        [*BASE, *BETTER, *arm("third", 0.7, 0.7)],
        "must be first and second, not first and second and third.",
    ),
    "a short run of the record": (
        [*arm("first", 0.6, 0.7, 1000), *BETTER],
        "the training time of seed 0 of first must be",
    ),
    "no difference": ([*BASE, *arm("second", 0.685, 0.711)], "kNN-20 not different (p = 0.067)"),
    "more time": (
        [*arm("first", 0.68, 0.71, 2200), *arm("second", 0.7, 0.71, 2311)],
        "its mean training time, 2311 s, is more than 1.05 times that of first, 2200 s.",
    ),
    "equal scores": (
        [row._replace(knn20=0.5, linear=0.5) for row in (*BASE, *BETTER)],
        "not tested (all scores equal)",
    ),
    "lower": ([*BASE, *arm("second", 0.66, 0.71)], "kNN-20 lower"),
    "one higher, one lower": (
        [*BASE, *arm("second", 0.75, 0.69)],
        "kNN-20 higher (p < 0.001), linear lower (p < 0.001).",
    ),
}


@pytest.mark.parametrize(("rows", "message"), SECOND_RUNS.values(), ids=SECOND_RUNS)
def test_entries_that_do_not_beat_the_record(
    rows: Sequence[Row], message: str, tmp_path: Path, refused: Refused
) -> None:
    said = refused(write(tmp_path, (FIRST, BASE), (SECOND, rows)))
    assert said.startswith("records.csv, line 3 (second): ")
    assert message in said


def test_only_the_last_record_must_be_beaten(
    tmp_path: Path, refused: Refused, capsys: pytest.CaptureFixture[str]
) -> None:
    third = ("cpu", "2026-11-30", "third", "", "0123abe", "Xeon", "third.csv")
    entries = [(FIRST, BASE), (SECOND, [*BASE, *BETTER])]
    cells(write(tmp_path, *entries, (third, [*BETTER, *arm("third", 0.72, 0.71)])), capsys)
    said = refused(write(tmp_path, *entries, (third, [*BASE, *arm("third", 0.72, 0.71)])))
    assert "must be second and third, not first and third." in said


LINES = {
    "track": ("tpu", "track must be cpu or gpu, not 'tpu'."),
    "date": ("2026-11-31", "date must be a day such as 2026-11-28, not '2026-11-31'."),
    "commit": ("main", "commit must be 7 to 40 hexadecimal digits, not 'main'."),
    "machine": ("", "machine is empty."),
    "study": ("../first.csv", "study must be the name of a CSV file in runs/, not '../first.csv'."),
}


@pytest.mark.parametrize(("column", "value", "message"), [(key, *value) for key, value in LINES.items()], ids=LINES)
def test_lines_that_are_wrong(column: str, value: str, message: str, tmp_path: Path, refused: Refused) -> None:
    line = list(FIRST)
    line[COLUMNS.index(column)] = value
    assert message in refused(write(tmp_path, (line, BASE)))


def test_dates_are_written_in_one_way_and_in_order(tmp_path: Path, refused: Refused) -> None:
    line = ("cpu", "20261129", *SECOND[2:])
    assert "not '20261129'" in refused(write(tmp_path, (FIRST, BASE), (line, [*BASE, *BETTER])))
    line = ("cpu", "2026-11-27", *SECOND[2:])
    said = refused(write(tmp_path, (FIRST, BASE), (line, [*BASE, *BETTER])))
    assert "2026-11-27 is earlier than that of the previous record, 2026-11-28." in said


def test_files_that_cannot_be_read(tmp_path: Path, refused: Refused) -> None:
    assert "records.csv cannot be read" in refused(tmp_path)
    write(tmp_path, (FIRST, BASE), columns=COLUMNS[::-1])
    assert f"records.csv must have the columns {','.join(COLUMNS)}." in refused(tmp_path)
    write(tmp_path, (FIRST, BASE))
    runs = tmp_path / "runs" / "first.csv"
    whole = runs.read_text()
    damaged = {
        b"": "must have the columns arm,seed,",
        whole.replace("outcome", "result").encode(): "must have the columns arm,seed,outcome",
        whole.replace("6000,", "", 1).encode(): "line 2, has 11 values instead of 12.",
        b"\xff" + whole.encode(): "cannot be read: 'utf-8' codec",
        (whole + '"').encode(): "cannot be read: unexpected end of data",
    }
    for content, message in damaged.items():
        runs.write_bytes(content)
        said = refused(tmp_path)
        assert "line 2 (first): first.csv" in said
        assert message in said
    runs.unlink()
    assert "first.csv cannot be read" in refused(tmp_path)


def test_the_table_in_the_readme_is_that_of_the_records(capsys: pytest.CaptureFixture[str]) -> None:
    """The script itself, on the records that are published."""
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(SPEEDRUN / "check.py"), run_name="__main__")
    printed = capsys.readouterr()
    assert ended.value.code == 0, printed.err
    assert f"<!-- records -->\n\n{printed.out}\n<!-- end of records -->" in README


def test_the_cpu_track_has_a_record() -> None:
    tracks = [line.partition(",")[0] for line in (SPEEDRUN / "records.csv").read_text().splitlines()[1:]]
    assert "cpu" in tracks


@pytest.mark.parametrize(("track", "seconds", "recipe"), [("cpu", 2400, "own-images-cpu"), ("gpu", 600, "own-images")])
def test_the_study_of_a_track_trains_its_recipe(track: str, seconds: int, recipe: str) -> None:
    study = load_study(SPEEDRUN / f"{track}.yaml")
    assert (study.seconds, study.seeds, study.resolution) == (seconds, (0, 1, 2, 3, 4), None)
    assert (study.train, study.val) == ("imagenette/train-*.parquet", "imagenette/val-*.parquet")
    (flags,) = study.arms.values()
    assert configure(shlex.split(f"{study.common} {flags}")) == configure(
        ["--config", recipe, "--data.source", "imagenette/train-*.parquet"]
    )


def test_the_studies_in_the_readme_can_be_read(tmp_path: Path) -> None:
    files = re.findall(r"ijepa (study (\S+) --out [\w/-]+)", README)
    assert [Path(file).name for _, file in files] == ["cpu.yaml", "gpu.yaml"]
    for command, file in files:
        assert (SPEEDRUN.parents[1] / file).is_file()
        parse(shlex.split(command))
    (example,) = re.findall(r"```yaml\n(.*?)```", README, re.DOTALL)
    path = tmp_path / "held-out.yaml"
    path.write_text(re.sub("^   ", "", example, flags=re.MULTILINE))
    study = load_study(path)
    assert len(study.arms) == 2
    for flags in study.arms.values():
        configure(shlex.split(f"{study.common} {flags}"))
