"""Copies of remote sources, by `fsspec`: `https://`, `s3://`, `gs://` and whatever else it has a package for."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar

from ijepa_enhanced.data.sources.base import CLASSES
from ijepa_enhanced.data.sources.names import ARRAY, EXTENSIONS
from ijepa_enhanced.data.sources.patterns import expand
from ijepa_enhanced.data.sources.splits import SHARDS
from ijepa_enhanced.errors import SourceError
from ijepa_enhanced.files import replacing

logger = logging.getLogger(__name__)
_T = TypeVar("_T")

TRIES = 4
"""Of each file."""
FIRST_WAIT = 1.0
"""Seconds after the first try; twice as many after each one that follows."""


def fetch(spec: str, folder: Path, progress: Callable[[int, int], None] | None = None) -> str:
    """Copy a remote source, whole files only; those that an earlier call copied are kept.

    Args:
        spec: a folder, or tar or Parquet files with braces and asterisks, and columns, as `open_source` takes them.
            `classes.txt` beside tar shards comes along.
        folder: for the copies.
        progress: called with how many files there are here, and how many in all, after every one.

    Returns:
        What `open_source` takes for the copies.

    Raises:
        SourceError: there is no such source, it names a file outside of itself, or a file cannot be had after `TRIES`;
            the message says what is missing.
    """
    spec, hash_sign, columns = spec.partition("#")
    try:
        import fsspec

        system, path = fsspec.url_to_fs(spec)
    except (ImportError, ValueError) as error:
        raise SourceError(
            f"{spec} cannot be opened: {error}. For https, install 'ijepa-enhanced[data]'. For other protocols, "
            "install the package that the error names."
        ) from error
    files = _tried(lambda: _list(system, path), spec)
    if not files:
        raise SourceError(f"No images in {spec}. It must be a folder of images, or tar or Parquet files.")
    if _is_folder(path):
        root = f"{path.rstrip('/')}/" if path.strip("/") else path
    else:
        # Not `commonpath`, which makes one slash of the two in https://.
        common = os.path.commonprefix([file[: file.rfind("/") + 1] for file in files])  # noqa: RUF071
        root = common[: common.rfind("/") + 1]  # of protocols whose paths are relative, it may be empty
    names = [file.removeprefix(root) for file in files]
    for file, name in zip(files, names, strict=True):
        # What a server lists is not to be trusted: `..` would have the copy written anywhere.
        if not file.startswith(root) or name.startswith("/") or ".." in PurePosixPath(name).parts:
            raise SourceError(f"{spec} lists {file}, which is outside of it. Nothing was copied.")
        if not _is_folder(path) and ({*name} & {*"{,}#*?["} or " + " in name):
            raise SourceError(
                f"{file} cannot be read as a shard, because its name contains one of {{ , }} # * ? [ or ' + '. Rename "
                "it, or use its folder as the source."
            )
    for number, (file, name) in enumerate(zip(files, names, strict=True)):
        try:
            _copy(system, file, folder / name)
        except SourceError as error:
            raise SourceError(
                f"{error} {len(files) - number} of the {len(files)} files of {spec} "
                f"{'has' if len(files) - number == 1 else 'have'} not been copied. Run the same command again to "
                "continue."
            ) from error
        if progress:
            progress(number + 1, len(files))
    classes = f"{root}{CLASSES}"
    if files[0].endswith(".tar") and classes not in files and _tried(lambda: system.exists(classes), classes):
        _copy(system, classes, folder / CLASSES)
    copies = str(folder) if _is_folder(path) else f"{folder}/{{{','.join(names)}}}"
    return f"{copies}{hash_sign}{columns}"


def _is_folder(path: str) -> bool:
    return not path.endswith(SHARDS)


def _list(system: Any, path: str) -> list[str]:
    """The files of a folder that hold images, or those of a pattern."""
    if _is_folder(path):
        wanted = (*EXTENSIONS, ARRAY, *SHARDS, CLASSES)
        return sorted(file for file in system.find(path) if file.lower().endswith(wanted))
    return [
        file
        for expanded in expand(path)
        for file in (sorted(system.glob(expanded)) if "*" in expanded or "?" in expanded else [expanded])
    ]


def _copy(system: Any, file: str, path: Path) -> None:
    def copied() -> None:
        size = system.info(file).get("size")
        if path.exists() and size in (None, path.stat().st_size):
            return
        with replacing(path) as partial:
            system.get_file(file, str(partial))
            if size not in (None, partial.stat().st_size):
                raise OSError(f"received {partial.stat().st_size:,} of {size:,} bytes")

    path.parent.mkdir(parents=True, exist_ok=True)
    _tried(copied, file)


def _tried(action: Callable[[], _T], what: str, number: int = 1) -> _T:
    try:
        return action()
    except Exception as error:  # each of fsspec's packages has its own
        reason = "not found" if isinstance(error, FileNotFoundError) else f"{type(error).__name__}: {error}"
        if number == TRIES:
            raise SourceError(f"{what} could not be copied after {TRIES} attempts: {reason}.") from error
        wait = FIRST_WAIT * 2 ** (number - 1)
        logger.warning("%s: %s. Retrying in %g s.", what, reason, wait)
        time.sleep(wait)
    return _tried(action, what, number + 1)
