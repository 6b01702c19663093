"""Configurations: the keys of a dataclass, the values that each accepts, and the YAML files that set them.

Command-line flags and YAML files share these rules. The module imports neither torch nor PIL, so that `--help` is fast.
"""

from __future__ import annotations

import ast
import dataclasses
import functools
import inspect
import itertools
import re
import sys
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import yaml

from ijepa_enhanced.errors import RequestError, did_you_mean, first_sentence, unknown

Config = TypeVar("Config")


@dataclass(frozen=True)
class Key:
    """One value of a configuration."""

    kind: Any
    """Its type."""
    default: Any
    help: str
    """The docstring of its field."""
    group: type[Any]
    """The dataclass that has the field."""
    metavar: str
    """What the help calls its value, if that is not the name of its type."""


def keys_of(cls: type[Any], prefix: str = "") -> dict[str, Key]:
    """Return all keys of a dataclass and of the dataclasses in it, by their dotted names."""
    found: dict[str, Key] = {}
    kinds, helps = get_type_hints(cls), field_help(cls)
    for field in dataclasses.fields(cls):
        kind = kinds[field.name]
        if dataclasses.is_dataclass(kind):
            assert isinstance(kind, type)
            found |= keys_of(kind, f"{prefix}{field.name}.")
        else:
            found[f"{prefix}{field.name}"] = Key(
                kind, field.default, helps.get(field.name, ""), cls, field.metadata.get("metavar", "")
            )
    return found


def field_help(cls: type[Any]) -> dict[str, str]:
    """Return the docstrings that follow the fields of a class, on one line each."""
    tree = _syntax(sys.modules[cls.__module__].__file__ or "")
    (body,) = [node.body for node in tree.body if isinstance(node, ast.ClassDef) and node.name == cls.__name__]
    found = {}
    for field, after in itertools.pairwise(body):
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name) and isinstance(after, ast.Expr):
            found[field.target.id] = " ".join(inspect.cleandoc(ast.literal_eval(after.value)).split())
    return found


@functools.cache
def _syntax(file: str) -> ast.Module:
    return ast.parse(Path(file).read_text(encoding="utf-8"))


def as_options(message: str, keys: Collection[str]) -> str:
    """Return a message with each of `keys` in it as an option of the command line: `optim.lr` -> `--optim.lr`."""
    return re.sub(r"[\w.]*\w", lambda word: f"--{word[0]}" if word[0] in keys else word[0], message)


def build(cls: type[Config], values: Mapping[str, Any]) -> Config:
    """Return a dataclass with values by their dotted names, and defaults for all others.

    Raises:
        RequestError: a value is out of its range.
    """
    own = {name: value for name, value in values.items() if "." not in name}
    for name, kind in get_type_hints(cls).items():
        if dataclasses.is_dataclass(kind):
            assert isinstance(kind, type)
            inner = {key.removeprefix(f"{name}."): value for key, value in values.items() if key.startswith(f"{name}.")}
            own[name] = build(kind, inner)
    try:
        return cls(**own)
    except ValueError as error:
        raise RequestError(str(error)) from error


def checked(name: str, kind: Any, value: Any) -> Any:
    """Return a value of YAML or of the command line as its type wants it; text may stand for a number.

    Args:
        name: the option or key, for the message.
        kind: str, int, float, bool, None, a Literal, a tuple of integers or numbers, or a union of these.
        value: what was given.

    Raises:
        RequestError: it is not of that type.
    """
    kinds = get_args(kind) if get_origin(kind) in (Union, UnionType) else (kind,)
    for each in sorted(kinds, key=lambda kind: kind is not NoneType):  # `null` is not the name of a file
        found = _converted(each, value)
        if found is not _NO:
            return found
    wanted = [word for each in kinds for word in (get_args(each) if get_origin(each) is Literal else (_WORDS[each],))]
    shown = f"'{value}'" if isinstance(value, str) else yaml.safe_dump(value, default_flow_style=True).split("\n")[0]
    shown = shown if len(shown) <= _SHOWN else f"{shown[:_SHOWN]}..."
    raise RequestError(f"{name} must be {either(wanted)}, not {shown}.")


_NO = object()
_SHOWN = 100
"""Most characters of a wrong value that a message repeats."""
_WORDS: dict[Any, str] = {
    str: "a string",
    int: "an integer",
    float: "a number",
    bool: "true or false",
    NoneType: "null",
    tuple[int, int]: "two integers",
    tuple[float, ...]: "a list of numbers",
}


def _converted(kind: Any, value: Any) -> Any:
    """Return the value as one type that is no union, or `_NO`."""
    if get_origin(kind) is Literal:
        return value if value in get_args(kind) else _NO
    if kind is NoneType:
        return None if value in (None, "null") else _NO
    if kind is bool:
        return {"true": True, "false": False}.get(str(value).lower(), _NO)
    if kind is str:
        return value if isinstance(value, str) else _NO
    if get_origin(kind) is tuple:
        part, *others = get_args(kind)
        if not isinstance(value, list) or (others != [...] and len(value) != 1 + len(others)):
            return _NO
        found = tuple(_converted(part, each) for each in value)
        return _NO if _NO in found else found
    if isinstance(value, bool) or not isinstance(value, (str, int) if kind is int else (str, int, float)):
        return _NO
    try:
        return kind(value)
    except (ValueError, OverflowError):
        return _NO


def either(words: list[str]) -> str:
    """Return `a, b or c`."""
    return " or ".join(filter(None, [", ".join(words[:-1]), words[-1]]))


def recipe_names() -> list[str]:
    """Return the names of the recipes in the package."""
    return sorted(item.name.removesuffix(".yaml") for item in _recipes().iterdir() if item.name.endswith(".yaml"))


def find_config(name_or_file: str) -> Path:
    """Return the file of a recipe by its name, or the file itself.

    Raises:
        RequestError: there is no such file or recipe.
    """
    for path in (Path(name_or_file), Path(str(_recipes() / f"{name_or_file}.yaml"))):
        if path.is_file():
            return path
    raise RequestError(f"No file or recipe '{name_or_file}'.{did_you_mean(name_or_file, recipe_names())}")


NOT_YAML = (yaml.YAMLError, ValueError, LookupError, AttributeError, RecursionError)
"""What PyYAML raises: the first for most mistakes, the others for values that do not fit their tag, such as a month 13,
for text that is not UTF-8, and for deep nesting."""


def read_config(path: Path, cls: type[Any], more: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values that a YAML file sets, by their dotted names.

    Args:
        path: the file.
        cls: the dataclass whose keys the file may set.
        more: further keys that it may set, with their types.

    Raises:
        RequestError: the file is not YAML, or has an unknown key or a value of the wrong type; the message names it.
    """
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except NOT_YAML as error:
        raise RequestError(not_yaml(path, error)) from error
    if not isinstance(content, dict):
        raise RequestError(
            f"{path} must be a YAML mapping of keys to values, such as the output of `ijepa train --print-config`."
        )
    kinds = {name: key.kind for name, key in keys_of(cls).items()} | dict(more)
    found = {}
    for name, value in flatten(content, kinds).items():
        if name not in kinds:
            raise RequestError(unknown("key", name, list(kinds), str(path)))
        found[name] = checked(f"{path}: {name}", kinds[name], value)
    return found


def not_yaml(path: Path, error: Exception) -> str:
    """Return the message of a file that is not YAML, with the place of the mistake if `yaml` names it."""
    mark = getattr(error, "problem_mark", None)
    if mark is None:
        said = isinstance(error, (yaml.YAMLError, ValueError))
        reason = first_sentence(error) if said else "a value does not fit its tag, or the nesting is too deep."
        return f"{path} is not valid YAML: {reason}"
    problem = getattr(error, "problem", None) or "syntax error"
    return f"{path} is not valid YAML: {problem} (line {mark.line + 1}, column {mark.column + 1})."


def flatten(nested: Mapping[Any, Any], known: Collection[str] | None = None, prefix: str = "") -> dict[str, Any]:
    """Join the keys of nested dictionaries with dots: {'a': {'b': 1}} -> {'a.b': 1}.

    Args:
        nested: the dictionaries.
        known: dotted names. Dictionaries that cannot hold one stay as they are, because aliases of YAML can nest a
            dictionary in itself, or repeat it billions of times. None: all dictionaries are joined.
        prefix: of the keys.
    """
    flat: dict[str, Any] = {}
    for key, value in nested.items():
        name = f"{prefix}{key}"
        group = isinstance(value, dict) and (known is None or any(each.startswith(f"{name}.") for each in known))
        flat |= flatten(value, known, f"{name}.") if group else {name: value}
    return flat


def _recipes() -> Any:
    return resources.files("ijepa_enhanced") / "recipes"
