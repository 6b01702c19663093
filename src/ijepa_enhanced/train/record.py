"""What a run tells about itself in the model card of its encoder."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import yaml

from ijepa_enhanced.config import flatten
from ijepa_enhanced.train.config import TrainConfig
from ijepa_enhanced.train.saved import FREE_ON_RESUME


def training_facts(
    config: TrainConfig, in_source: int, steps: int, images: int, teacher_license: str | None = None
) -> dict[str, Any]:
    """Return `Record.training` of an encoder.

    Args:
        config: of the run.
        in_source: number of images in its source.
        steps: done.
        images: shown, counted each time.
        teacher_license: of a teacher with weights of others. None: none is known.
    """
    defaults = flatten(dataclasses.asdict(TrainConfig()))
    recipe = {
        key: value
        for key, value in flatten(dataclasses.asdict(config)).items()
        if value != defaults[key] and key not in (*FREE_ON_RESUME, "init", "teacher")
    }
    return {
        "source": public_name(config.data.source),
        "images": in_source,
        "steps": steps,
        "images_seen": images,
        "initial_weights": config.init and public_name(config.init),
        "teacher": config.teacher and public_name(config.teacher),
        "teacher_license": teacher_license,
        "datasets": hub_datasets(config.data.source),
        "recipe": yaml.safe_dump(recipe, sort_keys=False) if recipe else "",
    }


def public_name(place: str) -> str:
    """Return a source or a path for others to read: without the folders above it, which may tell a user's name."""
    parts = (Path(part).name if part.startswith(("/", "~", "hf:///")) else part for part in place.split(" + "))
    return " + ".join(parts)


def hub_datasets(source: str) -> list[str]:
    """Return the ids of the data sets in a source that are on the Hugging Face Hub."""
    found = re.findall(r"hf://([\w-][\w.-]*(?:/[\w-][\w.-]*)?)(?=$|[:#@ ])", source)
    return [name for name in found if not Path(name).exists()]
