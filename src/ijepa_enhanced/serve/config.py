"""The limits of a service; `ijepa serve` has an option for each."""

from __future__ import annotations

from dataclasses import dataclass

MIB = 2**20


@dataclass(frozen=True)
class Limits:
    """What a service accepts, and how long images wait for each other."""

    max_bytes: int = 32 * MIB
    """Largest body of a request, in bytes."""
    max_pixels: int = 50_000_000
    """Largest image, in pixels (width * height). Larger ones are refused before they are decoded."""
    max_images: int = 64
    """Most images of a request."""
    timeout: float = 30.0
    """Longest time that a request may take, in seconds. A slower one is cancelled."""
    queue: int = 256
    """Most images that wait or are in work. Beyond, requests get status 429 and are told when to try again."""
    tokens_per_pack: int | None = None
    """Most tokens that go through the encoder at once, and most tokens of an image. None: what suits the device."""
    max_wait: float = 5.0
    """Longest time that an image waits for others to share its pack while the encoder is idle, in milliseconds."""
