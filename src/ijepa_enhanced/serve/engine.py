"""From the bytes of images to what the encoder makes of them: a bounded queue, decoding threads and a packer."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

from ijepa_enhanced.data.inputs import Decoded, decode_input
from ijepa_enhanced.data.opening import open_image
from ijepa_enhanced.devices import default_workers
from ijepa_enhanced.encoder import TOKENS_PER_PACK, Encoder, Resolution
from ijepa_enhanced.errors import UnreadableImage
from ijepa_enhanced.ops.preprocess import CHANNELS
from ijepa_enhanced.serve.config import Limits
from ijepa_enhanced.serve.packer import Packaged, Packer, PackReport

MEMORY = 0.9
"""Share of the former mean in a moving mean of the seconds of an image."""
LONGEST_RETRY = 60
"""Most seconds that a client is told to wait."""


class Overloaded(Exception):  # noqa: N818 - it reads as what it is
    """The queue is full, or closed."""

    def __init__(self, retry_after: int) -> None:
        super().__init__(f"The service is busy. Try again in {retry_after} s.")
        self.retry_after = retry_after


class BadImage(Exception):  # noqa: N818
    """An image of a request that cannot be embedded; `reason` says why."""

    def __init__(self, number: int, reason: UnreadableImage) -> None:
        super().__init__(f"Image {number}: {reason}.")
        self.number = number
        self.reason = reason


@dataclass(frozen=True)
class How:
    """How a request shows its images to the encoder."""

    resolution: Resolution = None
    merge_rate: float = 0.0
    mapped: bool = False
    """Whether maps are asked for."""


@dataclass(frozen=True)
class Answer:
    """What a request gets for one image."""

    image: Decoded
    made: Packaged
    decoding: float
    """Seconds."""


class Engine:
    """Embeds the images of concurrent requests together.

    Args:
        encoder: in evaluation mode, on its device.
        limits: what is accepted.
        report: called after each pack, in another thread.
    """

    def __init__(self, encoder: Encoder, limits: Limits, report: Callable[[PackReport], None] = lambda pack: None):
        self.encoder = encoder
        self.limits = limits
        self.pending = 0
        """Images that were accepted and are not done."""
        self.budget = limits.tokens_per_pack or encoder.at_once(TOKENS_PER_PACK)
        self._report = report
        self._seconds_of_image = 0.0
        self._decoders = ThreadPoolExecutor(default_workers(), "decode")
        self._packer = Packer(encoder, self.budget, limits.max_wait / 1000, self._count)

    @property
    def alive(self) -> bool:
        """Return whether the encoder's thread runs."""
        return self._packer.thread.is_alive()

    @property
    def retry_after(self) -> int:
        """Return the seconds in which the images that are pending are probably done, at least 1."""
        return min(LONGEST_RETRY, max(1, math.ceil(self.pending * self._seconds_of_image)))

    async def embed(self, images: Sequence[bytes], how: How) -> list[Answer]:
        """Return the answer for each image. Cancelling the task gives up its place in the queue.

        Raises:
            Overloaded: the queue has no room for the images.
            BadImage: one of them cannot be decoded, or has too many pixels.
        """
        resolution = self.encoder.pixels(how.resolution, self.budget)
        with self._admitted(len(images)):
            try:
                async with asyncio.TaskGroup() as group:
                    tasks = [
                        group.create_task(self._embed(number, image, resolution, how))
                        for number, image in enumerate(images)
                    ]
            except ExceptionGroup as several:
                raise several.exceptions[0] from None
        return [task.result() for task in tasks]

    def close(self) -> None:
        """Finish what was accepted, and end all threads."""
        self._packer.close()
        self._decoders.shutdown()

    @contextmanager
    def _admitted(self, images: int) -> Iterator[None]:
        """Count images as pending while they are in work."""
        if self.pending + images > self.limits.queue:
            raise Overloaded(self.retry_after)
        self.pending += images
        try:
            yield
        finally:
            self.pending -= images

    async def _embed(self, number: int, image: bytes, resolution: int | None, how: How) -> Answer:
        loop = asyncio.get_running_loop()
        shape = self.encoder.config
        work = partial(decode, image, self.limits.max_pixels, resolution, shape.patch_size, self.budget, shape.channels)
        try:
            decoded, seconds = await loop.run_in_executor(self._decoders, work)
        except UnreadableImage as error:
            raise BadImage(number, error) from error
        made = await asyncio.wrap_future(self._packer.submit(decoded, how.merge_rate, how.mapped))
        return Answer(decoded, made, seconds)

    def _count(self, pack: PackReport) -> None:
        seconds = pack.seconds / pack.images
        before = self._seconds_of_image or seconds
        self._seconds_of_image = MEMORY * before + (1 - MEMORY) * seconds
        self._report(pack)


def decode(
    data: bytes, max_pixels: int, resolution: int | None, patch_size: int, limit: int, channels: int = CHANNELS
) -> tuple[Decoded, float]:
    """Return an image as patches, and the seconds that this took; arguments as for `decode_input`.

    Raises:
        ImageTooLarge: it has more than `max_pixels`, by its header.
        UnreadableImage: it cannot be decoded.
    """
    start = time.perf_counter()
    image = open_image(data, max_pixels)
    return decode_input(image, resolution, patch_size, limit, channels), time.perf_counter() - start
