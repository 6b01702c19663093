"""`ijepa study`."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from rich.table import Table

from ijepa_enhanced.commands.flags import parse
from ijepa_enhanced.commands.options import StudyOptions
from ijepa_enhanced.commands.setup import print_json, print_table, share_cores, train_config
from ijepa_enhanced.errors import RequestError
from ijepa_enhanced.study import load_study, run_study, summary
from ijepa_enhanced.train.config import TrainConfig
from ijepa_enhanced.visualize.report import write_report

NOTHING = "-"


def run(options: StudyOptions) -> int:
    """Run what is left of a study, print its table and write a page of its runs; return 1 if no run was scored."""
    study, folder = load_study(Path(options.file)), Path(options.out)
    rows = run_study(study, folder, configure)
    table = Table("arm", "runs", "steps", "kNN-20 (gain)", "linear (gain)", "RankMe", "fall")
    for line in summary(rows):
        kinds = [f"{line[kind]} {kind}" for kind in ("failed", "collapsed") if line[kind]]
        table.add_row(
            line["arm"],
            ", ".join([str(line["runs"]), *kinds]),
            str(line["steps"]),
            *(f"{percent(line, name)} ({percent(line, f'{name}_gain')})" for name in ("knn20", "linear")),
            NOTHING if line["rankme"] is None else f"{line['rankme']:.1f}",
            percent(line, "fall"),
        )
    table.caption = (
        "Percent: mean ± standard deviation over the seeds. Gain: over the random start.\n"
        "Fall: how far the monitor's kNN ended below its best."
    )
    print_table(table)
    print(folder / "study.csv")
    scored = [folder / f"{row.arm}-{row.seed}" for row in rows if row.knn20 is not None]
    if scored:
        write_report(scored, folder / "report.html", dataclasses.asdict(TrainConfig()))
        print(folder / "report.html")
    print_json(options, {"rows": [row._asdict() for row in rows]})
    return 0 if scored else 1


def configure(flags: list[str]) -> TrainConfig:
    """Return the configuration that flags of `ijepa train` ask for.

    Raises:
        RequestError: a flag is wrong, or is one that the study sets.
    """
    for flag in flags:
        if flag.partition("=")[0] in ("--run", "--resume", "--seed", "--print_config", "--json"):
            raise RequestError(f"A study sets {flag.partition('=')[0]} itself: leave it out of the arms.")
    _, options = parse(["train", *flags])
    config = train_config(options)
    share_cores(config.data.workers)
    return config


def percent(line: dict[str, Any], name: str) -> str:
    """Return a score as `12.3±0.4`, or without its spread if there is only one run."""
    value, spread = line[name], line[f"{name}_spread"]
    if value is None:
        return NOTHING
    return f"{100 * value:.1f}" + ("" if spread is None else f"±{100 * spread:.1f}")
