"""From a command's arguments to its options: `argparse` splits them, and `config.py` checks the values."""

from __future__ import annotations

import argparse
import dataclasses
import functools
import operator
import re
import shutil
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import MISSING, dataclass
from types import NoneType, UnionType
from typing import Any, Literal, NoReturn, Union, get_args, get_origin, get_type_hints

from ijepa_enhanced.commands.options import Common
from ijepa_enhanced.commands.table import COMMANDS, Command, Group
from ijepa_enhanced.config import checked, either, field_help, keys_of, recipe_names
from ijepa_enhanced.errors import RequestError, unknown

ROOT = Group(
    "Train image encoders on unlabeled images of any size with I-JEPA (self-supervised learning), and evaluate them.",
    ("ijepa train photos --run runs/pets", "ijepa evaluate runs/pets --data labeled-photos"),
    COMMANDS,
    "command",
)


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
    listed: bool
    """Whether the help lists it."""

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
        kind, names = group.kind, ", ".join(group.commands)
        raise RequestError(f"Put the {kind} first, then its options. {kind.capitalize()}s: {names}.")
    if name not in group.commands:
        raise RequestError(unknown(group.kind, name, list(group.commands)))
    command = group.commands[name]
    if isinstance(command, Group):
        return parse(rest, command, f"{path} {name}")
    return command, parse_options(command, f"{path} {name}", rest)


def all_commands(group: Group = ROOT, path: str = "ijepa") -> Iterator[tuple[str, Command]]:
    """Yield every command with the words that call it."""
    for name, command in group.commands.items():
        if isinstance(command, Group):
            yield from all_commands(command, f"{path} {name}")
        else:
            yield f"{path} {name}", command


def overview(path: str, group: Group) -> str:
    """Return the help of a name with commands."""
    kind, width = group.kind, max(map(len, group.commands))
    lines = [f"  {name:{width}}  {command.purpose}" for name, command in group.commands.items()]
    head = [f"usage: {path} {kind.upper()} [OPTIONS]", "", group.purpose, "", f"{kind}s:"]
    more = f"Run `{path} {kind.upper()} --help` for the options of a {kind}, and `ijepa --version` for the version."
    pages = "Help texts refer to files such as docs/data.md, which are in the source repository."
    return "\n".join([*head, *lines, "", examples_of(group), "", more, pages])


def examples_of(command: Command | Group) -> str:
    """Return the part of the help with the examples."""
    many = "s" if len(command.examples) > 1 else ""
    return "\n".join([f"example{many}:", *(f"  {example}" for example in command.examples)])


def parse_options(command: Command, path: str, arguments: Sequence[str]) -> Any:
    """Return the options of one command; see `parse`."""
    options = list(options_of(command.options))
    flags = {option.shown: option for option in options if not option.is_positional}
    for argument in arguments:
        name, equals, _ = argument.partition("=")
        if name.startswith("--") and name not in (*flags, "--help"):
            raise RequestError(unknown_option(name, path, [*flags, "--help"]))
        if equals and name in flags and flags[name].switch:
            raise RequestError(f"{name} takes no value.")
    found, left = make_parser(command, path, options).parse_known_intermixed_args(arguments)
    if left:
        raise RequestError(unexpected(left[0], path, [option.shown for option in options if option.is_positional]))
    values: dict[str, Any] = {}
    for option in options:
        if option.shown in found:
            value = value_of(option, getattr(found, option.shown))
            if option.key:
                values.setdefault(option.field, {})[option.key] = value
            else:
                values[option.field] = value
    return command.options(**values)


def unknown_option(name: str, path: str, known: list[str]) -> str:
    """Return the message of an option that a command does not have."""
    owners = [
        f"`{other}`"
        for other, command in all_commands()
        if name in (option.shown for option in options_of(command.options))
    ]
    if owners:
        return f"`{path}` has no option '{name}'. It is an option of {either(owners)}."
    return unknown("option", name, known)


def unexpected(argument: str, path: str, positional: Sequence[str]) -> str:
    """Return the message of an argument beyond the positional ones of a command."""
    if argument == "+":
        return "Unexpected argument '+'. Quote a source that contains spaces: 'photos + more-photos'."
    if argument.endswith((".tar", ".parquet")):
        pattern = re.sub(r"\d+", "*", argument)
        return (
            f"Unexpected argument '{argument}'. If you typed a pattern, quote it so that the shell does not expand it: "
            f"'{pattern}'."
        )
    count, names = len(positional), ", ".join(positional)
    takes = f"{count} positional argument{'s' * (count > 1)}: {names}"
    return f"Unexpected argument '{argument}'. `{path}` takes {takes}. Quote a name that contains spaces."


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
                yield Option(
                    field.name,
                    name,
                    f"--{shown}",
                    key.kind,
                    key.default,
                    key.help,
                    key.metavar or metavar(key.kind),
                    group,
                    listed=name.startswith(data["shown"]) and name not in data["hidden"],
                )
        else:
            kind = without_none(kinds[field.name])
            shown = data["metavar"] if data["positional"] else f"--{field.name.replace('_', '-')}"
            owner = next(each for each in cls.__mro__ if field.name in each.__annotations__)
            text = field_help(owner)[field.name].replace("RECIPES", ", ".join(recipe_names()))
            yield Option(field.name, "", shown, kind, field.default, text, data["metavar"] or metavar(kind), "", True)


def without_none(kind: Any) -> Any:
    """Return a type without None, which an option of a command has when it is not given."""
    if get_origin(kind) not in (Union, UnionType):
        return kind
    return functools.reduce(operator.or_, [each for each in get_args(kind) if each is not NoneType])


def metavar(kind: Any) -> str:
    """Return what the help calls a value of a type."""
    if get_origin(kind) is Literal:
        return "|".join(get_args(kind))
    return {int: "INT", float: "FLOAT", bool: "true|false"}.get(without_none(kind), "STR")


class Parser(argparse.ArgumentParser):
    """Splits the arguments of one command; what it refuses is a RequestError.

    Args:
        usages: how each option is written with its value.
        arguments: of `argparse.ArgumentParser`.
    """

    def __init__(self, usages: Mapping[str, str], **arguments: Any) -> None:
        super().__init__(**arguments)
        self.usages = usages

    def error(self, message: str) -> NoReturn:
        """Raise RequestError."""
        subject, _, problem = message.removeprefix("argument ").partition(": ")
        if problem.startswith("expected"):  # "expected one argument"
            message = f"{subject} needs a value: {self.usages[subject]}"
        elif subject == "the following arguments are required":
            message = f"Missing: {problem}"
        raise RequestError(f"{message}. See `{self.prog} --help`.")


class HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Does not break lines at the hyphens of a name such as own-images-cpu."""

    def _split_lines(self, text: str, width: int) -> list[str]:
        return textwrap.wrap(" ".join(text.split()), width, break_on_hyphens=False)


def make_parser(command: Command, path: str, options: Sequence[Option]) -> Parser:
    """Return the parser of one command: what is given stays text, and what is not given is left out."""
    width = min(shutil.get_terminal_size().columns, 120) - 2
    needed = [usage_of(option) for option in options if option.is_positional or option.default is MISSING]
    parts = [command.purpose, examples_of(command), *filter(None, [command.note])]
    parser = Parser(
        {option.shown: usage_of(option) for option in options},
        prog=path,
        usage=f"{path} {command.usage or ' '.join([*needed, '[OPTIONS]'])}",
        description="\n\n".join(parts),
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
        formatter_class=lambda prog: HelpFormatter(prog, max_help_position=28, width=width),
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
    more: dict[str, Any] = {"help": help_of(option).replace("%", "%%") if option.listed else argparse.SUPPRESS}
    if option.switch:
        more["action"] = "store_true"
    else:
        inner = get_args(option.kind) if get_origin(option.kind) is tuple else ()
        more["metavar"] = tuple(option.metavar.split()) if len(inner) == 2 and Ellipsis not in inner else option.metavar
        if inner:
            more["nargs"] = "+" if Ellipsis in inner else len(inner)
    if option.is_positional:
        parser.add_argument(option.shown, **(more if needed else more | {"nargs": "*" if "nargs" in more else "?"}))
    else:
        parser.add_argument(option.shown, dest=option.shown, required=needed, **more)


def help_of(option: Option) -> str:
    """Return the help of an option, with its default."""
    # If an option of a command is None by default, its own help says what None means.
    quiet = option.switch or option.default in (MISSING, ()) or (option.default is None and not option.key)
    return option.help if quiet else f"{option.help} (default: {yaml_text(option.default)})"


def yaml_text(value: Any) -> str:
    """Return a default as a user would write it."""
    if isinstance(value, tuple):
        return " ".join(value)
    if value is None:
        return "null"
    return str(value).lower() if isinstance(value, bool) else str(value)
