"""The curves of a run, as a picture."""

from pathlib import Path
from typing import Any

from ijepa_enhanced.visualize.plot import plot

PANELS: dict[str, tuple[str, ...]] = {
    "loss and its unweighted terms": ("loss", "prediction", "vicreg", "contrastive"),
    "views per second": ("views_per_second",),
    "learning rate": ("lr",),
    "gradient norm": ("grad_norm",),
}
"""Titles, and the keys of the log that are drawn under them."""


def draw_curves(log: list[dict[str, Any]], path: Path) -> bool:
    """Write a PNG of a run's log, as `read_log` returns it. Return False if matplotlib is missing."""
    with plot(path, 12, 3) as figure:
        if figure is None:
            return False
        for axes, (title, names) in zip(figure.subplots(1, len(PANELS)), PANELS.items(), strict=True):
            shown = [name for name in names if any(line.get(name) for line in log)]  # terms of weight 0 are logged as 0
            for name in shown:
                # A line has no losses and rates if no image could be read since the one before it.
                steps, values = zip(*[(line["step"], line[name]) for line in log if name in line], strict=True)
                axes.plot(steps, values, label=name)
            axes.set(title=title, xlabel="step")
            if len(shown) > 1:
                axes.legend(frameon=False)
    return True
