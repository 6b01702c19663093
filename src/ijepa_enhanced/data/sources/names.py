"""What counts as an image, by the names of files; `data.decode` looks into them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

EXTENSIONS = (
    *(".jpg", ".jpeg", ".jpe", ".jfif"),
    *(".png", ".apng", ".webp", ".gif", ".avif"),
    *(".bmp", ".dib", ".tif", ".tiff", ".jp2", ".j2k"),
    *(".heic", ".heif"),
)
"""Endings of the names of image files and members, in small or capital letters."""

ARRAY = ".npy"
"""Ending of NumPy files. They count as images only if a source has no other images, because beside images they usually
hold masks or embeddings."""

RAW = (".arw", ".cr2", ".cr3", ".dng", ".nef", ".orf", ".pef", ".raf", ".rw2", ".srw")
"""Endings of raw photographs. They are not read, and a warning says so."""

SYSTEM = ("__macosx", "@eadir", "$recycle.bin", "system volume information", "thumbs.db", "desktop.ini")
"""Files and folders that macOS, storage devices and Windows add to folders, in small letters."""

SPLITS = {"train": "train", "val": "val", "valid": "val", "validation": "val", "dev": "val", "test": "test"}
"""The part that each whole word of a name means, in small or capital letters."""

KINDS = 8
"""Extensions that a line lists."""


def hidden(name: str) -> bool:
    """Return whether a file or folder is hidden (its name begins with a dot) or the system's."""
    return name.startswith(".") or name.lower() in SYSTEM


def is_image(name: str) -> bool:
    """Return whether the name of a file is that of an image; hidden files are not."""
    return name.lower().endswith(EXTENSIONS) and not hidden(name)


def is_array(name: str) -> bool:
    """Return whether a file is a NumPy array, judged by its name. Hidden files are not."""
    return name.lower().endswith(ARRAY) and not hidden(name)


def note_of_raw(names: Iterable[str], place: str) -> tuple[str, ...]:
    """Return a warning if the files of `place` include raw photographs, which are not read. Otherwise, return an empty
    tuple."""
    raw = [name for name in names if name.lower().endswith(RAW) and not hidden(name)]
    if not raw:
        return ()
    more = f" and {len(raw) - 1:,} more" if len(raw) > 1 else ""
    return (f"Skipped {raw[0]}{more} in {place}: raw photographs are not read. Convert them to JPEG or 16-bit TIFF.",)


def split_word(name: str) -> str | None:
    """Return the first whole word of a name that is a split: `train` in `train-000.tar`, but none in `trains.tar`."""
    return next((word for word in re.split(r"[^a-z]+", name.lower()) if word in SPLITS), None)


def split_part(name: str) -> str | None:
    """Return the part of a name that is a split, `train`, `val` or `test`; None for others."""
    word = split_word(name)
    return None if word is None else SPLITS[word]


def is_split_folder(name: str) -> bool:
    """Return whether a folder of this name holds a split: `train`, `Val`, `train2017`."""
    return re.fullmatch(r"[a-z]+[-_ ]?\d*", name.lower()) is not None and split_word(name) is not None


def listed(counts: Mapping[str, int]) -> str:
    """Return counts of files as text, the most common kinds first: "3 .txt, 1 hidden file or folder"."""
    order = sorted(counts, key=lambda kind: (-counts[kind], kind))
    more = [f"{len(order) - KINDS} more kinds"] if len(order) > KINDS else []
    return ", ".join([*(_counted(counts[kind], kind) for kind in order[:KINDS]), *more])


def _counted(count: int, kind: str) -> str:
    """Return a count with the words for its kind."""
    s = "" if count == 1 else "s"
    nouns = {"hidden": f"hidden file{s} or folder{s}", "without extension": f"file{s} without extension"}
    return f"{count:,} {nouns.get(kind, kind)}"


def count_kinds(names: Iterable[str]) -> dict[str, int]:
    """Return how many of some files have each extension; hidden and system files are counted as one kind."""
    counts: dict[str, int] = {}
    for name in names:
        stem, _, extension = name.rpartition(".")
        kind = "hidden" if hidden(name) else f".{extension.lower()}" if stem else "without extension"
        counts[kind] = counts.get(kind, 0) + 1
    return counts
