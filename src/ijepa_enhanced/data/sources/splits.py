"""Which of the files and folders in a folder a command reads: those of its part, `train`, `val` or `test`.

A part is never guessed: if a folder is ambiguous, the SourceError shows all ways to read it.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from ijepa_enhanced.data.sources.folder import cannot_list
from ijepa_enhanced.data.sources.names import SPLITS, hidden, is_image, is_split_folder, split_part, split_word
from ijepa_enhanced.errors import SourceError

SHARDS = (".tar", ".parquet")


def choose_split(names: Sequence[str], part: str, place: str, prefix: str) -> str:
    """Return the split of a data set that is for a part, or its only split if that is not named after a part.

    Args:
        names: of its splits.
        part: `train`, `val` or `test`.
        place: the data set, for messages.
        prefix: what names a split if its name follows, for messages.

    Raises:
        SourceError: no split is for this part, or several are.
    """
    found = [name for name in names if split_part(name) == part]
    exact = [name for name in found if name.lower() in SPLITS]
    if len(names) == 1 and split_word(names[0]) is None:
        return names[0]
    for only in (exact, found):
        if len(only) == 1:
            return only[0]
    listed = ", ".join(names)
    if found:
        raise SourceError(
            f"{place} has several splits for {part}: {', '.join(found)}. Choose one, for example {prefix}{found[0]}."
        )
    raise SourceError(
        f"{place} has the split{'s' * (len(names) > 1)} {listed}, but none for {part}. Choose one, for example "
        f"{prefix}{names[0]}."
    )


def choose_files(part: str, files: Sequence[Path], folder: str) -> tuple[list[Path], str]:
    """Return the shards of a folder that are for a part, all if none is named after a split, and words for the split.

    Raises:
        SourceError: no file is for this part, or the names are ambiguous.
    """
    words = {file: split_word(file.name) for file in files}
    splits = [word for word in SPLITS if word in words.values()]
    if not splits:
        return [*files], ""
    patterns = {word: _pattern([file for file in files if words[file] == word], word) for word in splits}
    others = [file.name for file in files if words[file] is None]
    if others and len({SPLITS[word] for word in splits}) == 1:
        raise SourceError(
            f"{folder} is ambiguous: '{splits[0]}' is the name of a split, but {_is(others)} not. To use only this "
            f"split, use {patterns[splits[0]]}. To use all files, use {files[0].parent}/*{files[0].suffix}."
        )
    own = [word for word in splits if SPLITS[word] == part]
    if not own:
        raise SourceError(
            f"{folder} has files for the split{'s' * (len(splits) > 1)} {' and '.join(splits)}, but none for {part}. "
            f"Choose the files, for example {patterns[splits[0]]}."
        )
    if len(own) > 1:
        raise SourceError(
            f"{folder} has several splits for {part}: {', '.join(own)}. Choose the files, for example "
            f"{patterns[own[0]]}."
        )
    return [file for file in files if words[file] == own[0]], _words(own[0], splits)


def choose_folder(part: str, folder: Path) -> tuple[Path, str, list[str]]:
    """Return the folder of a part, if a folder has folders named after splits: `train`, `Val`, `train2017`.

    Returns:
        That folder, words for the split, and the other folders with images; else the folder itself, "" and [].

    Raises:
        SourceError: no folder is for this part, or the names are ambiguous.
    """
    folders = folders_in(folder)
    splits = [name for name in folders if is_split_folder(name)]
    if not splits:
        return folder, "", []
    others = [name for name in folders if name not in splits and holds_images(folder / name)]
    if others and len({split_part(name) for name in splits}) == 1:
        raise SourceError(
            f"{folder} is ambiguous: '{splits[0]}' is the name of a split, but {_is(others)} not. To use only this "
            f"split, use {folder}/{splits[0]}. If all folders are classes, rename {splits[0]}."
        )
    own = [name for name in splits if split_part(name) == part]
    if not own:
        raise SourceError(
            f"{folder} has the split{'s' * (len(splits) > 1)} {' and '.join(splits)}, but none for {part}. Choose "
            f"one, for example {folder}/{splits[0]}."
        )
    if len(own) > 1:
        raise SourceError(
            f"{folder} has several splits for {part}: {', '.join(own)}. Choose one, for example {folder}/{own[0]}."
        )
    return folder / own[0], _words(own[0], splits), others


def folders_in(folder: Path) -> list[str]:
    """Return the names of the folders in a folder, sorted, without hidden ones.

    Raises:
        SourceError: the folder cannot be listed.
    """
    try:
        with os.scandir(folder) as entries:
            return sorted(entry.name for entry in entries if entry.is_dir() and not hidden(entry.name))
    except OSError as error:
        cannot_list(error)


def holds_images(folder: Path) -> bool:
    """Return whether there is an image or a shard in a folder or below it."""
    for _, folders, files in os.walk(folder, followlinks=False):
        folders[:] = [name for name in folders if not hidden(name)]
        if any(is_image(name) or (name.endswith(SHARDS) and not hidden(name)) for name in files):
            return True
    return False


def folders_of_images(folder: Path, shards: Sequence[Path]) -> list[str]:
    """Return the names of the folders of images beside shards, which are not read.

    Raises:
        SourceError: there are some, and no shard is named after a split: either can be meant.
    """
    places = {shard.parent for shard in shards}
    others = [name for name in folders_in(folder) if folder / name not in places and holds_images(folder / name)]
    if others and not any(split_word(shard.name) for shard in shards):
        listed = shards[0].name if len(shards) == 1 else f"{len(shards)} {shards[0].suffix} files"
        raise SourceError(
            f"{folder} is ambiguous: it contains {listed} and folders with images ({_some(others)}). For the shards, "
            f"use {shards[0].parent}/*{shards[0].suffix}. For the folders, move the {shards[0].suffix} files elsewhere."
        )
    return others


def _words(split: str, splits: Sequence[str]) -> str:
    others = [name for name in splits if name != split]
    return f"split {split}" + (f" (others: {', '.join(others)})" if others else "")


def _pattern(files: Sequence[Path], word: str) -> str:
    """Return what names these files, which all have the word in their names."""
    if len(files) == 1:
        return str(files[0])
    prefix = os.path.commonprefix([file.name for file in files])  # noqa: RUF071 - names, not paths
    return f"{files[0].parent}/{prefix if split_word(prefix) else f'*{word}'}*{files[0].suffix}"


def _some(names: Sequence[str]) -> str:
    """Return the first names as text, and how many more there are."""
    return f"{names[0]}, {names[1]} and {len(names) - 2} more" if len(names) > 2 else " and ".join(names)


def _is(names: Sequence[str]) -> str:
    return f"{_some(names)} {'is' if len(names) == 1 else 'are'}"
