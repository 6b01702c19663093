"""The section of a report with the scores that `ijepa evaluate` saved."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ijepa_enhanced.visualize.page import NOTHING, note, table
from ijepa_enhanced.visualize.run import Run

TITLES = {
    "knn1": "kNN-1",
    "knn5": "kNN-5",
    "knn20": "kNN-20",
    "linear4_average": "linear, last 4 layers (average)",
    "linear4_concat": "linear, last 4 layers (concatenated)",
    "lowshot1": "low-shot 1%",
    "lowshot10": "low-shot 10%",
    "attentive": "attentive probe",
    "finetune": "fine-tuned",
    "dense_miou": "dense mIoU",
    "dense_knn": "dense kNN mIoU",
    "rankme": "RankMe",
    "images_per_second": "images/s",
}
"""What people call some scores; the others go by the names in evaluation.json."""
FRACTIONS = ("knn", "linear", "lowshot", "attentive", "finetune", "dense")
"""Beginnings of the names of scores that are fractions of 1."""
DETAILS = ("_mean_per_class", "_low", "_high", "_top5")
"""Endings of the names of values that belong to another score."""
EXPLANATION = {
    "knn linear lowshot attentive finetune": "Percentages are top-1 accuracies. (...): mean of the per-class "
    "accuracies. [...]: 95% confidence interval.",
    "dense": "dense mIoU: mean intersection over union of the segmentation classes. [...]: 95% confidence interval.",
    "rankme": "RankMe: effective rank of the features, the number of dimensions that they use.",
    "images": "images/s: images per second, from reading the files to the features.",
}
"""What scores mean, by the beginnings of their names."""


def scores_section(runs: Sequence[Run]) -> str:
    """Return the table of scores, with how they were found; empty if no run was evaluated."""
    scored = [(run, subject, scores) for run in runs for subject, scores in run.evaluation.items()]
    if not scored:
        return ""
    names = list(dict.fromkeys(name for _, _, scores in scored for name in scores if not name.endswith(DETAILS)))
    rows = [
        (subject if len(runs) == 1 else f"{run.name}: {subject}", *(shown_score(name, scores) for name in names))
        for run, subject, scores in scored
    ]
    head = ["", *(TITLES.get(name, name.replace("_", " ")) for name in names)]
    return _how([run for run in runs if run.evaluation]) + table(head, rows) + note(" ".join(explained(names)))


def explained(names: Iterable[str]) -> list[str]:
    """Return what scores mean, a text for each kind of score among the names."""
    return [
        text for starts, text in EXPLANATION.items() if any(name.startswith(tuple(starts.split())) for name in names)
    ]


def _how(runs: Sequence[Run]) -> str:
    """Say how the scores of each run were found; once, if all were found in the same way."""
    said = {run.name: how_scored(run.evaluated_with) for run in runs}
    first, *others = ({**run.evaluated_with, "weights": None} for run in runs)
    if all(record == first for record in others):
        return note(next(iter(said.values())))
    warning = note("These scores are not comparable: the runs were evaluated with different settings.")
    return warning + "".join(note(f"{name}: {text}") for name, text in said.items())


def how_scored(settings: Mapping[str, Any]) -> str:
    """Say in a sentence which images were used, and how they were shown to the encoder."""
    if "resolution" not in settings or not ("data" in settings or {"train", "val"} <= settings.keys()):
        return "evaluation.json does not say how the scores were found."
    resolution = settings["resolution"]
    size = f"at a resolution of {resolution} px" if isinstance(resolution, int) else "at native resolution"
    rate = settings.get("merge_rate")
    merged = f", with a merge rate of {rate}" if rate else ""
    shown = f"{size}{merged}" + (f", with seed {settings['seed']}" if "seed" in settings else "")
    if "data" in settings:
        return f"Scored on 20% of {settings['data']} {shown}. Probes were trained on the other 80%."
    return f"Scored on {settings['val']} {shown}. Probes were trained on {settings['train']}."


def shown_score(name: str, scores: Mapping[str, float | None]) -> str:
    """Return a score as text: `70.0% (69.5%) [65.2%, 74.4%]`, as far as there are such values."""
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
