"""Images in WebDataset tar shards."""

from __future__ import annotations

import json
import logging
import os
import tarfile
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ijepa_enhanced.data.sources.base import CLASSES, EXTENSIONS, FileSource, fingerprint_of, number_labels
from ijepa_enhanced.data.sources.folder import HEIC
from ijepa_enhanced.errors import SourceError, UnreadableImage

logger = logging.getLogger(__name__)


class TarSource(FileSource):
    """The images of WebDataset shards: uncompressed tar files whose members belong together up to the first dot.

    Labels are the members `KEY.cls`, each a class number from 0 or a class name, or where no shard has any, `cls` or
    else `label` in the members `KEY.json`. The names are the lines of `classes.txt` beside the shards; without it,
    class names are numbered in the order of the alphabet.

    Args:
        shards: the tar files.
        name: what the user called them.
        label: the key of the members `KEY.json` that holds the labels, instead of all these.

    Raises:
        SourceError: a shard is no tar file, there is no image in any, a label is not a class, or no image has a class
            under the key `label`.
    """

    def __init__(self, shards: list[Path], name: str, label: str | None = None) -> None:
        self.name = name
        self.shards = shards
        self.label = label
        self.keys = []
        root = os.path.commonpath([shard.parent for shard in shards])
        self.shard_names = [shard.relative_to(root).as_posix() for shard in shards]
        extents: list[tuple[int, int, int]] = []
        written: list[str | None] = []
        found = [_scan_tar(shard, label) for shard in shards]
        # Of one kind for all images: the two may not mean the same.
        kind = ".cls" if any(shard.labels[".cls"] for shard in found) else ".json"
        for number, shard in enumerate(found):
            for member, offset, size in shard.images:
                self.keys.append(f"{self.shard_names[number]}:{member}")
                extents.append((number, offset, size))
                written.append(shard.labels[kind].get(_sample(member)) or None)
        if not extents:
            raise SourceError(f"No images in {name}. Members must end in {', '.join(EXTENSIONS)}.")
        self.extents = np.array(extents, dtype=np.int64)
        if label is not None and not any(written):
            first = next((shard.first_json for shard in found if shard.first_json is not None), None)
            if first is None:
                raise SourceError(f"{name}: there are no members KEY.json to take labels from.")
            raise SourceError(
                f"{name}: no image has a class, a whole number from 0 or a name, under '{label}' of its member "
                f"KEY.json. The keys of the first of these are: {', '.join(sorted(first)) or 'none'}."
            )
        if any(label is not None for label in written):
            listed = Path(root, CLASSES)
            try:
                names = listed.read_text(encoding="utf-8").splitlines() if listed.is_file() else None
            except UnicodeDecodeError as error:
                raise SourceError(f"{listed} is not text in UTF-8.") from error
            self.labels, self.classes = number_labels(written, names, name)

    def _read(self, row: int, limit: int = -1) -> bytes:
        shard, offset, size = self.extents[row].tolist()
        with open(self.shards[shard], "rb") as file:
            present = max(0, os.fstat(file.fileno()).st_size - offset)
            if present < size:
                raise UnreadableImage(f"cut off: its shard ends after {present:,} of its {size:,} bytes")
            file.seek(offset)
            return file.read(size if limit < 0 else min(size, limit))

    def _length(self, row: int) -> int:
        return int(self.extents[row, 2])

    def fingerprint(self) -> str:
        """See `Source`."""
        # Which images lack a label depends on the key.
        key = "" if self.label is None else f"\0{self.label}"
        return fingerprint_of(
            (f"{name}{key}", shard) for name, shard in zip(self.shard_names, self.shards, strict=True)
        )


def _sample(member: str) -> str:
    folder, slash, base = member.rpartition("/")
    return folder + slash + base.partition(".")[0]


def _json_values(data: bytes) -> dict[str, Any]:
    """The metadata of a sample."""
    try:
        values = json.loads(data)
    except (ValueError, RecursionError):
        return {}
    return values if isinstance(values, dict) else {}


def _json_label(values: dict[str, Any], keys: Iterable[str]) -> str | None:
    """The class number or name under the first of the keys that has one."""
    for label in map(values.get, keys):
        if (type(label) is int and label >= 0) or (isinstance(label, str) and label.strip()):
            return str(label).strip()
    return None


class _Shard(NamedTuple):
    """What lies in a tar file."""

    images: list[tuple[str, int, int]]
    """Name, offset and size of every image."""
    labels: dict[str, dict[str, str]]
    """By the extension of its member, the text of every label by sample."""
    first_json: list[str] | None
    """The keys of the first metadata, or None where no metadata were read."""


def _scan_tar(path: Path, label_key: str | None) -> _Shard:
    """Metadata are passed over from the first `.cls` on; with a `label_key` of theirs, every `.cls` is."""
    images: list[tuple[str, int, int]] = []
    labels: dict[str, dict[str, str]] = {".cls": {}, ".json": {}}
    first_json: list[str] | None = None
    names: set[str] = set()
    parts: list[str] = []
    try:
        with open(path, "rb") as file, tarfile.open(fileobj=file, mode="r:") as tar:
            with suppress(tarfile.ReadError):
                for member in filter(tarfile.TarInfo.isfile, tar):
                    extension = member.name.removeprefix(_sample(member.name)).lower()
                    if member.name in names:
                        raise SourceError(f"{path} has two members {member.name}. Give every sample a name of its own.")
                    names.add(member.name)
                    if extension in (*EXTENSIONS, *HEIC):
                        images.append((member.name, member.offset_data, member.size))
                    elif extension.endswith(EXTENSIONS):
                        parts.append(member.name)
                    elif extension == ".json" and not labels[".cls"]:
                        data = os.pread(file.fileno(), member.size, member.offset_data)
                        values = _json_values(data)
                        first_json = list(values) if first_json is None else first_json
                        label = _json_label(values, ("cls", "label") if label_key is None else (label_key,))
                        if len(data) == member.size and label is not None:
                            labels[extension][_sample(member.name)] = label
                    elif extension == ".cls" and label_key is None:
                        data = os.pread(file.fileno(), member.size, member.offset_data)
                        if len(data) == member.size:
                            labels[extension][_sample(member.name)] = data.decode(errors="replace").strip()
            # tarfile takes a damaged header for the end of the archive, which really is a block of zeros.
            if os.pread(file.fileno(), tarfile.BLOCKSIZE, tar.offset) != tarfile.NUL * tarfile.BLOCKSIZE:
                logger.warning("%s is cut off or damaged after %d images; any that follow are lost.", path, len(images))
    except tarfile.ReadError as error:
        raise SourceError(f"{path} is not an uncompressed tar file: {error}.") from error
    except OSError as error:
        raise SourceError(f"{path} cannot be read: {error.strerror}.") from error
    if parts:
        logger.warning(
            "Not taken for images, since the names of samples end at their first dot: %s%s in %s.",
            parts[0],
            f" and {len(parts) - 1} more" if len(parts) > 1 else "",
            path,
        )
    return _Shard(images, labels, first_json)
