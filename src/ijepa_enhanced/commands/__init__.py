"""The commands of `ijepa`, one file each: what it is for, its options, and what it does."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from jsonargparse import ArgumentParser, Namespace


@dataclass(frozen=True)
class Command:
    """One command."""

    purpose: str
    """One line of help."""
    add_options: Callable[[ArgumentParser], None]
    run: Callable[[Namespace], int]
    """From its options to the exit code."""
