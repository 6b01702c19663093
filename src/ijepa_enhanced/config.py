"""Recipes and configuration files: finding them, checking their keys, saving what a run resolved them to."""

from __future__ import annotations

import dataclasses
import difflib
from importlib import resources
from pathlib import Path
from typing import Any, get_type_hints

import yaml

from ijepa_enhanced.train.loop import TrainConfig

FREE_ON_RESUME = ("data.source", "data.max_unreadable", "data.workers", "compile", "checkpoint_every", "log_every")
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
    known = [*flatten(dataclasses.asdict(TrainConfig())), "run"]
    for key in flatten(content):
        if key not in known:
            raise RequestError(f"{path}: unknown key '{key}'.{nearest(key, known)}")
    return path


def nearest(name: str, known: list[str]) -> str:
    """A sentence with the known name closest to `name`, or with all of them when few, or nothing."""
    close = difflib.get_close_matches(name, known, n=1) or difflib.get_close_matches(
        name.rpartition(".")[2], [key.rpartition(".")[2] for key in known], n=1
    )
    if close:
        full = next(key for key in known if key == close[0] or key.endswith(f".{close[0]}"))
        return f" Did you mean '{full}'?"
    return f" Known: {', '.join(known)}." if 0 < len(known) <= 12 else ""


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
    before, after = flatten(dataclasses.asdict(saved)), flatten(dataclasses.asdict(asked))
    for key, value in after.items():
        if value != before[key] and key not in FREE_ON_RESUME:
            raise RequestError(
                f"{folder} was started with {key} = {before[key]}, so it cannot go on with {value}. "
                "Leave the flag out, or start a new run."
            )


def _build(cls: type[Any], values: dict[str, Any]) -> Any:
    types = get_type_hints(cls)
    return cls(
        **{name: _build(types[name], value) if isinstance(value, dict) else value for name, value in values.items()}
    )


def _recipes() -> Any:
    return resources.files("ijepa_enhanced") / "recipes"
