"""A run, or several side by side, as one HTML page.

Everything is read from the run's folder, in which a run that died early may have left little; what is missing is said.
"""

from __future__ import annotations

import math
import os
import platform
import sys
import tempfile
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
import PIL
import torch
import yaml
from PIL import Image

from ijepa_enhanced.data.catalog import LISTED, summary
from ijepa_enhanced.data.config import AugmentConfig
from ijepa_enhanced.data.loader import PackDataset, masks_of
from ijepa_enhanced.files import replacing
from ijepa_enhanced.visualize.page import Line, chart, document, key, note, picture, table
from ijepa_enhanced.visualize.run import Run, read_run
from ijepa_enhanced.visualize.samples import sample_sections
from ijepa_enhanced.visualize.views import VIEWS_SHOWN, draw_masked_views


@dataclass(frozen=True)
class Curve:
    """How a key of the log is drawn."""

    title: str
    unit: str = ""
    percent: bool = False
    from_zero: bool = False


CURVES = {
    "Learning": {
        "loss": Curve("Loss"),
        "prediction": Curve("Prediction loss", "smooth L1"),
        "vicreg": Curve("VICReg loss", "before its weight"),
        "contrastive": Curve("Contrastive loss", "before its weight"),
        "grad_norm": Curve("Gradient norm", "before clipping"),
    },
    "Features on the fixed probe images": {
        "knn": Curve("kNN", "top-1", percent=True),
        "rankme": Curve("RankMe", "dimensions"),
        "lidar": Curve("LiDAR", "dimensions"),
        "spread": Curve("Spread", "standard deviation"),
        "cosine": Curve("Cosine", "mean of pairs"),
    },
    "Schedules": {
        "lr": Curve("Learning rate", from_zero=True),
        "weight_decay": Curve("Weight decay"),
        "ema": Curve("Teacher's momentum"),
    },
    "Speed": {
        "views_per_second": Curve("Views", "1/s", from_zero=True),
        "tokens_per_second": Curve("Tokens", "1/s", from_zero=True),
        "data_wait": Curve("Waiting for data", "of time", percent=True, from_zero=True),
        "fill": Curve("Budget use", "tokens of packs", percent=True),
        "watch_seconds": Curve("A look of the watch", "s", from_zero=True),
    },
}
"""Keys of the log, in groups. What else a log holds is drawn under its own name."""
NOT_CURVES = ("step", "epoch", "unreadable", "alarm", "best")
OTHER = "Other"

NOTHING = "\N{EN DASH}"
"""In a table, what is not there."""

FRACTIONS = ("knn", "linear", "lowshot", "attentive", "finetune", "dense")
"""Beginnings of the names of scores that are fractions of 1."""
TERMS = ("vicreg", "contrastive")
"""Of the loss, that a run may do without."""
DETAILS = ("_mean_per_class", "_low", "_high", "_top5")
"""Ends of the names of what stands beside another score, or only in evaluation.json."""


def write_report(runs: Sequence[Path], path: Path, defaults: Mapping[str, Any]) -> None:
    """Write one self-contained HTML page about one run, or comparing several.

    Args:
        runs: folders of runs, finished or not; at least one.
        path: of the page.
        defaults: the configuration of a run for which nothing is set, to mark what was.

    Raises:
        FileNotFoundError: a folder is no run: it has no config.yaml.
    """
    names = _names(runs)
    found = [read_run(folder, name) for folder, name in zip(runs, names, strict=True)]
    settings = {"Configuration": _settings(found, defaults)}
    several = len(found) > 1
    sections = {
        # What differs between runs explains all that follows; the settings of one are for looking up.
        **(settings if several else {}),
        "Evaluation": _evaluation(found),
        "Curves": _curves(found),
        **sample_sections(found),
        "Masks": "" if several else _masks(found[0]),
        "Data": _data(found),
        **({} if several else settings),
        "Versions": _versions(found),
    }
    title = f"{len(found)} runs compared" if several else names[0]
    page = document(title, _head(title, found), sections)
    with replacing(path) as temporary:
        # Names of files need not be text.
        temporary.write_text(page, encoding="utf-8", errors="backslashreplace")


def _names(runs: Sequence[Path]) -> list[str]:
    """The folders' own names where they differ, else their paths."""
    names = [folder.resolve().name for folder in runs]
    return names if len(set(names)) == len(names) else [str(folder) for folder in runs]


def _head(title: str, runs: Sequence[Run]) -> str:
    facts = [_facts(run) for run in runs]
    written = f"Report of {time.strftime('%Y-%m-%d %H:%M')}"
    warnings = [text if len(runs) == 1 else f"{run.name}: {text}" for run in runs for text in _warnings(run)]
    listed = "".join(f"<li>{escape(text)}</li>" for text in warnings)
    warning = f'<ul class="warning">{listed}</ul>' if warnings else ""
    if len(runs) > 1:
        rows = [(name, *(fact[name] for fact in facts)) for name in facts[0]]
        return f'<h1>{escape(title)}</h1><p class="sub">{written}</p>{_compared(runs, rows)}{warning}'
    (run,) = runs
    done = run.steps == run.total
    badge = f'<span class="badge{"" if done else " open"}">{"finished" if done else "unfinished"}</span>'
    tiles = "".join(f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>" for name, value in facts[0].items())
    sub = escape(f"I-JEPA on {run.config['data']['source']}. {written}.")
    return f'<h1>{escape(title)}{badge}</h1><p class="sub">{sub}</p><dl class="tiles">{tiles}</dl>{warning}'


def _warnings(run: Run) -> list[str]:
    """What must not be overlooked: a collapse, and whatever is missing."""
    alarms = run.logged("alarm")
    collapsed = [step for step, alarm in alarms if alarm]
    if not collapsed:
        return [*run.missing]
    end = "and it went on to the last look" if alarms[-1][1] else f"and for the last time at step {collapsed[-1]:,}"
    return [f"The run collapsed: the watch raised its alarm at step {collapsed[0]:,}, {end}.", *run.missing]


def _facts(run: Run) -> dict[str, str]:
    """What one wants to know first."""
    rates, waits, losses = (
        [value for _, value in run.logged(key)] for key in ("views_per_second", "data_wait", "loss")
    )
    best = run.logged("best")
    return {
        "Steps": f"{run.steps:,}" if run.total is None else f"{run.steps:,} of {run.total:,}",
        "Training time": _duration(run.seconds) if rates else NOTHING,
        "Images seen": f"{run.progress['images']:,}" if run.progress else NOTHING,
        "Views a second": f"{np.median(rates):,.0f}" if rates else NOTHING,
        "Waiting for data": f"{np.median(waits):.1%}" if waits else NOTHING,
        "Last loss": f"{losses[-1]:.4f}" if losses else NOTHING,
        "Best by the watch": f"step {best[-1][1]:,}" if best else NOTHING,
    }


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def _compared(runs: Sequence[Run], rows: Iterable[Sequence[str]], marked: Sequence[int] = ()) -> str:
    """A table with a column for each run, which a single run needs no title for."""
    return table(["", *(run.name for run in runs)] if len(runs) > 1 else [""], rows, marked)


def _legend(runs: Sequence[Run]) -> str:
    """The ink of each run; nothing for a single one."""
    if len(runs) == 1:
        return ""
    return f'<ul class="legend">{"".join(f"<li>{key(place, run.name)}</li>" for place, run in enumerate(runs))}</ul>'


def _settings(runs: Sequence[Run], defaults: Mapping[str, Any]) -> str:
    """The whole configuration of one run, or what differs between several."""
    flat = [_flat(run.config) for run in runs]
    if len(runs) > 1:
        keys = dict.fromkeys(key for settings in flat for key in settings)
        rows = [(".".join(filter(None, key)), *(_value(settings, key) for settings in flat)) for key in keys]
        differing = [row for row in rows if len(set(row[1:])) > 1]
        if not differing:
            return note("All settings are the same.")
        return note("What differs; all other settings are the same.") + _compared(runs, differing)
    settings, usual = flat[0], _flat(defaults)
    groups = []
    for group in dict.fromkeys(group for group, _ in settings):
        names = [name for of, name in settings if of == group]
        values = [(_value(settings, (group, name)), _value(usual, (group, name))) for name in names]
        marked = [place for place, (value, default) in enumerate(values) if value != default]
        lines = [
            (name, value, "" if value == default else f"default {default}")
            for name, (value, default) in zip(names, values, strict=True)
        ]
        groups.append(f"<div><h3>{escape(group or 'run')}</h3>{table([''], lines, marked)}</div>")
    return note("Blue: not the default, which stands beside it.") + f'<div class="groups">{"".join(groups)}</div>'


def _flat(config: Mapping[str, Any]) -> dict[tuple[str, str], Any]:
    """Group and name of each setting; the group of those that belong to none is empty."""
    flat: dict[tuple[str, str], Any] = {}
    for name, value in config.items():
        if isinstance(value, Mapping):
            flat |= {(name, inner): setting for inner, setting in value.items()}
        else:
            flat["", name] = value
    return flat


def _value(settings: Mapping[tuple[str, str], Any], key: tuple[str, str]) -> str:
    """As YAML writes it; a dash for what an older version did not have."""
    return yaml.safe_dump(settings[key], width=math.inf).splitlines()[0] if key in settings else NOTHING


def _data(runs: Sequence[Run]) -> str:
    columns = [_data_facts(run) for run in runs]
    names = dict.fromkeys(name for column in columns for name in column)
    parts = [_compared(runs, [(name, *(column.get(name, NOTHING) for column in columns)) for name in names])]
    for run in runs:
        reasons = _unreadable(run)
        if reasons:
            of = f" of {run.name}" if len(runs) > 1 else ""
            more = f" The first {LISTED} of {len(reasons)}." if len(reasons) > LISTED else ""
            parts.append(f"<h3>{escape(f'Unreadable images{of}, left out.{more}')}</h3>")
            parts.append(table(["image", "reason"], list(reasons.items())[:LISTED]))
    return "".join(parts)


def _data_facts(run: Run) -> dict[str, str]:
    facts = {"source": str(run.config["data"]["source"])}
    if run.images is None:
        if counted := run.logged("unreadable"):
            facts["unreadable"] = f"{counted[-1][1]:,}"
        return facts
    counts, plan = summary(run.images.catalog), run.images.plan
    facts["images"] = f"{counts['images']:,}"
    facts["unreadable"] = f"{len(_unreadable(run)):,}"
    facts["labels"] = f"{counts['labels']:,}" if counts["labels"] else "none"
    for title, name in (("resolution in px, sqrt(height x width)", "resolution"), ("width / height", "aspect")):
        facts[title] = ", ".join(f"{value:.3g} ({part})" for part, value in counts[name].items())
    facts["an epoch"] = (
        f"{len(plan):,} packs of {plan.pack_tokens.mean():,.0f} tokens, {plan.grids[..., 0].size:,} views"
    )
    facts["budget use"] = f"{plan.budget_use:.2%}, packs {plan.fill:.2%} full"
    facts["too small to train on"] = f"{plan.too_small:,}"
    facts["views scaled down to the limit"] = f"{plan.limited:,}"
    return facts


def _unreadable(run: Run) -> dict[str, str]:
    """Name and reason of every image that cannot be read; the header told, or decoding."""
    found = {int(row): str(reason) for row, reason in run.progress.get("unreadable", {}).items()}
    if run.images is None:
        return {f"number {row}": reason for row, reason in found.items()}
    key = run.images.source.key
    return dict(run.images.catalog.unreadable) | {key(row): reason for row, reason in found.items()}


def _curves(runs: Sequence[Run]) -> str:
    known = {name for group in CURVES.values() for name in group}
    others = dict.fromkeys(name for run in runs for line in run.log for name in line if name not in known)
    groups = CURVES | {OTHER: {name: Curve(name) for name in others if name not in NOT_CURVES}}
    parts = []
    for group, curves in groups.items():
        charts = []
        for name, curve in curves.items():
            lines = [Line(run.name, place, run.logged(name)) for place, run in enumerate(runs)]
            values = [value for line in lines for _, value in line.points if math.isfinite(value)]
            # A term of weight 0 is not computed, and logged as 0.
            if values and (name not in TERMS or any(values)):
                charts.append(chart(curve.title, curve.unit, lines, curve.percent, curve.from_zero))
        if charts:
            parts.append(f'<h3>{group}</h3><div class="charts">{"".join(charts)}</div>')
    return _legend(runs) + "".join(parts) if parts else ""


def _evaluation(runs: Sequence[Run]) -> str:
    scored = [(run, subject, scores) for run in runs for subject, scores in run.evaluation.items()]
    if not scored:
        return ""
    names = list(dict.fromkeys(name for _, _, scores in scored for name in scores if not name.endswith(DETAILS)))
    rows = [
        (subject if len(runs) == 1 else f"{run.name}: {subject}", *(_score(name, scores) for name in names))
        for run, subject, scores in scored
    ]
    legend = note("Fractions are top-1 accuracies (mean per class) [95% interval], but for dense miou.")
    return table(["", *(name.replace("_", " ") for name in names)], rows) + legend


def _score(name: str, scores: Mapping[str, float]) -> str:
    value = scores.get(name)
    if value is None:
        return NOTHING
    if not name.startswith(FRACTIONS):
        return f"{value:,.4g}"
    per_class, low, high = (scores.get(name + end) for end in ("_mean_per_class", "_low", "_high"))
    shown = [f"{value:.1%}"]
    if per_class is not None:
        shown.append(f"({per_class:.1%})")
    if low is not None and high is not None:
        shown.append(f"[{low:.1%}, {high:.1%}]")
    return " ".join(shown)


def _masks(run: Run) -> str:
    if run.images is None:
        return ""
    images, first = run.images, run.images.plan[0]
    pack = first.select(np.flatnonzero(~first.whole)[:VIEWS_SHOWN])
    patch_size = run.config["encoder"]["patch_size"]
    changes = AugmentConfig(**run.config.get("augment", {}))
    dataset = PackDataset(images.source, images.catalog, patch_size, seed=run.config["seed"], changes=changes)
    batch = dataset[pack]
    if not len(batch.image_ids):
        return note("None of the first images can be decoded.")
    with tempfile.TemporaryDirectory() as folder:
        drawn = Path(folder, "masks.png")
        draw_masked_views(batch, masks_of(batch, images.masks, run.config["seed"]), patch_size, drawn)
        sheet = Image.open(drawn).convert("RGB")
    text = "The first views of the run, and beside each what the student sees of it; hatched, what it must predict."
    return note(text) + picture(sheet, "Views and their masks")


def _versions(runs: Sequence[Run]) -> str:
    recorded = [name for name in ("device", "threads", "torch") if any(name in run.progress for run in runs)]
    rows = [(f"trained with: {name}", *(str(run.progress.get(name, NOTHING)) for run in runs)) for name in recorded]
    processor = f"{platform.machine()}, {os.cpu_count()} cores"
    here = {
        "hardware": torch.cuda.get_device_name() if torch.cuda.is_available() else processor,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "pillow": PIL.__version__,
        # No file imports the package, which imports from the floors.
        "ijepa-enhanced": sys.modules[__name__.partition(".")[0]].__version__,
    }
    rows += [(f"report made with: {name}", *[value] * len(runs)) for name, value in here.items()]
    return _compared(runs, rows)
