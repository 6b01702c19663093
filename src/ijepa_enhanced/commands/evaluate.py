"""`ijepa evaluate`."""

from __future__ import annotations

import dataclasses
import itertools
import json
import logging
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from jsonargparse import ArgumentParser, Namespace
from rich.console import Console
from rich.table import Table
from torch import Tensor

from ijepa_enhanced.commands import Command
from ijepa_enhanced.commands.setup import (
    add_encoder,
    best_device,
    check_setting,
    labelled,
    load_encoder,
    print_json,
    share_cores,
)
from ijepa_enhanced.config import RequestError, load_config
from ijepa_enhanced.data.index import Index
from ijepa_enhanced.data.sources import Source
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
from ijepa_enhanced.train.loop import autocast_dtype
from ijepa_enhanced.visualize.frontier import draw_frontier

logger = logging.getLogger(__name__)


def add_options(command: ArgumentParser) -> None:
    """The options of `ijepa evaluate`."""
    add_encoder(command)
    command.add_argument("--train", type=str, required=True, metavar="SOURCE", help="images the probes learn from")
    command.add_argument("--val", type=str, required=True, metavar="SOURCE", help="images the probes are scored on")
    command.add_argument(
        "--merge-rate", type=float, default=0.0, help="share of its tokens that each layer merges, 0 to 0.5"
    )
    command.add_argument(
        "--sweep",
        type=str,
        nargs="+",
        metavar="NAME=VALUES",
        help="score every combination, such as side=112,224 merge_rate=0,0.05,0.1, and say which to choose",
    )
    command.add_argument(
        "--out", type=str, default=None, metavar="DIR", help="folder for sweep.csv and sweep.png (default: RUN)"
    )
    command.add_argument("--random-init", action="store_true", help="score the run's random start instead")
    command.add_argument("--baselines", action="store_true", help="score the random start and raw 16x16 pixels as well")
    command.add_argument("--seed", type=int, default=0, help="of the linear probe's held-out part")
    command.add_argument("--workers", type=int, default=1, help="processes that decode images")


def run(options: Namespace) -> int:
    """Score an encoder, or a table of settings of one."""
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


COMMAND = Command("Score an encoder on labelled images.", add_options, run)
