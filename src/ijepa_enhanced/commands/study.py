"""`ijepa study`."""

from __future__ import annotations

from pathlib import Path

from rich.table import Table

from ijepa_enhanced.commands.flags import parse
from ijepa_enhanced.commands.options import StudyOptions
from ijepa_enhanced.commands.setup import print_json, print_table, share_cores, train_config
from ijepa_enhanced.errors import RequestError, RunError
from ijepa_enhanced.study.compare import summary
from ijepa_enhanced.study.config import load_study
from ijepa_enhanced.study.page import EXPLANATION, HEAD, cells, write_page
from ijepa_enhanced.study.run import run_study
from ijepa_enhanced.train.config import TrainConfig


def run(options: StudyOptions) -> int:
    """Run what is left of a study, print its table and write a page of its runs; return 1 if no run was scored."""
    study, folder = load_study(Path(options.file)), Path(options.out)
    try:
        rows = run_study(study, folder, configure)
    except KeyboardInterrupt as error:
        raise RunError("Interrupted. To continue, run the same command again.") from error
    table, lines = Table(*HEAD), summary(rows)
    for line in lines:
        table.add_row(*cells(line))
    print_table(table)
    for line in lines:
        print(f"{line['arm']}: {line['verdict']}")
    print("\n".join(EXPLANATION))
    page = write_page(study, rows, folder)
    for path in (folder / "study.csv", folder / "summary.csv", page):
        if path is not None:
            print(path)
    print_json(options, {"rows": [row._asdict() for row in rows]})
    return 0 if page is not None else 1


def configure(flags: list[str]) -> TrainConfig:
    """Return the configuration that flags of `ijepa train` ask for.

    Raises:
        RequestError: a flag is wrong, or is one that the study sets.
    """
    for flag in flags:
        name = flag.partition("=")[0]
        if name in ("--run", "--resume", "--seed", "--print-config", "--json"):
            instead = " Use the key `seeds` instead." if name == "--seed" else ""
            raise RequestError(f"{name} cannot be used in `arms` or `common` of a study.{instead}")
    _, options = parse(["train", *flags])
    config, _ = train_config(options)
    share_cores(config.data.workers)
    return config
