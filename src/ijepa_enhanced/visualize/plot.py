"""Figures by matplotlib, which is optional."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from ijepa_enhanced.files import replacing

if TYPE_CHECKING:  # an extra
    from matplotlib.figure import Figure

logger = logging.getLogger(__name__)


@contextmanager
def plot(path: Path, width: float, height: float) -> Iterator[Figure | None]:
    """Yield a figure to draw on, and write it to `path` as PNG; without matplotlib log that, and yield None.

    `width` and `height` are in inches, of 100 pixels each.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        logger.warning("%s was not written. Install matplotlib with: pip install 'ijepa-enhanced[plots]'", path.name)
        yield None
        return
    figure = Figure(figsize=(width, height), layout="constrained")
    yield figure
    for axes in figure.axes:
        axes.spines[["top", "right"]].set_visible(False)
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=100)
