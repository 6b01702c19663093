"""A run as one HTML page, or several runs compared."""

from __future__ import annotations

import os
import platform
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
import PIL
import torch
from PIL import Image

from ijepa_enhanced.data.catalog import LISTED, summary
from ijepa_enhanced.data.config import AugmentConfig
from ijepa_enhanced.data.loader import PackDataset, masks_of
from ijepa_enhanced.devices import best_device, device_name
from ijepa_enhanced.files import replacing
from ijepa_enhanced.visualize.configuration import configuration_section
from ijepa_enhanced.visualize.logged import curves_section
from ijepa_enhanced.visualize.page import NOTHING, compared, document, note, picture, table
from ijepa_enhanced.visualize.run import Run, read_run
from ijepa_enhanced.visualize.samples import sample_sections
from ijepa_enhanced.visualize.scores import scores_section
from ijepa_enhanced.visualize.views import VIEWS_SHOWN, draw_masked_views


def write_report(
    runs: Sequence[Path], path: Path, defaults: Mapping[str, Any], introduction: Mapping[str, str] | None = None
) -> None:
    """Write one HTML page about a run, or one that compares several. It needs no other file and no network.

    Args:
        runs: folders of runs, finished or not; at least one.
        path: the page to write.
        defaults: the default configuration; other values are marked.
        introduction: HTML of sections to put first, by their titles.

    Raises:
        RequestError: a folder is not a run: see `read_run`.
    """
    names = _names(runs)
    found = [read_run(folder, name) for folder, name in zip(runs, names, strict=True)]
    settings = {"Configuration": configuration_section(found, defaults)}
    several = len(found) > 1
    sections = {
        **(introduction or {}),
        # What differs between runs explains the rest of the page. The settings of a single run are for reference.
        **(settings if several else {}),
        "Evaluation": scores_section(found),
        "Curves": curves_section(found),
        **sample_sections(found),
        "Masks": "" if several else _masks(found[0]),
        "Data": _data(found),
        **({} if several else settings),
        "Versions": _versions(found),
    }
    title = f"{len(found)} runs compared" if several else names[0]
    page = document(title, _head(title, found), sections)
    with replacing(path) as temporary:
        # File names may hold bytes that are not valid text.
        temporary.write_text(page, encoding="utf-8", errors="backslashreplace")


def _names(runs: Sequence[Path]) -> list[str]:
    """Return the names of the folders, or their paths if two have the same name."""
    names = [folder.resolve().name for folder in runs]
    return names if len(set(names)) == len(names) else [str(folder) for folder in runs]


def _head(title: str, runs: Sequence[Run]) -> str:
    facts = [_facts(run) for run in runs]
    written = f"Written on {time.strftime('%Y-%m-%d %H:%M')}"
    warnings = [text if len(runs) == 1 else f"{run.name}: {text}" for run in runs for text in _warnings(run)]
    listed = "".join(f"<li>{escape(text)}</li>" for text in warnings)
    warning = f'<ul class="warning">{listed}</ul>' if warnings else ""
    if len(runs) > 1:
        rows = [(name, *(fact[name] for fact in facts)) for name in facts[0]]
        return (
            f'<h1>{escape(title)}</h1><p class="sub">{written}</p>{compared([run.name for run in runs], rows)}{warning}'
        )
    (run,) = runs
    done = run.steps == run.total
    badge = f'<span class="badge{"" if done else " open"}">{"finished" if done else "unfinished"}</span>'
    tiles = "".join(f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>" for name, value in facts[0].items())
    sub = escape(f"I-JEPA trained on {run.config['data']['source']}. {written}.")
    return f'<h1>{escape(title)}{badge}</h1><p class="sub">{sub}</p><dl class="tiles">{tiles}</dl>{warning}'


def _warnings(run: Run) -> list[str]:
    """Return the warnings of a run: a collapse, skipped steps, and everything that is missing."""
    found = []
    alarms, skipped = run.logged("alarm"), run.logged("skipped")
    if collapsed := [step for step, alarm in alarms if alarm]:
        end = "was still warning at the end" if alarms[-1][1] else f"last at step {collapsed[-1]:,}"
        found.append(f"The run collapsed: the monitor first warned at step {collapsed[0]:,} and {end}.")
    if skipped and skipped[-1][1]:
        found.append(
            f"Steps skipped because their loss or gradient was NaN or infinite: {skipped[-1][1]:,}. skipped.jsonl in "
            "the folder of the run lists their images."
        )
    return [*found, *run.missing]


def _facts(run: Run) -> dict[str, str]:
    """Return what people want to know first."""
    rates, waits, losses = (
        [value for _, value in run.logged(key)] for key in ("views_per_second", "data_wait", "loss")
    )
    best = run.logged("best")
    return {
        "Steps": f"{run.steps:,}" if run.total is None else f"{run.steps:,} of {run.total:,}",
        "Training time": _duration(run.seconds) if rates else NOTHING,
        "Images seen": f"{run.progress['images']:,}" if run.progress else NOTHING,
        "Views/s (median)": f"{np.median(rates):,.0f}" if rates else NOTHING,
        "Waiting for data (median)": f"{np.median(waits):.1%}" if waits else NOTHING,
        "Last loss": f"{losses[-1]:.4f}" if losses else NOTHING,
        "Best encoder (by the monitor)": f"step {best[-1][1]:,}" if best else "not checked (monitor.every)",
    }


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def _data(runs: Sequence[Run]) -> str:
    columns = [_data_facts(run) for run in runs]
    names = dict.fromkeys(name for column in columns for name in column)
    rows = [(name, *(column.get(name, NOTHING) for column in columns)) for name in names]
    parts = [compared([run.name for run in runs], rows)]
    if any(run.images is not None for run in runs):
        parts.append(note("A pack is the set of views that one device processes at once."))
    for run in runs:
        reasons = _unreadable(run)
        if reasons:
            of = f" of {run.name}" if len(runs) > 1 else ""
            more = f" (first {LISTED} of {len(reasons)})" if len(reasons) > LISTED else ""
            parts.append(f"<h3>{escape(f'Skipped images{of}{more}')}</h3>")
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
    facts["classes"] = f"{counts['labels']:,}" if counts["labels"] else "none"
    for title, name in (
        ("resolution in px: sqrt(height * width), percentiles", "resolution"),
        ("width / height, percentiles", "aspect"),
    ):
        facts[title] = ", ".join(f"{part}: {value:.3g}" for part, value in counts[name].items())
    facts["views per epoch"] = f"{plan.grids[..., 0].size:,}"
    facts["packs per epoch"] = f"{len(plan):,}"
    facts["tokens per pack"] = f"{plan.pack_tokens.mean():,.0f} (mean), {plan.fill:.2%} of data.tokens_per_pack"
    facts["pack balance"] = f"{plan.budget_use:.2%} (mean / largest number of tokens per pack)"
    facts["images too small to train on"] = f"{plan.too_small:,}"
    facts["views scaled down to data.max_view_tokens"] = f"{plan.limited:,}"
    return facts


def _unreadable(run: Run) -> dict[str, str]:
    """Return name and reason of every image whose header or whose pixels cannot be read."""
    found = {int(row): str(reason) for row, reason in run.progress.get("unreadable", {}).items()}
    if run.images is None:
        return {f"image number {row}": reason for row, reason in found.items()}
    source = run.images.source
    return dict(run.images.catalog.unreadable) | {source.key(row): reason for row, reason in found.items()}


def _masks(run: Run) -> str:
    if run.images is None:
        return ""
    images, first = run.images, run.images.plan[0]
    pack = first.select(np.flatnonzero(~first.unmasked)[:VIEWS_SHOWN])
    patch_size = run.config["encoder"]["patch_size"]
    changes, channels = AugmentConfig(**run.config["augment"]), run.config["data"]["channels"]
    dataset = PackDataset(
        images.source, images.catalog, patch_size, seed=run.config["seed"], changes=changes, channels=channels
    )
    batch = dataset[pack]
    if not len(batch.image_ids):
        return note("None of the first images can be decoded, so there are no masks to show.")
    with tempfile.TemporaryDirectory() as folder:
        drawn = Path(folder, "masks.png")
        draw_masked_views(batch, masks_of(batch, images.masks, run.config["seed"]), patch_size, drawn)
        sheet = Image.open(drawn).convert("RGB")
    text = (
        "The first training views. Right of each view: the part that the student encoder sees. It must predict the "
        "teacher's features in the hatched blocks (targets). White areas without hatching are neither seen nor "
        "predicted."
    )
    return note(text) + picture(sheet, "Views and their masks")


def _versions(runs: Sequence[Run]) -> str:
    recorded = [name for name in ("threads", "torch") if any(name in run.progress for run in runs)]
    rows = [(f"training: {name}", *(str(run.progress.get(name, NOTHING)) for run in runs)) for name in recorded]
    device, processor = best_device(), f"{platform.machine()}, {os.cpu_count()} cores"
    here = {
        "hardware": processor if device.type == "cpu" else device_name(device),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "pillow": PIL.__version__,
        # Not imported: no file of the package imports the package itself.
        "ijepa-enhanced": sys.modules[__name__.partition(".")[0]].__version__,
    }
    rows += [(f"report: {name}", *[value] * len(runs)) for name, value in here.items()]
    return compared([run.name for run in runs], rows)
