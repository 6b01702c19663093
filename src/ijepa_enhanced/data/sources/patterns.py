"""Names of files with {a,b}, {000..012}, *, ? and [ab]. A path that exists is never a pattern.

Patterns may be longer than a path can be. `os.path` says that there is no such file, and `pathlib` fails.
"""

from __future__ import annotations

import itertools
import math
import os
import re
from glob import escape, glob
from pathlib import Path

from ijepa_enhanced.errors import SourceError

MOST = 1_000_000
"""Files that a pattern with braces may stand for."""


def existing_files(pattern: str, spec: str) -> list[Path]:
    """Return the file of that name, or if there is none, the files that match it as a pattern.

    Args:
        pattern: a path, or a path with braces and asterisks.
        spec: what the user wrote, for messages.

    Raises:
        SourceError: files are missing.
    """
    files = [Path(pattern)]
    if not os.path.exists(files[0]):
        folder, rest = _split(files[0])
        files = [file for expanded in expand(rest) for file in _matches(folder / expanded)]
    missing = [str(file) for file in files if not os.path.isfile(file)]
    if len(files) > 1 and missing:
        raise SourceError(
            f"{len(missing)} of the {len(files)} files of {spec} {'is' if len(missing) == 1 else 'are'} missing, "
            f"starting with {missing[0]}. Check the pattern, or download what is missing."
        )
    if missing or not files:
        raise SourceError(
            f"No such file or folder: {spec}. A source of images can be a folder, tar shards such as "
            "train-{000000..000002}.tar, Parquet files, a CSV or JSONL list, hf://NAME, or 'synthetic'."
        )
    return files


def expand(pattern: str) -> list[str]:
    """Return the names that a shell makes of a pattern with {a,b} and {000..012}.

    Raises:
        SourceError: they are more than `MOST`.
    """
    parts = re.split(r"\{([^{}]*)\}", pattern)
    choices = [[part] if number % 2 == 0 else _choices(part, pattern) for number, part in enumerate(parts)]
    _check_count(math.prod(map(len, choices)), pattern)
    return ["".join(chosen) for chosen in itertools.product(*choices)]


def _check_count(count: int, pattern: str) -> None:
    """Raise SourceError if a pattern stands for more than `MOST` files, before their names are made."""
    if count > MOST:
        raise SourceError(f"The braces of {pattern} stand for more than {MOST:,} files. Check the numbers in them.")


def _split(path: Path) -> tuple[Path, str]:
    """Return the longest part of a path that is a folder, and the rest: only this can be a pattern."""
    folder = next((parent for parent in path.parents if os.path.isdir(parent)), path.parents[-1])
    return folder, str(path.relative_to(folder))


def _matches(path: Path) -> list[Path]:
    """Return the files of a pattern without braces, or the path itself if it exists or matches nothing."""
    if os.path.exists(path):
        return [path]
    folder, rest = _split(path)
    return [Path(name) for name in sorted(glob(os.path.join(escape(str(folder)), rest)))] or [path]


def _choices(part: str, pattern: str) -> list[str]:
    """Return what the part of a pattern between braces stands for."""
    counted = re.fullmatch(r"(\d{1,18})\.\.(\d{1,18})", part)
    if counted is None:
        return part.split(",")
    first, last = counted.groups()
    numbers = range(int(first), int(last) + 1)
    _check_count(len(numbers), pattern)
    return [f"{number:0{len(first)}d}" for number in numbers]
