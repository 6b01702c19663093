"""How a service holds up under load, with good and with hostile requests: `python -m ijepa_enhanced.benchmarks.serve`.

Many clients send images of mixed sizes at once, on this machine, to a service in a process of its own. It packs them as
`ijepa serve` does; or, in other turns of the same run, it computes one image at a time; or it batches only images of
equal grids, as other servers do. In `squares` all images are squashed to squares of as many patches as they have on
average, so that they can share a batch; these are the features of other images.

With `--requests 10000` the column `MB_grown` says whether memory is bounded: it is the growth of the service from the
first tenth of its requests to the last. With `--hostile 200` as many requests are broken in one of several ways. Each
of them must get a status from 400 to 499, and each of the others the right features.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import http.client
import io
import json
import multiprocessing
import os
import signal
import socket
import statistics
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from ijepa_enhanced.benchmarks.table import print_table, write_csv
from ijepa_enhanced.encoder import Encoder
from ijepa_enhanced.models.config import EncoderConfig
from ijepa_enhanced.models.preprocessing import Preprocessing

if TYPE_CHECKING:  # an extra
    from ijepa_enhanced.serve.packer import Waiting

WAYS = ("packs", "one by one", "equal grids", "squares")
TURNS = 3
RESOLUTIONS = (64, 256)
"""Smallest and largest resolution of the images, in pixels. They are embedded at native size."""
DISTINCT = 64
"""Different images."""
CLOSE = 1e-5
"""Norm of the difference to the features of an image alone, by their norm. float32 rounds at 6e-8, in many sums."""
PAGE = os.sysconf("SC_PAGE_SIZE")


def run(
    csv: bool = False,
    variant: str = "S",
    patch: int = 16,
    clients: int = 50,
    requests: int = 1000,
    turns: int = TURNS,
    hostile: int = 0,
    ways: Sequence[str] = WAYS,
) -> dict[str, Any]:
    """Print the table, and return the throughput of packs, or of the first way that is measured.

    Args:
        csv: write the table.
        variant: width, depth and heads of the encoder, which has random weights.
        patch: P.
        clients: connections at once.
        requests: of each way and turn, with one image each.
        turns: times that each way is measured, in turns.
        hostile: how many of the requests are broken.
        ways: which of `WAYS`.

    Raises:
        RuntimeError: an answer is wrong.
    """
    encoder = Encoder.random(EncoderConfig(variant, patch).architecture, Preprocessing(), seed=0)
    images = mixed_images()
    found: dict[str, list[dict[str, Any]]] = {way: [] for way in ways}
    with tempfile.TemporaryDirectory() as folder:
        encoder.save_pretrained(folder)
        for _ in range(turns):
            for way in ways:
                shown = squares(images, patch) if way == "squares" else images
                expected = encoder.embed(shown, resolution="native").numpy()
                with service(way, folder) as (port, process):
                    load = Load(port, process, shown, expected, hostile, requests)
                    found[way].append(load.run(clients))
    rows: list[dict[str, Any]] = [
        {"way": way, **{name: median(turn[name] for turn in measured) for name in measured[0]}}
        for way, measured in found.items()
    ]
    for row in rows:
        row["first_over_it"] = of_way(rows, ways[0]) / row["images_per_second"]
    print(f"{requests} requests of {clients} clients, ViT-{variant}/{patch}, medians of {turns} turns")
    print_table(rows)
    if csv:
        print(write_csv("serve", rows))
    return {"images_per_second": of_way(rows, ways[0])}


def of_way(rows: Sequence[dict[str, Any]], way: str) -> float:
    """Return the images per second of one way."""
    return float(next(row["images_per_second"] for row in rows if row["way"] == way))


def median(values: Iterator[float]) -> float:
    """Return the median of numbers, as an integer if all are."""
    known = list(values)
    found = statistics.median(known)
    return int(found) if all(isinstance(value, int) for value in known) else float(found)


def mixed_images() -> list[bytes]:
    """Return JPEG files of `DISTINCT` sizes and aspect ratios, smooth as photographs are."""
    rng = np.random.default_rng(0)
    files = []
    for _ in range(DISTINCT):
        resolution, aspect = rng.uniform(*RESOLUTIONS), 2 ** rng.uniform(-1, 1)
        size = round(resolution * aspect**0.5), round(resolution / aspect**0.5)
        coarse = Image.fromarray(rng.integers(0, 256, (6, 6, 3), dtype=np.uint8))
        file = io.BytesIO()
        coarse.resize(size, Image.Resampling.BICUBIC).save(file, "JPEG", quality=90)
        files.append(file.getvalue())
    return files


def squares(images: Sequence[bytes], patch: int) -> list[bytes]:
    """Return images squashed to one square of as many patches as they have on average."""
    opened = [Image.open(io.BytesIO(image)) for image in images]
    side = patch * round(statistics.mean(image.width * image.height for image in opened) ** 0.5 / patch)
    files = []
    for image in opened:
        file = io.BytesIO()
        image.resize((side, side), Image.Resampling.BICUBIC).save(file, "JPEG", quality=90)
        files.append(file.getvalue())
    return files


# The service.


@contextlib.contextmanager
def service(way: str, folder: str) -> Iterator[tuple[int, Any]]:
    """Run a service in a process of its own, and yield its port and the process."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        port = listening.getsockname()[1]
        process = multiprocessing.get_context("spawn").Process(target=serve_in_way, args=(way, folder, listening))
        process.start()
    try:
        yield port, process
        assert process.pid is not None
        os.kill(process.pid, signal.SIGTERM)
        process.join()
        if process.exitcode != 0:
            raise RuntimeError(f"The service ended with exit code {process.exitcode}.")
    finally:
        process.kill()


def serve_in_way(way: str, folder: str, listening: socket.socket) -> None:
    """Serve the encoder in a folder in one of `WAYS`, until SIGTERM."""
    from ijepa_enhanced.serve.app import Service, make_app
    from ijepa_enhanced.serve.config import Limits
    from ijepa_enhanced.serve.engine import Engine
    from ijepa_enhanced.serve.guard import Access
    from ijepa_enhanced.serve.metrics import Metrics
    from ijepa_enhanced.serve.packer import Packer
    from ijepa_enhanced.serve.server import serve

    choose = Packer.choose

    def one(self: Packer, waiting: Sequence[Waiting]) -> tuple[list[Waiting], bool]:
        return list(waiting[:1]), True

    def equal(self: Packer, waiting: Sequence[Waiting]) -> tuple[list[Waiting], bool]:
        return choose(self, [item for item in waiting if (item.grid == waiting[0].grid).all()])

    Packer.choose = {"one by one": one, "equal grids": equal}.get(way, choose)  # type: ignore[method-assign]
    metrics = Metrics()
    encoder = Encoder.from_pretrained(folder)
    engine = Engine(encoder, Limits(timeout=600), metrics.count_pack)
    served = Service(engine, metrics, "encoder")
    serve(make_app(served, Access()), served, listening, lambda: None)


# The clients.


class Load:
    """Sends requests to a service and checks the answers.

    Args:
        port: of the service.
        process: it.
        images: N image files.
        expected: float32 [N, D], their features.
        hostile: how many requests are broken.
        requests: how many there are.
    """

    def __init__(
        self, port: int, process: Any, images: Sequence[bytes], expected: Any, hostile: int, requests: int
    ) -> None:
        self.port = port
        self.process = process
        self.images = images
        self.expected = expected
        self.requests = requests
        self.broken = set(np.random.default_rng(1).choice(requests, hostile, replace=False).tolist())
        self.statuses: Counter[int] = Counter()
        self.seconds: list[float] = []
        self.memory: list[int] = []
        self.local = threading.local()
        self.connections: list[http.client.HTTPConnection] = []

    def run(self, clients: int) -> dict[str, Any]:
        """Send all requests, and return what was measured.

        Raises:
            RuntimeError: an answer is wrong.
        """
        self._wait()
        start = time.perf_counter()
        with ThreadPoolExecutor(clients) as pool:
            list(pool.map(self._request, range(self.requests)))
        total = time.perf_counter() - start
        for connection in self.connections:
            connection.close()
        good = self.requests - len(self.broken)
        if self.statuses[200] != good:
            raise RuntimeError(f"{good} requests are good, but the answers are {dict(self.statuses)}.")
        quantiles = statistics.quantiles(self.seconds, n=20, method="inclusive")
        tenth = max(1, len(self.memory) // 10)
        return {
            "images_per_second": good / total,
            "p50_ms": 1000 * quantiles[9],
            "p95_ms": 1000 * quantiles[18],
            "images_per_pack": self._images_per_pack(),
            "MB": max(self.memory) / 1e6,
            "MB_grown": (max(self.memory[-tenth:]) - max(self.memory[:tenth])) / 1e6,
            "refused": self.requests - good,
        }

    def _request(self, number: int) -> None:
        """Send one request and check its answer."""
        which = number % len(self.images)
        image, start = self.images[which], time.perf_counter()
        if number in self.broken:
            status, content = self._post(*broken(image, number))
            if not 400 <= status < 500 or set(content) != {"error"}:
                raise RuntimeError(f"A broken request got status {status}: {content}")
        else:
            status, content = self._post(body_of(image), {})
            self.seconds.append(time.perf_counter() - start)
            if status != 200:
                raise RuntimeError(f"A good request got status {status}: {content}")
            vector = np.array(content["data"][0]["embedding"], np.float32)
            wrong = np.linalg.norm(vector - self.expected[which]) / np.linalg.norm(self.expected[which])
            if wrong > CLOSE:
                raise RuntimeError(f"An answer differs from the image alone by {wrong:.1e}.")
        self.statuses[status] += 1
        resident = int(Path(f"/proc/{self.process.pid}/statm").read_text().split()[1]) * PAGE
        self.memory.append(resident)

    def _post(self, body: bytes, headers: dict[str, str]) -> tuple[int, Any]:
        """Return status and content of an answer, over the connection of this thread."""
        if not hasattr(self.local, "connection"):
            self.local.connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=600)
            self.connections.append(self.local.connection)
        connection = self.local.connection
        connection.request("POST", "/v1/embeddings", body, {"Content-Type": "application/json"} | headers)
        answer = connection.getresponse()
        return answer.status, json.loads(answer.read())

    def _images_per_pack(self) -> float:
        """Return how many images a pack had on average."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port)
        connection.request("GET", "/metrics")
        text = connection.getresponse().read().decode()
        connection.close()
        values = dict(line.split(" ") for line in text.splitlines() if not line.startswith("#"))
        return float(values["ijepa_pack_images_sum"]) / float(values["ijepa_pack_images_count"])

    def _wait(self) -> None:
        """Wait until the service answers, and warm it up."""
        while True:
            with contextlib.suppress(ConnectionError):
                self._post(body_of(self.images[0]), {})
                return
            del self.local.connection
            time.sleep(0.1)


def body_of(image: bytes) -> bytes:
    """Return the body of a request for an image at native size."""
    coded = base64.b64encode(image).decode()
    return json.dumps({"input": [{"image": coded}], "resolution": "native"}).encode()


def broken(image: bytes, number: int) -> tuple[bytes, dict[str, str]]:
    """Return body and headers of one of several kinds of broken requests."""
    rng = np.random.default_rng(number)
    size = (2**31 - 1).to_bytes(4)
    kinds = [
        (body_of(b""), {}),
        (body_of(rng.bytes(2000)), {}),
        (body_of(image[: len(image) // 3]), {}),
        (body_of(b'<svg xmlns="http://www.w3.org/2000/svg" onload="alert(1)"/>'), {}),
        (body_of(b"II*\0" + rng.bytes(500)), {}),
        (body_of(b"\0\0\0\x0cjP  \r\n\x87\n" + rng.bytes(500)), {}),
        (body_of(b"BM" + bytes(12) + b"\x28\0\0\0" + size[::-1] + size[::-1] + rng.bytes(50)), {}),
        (body_of(image)[:-30], {}),
        (json.dumps({"input": "http://127.0.0.1:1/cat.jpg"}).encode(), {}),
        (json.dumps({"input": "file:///etc/hostname"}).encode(), {}),
        (json.dumps({"input": "data:image/png;base64,@@@@"}).encode(), {}),
        (body_of(image), {"Origin": "http://evil.example"}),
        (body_of(image), {"Content-Type": "text/plain"}),
        (body_of(image).replace(b'"native"', b"1e9"), {}),
        (rng.bytes(3000), {}),
    ]
    return kinds[number % len(kinds)]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--csv", action="store_true")
    parser.add_argument("--variant", default="S", help="Ti, S, B, L, H or g, with random weights")
    parser.add_argument("--patch", type=int, default=16, help="side of a patch in pixels")
    parser.add_argument("--clients", type=int, default=50)
    parser.add_argument("--requests", type=int, default=1000, help="of each way and turn")
    parser.add_argument("--turns", type=int, default=TURNS)
    parser.add_argument("--hostile", type=int, default=0, help="how many requests are broken")
    parser.add_argument("--ways", nargs="+", default=WAYS, choices=WAYS)
    run(**vars(parser.parse_args()))
