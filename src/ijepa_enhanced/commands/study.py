"""`ijepa study`."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentParser, Namespace
from rich.console import Console
from rich.table import Table

from ijepa_enhanced.commands import Command
from ijepa_enhanced.commands.setup import print_json, share_cores, train_config
from ijepa_enhanced.errors import RequestError
from ijepa_enhanced.study import load_study, run_study, summary
from ijepa_enhanced.train.config import TrainConfig
from ijepa_enhanced.visualize.report import write_report

NOTHING = "-"


def add_options(command: ArgumentParser) -> None:
    """The options of `ijepa study`."""
    command.add_argument("file", type=str, help="YAML: arms, val and what else docs/study.md names")
    command.add_argument("--out", type=str, required=True, metavar="DIR", help="folder for runs, table and page")


def run(options: Namespace) -> int:
    """Run a study, or the rest of one, print its table and compare its runs on a page; 1 where none was scored."""
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
        "Fall: of the watch's kNN, from its best look to its last."
    )
    Console().print(table)
    print(folder / "study.csv")
    scored = [folder / f"{row.arm}-{row.seed}" for row in rows if row.knn20 is not None]
    if scored:
        write_report(scored, folder / "report.html", dataclasses.asdict(TrainConfig()))
        print(folder / "report.html")
    print_json(options, {"rows": [row._asdict() for row in rows]})
    return 0 if scored else 1


def configure(flags: list[str]) -> TrainConfig:
    """The configuration that flags of `ijepa train` stand for.

    Raises:
        RequestError: a flag is wrong, or means a run and not a way to train.
    """
    from ijepa_enhanced.cli import parse

    for flag in flags:
        if flag.partition("=")[0] in ("--run", "--resume", "--seed", "--print_config", "--json"):
            raise RequestError(f"A study sets {flag.partition('=')[0]} itself: leave it out of its arms.")
    _, options = parse(["train", *flags])
    config = train_config(options)
    share_cores(config.data.workers)
    return config


def percent(line: dict[str, Any], name: str) -> str:
    """`12.3±0.4`, without its spread where there is none."""
    value, spread = line[name], line[f"{name}_spread"]
    if value is None:
        return NOTHING
    return f"{100 * value:.1f}" + ("" if spread is None else f"±{100 * spread:.1f}")


COMMAND = Command("Compare ways to train, at an equal budget and over several seeds.", add_options, run)
