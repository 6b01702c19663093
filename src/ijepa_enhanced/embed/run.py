"""The run of `ijepa embed`: plan the packs, embed them, and write the rows of one file after another."""

from __future__ import annotations

import itertools
import logging
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from ijepa_enhanced.data.sources.base import UNREAD, Source
from ijepa_enhanced.embed.plan import EmbedPlan
from ijepa_enhanced.embed.rows import PackFeatures, RowTables, features_of
from ijepa_enhanced.embed.settings import EmbedSettings
from ijepa_enhanced.embed.writers import WRITERS, count_errors
from ijepa_enhanced.encoder import Encoder
from ijepa_enhanced.errors import RequestError, RunError
from ijepa_enhanced.evaluate.tokens import Clock, InferenceConfig, LabelledSource, reduced_packs

logger = logging.getLogger(__name__)

Engine = Callable[[Sequence[int]], Iterator[PackFeatures]]
"""Embeds all packs of some files of the plan, and yields their features in order."""


class Progress:
    """Images done in this run, and what took the time.

    Args:
        show: called after every pack with the number of images done and a text.
    """

    def __init__(self, show: Callable[[int, str], None]) -> None:
        self.show = show
        self.images = 0
        self.clock = Clock()
        self.start: float | None = None

    def add(self, images: int) -> None:
        """Count the images of a pack."""
        self.images += images
        self.show(self.images, self.text())

    @property
    def seconds(self) -> float:
        """Return the time since the first pack was asked for."""
        return 0.0 if self.start is None else time.perf_counter() - self.start

    def text(self) -> str:
        """Return the speed, and the share of time spent waiting for data."""
        seconds = max(self.seconds, 1e-9)
        waiting = f", waiting for data {self.clock.waited / seconds:.0%} of the time" if self.clock.waited else ""
        return f"{self.images / seconds:.1f} images/s{waiting}"


@dataclass(frozen=True)
class Counts:
    """The rows of some files."""

    images: int
    """Rows with features."""
    unreadable: int
    """Rows with an error."""
    files: int


def local_engine(
    encoder: Encoder, images: LabelledSource, plan: EmbedPlan, config: InferenceConfig, clock: Clock
) -> Engine:
    """Return the engine that embeds on this process's device, or on those of all ranks; see `reduced_packs`."""

    settings = plan.settings

    def embed(files: Sequence[int]) -> Iterator[PackFeatures]:
        return reduced_packs(
            encoder,
            images,
            plan.stream(files),
            config,
            lambda batch, outputs: features_of(batch, outputs, settings, encoder, images.source),
            settings.layers,
            clock,
        )

    return embed


def embed_files(
    plan: EmbedPlan, files: Sequence[int], engine: Engine, tables: RowTables, folder: Path | None, progress: Progress
) -> None:
    """Write some files of the plan.

    Args:
        plan: says which packs fill each file.
        files: their numbers.
        engine: embeds the packs.
        tables: makes rows of them.
        folder: where to write. None on ranks that only embed.
        progress: counts what is done.

    Raises:
        NotFiniteError, RequestError: a feature is not finite, or too large for float16.
        OSError: a file cannot be written, as on a full disk.
        RunError: see `counted`.
    """
    progress.start = time.perf_counter()
    found = engine(files)
    if folder is None:
        for _ in found:
            pass
        return
    suffix, write = WRITERS[plan.settings.file_format]
    for number, file in enumerate(files, start=1):
        packs = counted(itertools.islice(found, len(plan.packs(file))), progress, tables.source)
        name = plan.settings.name_of(file) + suffix
        write(tables.tables(plan.settings.rows_of(file), packs), tables.schema(), folder / name)
        logger.info("%s (%d of %d): %s", name, number, len(files), progress.text())


def counted(packs: Iterable[PackFeatures], progress: Progress, source: Source) -> Iterator[PackFeatures]:
    """Yield packs, and count their images.

    Raises:
        RunError: the disk or the network does not give an image that it gave to the scan. As a row with an error, it
            would never be tried again.
    """
    for pack in packs:
        for row, reason in pack.unreadable.items():
            if reason.startswith(UNREAD):
                raise RunError(
                    f"{source.key(row)} {reason}. The disk or the network may have failed. When this is solved, run "
                    "the same command with --resume."
                )
        progress.add(len(pack.rows) + len(pack.unreadable))
        yield pack


def path_of(folder: Path, settings: EmbedSettings, file: int) -> Path:
    """Return the path that shows whether a file is complete: the one that is written last."""
    return folder / (settings.name_of(file) + WRITERS[settings.file_format][0])


def missing_files(folder: Path, settings: EmbedSettings, files: Iterable[int]) -> list[int]:
    """Return which of some files are not there yet."""
    return [file for file in files if not path_of(folder, settings, file).is_file()]


def count_rows(folder: Path, settings: EmbedSettings, files: Sequence[int]) -> Counts:
    """Count the rows of some files.

    Raises:
        RequestError: a file cannot be read.
    """
    rows = unreadable = 0
    for file in files:
        path = path_of(folder, settings, file)
        try:
            unreadable += count_errors(path)
        except (OSError, ValueError) as error:
            raise RequestError(f"{path} cannot be read: {error}. Delete it and run with --resume.") from error
        rows += len(settings.rows_of(file))
    return Counts(rows - unreadable, unreadable, len(files))
