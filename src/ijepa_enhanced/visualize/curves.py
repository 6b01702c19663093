"""The curves of a run."""

import logging
from pathlib import Path
from typing import Any

from ijepa_enhanced.files import replacing

logger = logging.getLogger(__name__)

PANELS = {
    "loss": ("loss", "prediction", "stabilizer"),
    "views / s": ("views_per_second",),
    "learning rate": ("lr",),
    "gradient norm": ("grad_norm",),
}


def draw_curves(log: list[dict[str, Any]], path: Path) -> bool:
    """Write a PNG of a run's log, as `read_log` gives it; False, and a word about it, where matplotlib is missing."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        logger.warning("No curves: they need matplotlib (pip install 'ijepa-enhanced[plots]').")
        return False
    figure = Figure(figsize=(12, 3), layout="constrained")
    for axes, (title, names) in zip(figure.subplots(1, len(PANELS)), PANELS.items(), strict=True):
        for name in names:
            axes.plot([line["step"] for line in log], [line[name] for line in log], label=name)
        axes.set(title=title, xlabel="step")
        axes.spines[["top", "right"]].set_visible(False)
        if len(names) > 1:
            axes.legend(frameon=False)
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=100)
    return True
