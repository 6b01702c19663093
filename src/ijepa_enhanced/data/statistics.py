"""Count the channels of the images of a source, and measure the mean and standard deviation of each channel."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial

import numpy as np
from numpy.typing import NDArray

from ijepa_enhanced.data.catalog import keep_statistics
from ijepa_enhanced.data.decode import decode_whole
from ijepa_enhanced.data.listing import Statistics
from ijepa_enhanced.data.opening import channels_of, check_channels
from ijepa_enhanced.data.sources.base import Source
from ijepa_enhanced.data.sources.mixed import MixedSource
from ijepa_enhanced.devices import default_workers
from ijepa_enhanced.errors import SourceError, UnreadableImage

logger = logging.getLogger(__name__)

LOOKED = 16
"""Number of images whose channels are counted. They are spread evenly over a source."""
MEASURED = 4096
"""Most images that are measured, spread evenly. The standard error of a mean is then 1/64 of the deviation between
images."""
RESOLUTION = 256
"""Larger images are shrunk to this resolution, sqrt(height * width) in pixels. It is close to that of training."""
CONSTANT = 1e-5
"""A channel is constant if its standard deviation is below `CONSTANT` times its mean. Float32 rounds at 6e-8."""


def check_source(source: Source, channels: int) -> None:
    """Check that most images of a source have this number of channels. The others become unreadable when they are
    decoded.

    Args:
        source: after `open_catalog`.
        channels: C.

    Raises:
        SourceError: most of `LOOKED` images have another number. The message says which.
    """
    others, looked = Counter[int](), 0
    for row in _spread(source, LOOKED):
        with suppress(UnreadableImage):
            image = source.open(row)
            looked += 1
            others[channels_of(image)] += 1
            check_channels(image, channels)
            others[channels_of(image)] -= 1
    if 2 * others.total() > looked:
        most = others.most_common(1)[0][0]
        raise SourceError(
            f"Most images of {source.name} have {_counted(most)}, but data.channels is {channels}. Set data.channels "
            f"to {most}."
        )


def statistics_of(source: Source, channels: int | None = None) -> Statistics:
    """Return the mean and standard deviation of each channel. Read them from the catalog, or measure and store them
    there.

    Args:
        source: after `open_catalog`. In a mixture, each source counts by its share of an epoch.
        channels: C. None: the number that most images have.

    Raises:
        SourceError: a channel is constant, or no image can be measured.
    """
    channels = channels or _common_channels(source)
    parts: Sequence[Source] = source.sources if isinstance(source, MixedSource) else [source]
    found = [_of_part(part, channels) for part in parts]
    joined = found[0] if len(found) == 1 else _joined(found, _shown(source, parts))
    for number, (mean, std) in enumerate(zip(joined.mean, joined.std, strict=True), start=1):
        if std <= CONSTANT * abs(mean):
            raise SourceError(
                f"Channel {number} of {channels} has the same value everywhere in {source.name}, so it cannot be "
                "normalized. Remove this channel from the images."
            )
    return joined


def _common_channels(source: Source) -> int:
    found = Counter[int]()
    for row in _spread(source, LOOKED):
        with suppress(UnreadableImage):
            found[channels_of(source.open(row))] += 1
    if not found:
        raise SourceError(f"None of {LOOKED} images of {source.name} can be read.")
    return found.most_common(1)[0][0]


def _of_part(source: Source, channels: int) -> Statistics:
    """Return the statistics of a source that is not a mixture."""
    known = source.listing.statistics
    if known is not None and len(known.mean) == channels:
        return known
    rows = _spread(source, MEASURED)
    logger.info("Measuring the mean and standard deviation of %s in %d images.", _counted(channels), len(rows))
    with ThreadPoolExecutor(default_workers()) as pool:
        found = [moments for moments in pool.map(partial(_moments, source, channels), rows) if moments is not None]
    if not found:
        raise SourceError(f"None of {len(rows):,} images of {source.name} can be decoded with {_counted(channels)}.")
    mean, square = np.mean(found, axis=0)
    measured = _statistics(mean, square, len(found))
    keep_statistics(source, measured)
    return measured


def _moments(source: Source, channels: int, row: int) -> NDArray[np.float64] | None:
    """Return the mean value and the mean square of each channel of an image: [2, C]. Values are scaled to [0, 1].

    Return None if the image cannot be decoded. Training logs this later.
    """
    try:
        pixels = decode_whole(source.open(row), RESOLUTION, channels) / np.float64(255)
    except UnreadableImage:
        return None
    return np.stack([pixels.mean(axis=(0, 1)), np.square(pixels).mean(axis=(0, 1))])


def _statistics(mean: NDArray[np.float64], square: NDArray[np.float64], images: int) -> Statistics:
    return Statistics(tuple(mean.tolist()), tuple(np.sqrt(np.maximum(square - mean**2, 0)).tolist()), images)


def _shown(source: Source, parts: Iterable[Source]) -> NDArray[np.float64]:
    """Return the number of images of each part in an epoch of a mixture."""
    shares, sizes = source.listing.shares, source.listing.sizes
    assert shares is not None
    assert sizes is not None
    ends = np.cumsum([len(part) for part in parts])[:-1]
    return np.array([part.sum() for part in np.split(shares * (sizes.heights > 0), ends)])


def _joined(found: Sequence[Statistics], shown: NDArray[np.float64]) -> Statistics:
    """Return the statistics of several sources together, weighted by the number of images of each in an epoch."""
    means, stds = np.array([each.mean for each in found]), np.array([each.std for each in found])
    weights = shown / shown.sum()
    return _statistics(weights @ means, weights @ (stds**2 + means**2), sum(each.images for each in found))


def _spread(source: Source, most: int) -> list[int]:
    """Return at most this number of rows of readable images, spread evenly."""
    assert source.listing.sizes is not None
    rows = source.listing.sizes.readable().rows
    return rows[np.linspace(0, len(rows) - 1, min(len(rows), most)).astype(np.int64)].tolist()


def _counted(channels: int) -> str:
    return f"{channels} channel{'s' * (channels > 1)}"
