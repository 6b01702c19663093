"""Stop a run by a signal without losing the current step."""

from __future__ import annotations

import signal
from types import FrameType
from typing import Self


class StopSignals:
    """A context in which SIGINT and SIGTERM only set `requested`. A second SIGINT (Ctrl-C) acts as usual.

    A second SIGTERM does not, because torchrun, Slurm and systemd can send several within milliseconds.
    """

    def __enter__(self) -> Self:
        self.requested = False
        # The handlers to restore.
        self.before = {number: signal.signal(number, self._request) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def _request(self, number: int, _frame: FrameType | None) -> None:
        # Nothing is logged here: a handler can interrupt a write, and Python refuses to write to that file again.
        self.requested = True
        if number == signal.SIGINT:  # if saving hangs, the same key stops the process
            signal.signal(number, self.before[signal.SIGINT])

    def __exit__(self, *_: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)
