"""The command line: results on stdout, progress and logs on stderr, exit code 0, 1 (failed) or 2 (bad request)."""

from __future__ import annotations

import io
import logging
import os
import select
import sys
import time
import traceback
from collections.abc import Sequence
from contextlib import suppress

from ijepa_enhanced.commands.flags import parse
from ijepa_enhanced.errors import RequestError, RunError, UserError

logger = logging.getLogger("ijepa_enhanced")

FIRST_RANK_SECONDS = 10.0
"""How much later than others the first rank of a machine may find a wrong request, when many import at once."""


def print_to_stderr(text: str) -> None:
    """Print a line if stderr can be written to: a full disk or a closed pipe behind it must not stop a run."""
    with suppress(OSError, ValueError):
        print(text, file=sys.stderr, flush=True)


class StderrHandler(logging.Handler):
    """Writes to what is stderr at that moment: a progress bar replaces it to stay below the messages."""

    def emit(self, record: logging.LogRecord) -> None:
        """Write one message."""
        print_to_stderr(self.format(record))


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # as stderr does: names of files may not be text
    debug = "--debug" in arguments
    logger.handlers = [StderrHandler()]  # not the root logger's: torch logs whole tracebacks of what we say in words
    logger.setLevel(logging.DEBUG if debug else logging.INFO)
    try:
        return run(arguments)
    except UserError as error:
        if isinstance(error, RequestError):
            let_first_rank_speak()
        return failure(error, str(error), error.exit_code, debug)
    except OSError as error:
        if isinstance(error, BrokenPipeError) and stdout_is_closed():
            # The reader, such as `head`, has what it wants. Python would complain again when it closes stdout.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 1
        message = f"{error.filename}: {error.strerror}." if error.filename and error.strerror else str(error)
        return failure(error, message, 1, debug)
    except KeyboardInterrupt as error:
        return failure(error, "Interrupted.", 1, debug)
    except Exception as error:
        report = "This is a bug in ijepa-enhanced. Run the command again with --debug and report the traceback."
        return failure(error, f"{type(error).__name__}: {error}\n{report}", 1, debug)


def stdout_is_closed() -> bool:
    """Return whether nobody reads stdout; other broken pipes, such as one to a worker, are errors to report."""
    poll = select.poll()
    with suppress(OSError, ValueError):  # stdout is no file
        poll.register(sys.stdout, 0)  # errors are reported in any case
    return bool(poll.poll(0))


def run(arguments: Sequence[str]) -> int:
    """Run the command that the arguments name, or print its help, and return the exit code.

    Raises:
        UserError: the request is wrong, or cannot be met.
    """
    if arguments[:1] == ["--version"]:
        print(f"ijepa {sys.modules['ijepa_enhanced'].__version__}")  # importing the package here would be a cycle
        return 0
    try:
        command, options = parse(arguments)
    except SystemExit:  # the help is printed
        return 0
    if not command.ranks:
        from ijepa_enhanced.distributed import is_one_of_many

        if is_one_of_many():
            raise RequestError(
                f"`ijepa {arguments[0]}` does not run under torchrun: only train, evaluate and embed do. Run it "
                "without torchrun."
            )
    try:
        return command.run(options)
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        advice = f", or {command.less_memory}" if command.less_memory else ""
        raise RunError(f"The GPU is out of memory. Close other programs that use the GPU{advice}.") from error


def is_out_of_memory(error: Exception) -> bool:
    """Whether a GPU had too little memory, told without importing torch."""
    return "torch" in sys.modules and isinstance(error, sys.modules["torch"].OutOfMemoryError)


def let_first_rank_speak() -> None:
    """Wait on all ranks of a machine but the first, which finds the same wrong request; then torchrun ends all."""
    if "TORCHELASTIC_RUN_ID" in os.environ and os.environ.get("LOCAL_RANK", "0") != "0":
        time.sleep(FIRST_RANK_SECONDS)


def failure(error: BaseException, message: str, code: int, debug: bool) -> int:
    """Print what went wrong, with a traceback only when asked for, and return the exit code."""
    if debug:
        traceback.print_exception(error)
    print_to_stderr(f"ijepa: {message}")
    return code
