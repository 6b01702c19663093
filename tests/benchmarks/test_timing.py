"""The clock changes nothing in the product's step, and names all of its parts."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from ijepa_enhanced.batch import MaskedBatch
from ijepa_enhanced.benchmarks.original import Original, lay_out
from ijepa_enhanced.benchmarks.timing import PARTS, Clock, TimedJEPA, Training
from ijepa_enhanced.data.loader import masks_of
from ijepa_enhanced.devices import autocast, autocast_dtype
from ijepa_enhanced.jepa import JEPA, StepSize
from ijepa_enhanced.masks import MaskConfig
from ijepa_enhanced.models.config import EncoderConfig, PredictorConfig
from ijepa_enhanced.objective import ObjectiveConfig
from ijepa_enhanced.train.config import OptimConfig
from ijepa_enhanced.train.optimizer import StepSettings, make_optimizer
from ijepa_enhanced.train.step import train_step

ENCODER, PREDICTOR = EncoderConfig("Ti", 8, depth=2).architecture, PredictorConfig(width=32, depth=1, heads=2)
CPU = torch.device("cpu")


@pytest.fixture
def batch(make_batch: Callable[..., MaskedBatch]) -> MaskedBatch:
    return make_batch([(5, 7), (12, 15), (3, 3), (9, 9)])


def timed() -> Training:
    torch.manual_seed(0)
    clock = Clock(CPU)
    return Training(TimedJEPA(ENCODER, PREDICTOR, clock, compiled=False), CPU, clock)


def test_a_clock_measures_only_while_it_runs() -> None:
    clock = Clock(CPU)
    clock.begin("before")
    clock.begin(None)
    with clock.running():
        for _ in range(2):
            clock.begin("first")
            clock.begin("second")
            clock.begin(None)
    clock.begin("after")
    clock.begin(None)
    assert {part: len(times) for part, times in clock.seconds.items()} == {"first": 2, "second": 2}


def test_parts_fill_the_time_between_their_beginnings(monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter([1.0, 3.0, 7.0, 100.0, 101.0])
    monkeypatch.setattr("time.perf_counter", lambda: next(times))
    clock = Clock(CPU)
    with clock.running():
        clock.begin("first")
        clock.begin("second")
        clock.begin(None)
        clock.begin("first")
        clock.begin(None)
    assert clock.seconds == {"first": [2.0, 1.0], "second": [4.0]}


def test_a_timed_step_is_the_products_step(batch: MaskedBatch) -> None:
    """With the clock running, two steps end at the same weights, bit for bit, as without it."""
    torch.manual_seed(0)
    plain = JEPA(ENCODER, PREDICTOR, ObjectiveConfig())
    optimizer, optim = make_optimizer(plain), OptimConfig()
    for _ in range(2):
        train_step(
            plain,
            plain,
            optimizer,
            [batch],
            StepSize(len(batch.targets.index), 1),
            StepSettings(optim.lr, optim.weight_decay, optim.ema),
            optim.clip,
            autocast(CPU, autocast_dtype("auto", CPU)),
            CPU,
        )
    training = timed()
    with training.clock.running():
        training.steps([batch, batch])
    weights, others = plain.state_dict(), training.model.state_dict()
    assert weights.keys() == others.keys()
    assert all(torch.equal(value, others[name]) for name, value in weights.items())


def test_every_part_of_a_step_is_measured_in_order(batch: MaskedBatch) -> None:
    training = timed()
    training.steps([batch])
    assert training.clock.seconds == {}
    with training.clock.running():
        training.steps([batch, batch])
    assert tuple(training.clock.seconds) == PARTS
    assert {len(times) for times in training.clock.seconds.values()} == {2}


@pytest.mark.parametrize("kind", ["ours", "original"])
def test_steps_learn(batch: MaskedBatch, kind: str) -> None:
    training, pack = timed(), batch
    if kind == "original":
        training = Training(Original(ENCODER, PREDICTOR), CPU, Clock(CPU))
        pack: Any = lay_out(batch, masks_of(batch, MaskConfig(), 0), ENCODER)
    before = [value.clone() for value in training.model.parameters()]
    training.steps([pack])
    changed = [not torch.equal(old, new) for old, new in zip(before, training.model.parameters(), strict=True)]
    assert sum(changed) > 0.9 * len(changed)  # some biases have no gradient yet
