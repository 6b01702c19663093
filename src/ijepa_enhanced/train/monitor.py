"""Monitoring: whether a run collapses, and which teacher is the best so far.

The loss tells neither. So at regular steps the teacher embeds a fixed set of training images. Metrics of these features
warn of collapse and choose the encoder in `best/`. docs/monitoring.md explains how to read them.
"""

from __future__ import annotations

import json
import logging
import math
import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from ijepa_enhanced.data.catalog import Catalog
from ijepa_enhanced.data.plan import Plan
from ijepa_enhanced.data.sources.base import Source
from ijepa_enhanced.distributed import Ranks
from ijepa_enhanced.encoder import Encoder
from ijepa_enhanced.errors import PlanError
from ijepa_enhanced.files import replacing
from ijepa_enhanced.models.config import Architecture
from ijepa_enhanced.train.config import MonitorConfig, TrainConfig
from ijepa_enhanced.train.probe import ProbeSet

logger = logging.getLogger(__name__)

COST = 0.03
"""Largest share of a run's computation that monitoring takes if `monitor.every` is null."""
PASSES = 2
"""Lower bound for the cost of a step, in forward passes over all its tokens.

The teacher makes one pass. The student makes three (forward, and twice as much backward) over the context, which holds
on average 0.43 of the tokens with four target blocks and 0.62 with two (grids of 7 x 7 to 10 x 18). That is at least
2.3 passes, without the predictor."""
MOST_PROBES = 100
"""More probes than this tell nothing more about a long run."""
FALL, FALLEN, PATIENCE = 1 / 4, 2, 2
"""The alarm: at `PATIENCE` probes in a row, at least `FALLEN` metrics are below `FALL` of their peak. The runs that it
was tested on are in docs/measurements.md."""
BEST = "monitor.json"
"""File in `best/` with score and step of that teacher."""
FEWEST, MOST, A_CLASS = 512, 4096, 20
"""Images of the probe set if `monitor.images` is null: at least, at most, and of each class."""
TITLES = {"knn": "kNN accuracy", "rankme": "RankMe", "lidar": "LiDAR"}
"""What users read instead of some names of metrics."""


def steps_between_probes(
    config: MonitorConfig, probe_tokens: int, steps: int, step_tokens: float, log_every: int
) -> int:
    """Return `monitor.every`, or the number of steps that null stands for; 0 means never.

    L probes pass L * probe_tokens tokens through the teacher. A run costs at least as much as a forward pass over
    PASSES * step_tokens * steps tokens. So L = COST * PASSES * step_tokens * steps / probe_tokens probes, rounded down,
    cost at most the share COST of the run. One probe comes before the first step and one after the last. The probes are
    spread evenly, over steps at which a line of the log is written anyway.

    Args:
        config: of the monitor.
        probe_tokens: tokens of one probe.
        steps: of the whole run.
        step_tokens: mean tokens of a step.
        log_every: steps between lines of the log.
    """
    if config.every is not None:
        return config.every
    probes = min(MOST_PROBES, int(COST * PASSES * step_tokens * steps / probe_tokens) - 1)  # one is before step 1
    # Rounded up twice, so that there are never more probes than `probes`.
    return math.ceil(math.ceil(steps / probes) / log_every) * log_every if probes > 0 else 0


def default_images(catalog: Catalog) -> int:
    """Return the number of images of the probe set if `monitor.images` is null; see `MonitorConfig.images`."""
    # Unlabeled images have label -1.
    classes = 0 if catalog.labels is None else len(np.unique(catalog.labels[catalog.labels >= 0]))
    return min(MOST, max(FEWEST, A_CLASS * classes))


@dataclass
class History:
    """A summary of the probes so far: whether the run collapses, and which teacher was the best."""

    peaks: dict[str, float] = field(default_factory=dict)
    """The highest value of each diversity metric so far, including the one before training."""
    low: int = 0
    """Number of last probes in a row at which at least `FALLEN` diversity metrics were below `FALL` of their peak."""
    best: float = 0.0
    """The highest score of a teacher, see `add`."""
    best_step: int | None = None
    """The step of that teacher; None: none yet."""

    def add(self, step: int, metrics: dict[str, float], trained: bool = True) -> list[str]:
        """Record the metrics of one probe, and return the names of the diversity metrics that have fallen.

        Diversity metrics are RankMe, LiDAR, spread and 1 - cosine. They are lowest if all features are equal. The score
        of a teacher is `knn`. Without labels it is the product of the diversity metrics, so that a gain in one cannot
        hide a loss in another. A teacher whose diversity metrics have fallen is never the best. kNN alone would not
        show that, because it standardizes the features.

        Args:
            step: steps done.
            metrics: of the probe.
            trained: whether the teacher can be the best: at step 0, random weights are not.
        """
        diversity = {name: value for name, value in metrics.items() if name in ("rankme", "lidar", "spread")}
        diversity |= {"1 - cosine": 1 - metrics["cosine"]} if "cosine" in metrics else {}
        for name, value in diversity.items():
            self.peaks[name] = max(value, self.peaks.get(name, value))
        fallen = [name for name, value in diversity.items() if value < FALL * self.peaks[name]]
        self.low = self.low + 1 if len(fallen) >= FALLEN else 0
        score = metrics.get("knn", math.prod(diversity.values()))
        # >=: of two equal teachers, prefer the one that was trained longer.
        if trained and diversity and not self.low and score >= self.best:
            self.best, self.best_step = score, step
        return fallen

    def save_best(self, folder: Path) -> None:
        """Write score and step of the best teacher beside it."""
        with replacing(folder / BEST) as temporary:
            temporary.write_text(json.dumps({"best": self.best, "best_step": self.best_step}) + "\n")

    def load_best(self, folder: Path, step: int) -> None:
        """Adopt the teacher in `folder` as the best if it is of a step after the resumed `step`.

        A run that was killed may have saved it after its last checkpoint, and the teacher before it is gone.
        """
        with suppress(FileNotFoundError):
            saved = json.loads((folder / BEST).read_text())
            if saved["best_step"] is not None and saved["best_step"] > step:
                self.best, self.best_step = saved["best"], saved["best_step"]

    @property
    def alarm(self) -> bool:
        """Return whether the run collapses."""
        return self.low >= PATIENCE


class Monitor:
    """A monitor that probes the teacher of a run at regular steps; see `start_monitor`.

    Args:
        probe_set: the images to probe it with.
        every: steps between probes.
        steps: of the whole run.
        history: of earlier probes, which this monitor updates.
        starts_trained: whether the encoder that the run starts from can be the best.
    """

    def __init__(self, probe_set: ProbeSet, every: int, steps: int, history: History, starts_trained: bool) -> None:
        self.probe_set = probe_set
        self.every = every
        self.steps = steps
        self.history = history
        self.starts_trained = starts_trained
        self.started, self.seconds = time.perf_counter(), 0.0

    def due(self, step: int) -> bool:
        """Return whether there is a probe after `step` steps."""
        return step % self.every == 0 or step == self.steps

    def probe(self, step: int, encoder: Encoder, autocast: torch.autocast, ranks: Ranks) -> dict[str, float]:
        """Probe the teacher after `step` steps, and log the metrics. All ranks call this and share the work.

        Args:
            step: steps done.
            encoder: the teacher.
            autocast: precision of matrix products.
            ranks: the processes that share the run.

        Returns:
            On rank 0, the metrics (see `ProbeSet.metrics`) and these keys; on other ranks, nothing.

            - `alarm`: 1 while the run collapses, else 0
            - `best`: step of the best teacher so far, if there is one
            - `monitor_seconds`: seconds that this probe took
            - `monitor_share`: share that all probes took of the wall time since this process started to train
        """
        start = time.perf_counter()
        metrics = self.probe_set.metrics(encoder, autocast, ranks)
        if not ranks.main:
            return {}
        fallen = self.history.add(step, metrics, trained=step > 0 or self.starts_trained)
        history = self.history
        found = ", ".join(
            f"{TITLES.get(name, name)} {value:.1%}" if name == "knn" else f"{TITLES.get(name, name)} {value:.3g}"
            for name, value in metrics.items()
        )
        logger.info("Monitor at step %d: %s%s", step, found, " (best so far)" if history.best_step == step else "")
        if history.low == PATIENCE:  # once per collapse
            logger.warning(
                "The run is collapsing: in the last %d checks, %s were below a quarter of their maximum, so the "
                "features of different images are almost the same. %s In a new run, raise objective.vicreg_weight or "
                "lower optim.lr.",
                PATIENCE,
                " and ".join(TITLES.get(name, name) for name in fallen),
                f"The best encoder (step {history.best_step}) is in best/."
                if history.best_step is not None
                else "No good encoder has been saved.",
            )
        now = time.perf_counter()
        self.seconds += now - start
        values = metrics | {
            "alarm": float(history.alarm),
            "monitor_seconds": now - start,
            "monitor_share": self.seconds / (now - self.started),
        }
        return values | ({} if history.best_step is None else {"best": history.best_step})


def start_monitor(
    config: TrainConfig,
    source: Source,
    plan: Plan,
    steps: int,
    history: History,
    encoder: Architecture,
) -> Monitor | None:
    """Return the monitor of a run, or None if the run is not monitored.

    Args:
        config: of the run.
        source: the training images.
        plan: plan of the run.
        steps: of the whole run.
        history: of the probes before the run was resumed. The monitor updates it.
        encoder: the architecture that is probed.
    """
    if config.monitor.every == 0:
        return None
    try:
        images = config.monitor.images or default_images(plan.catalog)
        candidates = plan.block(0, 0).images
        probe_set = ProbeSet(source, plan, candidates, images, encoder, config.merging.teacher_rate)
    except PlanError:
        logger.warning(
            "Monitoring is off: fewer than two images are large enough for its crops. Add larger images, or set "
            "monitor.every to 0 to hide this message."
        )
        return None
    step_tokens = plan.outline.tokens / plan.outline.packs * plan.config.packs_per_step
    every = steps_between_probes(config.monitor, probe_set.tokens, steps, step_tokens, config.log_every)
    if not every:
        # Only a debug message, since it would appear in every short trial.
        logger.debug(
            "Monitoring is off: the run is so short that checks would cost more than 3% of it. "
            "Set monitor.every to monitor it anyway."
        )
        return None
    logger.info("The monitor checks the teacher every %d steps.", every)
    return Monitor(probe_set, every, steps, history, starts_trained=config.init is not None)
