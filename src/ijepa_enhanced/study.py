"""A study: several ways to train, each with several seeds, at an equal budget, scored alike."""

from __future__ import annotations

import csv
import dataclasses
import itertools
import logging
import shlex
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from ijepa_enhanced.commands.setup import load_encoder
from ijepa_enhanced.devices import autocast_dtype, best_device
from ijepa_enhanced.encoder import Encoder
from ijepa_enhanced.errors import NotFiniteError, RequestError, RunError, did_you_mean
from ijepa_enhanced.evaluate.features import extract
from ijepa_enhanced.evaluate.labelled import labelled_pair
from ijepa_enhanced.evaluate.protocol import score
from ijepa_enhanced.evaluate.tokens import InferenceConfig, LabelledSource
from ijepa_enhanced.files import replacing
from ijepa_enhanced.train.config import TrainConfig
from ijepa_enhanced.train.logging import read_log
from ijepa_enhanced.train.loop import train
from ijepa_enhanced.train.saved import check_resumable, check_unchanged, load_config, random_start

logger = logging.getLogger(__name__)

PACE_STEPS = 20
"""Steps that time an arm, of which the first half warms up."""


@dataclass(frozen=True)
class StudyConfig:
    """What a study file says."""

    arms: dict[str, str]
    """What `ijepa train` is given for each, such as `--objective.vicreg_weight 0`, by the arm's name."""
    val: str
    """The source that encoders are scored on."""
    common: str = ""
    """What it is given for all of them, such as `--config quickstart --steps 300`."""
    train: str | None = None
    """The source that probes learn from. Null: that of the training."""
    resolution: int | None = 224
    """sqrt(height * width) in pixels that images are scored at; null: native size."""
    seeds: tuple[int, ...] = (0, 1, 2)
    seconds: float | None = None
    """Training time of every run on this machine, instead of the steps that it would be given: each run is timed first,
    and gets as many steps as it does in that time."""


KINDS: dict[str, Any] = {
    "common": str,
    "val": str,
    "train": str | None,
    "resolution": int | None,
    "seconds": int | float | None,
}
"""Of values in a study file."""
SCORING = ("val", "train", "resolution", "seconds")
"""What every row of a study must have had alike, and no run's configuration tells."""


class Row(NamedTuple):
    """One run of a study: a line of its CSV. Scores are fractions of 1, and empty where a run failed."""

    arm: str
    seed: int
    outcome: str
    """`finished`, `collapsed` (the watch raised its alarm), or what went wrong."""
    steps: int
    seconds: float
    """Of training, this machine's; of an interrupted run, since it went on."""
    knn20: float | None = None
    linear: float | None = None
    rankme: float | None = None
    start_knn20: float | None = None
    """Of the random start."""
    start_linear: float | None = None
    best_knn: float | None = None
    """The highest of the watch's looks."""
    fall: float | None = None
    """How far the last look lies below it."""


def load_study(path: Path) -> StudyConfig:
    """The study in a YAML file.

    Raises:
        RequestError: there is no such file, or a key or value in it is wrong.
    """
    try:
        content = yaml.safe_load(path.read_text())
    except OSError as error:
        raise RequestError(f"{path}: {error.strerror}.") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise RequestError(f"{path} is not valid YAML: {str(error).splitlines()[0]}") from error
    known = [field.name for field in dataclasses.fields(StudyConfig)]
    if not isinstance(content, dict) or not content.get("arms") or not isinstance(content["arms"], dict):
        raise RequestError(f"{path} must hold {', '.join(known[:2])} and may hold {', '.join(known[2:])}.")
    for key in content:
        if key not in known:
            raise RequestError(f"{path}: unknown key '{key}'.{did_you_mean(key, known)}")
    if "val" not in content:
        raise RequestError(f"{path}: val is missing, the source that encoders are scored on.")
    for key, kind in KINDS.items():
        value = content.get(key, "" if key == "common" else None)
        if key in content and (not isinstance(value, kind) or isinstance(value, bool)):
            raise RequestError(f"{path}: {key} cannot be {value!r}.")
        if isinstance(value, int | float) and not value > 0:
            raise RequestError(f"{path}: {key} must be above 0, not {value}.")
    seeds = content.get("seeds", StudyConfig.seeds)
    if not isinstance(seeds, Sequence) or not seeds or not all(type(seed) is int and seed >= 0 for seed in seeds):
        raise RequestError(f"{path}: seeds must be a list of whole numbers.")
    arms = {str(name): str(flags or "") for name, flags in content["arms"].items()}
    for arm in arms:
        if "/" in arm or arm.startswith("."):
            raise RequestError(f"{path}: '{arm}' cannot be an arm's name, which is that of a folder too.")
    return StudyConfig(**content | {"arms": arms, "seeds": tuple(dict.fromkeys(seeds))})


def run_study(study: StudyConfig, folder: Path, configure: Callable[[list[str]], TrainConfig]) -> list[Row]:
    """Run what is not yet done of a study, a seed of every arm before the next seed; return and write all rows.

    Each run lies in `folder/ARM-SEED`, each row in `folder/study.csv`. Interrupted, it goes on where it was.

    Args:
        study: what to run.
        folder: made where it is missing.
        configure: the configuration that flags of `ijepa train` stand for.

    Raises:
        RequestError: an arm's flags are wrong, a source cannot be scored on, or `folder` holds runs of another study;
            nothing has been started.
        RunError: none of a source's images can be read.
    """
    configs = {arm: configure(_split(f"{study.common} {flags}")) for arm, flags in study.arms.items()}
    train_source = study.train or next(iter(configs.values())).data.source
    images = labelled_pair(train_source, study.val)
    _check_same(study, configs, folder)
    folder.mkdir(parents=True, exist_ok=True)
    with replacing(folder / "study.yaml") as temporary:
        temporary.write_text(yaml.safe_dump(dataclasses.asdict(study), sort_keys=False))
    # What failed before it began costs nothing to try again, maybe with other flags.
    rows = [row for row in read_rows(folder / "study.csv") if (folder / f"{row.arm}-{row.seed}").is_dir()]
    done = {(row.arm, row.seed) for row in rows}
    for seed in study.seeds:
        for arm, config in configs.items():
            if (arm, seed) in done:
                continue
            logger.info("Study: %s, seed %d", arm, seed)
            row = _run(dataclasses.replace(config, seed=seed), study, folder / f"{arm}-{seed}", arm)
            if row.outcome in ("finished", "collapsed"):
                try:
                    row = row._replace(**_scores(folder / f"{arm}-{seed}", study.resolution, images))
                except NotFiniteError as error:
                    row = row._replace(outcome=str(error))
            rows.append(row)
            write_rows(rows, folder / "study.csv")
    return rows


def _split(flags: str) -> list[str]:
    try:
        return shlex.split(flags)
    except ValueError as error:
        raise RequestError(f"{flags.strip()}: {error}.") from error


def _check_same(study: StudyConfig, configs: dict[str, TrainConfig], folder: Path) -> None:
    """Raise RequestError where `folder` holds what another study did: its rows would pass for this one's.

    More seeds and more arms make no other study.
    """
    if (folder / "study.yaml").is_file():
        before = load_study(folder / "study.yaml")
        for name in SCORING:
            was, asked = getattr(before, name), getattr(study, name)
            if was != asked:
                raise RequestError(
                    f"{folder} holds runs of a study with {name} = {was}, so it cannot go on with {asked}. "
                    "Change it back, or name another --out."
                )
    for (arm, config), seed in itertools.product(configs.items(), study.seeds):
        run = folder / f"{arm}-{seed}"
        if (run / "config.yaml").is_file():
            saved = load_config(run)
            steps = config.steps if study.seconds is None else saved.steps
            check_resumable(saved, dataclasses.replace(config, seed=seed, steps=steps), run)
            check_unchanged(run)


def _run(config: TrainConfig, study: StudyConfig, folder: Path, arm: str) -> Row:
    resume = (folder / "config.yaml").is_file()
    start = time.perf_counter()
    try:
        if resume:
            config = load_config(folder)
        elif study.seconds is not None:
            config = dataclasses.replace(config, steps=max(1, round(study.seconds / seconds_per_step(config))))
            start = time.perf_counter()
        outcome = train(config, folder, resume=resume)
    except (RunError, ValueError) as error:
        logger.warning("%s, seed %d: %s", arm, config.seed, error)
        return Row(arm, config.seed, str(error).splitlines()[0], 0, time.perf_counter() - start)
    if not outcome.finished:
        raise KeyboardInterrupt  # the signal that ended the run was meant for the study
    alarmed = any(line.get("alarm") for line in read_log(folder))
    seconds = time.perf_counter() - start
    return Row(arm, config.seed, "collapsed" if alarmed else "finished", outcome.steps, seconds)


def seconds_per_step(config: TrainConfig) -> float:
    """What a step of a run takes on this machine, at a trial of `PACE_STEPS` without the watch."""
    half = PACE_STEPS // 2
    monitor = dataclasses.replace(config.monitor, every=0)
    trial = dataclasses.replace(config, steps=PACE_STEPS, log_every=half, monitor=monitor)
    with tempfile.TemporaryDirectory() as folder:
        if not train(trial, Path(folder, "run")).finished:
            raise KeyboardInterrupt  # as in `_run`
        last = read_log(Path(folder, "run"))[-1]
    tokens = last["fill"] * config.data.tokens_per_pack * config.data.packs_per_step
    return float(tokens / last["tokens_per_second"])


def _scores(folder: Path, resolution: int | None, images: Sequence[LabelledSource]) -> dict[str, Any]:
    """The scores of a run's row, from the images of training and validation."""
    device = best_device()
    setting = InferenceConfig(resolution, autocast_dtype("auto", device))

    def of(encoder: Encoder) -> dict[str, float]:
        known, asked = (extract(encoder, part, setting, cache=True) for part in images)
        return dict(score(known, asked))

    encoder = load_encoder(str(folder)).to(device)
    found, start = of(encoder), of(random_start(encoder, folder))
    looks = [line["knn"] for line in read_log(folder) if "knn" in line]
    return {
        **{name: found[name] for name in ("knn20", "linear", "rankme")},
        **{f"start_{name}": start[name] for name in ("knn20", "linear")},
        **({"best_knn": max(looks), "fall": max(looks) - looks[-1]} if looks else {}),
    }


def read_rows(path: Path) -> list[Row]:
    """The rows of a study's CSV; none where there is no such file."""
    if not path.is_file():
        return []
    with path.open(newline="") as file:
        return [
            Row(
                line["arm"],
                int(line["seed"]),
                line["outcome"],
                int(line["steps"]),
                float(line["seconds"]),
                *(float(line[name]) if line[name] else None for name in Row._fields[5:]),
            )
            for line in csv.DictReader(file)
        ]


def write_rows(rows: Sequence[Row], path: Path) -> None:
    """Write a study's CSV, whole or not at all."""
    with replacing(path) as temporary, temporary.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(Row._fields)
        writer.writerows(rows)


def summary(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Of each arm: its runs, how many of them failed or collapsed, and mean and spread of its scores over the seeds.

    The spread is the sample standard deviation; None of one run alone.
    """
    found = []
    for arm in dict.fromkeys(row.arm for row in rows):
        runs = [row for row in rows if row.arm == arm]
        scored = [row for row in runs if row.knn20 is not None]
        line: dict[str, Any] = {
            "arm": arm,
            "runs": len(runs),
            "failed": len(runs) - len(scored),
            "collapsed": sum(row.outcome == "collapsed" for row in runs),
            "steps": round(statistics.mean(row.steps for row in scored)) if scored else 0,
        }
        for name in ("knn20", "linear", "rankme", "fall", "knn20_gain", "linear_gain"):
            values = [value for row in scored if (value := _value(row, name)) is not None]
            line[name] = statistics.mean(values) if values else None
            line[f"{name}_spread"] = statistics.stdev(values) if len(values) > 1 else None
        found.append(line)
    return found


def _value(row: Row, name: str) -> float | None:
    if not name.endswith("_gain"):
        value: float | None = getattr(row, name)
        return value
    score_name = name.removesuffix("_gain")
    score_, start = getattr(row, score_name), getattr(row, f"start_{score_name}")
    return None if score_ is None or start is None else score_ - start
