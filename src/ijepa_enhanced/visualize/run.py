"""What the folder of a run holds, and what is missing from it: a run that failed early may have left little."""

from __future__ import annotations

import dataclasses
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
from ijepa_enhanced.train.logging import read_log
from ijepa_enhanced.train.saved import load_config


@dataclass(frozen=True)
class TrainedOn(LabelledSource):
    """The images that a run was trained on, and how."""

    plan: EpochPlan
    """The packs of the first epoch."""
    masks: MaskConfig


@dataclass(frozen=True)
class Run:
    """What a run's folder holds."""

    name: str
    """What the page calls it."""
    config: dict[str, Any]
    """The configuration, complete."""
    written: dict[str, Any]
    """What config.yaml says: one of another version may lack settings."""
    log: list[dict[str, Any]]
    progress: dict[str, Any]
    """progress.json of the newest checkpoint; empty if there is none."""
    evaluation: dict[str, dict[str, float | None]]
    """Scores by subject, if an evaluation was saved; None is a speed that is not known."""
    evaluated_with: dict[str, Any]
    """The settings of that evaluation."""
    images: TrainedOn | None
    encoder: Path | None
    """Where the last teacher is, if it can be read."""
    missing: tuple[str, ...]
    """A sentence for everything that is missing."""

    def logged(self, key: str) -> list[tuple[int, float]]:
        """Return step and value of the lines of the log that have a number under that key; not all lines do."""
        return [(line["step"], line[key]) for line in self.log if isinstance(line.get(key), int | float)]

    @property
    def steps(self) -> int:
        """Steps done, according to the log and the newest checkpoint."""
        return max(self.log[-1]["step"] if self.log else 0, self.progress.get("step", 0))

    @property
    def total(self) -> int | None:
        """Steps of the whole run; None if they depend on images that are missing."""
        if self.config["steps"] is not None:
            return int(self.config["steps"])
        if self.images is None:
            return None
        packs = self.config["data"]["packs_per_step"]
        return max(1, round(self.config["epochs"] * len(self.images.plan) / packs))

    @property
    def seconds(self) -> float:
        """Training time of the logged steps, from their rates; pauses and the monitor's checks do not count."""
        tokens = self.config["data"]["tokens_per_pack"] * self.config["data"]["packs_per_step"]
        lines = [line for line in self.log if "tokens_per_second" in line]
        starts = [0, *(line["step"] for line in lines)]
        return sum(
            (line["step"] - start) * tokens * line["fill"] / line["tokens_per_second"]
            for start, line in zip(starts, lines, strict=False)
        )


def read_run(folder: Path, name: str) -> Run:
    """Return what a run's folder holds, with a sentence about everything that is missing or cannot be read.

    Raises:
        RequestError: the folder has no config.yaml, or one that is damaged or of another version.
    """
    config = dataclasses.asdict(load_config(folder))
    written = yaml.safe_load((folder / "config.yaml").read_text())
    missing: list[str] = []
    log: list[dict[str, Any]] = []
    progress: dict[str, Any] = {}
    evaluation: tuple[dict[str, dict[str, float | None]], dict[str, Any]] = {}, {}
    images = encoder = None
    with _noting(missing, "The log cannot be read"):
        log = read_log(folder)
        if not log:
            missing.append("No log: the run ended before it wrote one.")
    checkpoints = sorted((folder / "checkpoints").glob("step-*"))
    if checkpoints:
        with _noting(missing, f"The checkpoint {checkpoints[-1].name} cannot be read"):
            progress = dict(json.loads((checkpoints[-1] / "progress.json").read_text()))
    else:
        missing.append("No checkpoint: the run ended before it saved one.")
    if (folder / "encoder").exists():
        with _noting(missing, "The encoder cannot be read"):
            Encoder.from_pretrained(folder)  # not kept: several runs may not fit into memory together
            encoder = folder
    else:
        missing.append(
            "No encoder: it is saved with the first checkpoint. Feature maps and nearest neighbors are not shown."
        )
    if may_download(config["data"]["source"]):
        missing.append(f"The images are not shown: {config['data']['source']} is remote.")
    else:
        with _noting(missing, "The images are not shown"):
            images = _find_images(config, progress.get("plan"))
    if (folder / "evaluation.json").exists():
        with _noting(missing, "The evaluation cannot be read"):
            evaluation = _read_evaluation(folder / "evaluation.json")
    return Run(name, config, written, log, progress, *evaluation, images, encoder, tuple(missing))


@contextmanager
def _noting(missing: list[str], sentence: str) -> Iterator[None]:
    """Add to `missing` what goes wrong inside, with files that are damaged or of another version."""
    try:
        yield
    except (OSError, ValueError, TypeError, LookupError, RuntimeError, SafetensorError) as error:
        missing.append(f"{sentence}: {str(error).rstrip('.')}.")


def _read_evaluation(path: Path) -> tuple[dict[str, dict[str, float | None]], dict[str, Any]]:
    """Return the scores by subject, and the settings that they were found with."""
    content = dict(json.loads(path.read_text()))
    scores = {
        subject: {name: None if value is None else float(value) for name, value in dict(found).items()}
        for subject, found in dict(content["scores"]).items()
    }
    return scores, dict(content.get("settings", {}))


def may_download(source: str) -> bool:
    """Return whether any part of a source lies on another machine, so that opening it might download it."""
    return "://" in source and not Path(source).expanduser().exists()


def _find_images(config: dict[str, Any], trained: str | None) -> TrainedOn:
    """Open the images of a run; `trained` is the hash of its plan, if a checkpoint has it.

    Raises:
        ValueError: the images, or how they are planned, have changed since.
    """
    data = DataConfig(**config["data"])
    source = open_source(data.source)
    catalog = open_catalog(source)
    plan = Plan(catalog, data, config["encoder"]["patch_size"], config["seed"])
    if trained not in (None, plan.hash):
        raise ValueError("they, or the data settings, have changed since training")
    return TrainedOn(source, catalog, plan.epoch(0), MaskConfig(**config["masks"]))
