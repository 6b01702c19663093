"""The built-in synthetic images as a source."""

from __future__ import annotations

import numpy as np
from PIL import Image

from ijepa_enhanced.data import synthetic
from ijepa_enhanced.data.bands import of_array
from ijepa_enhanced.data.listing import Listing, Texts
from ijepa_enhanced.data.opening import Opened
from ijepa_enhanced.data.sources.base import Source
from ijepa_enhanced.errors import SourceError

NAMES = ("synthetic", "synthetic-bands")
"""Names of the built-in sources: 8-bit RGB, and the same images as six bands of 16 bits."""


class SyntheticSource(Source):
    """The built-in synthetic images of one part, `train` or `val`.

    Args:
        part: of the images.
        name: one of `NAMES`.

    Raises:
        SourceError: there is no such part.
    """

    kind = "built-in images"

    def __init__(self, part: str = "train", name: str = NAMES[0]) -> None:
        if part not in synthetic.IMAGES:
            raise SourceError(
                f"The synthetic images have only the splits {' and '.join(synthetic.IMAGES)}, not '{part}'."
            )
        self.name = name
        self.bands = name == NAMES[1]
        self.part = part
        self.split = f"split {part}"

    def make_listing(self) -> Listing:
        """See `Source`; the location of an image is its height and width."""
        rows = range(synthetic.IMAGES[self.part])
        headers = np.array([synthetic.header(self.part, row) for row in rows], dtype=np.int64)
        keys = Texts.of(f"{self.part}-{row:05d}" for row in rows)
        return Listing(keys, headers[:, 2].copy(), [*synthetic.CLASSES], headers[:, :2].copy())

    def identity(self) -> tuple[str, ...]:
        """See `Source`."""
        return (self.name, self.fingerprint())

    def fingerprint(self) -> str:
        """See `Source`."""
        return f"synthetic-{synthetic.VERSION}-{self.part}-{synthetic.IMAGES[self.part]}"

    def read(self, row: int) -> bytes:
        """See `Source`."""
        pixels = synthetic.render_bands(self.part, row) if self.bands else synthetic.render(self.part, row).pixels
        return pixels.tobytes()

    def length(self, row: int) -> int:
        """See `Source`."""
        height, width = self.size(row)
        return height * width * (len(synthetic.BANDS) * 2 if self.bands else 3)

    def restore(self, row: int, data: bytes) -> Opened:
        """See `Source`."""
        if self.bands:
            return of_array(np.frombuffer(data, np.uint16).reshape(*self.size(row), len(synthetic.BANDS)))
        return Image.frombytes("RGB", self.size(row)[::-1], data)

    def size(self, row: int) -> tuple[int, int]:
        """See `Source`."""
        assert self.listing.location is not None
        height, width = self.listing.location[row].tolist()
        return height, width
