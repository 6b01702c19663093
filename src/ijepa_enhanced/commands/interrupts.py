"""Ctrl-C while modules are imported.

Some packages turn a KeyboardInterrupt during their import into an ImportError with a long message, so it must not be
raised there.
"""

import os
import signal
from types import FrameType


def end_at_interrupt() -> None:
    """Let Ctrl-C end this process at once. Nothing must be written yet. Keep a handler that is not Python's own."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _end)


def raise_at_interrupt() -> None:
    """Undo `end_at_interrupt`: Ctrl-C raises KeyboardInterrupt."""
    if signal.getsignal(signal.SIGINT) is _end:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _end(number: int, frame: FrameType | None) -> None:
    os.write(2, b"ijepa: Interrupted.\n")
    os._exit(1)
