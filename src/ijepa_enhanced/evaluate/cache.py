"""Features on the disk: a folder for all that was extracted in one way, and a limit to what all of them take."""

from __future__ import annotations

import json
import logging
import math
import os
import shutil
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from ijepa_enhanced.data.catalog import cache_folder
from ijepa_enhanced.errors import RequestError
from ijepa_enhanced.files import replacing

logger = logging.getLogger(__name__)

CACHE_GB = 20.0
"""Most that cached features take, in 10^9 bytes: ten times ImageNet-1k by a ViT-S (1.28 million images, 4 * 384 bytes
each). `IJEPA_CACHE_GB` sets another limit."""

_in_use: set[Path] = set()
"""Folders that this process has used. They are never deleted: the evaluation may come back to them."""


class Part(NamedTuple):
    """The features of the n readable images of some packs, on the CPU."""

    layers: Tensor
    """float32 [n, L, D], of the last L layers."""
    image_ids: Tensor
    """int64 [n], rows of the source."""
    unreadable: dict[int, str]
    """Row and reason of each image that cannot be decoded."""
    seconds: float
    """What extracting them took."""
    made_on: str
    """The machine, its device and how many processes used it: what the time depends on."""


class FeatureCache:
    """The parts of one extraction, a file each.

    Args:
        digest: names everything that the features depend on, except how many layers are kept.
        layers: how many to read; a file that has more serves too, one that has fewer is ignored.
    """

    def __init__(self, digest: str, layers: int) -> None:
        self.folder = cache_folder() / "features" / digest
        self.layers = layers
        self.writable = True
        _in_use.add(self.folder)
        with suppress(OSError):
            os.utime(self.folder)  # when it was used last

    def _path(self, number: int) -> Path:
        return self.folder / f"{number:05d}.safetensors"

    def load(self, number: int) -> Part | None:
        """Return a part, or None if it is not there or cannot be read; the latter is a warning."""
        from safetensors import SafetensorError, safe_open

        path = self._path(number)
        try:
            with safe_open(path, "pt") as file:
                said = file.metadata()
                stored = file.get_slice("layers")
                shape = stored.get_shape()
                if len(shape) == 3 and shape[1] < self.layers:
                    return None
                layers = stored[:, -self.layers :] if len(shape) == 3 else torch.empty(0)
                image_ids = file.get_tensor("image_ids")
            unreadable = {int(row): reason for row, reason in json.loads(said["unreadable"]).items()}
            return Part(layers, image_ids, unreadable, float(said["seconds"]), said["made_on"])
        except FileNotFoundError:
            return None
        except (OSError, SafetensorError) as error:
            logger.warning("The cached features %s cannot be read and are computed again: %s", path, error)
            return None

    def save(self, number: int, part: Part) -> None:
        """Write a part. The first failure is a warning, after which nothing more is written."""
        from safetensors import SafetensorError
        from safetensors.torch import save_file

        if not self.writable:
            return
        tensors = {"layers": part.layers, "image_ids": part.image_ids}
        said = {"unreadable": json.dumps(part.unreadable), "seconds": repr(part.seconds), "made_on": part.made_on}
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with replacing(self._path(number)) as temporary:
                save_file(tensors, temporary, said)
        except (OSError, SafetensorError) as error:
            self.writable = False
            logger.warning("The features cannot be cached in %s: %s", self.folder, error)

    def evict(self) -> None:
        """Delete the folders used least recently until all of them take no more than the limit.

        Those that this process has used stay, whatever they take.
        """
        limit = cache_limit()
        with suppress(OSError):
            folders = [path for path in self.folder.parent.iterdir() if path.is_dir()]
            folders.sort(key=lambda path: (path in _in_use, path.stat().st_mtime), reverse=True)
            total = 0
            for folder in folders:
                size = sum(path.stat().st_size for path in folder.iterdir())
                if folder in _in_use or total + size <= limit:
                    total += size
                else:
                    shutil.rmtree(folder, ignore_errors=True)


def cache_limit() -> float:
    """Return the most bytes that cached features take.

    Raises:
        RequestError: IJEPA_CACHE_GB is not a number of at least 0.
    """
    chosen = os.environ.get("IJEPA_CACHE_GB", str(CACHE_GB))
    try:
        limit = float(chosen)
    except ValueError:
        limit = math.nan
    if not limit >= 0:
        raise RequestError(f"IJEPA_CACHE_GB must be a number of gigabytes, at least 0, not '{chosen}'.")
    return 1e9 * limit
