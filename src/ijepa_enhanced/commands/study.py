"""`ijepa study`."""

from __future__ import annotations

from pathlib import Path

from jsonargparse import ArgumentParser, Namespace
from rich.console import Console
from rich.table import Table

from ijepa_enhanced.commands import Command
from ijepa_enhanced.commands.setup import print_json, share_cores, train_config
from ijepa_enhanced.errors import RequestError
from ijepa_enhanced.study.compare import summary
from ijepa_enhanced.study.config import load_study
from ijepa_enhanced.study.page import EXPLANATION, HEAD, cells, write_page
from ijepa_enhanced.study.run import run_study
from ijepa_enhanced.train.config import TrainConfig


def add_options(command: ArgumentParser) -> None:
    """The options of `ijepa study`."""
    command.add_argument("file", type=str, help="YAML: arms, val and what else docs/study.md names")
    command.add_argument("--out", type=str, required=True, metavar="DIR", help="folder for runs, table and page")


def run(options: Namespace) -> int:
    """Run a study, or the rest of one, print its table and compare its runs on a page; 1 where none was scored."""
    study, folder = load_study(Path(options.file)), Path(options.out)
    rows = run_study(study, folder, configure)
    table, lines = Table(*HEAD), summary(rows)
    for line in lines:
        table.add_row(*cells(line))
    Console(markup=False).print(table)
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


COMMAND = Command("Compare ways to train, at an equal budget and over several seeds.", add_options, run)
