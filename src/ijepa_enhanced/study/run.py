"""Run a study: every arm with every seed, at an equal budget, scored in the same way."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import logging
import shlex
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import yaml

from ijepa_enhanced.devices import autocast_dtype, best_device
from ijepa_enhanced.encoder import Encoder
from ijepa_enhanced.errors import NotFiniteError, RequestError, RunError
from ijepa_enhanced.evaluate.features import extract
from ijepa_enhanced.evaluate.labelled import labelled_pair
from ijepa_enhanced.evaluate.protocol import Scoring, score
from ijepa_enhanced.evaluate.tokens import InferenceConfig, LabelledSource
from ijepa_enhanced.files import make_folder, replacing
from ijepa_enhanced.study.compare import write_summary
from ijepa_enhanced.study.config import NATIVE, StudyConfig
from ijepa_enhanced.study.rows import Row, read_rows, write_rows
from ijepa_enhanced.train.config import TrainConfig
from ijepa_enhanced.train.logging import read_log
from ijepa_enhanced.train.loop import train
from ijepa_enhanced.train.saved import check_resumable, check_unchanged, load_config, start_of

logger = logging.getLogger(__name__)

PACE_STEPS = 20
"""Steps of a trial that times an arm; the first half only warms up."""
TRIALS = 3
"""Trials of each arm. The steps of an arm follow from their median."""
SCORING = "scoring.yaml"
"""What all rows of a study must share, and the configuration of a run does not record."""


def run_study(study: StudyConfig, folder: Path, configure: Callable[[list[str]], TrainConfig]) -> list[Row]:
    """Run what is not yet done of a study, and return all its rows, arm by arm.

    All arms run with one seed before the next seed begins. Each run is in `folder/ARM-SEED`, and each row is added to
    `folder/study.csv` at once. At the end `folder/summary.csv` has a line for each arm (see `summary`). A study that
    was interrupted continues where it stopped.

    Args:
        study: what to run.
        folder: created if it is missing.
        configure: returns the configuration that flags of `ijepa train` ask for.

    Raises:
        RequestError: the flags of an arm are wrong, a source cannot be used for scoring, or `folder` holds runs of
            another study. Nothing has been started.
        RunError: no image of a source can be read.
    """
    configs = {arm: configure(shlex.split(f"{study.common} {flags}")) for arm, flags in study.arms.items()}
    train_source = study.train or next(iter(configs.values())).data.source
    images = labelled_pair(train_source, study.val)
    scoring = {
        "val": study.val,
        "train": train_source,  # when the study continues, another arm may be the first one
        "resolution": study.resolution,
        "seconds": study.seconds,
        "images": [part.catalog.hash for part in images],
    }
    _check_same(study, scoring, configs, folder)
    make_folder(folder)
    with replacing(folder / SCORING) as temporary:
        temporary.write_text(yaml.safe_dump(scoring, sort_keys=False))
    # A run that failed before it had a folder costs nothing to repeat, and its flags may have changed.
    rows = [row for row in read_rows(folder / "study.csv") if (folder / f"{row.arm}-{row.seed}").is_dir()]
    done = {(row.arm, row.seed) for row in rows}
    if study.seconds is not None:
        seeds = {*study.seeds, *(row.seed for row in rows)}
        configs = _with_steps(configs, study.seconds, folder, seeds)
    for seed, (arm, config) in itertools.product(study.seeds, configs.items()):
        if (arm, seed) in done:
            continue
        logger.info("Study: %s, seed %d", arm, seed)
        rows.append(_run(dataclasses.replace(config, seed=seed), study, folder / f"{arm}-{seed}", arm, images))
        write_rows(rows, folder / "study.csv")
    # In the order of the file, because the others are compared with the first arm; arms that it no longer has are last.
    places = {arm: place for place, arm in enumerate(study.arms)}
    rows.sort(key=lambda row: places.get(row.arm, len(places)))
    write_rows(rows, folder / "study.csv")
    write_summary(rows, folder / "summary.csv")
    return rows


def _check_same(study: StudyConfig, scoring: dict[str, Any], configs: dict[str, TrainConfig], folder: Path) -> None:
    """Raise RequestError if `folder` holds runs that were trained or scored differently from what `study` asks for.

    Further seeds and arms are no such difference.
    """
    if (folder / SCORING).is_file():
        before = yaml.safe_load((folder / SCORING).read_text())
        for name, value in scoring.items():
            if before[name] != value and name == "images":
                raise RequestError(
                    f"The runs in {folder} were scored on other images: those of {scoring['train']} or {study.val} "
                    "have changed. Choose another --out."
                )
            if before[name] != value:
                raise RequestError(
                    f"The runs in {folder} used {name} = {before[name]}, but the study file now has {name} = {value}. "
                    "Restore the old value, or choose another --out."
                )
    for (arm, config), seed in itertools.product(configs.items(), study.seeds):
        run = folder / f"{arm}-{seed}"
        if (run / "config.yaml").is_file():
            saved = load_config(run)
            steps = config.steps if study.seconds is None else saved.steps
            check_resumable(saved, dataclasses.replace(config, seed=seed, steps=steps), run)
            check_unchanged(run)


def _run(config: TrainConfig, study: StudyConfig, folder: Path, arm: str, images: Sequence[LabelledSource]) -> Row:
    """Train one run, or the rest of one, and score it; an error of the run becomes the outcome of its row."""
    resume = (folder / "config.yaml").is_file()
    start = time.perf_counter()
    try:
        if resume:
            config = load_config(folder)
        outcome = train(config, folder, resume=resume)
    except (RunError, ValueError) as error:
        logger.warning("%s, seed %d: %s", arm, config.seed, error)
        return Row(arm, config.seed, str(error).splitlines()[0], 0, time.perf_counter() - start)
    if not outcome.finished:
        raise KeyboardInterrupt  # the signal that stopped the run was sent to the study
    seconds = time.perf_counter() - start
    alarm = any(line.get("alarm") for line in read_log(folder))
    row = Row(arm, config.seed, "collapsed" if alarm else "finished", outcome.steps, seconds)
    try:
        return row._replace(**_scores(folder, study.resolution, images))
    except NotFiniteError as error:
        return row._replace(outcome=str(error))


def _with_steps(
    configs: dict[str, TrainConfig], seconds: float, folder: Path, seeds: Iterable[int]
) -> dict[str, TrainConfig]:
    """Return the configurations of the arms with the steps that fit into `seconds`.

    All seeds of an arm get the same steps, those of its earlier runs with one of `seeds` if there are any. Otherwise
    the spread over the seeds would include that of the machine's speed.
    """
    steps = {}
    for arm, seed in itertools.product(configs, seeds):
        if (folder / f"{arm}-{seed}" / "config.yaml").is_file():
            steps[arm] = load_config(folder / f"{arm}-{seed}").steps
    new = [arm for arm in configs if arm not in steps]
    paces: dict[str, list[float]] = {arm: [] for arm in new}
    for arm in new * TRIALS:  # in turns, so that a machine that becomes slower does so for all of them
        logger.info("Study: timing %s", arm)
        with contextlib.suppress(RunError, ValueError):
            paces[arm].append(seconds_per_step(configs[arm]))
    for arm, found in paces.items():
        # If all trials failed, the runs fail in the same way, and their rows say why.
        steps[arm] = max(1, round(seconds / statistics.median(found))) if found else PACE_STEPS
    return {arm: dataclasses.replace(config, steps=steps[arm]) for arm, config in configs.items()}


def seconds_per_step(config: TrainConfig) -> float:
    """Return the seconds that a step of a run takes on this machine, from a trial of `PACE_STEPS` unmonitored steps."""
    half = PACE_STEPS // 2
    monitor = dataclasses.replace(config.monitor, every=0)
    trial = dataclasses.replace(config, steps=PACE_STEPS, log_every=half, monitor=monitor)
    with tempfile.TemporaryDirectory() as folder:
        if not train(trial, Path(folder, "run")).finished:
            raise KeyboardInterrupt  # the signal that stopped the trial was sent to the study
        last = read_log(Path(folder, "run"))[-1]
    tokens = last["fill"] * config.data.tokens_per_pack * config.data.packs_per_step
    return float(tokens / last["tokens_per_second"])


def _scores(folder: Path, resolution: int | str | None, images: Sequence[LabelledSource]) -> dict[str, Any]:
    """Return the scores of a run's row; `images` are those to learn from and those to score on."""
    device = best_device()
    encoder = Encoder.from_pretrained(folder).to(device)
    trained = encoder.preprocessing.resolution
    pixels = trained if resolution is None else None if resolution == NATIVE else int(resolution)
    config = InferenceConfig(pixels, autocast_dtype("auto", device))

    def of(encoder: Encoder) -> dict[str, float]:
        train, val = (extract(encoder, part, config, cache=True) for part in images)
        return score(train, val, how=Scoring(device=device))

    found, start = of(encoder), of(start_of(encoder, folder))
    logged = [line["knn"] for line in read_log(folder) if "knn" in line]
    return {
        **{name: found[name] for name in ("knn20", "linear", "rankme")},
        **{f"start_{name}": start[name] for name in ("knn20", "linear")},
        **({"best_knn": max(logged), "fall": max(logged) - logged[-1]} if logged else {}),
    }
