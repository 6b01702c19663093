"""Logs of a run: JSON lines, TensorBoard if it is installed, and a progress bar."""

from __future__ import annotations

import json
import os
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any, Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Column

try:
    from torch.utils.tensorboard import SummaryWriter
except ImportError:  # comes with the extra `plots`
    SummaryWriter = None  # type: ignore[assignment, misc]

PLAIN_SECONDS = 10.0
"""Seconds between lines of progress when stderr is not a terminal."""


class RunLog:
    """The log of a run: it appends lines to `log.jsonl` and values to TensorBoard.

    Args:
        folder: of the run.
        step: the step that the run continues from. TensorBoard hides the values that it has of later steps.
        offset: length of `log.jsonl`, in bytes, when the checkpoint was saved. The rest is cut off, because those steps
            run again.
    """

    def __init__(self, folder: Path, step: int, offset: int) -> None:
        self.file = (folder / "log.jsonl").open("ab")
        self.file.truncate(offset)
        self.board = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1) if SummaryWriter else None  # type: ignore[truthy-function]

    def write(self, step: int, values: dict[str, float]) -> None:
        """Write one line: the step and its values."""
        self.file.write(json.dumps({"step": step, **values}).encode() + b"\n")
        self.file.flush()  # so that a reader sees the line now
        if self.board:
            for name, value in values.items():
                self.board.add_scalar(name, value, step)

    def sync(self) -> int:
        """Flush the log to disk, and return its length in bytes."""
        os.fsync(self.file.fileno())
        if self.board:
            self.board.flush()
        return self.file.tell()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()
        if self.board:
            self.board.close()


def read_log(folder: Path) -> list[dict[str, Any]]:
    """Return the lines of a run's `log.jsonl`, if there is one, without a last line that was cut off."""
    path = folder / "log.jsonl"
    text = path.read_text() if path.exists() else ""
    return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]


class ProgressBar:
    """Progress of a run, on stderr: a bar on a terminal, else a line every `PLAIN_SECONDS`.

    Args:
        total: steps of the run.
        done: steps done before this process started.
    """

    def __init__(self, total: int, done: int) -> None:
        self.total = total
        self.started, self.start = time.monotonic(), done
        self.last_line = self.started
        console = Console(file=sys.stderr)
        text = TextColumn("{task.description}", table_column=Column(ratio=1))  # wraps on a narrow terminal
        self.bar = Progress(
            MofNCompleteColumn(), BarColumn(10), text, TimeRemainingColumn(), console=console, expand=True
        )
        self.task = self.bar.add_task("", total=total, completed=done)
        self.plain = not console.is_terminal

    def update(self, done: int, text: str) -> None:
        """Show that `done` steps are done, and a `text` with losses and rates."""
        self.bar.update(self.task, completed=done, description=text)
        now = time.monotonic()
        if self.plain and (now - self.last_line >= PLAIN_SECONDS or done == self.total):
            # Seconds per step of this process, not counting the steps before it resumed.
            left = (now - self.started) / max(1, done - self.start) * (self.total - done)
            with suppress(OSError, ValueError):  # a run does not need its stderr, which may be a full disk or closed
                print(f"{done}/{self.total}  {text}  {left / 60:.1f} min left", file=sys.stderr, flush=True)
            self.last_line = now

    def __enter__(self) -> Self:
        if not self.plain:
            self.bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if not self.plain:
            with suppress(OSError, ValueError):
                self.bar.stop()
