"""The command line: results on stdout, progress and logs on stderr, exit code 0, 1 (failed) or 2 (wrong request)."""

from __future__ import annotations

import argparse
import io
import itertools
import logging
import re
import sys
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from jsonargparse import ArgumentParser, Namespace, set_parsing_settings

from ijepa_enhanced.commands import Command, benchmark, evaluate, index, inspect, prepare, report, study, train
from ijepa_enhanced.config import find_config
from ijepa_enhanced.distributed import is_one_of_many
from ijepa_enhanced.errors import (
    CheckpointError,
    PlanError,
    RankError,
    RequestError,
    ResumeError,
    RunError,
    SourceError,
    UnreadableImage,
    did_you_mean,
)
from ijepa_enhanced.train.saved import config_of_run

logger = logging.getLogger("ijepa_enhanced")


class StderrHandler(logging.Handler):
    """Writes to what is stderr at that moment: a progress bar puts itself there to keep below the messages.

    Nothing is said twice: pictures and scores read the same images again, and would repeat what is wrong with them.
    """

    def __init__(self) -> None:
        super().__init__()
        self.said: set[str] = set()

    def emit(self, record: logging.LogRecord) -> None:
        """Write one message."""
        message = self.format(record)
        if message not in self.said:
            self.said.add(message)
            print(message, file=sys.stderr)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # as stderr is: names of files need not be text
    debug = "--debug" in arguments
    logging.basicConfig(handlers=[StderrHandler()], format="%(message)s", force=True)
    logger.setLevel(logging.DEBUG if debug else logging.INFO)
    try:
        command, options = parse(arguments)
        if command not in (train.COMMAND, evaluate.COMMAND) and is_one_of_many():
            raise RequestError("torchrun shares out training and evaluation alone: give this command without it.")
        return command.run(options)
    except SystemExit as finished:  # --help and --version end this way
        return int(finished.code or 0)
    except (RequestError, SourceError, PlanError, ResumeError) as error:
        return failure(error, str(error), 2, debug)
    except (RunError, RankError, CheckpointError, UnreadableImage) as error:
        return failure(error, str(error), 1, debug)
    except torch.OutOfMemoryError as error:
        return failure(error, "The GPU's memory is too small for this, or other programs hold it.", 1, debug)
    except OSError as error:
        message = f"{error.filename}: {error.strerror}." if error.filename and error.strerror else str(error)
        return failure(error, message, 1, debug)
    except KeyboardInterrupt as error:
        return failure(error, "Interrupted.", 1, debug)
    except Exception as error:
        message = f"{type(error).__name__}: {error}\nThis should not happen; --debug shows where."
        return failure(error, message, 1, debug)


def failure(error: BaseException, message: str, code: int, debug: bool) -> int:
    """Print what went wrong, with a traceback only when asked for, and return the exit code."""
    if debug:
        traceback.print_exception(error)
    print(f"ijepa: {message}", file=sys.stderr)
    return code


@dataclass(frozen=True)
class Group:
    """A name with commands of its own."""

    purpose: str
    commands: Mapping[str, Command]
    kind: str
    """What one of its commands is called."""


COMMANDS: dict[str, Command | Group] = {
    "train": train.COMMAND,
    "evaluate": evaluate.COMMAND,
    "report": report.COMMAND,
    "index": index.COMMAND,
    "prepare": prepare.COMMAND,
    "inspect": Group(
        "Draw what is in a source, masks, how a pack is filled, what merges, or what features see.",
        inspect.COMMANDS,
        "picture",
    ),
    "study": study.COMMAND,
    "benchmark": benchmark.COMMAND,
}
PURPOSE = "Train image encoders on images of any size by self-supervision (I-JEPA), and measure them."


def parse(arguments: Sequence[str]) -> tuple[Command, Namespace]:
    """The command and its options, with its configuration built and checked.

    Raises:
        RequestError: an option, a key or a value is wrong; the message names it.
        SystemExit: help or the version was asked for and printed.
    """
    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    version = sys.modules["ijepa_enhanced"].__version__  # no file imports the package, which imports from the floors
    parser = ArgumentParser(prog="ijepa", description=PURPOSE, exit_on_error=False, print_config=None, version=version)
    parsers = add_commands(parser, COMMANDS)
    name, *rest = arguments or ["--help"]
    check_name(name, list(COMMANDS), "command")
    path, command = [name], COMMANDS.get(name)
    if isinstance(command, Group):
        name, *rest = rest or ["--help"]
        check_name(name, list(command.commands), command.kind)
        path, command = [*path, name], command.commands.get(name)
    known = options_of(parsers[tuple(path)]) if command else []
    check_options(rest, known)
    try:
        options: Namespace = parser.instantiate(parser.parse_args([*path, *with_config_files(rest)]))
    except argparse.ArgumentError as error:
        raise RequestError(plain_words(str(error), known)) from error
    except ValueError as error:
        raise RequestError(str(error)) from error
    assert command is not None  # help and version have ended above
    for name in path:
        options = options[name]
    return command, options


def add_commands(
    parser: ArgumentParser, commands: Mapping[str, Command | Group], path: tuple[str, ...] = ()
) -> dict[tuple[str, ...], ArgumentParser]:
    """Make commands known to the parser above them; the parser of each command, by its names."""
    made: dict[tuple[str, ...], ArgumentParser] = {}
    subcommands = parser.add_subcommands(required=False)
    for name, command in commands.items():
        below = ArgumentParser(exit_on_error=False, print_config=None, description=command.purpose)
        subcommands.add_subcommand(name, below, help=command.purpose)  # before what is below it
        if isinstance(command, Group):
            made |= add_commands(below, command.commands, (*path, name))
        else:
            command.add_options(below)
            below.add_argument("--json", action="store_true", help="end stdout with one line of JSON")
            below.add_argument("--debug", action="store_true", help="show tracebacks and debugging messages")
            made[*path, name] = below
    return made


def check_name(name: str, known: list[str], kind: str) -> None:
    """Raise RequestError where a name, or what can stand in its place, is expected and something else was given."""
    if name not in ("--help", "-h", "--version", *known):
        raise RequestError(
            f"Options come after the {kind}: {', '.join(known)}."
            if name.startswith("-")
            else f"No {kind} '{name}'.{did_you_mean(name, known)}"
        )


def options_of(command: ArgumentParser) -> list[str]:
    """The options that a command's help shows, without its abbreviations."""
    shown = command._option_string_actions.items()
    return [name for name, action in shown if action.help != argparse.SUPPRESS and name.startswith("--")]


def check_options(arguments: list[str], known: list[str]) -> None:
    """Raise RequestError for the first option that is not known; the parser itself would take any abbreviation."""
    for argument in arguments:
        name = argument.partition("=")[0]
        if name.startswith("--") and name not in known:
            raise RequestError(f"Unknown option '{name}'.{did_you_mean(name, known)}")


def with_config_files(arguments: list[str]) -> list[str]:
    """The arguments with recipes' names replaced by their files, and a resumed run's configuration put first."""
    split: list[str] = []
    for argument in arguments:
        split += argument.split("=", 1) if argument.startswith(("--config=", "--resume=")) else [argument]
    resolved = split[:1]
    for before, argument in itertools.pairwise(split):
        resolved.append(str(find_config(argument)) if before == "--config" else argument)
        if before == "--resume":
            resolved[:0] = ["--config", str(find_config(str(config_of_run(Path(argument)))))]
    return resolved


def plain_words(message: str, known: list[str]) -> str:
    """The parser's complaint as a sentence or two that a user can act on; `known` are the command's options."""
    if found := re.match(r"unrecognized arguments: (\S+)", message):
        by_shell = found[1] == "+" or found[1].endswith((".tar", ".parquet"))
        hint = " Put a name with spaces, asterisks or braces in quotes." if by_shell else ""
        return f"Unknown argument '{found[1]}'.{hint}"
    if found := re.match(r"the following arguments are required: (.*)", message):
        names = [name.rpartition(".")[2] for name in found[1].split(", ")]
        return f"Missing: {', '.join(f'--{name}' if f'--{name}' in known else name for name in names)}."
    if found := re.match(r"argument (\S+): expected (?:at least )?one argument", message):
        return f"{found[1]} needs a value."
    if found := re.match(r"argument (\S+): ignored explicit argument", message):
        return f"{found[1]} takes no value."
    if found := re.match(r"argument (\S+): invalid choice: '(.*)' \(choose from (.*)\)", message):
        choices = re.findall(r"\w+", found[3])
        return f"{found[1]} takes {either(choices)}, not '{found[2]}'."
    key = re.match(r'Parser key "(.+?)":', message)
    given = re.findall(r"(?:Got|Given) value: (.*)", message)
    types = re.search(r"Subtypes: \[(.*)\]", message) or re.search(r"Expected a (.*?)\. Got", message)
    if key and given and types:
        wanted = [JSON_NAMES.get(name, name) for name in re.findall(r"'(\w+)'", types[1])]
        return f"{key[1]} takes {either(wanted)}, not {YAML_WORDS.get(given[-1], repr(given[-1]))}."
    return message


def either(words: list[str]) -> str:
    """`a, b or c`."""
    return " or ".join(filter(None, [", ".join(words[:-1]), words[-1]]))


JSON_NAMES = {"NoneType": "null", "str": "text", "bool": "true or false", "int": "a whole number", "float": "a number"}
YAML_WORDS = {"None": "null", "True": "true", "False": "false"}
