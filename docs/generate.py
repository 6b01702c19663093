"""Generate the reference pages that come from the code: the command line, and the configuration of a run."""

import inspect
import re
from collections.abc import Iterator
from itertools import groupby
from textwrap import dedent
from types import NoneType
from typing import get_args

from ijepa_enhanced.commands.flags import Option, all_commands, help_of, metavar, options_of, usage_of, yaml_text
from ijepa_enhanced.config import find_config, keys_of, recipe_names
from ijepa_enhanced.train.config import TrainConfig


def command_line() -> Iterator[str]:
    """Yield Markdown: each command with its options. The configuration keys of a run are on another page."""
    for path, command in all_commands():
        yield f"## {path}\n\n{markdown(command.purpose)}\n"
        yield "\n".join(["```sh", *command.examples, "```\n"])
        prose, *example = re.split(r"\n(?=  )", command.note, maxsplit=1)
        yield markdown(prose) + "\n"
        yield from (f"```yaml\n{dedent(text)}\n```\n" for text in example)
        options = sorted(options_of(command.options), key=lambda option: not option.is_positional)
        yield f"```{{program}} {path}\n```\n"
        for option in options:
            if option.field != "given":
                yield directive("option", signature(option), help_of(option))
        if any(option.field == "given" for option in options):
            yield "The training options are the keys of the [configuration](configuration.md): `--optim.lr 0.0003`.\n"


def configuration() -> Iterator[str]:
    """Yield Markdown: each key of a run, and the recipes."""
    keys = sorted(keys_of(TrainConfig).items(), key=lambda item: "." in item[0])
    for config, group in groupby(keys, key=lambda item: item[1].group):
        members = list(group)
        yield f"## {members[0][0].rpartition('.')[0] or 'The run'}\n\n{markdown(inspect.getdoc(config) or '')}\n"
        for name, key in members:
            kind = metavar(key.kind).lower() + " or null" * (NoneType in get_args(key.kind))
            yield directive("confval", name, f"`{kind}`, default `{yaml_text(key.default)}`\n\n{key.help}")
    yield "## Recipes\n"
    for name in recipe_names():
        yield f"### {name}\n\n```yaml\n{find_config(name).read_text()}```\n"


def signature(option: Option) -> str:
    """Return how an option is written."""
    if option.switch:
        return option.shown
    many = Ellipsis in get_args(option.kind) and not option.is_positional
    return usage_of(option) + " ..." * many


def directive(name: str, head: str, text: str) -> str:
    """Return a directive of MyST."""
    return f":::{{{name}}} {head}\n{markdown(text)}\n:::\n"


def markdown(text: str) -> str:
    """Format the options in a docstring as code, and the pages of the documentation that it names as links."""
    parts = re.split(r"(`.*?`)", text)
    for place in range(0, len(parts), 2):  # outside code
        linked = re.sub(r"docs/([\w/]*?)(\w+)\.md", r"[\2](../\1\2.md)", parts[place])
        parts[place] = re.sub(r"--[\w.-]*\w", r"`\g<0>`", linked)
    return "".join(parts)
