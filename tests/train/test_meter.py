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

SHRINK = "shrink them once with `ijepa prepare photos OUT`"


@pytest.mark.parametrize(
    ("device", "cores", "data", "ways"),
    [
        (
            "cuda",
            4,
            DataConfig("photos", workers=1),
            f"raise data.workers from 1 to 4, {SHRINK} or set data.cache to memory",
        ),
        ("cuda", 4, DataConfig("photos"), f"{SHRINK} or set data.cache to memory"),
        ("cuda", 4, DataConfig("photos", workers=8, cache="memory"), SHRINK),
        # Waiting for 23% of the time costs less than one core of four, and more than one of eight.
        ("cpu", 4, DataConfig("photos", cache="memory"), SHRINK),
        ("cpu", 8, DataConfig("photos", workers=0, cache="memory"), f"raise data.workers from 0 to 1 or {SHRINK}"),
        ("cpu", 8, DataConfig("photos", workers=5, cache="memory"), SHRINK),
    ],
)
def test_the_advice_is_what_the_run_does_not_do_yet(
    monkeypatch: pytest.MonkeyPatch, device: str, cores: int, data: DataConfig, ways: str
) -> None:
    for module in (meter, devices):
        monkeypatch.setattr(module, "default_workers", lambda: cores)
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
