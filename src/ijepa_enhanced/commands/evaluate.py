"""`ijepa evaluate`."""

from __future__ import annotations

import dataclasses
import itertools
import json
import logging
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

from ijepa_enhanced.commands.options import DEFAULT_PROTOCOLS, EvaluateOptions, check_merge_rate
from ijepa_enhanced.commands.setup import check_workers, counting_bars, hush_others, print_json, print_table
from ijepa_enhanced.config import as_options, build
from ijepa_enhanced.data.catalog import report_unreadable
from ijepa_enhanced.devices import autocast_dtype, default_workers
from ijepa_enhanced.distributed import WORK_TIMEOUT, Ranks, ranks_of_run
from ijepa_enhanced.encoder import Encoder, hash_weights
from ijepa_enhanced.errors import RequestError
from ijepa_enhanced.evaluate import labelled
from ijepa_enhanced.evaluate.attentive import attentive
from ijepa_enhanced.evaluate.config import FinetuneConfig
from ijepa_enhanced.evaluate.dense import RawPatches, dense
from ijepa_enhanced.evaluate.features import Features, extract, thumbnails
from ijepa_enhanced.evaluate.finetune import finetune
from ijepa_enhanced.evaluate.label_maps import LabelledMaps, open_maps
from ijepa_enhanced.evaluate.protocol import FEATURE_PROTOCOLS, NEIGHBORS, Scoring, layers_for, score
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
from ijepa_enhanced.files import make_folder, replacing
from ijepa_enhanced.pretrained import describe
from ijepa_enhanced.train.record import public_name
from ijepa_enhanced.train.saved import start_of
from ijepa_enhanced.visualize.frontier import draw_frontier
from ijepa_enhanced.visualize.scores import DETAILS, TITLES, explained, how_scored, shown_score

logger = logging.getLogger(__name__)

Scores = dict[str, float | None]
"""None: a speed that is not known, because the cache has features of another machine or number of workers."""
HIDDEN = (*DETAILS, "images_per_second")
"""Endings of the names of values that tables of scores leave out."""
Combination = tuple[int | None, float]
"""One point of a sweep: a resolution in pixels, None for native size, and a merge rate."""


@dataclass(frozen=True)
class Work:
    """One evaluation: what is scored on what, and how."""

    options: EvaluateOptions
    finetune: FinetuneConfig
    encoder: Encoder
    train: LabelledSource
    val: LabelledSource
    maps: Sequence[LabelledMaps]
    """Images with label maps to learn from and to score on, if the dense probe is asked for."""
    config: InferenceConfig
    seen: set[Hashable] = field(default_factory=set)
    images: dict[str, int] = field(default_factory=dict)
    """Number of images that could be read, for training and for validation."""

    def is_new(self, event: Hashable) -> bool:
        """Return whether an event is seen for the first time: several encoders read the same images."""
        if event in self.seen:
            return False
        self.seen.add(event)
        return True


def run(options: EvaluateOptions) -> int:
    """Score an encoder once, or at several settings; under `torchrun` the ranks share the work.

    Raises:
        UserError: the request is wrong, or a feature is not finite.
    """
    hush_others()
    swept = sweep_settings(options) if options.sweep else None
    try:
        finetune = build(FinetuneConfig, options.finetune)
    except RequestError as error:
        keys = [f"finetune.{key}" for key in options.finetune]
        raise RequestError(as_options(str(error), keys)) from error
    workers = default_workers() if options.workers is None else options.workers
    check_workers(workers, "--workers")
    with ranks_of_run(WORK_TIMEOUT) as ranks:  # rank 0 scores alone
        if "finetune" in options.protocols:
            finetune.share(ranks.world)  # or an error now, not after the other protocols
        encoder = Encoder.from_pretrained(options.run).to(ranks.device)
        dtype = autocast_dtype("auto", ranks.device)
        config = InferenceConfig(encoder.pixels(options.resolution), dtype, options.merge_rate, workers, ranks=ranks)
        with ranks.one_first():
            train, val, maps = open_sources(options)
        work = Work(options, finetune, encoder, train, val, maps, config)
        check_agreement(work, ranks)
        if swept is None:
            return evaluate(work)
        settings = settings_of(swept, config)
        for resolution, _ in settings:
            encoder.check_limit(resolution)
        return sweep(work, settings)


def open_sources(options: EvaluateOptions) -> tuple[LabelledSource, LabelledSource, list[LabelledMaps]]:
    """Return the images to learn from, those to score on, and both with label maps if the dense probe is asked for.

    Raises:
        RequestError: a source does not exist, or lacks the labels.
    """
    if options.data is not None:
        train, val = labelled.split_labelled(options.data, options.seed)
        return train, val, []
    assert options.train is not None  # the options are checked
    assert options.val is not None
    maps = []
    if "dense" in options.protocols:
        maps = [open_maps(options.train, "train"), open_maps(options.val, "val")]
    only_dense = set(options.protocols) == {"dense"}
    train, val = maps if only_dense else labelled.labelled_pair(options.train, options.val)
    said = set() if only_dense else {train.source.name, val.source.name}
    for one in maps:
        if one.source.name not in said:
            report_unreadable(one.catalog, one.source.name)
        said.add(one.source.name)
    return train, val, maps


def check_agreement(work: Work, ranks: Ranks) -> None:
    """Raise RankError if the ranks have different images, weights or versions."""
    sources = (work.train, work.val, *work.maps)
    ranks.agree(
        {
            "images": [source.catalog.hash for source in sources],
            "encoder": hash_weights(work.encoder),
            "precision": work.config.dtype,
            "PyTorch": torch.__version__,
        }
    )


def evaluate(work: Work) -> int:
    """Score the encoder and what it is compared with, print the scores and save them in the run."""
    options = work.options
    subjects: dict[str, Encoder | None] = {}
    if options.baselines or options.start:
        subjects["start"] = start_of(work.encoder, Path(options.run))
    if options.baselines:
        subjects["raw pixels"] = None
    if not options.start:
        subjects["trained"] = work.encoder
    evaluation: dict[str, Scores] = {}
    for name, encoder in subjects.items():
        logger.info("Scoring: %s", name)
        evaluation[name] = scores_of(work, encoder)
    if not work.config.ranks.main:
        return 0
    show(evaluation, work)
    print_json(options, evaluation["start" if options.start else "trained"])
    if Path(options.run, "config.yaml").is_file():
        path = Path(options.run, "evaluation.json")
        with only_printed(path):
            evaluation = save(evaluation, settings_record(work), path)
    if "trained" in evaluation:
        note_on_card(work, evaluation["trained"])
    return 0


def note_on_card(work: Work, scores: Scores) -> None:
    """Write scores into the model card of the encoder, if it is in the folder of a run."""
    run = Path(work.options.run)
    folder = run / "encoder" if (run / "encoder").is_dir() else run
    if not (folder.parent / "config.yaml").is_file():
        return  # such as a folder of released weights, which others may use too
    settings = settings_record(work)
    settings |= {key: public_name(settings[key]) for key in ("data", "train", "val") if key in settings}
    names = [name for name in scores if not name.endswith(HIDDEN)]
    work.encoder.record = dataclasses.replace(
        work.encoder.record,
        scores={
            "protocol": " ".join([how_scored(settings), counts(work), *explained(names)]),
            "values": {TITLES.get(name, name): shown_score(name, scores) for name in names},
            "weights": settings["weights"],
        },
    )
    with only_printed(folder / "README.md"):
        describe(folder, work.encoder.described)


@contextmanager
def only_printed(path: Path) -> Iterator[None]:
    """Warn if scores cannot be written to `path`, and go on: hours of scoring must not end without a result."""
    try:
        yield
    except OSError as error:
        logger.warning("The scores are only printed, because %s cannot be written: %s.", path, error.strerror or error)


def scores_of(work: Work, encoder: Encoder | None) -> Scores:
    """Return the scores of an encoder by all protocols, or of raw pixels by those that have such a baseline."""
    options, config = work.options, work.config
    scores = scores_of_features(work, encoder, config)
    if encoder is not None and "attentive" in options.protocols:
        scores |= attentive(encoder, work.train, work.val, config, options.seed, counting)
    if encoder is not None and "finetune" in options.protocols:
        scores |= finetune(encoder, work.train, work.val, config, options.seed, counting, work.finetune)
    if "dense" in options.protocols:
        shown = RawPatches(work.encoder.network, work.encoder.preprocessing) if encoder is None else encoder
        train, val = work.maps
        scores |= dense(shown, train, val, config, options.seed, counting)
    return scores


def scores_of_features(work: Work, encoder: Encoder | None, config: InferenceConfig) -> Scores:
    """Return the scores of features, of an encoder or of raw pixels; empty on other ranks, or if none is asked for."""
    protocols = [protocol for protocol in work.options.protocols if protocol in FEATURE_PROTOCOLS]
    if not protocols or (encoder is None and not config.ranks.main):
        return {}
    layers = layers_for(protocols)
    train, val = (features_of(work, encoder, images, config, layers) for images in (work.train, work.val))
    work.images.update(training=len(train.values), validation=len(val.values))
    how = Scoring(work.options.seed, config.ranks.device, Ranks() if encoder is None else config.ranks)
    found = sweep_scores(train, val, how) if work.options.sweep else score(train, val, protocols, how)
    if not config.ranks.main:
        return {}
    most = max(NEIGHBORS)
    if "knn" in protocols and len(train.values) < most and work.is_new("few neighbors"):
        logger.warning(
            "%s has only %d training images, fewer than the %d neighbors of knn%d. Every prediction uses all of them, "
            "so the score says little. Use more training images.",
            work.train.source.name,
            len(train.values),
            most,
            most,
        )
    speed = None
    if train.seconds is not None and val.seconds is not None:
        speed = (len(train.values) + len(val.values)) / (train.seconds + val.seconds)
    return {**found, "images_per_second": speed}


def features_of(
    work: Work, encoder: Encoder | None, images: LabelledSource, config: InferenceConfig, layers: int
) -> Features:
    """Return the features of a source from the last `layers` layers, and log its images that cannot be decoded once."""
    with counting(images.source.name, len(images.catalog.rows)) as progress:
        if encoder is None:
            found = thumbnails(images, config.workers, progress=progress, channels=work.encoder.config.channels)
        else:
            found = extract(encoder, images, config, progress, cache=True, layers=layers)
    new = {row: reason for row, reason in found.unreadable.items() if work.is_new((images.source.name, row))}
    warn_of_unreadable(images.source, new)
    return found


def show(evaluation: dict[str, Scores], work: Work) -> None:
    """Print the scores of some encoders as a table, one column for each, and how many images they are of."""
    table = Table("", *evaluation)
    names = dict.fromkeys(name for scores in evaluation.values() for name in scores if not name.endswith(HIDDEN))
    for name in names:
        # The interval has a line of its own, or narrow columns would be cut within it.
        cells = (shown_score(name, scores).replace(" [", "\n[") for scores in evaluation.values())
        table.add_row(TITLES.get(name, name), *cells)
    print_table(table)
    print(*explained(names), counts(work), sep="\n")


def counts(work: Work) -> str:
    """Return how many images the scores are of, in words."""
    listed = {"training": len(work.train.catalog.rows), "validation": len(work.val.catalog.rows)}
    return f"Images: {', '.join(f'{count:,} for {part}' for part, count in (listed | work.images).items())}."


def settings_record(work: Work) -> dict[str, Any]:
    """Return what scores depend on: they are kept together only if it is the same."""
    options = work.options
    return {
        **({"data": options.data} if options.data else {"train": options.train, "val": options.val}),
        "resolution": work.config.resolution,
        "merge_rate": options.merge_rate,
        "seed": options.seed,
        "images": [source.catalog.hash for source in (work.train, work.val)],
        "weights": hash_weights(work.encoder),
    }


def save(evaluation: dict[str, Scores], settings: dict[str, Any], path: Path) -> dict[str, Scores]:
    """Write scores into a file, beside those that it already has of the same settings, and return all of them."""
    scores: dict[str, Scores] = {}
    # A file that is no evaluation, such as one that was cut off, is replaced.
    with suppress(FileNotFoundError, ValueError, TypeError, KeyError):
        known = json.loads(path.read_text())
        if known["settings"] == settings:
            scores = dict(known["scores"])
    for subject, found in evaluation.items():
        scores[subject] = scores.get(subject, {}) | found
    with replacing(path) as temporary:
        temporary.write_text(json.dumps({"settings": settings, "scores": scores}, indent=2) + "\n")
    return scores


def sweep_settings(options: EvaluateOptions) -> dict[str, list[Any]]:
    """Return the values of `resolution` and `merge_rate` that `--sweep` names.

    Raises:
        RequestError: it names something else, or a value that cannot be used.
    """
    if options.baselines:
        raise RequestError("--sweep scores only one encoder. Remove --baselines.")
    if set(options.protocols) != set(DEFAULT_PROTOCOLS):
        raise RequestError("--sweep supports only the protocols knn and linear. Remove --protocols.")
    found: dict[str, list[Any]] = {}
    for part in options.sweep:
        name, _, values = part.partition("=")
        if name not in ("resolution", "merge_rate"):
            raise RequestError(f"--sweep accepts resolution=... and merge_rate=..., not '{part}'.")
        try:
            if name == "resolution":
                found[name] = [None if value == "native" else int(value) for value in values.split(",")]
            else:
                found[name] = [float(value) for value in values.split(",")]
        except ValueError as error:
            raise RequestError(f"--sweep expects numbers separated by commas, not '{part}'.") from error
    for resolution in found.get("resolution", []):
        if resolution is not None and resolution < 1:
            raise RequestError(f"--sweep resolution=... must be at least 1, not {resolution}.")
    for rate in found.get("merge_rate", []):
        check_merge_rate(rate, "--sweep merge_rate=...")
    return found


def settings_of(swept: dict[str, list[Any]], config: InferenceConfig) -> list[Combination]:
    """Return each combination once; what a sweep does not name has the value of its own option."""
    resolutions = swept.get("resolution", [config.resolution])
    rates = swept.get("merge_rate", [config.merge_rate])
    return list(dict.fromkeys(itertools.product(resolutions, rates)))


def sweep(work: Work, settings: list[Combination]) -> int:
    """Score one encoder at several settings, and print and write which one to choose."""
    options, config = work.options, work.config
    name, encoder = "trained", work.encoder
    if options.start:
        name, encoder = "start", start_of(encoder, Path(options.run))
    main, folder = config.ranks.main, Path(options.out or options.run)
    if main:
        make_folder(folder)  # before hours of scoring
    logger.info("Timing the network at %d settings", len(settings))
    costs = network_costs(encoder, [work.train.catalog, work.val.catalog], settings if main else [], config.dtype)
    found = []
    for resolution, rate in settings:
        logger.info("Scoring: %s, %s", name, setting_name(resolution, rate))
        here = dataclasses.replace(config, resolution=resolution, merge_rate=rate)
        found.append(scores_of_features(work, encoder, here))
    if not main:
        return 0
    fields = [field.name for field in dataclasses.fields(Point)]
    points = []
    for (resolution, rate), cost, scores in zip(settings, costs, found, strict=True):
        own: dict[str, Any] = {key: scores[key] for key in fields if key in scores}
        points.append(Point(resolution, rate, **own, **cost))
    show_sweep(points, folder)
    print_json(options, dataclasses.asdict(choose(points)) | {"sweep": [dataclasses.asdict(point) for point in points]})
    return 0


def show_sweep(points: list[Point], folder: Path) -> None:
    """Print a sweep as a table and the setting to choose, and write both as a table and a plot into a folder."""
    best, chosen = frontier(points, "choosing_linear"), choose(points)
    table = Table(
        "resolution",
        "merge rate",
        "linear, half 1",
        "linear, half 2",
        "kNN-20, half 2",
        "images/s",
        "GFLOPs",
        "peak MB",
        "",
    )
    for point in points:
        table.add_row(
            "native" if point.resolution is None else str(point.resolution),
            f"{point.merge_rate:g}",
            f"{point.choosing_linear:.1%}",
            f"{point.linear:.1%}",
            f"{point.knn20:.1%}",
            f"{point.network_images_per_second:.4g}",
            f"{point.gflops_per_image:.3g}",
            f"{point.peak_megabytes:.0f}",
            "*" * (point in best) + " <-" * (point is chosen),
            style="bold" if point is chosen else None,
        )
    print_table(table)
    print(
        "Half 1 of the validation images chooses a setting, half 2 shows how good it is. images/s and peak MB measure "
        "the network alone, on one pack; peak MB excludes the weights. GFLOPs are per image.\n"
        "* marks settings that no other beats in linear accuracy on half 1 and speed. <- marks the recommended one."
    )
    print(advice(points))
    with only_printed(folder / "sweep.csv"):
        write_points(points, folder / "sweep.csv")
        print(folder / "sweep.csv")
        if draw_frontier(points, folder / "sweep.png"):
            print(folder / "sweep.png")


@contextmanager
def counting(title: str, total: int) -> Iterator[Callable[[int], None]]:
    """Show a bar on stderr if that is a terminal, and yield what to call with how many of `total` are done."""
    with counting_bars() as bar:
        task = bar.add_task(title, total=total)
        yield lambda done: bar.update(task, completed=done)
