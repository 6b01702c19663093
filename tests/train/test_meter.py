"""A run that waits for its images says what to do, once."""

import dataclasses
import logging
from pathlib import Path

import pytest
import torch

from ijepa_enhanced import devices
from ijepa_enhanced.data.config import DataConfig
from ijepa_enhanced.train import loop, meter
from ijepa_enhanced.train.config import MonitorConfig, TrainConfig
from ijepa_enhanced.train.loop import train
from ijepa_enhanced.train.meter import MOST_WAITING, advice


@pytest.mark.parametrize(
    ("device", "data", "ways"),
    [
        (
            "cuda",
            DataConfig("photos", workers=1),
            "raise data.workers from 1 to 4, shrink them once with `ijepa prepare photos OUT` or set data.cache to "
            "memory",
        ),
        ("cuda", DataConfig("photos"), "shrink them once with `ijepa prepare photos OUT` or set data.cache to memory"),
        ("cuda", DataConfig("photos", workers=8, cache="memory"), "shrink them once with `ijepa prepare photos OUT`"),
        # With one core of four less, the network would lose more than its 23% of waiting.
        ("cpu", DataConfig("photos", cache="memory"), "shrink them once with `ijepa prepare photos OUT`"),
    ],
)
def test_the_advice_is_what_the_run_does_not_do_yet(
    monkeypatch: pytest.MonkeyPatch, device: str, data: DataConfig, ways: str
) -> None:
    for module in (meter, devices):
        monkeypatch.setattr(module, "default_workers", lambda: 4)
    said = f"Training waits for images 23% of the time. To train faster, {ways}."
    assert advice(0.234, data, torch.device(device)) == said


@pytest.mark.parametrize(("share", "times"), [(-1.0, 1), (1.0, 0)])
def test_it_is_given_once_above_the_share(
    tiny: TrainConfig,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    share: float,
    times: int,
) -> None:
    assert MOST_WAITING == 0.1
    monkeypatch.setattr(loop, "MOST_WAITING", share)
    monkeypatch.setattr(loop, "SETTLED", 2)
    config = dataclasses.replace(tiny, steps=8, monitor=MonitorConfig(every=0))
    with caplog.at_level(logging.WARNING):
        train(config, tmp_path / "run")
    assert sum("Training waits for images" in line for line in caplog.messages) == times
