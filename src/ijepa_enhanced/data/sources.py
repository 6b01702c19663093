"""Where images lie: a folder, tar shards, or the built-in synthetic set, read at random by row number.

A source holds no open file, so it can be sent to worker processes, forked and used by threads.
"""

from __future__ import annotations

import hashlib
import itertools
import logging
import os
import re
import tarfile
from abc import ABC, abstractmethod
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ijepa_enhanced.data import synthetic
from ijepa_enhanced.data.images import UnreadableImage, open_image, upright_size

logger = logging.getLogger(__name__)

EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff")
"""Of files and members that are taken for images, in small or capital letters."""

HEAD = 64 * 1024
"""Bytes in which nearly every header ends: all that is read of an image to learn its size."""


class SourceError(ValueError):
    """The images cannot be found; the message says why and what to do."""


class Source(ABC):
    """N images in a fixed order."""

    name: str
    """What the user called it."""
    keys: list[str]
    """N names for messages, the same wherever the source lies."""
    labels: NDArray[np.int64] | None = None
    """int64 [N], or None; -1 where an image lacks the label that others have, which makes it unreadable."""
    classes: list[str] | None = None
    """The name of each label, or None."""

    @abstractmethod
    def open(self, row: int) -> Image.Image:
        """An image with its header read, to be decoded later.

        Raises:
            UnreadableImage: it cannot be read.
        """

    @abstractmethod
    def size(self, row: int) -> tuple[int, int]:
        """Height and width of the upright image in pixels, without decoding it.

        Raises:
            UnreadableImage: its header cannot be read.
        """

    @abstractmethod
    def fingerprint(self) -> str | None:
        """Changes when a file's name, size or time does; None where `size` is as fast as any cache of it."""


class _FileSource(Source):
    """Images that are bytes of files."""

    @abstractmethod
    def _read(self, row: int, limit: int = -1) -> bytes:
        """The first `limit` bytes of an image file, or all of it."""

    def open(self, row: int) -> Image.Image:
        """See `Source`."""
        return open_image(self._bytes(row))

    def size(self, row: int) -> tuple[int, int]:
        """See `Source`."""
        head = self._bytes(row, HEAD)
        try:
            return upright_size(open_image(head))
        except UnreadableImage:
            if len(head) < HEAD:
                raise
            return upright_size(self.open(row))

    def _bytes(self, row: int, limit: int = -1) -> bytes:
        try:
            return self._read(row, limit)
        except OSError as error:
            raise UnreadableImage(f"cannot be read: {error.strerror}") from error


class FolderSource(_FileSource):
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
        for folder, subfolders, files in os.walk(self.root, onerror=_cannot_list, followlinks=True):
            subfolders[:] = [name for name in subfolders if not name.startswith(".")]
            for name in files:
                if name.lower().endswith(EXTENSIONS) and not name.startswith("."):
                    yield Path(folder, name).relative_to(self.root).as_posix()

    def _read(self, row: int, limit: int = -1) -> bytes:
        with open(self.root / self.keys[row], "rb") as file:
            return file.read(limit)

    def fingerprint(self) -> str:
        """See `Source`."""
        return _fingerprint((key, self.root / key) for key in self.keys)


class TarSource(_FileSource):
    """The images of WebDataset shards: uncompressed tar files whose members belong together up to the first dot.

    Labels are the members `KEY.cls`, each a class number from 0 or a class name. The names are the lines of
    `classes.txt` beside the shards; without it, class names are numbered in the order of the alphabet.

    Args:
        shards: the tar files.
        name: what the user called them.

    Raises:
        SourceError: a shard is no tar file, there is no image in any, or a label is not a class.
    """

    def __init__(self, shards: list[Path], name: str) -> None:
        self.name = name
        self.shards = shards
        self.keys = []
        root = os.path.commonpath([shard.parent for shard in shards])
        self.shard_names = [shard.relative_to(root).as_posix() for shard in shards]
        extents: list[tuple[int, int, int]] = []
        written: list[str | None] = []
        for number, shard in enumerate(shards):
            images, labels = _scan_tar(shard)
            for member, offset, size in images:
                self.keys.append(f"{self.shard_names[number]}:{member}")
                extents.append((number, offset, size))
                written.append(labels.get(_sample(member)))
        if not extents:
            raise SourceError(f"No images in {name}. Members must end in {', '.join(EXTENSIONS)}.")
        self.extents = np.array(extents, dtype=np.int64)
        if any(label is not None for label in written):
            listed = Path(root, "classes.txt")
            names = listed.read_text(encoding="utf-8").splitlines() if listed.is_file() else None
            self.labels, self.classes = _number(written, names, name)

    def _read(self, row: int, limit: int = -1) -> bytes:
        shard, offset, size = self.extents[row].tolist()
        with open(self.shards[shard], "rb") as file:
            present = max(0, os.fstat(file.fileno()).st_size - offset)
            if present < size:
                raise UnreadableImage(f"cut off: its shard ends after {present:,} of its {size:,} bytes")
            if self.labels is not None and self.labels[row] < 0:
                raise UnreadableImage("no label: its .cls member is missing")
            file.seek(offset)
            return file.read(size if limit < 0 else min(size, limit))

    def fingerprint(self) -> str:
        """See `Source`."""
        return _fingerprint(zip(self.shard_names, self.shards, strict=True))


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

    def open(self, row: int) -> Image.Image:
        """See `Source`."""
        return Image.fromarray(synthetic.render(self.part, row).pixels)

    def size(self, row: int) -> tuple[int, int]:
        """See `Source`."""
        height, width, _ = self.headers[row].tolist()
        return height, width

    def fingerprint(self) -> None:
        """See `Source`."""


def open_source(spec: str, part: str = "train") -> Source:
    """The source that `spec` describes.

    Args:
        spec: `synthetic`, a folder of images or of tar shards, a tar file, or several as `train-{000..003}.tar`.
        part: of the synthetic images; of a folder, the shards whose names begin with it, if any do.

    Raises:
        SourceError: there is no such source, or no image in it.
    """
    if spec == "synthetic":
        return SyntheticSource(part)
    if not spec:
        raise SourceError("The name of the images is empty: give a folder, tar shards, or 'synthetic'.")
    path = Path(spec).expanduser()
    if path.is_dir():
        shards = sorted(path.glob("*.tar"))
        named = [shard for shard in shards if shard.name.startswith(part)]
        return TarSource(named or shards, spec) if shards else FolderSource(path)
    shards = [Path(name) for name in _expand(str(path))]
    missing = [str(shard) for shard in shards if not shard.is_file()]
    if len(shards) > 1 and missing:
        raise SourceError(
            f"{len(missing)} of the {len(shards)} shards of {spec} are missing, the first is {missing[0]}. "
            "Check the pattern, or fetch them."
        )
    if missing:
        raise SourceError(
            f"No file or folder {spec}. Images are a folder, tar shards such as train-{{000000..000002}}.tar, "
            "or 'synthetic'."
        )
    return TarSource(shards, spec)


def _cannot_list(error: OSError) -> None:
    raise SourceError(f"The folder {error.filename} cannot be listed: {error.strerror}.")


def _fingerprint(files: Iterable[tuple[str, Path]]) -> str:
    digest = hashlib.sha256()
    for name, path in files:
        try:
            status = os.stat(path)
            state = f"{status.st_size}\0{status.st_mtime_ns}"
        except OSError:
            state = "missing"
        digest.update(os.fsencode(f"{name}\0{state}\n"))
    return digest.hexdigest()


def _expand(pattern: str) -> list[str]:
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


def _sample(member: str) -> str:
    folder, slash, base = member.rpartition("/")
    return folder + slash + base.partition(".")[0]


def _scan_tar(path: Path) -> tuple[list[tuple[str, int, int]], dict[str, str]]:
    """Name, offset and size of every image, and the text of every label by its sample."""
    images: list[tuple[str, int, int]] = []
    labels: dict[str, str] = {}
    try:
        with open(path, "rb") as file, tarfile.open(fileobj=file, mode="r:") as tar:
            with suppress(tarfile.ReadError):
                for member in filter(tarfile.TarInfo.isfile, tar):
                    extension = member.name.removeprefix(_sample(member.name)).lower()
                    if extension in EXTENSIONS:
                        images.append((member.name, member.offset_data, member.size))
                    elif extension == ".cls":
                        data = os.pread(file.fileno(), member.size, member.offset_data)
                        if len(data) == member.size:
                            labels[_sample(member.name)] = data.decode(errors="replace").strip()
            # tarfile takes a damaged header for the end of the archive, which really is a block of zeros.
            if os.pread(file.fileno(), tarfile.BLOCKSIZE, tar.offset) != tarfile.NUL * tarfile.BLOCKSIZE:
                logger.warning("%s is cut off or damaged after %d images; any that follow are lost.", path, len(images))
    except tarfile.ReadError as error:
        raise SourceError(f"{path} is not an uncompressed tar file: {error}.") from error
    except OSError as error:
        raise SourceError(f"{path} cannot be read: {error.strerror}.") from error
    return images, labels


def _number(
    written: list[str | None], classes: list[str] | None, source: str
) -> tuple[NDArray[np.int64], list[str] | None]:
    """Labels as numbers, -1 where there is none, and the class names."""
    found = sorted({label for label in written if label is not None})
    if all(label.isdecimal() for label in found):
        numbers = {label: int(label) for label in found}
    else:
        classes = found if classes is None else classes
        numbers = {name: number for number, name in enumerate(classes)}
    for label in found:
        if classes is not None and numbers.get(label, len(classes)) >= len(classes):
            raise SourceError(f"{source} has the label '{label}', which is none of the {len(classes)} in classes.txt.")
    return np.array([-1 if label is None else numbers[label] for label in written], dtype=np.int64), classes
