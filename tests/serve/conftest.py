"""A small encoder, and image files of any size and kind."""

import io
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from PIL import Image

from ijepa_enhanced.encoder import Encoder
from ijepa_enhanced.models.config import EncoderConfig
from ijepa_enhanced.models.preprocessing import Preprocessing

MakeImage = Callable[..., bytes]


@pytest.fixture(scope="session")
def encoder() -> Encoder:
    return Encoder.random(EncoderConfig(variant="Ti", depth=3, patch_size=8).architecture, Preprocessing(48), 0)


@pytest.fixture(scope="session")
def make_image() -> MakeImage:
    """The bytes of an image file of random pixels, by its height, width and seed."""

    def make(height: int = 40, width: int = 56, seed: int = 0, kind: str = "PNG", **how: Any) -> bytes:
        pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, kind, **how)
        return file.getvalue()

    return make
