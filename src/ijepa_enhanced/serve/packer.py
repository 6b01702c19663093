"""One thread that packs images of concurrent requests and runs the encoder on them."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ijepa_enhanced.data.inputs import Decoded, PackBuilder
from ijepa_enhanced.encoder import Encoder
from ijepa_enhanced.serve.pack import Output, run_pack


@dataclass(frozen=True)
class PackReport:
    """What one pass through the encoder was."""

    images: int
    tokens: int
    """Patches of all images."""
    budget: int
    """Most patches that there is room for."""
    seconds: float


@dataclass(frozen=True)
class Packaged:
    """What the encoder made of one image, and what it took."""

    output: Output
    waited: float
    """Seconds until its pack started."""
    pack: PackReport


@dataclass(frozen=True, eq=False)
class Waiting:
    """A decoded image that waits for a pack."""

    patches: NDArray[Any]
    """[rows * columns, P * P * C]"""
    grid: NDArray[np.int64]
    """[1, 2]"""
    merge_rate: float
    mapped: bool
    """Whether its maps are asked for."""
    future: Future[Packaged] = field(default_factory=Future)
    since: float = field(default_factory=time.perf_counter)


class Packer:
    """Runs an encoder on packs of the images that wait, in a thread of its own, until it is closed.

    A pack starts with the image that has waited longest. Later ones join it while they fit into the budget, if they
    merge at the same rate: rates belong to a whole pack. While the encoder is busy, images gather by themselves. When
    it is idle, the first image waits for others, but no longer than `max_wait`.

    Args:
        encoder: in evaluation mode.
        budget: most patches of a pack, unless a single image has more.
        max_wait: in seconds.
        report: called after each pack, in the thread.
    """

    def __init__(
        self, encoder: Encoder, budget: int, max_wait: float, report: Callable[[PackReport], None] = lambda pack: None
    ) -> None:
        self.encoder = encoder
        self.budget = budget
        self.max_wait = max_wait
        self.report = report
        self.waiting: list[Waiting] = []
        self.closing = False
        self.changed = threading.Condition()
        # A daemon, so that a command that fails ends although nobody has closed its packer.
        self.thread = threading.Thread(target=self._work, name="packer", daemon=True)
        self.thread.start()

    def submit(self, image: Decoded, merge_rate: float = 0.0, mapped: bool = False) -> Future[Packaged]:
        """Return the future of an image. To cancel it gives its place to others, unless its pack has started.

        Raises:
            RuntimeError: the packer is closed.
        """
        assert image.patches is not None
        item = Waiting(image.patches, image.grid, merge_rate, mapped)
        with self.changed:
            if self.closing:
                raise RuntimeError("The packer is closed.")
            self.waiting.append(item)
            self.changed.notify()
        return item.future

    def close(self) -> None:
        """Finish what waits, and end the thread."""
        with self.changed:
            self.closing = True
            self.changed.notify()
        self.thread.join()

    def choose(self, waiting: Sequence[Waiting]) -> tuple[list[Waiting], bool]:
        """Return which images the next pack would have, and whether it is full: an image of the same rate is left."""
        chosen: list[Waiting] = []
        tokens, full = 0, False
        for item in waiting:
            if item.merge_rate != waiting[0].merge_rate:
                continue
            if chosen and tokens + len(item.patches) > self.budget:
                full = True
            else:
                chosen.append(item)
                tokens += len(item.patches)
        return chosen, full or tokens >= self.budget

    def _work(self) -> None:
        while (pack := self._next()) is not None:
            self._run(pack)

    def _next(self) -> list[Waiting] | None:
        """Wait for a pack to be due, and take it; None if the packer is closed and nothing is left."""
        with self.changed:
            while True:
                self.waiting = [item for item in self.waiting if not item.future.cancelled()]
                pack, full = self.choose(self.waiting)
                if not pack and self.closing:
                    return None
                left = pack[0].since + self.max_wait - time.perf_counter() if pack else None
                if pack and left is not None and (full or self.closing or left <= 0):
                    taken = set(pack)
                    self.waiting = [item for item in self.waiting if item not in taken]
                    return running(pack)
                self.changed.wait(left)

    def _run(self, pack: Sequence[Waiting]) -> None:
        """Give each image of a pack its result, or the error."""
        if not pack:
            return
        start = time.perf_counter()
        builder = PackBuilder(self.budget, self.encoder.config.prefix)
        for item in pack:
            builder.add(item.patches, item.grid)
        tokens = builder.tokens
        try:
            outputs = run_pack(self.encoder, builder.take(), pack[0].merge_rate, [item.mapped for item in pack])
        except Exception as error:  # whatever it is, it must not end the thread
            for item in pack:
                item.future.set_exception(error)
            return
        done = PackReport(len(pack), tokens, self.budget, time.perf_counter() - start)
        self.report(done)
        for item, output in zip(pack, outputs, strict=True):
            item.future.set_result(Packaged(output, start - item.since, done))


def running(pack: Iterable[Waiting]) -> list[Waiting]:
    """Return the images of a pack that are still wanted. From here on they cannot be cancelled."""
    return [item for item in pack if item.future.set_running_or_notify_cancel()]
