"""Recipes and configuration files: finding them, checking their keys, saving what a run resolved them to."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from importlib import resources
from pathlib import Path
from types import NoneType
from typing import Any, get_args, get_type_hints

import yaml

from ijepa_enhanced.errors import RequestError, did_you_mean
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


def recipe_names() -> list[str]:
    """The recipes in the package."""
    return sorted(item.name.removesuffix(".yaml") for item in _recipes().iterdir() if item.name.endswith(".yaml"))


def find_config(name_or_file: str) -> Path:
    """The file of a recipe by its name, or the file itself.

    Raises:
        RequestError: there is no such file or recipe, or the file has an unknown key.
    """
    path = Path(name_or_file)
    if not path.is_file():
        path = Path(str(_recipes() / f"{name_or_file}.yaml"))
    if not path.is_file():
        raise RequestError(f"No file or recipe '{name_or_file}'.{did_you_mean(name_or_file, recipe_names())}")
    try:
        content = yaml.safe_load(path.read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise RequestError(f"{path} is not valid YAML: {str(error).splitlines()[0]}") from error
    if not isinstance(content, dict):
        raise RequestError(f"{path} must hold keys and values, as `ijepa train --print_config` prints them.")
    types = {**_types(TrainConfig), "run": str | None}
    for key, value in flatten(content).items():
        if key not in types:
            raise RequestError(f"{path}: unknown key '{key}'.{did_you_mean(key, list(types))}")
        if value is None and NoneType not in get_args(types[key]):
            raise RequestError(f"{path}: {key} needs a value, not null.")
    return path


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


def _types(cls: type[Any], prefix: str = "") -> dict[str, Any]:
    """The type of every key of a configuration."""
    flat: dict[str, Any] = {}
    for name, hint in get_type_hints(cls).items():
        group = isinstance(hint, type) and dataclasses.is_dataclass(hint)
        flat |= _types(hint, f"{prefix}{name}.") if group else {f"{prefix}{name}": hint}
    return flat


def _build(cls: type[Any], values: dict[str, Any]) -> Any:
    types = get_type_hints(cls)
    return cls(
        **{name: _build(types[name], value) if isinstance(value, dict) else value for name, value in values.items()}
    )


def _recipes() -> Any:
    return resources.files("ijepa_enhanced") / "recipes"
