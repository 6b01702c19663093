"""Recipes and configuration files: finding them, checking their keys, saving what a run resolved them to."""

from __future__ import annotations

from importlib import resources
from pathlib import Path
from types import NoneType
from typing import Any, get_args

import yaml

from ijepa_enhanced.errors import RequestError, did_you_mean
from ijepa_enhanced.train.config import TrainConfig
from ijepa_enhanced.train.saved import flatten, types_of


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
    types = {**types_of(TrainConfig), "run": str | None}
    for key, value in flatten(content).items():
        if key not in types:
            raise RequestError(f"{path}: unknown key '{key}'.{did_you_mean(key, list(types))}")
        if value is None and NoneType not in get_args(types[key]):
            raise RequestError(f"{path}: {key} needs a value, not null.")
    return path


def _recipes() -> Any:
    return resources.files("ijepa_enhanced") / "recipes"
