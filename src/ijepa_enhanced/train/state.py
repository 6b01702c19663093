"""Where a run stands: everything that changes from step to step, but for weights and moments."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ijepa_enhanced.data.plan import Cursor
from ijepa_enhanced.distributed import Ranks
from ijepa_enhanced.errors import ResumeError
from ijepa_enhanced.jepa import JEPA
from ijepa_enhanced.train.checkpoint import latest_checkpoint, load_checkpoint, read_progress, save_checkpoint
from ijepa_enhanced.train.meter import Meter
from ijepa_enhanced.train.monitor import History
from ijepa_enhanced.train.unreadable import Unreadable


@dataclass
class TrainState:
    """Where a run stands; it saves and loads itself, with model and optimizer, as a checkpoint."""

    plan: str
    """Hash of the plan that the cursor counts in."""
    unreadable: Unreadable
    step: int = 0
    """Steps done."""
    images: int = 0
    """Images shown, with repetition."""
    cursor: Cursor = field(default_factory=lambda: Cursor(0, 0))
    meter: Meter = field(default_factory=Meter)
    history: History = field(default_factory=History)
    """What the monitor found so far."""
    log_bytes: int = 0
    """Length of the log at the checkpoint that was loaded."""

    @property
    def epoch(self) -> int:
        """The epoch of the last pack shown."""
        return self.cursor.epoch

    def advance(self, images: int, last: Iterable[tuple[int, int]]) -> None:
        """Count a step that showed `images`, whose packs have these epochs and numbers."""
        epoch, pack = max(last)
        self.step += 1
        self.images += images
        self.cursor = Cursor(epoch, pack + 1)

    def save(
        self, folder: Path, model: JEPA, optimizer: torch.optim.Optimizer, ranks: Ranks, facts: dict[str, Any]
    ) -> None:
        """Write a checkpoint into `folder`, on the main rank; all ranks take part.

        Args:
            folder: of the run's checkpoints.
            model, optimizer: of the run.
            ranks: whose meters are joined.
            facts: what else to record, such as the configuration.

        Raises:
            CheckpointError: it cannot be written.
        """
        meters = ranks.gather(self.meter.state())
        if not ranks.main:
            return
        progress = {
            "step": self.step,
            "images": self.images,
            "cursor": self.cursor,
            "plan": self.plan,
            "meter": Meter.merged(meters),
            "monitor": dataclasses.asdict(self.history),
            "unreadable": self.unreadable.found,
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
        }
        save_checkpoint(folder, self.step, model, optimizer, progress | facts)

    def load(self, folder: Path, model: JEPA, optimizer: torch.optim.Optimizer, ranks: Ranks) -> bool:
        """Continue from the newest checkpoint in `folder`; whether there is one.

        Raises:
            CheckpointError: it cannot be read.
            ResumeError: it is of another plan.
        """
        checkpoint = latest_checkpoint(folder)
        if checkpoint is None:
            return False
        progress = read_progress(checkpoint)
        if progress["plan"] != self.plan:
            raise ResumeError(
                f"{folder.parent} was trained on other images or with another plan. Start a new run instead."
            )
        load_checkpoint(checkpoint, model, optimizer)
        self.step, self.images, self.log_bytes = progress["step"], progress["images"], progress["log_bytes"]
        self.cursor = Cursor(*progress["cursor"])
        self.meter.restore(progress["meter"], ranks)
        self.history = History(**progress["monitor"])
        self.unreadable.found |= {int(row): reason for row, reason in progress["unreadable"].items()}
        return True
