"""Images that are files in a folder."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import NoReturn

import numpy as np

from ijepa_enhanced.data.sources.base import EXTENSIONS, FileSource, fingerprint_of
from ijepa_enhanced.errors import SourceError

HEIC = (".heic", ".heif")
"""Not read, but not passed over either: a folder of a phone's photos must not look empty."""


def is_image(name: str) -> bool:
    """Whether a file is taken for an image, by its name; hidden ones are not."""
    return name.lower().endswith((*EXTENSIONS, *HEIC)) and not name.startswith(".")


class PathSource(FileSource):
    """Images that are files of their own; keys are their paths from `root` on."""

    root: Path

    def _read(self, row: int, limit: int = -1) -> bytes:
        with open(self.root / self.keys[row], "rb") as file:
            return file.read(limit)

    def _length(self, row: int) -> int:
        return os.stat(self.root / self.keys[row]).st_size

    def fingerprint(self) -> str:
        """See `Source`."""
        return fingerprint_of((key, self.root / key) for key in self.keys)


class FolderSource(PathSource):
    """All images of a folder and the folders in it, links followed, hidden ones left out, by name.

    Where all lie in sub-folders, those are the classes, by name; deeper folders belong to the class they are in.

    Raises:
        SourceError: the folder cannot be listed or holds no image.
    """

    def __init__(self, folder: str | Path) -> None:
        self.name = str(folder)
        self.root = Path(folder)
        self.keys = sorted(self._scan())
        if not self.keys:
            raise SourceError(f"No images in {folder}. It must hold files that end in {', '.join(EXTENSIONS)}.")
        tops = [key.partition("/")[0] for key in self.keys]
        if all(top != key for top, key in zip(tops, self.keys, strict=True)):
            self.classes = sorted(set(tops))
            numbers = {name: number for number, name in enumerate(self.classes)}
            self.labels = np.array([numbers[top] for top in tops])

    def _scan(self) -> Iterable[str]:
        root = str(self.root)
        ways = {root: [os.path.realpath(root)]}  # the true paths of a folder and of all above it, down from the root
        for folder, subfolders, files in os.walk(root, onerror=cannot_list, followlinks=True):
            way = ways.pop(folder)
            for name in subfolders.copy():
                real = os.path.realpath(Path(folder, name))
                # A link to a folder on the way here, or above one, would be followed for ever.
                if name.startswith(".") or any(_holds(real, place) for place in way):
                    subfolders.remove(name)
                else:
                    ways[os.path.join(folder, name)] = [*way, real]
            for name in files:
                if is_image(name):
                    yield Path(folder, name).relative_to(self.root).as_posix()


def _holds(folder: str, path: str) -> bool:
    return path == folder or path.startswith(folder.rstrip("/") + "/")


def cannot_list(error: OSError) -> NoReturn:
    """Raise SourceError for a folder that cannot be listed."""
    raise SourceError(f"The folder {error.filename} cannot be listed: {error.strerror}.")
