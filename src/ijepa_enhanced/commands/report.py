"""`ijepa report`."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from jsonargparse import ArgumentParser, Namespace

from ijepa_enhanced.commands import Command
from ijepa_enhanced.commands.setup import print_json
from ijepa_enhanced.config import find_config
from ijepa_enhanced.errors import RequestError
from ijepa_enhanced.train.config import TrainConfig
from ijepa_enhanced.train.saved import config_of_run
from ijepa_enhanced.visualize.report import write_report


def add_options(command: ArgumentParser) -> None:
    """The options of `ijepa report`."""
    command.add_argument("runs", type=str, nargs="+", metavar="RUN", help="one run, or several to compare")
    command.add_argument("--out", type=str, default=None, metavar="FILE", help="default, of one run: RUN/report.html")


def run(options: Namespace) -> int:
    """Write the page."""
    runs = [Path(run) for run in options.runs]
    if options.out is None and len(runs) > 1:
        raise RequestError("Several runs make one page: name it by --out FILE.")
    for run in runs:
        find_config(str(config_of_run(run)))
    page = Path(options.out) if options.out else runs[0] / "report.html"
    page.parent.mkdir(parents=True, exist_ok=True)
    write_report(runs, page, dataclasses.asdict(TrainConfig()))
    print(page)
    print_json(options, {"report": str(page)})
    return 0


COMMAND = Command("Write a run as one HTML page, or compare several.", add_options, run)
