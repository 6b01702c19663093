"""Recipes and configuration files: finding them, checking their keys, saving what a run resolved them to."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Iterator
from importlib import resources
from pathlib import Path
from types import NoneType
from typing import Any, get_args, get_type_hints

import yaml

from ijepa_enhanced.train.checkpoint import latest_checkpoint, read_progress
from ijepa_enhanced.train.loop import TrainConfig

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


class RequestError(ValueError):
    """What was asked for cannot be done; the message says why and what to do."""


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
        raise RequestError(f"No file or recipe '{name_or_file}'.{nearest(name_or_file, recipe_names())}")
    try:
        content = yaml.safe_load(path.read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise RequestError(f"{path} is not valid YAML: {str(error).splitlines()[0]}") from error
    if not isinstance(content, dict):
        raise RequestError(f"{path} must hold keys and values, as `ijepa train --print_config` prints them.")
    types = {**_types(TrainConfig), "run": str | None}
    for key, value in flatten(content).items():
        if key not in types:
            raise RequestError(f"{path}: unknown key '{key}'.{nearest(key, list(types))}")
        if value is None and NoneType not in get_args(types[key]):
            raise RequestError(f"{path}: {key} needs a value, not null.")
    return path


def nearest(name: str, known: list[str]) -> str:
    """A sentence with the known name closest to `name`, or with all of them when few, or nothing."""
    if inside := [key for key in known if key.startswith(f"{name}.")]:
        return f" It is a group: set what is in it, such as '{inside[0]}'."
    last = _last(name)
    if alike := [key for key in known if _last(key) == last]:
        close = difflib.get_close_matches(name, alike, n=1, cutoff=0.0)
    elif not (close := difflib.get_close_matches(name, known, n=1)):
        match = difflib.get_close_matches(last, [_last(key) for key in known], n=1)
        close = [key for key in known if _last(key) in match]
    if close:
        return f" Did you mean '{close[0]}'?"
    return f" Known: {', '.join(known)}." if 0 < len(known) <= 12 else ""


def _last(name: str) -> str:
    """The part of a key or an option that tells most."""
    return name.rpartition(".")[2].removeprefix("--")


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
