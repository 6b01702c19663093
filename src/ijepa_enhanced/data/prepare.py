"""Images re-encoded into tar shards, once, so that training reads small files out of few large ones.

The result depends on the source and the settings alone: neither the number of workers nor where a run was stopped and
went on changes a byte of it. `manifest.json` is the record of what is done, rewritten whenever a shard is complete.
"""

from __future__ import annotations

import fcntl
import hashlib
import io
import itertools
import json
import os
import tarfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypedDict

import numpy as np
import PIL
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from ijepa_enhanced.data.catalog import Catalog, open_catalog, report_notes
from ijepa_enhanced.data.decode import decode_whole
from ijepa_enhanced.data.loader import serve_the_parent
from ijepa_enhanced.data.sources.base import CLASSES, UNREAD, Source
from ijepa_enhanced.errors import RunError, SourceError, UnreadableImage
from ijepa_enhanced.files import make_folder, replacing

FORMAT = 1
"""Raised when a manifest means something else than before."""
MANIFEST = "manifest.json"


class Shard(TypedDict):
    """A shard in the manifest."""

    name: str
    images: int
    bytes: int
    sha256: str


class Manifest(TypedDict):
    """The content of `manifest.json`."""

    format: int
    source: str
    """Its name."""
    settings: dict[str, Any]
    """With the catalog's hash."""
    classes: str | None
    """SHA-256 of `classes.txt`, or None without that file."""
    shards: list[Shard]
    dropped: list[dict[str, str]]
    """Key and reason of each image that cannot be read."""
    complete: bool


def prepare(
    source: Source,
    folder: Path,
    max_resolution: int = 256,
    quality: int = 90,
    workers: int = 0,
    shard_size: int = 128,
    progress: Callable[[int, int], None] | None = None,
) -> Manifest:
    """Write a source's images as JPEG files into `images-000000.tar` and so on, or go on where that was stopped.

    A sample is `ROW.jpg`, `ROW.cls` with the label's number where there are labels, and `ROW.json` with the `key`,
    `height` and `width` of the image it was made of. What cannot be read is skipped and listed in the manifest.

    Args:
        source: the images.
        folder: created if it does not exist.
        max_resolution: larger images are shrunk to it; sqrt(height * width) in pixels.
        quality: of JPEG, 1 to 100.
        workers: processes that decode and encode; 0 does it in this one.
        shard_size: a shard is closed when it has as many megabytes.
        progress: called with how many images are done, and how many there are, after every one.

    Raises:
        SourceError: no image can be read, or the folder holds something else, or images prepared in another way.
        RunError: the disk or the network does not give an image. Calling this again continues.
    """
    catalog = open_catalog(source)
    report_notes(source)
    if not len(catalog.rows):
        raise SourceError(f"None of the {len(catalog.unreadable)} images of {source.name} can be read.")
    settings = {"images": catalog.hash, **settings_of(max_resolution, quality, shard_size)}
    manifest = _begin(source, catalog, folder, settings)
    shards, dropped = manifest["shards"], manifest["dropped"]
    done = sum(shard["images"] for shard in shards) + len(dropped) - len(catalog.unreadable)
    images: Iterator[torch.Tensor | str] = iter(
        DataLoader(
            _Encoded(source, catalog, max_resolution, quality),
            sampler=range(done, 0 if manifest["complete"] else len(catalog.rows)),
            batch_size=None,
            num_workers=workers,
            worker_init_fn=serve_the_parent,
        )
    )

    def kept() -> Iterator[tuple[int, bytes]]:
        """The images that can be read, with their position in the catalog; the others are noted."""
        for position, image in enumerate(images, start=done):
            if isinstance(image, str):
                if image.startswith(UNREAD):
                    raise RunError(f"{catalog.key(position)} {image}. Run the same command again to continue.")
                dropped.append({"key": catalog.key(position), "reason": image})
            else:
                yield position, image.numpy().tobytes()
            if progress:
                progress(position + 1, len(catalog.rows))

    encoded = kept()
    for first in encoded:
        path = folder / f"images-{len(shards):06d}.tar"
        with replacing(path) as partial:
            count = _write_shard(partial, catalog, itertools.chain([first], encoded), shard_size * 10**6)
            shards.append(
                {"name": path.name, "images": count, "bytes": partial.stat().st_size, "sha256": _hash(partial)}
            )
        _save(manifest, folder)
    if not manifest["complete"]:
        manifest["complete"] = True
        _save(manifest, folder)
    return manifest


def settings_of(max_resolution: int, quality: int, shard_size: int) -> dict[str, Any]:
    """Return what the content of shards depends on besides the images."""
    return {
        "max_resolution": max_resolution,
        "quality": quality,
        "shard_size": shard_size,
        "pillow": PIL.__version__,
    }


def begun(folder: Path, settings: dict[str, Any]) -> Manifest | None:
    """Return the manifest of what was prepared in a folder, or None if it is empty or does not exist.

    Raises:
        SourceError: the folder holds something else, or images prepared with other settings.
    """
    if (folder / MANIFEST).exists():
        manifest = _load(folder)
        for name, value in settings.items():
            before = manifest["settings"].get(name)
            if before != value:
                shown = "Pillow" if name == "pillow" else f"--{name.replace('_', '-')}"
                how = "from other images" if name == "images" else f"with {shown} {before}, not {value}"
                raise SourceError(
                    f"{folder} already contains shards that were prepared {how}. Use another output folder, or delete "
                    f"{folder}."
                )
        return manifest
    if folder.exists() and (found := next((path for path in folder.iterdir() if not path.name.startswith(".")), None)):
        raise SourceError(
            f"{folder} is not empty (it contains {found.name}) and was not made by `ijepa prepare`. Use an empty or a "
            "new output folder."
        )
    return None


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Make a folder, and keep other processes from preparing images in it at the same time.

    Raises:
        SourceError: another process does so.
        RequestError: the folder cannot be created.
    """
    make_folder(folder)
    lock = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):  # the file system has no locks
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise SourceError(
                    f"Another ijepa prepare is writing to {folder}. Wait until it ends, or name another folder."
                ) from error
        yield
    finally:
        os.close(lock)


def check(folder: Path) -> list[str]:
    """What is wrong with a folder that `prepare` made, a sentence each; every byte of it is read.

    Raises:
        SourceError: `prepare` did not make it.
    """
    manifest = _load(folder)
    problems = []
    if not manifest["complete"]:
        problems.append("The folder is incomplete. Run `ijepa prepare` with the same arguments to continue.")
    hashes = {shard["name"]: shard["sha256"] for shard in manifest["shards"]}
    if manifest["classes"] is not None:
        hashes[CLASSES] = manifest["classes"]
    for name, expected in hashes.items():
        try:
            if _hash(folder / name) != expected:
                problems.append(f"{name} does not match its checksum.")
        except OSError as error:
            problems.append(f"{name} cannot be read: {error.strerror}.")
    return problems


class _Encoded(Dataset[torch.Tensor | str]):
    """The images of a catalog as JPEG files, uint8 [bytes], or the reason why an image cannot be read."""

    def __init__(self, source: Source, catalog: Catalog, max_resolution: int, quality: int) -> None:
        self.source = source
        self.rows = catalog.rows
        self.max_resolution = max_resolution
        self.quality = quality

    def __getitem__(self, position: int) -> torch.Tensor | str:
        try:
            pixels = decode_whole(self.source.open(int(self.rows[position])), self.max_resolution)
        except UnreadableImage as error:
            return str(error)
        buffer = io.BytesIO()
        Image.fromarray(pixels.round().clip(0, 255).astype(np.uint8)).save(buffer, "JPEG", quality=self.quality)
        return torch.frombuffer(buffer.getbuffer(), dtype=torch.uint8)


def _begin(source: Source, catalog: Catalog, folder: Path, settings: dict[str, Any]) -> Manifest:
    """The manifest of what is done already, and a folder without what a killed run left half-written."""
    make_folder(folder)
    for partial in folder.glob(".*.partial"):
        partial.unlink()
    names = None if catalog.classes is None else b"".join(map(_line, catalog.classes))
    manifest = begun(folder, settings)
    if manifest is None:
        manifest = {
            "format": FORMAT,
            "source": source.name,
            "settings": settings,
            "classes": None if names is None else hashlib.sha256(names).hexdigest(),
            "shards": [],
            "dropped": [{"key": key, "reason": reason} for key, reason in catalog.unreadable],
            "complete": False,
        }
        _save(manifest, folder)
    if names is not None and not (folder / CLASSES).exists():
        with replacing(folder / CLASSES) as partial:
            partial.write_bytes(names)
    return manifest


def _line(name: str) -> bytes:
    """Return the line of a class in `classes.txt`.

    Raises:
        SourceError: the file cannot hold the name.
    """
    if name != name.strip() or len(name.splitlines()) != 1:
        raise SourceError(
            f"The class name {name!r} cannot be written to {CLASSES}: a name must be a single line without leading or "
            "trailing spaces. Rename the class."
        )
    try:
        return f"{name}\n".encode()
    except UnicodeEncodeError as error:
        raise SourceError(
            f"The class name {name!r} cannot be written to {CLASSES} in UTF-8. Rename the class."
        ) from error


def _write_shard(path: Path, catalog: Catalog, images: Iterator[tuple[int, bytes]], limit: int) -> int:
    """Write images until there are `limit` bytes, or no more of them; their number."""
    count = 0
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for position, image in images:
            sample = f"{catalog.rows[position]:09d}"
            height, width = catalog.heights[position].item(), catalog.widths[position].item()
            origin = {"key": catalog.key(position), "height": height, "width": width}
            members = {f"{sample}.jpg": image, f"{sample}.json": json.dumps(origin).encode()}
            if catalog.labels is not None and catalog.labels[position] >= 0:  # -1: this image has no label
                members[f"{sample}.cls"] = str(catalog.labels[position]).encode()
            for name, data in members.items():
                member = tarfile.TarInfo(name)
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
            count += 1
            if tar.offset >= limit:
                break
    return count


def _load(folder: Path) -> Manifest:
    try:
        manifest: Manifest = json.loads((folder / MANIFEST).read_bytes())
        if manifest["format"] == FORMAT:
            missing = Manifest.__required_keys__ - manifest.keys()
            for shard in manifest.get("shards", []):
                missing |= Shard.__required_keys__ - shard.keys()
            if missing:
                raise LookupError(*missing)
            return manifest
    except FileNotFoundError as error:
        raise SourceError(f"{folder} was not made by `ijepa prepare`: it has no {MANIFEST}.") from error
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise SourceError(f"{folder / MANIFEST} is damaged. Delete {folder} and prepare the images again.") from error
    raise SourceError(
        f"{folder} was prepared by an incompatible version of ijepa-enhanced. Delete it and prepare the images again."
    )


def _save(manifest: Manifest, folder: Path) -> None:
    with replacing(folder / MANIFEST) as partial:
        partial.write_text(json.dumps(manifest, indent=1) + "\n")


def _hash(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
