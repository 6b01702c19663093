"""Losses and throughput of a run between two lines of its log."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from ijepa_enhanced.batch import MaskedBatch
from ijepa_enhanced.config import either
from ijepa_enhanced.data.config import DataConfig
from ijepa_enhanced.devices import default_workers, training_workers
from ijepa_enhanced.distributed import Ranks
from ijepa_enhanced.jepa import Losses

LOSSES = ("prediction", "vicreg", "contrastive")
"""Terms of the loss, as they are logged: not multiplied by their weights."""
MOST_WAITING = 0.1
"""Share of the time that a run may wait for data before it says what to do."""
SETTLED = 100
"""Number of first steps of a process whose waiting does not count, because the workers start in them."""


class Meter:
    """Losses and throughput since the last reading.

    Losses stay on the device until a reading or a checkpoint, so that the host does not wait for the device at every
    step.
    """

    def __init__(self) -> None:
        self.steps = 0
        self.losses: list[Tensor] = []
        self.tokens: list[int] = []
        self.restart_clock()

    def restart_clock(self) -> None:
        """Restart the throughput, and keep the losses. For pauses that are not training, such as a probe."""
        self.start = time.perf_counter()
        self.waited = 0.0
        self.views = 0
        self.earlier = len(self.tokens)  # packs before the restart count for `fill`, not for tokens per second

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint keeps, so that the next reading after resuming has the same losses."""
        losses = [losses.tolist() for losses in self.losses]
        return {"steps": self.steps, "losses": losses, "tokens": self.tokens}

    @staticmethod
    def merged(states: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """Return the states of all ranks joined into one."""
        joint = {name: [one for state in states for one in state[name]] for name in ("losses", "tokens")}
        return {"steps": states[0]["steps"], **joint}

    def restore(self, state: dict[str, Any], ranks: Ranks) -> None:
        """Continue from the merged `state` of all ranks, which rank 0 holds from now on."""
        self.steps = state["steps"]
        if ranks.main:
            self.losses = [torch.tensor(losses) for losses in state["losses"]]
            self.tokens = state["tokens"]
        self.restart_clock()

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Count the time spent in the body as waiting for data."""
        start = time.perf_counter()
        yield
        self.waited += time.perf_counter() - start

    def add_step(self, losses: Iterable[Losses], batches: Iterable[MaskedBatch]) -> None:
        """Count a step with the losses of this rank's packs."""
        for loss, batch in zip(losses, batches, strict=True):
            # [4], on the device: the total and each term.
            self.losses.append(torch.stack([loss.total.detach(), *(getattr(loss, name) for name in LOSSES)]))
            self.tokens.append(batch.tokens)
            self.views += len(batch.seen)
        self.steps += 1

    def read(self, tokens_per_pack: int, ranks: Ranks) -> dict[str, float]:
        """Return the means over all ranks and over the steps since the last reading, and start over.

        If no image of these steps could be read, there are no means: the dictionary is empty.

        Args:
            tokens_per_pack: token budget of a pack.
            ranks: all of them call this.
        """
        names = ("loss", *LOSSES)
        total = torch.zeros(len(names))
        if self.losses:
            # Losses restored from a checkpoint are on the host, new ones on the device.
            total = torch.stack([losses.to(self.losses[-1].device) for losses in self.losses]).sum(dim=0).cpu()
        # Taken after `cpu()`, which waits until the device has finished these steps.
        seconds = time.perf_counter() - self.start
        shown = [self.views, sum(self.tokens[self.earlier :]), sum(self.tokens), len(self.tokens)]
        *parts, views, new_tokens, tokens, packs = ranks.sums([*total.tolist(), *shown])
        values = {}
        if packs:
            # A pack's loss is its share of the loss of a step, so the sum over packs and ranks is the sum over steps.
            values = {name: part / self.steps for name, part in zip(names, parts, strict=True)} | {
                "views_per_second": views / seconds,
                "tokens_per_second": new_tokens / seconds,
                "fill": tokens / (packs * tokens_per_pack),
                "data_wait": self.waited / seconds,
            }
        self.steps, self.losses, self.tokens = 0, [], []
        self.restart_clock()
        return values


def advice(waiting: float, data: DataConfig, device: torch.device) -> str:
    """Return what to do about a run on a device that waits for data for this share of the time.

    On a CPU, a further worker takes one of the N cores that no worker has. It gains more than it costs if the network
    waits for more than 1/N of the time.
    """
    ways = [f"shrink them once with `ijepa prepare {data.source} OUT`"]
    workers, cores = training_workers(data.workers, device), default_workers()
    more = cores if device.type != "cpu" else workers + (waiting * (cores - workers) > 1)
    if workers < more:
        ways.insert(0, f"raise data.workers from {workers} to {more}")
    if data.cache == "none":
        ways.append("set data.cache to memory")
    return f"Training waits for images {waiting:.0%} of the time. To train faster, {either(ways)}."


def describe(values: dict[str, float]) -> str:
    """Return the text of the progress bar."""
    return (
        f"loss {values['loss']:.4f}  {values['views_per_second']:.0f} views/s  "
        f"{values['tokens_per_second']:.0f} tokens/s  packs {values['fill']:.1%} full  "
        f"waiting for data {values['data_wait']:.1%} of the time"
    )
