"""The product's own training step, with a clock on its parts."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn

from ijepa_enhanced.batch import MaskedBatch
from ijepa_enhanced.benchmarks.original import Original
from ijepa_enhanced.devices import autocast, autocast_dtype, synchronize
from ijepa_enhanced.jepa import JEPA, Losses, StepSize
from ijepa_enhanced.models.config import Architecture, PredictorConfig
from ijepa_enhanced.objective import ObjectiveConfig
from ijepa_enhanced.train.config import OptimConfig
from ijepa_enhanced.train.optimizer import StepSettings, make_optimizer
from ijepa_enhanced.train.step import train_step

PARTS = ("copy", "preprocess", "teacher", "student", "predictor", "losses", "backward", "optimizer", "EMA")
"""Of a step, in order. Clipping of gradients is part of the optimizer."""


class Clock:
    """How long each part of a step takes; it stands still outside `running`.

    Args:
        device: what computes the parts.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.seconds: dict[str, list[float]] = {}
        self._runs = False
        self._part: str | None = None
        self._start = 0.0

    @contextmanager
    def running(self) -> Iterator[None]:
        """Measure the parts inside."""
        self._runs = True
        yield
        self._runs = False

    def begin(self, part: str | None) -> None:
        """End the part that is being measured and begin another, or none; in between, wait for the device."""
        if not self._runs:
            return
        synchronize(self.device)
        now = time.perf_counter()
        if self._part is not None:
            self.seconds.setdefault(self._part, []).append(now - self._start)
        self._part, self._start = part, now


class TimedJEPA(JEPA):
    """The product's own model; a step calls its methods in order, and each begins a part of the step."""

    def __init__(self, encoder: Architecture, predictor: PredictorConfig, clock: Clock, compiled: bool) -> None:
        super().__init__(encoder, predictor, ObjectiveConfig())
        self.clock = clock
        if compiled:
            for network in (self.student, self.teacher, self.predictor):
                cast(nn.Module, network).compile(dynamic=True)

    def step_size(self, batch: MaskedBatch) -> StepSize:
        """Return the size of a step of one pack."""
        return StepSize(len(batch.targets.index), 1)

    def preprocess(self, batch: MaskedBatch) -> MaskedBatch:
        """Begin `preprocess`."""
        self.clock.begin("preprocess")
        return super().preprocess(batch)

    def targets(self, batch: MaskedBatch) -> Tensor | None:
        """Begin `teacher`."""
        self.clock.begin("teacher")
        return super().targets(batch)

    def features(self, batch: MaskedBatch) -> Tensor:
        """Begin `student`."""
        self.clock.begin("student")
        return super().features(batch)

    def predict(self, features: Tensor, batch: MaskedBatch) -> Tensor | None:
        """Begin `predictor`."""
        self.clock.begin("predictor")
        return super().predict(features, batch)

    def losses(
        self, predicted: Tensor | None, targets: Tensor | None, features: Tensor, batch: MaskedBatch, step: StepSize
    ) -> Losses:
        """Begin `losses`, then `backward`."""
        self.clock.begin("losses")
        losses = super().losses(predicted, targets, features, batch, step)
        self.clock.begin("backward")
        return losses

    def trainable(self) -> list[nn.Parameter]:
        """Begin `optimizer`: the step asks for what to clip once the backward pass is over."""
        self.clock.begin("optimizer")
        return super().trainable()

    def update_teacher(self, momentum: float) -> None:
        """Begin `EMA`."""
        self.clock.begin("EMA")
        super().update_teacher(momentum)


class Training:
    """A model with its optimizer, which `train_step` trains on one pack a step.

    Args:
        model: ours or the original's, which the step handles in the same way.
        device: where to train it.
        clock: the model's; that of the original is never read.
    """

    def __init__(self, model: TimedJEPA | Original, device: torch.device, clock: Clock) -> None:
        self.model = model.to(device)
        self.device = device
        self.clock = clock
        self.optimizer = make_optimizer(cast(JEPA, model))  # `Original` has the same parts
        self.dtype = autocast_dtype("auto", device)
        self.settings = OptimConfig()

    def steps(self, packs: Iterable[Any]) -> None:
        """Train on each of the packs, which lie on the host, in a step of its own."""
        settings = StepSettings(self.settings.lr, self.settings.weight_decay, self.settings.ema)
        for pack in packs:
            self.clock.begin("copy")
            train_step(
                cast(JEPA, self.model),
                self.model,
                self.optimizer,
                [pack],
                self.model.step_size(pack),
                settings,
                self.settings.clip,
                autocast(self.device, self.dtype),
                self.device,
            )
            self.clock.begin(None)
