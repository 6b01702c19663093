"""Stop a run by a signal without losing the current step."""

from __future__ import annotations

import os
import signal
import sys
from contextlib import suppress
from types import FrameType
from typing import Self

STDERR = 2
STOPPING = b"\nStopping after this step, then saving the run. Press Ctrl-C again to stop at once.\n"


class StopSignals:
    """A context in which SIGINT and SIGTERM only set `requested`. A second SIGINT (Ctrl-C) acts as usual.

    A second SIGTERM does not, because torchrun, Slurm and systemd can send several within milliseconds.

    Args:
        speaks: whether to answer Ctrl-C on stderr. A step can take a minute.
    """

    def __init__(self, speaks: bool = True) -> None:
        self.speaks = speaks and sys.stderr is not None  # if it is closed, its number may be that of another file

    def __enter__(self) -> Self:
        self.requested = False
        # The handlers to restore.
        self.before = {number: signal.signal(number, self._request) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def _request(self, number: int, _frame: FrameType | None) -> None:
        self.requested = True
        if self.speaks and number == signal.SIGINT:
            # Not by `print` or a logger: a handler can interrupt a write, and Python refuses to write to that file
            # again.
            with suppress(OSError):  # the pipe has no reader any more
                os.write(STDERR, STOPPING)
        if number == signal.SIGINT:  # if saving hangs, the same key stops the process
            signal.signal(number, self.before[signal.SIGINT])

    def __exit__(self, *_: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)
