"""What a study file says."""

from __future__ import annotations

import dataclasses
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml

from ijepa_enhanced.config import NOT_YAML, checked, not_yaml
from ijepa_enhanced.errors import RequestError, unknown

NATIVE = "native"


@dataclass(frozen=True)
class StudyConfig:
    """A study: which arms to train, and how to score them. An arm is one way to train."""

    arms: dict[str, str]
    """Flags of `ijepa train` for each arm, such as `--objective.vicreg_weight 0`, by the name of the arm. The others
    are compared with the first one."""
    val: str
    """Source that encoders are scored on."""
    common: str = ""
    """Flags of `ijepa train` for all arms, such as `--config own-images-cpu --steps 300`."""
    train: str | None = None
    """Source that the probes learn from. Null: the source of the first arm's training."""
    resolution: int | Literal["native"] | None = None
    """sqrt(height * width) in pixels that images are scored at, or `native` for their own size. Null: the resolution
    that each encoder was trained at."""
    seeds: tuple[int, ...] = (0, 1, 2)
    seconds: float | None = None
    """Training time of a run on this machine, instead of a number of steps: each arm is timed first, and all its runs
    get as many steps as fit into this time."""


KINDS: dict[str, Any] = {
    "common": str,
    "val": str,
    "train": str | None,
    "resolution": int | Literal["native"] | None,
    "seconds": float | None,
}
"""Types of the values in a study file."""


def load_study(path: Path) -> StudyConfig:
    """Return the study in a YAML file.

    Raises:
        RequestError: the file cannot be read, or a key or a value in it is wrong.
    """
    content = _read(path)
    known = [field.name for field in dataclasses.fields(StudyConfig)]
    if not isinstance(content, dict) or not content.get("arms") or not isinstance(content["arms"], dict):
        raise RequestError(
            f"{path}: `arms` is missing or is not a mapping of names to flags of `ijepa train`. Required keys: "
            f"{', '.join(known[:2])}. Optional keys: {', '.join(known[2:])}."
        )
    for key in content:
        if key not in known:
            raise RequestError(unknown("key", str(key), known, str(path)))
    if "val" not in content:
        raise RequestError(f"{path}: `val` is missing. Set it to the labeled images to score encoders on.")
    for key in KINDS.keys() & content.keys():
        content[key] = _checked(path, key, content[key])
    seeds = content.get("seeds", StudyConfig.seeds)
    if not isinstance(seeds, Sequence) or not seeds or not all(type(seed) is int and seed >= 0 for seed in seeds):
        raise RequestError(f"{path}: seeds must be a non-empty list of integers of at least 0, not {seeds!r}.")
    arms = {str(name): str(flags or "") for name, flags in content["arms"].items()}
    for arm in arms:
        if "/" in arm or arm.startswith("."):
            raise RequestError(
                f"{path}: invalid arm name '{arm}'. Names become folder names, which cannot contain '/' or start with "
                "'.'."
            )
        flags = f"{content.get('common', '')} {arms[arm]}".strip()
        try:
            shlex.split(flags)
        except ValueError as error:
            raise RequestError(f"{path}: the flags of arm '{arm}' cannot be parsed ({error}): {flags}") from error
    return StudyConfig(**content | {"arms": arms, "seeds": tuple(dict.fromkeys(seeds))})


def _read(path: Path) -> Any:
    try:
        return yaml.safe_load(path.read_text())
    except OSError as error:
        raise RequestError(f"{path}: {error.strerror}.") from error
    except NOT_YAML as error:
        raise RequestError(not_yaml(path, error)) from error


def _checked(path: Path, key: str, value: Any) -> Any:
    """Return a value as its type, or raise RequestError if it is of the wrong type or out of its range."""
    value = checked(f"{path}: {key}", KINDS[key], value)
    if isinstance(value, int | float) and not value > 0:
        raise RequestError(f"{path}: {key} must be above 0, not {value}.")
    return value
