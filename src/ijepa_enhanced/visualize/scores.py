"""The section of a report with the scores that `ijepa evaluate` saved."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ijepa_enhanced.visualize.page import NOTHING, note, table
from ijepa_enhanced.visualize.run import Run

TITLES = {
    "knn1": "kNN-1",
    "knn5": "kNN-5",
    "knn20": "kNN-20",
    "rankme": "RankMe",
    "dense_miou": "dense mIoU",
    "images_per_second": "images/s",
}
"""What people call some scores; the others go by the names in evaluation.json."""
FRACTIONS = ("knn", "linear", "lowshot", "attentive", "finetune", "dense")
"""Beginnings of the names of scores that are fractions of 1."""
DETAILS = ("_mean_per_class", "_low", "_high", "_top5")
"""Endings of the names of values that belong to another score."""
EXPLANATION = {
    "knn linear lowshot attentive finetune": "Percentages are top-1 accuracies: over all images, (the mean over "
    "classes), [95% interval].",
    "dense": "dense mIoU: mean intersection over union of the classes of patches.",
    "rankme": "RankMe: dimensions that the features use.",
    "images": "images/s: from reading files to features.",
}
"""What columns mean, by the beginnings of their names."""


def scores_section(runs: Sequence[Run]) -> str:
    """Return the table of scores, with how they were found; empty if no run was evaluated."""
    scored = [(run, subject, scores) for run in runs for subject, scores in run.evaluation.items()]
    if not scored:
        return ""
    names = list(dict.fromkeys(name for _, _, scores in scored for name in scores if not name.endswith(DETAILS)))
    rows = [
        (subject if len(runs) == 1 else f"{run.name}: {subject}", *(_score(name, scores) for name in names))
        for run, subject, scores in scored
    ]
    meaning = [
        text for starts, text in EXPLANATION.items() if any(name.startswith(tuple(starts.split())) for name in names)
    ]
    head = ["", *(TITLES.get(name, name.replace("_", " ")) for name in names)]
    return _how([run for run in runs if run.evaluation]) + table(head, rows) + note(" ".join(meaning))


def _how(runs: Sequence[Run]) -> str:
    """Say how the scores of each run were found; once, if all were found in the same way."""
    said = {run.name: _setting(run.evaluated_with) for run in runs}
    first, *others = ({**run.evaluated_with, "weights": None} for run in runs)
    if all(record == first for record in others):
        return note(next(iter(said.values())))
    warning = note("These scores do not compare, because the runs were evaluated in different ways.")
    return warning + "".join(note(f"{name}: {text}") for name, text in said.items())


def _setting(settings: Mapping[str, Any]) -> str:
    """Say in a sentence which images were used, and how they were shown to the encoder."""
    if "resolution" not in settings or not ("data" in settings or {"train", "val"} <= settings.keys()):
        return "evaluation.json does not say how the scores were found."
    resolution = settings["resolution"]
    size = f"at a resolution of {resolution} px" if isinstance(resolution, int) else "at their native size"
    rate = settings.get("merge_rate")
    merged = f", at a merge rate of {rate}" if rate else ""
    shown = f"{size}{merged}" + (f", with seed {settings['seed']}" if "seed" in settings else "")
    if "data" in settings:
        return f"Scored on a fifth of the images of {settings['data']}, {shown}. The probes learned from the others."
    return f"Scored on the images of {settings['val']}, {shown}. The probes learned from {settings['train']}."


def _score(name: str, scores: Mapping[str, float | None]) -> str:
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
