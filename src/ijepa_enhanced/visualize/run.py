"""What the folder of a run holds, and what it lacks: a run that died early may have left little."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from safetensors import SafetensorError

from ijepa_enhanced.data.catalog import open_catalog
from ijepa_enhanced.data.config import DataConfig
from ijepa_enhanced.data.plan import EpochPlan, Plan
from ijepa_enhanced.data.sources.open import open_source
from ijepa_enhanced.encoder import Encoder
from ijepa_enhanced.evaluate.tokens import LabelledSource
from ijepa_enhanced.masks import MaskConfig


@dataclass(frozen=True)
class TrainedOn(LabelledSource):
    """The images that a run was trained on, if they are still there."""

    plan: EpochPlan
    """Of the first epoch."""
    masks: MaskConfig


@dataclass(frozen=True)
class Run:
    """What a run's folder holds."""

    name: str
    config: dict[str, Any]
    log: list[dict[str, Any]]
    progress: dict[str, Any]
    """Of the newest checkpoint; empty where there is none."""
    evaluation: dict[str, dict[str, float]]
    """Scores by subject, where an evaluation was saved."""
    images: TrainedOn | None
    encoder: Encoder | None
    missing: tuple[str, ...]
    """A sentence for everything that is not there."""

    def logged(self, key: str) -> list[tuple[int, float]]:
        """Step and value of each line of the log that has a number under that key: some are logged rarely, or never."""
        return [(line["step"], line[key]) for line in self.log if isinstance(line.get(key), int | float)]

    @property
    def steps(self) -> int:
        """Steps done, as far as the log or the newest checkpoint tells."""
        return max(self.log[-1]["step"] if self.log else 0, self.progress.get("step", 0))

    @property
    def total(self) -> int | None:
        """Steps of the whole run; None where it depends on images that are gone."""
        if self.config["steps"] is not None:
            return int(self.config["steps"])
        if self.images is None:
            return None
        packs = self.config["data"]["packs_per_step"]
        return max(1, round(self.config["epochs"] * len(self.images.plan) / packs))

    @property
    def seconds(self) -> float:
        """Time of the logged steps, from their rates: neither pauses nor looks of the watch count."""
        tokens = self.config["data"]["tokens_per_pack"] * self.config["data"]["packs_per_step"]
        lines = [line for line in self.log if "tokens_per_second" in line]
        starts = [0, *(line["step"] for line in lines)]
        return sum(
            (line["step"] - start) * tokens * line["fill"] / line["tokens_per_second"]
            for start, line in zip(starts, lines, strict=False)
        )


def read_run(folder: Path, name: str) -> Run:
    """All that a run's folder tells, and a sentence about whatever it does not.

    Raises:
        FileNotFoundError: it has no config.yaml.
    """
    config = yaml.safe_load((folder / "config.yaml").read_text())
    missing: list[str] = []
    log: list[dict[str, Any]] = []
    progress: dict[str, Any] = {}
    evaluation: dict[str, dict[str, float]] = {}
    images = encoder = None
    with _noting(missing, "The log cannot be read"):
        log = _read_log(folder / "log.jsonl")
        if not log:
            missing.append("There is no log: the run ended before its first line.")
    checkpoints = sorted((folder / "checkpoints").glob("step-*"))
    if checkpoints:
        with _noting(missing, f"The checkpoint {checkpoints[-1].name} cannot be read"):
            progress = dict(json.loads((checkpoints[-1] / "progress.json").read_text()))
    else:
        missing.append("There is no checkpoint: the run ended before its first.")
    if (folder / "encoder").exists():
        with _noting(missing, "The encoder cannot be read"):
            encoder = Encoder.from_pretrained(folder)
    else:
        missing.append("There is no encoder, so nothing it has learned is shown: it comes with the first checkpoint.")
    with _noting(missing, "The images cannot be shown, nor what needs them"):
        images = _find_images(config, progress.get("plan"))
    if (folder / "evaluation.json").exists():
        with _noting(missing, "The evaluation cannot be read"):
            evaluation = _read_evaluation(folder / "evaluation.json")
    return Run(name, config, log, progress, evaluation, images, encoder, tuple(missing))


@contextmanager
def _noting(missing: list[str], sentence: str) -> Iterator[None]:
    """Add to `missing` what goes wrong inside: with files that are damaged, or written by another version."""
    try:
        yield
    except (OSError, ValueError, TypeError, LookupError, RuntimeError, SafetensorError) as error:
        missing.append(f"{sentence}: {str(error).rstrip('.')}.")


def _read_log(path: Path) -> list[dict[str, Any]]:
    """The lines of the log; one that was cut off in the middle, as only the last can be, is left out."""
    text = path.read_text() if path.exists() else ""
    return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]


def _read_evaluation(path: Path) -> dict[str, dict[str, float]]:
    subjects = dict(json.loads(path.read_text())["scores"])
    return {
        subject: {name: float(value) for name, value in dict(scores).items()} for subject, scores in subjects.items()
    }


def _find_images(config: dict[str, Any], trained: str | None) -> TrainedOn:
    """The images of a run; `trained` is the hash of its plan, where a checkpoint tells it."""
    data = DataConfig(**config["data"])
    source = open_source(data.source)
    catalog = open_catalog(source)
    plan = Plan(catalog, data, config["encoder"]["patch_size"], config["seed"])
    if trained not in (None, plan.hash):
        raise ValueError("they have changed since")
    return TrainedOn(source, catalog, plan.epoch(0), MaskConfig(**config["masks"]))
