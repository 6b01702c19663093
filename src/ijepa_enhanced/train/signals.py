"""Stop a run by a signal without losing the current step."""

from __future__ import annotations

import logging
import signal
from types import FrameType
from typing import Self

logger = logging.getLogger(__name__)


class StopSignals:
    """A context in which the first SIGINT or SIGTERM only sets `requested`. A second signal acts as usual."""

    def __enter__(self) -> Self:
        self.requested = False
        # The handlers to restore.
        self.before = {number: signal.signal(number, self._request) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def _request(self, number: int, _frame: FrameType | None) -> None:
        self.requested = True
        logger.warning("%s: finishing this step, then saving.", signal.Signals(number).name)
        # If saving hangs, the same signal again stops the process.
        signal.signal(number, self.before[signal.Signals(number)])

    def __exit__(self, *_: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)
