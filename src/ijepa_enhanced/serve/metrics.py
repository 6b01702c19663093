"""What Prometheus reads about a service."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST

from ijepa_enhanced.serve.packer import PackReport

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)
IMAGES = (1, 2, 4, 8, 16, 32, 64, 128, 256)
SHARES = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
LEFT = 499
"""Status under which requests of clients that left are counted, as nginx does."""


class Metrics:
    """Counts requests and packs in a registry of its own."""

    content_type = CONTENT_TYPE_LATEST

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        to = self.registry
        self.requests = Counter("ijepa_requests", "Requests by path and status.", ["path", "status"], registry=to)
        self.seconds = Histogram("ijepa_request_seconds", "Time of requests.", ["path"], buckets=SECONDS, registry=to)
        self.images = Counter("ijepa_images", "Images that went through the encoder.", registry=to)
        self.tokens = Counter("ijepa_tokens", "Patches that went through the encoder.", registry=to)
        self.pack_images = Histogram("ijepa_pack_images", "Images of a pack.", buckets=IMAGES, registry=to)
        self.pack_fill = Histogram(
            "ijepa_pack_fill", "Share of the token budget that a pack uses.", buckets=SHARES, registry=to
        )
        self.pack_seconds = Histogram(
            "ijepa_pack_seconds", "Time of a pack in the encoder.", buckets=SECONDS, registry=to
        )
        self.pending = Gauge("ijepa_pending_images", "Images that wait or are in work.", registry=to)

    def count_pack(self, pack: PackReport) -> None:
        """Count one pass through the encoder."""
        self.images.inc(pack.images)
        self.tokens.inc(pack.tokens)
        self.pack_images.observe(pack.images)
        self.pack_fill.observe(pack.tokens / pack.budget)
        self.pack_seconds.observe(pack.seconds)

    def count_request(self, path: str, status: int, seconds: float) -> None:
        """Count one request."""
        self.requests.labels(path, status).inc()
        self.seconds.labels(path).observe(seconds)

    def total(self) -> int:
        """Return the number of requests."""
        samples = (sample for metric in self.requests.collect() for sample in metric.samples)
        return sum(int(sample.value) for sample in samples if sample.name.endswith("_total"))

    def text(self) -> bytes:
        """Return all values as Prometheus reads them."""
        return generate_latest(self.registry)
