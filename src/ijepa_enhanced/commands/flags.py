"""From a command's arguments to its options: `argparse` splits them, and `config.py` checks the values."""

from __future__ import annotations

import argparse
import dataclasses
import functools
import operator
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import MISSING, dataclass
from types import NoneType, UnionType
from typing import Any, Literal, NoReturn, Union, get_args, get_origin, get_type_hints

from ijepa_enhanced.commands.options import COMMANDS, Command, Common, Group
from ijepa_enhanced.config import checked, field_help, keys_of, recipe_names
from ijepa_enhanced.errors import RequestError, did_you_mean

ROOT = Group("Train image encoders on unlabeled images of any size, and evaluate them.", COMMANDS, "command")


@dataclass(frozen=True)
class Option:
    """One option or positional argument of a command."""

    field: str
    """The field of the command's options."""
    key: str
    """The key in that field, if it holds keys of a configuration, else empty."""
    shown: str
    """`--data.source` or `SOURCE`."""
    kind: Any
    default: Any
    """`MISSING`: it must be given."""
    help: str
    metavar: str
    group: str
    """The title that its help stands under, if not the command's own options."""

    @property
    def is_positional(self) -> bool:
        """Whether it is given by its place."""
        return not self.shown.startswith("--")

    @property
    def switch(self) -> bool:
        """Whether no value follows: an option of a command, not a key of a configuration, that is true or false."""
        return self.kind is bool and not self.key


def parse(arguments: Sequence[str], group: Group = ROOT, path: str = "ijepa") -> tuple[Command, Any]:
    """Return the command that the arguments after `path` ask for, and its options.

    Raises:
        RequestError: a command, an option or a value is wrong; the message names it.
        SystemExit: help was asked for, and is printed.
    """
    name, *rest = arguments or ["--help"]
    if name in ("--help", "-h"):
        print(overview(path, group))
        raise SystemExit(0)
    if name.startswith("-"):
        raise RequestError(f"Options come after the {group.kind}: {', '.join(group.commands)}.")
    if name not in group.commands:
        raise RequestError(f"No {group.kind} '{name}'.{did_you_mean(name, list(group.commands))}")
    command = group.commands[name]
    if isinstance(command, Group):
        return parse(rest, command, f"{path} {name}")
    return command, parse_options(command, f"{path} {name}", rest)


def overview(path: str, group: Group) -> str:
    """Return the help of a name with commands."""
    kind, width = group.kind, max(map(len, group.commands))
    lines = [f"  {name:{width}}  {command.purpose}" for name, command in group.commands.items()]
    head = [f"usage: {path} {kind.upper()} [OPTIONS]", "", group.purpose, "", f"{kind}s:"]
    return "\n".join([*head, *lines, "", f"Run `{path} {kind.upper()} --help` for the options of a {kind}."])


def parse_options(command: Command, path: str, arguments: Sequence[str]) -> Any:
    """Return the options of one command; see `parse`."""
    options = list(options_of(command.options))
    flags = {option.shown: option for option in options if not option.is_positional}
    for argument in arguments:
        name, equals, _ = argument.partition("=")
        if name.startswith("--") and name not in (*flags, "--help"):
            raise RequestError(f"Unknown option '{name}'.{did_you_mean(name, [*flags, '--help'])}")
        if equals and name in flags and flags[name].switch:
            raise RequestError(f"{name} takes no value.")
    found, left = make_parser(command, path, options).parse_known_intermixed_args(arguments)
    if left:
        by_shell = left[0] == "+" or left[0].endswith((".tar", ".parquet"))
        hint = " Quote names that contain spaces, asterisks or braces." if by_shell else ""
        raise RequestError(f"Unknown argument '{left[0]}'.{hint}")
    values: dict[str, Any] = {}
    for option in options:
        if option.shown in found:
            value = value_of(option, getattr(found, option.shown))
            if option.key:
                values.setdefault(option.field, {})[option.key] = value
            else:
                values[option.field] = value
    return command.options(**values)


def value_of(option: Option, given: Any) -> Any:
    """Return what was given for an option as its type.

    Raises:
        RequestError: it is not of that type.
    """
    if option.switch:
        return True
    if get_origin(option.kind) is tuple:
        return tuple(checked(option.shown, get_args(option.kind)[0], each) for each in given)
    return checked(option.shown, option.kind, given)


def options_of(cls: type[Common]) -> Iterator[Option]:
    """Yield the options of a command, those of every command last among its own, then the keys of configurations."""
    kinds, shared = get_type_hints(cls), {field.name for field in dataclasses.fields(Common)}
    for field in sorted(dataclasses.fields(cls), key=lambda field: ("config" in field.metadata, field.name in shared)):
        data = field.metadata
        if "config" in data:
            keys = keys_of(data["config"])
            for name in sorted(keys, key=lambda name: "." in name):
                key, shown = keys[name], f"{data['prefix']}{name}"
                group = shown.rpartition(".")[0] or "training"
                yield Option(field.name, name, f"--{shown}", key.kind, key.default, key.help, metavar(key.kind), group)
        else:
            kind = without_none(kinds[field.name])
            shown = data["metavar"] if data["positional"] else data["flag"] or f"--{field.name.replace('_', '-')}"
            owner = next(each for each in cls.__mro__ if field.name in each.__annotations__)
            text = field_help(owner)[field.name].replace("RECIPES", ", ".join(recipe_names()))
            yield Option(field.name, "", shown, kind, field.default, text, data["metavar"] or metavar(kind), "")


def without_none(kind: Any) -> Any:
    """Return a type without None, which an option of a command has when it is not given."""
    if get_origin(kind) not in (Union, UnionType):
        return kind
    return functools.reduce(operator.or_, [each for each in get_args(kind) if each is not NoneType])


def metavar(kind: Any) -> str:
    """Return what the help calls a value of a type."""
    if get_origin(kind) is Literal:
        return "|".join(get_args(kind))
    return {int: "N", float: "X", bool: "true|false"}.get(without_none(kind), "TEXT")


class Parser(argparse.ArgumentParser):
    """Splits the arguments of one command; what it refuses is a RequestError."""

    def error(self, message: str) -> NoReturn:
        """Raise RequestError."""
        raise RequestError(f"{message[0].upper()}{message[1:]}. See `{self.prog} --help`.")


def make_parser(command: Command, path: str, options: Sequence[Option]) -> Parser:
    """Return the parser of one command: what is given stays text, and what is not given is left out."""
    width = min(shutil.get_terminal_size().columns, 120) - 2
    needed = [usage_of(option) for option in options if option.is_positional or option.default is MISSING]
    parser = Parser(
        prog=path,
        usage=" ".join([path, *needed, "[OPTIONS]"]),
        description=f"{command.purpose}\n\nexample: {command.example}",
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
        formatter_class=lambda prog: argparse.RawDescriptionHelpFormatter(prog, max_help_position=28, width=width),
    )
    groups: dict[str, Any] = {"": parser}
    for option in options:
        if option.group not in groups:
            groups[option.group] = parser.add_argument_group(option.group)
        add_option(groups[option.group], option)
    return parser


def usage_of(option: Option) -> str:
    """Return how the usage line writes a positional argument, or an option that must be given."""
    many = " ..." if get_origin(option.kind) is tuple else ""
    if not option.is_positional:
        return f"{option.shown} {option.metavar}"
    return f"{option.metavar}{many}" if option.default is MISSING else f"[{option.metavar}]"


def add_option(parser: Any, option: Option) -> None:
    """Make an option known to a parser."""
    needed = option.default is MISSING
    quiet = needed or option.switch or option.default is None or option.default == ()
    shown = "" if quiet else f" (default: {yaml_text(option.default)})"
    more: dict[str, Any] = {"help": f"{option.help}{shown}".replace("%", "%%")}
    if option.switch:
        more["action"] = "store_true"
    else:
        inner = get_args(option.kind) if get_origin(option.kind) is tuple else ()
        more["metavar"] = tuple(option.metavar.split()) if len(inner) == 2 and Ellipsis not in inner else option.metavar
        if inner:
            more["nargs"] = "+" if Ellipsis in inner else len(inner)
    if option.is_positional:
        parser.add_argument(option.shown, **({} if needed else {"nargs": "?"}), **more)
    else:
        parser.add_argument(option.shown, dest=option.shown, required=needed, **more)


def yaml_text(value: Any) -> str:
    """Return a default as a user would write it."""
    if isinstance(value, tuple):
        return " ".join(value)
    return str(value).lower() if isinstance(value, bool) else str(value)
