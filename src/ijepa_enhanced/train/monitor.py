"""Monitoring: whether a run collapses, and which teacher is the best so far.

The loss says nothing about either. Now and then the teacher embeds a fixed set of training images; metrics of these
features warn of collapse and choose the encoder in `best/`. docs/evaluation.md says how to read them.
"""

from __future__ import annotations

import logging
import math
import time
from dataclasses import dataclass, field

import numpy as np
import torch

from ijepa_enhanced.data.catalog import Catalog
from ijepa_enhanced.data.plan import EpochPlan, Plan
from ijepa_enhanced.data.sources.base import Source
from ijepa_enhanced.distributed import Ranks
from ijepa_enhanced.encoder import Encoder
from ijepa_enhanced.errors import PlanError
from ijepa_enhanced.train.config import MonitorConfig, TrainConfig
from ijepa_enhanced.train.probe import ProbeSet

logger = logging.getLogger(__name__)

COST = 0.03
"""Most of a run's computing that monitoring takes when it chooses its own steps."""
PASSES = 2
"""What a step costs at least, in passes of the teacher over all its tokens: one by the teacher itself, and three by the
student (forward, and twice that backward) over the context, which is on average 0.43 of the tokens with four targets
and 0.62 with two (grids of 7 x 7 to 10 x 18). That is 2.3 and more, and the predictor is not counted."""
MOST_PROBES = 100
"""More probes than this do not tell more about a long run."""
FALL, FALLEN, PATIENCE = 1 / 4, 2, 2
"""The alarm: at two probes in a row, two metrics or more are below a quarter of their peak. docs/measurements.md says
what this was tried on."""
FEWEST, MOST, A_CLASS = 512, 4096, 20
"""Images of the probe set, when the configuration does not say."""


def steps_between_probes(
    config: MonitorConfig, probe_tokens: int, steps: int, step_tokens: float, log_every: int
) -> int:
    """Return `monitor.every`, or what null stands for; 0 is never.

    L probes pass L * probe_tokens tokens through the teacher, and a run costs at least as much as passing
    PASSES * step_tokens * steps of them. So L = COST * PASSES * step_tokens * steps / probe_tokens, rounded down,
    probes cost no more than COST. One is before the first step and one after the last; they are spread evenly, over
    steps at which the log is written anyway.

    Args:
        config: of the monitor.
        probe_tokens: tokens of a probe.
        steps: of the whole run.
        step_tokens: mean tokens of a step.
        log_every: steps between lines of the log.
    """
    if config.every is not None:
        return config.every
    probes = min(MOST_PROBES, int(COST * PASSES * step_tokens * steps / probe_tokens) - 1)
    return math.ceil(math.ceil(steps / probes) / log_every) * log_every if probes > 0 else 0


def default_images(catalog: Catalog) -> int:
    """Return how many images the probe set has, see `MonitorConfig.images`."""
    classes = 0 if catalog.labels is None else len(np.unique(catalog.labels[catalog.labels >= 0]))
    return min(MOST, max(FEWEST, A_CLASS * classes))


@dataclass
class History:
    """What the probes so far amount to: whether the run collapses, and which teacher was the best."""

    peaks: dict[str, float] = field(default_factory=dict)
    """The highest value of each metric of room, that before training included."""
    low: int = 0
    """The last probes in a row at which `FALLEN` or more of them were below `FALL` of their peak."""
    best: float = 0.0
    """The highest merit of a teacher, see `add`."""
    best_step: int = 0
    """Its step; 0: none yet."""

    def add(self, step: int, metrics: dict[str, float]) -> list[str]:
        """Record the metrics of one probe, and return the names of those that have fallen.

        Metrics of room are those that are least when all features are equal. The merit of a teacher is `knn`, and
        without labels the product of its metrics of room, so that none of them buys the loss of another. A teacher has
        no merit when they have fallen: nearest neighbors, whose features are standardized, do not see a collapse.
        """
        room = {name: value for name, value in metrics.items() if name in ("rankme", "lidar", "spread")}
        room |= {"1 - cosine": 1 - metrics["cosine"]} if "cosine" in metrics else {}
        for name, value in room.items():
            self.peaks[name] = max(value, self.peaks.get(name, value))
        fallen = [name for name, value in room.items() if value < FALL * self.peaks[name]]
        self.low = self.low + 1 if len(fallen) >= FALLEN else 0
        merit = metrics.get("knn", math.prod(room.values()))
        # Of two equal teachers the later one has learned longer. The start has learned nothing.
        if step and room and not self.low and merit >= self.best:
            self.best, self.best_step = merit, step
        return fallen

    @property
    def alarm(self) -> bool:
        """Whether the run collapses."""
        return self.low >= PATIENCE


class Monitor:
    """Probes the teacher of a run now and then; see `start_monitor`.

    Args:
        probe_set: the images.
        every: steps between probes.
        steps: of the whole run.
        history: of the probes before; it is continued.
    """

    def __init__(self, probe_set: ProbeSet, every: int, steps: int, history: History) -> None:
        self.probe_set = probe_set
        self.every = every
        self.steps = steps
        self.history = history
        self.started, self.seconds = time.perf_counter(), 0.0

    def due(self, step: int) -> bool:
        """Whether there is a probe after that many steps."""
        return step % self.every == 0 or step == self.steps

    def probe(self, step: int, encoder: Encoder, autocast: torch.autocast, ranks: Ranks) -> dict[str, float]:
        """Probe the teacher after `step` steps, log what is found, and return it.

        All ranks share the work and call this; the main one has the result.

        Returns:
            The metrics (see `ProbeSet.metrics`); `alarm`, 1 while the run collapses and else 0; `best`, the step of the
            best teacher so far, if there is one; `monitor_seconds`, what this probe took; and `monitor_share`, what
            all probes took of the wall time since the process began to train. Nothing on other ranks.
        """
        start = time.perf_counter()
        metrics = self.probe_set.metrics(encoder, autocast, ranks)
        if not ranks.main:
            return {}
        fallen = self.history.add(step, metrics)
        history = self.history
        found = ", ".join(f"{name} {value:.3g}" for name, value in metrics.items())
        logger.info("Monitor, step %d: %s%s", step, found, "; the best so far" if history.best_step == step > 0 else "")
        if history.low == PATIENCE:
            logger.warning(
                "The run collapses: at the last %d probes %s were below a quarter of their peak. "
                "The encoder no longer tells images apart. %s Raise objective.vicreg_weight or lower optim.lr.",
                PATIENCE,
                " and ".join(fallen),
                f"Step {history.best_step} is kept in best/." if history.best_step else "No step was worth keeping.",
            )
        now = time.perf_counter()
        self.seconds += now - start
        values = metrics | {
            "alarm": float(history.alarm),
            "monitor_seconds": now - start,
            "monitor_share": self.seconds / (now - self.started),
        }
        return values | ({"best": history.best_step} if history.best_step else {})


def start_monitor(
    config: TrainConfig, source: Source, plan: Plan, first_epoch: EpochPlan, steps: int, history: History
) -> Monitor | None:
    """Return the monitor of a run, or None if it has none.

    Args:
        config: of the run.
        source: the training images.
        plan, first_epoch: of the run.
        steps: of the whole run.
        history: of the probes before the run was resumed; it is continued.
    """
    if config.monitor.every == 0:
        return None
    try:
        images = config.monitor.images or default_images(plan.catalog)
        probe_set = ProbeSet(source, plan, first_epoch.images, images, config.encoder, config.merging.teacher_rate)
    except PlanError:
        logger.warning("The run is not monitored: too few images are large enough to crop.")
        return None
    step_tokens = float(first_epoch.pack_tokens.mean()) * plan.config.packs_per_step
    every = steps_between_probes(config.monitor, probe_set.tokens, steps, step_tokens, config.log_every)
    if not every:
        # Not worth a line in every short trial.
        logger.debug(
            "The run is not monitored: that would cost more than 3% of so short a run. monitor.every forces it."
        )
        return None
    logger.info("Monitoring every %d steps.", every)
    return Monitor(probe_set, every, steps, history)
