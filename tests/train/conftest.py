from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ijepa_enhanced.data.config import DataConfig
from ijepa_enhanced.models.config import EncoderConfig, PredictorConfig
from ijepa_enhanced.train.config import MonitorConfig, TrainConfig


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """24 noisy images of many shapes, in two classes."""
    rng = np.random.default_rng(0)
    folder = tmp_path / "photos"
    for number in range(24):
        path = folder / "ab"[number % 2] / f"{number:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        shape = (*rng.integers(30, 70, 2), 3)
        Image.fromarray(rng.integers(0, 256, shape, dtype=np.uint8)).save(path)
    return folder


@pytest.fixture
def tiny(photos: Path) -> TrainConfig:
    """A run of 12 steps that straddles epochs: a checkpoint every 3, a line of the log every 2, a look every 4."""
    return TrainConfig(
        data=DataConfig(
            str(photos), tokens_per_pack=256, packs_per_step=2, min_resolution=32, max_resolution=48, workers=0
        ),
        encoder=EncoderConfig("Ti", 8, depth=1),
        predictor=PredictorConfig(32, 1, 2),
        monitor=MonitorConfig(every=4, images=16),
        steps=12,
        checkpoint_every=3,
        log_every=2,
    )
