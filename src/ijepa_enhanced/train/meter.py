"""Losses and rates of a run between two lines of its log."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from ijepa_enhanced.batch import MaskedBatch
from ijepa_enhanced.distributed import Ranks
from ijepa_enhanced.errors import RunError
from ijepa_enhanced.jepa import Losses

LOSSES = ("prediction", "vicreg", "contrastive")
"""Terms of the loss as they are logged: before their weights."""


class Meter:
    """Losses and rates since the last reading.

    Nothing is read from the device before a reading or a checkpoint, so that the host never waits for it in between.
    """

    def __init__(self) -> None:
        self.steps = 0
        self.losses: list[Tensor] = []
        self.tokens: list[int] = []
        self.restart_clock()

    def restart_clock(self) -> None:
        """Restart the rates, not the losses."""
        self.start = time.perf_counter()
        self.waited = 0.0
        self.views = 0
        self.earlier = len(self.tokens)

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint between two readings keeps, so that the next reading is the same after resuming."""
        losses = [losses.tolist() for losses in self.losses]
        return {"steps": self.steps, "losses": losses, "tokens": self.tokens}

    @staticmethod
    def merged(states: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """Return the states of all ranks as one."""
        joint = {name: [one for state in states for one in state[name]] for name in ("losses", "tokens")}
        return {"steps": states[0]["steps"], **joint}

    def restore(self, state: dict[str, Any], ranks: Ranks) -> None:
        """Continue from the merged `state` of all ranks, which the main one holds from now on."""
        self.steps = state["steps"]
        if ranks.main:
            self.losses = [torch.tensor(losses) for losses in state["losses"]]
            self.tokens = state["tokens"]
        self.restart_clock()

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Count the time spent inside as time spent waiting for data."""
        start = time.perf_counter()
        yield
        self.waited += time.perf_counter() - start

    def add_step(self, losses: Iterable[Losses], batches: Iterable[MaskedBatch]) -> None:
        """Count a step with the losses of this rank's packs."""
        for loss, batch in zip(losses, batches, strict=True):
            self.losses.append(torch.stack([loss.total.detach(), *(getattr(loss, name) for name in LOSSES)]))
            self.tokens.append(batch.tokens)
            self.views += len(batch.seen)
        self.steps += 1

    def read(self, tokens_per_pack: int, ranks: Ranks) -> dict[str, float]:
        """Return means over the steps since the last reading, over all ranks, and start over.

        Raises:
            RunError: there was nothing to train on.
        """
        names = ("loss", *LOSSES)
        total = torch.zeros(len(names))
        if self.losses:
            total = torch.stack([losses.to(self.losses[-1].device) for losses in self.losses]).sum(dim=0).cpu()
        seconds = time.perf_counter() - self.start  # reading the losses has waited for the device to finish these steps
        shown = [self.views, sum(self.tokens[self.earlier :]), sum(self.tokens), len(self.tokens)]
        *parts, views, new_tokens, tokens, packs = ranks.sums([*total.tolist(), *shown])
        if not packs:
            raise RunError(f"No image of the last {self.steps} steps could be read.")
        values = {
            **{name: part / self.steps for name, part in zip(names, parts, strict=True)},
            "views_per_second": views / seconds,
            "tokens_per_second": new_tokens / seconds,
            "fill": tokens / (packs * tokens_per_pack),
            "data_wait": self.waited / seconds,
        }
        self.steps, self.losses, self.tokens = 0, [], []
        self.restart_clock()
        return values


def describe(values: dict[str, float]) -> str:
    """Return one line for the progress bar."""
    return (
        f"loss {values['loss']:.4f}  {values['views_per_second']:.0f} views/s  "
        f"{values['tokens_per_second']:.0f} tokens/s  packs {values['fill']:.1%} full  "
        f"waiting for data {values['data_wait']:.1%}"
    )
