"""Where images lie: folders, tar shards, lists of files and the built-in synthetic set; and `open_source`."""

from __future__ import annotations

import csv
import itertools
import json
import logging
import os
import re
import tarfile
from collections.abc import Iterable, Iterator
from contextlib import suppress
from glob import glob
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import numpy as np
from PIL import Image

from ijepa_enhanced.data import synthetic
from ijepa_enhanced.data.images import UnreadableImage
from ijepa_enhanced.data.mixed import MixedSource
from ijepa_enhanced.data.source import (
    CLASSES,
    EXTENSIONS,
    HEAD,
    PARTS,
    FileSource,
    Source,
    SourceError,
    fingerprint_of,
    number_labels,
)
from ijepa_enhanced.data.tables import Columns, is_saved, open_hub, open_parquet, open_saved

__all__ = ["HEAD", "FolderSource", "Source", "SourceError", "SyntheticSource", "TarSource", "open_source"]

logger = logging.getLogger(__name__)

LISTS = (".csv", ".jsonl")

HEIC = (".heic", ".heif")
"""Not read, but not passed over either: a folder of a phone's photos must not look empty."""


FOLDERS = (*PARTS, "validation")
"""What folders of parts are named."""


def is_image(name: str) -> bool:
    """Whether a file is taken for an image, by its name; hidden ones are not."""
    return name.lower().endswith((*EXTENSIONS, *HEIC)) and not name.startswith(".")


class _PathSource(FileSource):
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


class FolderSource(_PathSource):
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
        for folder, subfolders, files in os.walk(root, onerror=_cannot_list, followlinks=True):
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


class ListSource(_PathSource):
    """The images that a list names, in its order: CSV with the columns `path` and, if it likes, `label`, or JSONL.

    Paths are relative to the list. Labels are class numbers from 0 or class names, numbered in the order of the
    alphabet.

    Raises:
        SourceError: the list cannot be read, is damaged, has no column `path`, or is empty.
    """

    def __init__(self, path: Path) -> None:
        self.name = str(path)
        self.path = path
        self.root = path.parent
        try:
            with open(path, newline="", encoding="utf-8-sig") as file:
                images = list(_json_lines(file, self.name) if path.suffix == ".jsonl" else csv.DictReader(file))
        except UnicodeDecodeError as error:
            raise SourceError(f"{path} is not text in UTF-8.") from error
        except csv.Error as error:
            raise SourceError(f"{path} cannot be read: {error}.") from error
        except OSError as error:
            raise SourceError(f"{path} cannot be read: {error.strerror}.") from error
        if not images:
            raise SourceError(f"No images in {path}. Every line names one, after a first line path,label in CSV.")
        for number, image in enumerate(images, start=1):
            if not image.get("path"):
                named = ", ".join(str(name) for name in image)
                raise SourceError(f"Image {number} of {path} has no 'path', but {named}.")
        self.keys = [str(image["path"]) for image in images]
        written = [None if image.get("label") in (None, "") else str(image["label"]) for image in images]
        if any(label is not None for label in written):
            self.labels, self.classes = number_labels(written, None, self.name)

    def fingerprint(self) -> str:
        """See `Source`."""
        # The list says which images lack a label.
        return fingerprint_of([("", self.path), *((key, self.root / key) for key in self.keys)])


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


class SyntheticSource(Source):
    """The built-in synthetic images of one part, `train` or `val`.

    Raises:
        SourceError: there is no such part.
    """

    def __init__(self, part: str = "train") -> None:
        if part not in synthetic.IMAGES:
            raise SourceError(f"The synthetic images have the parts {' and '.join(synthetic.IMAGES)}, not '{part}'.")
        self.name = "synthetic"
        self.part = part
        rows = range(synthetic.IMAGES[part])
        self.keys = [f"{part}-{row:05d}" for row in rows]
        self.headers = np.array([synthetic.header(part, row) for row in rows])
        self.labels = self.headers[:, 2].copy()
        self.classes = list(synthetic.CLASSES)

    def read(self, row: int) -> bytes:
        """See `Source`."""
        return synthetic.render(self.part, row).pixels.tobytes()

    def length(self, row: int) -> int:
        """See `Source`."""
        height, width = self.size(row)
        return height * width * 3

    def restore(self, row: int, data: bytes) -> Image.Image:
        """See `Source`."""
        return Image.frombytes("RGB", self.size(row)[::-1], data)

    def size(self, row: int) -> tuple[int, int]:
        """See `Source`."""
        height, width, _ = self.headers[row].tolist()
        return height, width

    def fingerprint(self) -> str:
        """See `Source`."""
        return f"synthetic-{synthetic.VERSION}-{self.part}-{len(self.keys)}"


def open_source(spec: str, part: str = "train") -> Source:
    """The source that `spec` describes.

    Args:
        spec: `synthetic`; a folder of images, of tar shards, of Parquet files or of a data set that was saved with
            `save_to_disk`; tar or Parquet files, several as `train-{000..003}.tar` or `train-*.parquet`; a list of
            images, `.csv` or `.jsonl`; `hf://NAME` or `hf://NAME:SPLIT`. After Parquet and data sets
            `#image=COLUMN,label=COLUMN`, either or both, says what is in the columns, and `#config=NAME` after a data
            set of the Hub which of its configurations is meant; after tar shards, `#label=NAME` says which key of
            their members `KEY.json` holds the labels. Several of these with ` + ` between are mixed, see
            `MixedSource`, by the weights that follow them: `photos@2 + train-*.tar@1`.
        part: of the synthetic images; of a folder of files or a data set, the files or the split whose names begin
            with it.

    Raises:
        SourceError: there is no such source, or no image in it.
    """
    if " + " in spec and not Path(spec).expanduser().exists():
        mixed = [_split_weight(one.strip()) for one in spec.split(" + ")]
        return MixedSource([open_source(place, part) for place, _ in mixed], [weight for _, weight in mixed], spec)
    if spec == "synthetic":
        return SyntheticSource(part)
    if not spec:
        raise SourceError("The name of the images is empty: give a folder, tar shards, or 'synthetic'.")
    place, columns = _split_columns(spec)
    if place.startswith("hf://"):
        return open_hub(place, part, columns)
    if is_remote(place):
        raise SourceError(f"{place} is not on this machine: copy it by ijepa prepare {place} FOLDER, and take FOLDER.")
    path = Path(place).expanduser()
    if path.is_dir():
        if is_saved(path):
            return open_saved(path, place, part, columns)
        files = sorted(path.glob("*.tar")) or sorted(path.glob("*.parquet")) or sorted(path.glob("data/*.parquet"))
        files = _files_of(part, files, place)
        if not files:
            path = _folder_of(part, path)
        elif any(is_image(file.name) for file in path.iterdir()):
            logger.warning("%s holds image files beside %s: they are not taken.", place, files[0].name)
    else:
        files = _existing_files(str(path), spec)
    kind = files[0].suffix if files else ""
    if kind == ".parquet":
        return open_parquet(files, place, columns)
    if files and not (kind in LISTS and len(files) == 1):
        if "image" in columns:
            raise SourceError(f"{place} has no columns of images: after # comes label=NAME alone for tar shards.")
        return TarSource(files, spec, columns.get("label"))
    if columns:
        raise SourceError(f"There is nothing to choose in {place}: leave out what follows #.")
    return ListSource(files[0]) if files else FolderSource(path)


def is_remote(spec: str) -> bool:
    """Whether a source is to be copied before it is opened: `PROTOCOL://...`, but for the Hub's."""
    return re.match(r"[a-z0-9]+://", spec) is not None and not spec.startswith("hf://")


def _split_weight(spec: str) -> tuple[str, float]:
    """What stands before the `@` of a weight, which the names of files may have too, and the weight, or 1."""
    weighted = re.fullmatch(r"(.+)@(\d+\.?\d*|\.\d+)", spec)
    if weighted is None or Path(spec).expanduser().exists():
        return spec, 1.0
    place, weight = weighted.groups()
    if not float(weight):
        raise SourceError(f"The weight of {place} is 0: give it another, or leave {place} out.")
    return place, float(weight)


def _split_columns(spec: str) -> tuple[str, Columns]:
    """What stands before and after the `#` of columns or a key, which the names of files may have too."""
    place, hash_sign, chosen = spec.partition("#")
    if not hash_sign or Path(spec).expanduser().exists():
        return spec, {}
    columns = dict(column.partition("=")[::2] for column in chosen.split(","))
    allowed = {"image", "label"} | ({"config"} if place.startswith("hf://") else set())
    if not columns.keys() <= allowed:
        raise SourceError(
            f"{spec}: after # come image=COLUMN and label=COLUMN, either or both, with a comma between; "
            "for the Hub's data sets config=NAME too, for tar shards label=NAME alone."
        )
    return place, columns


def _files_of(part: str, files: list[Path], folder: str) -> list[Path]:
    """Those of a folder's files whose names begin with `part`, or all where they are not named after parts."""
    named = [file for file in files if file.name.startswith(part)]
    others = [other for other in PARTS if any(file.name.startswith(other) for file in files)]
    if not named and others:
        raise SourceError(
            f"{folder} has files for {' and '.join(others)}, and none for {part}: name those to take, "
            f"as {folder}/{others[0]}*{files[0].suffix}."
        )
    return named or files


def _folder_of(part: str, folder: Path) -> Path:
    """What lies in a folder for `part`, where all in it are folders named after parts; else the folder itself."""
    try:
        inside = sorted(entry for entry in folder.iterdir() if not entry.name.startswith("."))
    except OSError as error:
        _cannot_list(error)
    if not inside or not all(entry.is_dir() and entry.name in FOLDERS for entry in inside):
        return folder
    named = [entry for entry in inside if entry.name.startswith(part)]
    if not named:
        raise SourceError(f"{folder} has {' and '.join(entry.name for entry in inside)}, and nothing for {part}.")
    return named[0]


def _existing_files(pattern: str, spec: str) -> list[Path]:
    """The files of a pattern with braces and asterisks."""
    files = [Path(name) for expanded in expand(pattern) for name in sorted(glob(expanded)) or [expanded]]
    missing = [str(file) for file in files if not file.is_file()]
    if len(files) > 1 and missing:
        raise SourceError(
            f"{len(missing)} of the {len(files)} files of {spec} are missing, the first is {missing[0]}. "
            "Check the pattern, or fetch them."
        )
    if missing:
        raise SourceError(
            f"No file or folder {spec}. Images are a folder, tar shards such as train-{{000000..000002}}.tar, Parquet "
            "files, a list in CSV or JSONL, hf://NAME, or 'synthetic'."
        )
    return files


def _holds(folder: str, path: str) -> bool:
    return path == folder or path.startswith(folder.rstrip("/") + "/")


def _cannot_list(error: OSError) -> NoReturn:
    raise SourceError(f"The folder {error.filename} cannot be listed: {error.strerror}.")


def expand(pattern: str) -> list[str]:
    """The names of a pattern with {a,b} and {000..012} as a shell expands them."""
    parts = re.split(r"\{([^{}]*)\}", pattern)
    choices = [[part] if number % 2 == 0 else _choices(part) for number, part in enumerate(parts)]
    return ["".join(chosen) for chosen in itertools.product(*choices)]


def _choices(part: str) -> list[str]:
    counted = re.fullmatch(r"(\d+)\.\.(\d+)", part)
    if counted is None:
        return part.split(",")
    first, last = counted.groups()
    return [f"{number:0{len(first)}d}" for number in range(int(first), int(last) + 1)]


def _json_lines(lines: Iterable[str], name: str) -> Iterator[dict[str, Any]]:
    for number, line in enumerate(lines, start=1):
        if line.strip():
            try:
                values = json.loads(line)
            except ValueError as error:
                raise SourceError(f"Line {number} of {name} is not JSON: {error}.") from error
            if not isinstance(values, dict):
                raise SourceError(f'Line {number} of {name} is not of the form {{"path": ..., "label": ...}}.')
            yield values


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
