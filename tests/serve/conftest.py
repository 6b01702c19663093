"""A small encoder, image files of any size and kind, and a service in a process of its own."""

import contextlib
import http.client
import io
import json
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import numpy as np
import pytest
from PIL import Image

from ijepa_enhanced.encoder import Encoder
from ijepa_enhanced.models.config import EncoderConfig
from ijepa_enhanced.models.preprocessing import Preprocessing

MakeImage = Callable[..., bytes]
Start = Callable[..., "Running"]


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


class Running(NamedTuple):
    """A service in a process of its own."""

    process: subprocess.Popen[str]
    host: str

    def post(self, body: bytes, **headers: str) -> tuple[int, Any]:
        """Status and content of an answer to a request on a connection of its own."""
        with contextlib.closing(http.client.HTTPConnection(self.host, timeout=60)) as connection:
            headers = {"Content-Type": "application/json", "Connection": "close"} | headers
            connection.request("POST", "/v1/embeddings", body, headers)
            answer = connection.getresponse()
            return answer.status, json.loads(answer.read())

    def end(self, number: int = signal.SIGTERM) -> tuple[int, str]:
        """Exit code and stderr after a signal."""
        self.process.send_signal(number)
        _, said = self.process.communicate(timeout=60)
        return self.process.returncode, said


@pytest.fixture(scope="session")
def saved(encoder: Encoder, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("serve") / "pets"
    encoder.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def start(saved: Path) -> Iterator[Start]:
    """Start a service of the small encoder on a free port, with more options."""
    processes = []

    def started(*options: str) -> Running:
        command = [sys.executable, "-m", "ijepa_enhanced", "serve", str(saved), "--port", "0", *options]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        processes.append(process)
        assert process.stdout is not None
        url = urlsplit(process.stdout.readline().strip())
        assert url.scheme == "http"
        return Running(process, url.netloc)

    yield started
    for process in processes:
        process.kill()
        process.communicate()
