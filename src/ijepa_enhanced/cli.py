"""The command line: results on stdout, progress and logs on stderr, exit code 0, 1 (failed) or 2 (wrong request)."""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import logging
import re
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from jsonargparse import ArgumentParser, Namespace, set_parsing_settings
from rich.console import Console
from rich.table import Table
from torch import Tensor

from ijepa_enhanced.benchmarks import loader, packing
from ijepa_enhanced.config import RequestError, check_resumable, config_of_run, find_config, load_config, nearest
from ijepa_enhanced.data.index import Index, build_index, summary
from ijepa_enhanced.data.loader import PackDataset
from ijepa_enhanced.data.plan import Plan, PlanError
from ijepa_enhanced.data.sources import Source, SourceError, open_source
from ijepa_enhanced.evaluate.features import Features, extract, thumbnails
from ijepa_enhanced.evaluate.protocol import score
from ijepa_enhanced.models.encoder import Encoder
from ijepa_enhanced.packed import MaskedBatch
from ijepa_enhanced.train.checkpoint import CheckpointError
from ijepa_enhanced.train.logging import read_log
from ijepa_enhanced.train.loop import ResumeError, RunError, TrainConfig, autocast_dtype, train
from ijepa_enhanced.visualize.curves import draw_curves
from ijepa_enhanced.visualize.views import draw_masked_views, draw_pack

logger = logging.getLogger("ijepa_enhanced")


class StderrHandler(logging.Handler):
    """Writes to what is stderr at that moment: a progress bar puts itself there to keep below the messages."""

    def emit(self, record: logging.LogRecord) -> None:
        """Write one message."""
        print(self.format(record), file=sys.stderr)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in arguments
    logging.basicConfig(handlers=[StderrHandler()], format="%(message)s", force=True)
    logger.setLevel(logging.DEBUG if debug else logging.INFO)
    try:
        options = parse(arguments)
        return COMMANDS[options.subcommand](options[options.subcommand])
    except SystemExit as finished:  # --help and --print_config end this way
        return int(finished.code or 0)
    except (RequestError, SourceError, PlanError, ResumeError, FileNotFoundError) as error:
        return failure(error, 2, debug)
    except (RunError, CheckpointError, OSError) as error:
        return failure(error, 1, debug)


def failure(error: Exception, code: int, debug: bool) -> int:
    """Print what went wrong, with a traceback only when asked for, and return the exit code."""
    if debug:
        traceback.print_exception(error)
    print(f"ijepa: {error}", file=sys.stderr)
    return code


def make_commands() -> dict[str, ArgumentParser]:
    """The options of every command."""
    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    commands = {name: ArgumentParser(exit_on_error=False, description=text) for name, text in PURPOSES.items()}
    for command in commands.values():
        command.add_argument("--json", action="store_true", help="end stdout with one line of JSON")
        command.add_argument("--debug", action="store_true", help="show tracebacks and debugging messages")

    train = commands["train"]
    train.add_argument("--config", action="config", help="a recipe's name, or a YAML file")
    train.add_argument("--run", type=str, default=None, help="folder to make for the run (default: runs/TIME)")
    train.add_argument("--resume", type=str, default=None, metavar="RUN", help="folder of a run to go on with")
    train.add_class_arguments(TrainConfig)

    evaluate = commands["evaluate"]
    evaluate.add_argument("run", type=str, help="a run, or a folder with an encoder")
    evaluate.add_argument("--train", type=str, required=True, metavar="SOURCE", help="images the probes learn from")
    evaluate.add_argument("--val", type=str, required=True, metavar="SOURCE", help="images the probes are scored on")
    evaluate.add_argument(
        "--side", type=int | None, default=224, help="sqrt(height * width) in pixels; null: native size"
    )
    evaluate.add_argument("--random-init", action="store_true", help="score the run's random start instead")
    evaluate.add_argument(
        "--baselines", action="store_true", help="score the random start and raw 16x16 pixels as well"
    )
    evaluate.add_argument("--seed", type=int, default=0, help="of the linear probe's held-out part")
    evaluate.add_argument("--workers", type=int, default=1, help="processes that decode images")

    commands["index"].add_argument("source", type=str, help="a folder, tar shards, or synthetic")

    inspect = commands["inspect"]
    inspect.add_argument("what", choices=list(PICTURES))
    inspect.add_argument("source", type=str, help="a folder, tar shards, or synthetic")
    inspect.add_argument("--out", type=str, required=True, metavar="DIR", help="folder for the picture")
    inspect.add_argument("--config", action="config", help="a recipe's name, or a YAML file")
    inspect.add_class_arguments(TrainConfig)

    benchmark = commands["benchmark"]
    benchmark.add_argument("theme", choices=list(BENCHMARKS))
    benchmark.add_argument("--source", type=str, default="synthetic", help="a folder, tar shards, or synthetic")
    benchmark.add_argument("--csv", action="store_true", help="write benchmarks/results/THEME_HARDWARE_DATE.csv")
    return commands


def parse(arguments: list[str]) -> Namespace:
    """The command and its options, with its configuration built and checked.

    Raises:
        RequestError: an option, a key or a value is wrong; the message names it.
    """
    commands = make_commands()
    parser = ArgumentParser(prog="ijepa", description=__doc__, exit_on_error=False)
    subcommands = parser.add_subcommands(required=False)
    for name, command in commands.items():
        subcommands.add_subcommand(name, command, help=PURPOSES[name])
    if not arguments:
        arguments = ["--help"]
    try:
        options: Namespace = parser.instantiate(parser.parse_args(with_config_files(arguments)))
    except argparse.ArgumentError as error:
        known = re.findall(r"--[\w.-]+", commands[arguments[0]].format_help()) if arguments[0] in commands else []
        raise RequestError(plain_words(str(error), known)) from error
    except ValueError as error:
        raise RequestError(str(error)) from error
    return options


def with_config_files(arguments: list[str]) -> list[str]:
    """The arguments with recipes' names replaced by their files, and a resumed run's configuration put first."""
    resolved = arguments[:1]
    for before, argument in itertools.pairwise(arguments):
        if before == "--config":
            resolved.append(str(find_config(argument)))
        elif argument.startswith("--config="):
            resolved.append(f"--config={find_config(argument.removeprefix('--config='))}")
        else:
            resolved.append(argument)
        if before == "--resume":
            resolved[1:1] = ["--config", str(config_of_run(Path(argument)))]
    return resolved


def plain_words(message: str, known: list[str]) -> str:
    """The parser's complaint as a sentence or two that a user can act on; `known` are the command's options."""
    if found := re.match(r"unrecognized arguments: ([^\s=]+)", message):
        return f"Unknown option '{found[1]}'.{nearest(found[1], known) if found[1].startswith('-') else ''}"
    if found := re.match(r"the following arguments are required: (.*)", message):
        return f"Missing: {', '.join(name.rpartition('.')[2] for name in found[1].split(', '))}."
    key = re.match(r'Parser key "(.+?)":', message)
    given = re.findall(r"(?:Got|Given) value: (.*)", message)
    types = re.search(r"Subtypes: \[(.*)\]", message) or re.search(r"Expected a (.*?)\. Got", message)
    if key and given and types:
        names = [name or literal for name, literal in re.findall(r"<class '(\w+)'>|Literal\[(.*?)\]", types[1])]
        wanted = " or ".join(JSON_NAMES.get(name, name) for name in names)
        return f"{key[1]} takes {wanted}, not '{given[-1]}'."
    return message.replace("argument subcommand: invalid choice", "No such command").replace("argument ", "")


JSON_NAMES = {"NoneType": "null", "str": "text", "bool": "true or false", "int": "a whole number", "float": "a number"}


def print_json(options: Namespace, values: dict[str, Any]) -> None:
    """The last line of stdout, for programs, where it is asked for."""
    if options.json:
        print(json.dumps(values))


def train_config(options: Namespace) -> TrainConfig:
    """The configuration among a command's options."""
    return TrainConfig(**{field.name: options[field.name] for field in dataclasses.fields(TrainConfig)})


def run_train(options: Namespace) -> int:
    """`ijepa train`."""
    config = train_config(options)
    if options.resume:
        folder = Path(options.resume)
        check_resumable(load_config(folder), config, folder)
    else:
        folder = Path(options.run or f"runs/{time.strftime('%Y%m%d-%H%M%S')}")
        if folder.exists():
            raise RequestError(f"{folder} already exists. Go on with it by --resume {folder}, or name another --run.")
    outcome = train(config, folder, resume=bool(options.resume))
    if not outcome.finished:
        logger.warning("Stopped after step %d. Go on with: ijepa train --resume %s", outcome.steps, folder)
    pictures = [folder / "masks.png", folder / "curves.png"]
    draw_masked_views(first_batch(config, config.data.source), config.encoder.patch_size, pictures[0])
    if not draw_curves(read_log(folder), pictures[1]):
        pictures.pop()
    print(folder, *pictures, sep="\n")
    print_json(options, {"run": str(folder), "steps": outcome.steps, "images_seen": outcome.images})
    return 0 if outcome.finished else 1


def first_batch(config: TrainConfig, source: str) -> MaskedBatch:
    """The first pack that a run of `config` on `source` trains on."""
    opened = open_source(source)
    index = build_index(opened)
    plan = Plan(index, config.data, config.encoder.patch_size, config.seed)
    dataset = PackDataset(opened, index, config.encoder.patch_size, config.masks, config.seed)
    return cast(MaskedBatch, dataset[plan.epoch(0)[0]])


def run_evaluate(options: Namespace) -> int:
    """`ijepa evaluate`."""
    encoder = Encoder.from_pretrained(options.run)
    train, val = labelled(options.train, "train"), labelled(options.val, "val")
    renumber = class_numbers(train[1], val[1], options)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")

    def features(encoder: Encoder, images: tuple[Source, Index]) -> Features:
        found = extract(
            encoder.to(device), *images, options.side, autocast_dtype("auto", device), workers=options.workers
        )
        for row, reason in found.unreadable.items():
            logger.warning("Left out: %s: %s", images[0].keys[row], reason)
        return found

    table = Table("", "kNN-20", "linear", "RankMe")
    scores: dict[str, float] = {}
    subjects: dict[str, Callable[[tuple[Source, Index]], Features]] = {}
    if options.baselines or options.random_init:
        subjects["random start"] = partial(features, random_start(encoder, Path(options.run)))
    if options.baselines:
        subjects["raw 16x16 pixels"] = lambda images: thumbnails(*images)
    if not options.random_init:
        subjects["trained"] = partial(features, encoder)
    for name, extractor in subjects.items():
        logger.info("Scoring: %s", name)
        known, asked = extractor(train), extractor(val)
        assert asked.labels is not None
        scores = dict(score(known, dataclasses.replace(asked, labels=renumber[asked.labels]), options.seed))
        scores["images_per_second"] = (len(known.values) + len(asked.values)) / (known.seconds + asked.seconds)
        percent = [f"{scores[key]:.1%} ({scores[f'{key}_mean_per_class']:.1%})" for key in ("knn20", "linear")]
        table.add_row(name, *percent, f"{scores['rankme']:.1f}")
    table.caption = "top-1 (mean per class)"
    Console().print(table)
    print_json(options, scores)
    return 0


def labelled(spec: str, part: str) -> tuple[Source, Index]:
    """A source and its index.

    Raises:
        RequestError: the source has no labels.
    """
    source = open_source(spec, part)
    index = build_index(source)
    if index.labels is None:
        raise RequestError(
            f"{spec} has no labels, and scoring needs them: put the images of each class into a folder of its own, "
            "or a .cls file beside each image of a shard."
        )
    for key, reason in index.unreadable:
        logger.warning("Left out: %s: %s", key, reason)
    return source, index


def class_numbers(train: Index, val: Index, options: Namespace) -> Tensor:
    """The training source's number of each of the validation source's classes: int64 [classes of val].

    Raises:
        RequestError: a class of the validation source is missing in the training source.
    """
    if train.classes is None or val.classes is None:
        assert val.labels is not None
        return torch.arange(1 + int(val.labels.max()))
    for name in val.classes:
        if name not in train.classes:
            raise RequestError(f"{options.val} has a class '{name}' that {options.train} has not.")
    return torch.tensor([train.classes.index(name) for name in val.classes])


def random_start(encoder: Encoder, run: Path) -> Encoder:
    """The encoder as it was before the first step: the same architecture and seed."""
    seed = load_config(run).seed if (run / "config.yaml").is_file() else 0
    torch.manual_seed(seed)
    return Encoder(encoder.config).eval()


def run_index(options: Namespace) -> int:
    """`ijepa index`."""
    index = build_index(open_source(options.source), progress=None)
    counts = summary(index)
    for name, value in counts.items():
        print(f"{name:>12}  {value}")
    for key, reason in index.unreadable:
        print(f"  unreadable  {key}: {reason}")
    print_json(options, counts)
    return 0


def run_inspect(options: Namespace) -> int:
    """`ijepa inspect`."""
    config = train_config(options)
    batch = first_batch(config, options.source)
    folder = Path(options.out)
    folder.mkdir(parents=True, exist_ok=True)
    picture = folder / f"{options.what}.png"
    PICTURES[options.what](batch, config.encoder.patch_size, picture)
    print(picture)
    print_json(options, {"picture": str(picture)})
    return 0


def run_benchmark(options: Namespace) -> int:
    """`ijepa benchmark`."""
    print_json(options, BENCHMARKS[options.theme].run(options.source, csv=options.csv))
    return 0


PURPOSES = {
    "train": "Train an encoder.",
    "evaluate": "Score an encoder on labelled images.",
    "index": "Scan a source: counts, sizes, unreadable images.",
    "inspect": "Draw masks, or how a pack is filled.",
    "benchmark": "Measure speed.",
}
COMMANDS = {
    "train": run_train,
    "evaluate": run_evaluate,
    "index": run_index,
    "inspect": run_inspect,
    "benchmark": run_benchmark,
}
PICTURES = {"masks": draw_masked_views, "packing": draw_pack}
BENCHMARKS = {"packing": packing, "loader": loader}
