"""Every error that a user can meet, and the exit code that each one ends a command with.

`RequestError` and its kind (exit code 2) say that a request cannot be met as it was made: the message names the option
or the value and says what to do. All others (exit code 1) say that something went wrong on the way.
"""

from __future__ import annotations

import difflib
from typing import ClassVar


class UserError(Exception):
    """An error whose message is for the user: what is wrong, and what to do."""

    exit_code: ClassVar[int] = 1


class RequestError(UserError, ValueError):
    """An option, a key or a value that cannot be used."""

    exit_code = 2


class SourceError(RequestError):
    """A source of images that does not exist or does not hold what is needed."""


class PlanError(RequestError):
    """No plan of packs can be made from these images and settings."""


class ResumeError(RequestError):
    """A checkpoint that does not fit the run that is to be resumed."""


class EncoderError(RequestError):
    """A folder that holds no encoder, or one that cannot be read."""


class RunError(UserError, RuntimeError):
    """A run that cannot continue."""


class RankError(UserError, RuntimeError):
    """Processes of one run that cannot work together."""


class CheckpointError(UserError, RuntimeError):
    """A checkpoint that cannot be written or read."""


class UnreadableImage(UserError, ValueError):  # noqa: N818 - it reads as what it is
    """An image that cannot be decoded; the message is the reason, in words."""


class ImageTooLarge(UnreadableImage):
    """An image with more pixels than are decoded."""


class MissingReader(UnreadableImage):
    """The image needs an extra of this package that is not installed."""


class NotFiniteError(UserError, ValueError):
    """Features or weights that are not finite; the message says where."""


def unknown(kind: str, name: str, known: list[str], file: str = "") -> str:
    """Return the message of a name that is not known.

    Args:
        kind: what it should be the name of, such as "option".
        name: what the user wrote.
        known: the names that would do.
        file: the file that has the name, if it is not on the command line.
    """
    where = f"{file}: " if file else ""
    if inside := [key for key in known if key.startswith(f"{name}.")]:
        return f"{where}'{name}' is a group of {kind}s. Set one of them, such as '{inside[0]}'."
    return f"{where}{'unknown' if file else 'Unknown'} {kind} '{name}'.{did_you_mean(name, known)}"


def first_sentence(error: BaseException) -> str:
    """Return the first sentence of a message."""
    return str(error).strip().partition("\n")[0].partition(". ")[0].removesuffix(".") + "."


def did_you_mean(name: str, known: list[str]) -> str:
    """Return a sentence with the known name closest to `name`, with all of them when they are few, or nothing."""
    last = _last_part(name)
    if same_last := [key for key in known if _last_part(key) == last]:
        close = difflib.get_close_matches(name, same_last, n=1, cutoff=0.0)
    elif not (close := difflib.get_close_matches(name, known, n=1)):
        match = difflib.get_close_matches(last, [_last_part(key) for key in known], n=1)
        close = [key for key in known if _last_part(key) in match]
    if close:
        return f" Did you mean '{close[0]}'?"
    return f" Available: {', '.join(known)}." if 0 < len(known) <= 12 else ""


def _last_part(name: str) -> str:
    """Return the part of a key or an option that tells most: `--data.workers` -> `workers`."""
    return name.rpartition(".")[2].removeprefix("--")
