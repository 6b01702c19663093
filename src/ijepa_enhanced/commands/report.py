"""`ijepa report`."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from ijepa_enhanced.commands.options import ReportOptions
from ijepa_enhanced.commands.setup import print_json
from ijepa_enhanced.errors import RequestError
from ijepa_enhanced.files import make_folder
from ijepa_enhanced.train.config import TrainConfig
from ijepa_enhanced.visualize.report import write_report


def run(options: ReportOptions) -> int:
    """Write the page of one run, or of several."""
    runs = [Path(run) for run in options.runs]
    if options.out is None and len(runs) > 1:
        raise RequestError("A report of several runs needs an output file. Add --out FILE.")
    page = Path(options.out) if options.out else runs[0] / "report.html"
    if page.is_dir():
        raise RequestError(f"--out must be a file, such as {page}/report.html, but {page} is a folder.")
    make_folder(page.parent)
    write_report(runs, page, dataclasses.asdict(TrainConfig()))
    print(page)
    print_json(options, {"report": str(page)})
    return 0
