"""The section of a report with the curves of the log."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from ijepa_enhanced.visualize.chart import Line, chart, key
from ijepa_enhanced.visualize.page import note
from ijepa_enhanced.visualize.run import Run


@dataclass(frozen=True)
class Curve:
    """How a key of the log is drawn."""

    title: str
    unit: str = ""
    percent: bool = False
    from_zero: bool = False


MONITOR = "Monitor: the teacher is checked on a fixed set of training images"
CURVES = {
    "Loss and its unweighted terms": {
        "loss": Curve("Loss", "weighted sum"),
        "prediction": Curve("Prediction loss", "smooth L1"),
        "vicreg": Curve("VICReg loss"),
        "contrastive": Curve("Contrastive loss", "NT-Xent"),
        "grad_norm": Curve("Gradient norm", "unclipped"),
    },
    MONITOR: {
        "knn": Curve("kNN-20", "top-1 accuracy", percent=True),
        "rankme": Curve("RankMe", "effective dimensions"),
        "lidar": Curve("LiDAR", "effective dimensions"),
        "spread": Curve("Spread", "std of features"),
        "cosine": Curve("Cosine", "between images"),
    },
    "Schedules": {
        "lr": Curve("Learning rate", from_zero=True),
        "weight_decay": Curve("Weight decay"),
        "ema": Curve("Teacher momentum"),
    },
    "Speed": {
        "views_per_second": Curve("Views per second", from_zero=True),
        "tokens_per_second": Curve("Tokens per second", from_zero=True),
        "data_wait": Curve("Waiting for data", "% of time", percent=True, from_zero=True),
        "fill": Curve("Pack fill", "% of token limit", percent=True),
        "monitor_seconds": Curve("Monitor check", "seconds", from_zero=True),
        "monitor_share": Curve("Monitor checks", "% of time", percent=True, from_zero=True),
    },
}
"""Keys of the log, in groups. Other keys are drawn under their own names."""
NOT_CURVES = ("step", "epoch", "unreadable", "skipped", "alarm", "best")
OTHER = "Other"
TERMS = ("prediction", "vicreg", "contrastive")
"""Terms of the loss. A term of weight 0 is not computed, and is logged as 0."""


def curves_section(runs: Sequence[Run]) -> str:
    """Return the charts of the log, all runs in each; empty if nothing was logged."""
    known = {name for group in CURVES.values() for name in group}
    others = dict.fromkeys(name for run in runs for line in run.log for name in line if name not in known)
    groups = CURVES | {OTHER: {name: Curve(name) for name in others if name not in NOT_CURVES}}
    parts = []
    for group, curves in groups.items():
        charts = []
        for name, curve in curves.items():
            lines = [Line(run.name, place, run.logged(name)) for place, run in enumerate(runs)]
            if name in TERMS:
                lines = [line for line in lines if any(value for _, value in line.points)]
            if any(math.isfinite(value) for line in lines for _, value in line.points):
                charts.append(chart(curve.title, curve.unit, lines, curve.percent, curve.from_zero))
        if charts:
            text = note("A falling RankMe or spread, or a rising cosine, means collapse.") if group == MONITOR else ""
            parts.append(f'<h3>{escape(group)}</h3>{text}<div class="charts">{"".join(charts)}</div>')
    return _legend(runs) + "".join(parts) if parts else ""


def _legend(runs: Sequence[Run]) -> str:
    """Return the line of each run; a single run needs none."""
    if len(runs) == 1:
        return ""
    return f'<ul class="legend">{"".join(f"<li>{key(place, run.name)}</li>" for place, run in enumerate(runs))}</ul>'
