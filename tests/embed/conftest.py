"""A folder of images of mixed sizes, two of them damaged, and a small encoder."""

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ijepa_enhanced import Encoder
from ijepa_enhanced.embed import settings
from ijepa_enhanced.models.config import EncoderConfig
from ijepa_enhanced.models.preprocessing import Preprocessing

ROWS = 8
"""Rows of a file, so that a few images make several files."""
BROKEN, CUT = "cats/00.png", "dogs/14.png"
"""An image whose header cannot be read, and one whose pixels cannot be decoded."""


@pytest.fixture(scope="session")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("weights") / "encoder"
    Encoder.random(
        EncoderConfig(variant="Ti", depth=3, patch_size=8).architecture, Preprocessing(32), 0
    ).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """21 images, 19 of which can be decoded, in two classes."""
    root = tmp_path_factory.mktemp("photos")
    random = np.random.default_rng(0)
    for number in range(21):
        size = random.integers(16, 80, 2)
        image = Image.fromarray(random.integers(0, 256, (*size, 3), dtype=np.uint8))
        path = root / ("cats" if number < 10 else "dogs") / f"{number:02d}.{'jpg' if number % 2 else 'png'}"
        path.parent.mkdir(exist_ok=True)
        file = io.BytesIO()
        image.save(file, "JPEG" if number % 2 else "PNG")
        data = file.getvalue()
        key = path.relative_to(root).as_posix()
        path.write_bytes(b"no image" if key == BROKEN else data[: len(data) // 2] if key == CUT else data)
    return root


@pytest.fixture
def float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """`ijepa embed` computes in float32, as `Encoder.embed` does. Where the CPU has bfloat16, it would use that."""
    monkeypatch.setattr("ijepa_enhanced.commands.embed.autocast_dtype", lambda *_: torch.float32)


@pytest.fixture
def small_files(monkeypatch: pytest.MonkeyPatch) -> None:
    """Files of `ROWS` rows."""
    monkeypatch.setattr(settings, "LEAST_ROWS", ROWS)
