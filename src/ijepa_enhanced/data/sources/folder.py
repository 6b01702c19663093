"""Images that are files in a folder."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, NoReturn

import numpy as np
from numpy.typing import NDArray

from ijepa_enhanced.data.listing import Listing, Names, Texts
from ijepa_enhanced.data.sources.base import HEAD, FileSource, fingerprint_of, sample
from ijepa_enhanced.data.sources.labels import label_text, numbered
from ijepa_enhanced.data.sources.names import (
    ARRAY,
    EXTENSIONS,
    count_kinds,
    hidden,
    is_array,
    is_image,
    is_split_folder,
    listed,
    note_of_raw,
    split_part,
)
from ijepa_enhanced.errors import SourceError


class PathSource(FileSource):
    """Images that are files of their own; keys are their paths below `root`."""

    root: Path

    def file_of(self, row: int) -> str:
        """See `Source`."""
        return os.path.abspath(self._path(row))

    def _path(self, row: int) -> str:
        return os.path.join(self.root, self.key(row))

    def _open(self, row: int) -> BinaryIO:
        return open(self._path(row), "rb", buffering=HEAD)

    def _length(self, row: int) -> int:
        return os.stat(self._path(row)).st_size

    def _sampled(self, keys: Names) -> list[tuple[str, str]]:
        """Return the name and path of some images, for `fingerprint_of`."""
        return [(keys[row], os.path.join(self.root, keys[row])) for row in sample(len(keys))]


class FolderSource(PathSource):
    """All images of a folder and its subfolders, sorted by name; links are followed, hidden files are ignored.

    If all images lie in subfolders, these are the classes, sorted by name; deeper folders belong to the class that they
    are in. Images in a folder such as `-1` have no label, see `label_text`.
    """

    kind = "folder"
    how_to_label = "Put the images of each class into a subfolder."

    def __init__(self, folder: str | Path) -> None:
        self.name = str(folder)
        self.root = Path(folder)

    def make_listing(self) -> Listing:
        """See `Source`."""
        found: list[str] = []
        others: list[str] = []
        times: dict[str, str] = {}
        for key in self._walk(times):
            (found if is_image(key.rpartition("/")[2]) else others).append(key)
        if not found:
            found, others = (
                [key for key in others if is_array(key.rpartition("/")[2]) is wanted] for wanted in (True, False)
            )
        keys = sorted(found)
        passed_over = count_kinds(key.rpartition("/")[2] for key in others)
        if not keys:
            there = f" It holds {listed(passed_over)}." if passed_over else ""
            endings = ", ".join((*EXTENSIONS, ARRAY))
            raise SourceError(f"No images in {self.name}. The folder must contain files that end in {endings}.{there}")
        self._check_splits(keys)
        tops = [key.partition("/")[0] for key in keys]
        empty = {folder.partition("/")[0] for folder in times if folder != "."} - set(tops)
        if empty:
            passed_over[f"folder{'s' * (len(empty) > 1)} without images"] = len(empty)
        classes = [top for top in set(tops) if label_text(top) is not None]
        outside = [key for top, key in zip(tops, keys, strict=True) if top == key]
        labels: NDArray[np.int64] | None = None
        notes = note_of_raw((key.rpartition("/")[2] for key in others), self.name)
        if classes and not outside:
            classes, numbers = numbered(classes)
            labels = np.array([numbers.get(top, -1) for top in tops], dtype=np.int64)
        elif classes and len(outside) < len(keys):
            more = f" and {len(outside) - 1:,} more are" if len(outside) > 1 else " is"
            notes += (
                f"The folders in {self.name} are not read as classes, because {outside[0]}{more} not in a folder.",
            )
        return Listing(
            Texts.of(keys),
            labels,
            None if labels is None else classes,
            folders=tuple(times),
            notes=notes,
            passed_over=passed_over,
            fingerprint=self._fingerprint(times, Texts.of(keys)),
        )

    def _check_splits(self, keys: list[str]) -> None:
        """Raise SourceError if folders of different splits lie in a class: it may be a data set with splits."""
        places = {tuple(key.split("/", 2)[:2]) for key in keys if key.count("/") > 1}
        inside = sorted((top, name) for top, name in places if is_split_folder(name))
        for top, split in inside:
            others = [name for place, name in inside if place == top and split_part(name) != split_part(split)]
            if others:
                raise SourceError(
                    f"{self.name} is ambiguous: {top}/{split} and {top}/{others[0]} are named after splits. For the "
                    f"splits of {top}, use {self.root / top}. If {top} is a class, move its images to {split}/{top} "
                    f"and {others[0]}/{top}."
                )

    def _walk(self, times: dict[str, str]) -> Iterator[str]:
        """Yield the keys of all files, and add every folder to `times`, relative to the root, see `_time`.

        Hidden folders count as files.
        """
        root = str(self.root)
        ways = {root: [os.path.realpath(root)]}  # the real paths of a folder and of all folders above it
        times["."] = self._time(".")
        for folder, subfolders, files in os.walk(root, onerror=cannot_list, followlinks=True):
            inside = Path(folder).relative_to(self.root).as_posix()
            way = ways.pop(folder)
            for name in subfolders.copy():
                real = os.path.realpath(Path(folder, name))
                # A link to a folder above would be followed for ever.
                if hidden(name) or any(_holds(real, place) for place in way):
                    subfolders.remove(name)
                    if hidden(name):
                        yield name
                else:
                    ways[os.path.join(folder, name)] = [*way, real]
                    key = name if inside == "." else f"{inside}/{name}"
                    times[key] = self._time(key)  # before it is listed: what is added later changes it
            for name in files:
                yield name if inside == "." else f"{inside}/{name}"

    def identity(self) -> tuple[str, ...]:
        """See `Source`."""
        return ("folder", os.path.abspath(self.root))

    def fingerprint(self) -> str:
        """See `Source`.

        It knows the time of every folder, which changes when a file in it is added, removed or renamed, and size, time
        and some bytes of up to `SAMPLE` images. In a larger source it misses images that are overwritten in
        place.
        """
        return self._fingerprint({folder: self._time(folder) for folder in self.listing.folders}, self.listing.keys)

    def _fingerprint(self, times: dict[str, str], keys: Names) -> str:
        lines = [*(f"{folder}\0{time}" for folder, time in times.items()), fingerprint_of(self._sampled(keys))]
        return hashlib.sha256("\n".join(lines).encode(errors="replace")).hexdigest()

    def _time(self, folder: str) -> str:
        """Return the time of a folder, or the reason why it has none."""
        try:
            return str(os.stat(self.root / folder).st_mtime_ns)
        except OSError as error:
            return str(error.strerror)


def _holds(folder: str, path: str) -> bool:
    return path == folder or path.startswith(folder.rstrip("/") + "/")


def cannot_list(error: OSError) -> NoReturn:
    """Raise SourceError for a folder that cannot be listed."""
    raise SourceError(f"The folder {error.filename} cannot be listed: {error.strerror}.")
