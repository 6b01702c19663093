"""Images in WebDataset tar shards."""

from __future__ import annotations

import io
import itertools
import json
import os
import posixpath
import tarfile
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, cast

import numpy as np

from ijepa_enhanced.data.listing import Listing, Texts
from ijepa_enhanced.data.sources.base import CLASSES, HEAD, THREADS, FileSource, class_names, fingerprint_of
from ijepa_enhanced.data.sources.labels import label_text, number_labels
from ijepa_enhanced.data.sources.names import ARRAY, EXTENSIONS, count_kinds, hidden, note_of_raw
from ijepa_enhanced.errors import SourceError, UnreadableImage

CHUNK = 1 << 20
"""Bytes to read at once after the end of an archive, to see whether more follows. Also the largest header to read."""

LARGEST = 2**63 - 1
"""Largest offset in a file."""

DAMAGE = (tarfile.ReadError, ValueError, OverflowError, RecursionError)
"""Exceptions that tarfile raises for damaged headers. The last three come from huge numbers or long chains."""


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
    how_to_label = "Add a .cls file with the label next to each image, such as 0001.cls for 0001.jpg."

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
        beside = any(shard.members for shard in shards)
        for shard in shards:
            shard.settle_arrays(beside)
        # One kind for all images: the two kinds may not mean the same.
        kind = ".cls" if any(shard.labels[".cls"] for shard in shards) else ".json"
        written = [shard.labels[kind].get(_sample(member)) for shard in shards for member in shard.members]
        if not written:
            raise SourceError(f"No images in {self.name}. Members must end in {', '.join((*EXTENSIONS, ARRAY))}.")
        keys = Texts.of(
            f"{name}:{member}" for name, shard in zip(self.shard_names, shards, strict=True) for member in shard.members
        )
        location = np.array(
            [(number, *extent) for number, shard in enumerate(shards) for extent in shard.extents], dtype=np.int64
        )
        notes = tuple(note for shard in shards for note in shard.notes)
        notes += note_of_raw(itertools.chain(*(shard.others for shard in shards)), self.name)
        labels, classes = number_labels(written, class_names(self.root), self.name)
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
            raise SourceError(
                f"{self.name}: #label={self.label} needs a .json file for each image, but the shards contain none. "
                f"Remove #label={self.label}."
            )
        raise SourceError(
            f"{self.name}: no image has a label under the key '{self.label}' of its .json file. A label is a class "
            "name or an integer of at least 0. The keys of the first .json file are: "
            f"{', '.join(sorted(first)) or 'none'}."
        )

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
        """See `Source`; it knows size, time and some bytes of every shard and of `classes.txt`."""
        files = [*zip(self.shard_names, self.shards, strict=True), (CLASSES, Path(self.root, CLASSES))]
        return fingerprint_of(files)


class _Headers(io.BufferedReader):
    """A file that gives at most `CHUNK` bytes at once: tarfile asks for as many as a header says, which may be any."""

    def read(self, size: int | None = -1) -> bytes:
        return super().read(CHUNK if size is None or size < 0 else min(size, CHUNK))


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
    arrays: dict[str, tuple[int, int]] = field(default_factory=dict)
    """Offset and size in bytes of every NumPy array, by name."""
    others: list[str] = field(default_factory=list)
    """Names, without folders, of members that are neither images nor labels."""
    parts: list[str] = field(default_factory=list)
    """Images whose name goes on after the first dot, which are no samples of their own."""
    dangling: list[str] = field(default_factory=list)
    """Links to something that is not in the shard."""
    sparse: list[str] = field(default_factory=list)
    """Members of which only the parts that are not zero are stored."""
    notes: list[str] = field(default_factory=list)
    """What users must know about this shard."""

    def add(self, member: str, offset: int, size: int, file: BinaryIO) -> None:
        """Record a member by its name and where its bytes lie.

        Metadata is ignored after the first `.cls`; with a `label_key` every `.cls` is ignored.
        """
        sample = _sample(member)
        extension = member.removeprefix(sample).lower()
        *folders, name = member.split("/")
        if hidden(name) or any(hidden(folder) and folder not in (".", "..") for folder in folders):
            self.others.append(f".{name}")
        elif extension == ARRAY:
            self.arrays[member] = (offset, size)
        elif extension in EXTENSIONS:
            self.members.append(member)
            self.extents.append((offset, size))
        elif extension.endswith(EXTENSIONS):
            self.parts.append(member)
        elif extension == ".json" and not self.labels[".cls"]:
            data = _pread(file, size, offset)
            values = _json_values(data)
            self.first_json = [*values] if self.first_json is None else self.first_json
            label = _json_label(values, ("cls", "label") if self.label_key is None else (self.label_key,))
            if len(data) == size and label is not None:
                self.labels[extension][sample] = label
        elif extension == ".cls" and self.label_key is None:
            data = _pread(file, size, offset)
            if len(data) == size:
                self.labels[extension][sample] = data.decode(errors="replace").strip()
        elif extension not in (".cls", ".json"):
            self.others.append(name)

    def settle_arrays(self, beside: bool) -> None:
        """Use the arrays as images, unless the source has other images (`beside`)."""
        if beside:
            self.others += [member.rpartition("/")[2] for member in self.arrays]
        else:
            self.members, self.extents = [*self.arrays], [*self.arrays.values()]

    def note_what_is_missing(self, complete: bool) -> None:
        """Make notes of what a user may expect in the shard and that is not among its images."""
        if not complete:
            self.notes.append(
                f"{self.path} is truncated or damaged after {len(self.members)} images. "
                "Images after that point are skipped."
            )
        elif not self.members and not self.arrays:
            self.notes.append(f"{self.path} contains no images.")
        for reason, names in (
            ("WebDataset splits names at the first dot, so the extension must come right after it", self.parts),
            ("the target of a link must be in the shard", self.dangling),
            ("sparse files cannot be read", self.sparse),
        ):
            if names:
                more = f" and {len(names) - 1} more" if len(names) > 1 else ""
                self.notes.append(f"Skipped {names[0]}{more} in {self.path}: {reason}.")


def _scan_shard(path: Path, label_key: str | None) -> _Shard:
    shard = _Shard(path, label_key)
    try:
        with _Headers(open(path, "rb", buffering=0)) as file:
            size = os.fstat(file.fileno()).st_size
            if not size:
                shard.notes.append(f"{path} is an empty file.")
                return shard
            places: dict[str, tuple[int, int]] = {}
            links: dict[str, str] = {}
            # Archives may be appended to one another: after the zeros that end one, another may begin.
            start: int | None = 0
            complete = True
            while start is not None and complete:
                end = _scan_archive(shard, file, start, places, links)
                if start and end == start:
                    shard.notes.append(f"{path}: {size - start:,} bytes after the end of the archive are ignored.")
                    break
                # A damaged header looks to tarfile like the end of the archive, which is a block of zeros.
                complete = os.pread(file.fileno(), tarfile.BLOCKSIZE, end) == tarfile.NUL * tarfile.BLOCKSIZE
                start = _first_nonzero_block(file, end, size)
            for name in links:
                place = places.get(_followed(name, links))
                if place is None:
                    shard.dangling.append(name)
                else:
                    shard.add(name, *place, file)
            shard.note_what_is_missing(complete)
    except tarfile.ReadError as error:
        raise SourceError(
            f"{path} cannot be read as a tar file: {error}. If it is compressed, decompress it first."
        ) from error
    except OSError as error:
        raise SourceError(f"{path} cannot be read: {error.strerror}.") from error
    return shard


def _scan_archive(
    shard: _Shard, file: BinaryIO, start: int, places: dict[str, tuple[int, int]], links: dict[str, str]
) -> int:
    """Record the members of the archive at `start` of a shard, and return where it ends.

    If no archive begins at `start`, return `start`.

    Args:
        shard: to record them in.
        file: of the shard.
        start: in bytes.
        places: takes the offset and the bytes of each file by its name.
        links: takes the name of what each link points to, by the name of the link.
    """
    file.seek(start)
    try:
        tar = tarfile.open(fileobj=file, mode="r:")  # noqa: SIM115 - closed below
    except DAMAGE as error:
        if start:
            return start
        raise tarfile.ReadError(str(error)) from error
    with tar:
        while (member := _next(tar)) is not None:
            if not member.offset < tar.offset <= LARGEST:  # its size is negative, or more than a file can have
                return member.offset
            tar.members.clear()  # type: ignore[attr-defined]  # it would keep an object for every member
            if not (member.isfile() or member.islnk() or member.issym()):
                continue
            if member.name in places:
                raise SourceError(
                    f"{shard.path} contains {member.name} twice. Give every file in the shard a unique name."
                )
            if member.islnk():
                links[member.name] = member.linkname
            elif member.issym():
                folder = posixpath.dirname(member.name)
                links[member.name] = posixpath.normpath(posixpath.join(folder, member.linkname))
            elif member.issparse():
                shard.sparse.append(member.name)
            else:
                places[member.name] = member.offset_data, member.size
                shard.add(member.name, member.offset_data, member.size, file)
    return tar.offset


def _next(tar: tarfile.TarFile) -> tarfile.TarInfo | None:
    """Return the next member, or None at the end or where the archive is damaged."""
    try:
        return tar.next()
    except DAMAGE:
        return None


def _pread(file: BinaryIO, size: int, offset: int) -> bytes:
    """Return `size` bytes of a file from `offset` on, or as many as it has."""
    return os.pread(file.fileno(), min(size, max(0, os.fstat(file.fileno()).st_size - offset)), offset)


def _first_nonzero_block(file: BinaryIO, start: int, size: int) -> int | None:
    """Return the offset of the first block that is not all zeros, from `start` on, or None if all blocks are zeros."""
    for at in range(start, size, CHUNK):
        data = os.pread(file.fileno(), CHUNK, at)
        if rest := data.lstrip(tarfile.NUL):
            return at + (len(data) - len(rest)) // tarfile.BLOCKSIZE * tarfile.BLOCKSIZE
    return None


def _followed(name: str, links: dict[str, str]) -> str:
    """Return where a link leads in the end; a circle of links leads to one of them."""
    for _ in range(len(links)):
        if name not in links:
            break
        name = links[name]
    return name
