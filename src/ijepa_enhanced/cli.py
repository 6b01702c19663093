"""The command line: results on stdout, progress and logs on stderr, exit code 0, 1 (failed) or 2 (wrong request)."""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import logging
import os
import re
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
import yaml
from jsonargparse import ArgumentParser, Namespace, set_parsing_settings
from rich.console import Console
from rich.table import Table
from torch import Tensor

from ijepa_enhanced.benchmarks import loader, merging, packing
from ijepa_enhanced.config import (
    RequestError,
    check_resumable,
    check_unchanged,
    config_of_run,
    find_config,
    load_config,
    nearest,
)
from ijepa_enhanced.data.images import UnreadableImage
from ijepa_enhanced.data.index import Index, build_index, report_unreadable, summary
from ijepa_enhanced.data.loader import PackDataset
from ijepa_enhanced.data.plan import Plan, PlanError
from ijepa_enhanced.data.sources import Source, SourceError, open_source
from ijepa_enhanced.evaluate.features import Features, extract, thumbnails
from ijepa_enhanced.evaluate.protocol import score
from ijepa_enhanced.evaluate.sweep import (
    Point,
    advice,
    choose,
    frontier,
    network_costs,
    setting_name,
    write_points,
)
from ijepa_enhanced.files import replacing
from ijepa_enhanced.models.encoder import Encoder
from ijepa_enhanced.packed import MaskedBatch
from ijepa_enhanced.train.checkpoint import CheckpointError
from ijepa_enhanced.train.logging import read_log
from ijepa_enhanced.train.loop import ResumeError, RunError, TrainConfig, autocast_dtype, train
from ijepa_enhanced.visualize.curves import draw_curves
from ijepa_enhanced.visualize.features import draw_features
from ijepa_enhanced.visualize.frontier import draw_frontier
from ijepa_enhanced.visualize.merges import draw_merges
from ijepa_enhanced.visualize.report import write_report
from ijepa_enhanced.visualize.views import draw_masked_views, draw_pack, save_png

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
    debug = "--debug" in arguments
    logging.basicConfig(handlers=[StderrHandler()], format="%(message)s", force=True)
    logger.setLevel(logging.DEBUG if debug else logging.INFO)
    try:
        options = parse(arguments)
        return COMMANDS[options.subcommand](options[options.subcommand])
    except SystemExit as finished:  # --help and --version end this way
        return int(finished.code or 0)
    except (RequestError, SourceError, PlanError, ResumeError) as error:
        return failure(error, str(error), 2, debug)
    except (RunError, CheckpointError, UnreadableImage) as error:
        return failure(error, str(error), 1, debug)
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


def make_parsers(purposes: dict[str, str]) -> dict[str, ArgumentParser]:
    """A parser for each name, with the options that all commands have."""
    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parsers = {
        name: ArgumentParser(exit_on_error=False, print_config=None, description=text)
        for name, text in purposes.items()
    }
    for parser in parsers.values():
        parser.add_argument("--json", action="store_true", help="end stdout with one line of JSON")
        parser.add_argument("--debug", action="store_true", help="show tracebacks and debugging messages")
    return parsers


def add_configuration(command: ArgumentParser) -> None:
    """The options that make up a `TrainConfig`."""
    command.add_class_arguments(TrainConfig)
    for field in dataclasses.fields(TrainConfig):
        if dataclasses.is_dataclass(field.default_factory):
            # The parser takes a file for a whole group, and would not check its keys.
            command._option_string_actions[f"--{field.name}"].help = argparse.SUPPRESS


def make_commands() -> dict[str, ArgumentParser]:
    """The options of every command but `inspect`, which has commands of its own."""
    commands = make_parsers({name: text for name, text in PURPOSES.items() if name != "inspect"})

    train = commands["train"]
    train.add_argument("--config", action="config", help="a recipe's name, or a YAML file")
    train.add_argument("--run", type=str, default=None, help="folder to make for the run (default: runs/TIME)")
    train.add_argument("--resume", type=str, default=None, metavar="RUN", help="folder of a run to go on with")
    train.add_argument("--print_config", action="store_true", help="print the configuration as YAML, and no more")
    add_configuration(train)

    evaluate = commands["evaluate"]
    evaluate.add_argument("run", type=str, help="a run, or a folder with an encoder")
    evaluate.add_argument("--train", type=str, required=True, metavar="SOURCE", help="images the probes learn from")
    evaluate.add_argument("--val", type=str, required=True, metavar="SOURCE", help="images the probes are scored on")
    evaluate.add_argument(
        "--side", type=int | None, default=224, help="sqrt(height * width) in pixels; null: native size"
    )
    evaluate.add_argument(
        "--merge-rate", type=float, default=0.0, help="share of its tokens that each layer merges, 0 to 0.5"
    )
    evaluate.add_argument(
        "--sweep",
        type=str,
        nargs="+",
        metavar="NAME=VALUES",
        help="score every combination, such as side=112,224 merge_rate=0,0.05,0.1, and say which to choose",
    )
    evaluate.add_argument(
        "--out", type=str, default=None, metavar="DIR", help="folder for sweep.csv and sweep.png (default: RUN)"
    )
    evaluate.add_argument("--random-init", action="store_true", help="score the run's random start instead")
    evaluate.add_argument(
        "--baselines", action="store_true", help="score the random start and raw 16x16 pixels as well"
    )
    evaluate.add_argument("--seed", type=int, default=0, help="of the linear probe's held-out part")
    evaluate.add_argument("--workers", type=int, default=1, help="processes that decode images")

    report = commands["report"]
    report.add_argument("runs", type=str, nargs="+", metavar="RUN", help="one run, or several to compare")
    report.add_argument("--out", type=str, default=None, metavar="FILE", help="default, of one run: RUN/report.html")

    commands["index"].add_argument("source", type=str, help="a folder, tar shards, or synthetic")

    benchmark = commands["benchmark"]
    benchmark.add_argument("theme", choices=list(BENCHMARKS))
    benchmark.add_argument("--source", type=str, default="synthetic", help="a folder, tar shards, or synthetic")
    benchmark.add_argument("--csv", action="store_true", help="write benchmarks/results/THEME_HARDWARE_DATE.csv")
    return commands


def make_pictures() -> dict[str, ArgumentParser]:
    """The options of every picture that `inspect` draws."""
    pictures = make_parsers(PICTURES)
    for name in ("masks", "packing"):
        picture = pictures[name]
        picture.add_argument("source", type=str, help="a folder, tar shards, or synthetic")
        picture.add_argument("--config", action="config", help="a recipe's name, or a YAML file")
        picture.add_argument("--run", help=argparse.SUPPRESS)  # a configuration file may have it
        add_configuration(picture)
    for name in ("merges", "features"):
        picture = pictures[name]
        picture.add_argument("run", type=str, help="a run, or a folder with an encoder")
        picture.add_argument("images", type=str, nargs="+", help="image files")
        picture.add_argument(
            "--side", type=int | None, default=224, help="sqrt(height * width) in pixels; null: native size"
        )
    pictures["merges"].add_argument(
        "--merge-rate", type=float, default=0.1, help="share of its tokens that each layer merges, up to 0.5"
    )
    pictures["features"].add_argument(
        "--patch", type=int, nargs=2, default=None, metavar=("ROW", "COLUMN"), help="show what is similar to this patch"
    )
    for picture in pictures.values():
        picture.add_argument("--out", type=str, required=True, metavar="DIR", help="folder for what is drawn")
    return pictures


def parse(arguments: list[str]) -> Namespace:
    """The command and its options, with its configuration built and checked.

    Raises:
        RequestError: an option, a key or a value is wrong; the message names it.
    """
    commands, pictures = make_commands(), make_pictures()
    package = sys.modules["ijepa_enhanced"]  # no file imports the package, which imports from the floors
    parser = ArgumentParser(
        prog="ijepa", description=PURPOSE, exit_on_error=False, print_config=None, version=package.__version__
    )
    inspect = ArgumentParser(exit_on_error=False, print_config=None, description=PURPOSES["inspect"])
    add_commands(parser, commands | {"inspect": inspect}, PURPOSES)
    add_commands(inspect, pictures, PICTURES)
    name, *rest = arguments or ["--help"]
    check_name(name, list(PURPOSES), "command")
    names = [name]
    if name == "inspect":
        name, *rest = rest or ["--help"]
        check_name(name, list(PICTURES), "picture")
        names.append(name)
    command = (commands | pictures).get(name)
    known = options_of(command) if command else []
    check_options(rest, known)
    try:
        options: Namespace = parser.instantiate(parser.parse_args([*names, *with_config_files(rest)]))
    except argparse.ArgumentError as error:
        raise RequestError(plain_words(str(error), known)) from error
    except ValueError as error:
        raise RequestError(str(error)) from error
    return options


def add_commands(parser: ArgumentParser, commands: dict[str, ArgumentParser], purposes: dict[str, str]) -> None:
    """Make commands known to the parser above them, which lists them in the order of `purposes`."""
    subcommands = parser.add_subcommands(required=False)
    for name, purpose in purposes.items():
        subcommands.add_subcommand(name, commands[name], help=purpose)


def check_name(name: str, known: list[str], kind: str) -> None:
    """Raise RequestError where a name, or what can stand in its place, is expected and something else was given."""
    if name not in ("--help", "-h", "--version", *known):
        raise RequestError(
            f"Options come after the {kind}: {', '.join(known)}."
            if name.startswith("-")
            else f"No {kind} '{name}'.{nearest(name, known)}"
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
            raise RequestError(f"Unknown option '{name}'.{nearest(name, known)}")


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
        return f"Unknown argument '{found[1]}'."
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


def print_json(options: Namespace, values: dict[str, Any]) -> None:
    """The last line of stdout, for programs, where it is asked for."""
    if options.json:
        print(json.dumps(values))


def train_config(options: Namespace) -> TrainConfig:
    """The configuration among a command's options.

    Raises:
        RequestError: a value is out of its range.
    """
    try:
        return TrainConfig(**{field.name: options[field.name] for field in dataclasses.fields(TrainConfig)})
    except ValueError as error:
        raise RequestError(str(error)) from error


def run_train(options: Namespace) -> int:
    """`ijepa train`."""
    config = train_config(options)
    if options.print_config:
        print(yaml.safe_dump(dataclasses.asdict(config), sort_keys=False), end="")
        return 0
    if options.resume:
        if options.run:
            raise RequestError("--resume goes on in the run's own folder: leave --run out.")
        folder = Path(options.resume)
        check_resumable(load_config(folder), config, folder)
        check_unchanged(folder)
    else:
        folder = Path(options.run or f"runs/{time.strftime('%Y%m%d-%H%M%S')}")
        if folder.exists():
            raise RequestError(f"{folder} already exists. Go on with it by --resume {folder}, or name another --run.")
    share_cores(config.data.workers)
    outcome = train(config, folder, resume=bool(options.resume))
    if not outcome.finished:
        logger.warning("Stopped after step %d. Go on with: ijepa train --resume %s", outcome.steps, folder)
    pictures = [folder / "masks.png", folder / "curves.png"]
    draw_masked_views(first_batch(config, config.data.source), config.encoder.patch_size, pictures[0])
    if not draw_curves(read_log(folder), pictures[1]):
        pictures.pop()
    pictures.append(folder / "report.html")
    write_report([folder], pictures[-1], dataclasses.asdict(TrainConfig()))
    print(folder, *pictures, sep="\n")
    print_json(options, {"run": str(folder), "steps": outcome.steps, "images_seen": outcome.images})
    return 0 if outcome.finished else 1


def first_batch(config: TrainConfig, source: str) -> MaskedBatch:
    """The first pack that a run of `config` on `source` trains on."""
    opened = open_source(source)
    index = build_index(opened)
    plan = Plan(index, config.data, config.encoder.patch_size, config.seed)
    dataset = PackDataset(opened, index, config.encoder.patch_size, config.masks, config.seed)
    batch = cast(MaskedBatch, dataset[plan.epoch(0)[0]])
    report_unreadable(index)
    for row, reason in batch.unreadable:
        logger.warning("Left out: %s: %s", opened.keys[row], reason)
    return batch


def run_evaluate(options: Namespace) -> int:
    """`ijepa evaluate`."""
    for name in ("seed", "workers"):
        if options[name] < 0:
            raise RequestError(f"{name} must be at least 0, not {options[name]}.")
    settings = sweep_settings(options) if options.sweep else []
    check_setting(options.side, options.merge_rate)
    share_cores(options.workers)
    encoder = load_encoder(options.run)
    train, val = labelled(options.train, "train"), labelled(options.val, "val")
    renumber = class_numbers(train[1], val[1], options)
    device = best_device()
    dtype = autocast_dtype("auto", device)

    def features(encoder: Encoder, side: int | None, merge_rate: float, images: tuple[Source, Index]) -> Features:
        found = extract(encoder.to(device), *images, side, dtype, merge_rate=merge_rate, workers=options.workers)
        for row, reason in found.unreadable.items():
            logger.warning("Left out of %s: %s: %s", images[0].name, images[0].keys[row], reason)
        return found

    def scored(name: str, extractor: Callable[[tuple[Source, Index]], Features]) -> dict[str, float]:
        logger.info("Scoring: %s", name)
        known, asked = extractor(train), extractor(val)
        assert asked.labels is not None
        scores = dict(score(known, dataclasses.replace(asked, labels=renumber[asked.labels]), options.seed))
        images = len(known.values) + len(asked.values)
        scores["images_per_second"] = images / (known.seconds + asked.seconds)
        return scores

    if settings:
        name, network = "trained", encoder
        if options.random_init:
            name, network = "random start", random_start(encoder, Path(options.run))
        logger.info("Timing the network at %d settings", len(settings))
        costs = network_costs(network.to(device), [train[1], val[1]], settings, dtype)
        points = []
        for (side, rate), cost in zip(settings, costs, strict=True):
            scores = scored(f"{name}, {setting_name(side, rate)}", partial(features, network, side, rate))
            points.append(Point(side, rate, **scores, **cost))
        show_sweep(points, Path(options.out or options.run))
        found = [dataclasses.asdict(point) for point in points]
        print_json(options, dataclasses.asdict(choose(points)) | {"sweep": found})
        return 0

    subjects: dict[str, Callable[[tuple[Source, Index]], Features]] = {}
    if options.baselines or options.random_init:
        start = random_start(encoder, Path(options.run))
        subjects["random start"] = partial(features, start, options.side, options.merge_rate)
    if options.baselines:
        subjects["raw 16x16 pixels"] = lambda images: thumbnails(*images)
    if not options.random_init:
        subjects["trained"] = partial(features, encoder, options.side, options.merge_rate)
    table = Table("", "kNN-20", "linear", "RankMe")
    evaluation = {}
    for name, extractor in subjects.items():
        scores = evaluation[name] = scored(name, extractor)
        percent = [f"{scores[key]:.1%} ({scores[f'{key}_mean_per_class']:.1%})" for key in ("knn20", "linear")]
        table.add_row(name, *percent, f"{scores['rankme']:.1f}")
    table.caption = "top-1 (mean per class)"
    Console().print(table)
    if (run := Path(options.run)).joinpath("config.yaml").is_file():
        with replacing(run / "evaluation.json") as temporary:
            temporary.write_text(json.dumps(evaluation, indent=2) + "\n")
    print_json(options, scores)
    return 0


def run_report(options: Namespace) -> int:
    """`ijepa report`."""
    runs = [Path(run) for run in options.runs]
    if options.out is None and len(runs) > 1:
        raise RequestError("Several runs make one page: name it by --out FILE.")
    for run in runs:
        find_config(str(config_of_run(run)))
    page = Path(options.out) if options.out else runs[0] / "report.html"
    write_report(runs, page, dataclasses.asdict(TrainConfig()))
    print(page)
    print_json(options, {"report": str(page)})
    return 0


def check_setting(side: int | None, merge_rate: float) -> None:
    """Raise RequestError where an encoder cannot be run with them."""
    if side is not None and side < 1:
        raise RequestError(f"side must be at least 1, not {side}.")
    if not 0 <= merge_rate <= 0.5:
        raise RequestError(f"merge_rate must lie between 0 and 0.5, not {merge_rate}.")


def sweep_settings(options: Namespace) -> list[tuple[int | None, float]]:
    """The combinations of side and merge rate that `--sweep` names; one that it leaves out is that of its own option.

    Raises:
        RequestError: it names something else, or a value that cannot be.
    """
    if options.baselines:
        raise RequestError("--sweep scores one encoder: leave --baselines out.")
    sides: list[int | None] = [options.side]
    rates: list[float] = [options.merge_rate]
    for part in options.sweep:
        name, _, values = part.partition("=")
        if name not in ("side", "merge_rate"):
            raise RequestError(f"--sweep takes side=... and merge_rate=..., not '{part}'.")
        try:
            if name == "side":
                sides = [None if value == "null" else int(value) for value in values.split(",")]
            else:
                rates = [float(value) for value in values.split(",")]
        except ValueError as error:
            raise RequestError(f"--sweep takes numbers with commas between them, not '{part}'.") from error
    settings = list(dict.fromkeys(itertools.product(sides, rates)))
    for setting in settings:
        check_setting(*setting)
    return settings


def show_sweep(points: list[Point], folder: Path) -> None:
    """Print a sweep as a table and what to choose, and write it and its plot into a folder."""
    best, chosen = frontier(points, "linear"), choose(points)
    table = Table("side", "merge rate", "kNN-20", "linear", "images/s", "GFLOPs", "peak MB", "")
    for point in points:
        table.add_row(
            "native" if point.side is None else str(point.side),
            f"{point.merge_rate:g}",
            f"{point.knn20:.1%}",
            f"{point.linear:.1%}",
            f"{point.network_images_per_second:.4g}",
            f"{point.gflops_per_image:.3g}",
            f"{point.peak_megabytes:.0f}",
            "*" * (point in best) + " <-" * (point is chosen),
            style="bold" if point is chosen else None,
        )
    table.caption = (
        "images/s: the network alone. GFLOPs: of one image. peak MB: tensors of one pack, without weights.\n"
        "*: no other is as accurate (linear) and as fast. <-: the one to take."
    )
    Console().print(table)
    print(advice(points))
    folder.mkdir(parents=True, exist_ok=True)
    write_points(points, folder / "sweep.csv")
    print(folder / "sweep.csv")
    if draw_frontier(points, folder / "sweep.png"):
        print(folder / "sweep.png")


def load_encoder(path: str) -> Encoder:
    """The encoder of a run, or in a folder, on the CPU.

    Raises:
        RequestError: there is none.
    """
    try:
        return Encoder.from_pretrained(path)
    except FileNotFoundError as error:
        raise RequestError(str(error)) from error


def share_cores(workers: int) -> None:
    """Leave a core to each worker, unless OMP_NUM_THREADS says otherwise.

    All threads of a matrix product wait for the one whose core a worker holds: with one thread more, a quickstart on
    two cores is several times slower (docs/log.md).
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, min(torch.get_num_threads(), cores - workers)))


def best_device() -> torch.device:
    """Where networks run."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def labelled(spec: str, part: str) -> tuple[Source, Index]:
    """A source and its index.

    Raises:
        RequestError: the source has no labels.
        RunError: it has no image that can be read.
    """
    source = open_source(spec, part)
    index = build_index(source)
    if index.labels is None:
        raise RequestError(
            f"{spec} has no labels, and scoring needs them: put the images of each class into a folder of its own, "
            "or a .cls file beside each image of a shard."
        )
    report_unreadable(index, f"Left out of {spec}")
    if not len(index.rows):
        raise RunError(f"None of the {len(index.unreadable)} images of {spec} can be read.")
    return source, index


def class_numbers(train: Index, val: Index, options: Namespace) -> Tensor:
    """The training source's number of each of the validation source's classes: int64 [classes of val].

    Raises:
        RequestError: a class of the validation source is missing in the training source.
    """
    assert train.labels is not None
    assert val.labels is not None
    if train.classes is not None and val.classes is not None:
        missing = [name for name in val.classes if name not in train.classes]
        numbers = [train.classes.index(name) for name in val.classes if name not in missing]
    else:
        missing = sorted({*val.labels.tolist()} - {*train.labels.tolist()})
        numbers = list(range(1 + int(val.labels.max())))
    if missing:
        raise RequestError(f"{options.val} has a class '{missing[0]}' that {options.train} has not.")
    return torch.tensor(numbers)


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
        shown = "  ".join(f"{part} {number:g}" for part, number in value.items()) if isinstance(value, dict) else value
        print(f"{name:>12}  {shown}")
    for key, reason in index.unreadable:
        print(f"  unreadable  {key}: {reason}")
    print_json(options, counts)
    return 0


def run_inspect(options: Namespace) -> int:
    """`ijepa inspect`."""
    what = options.subcommand
    of_images = {"merges": inspect_merges, "features": inspect_features}
    return of_images[what](options[what]) if what in of_images else inspect_pack(options[what], what)


def inspect_pack(options: Namespace, what: str) -> int:
    """`ijepa inspect masks` and `ijepa inspect packing`."""
    config = train_config(options)
    batch = first_batch(config, options.source)
    if not len(batch.image_ids):
        raise RunError(f"None of the {len(batch.unreadable)} images of the first pack can be decoded.")
    folder = Path(options.out)
    folder.mkdir(parents=True, exist_ok=True)
    picture = folder / f"{what}.png"
    draw = draw_masked_views if what == "masks" else draw_pack
    draw(batch, config.encoder.patch_size, picture)
    print(picture)
    print_json(options, {"picture": str(picture)})
    return 0


def inspect_merges(options: Namespace) -> int:
    """`ijepa inspect merges`."""
    check_setting(options.side, options.merge_rate)
    if options.merge_rate == 0:
        raise RequestError("At a merge rate of 0 nothing merges: ask for one up to 0.5.")
    encoder = load_encoder(options.run).to(best_device())
    drawn = {}
    for number, path in enumerate(map(Path, options.images)):
        if not path.is_file():
            raise RequestError(f"No file {path}.")
        try:
            # Two folders may hold images of one name.
            drawn[f"merges-{number:02d}-{path.stem}.png"] = draw_merges(encoder, path, options.side, options.merge_rate)
        except UnreadableImage as error:
            raise UnreadableImage(f"{path}: {error}") from error
    folder = Path(options.out)
    folder.mkdir(parents=True, exist_ok=True)
    for name, picture in drawn.items():
        save_png(picture, folder / name)
        print(folder / name)
    print_json(options, {"pictures": [str(folder / name) for name in drawn]})
    return 0


def inspect_features(options: Namespace) -> int:
    """`ijepa inspect features`."""
    check_setting(options.side, 0.0)
    encoder = load_encoder(options.run).to(best_device())
    for path in map(Path, options.images):
        if not path.is_file():
            raise RequestError(f"No file {path}.")
    folder = Path(options.out)
    folder.mkdir(parents=True, exist_ok=True)
    picture = folder / "features.png"
    try:
        grids = draw_features(encoder, options.images, picture, options.patch and tuple(options.patch), options.side)
    except UnreadableImage:
        raise
    except ValueError as error:
        raise RequestError(str(error)) from error
    for path, (rows, cols) in zip(options.images, grids, strict=True):
        logger.info("%s: %d rows, %d columns of patches", path, rows, cols)
    print(picture)
    print_json(options, {"picture": str(picture)})
    return 0


def run_benchmark(options: Namespace) -> int:
    """`ijepa benchmark`."""
    print_json(options, BENCHMARKS[options.theme].run(options.source, csv=options.csv))
    return 0


PURPOSE = "Train image encoders on images of any size by self-supervision (I-JEPA), and measure them."
PURPOSES = {
    "train": "Train an encoder.",
    "evaluate": "Score an encoder on labelled images.",
    "report": "Write a run as one HTML page, or compare several.",
    "index": "Scan a source: counts, sizes, unreadable images.",
    "inspect": "Draw masks, how a pack is filled, what merges, or what features see.",
    "benchmark": "Measure speed.",
}
COMMANDS = {
    "train": run_train,
    "evaluate": run_evaluate,
    "report": run_report,
    "index": run_index,
    "inspect": run_inspect,
    "benchmark": run_benchmark,
}
PICTURES = {
    "masks": "Draw what the student sees of the first views of a run, and what it must predict.",
    "packing": "Draw the first pack of a run, patch by patch.",
    "features": "Draw the principal components of images' features as colours, and what is similar to a patch.",
    "merges": "Draw which patches of images become one token, layer after layer.",
}
BENCHMARKS = {"packing": packing, "loader": loader, "merging": merging}
