"""`ijepa evaluate`."""

from __future__ import annotations

import dataclasses
import itertools
import json
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from jsonargparse import ArgumentParser, Namespace
from rich.console import Console
from rich.table import Table

from ijepa_enhanced.commands import Command
from ijepa_enhanced.commands.setup import (
    add_encoder,
    check_setting,
    counting_bars,
    hush_others,
    load_encoder,
    print_json,
    share_cores,
)
from ijepa_enhanced.devices import autocast_dtype
from ijepa_enhanced.distributed import Ranks, ranks_of_run
from ijepa_enhanced.encoder import Encoder
from ijepa_enhanced.errors import NotFiniteError, RequestError, RunError, did_you_mean
from ijepa_enhanced.evaluate.attentive import attentive
from ijepa_enhanced.evaluate.config import FinetuneConfig
from ijepa_enhanced.evaluate.dense import dense, open_maps
from ijepa_enhanced.evaluate.features import extract, hash_weights, thumbnails
from ijepa_enhanced.evaluate.finetune import finetune
from ijepa_enhanced.evaluate.labelled import labelled_pair
from ijepa_enhanced.evaluate.protocol import FEATURE_PROTOCOLS, NEIGHBOURS, Scoring, layers_for, score
from ijepa_enhanced.evaluate.sweep import (
    Point,
    advice,
    choose,
    frontier,
    network_costs,
    setting_name,
    sweep_scores,
    write_points,
)
from ijepa_enhanced.evaluate.tokens import InferenceConfig, LabelledSource, warn_of_unreadable
from ijepa_enhanced.files import replacing
from ijepa_enhanced.train.saved import load_config, random_start
from ijepa_enhanced.visualize.frontier import draw_frontier

logger = logging.getLogger(__name__)

DEFAULT_PROTOCOLS = ("knn", "linear")
PROTOCOLS = (*FEATURE_PROTOCOLS, "attentive", "finetune", "dense")
TITLES = {"knn1": "kNN-1", "knn5": "kNN-5", "knn20": "kNN-20", "rankme": "RankMe"}
"""What users read in place of some names of scores."""


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
        help="score every combination, such as resolution=112,224 merge_rate=0,0.05,0.1, and say which to choose",
    )
    command.add_argument(
        "--out", type=str, default=None, metavar="DIR", help="folder for sweep.csv and sweep.png (default: RUN)"
    )
    command.add_argument("--random-init", action="store_true", help="score the run's random start instead")
    command.add_argument("--baselines", action="store_true", help="score the random start and raw 16x16 pixels as well")
    command.add_argument(
        "--protocols",
        type=str,
        nargs="+",
        default=list(DEFAULT_PROTOCOLS),
        metavar="NAME",
        help=f"what to score by: {', '.join(PROTOCOLS)}",
    )
    command.add_class_arguments(FinetuneConfig, "finetune")
    command.add_argument("--seed", type=int, default=0, help="of held-out parts, few labels and training")
    command.add_argument("--workers", type=int, default=1, help="processes that decode images")


def run(options: Namespace) -> int:
    """Score an encoder, or a table of settings of one; started by `torchrun`, the ranks share the work.

    Raises:
        RunError: what the encoder computes is not finite.
    """
    try:
        with ranks_of_run() as ranks:
            return evaluate(options, ranks)
    except NotFiniteError as error:
        raise RunError(str(error)) from error


def evaluate(options: Namespace, ranks: Ranks) -> int:
    """Score, print what was found, and keep it in the run."""
    hush_others()
    for name in ("seed", "workers"):
        if options[name] < 0:
            raise RequestError(f"{name} must be at least 0, not {options[name]}.")
    for protocol in options.protocols:
        if protocol not in PROTOCOLS:
            raise RequestError(f"No protocol '{protocol}'.{did_you_mean(protocol, list(PROTOCOLS))}")
    combinations = sweep_settings(options) if options.sweep else []
    check_setting(options.resolution, options.merge_rate)
    share_cores(options.workers)
    encoder = load_encoder(options.run).to(ranks.device)
    dtype = autocast_dtype("auto", ranks.device)
    specs = ((options.train, "train"), (options.val, "val"))
    with ranks.one_first():
        maps = [open_maps(*spec) for spec in specs] if "dense" in options.protocols else []
        train, val = maps if set(options.protocols) == {"dense"} else labelled_pair(options.train, options.val)
    hashes, weights = [each.catalog.hash for each in (train, val)], hash_weights(encoder)
    ranks.agree(
        {
            "images": [*hashes, *(each.catalog.hash for each in maps)],
            "encoder": weights,
            "precision": dtype,
            "PyTorch": torch.__version__,
        }
    )
    setting = InferenceConfig(options.resolution, dtype, options.merge_rate, options.workers, ranks=ranks)
    if combinations:
        return sweep(options, combinations, encoder, train, val, setting)
    warn_of_side(Path(options.run), options.resolution)
    subjects: dict[str, Encoder | None] = {}
    if options.baselines or options.random_init:
        subjects["random start"] = random_start(encoder, Path(options.run))
    if options.baselines:
        subjects["raw 16x16 pixels"] = None
    if not options.random_init:
        subjects["trained"] = encoder
    evaluation: dict[str, dict[str, float]] = {}
    for name, network in subjects.items():
        logger.info("Scoring: %s", name)
        scores = evaluation[name] = scores_of_features(options, network, train, val, setting)
        if network is None:
            continue
        if "attentive" in options.protocols:
            scores |= attentive(network, train, val, setting, options.seed, counting)
        if "finetune" in options.protocols:
            scores |= finetune(network, train, val, setting, options.seed, counting, options.finetune)
        if "dense" in options.protocols:
            scores |= dense(network, maps[0], maps[1], setting, options.seed, counting)
    if not ranks.main:
        return 0
    show(evaluation)
    if (run := Path(options.run)).joinpath("config.yaml").is_file():
        settings = {name: options[name] for name in ("train", "val", "resolution", "merge_rate", "seed")}
        settings |= {"images": hashes, "weights": weights}
        keep(evaluation, settings, run / "evaluation.json")
    print_json(options, evaluation["random start" if options.random_init else "trained"])
    return 0


def scores_of_features(
    options: Namespace, encoder: Encoder | None, train: LabelledSource, val: LabelledSource, setting: InferenceConfig
) -> dict[str, float]:
    """What the protocols that share features say, of an encoder or of raw pixels; nothing if none of them is wanted."""
    protocols = [protocol for protocol in options.protocols if protocol in FEATURE_PROTOCOLS]
    if not protocols or (encoder is None and not setting.ranks.main):
        return {}
    both = []
    for images in (train, val):
        if encoder is None:
            found = thumbnails(images.source, images.catalog)
        else:
            with counting(images.source.name, len(images.catalog.rows)) as progress:
                found = extract(encoder, images, setting, progress, cache=True, layers=layers_for(protocols))
        warn_of_unreadable(images.source, found.unreadable)
        both.append(found)
    known, asked = both
    how = Scoring(options.seed, setting.ranks.device, setting.ranks if encoder is not None else Ranks())
    scores = sweep_scores(known, asked, how) if options.sweep else score(known, asked, protocols, how)
    if not setting.ranks.main:
        return {}
    most = max(NEIGHBOURS)
    if "knn" in protocols and len(known.values) < most:
        logger.warning(
            "%s has %d images, fewer than the %d neighbours of knn%d: all of them vote.",
            options.train,
            len(known.values),
            most,
            most,
        )
    scores["images_per_second"] = (len(known.values) + len(asked.values)) / (known.seconds + asked.seconds)
    return scores


def show(evaluation: dict[str, dict[str, float]]) -> None:
    """Print the scores of some subjects as a table, a column for each."""
    table = Table("", *evaluation)
    details = ("_top5", "_mean_per_class", "_low", "_high", "images_per_second")
    for name in dict.fromkeys(name for scores in evaluation.values() for name in scores if not name.endswith(details)):
        cells = []
        for scores in evaluation.values():
            value, per_class = scores.get(name), scores.get(f"{name}_mean_per_class")
            if value is None:
                cells.append("")
            elif name == "rankme":
                cells.append(f"{value:.1f}")
            else:
                cells.append(f"{value:.1%}" + (f" ({per_class:.1%})" if per_class is not None else ""))
        table.add_row(TITLES.get(name, name), *cells)
    table.caption = "top-1 (mean per class)"
    Console().print(table)


def keep(evaluation: dict[str, dict[str, float]], settings: dict[str, Any], path: Path) -> None:
    """Write the scores of some subjects into a file that keeps all others that were found with the same settings."""
    scores: dict[str, dict[str, float]] = {}
    # What is no evaluation, such as a file that was cut off, is replaced.
    with suppress(FileNotFoundError, ValueError, TypeError, KeyError):
        known = json.loads(path.read_text())
        if known["settings"] == settings:
            scores = dict(known["scores"])
    for subject, found in evaluation.items():
        scores[subject] = scores.get(subject, {}) | found
    with replacing(path) as temporary:
        temporary.write_text(json.dumps({"settings": settings, "scores": scores}, indent=2) + "\n")


def sweep(
    options: Namespace,
    settings: list[tuple[int | None, float]],
    encoder: Encoder,
    train: LabelledSource,
    val: LabelledSource,
    setting: InferenceConfig,
) -> int:
    """Score a table of settings of one encoder."""
    name, network = "trained", encoder
    if options.random_init:
        name, network = "random start", random_start(encoder, Path(options.run))
    logger.info("Timing the network at %d settings", len(settings))
    main = setting.ranks.main
    costs = network_costs(network, [train.catalog, val.catalog], settings if main else [], setting.dtype)
    found = []
    for resolution, rate in settings:
        logger.info("Scoring: %s, %s", name, setting_name(resolution, rate))
        shown = dataclasses.replace(setting, resolution=resolution, merge_rate=rate)
        found.append(scores_of_features(options, network, train, val, shown))
    if not main:
        return 0
    fields = [field.name for field in dataclasses.fields(Point)]
    points = []
    for (resolution, rate), cost, scores in zip(settings, costs, found, strict=True):
        points.append(Point(resolution, rate, **{key: scores[key] for key in fields if key in scores}, **cost))
    show_sweep(points, Path(options.out or options.run))
    print_json(options, dataclasses.asdict(choose(points)) | {"sweep": [dataclasses.asdict(point) for point in points]})
    return 0


def warn_of_side(folder: Path, resolution: int | None) -> None:
    """Say where a run is shown images much larger or smaller than those that it was trained on.

    Half as large again still scores about as well (docs/recipe.md); of smaller ones nothing was measured.
    """
    if resolution is None or not (folder / "config.yaml").is_file():
        return
    data = load_config(folder).data
    if (
        data.min_resolution is None
        or data.max_resolution is None
        or data.min_resolution / 2 <= resolution <= 1.5 * data.max_resolution
    ):
        return
    logger.warning(
        "%s was trained at resolutions of %d to %d px, and is scored at %d: more suitable is --resolution %d.",
        folder,
        data.min_resolution,
        data.max_resolution,
        resolution,
        data.max_resolution,
    )


def sweep_settings(options: Namespace) -> list[tuple[int | None, float]]:
    """Return the resolutions and merge rates that `--sweep` combines; its own option gives one that it leaves out.

    Raises:
        RequestError: it names something else, or a value that cannot be.
    """
    if options.baselines:
        raise RequestError("--sweep scores one encoder: leave --baselines out.")
    if set(options.protocols) != set(DEFAULT_PROTOCOLS):
        raise RequestError("--sweep scores by knn and linear: leave --protocols out.")
    resolutions: list[int | None] = [options.resolution]
    rates: list[float] = [options.merge_rate]
    for part in options.sweep:
        name, _, values = part.partition("=")
        if name not in ("resolution", "merge_rate"):
            raise RequestError(f"--sweep takes resolution=... and merge_rate=..., not '{part}'.")
        try:
            if name == "resolution":
                resolutions = [None if value == "null" else int(value) for value in values.split(",")]
            else:
                rates = [float(value) for value in values.split(",")]
        except ValueError as error:
            raise RequestError(f"--sweep takes numbers with commas between them, not '{part}'.") from error
    settings = list(dict.fromkeys(itertools.product(resolutions, rates)))
    for setting in settings:
        check_setting(*setting)
    return settings


def show_sweep(points: list[Point], folder: Path) -> None:
    """Print a sweep as a table and what to choose, and write it and its plot into a folder."""
    best, chosen = frontier(points, "linear"), choose(points)
    table = Table("resolution", "merge rate", "kNN-20", "linear", "images/s", "GFLOPs", "peak MB", "")
    for point in points:
        table.add_row(
            "native" if point.resolution is None else str(point.resolution),
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
        "images/s: the network alone. GFLOPs: of one image. peak MB: what one pack takes beside the weights.\n"
        "*: no other is as accurate (linear) and as fast. <-: the one to take."
    )
    Console().print(table)
    print(advice(points))
    folder.mkdir(parents=True, exist_ok=True)
    write_points(points, folder / "sweep.csv")
    print(folder / "sweep.csv")
    if draw_frontier(points, folder / "sweep.png"):
        print(folder / "sweep.png")


@contextmanager
def counting(title: str, total: int) -> Iterator[Callable[[int], None]]:
    """A bar on stderr, where that is a terminal; what it yields is called with how many of `total` are done."""
    with counting_bars() as bar:
        task = bar.add_task(title, total=total)
        yield lambda done: bar.update(task, completed=done)


COMMAND = Command("Score an encoder on labelled images.", add_options, run)
