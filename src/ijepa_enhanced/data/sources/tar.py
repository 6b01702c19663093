"""Images in WebDataset tar shards."""

from __future__ import annotations

import io
import itertools
import json
import os
import tarfile
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, cast

import numpy as np

from ijepa_enhanced.data.listing import Listing, Texts
from ijepa_enhanced.data.sources.base import (
    CLASSES,
    HEAD,
    THREADS,
    FileSource,
    fingerprint_of,
)
from ijepa_enhanced.data.sources.labels import label_text, number_labels
from ijepa_enhanced.data.sources.names import EXTENSIONS, HEIC, count_kinds, hidden
from ijepa_enhanced.errors import SourceError, UnreadableImage


class TarSource(FileSource):
    """The images of WebDataset shards: uncompressed tar files whose members belong together up to the first dot.

    Labels are the members `KEY.cls`, each a class number from 0 or a class name, or where no shard has any, `cls` or
    else `label` in the members `KEY.json`. The names are the lines of `classes.txt` beside the shards; without it,
    class names are numbered in the order of the alphabet.

    Args:
        shards: the tar files.
        name: what the user called them.
        label: the key of the members `KEY.json` that holds the labels, instead of all these.
    """

    kind = "tar shards"

    def __init__(self, shards: list[Path], name: str, label: str | None = None) -> None:
        self.name = name
        self.shards = shards
        self.label = label
        self.root = os.path.commonpath([shard.parent for shard in shards])
        self.shard_names = [shard.relative_to(self.root).as_posix() for shard in shards]

    def make_listing(self) -> Listing:
        """See `Source`; the location of an image is the number of its shard, its offset and its bytes.

        Raises:
            SourceError: a shard is not a tar file, no shard holds an image, a label is not a class, or no image has a
                class under the key `label`.
        """
        with ThreadPoolExecutor(THREADS) as pool:
            shards = [*pool.map(partial(_scan_shard, label_key=self.label), self.shards)]
        # One kind for all images: the two kinds may not mean the same.
        kind = ".cls" if any(shard.labels[".cls"] for shard in shards) else ".json"
        written = [shard.labels[kind].get(_sample(member)) for shard in shards for member in shard.members]
        if not written:
            raise SourceError(f"No images in {self.name}. Members must end in {', '.join(EXTENSIONS)}.")
        keys = Texts.of(
            f"{name}:{member}" for name, shard in zip(self.shard_names, shards, strict=True) for member in shard.members
        )
        location = np.array(
            [(number, *extent) for number, shard in enumerate(shards) for extent in shard.extents], dtype=np.int64
        )
        notes = tuple(note for shard in shards for note in shard.notes)
        labels, classes = number_labels(written, self._class_names(), self.name)
        if labels is None:
            self._check_label(shards)
        passed_over = count_kinds(itertools.chain(*(shard.others for shard in shards)))
        return Listing(keys, labels, classes, location, notes=notes, passed_over=passed_over)

    def _check_label(self, shards: list[_Shard]) -> None:
        """Raise SourceError if the user named a key of the labels, which no image has."""
        if self.label is None:
            return
        first = next((shard.first_json for shard in shards if shard.first_json is not None), None)
        if first is None:
            raise SourceError(f"{self.name}: the shards contain no KEY.json with labels.")
        raise SourceError(
            f"{self.name}: no image has a class, a whole number from 0 or a name, under '{self.label}' of its member "
            f"KEY.json. The keys of the first of these are: {', '.join(sorted(first)) or 'none'}."
        )

    def _class_names(self) -> list[str] | None:
        """Return the lines of `classes.txt` without the empty ones at its end, or None if there is no such file."""
        path = Path(self.root, CLASSES)
        try:
            return path.read_text(encoding="utf-8-sig").rstrip().splitlines() if path.is_file() else None
        except UnicodeDecodeError as error:
            raise SourceError(f"{path} is not text in UTF-8.") from error

    def _place(self, row: int) -> tuple[Path, int, int]:
        """Return the shard, the offset and the bytes of an image."""
        assert self.listing.location is not None
        shard, offset, size = self.listing.location[row].tolist()
        return self.shards[shard], offset, size

    def _open(self, row: int) -> BinaryIO:
        shard, offset, size = self._place(row)
        file = open(shard, "rb", buffering=0)  # noqa: SIM115 - the member closes it
        present = max(0, os.fstat(file.fileno()).st_size - offset)
        if present < size:
            file.close()
            raise UnreadableImage(f"truncated: the shard ends after {present:,} of the image's {size:,} bytes")
        return cast(BinaryIO, io.BufferedReader(_Member(file, offset, size), HEAD))

    def _length(self, row: int) -> int:
        return self._place(row)[2]

    def identity(self) -> tuple[str, ...]:
        """See `Source`."""
        return ("tar", self.label or "", *(os.path.abspath(shard) for shard in self.shards))

    def fingerprint(self) -> str:
        """See `Source`; it knows size, time and first and last bytes of every shard and of `classes.txt`."""
        files = [*zip(self.shard_names, self.shards, strict=True), (CLASSES, Path(self.root, CLASSES))]
        return fingerprint_of(files)


class _Member(io.RawIOBase):
    """A part of a file as a file of its own."""

    def __init__(self, file: io.FileIO, start: int, size: int) -> None:
        self.file = file
        self.start = start
        self.size = size
        self.at = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self.at = max(0, offset + {os.SEEK_SET: 0, os.SEEK_CUR: self.at, os.SEEK_END: self.size}[whence])
        return self.at

    def readinto(self, buffer: Any) -> int:
        wanted = min(len(buffer), max(0, self.size - self.at))
        read = os.preadv(self.file.fileno(), [memoryview(buffer)[:wanted]], self.start + self.at)
        self.at += read
        return read

    def readall(self) -> bytes:
        data = os.pread(self.file.fileno(), max(0, self.size - self.at), self.start + self.at)
        self.at += len(data)
        return data

    def close(self) -> None:
        self.file.close()
        super().close()


def _sample(member: str) -> str:
    folder, slash, base = member.rpartition("/")
    return folder + slash + base.partition(".")[0]


def _json_values(data: bytes) -> dict[str, Any]:
    """Return the metadata of a sample."""
    try:
        values = json.loads(data)
    except (ValueError, RecursionError):
        return {}
    return values if isinstance(values, dict) else {}


def _json_label(values: dict[str, Any], keys: Iterable[str]) -> str | None:
    """Return the class number or name under the first of the keys that has one."""
    return next((label for label in map(label_text, map(values.get, keys)) if label is not None), None)


@dataclass
class _Shard:
    """What lies in a tar file."""

    path: Path
    label_key: str | None
    """The key of the metadata that holds the labels, if the user named one."""
    members: list[str] = field(default_factory=list)
    """The name of every image."""
    extents: list[tuple[int, int]] = field(default_factory=list)
    """Offset and bytes of every image."""
    labels: dict[str, dict[str, str]] = field(default_factory=lambda: {".cls": {}, ".json": {}})
    """By the extension of its member, the text of every label by sample."""
    first_json: list[str] | None = None
    """The keys of the first metadata; None if no metadata were read."""
    others: list[str] = field(default_factory=list)
    """Names, without folders, of members that are neither images nor labels."""
    parts: list[str] = field(default_factory=list)
    """Images whose name goes on after the first dot, which are no samples of their own."""
    notes: list[str] = field(default_factory=list)
    """What users must know about this shard."""

    def add(self, member: tarfile.TarInfo, file: BinaryIO) -> None:
        """Record a member.

        Metadata are passed over after the first `.cls`; with a `label_key` every `.cls` is passed over.
        """
        sample = _sample(member.name)
        extension = member.name.removeprefix(sample).lower()
        *folders, name = member.name.split("/")
        if hidden(name) or any(hidden(folder) and folder not in (".", "..") for folder in folders):
            self.others.append(f".{name}")
        elif extension in (*EXTENSIONS, *HEIC):
            self.members.append(member.name)
            self.extents.append((member.offset_data, member.size))
        elif extension.endswith(EXTENSIONS):
            self.parts.append(member.name)
        elif extension == ".json" and not self.labels[".cls"]:
            data = os.pread(file.fileno(), member.size, member.offset_data)
            values = _json_values(data)
            self.first_json = [*values] if self.first_json is None else self.first_json
            label = _json_label(values, ("cls", "label") if self.label_key is None else (self.label_key,))
            if len(data) == member.size and label is not None:
                self.labels[extension][sample] = label
        elif extension == ".cls" and self.label_key is None:
            data = os.pread(file.fileno(), member.size, member.offset_data)
            if len(data) == member.size:
                self.labels[extension][sample] = data.decode(errors="replace").strip()
        elif extension not in (".cls", ".json"):
            self.others.append(name)

    def note_what_is_missing(self, complete: bool) -> None:
        """Make notes of what a user may expect in the shard and that is not among its images."""
        if not complete:
            count = len(self.members)
            self.notes.append(
                f"{self.path} is truncated or damaged after {count} images. Images after that point are skipped."
            )
        if self.parts:
            more = f" and {len(self.parts) - 1} more" if len(self.parts) > 1 else ""
            self.notes.append(
                "These files are not read as images, because the key of a sample ends at the first dot: "
                f"{self.parts[0]}{more} in {self.path}."
            )


def _scan_shard(path: Path, label_key: str | None) -> _Shard:
    shard = _Shard(path, label_key)
    names: set[str] = set()
    try:
        with open(path, "rb") as file, tarfile.open(fileobj=file, mode="r:") as tar:
            with suppress(tarfile.ReadError):
                while (member := tar.next()) is not None:
                    tar.members.clear()  # type: ignore[attr-defined]  # it would keep an object for every member
                    if not member.isfile():
                        continue
                    if member.name in names:
                        raise SourceError(f"{path} has two members {member.name}. Give every sample a name of its own.")
                    names.add(member.name)
                    shard.add(member, file)
            # A damaged header looks to tarfile like the end of the archive, which is a block of zeros.
            end = os.pread(file.fileno(), tarfile.BLOCKSIZE, tar.offset)
            shard.note_what_is_missing(complete=end == tarfile.NUL * tarfile.BLOCKSIZE)
    except tarfile.ReadError as error:
        raise SourceError(f"{path} is not an uncompressed tar file: {error}.") from error
    except OSError as error:
        raise SourceError(f"{path} cannot be read: {error.strerror}.") from error
    return shard
