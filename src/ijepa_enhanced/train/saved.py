"""The configuration in a run's folder: read it, and check that a run may be resumed with it."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_type_hints

import yaml

from ijepa_enhanced.encoder import Encoder
from ijepa_enhanced.errors import RequestError
from ijepa_enhanced.train.checkpoint import latest_checkpoint, read_progress
from ijepa_enhanced.train.config import TrainConfig

FREE_ON_RESUME = (
    "data.source",
    "data.max_unreadable",
    "data.workers",
    "data.cache",
    "compile",
    "activation_checkpointing",
    "checkpoint_every",
    "log_every",
)
"""What may change when a run is resumed: where the images lie now, and what does not touch the result."""


def flatten(nested: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """{'a': {'b': 1}} -> {'a.b': 1}."""
    flat: dict[str, Any] = {}
    for key, value in nested.items():
        if isinstance(value, dict):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def config_of_run(folder: Path) -> Path:
    """The file with the configuration of a run.

    Raises:
        RequestError: the folder holds none.
    """
    path = folder / "config.yaml"
    if not path.is_file():
        raise RequestError(f"{folder} is not a run: it has no config.yaml.")
    return path


def load_config(folder: Path) -> TrainConfig:
    """The configuration of a run.

    Raises:
        RequestError: the folder holds none.
    """
    config: TrainConfig = _build(TrainConfig, yaml.safe_load(config_of_run(folder).read_text()))
    return config


def check_resumable(saved: TrainConfig, asked: TrainConfig, folder: Path) -> None:
    """Raise RequestError, naming the key, where resuming would change what the run is."""
    for key, before, after in _changes(saved, asked):
        raise RequestError(
            f"{folder} was started with {key} = {before}, so it cannot go on with {after}. "
            "Leave the flag out, or start a new run."
        )


def check_unchanged(folder: Path) -> None:
    """Raise RequestError, naming the key, where a run's config.yaml is not what its newest checkpoint is of."""
    checkpoint = latest_checkpoint(folder / "checkpoints")
    if checkpoint is None:
        return
    trained: TrainConfig = _build(TrainConfig, read_progress(checkpoint)["config"])
    for key, before, after in _changes(trained, load_config(folder)):
        raise RequestError(
            f"{config_of_run(folder)} says {key} = {after}, but the run was trained with {before}. "
            "Change it back, or start a new run."
        )


def _changes(before: TrainConfig, after: TrainConfig) -> Iterator[tuple[str, Any, Any]]:
    """Key and both values of whatever differs and may not change on resuming."""
    values = flatten(dataclasses.asdict(before))
    for key, value in flatten(dataclasses.asdict(after)).items():
        if value != values[key] and key not in FREE_ON_RESUME:
            yield key, values[key], value


def types_of(cls: type[Any], prefix: str = "") -> dict[str, Any]:
    """The type of every key of a configuration."""
    flat: dict[str, Any] = {}
    for name, hint in get_type_hints(cls).items():
        group = isinstance(hint, type) and dataclasses.is_dataclass(hint)
        flat |= types_of(hint, f"{prefix}{name}.") if group else {f"{prefix}{name}": hint}
    return flat


def _build(cls: type[Any], values: dict[str, Any]) -> Any:
    types = get_type_hints(cls)
    return cls(
        **{name: _build(types[name], value) if isinstance(value, dict) else value for name, value in values.items()}
    )


def random_start(encoder: Encoder, run: Path) -> Encoder:
    """The encoder as it was before the first step: the same architecture, and the run's seed where `run` is one, or an
    encoder in one; else 0."""
    folder = run.resolve().parent if run.name in ("encoder", "best") else run
    seed = load_config(folder).seed if (folder / "config.yaml").is_file() else 0
    return Encoder.random(encoder.config, encoder.preprocessing, seed).to(encoder.device)
