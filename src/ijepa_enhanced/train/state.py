"""State of a run: everything that changes from step to step, except weights and moments."""

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
    """Progress of a run. It saves and loads itself as a checkpoint, together with model and optimizer."""

    plan: str
    """Hash of the plan, to which the cursor refers."""
    unreadable: Unreadable
    step: int = 0
    """Steps done."""
    images: int = 0
    """Images shown, counted each time."""
    cursor: Cursor = field(default_factory=lambda: Cursor(0, 0))
    meter: Meter = field(default_factory=Meter)
    history: History = field(default_factory=History)
    """Results of the monitor so far."""
    log_bytes: int = 0
    """Length of `log.jsonl`, in bytes, when the loaded checkpoint was saved."""

    @property
    def epoch(self) -> int:
        """Return the epoch of the last pack shown."""
        return self.cursor.epoch

    def advance(self, images: int, last: Iterable[tuple[int, int]]) -> None:
        """Count one step.

        Args:
            images: shown in the step.
            last: epoch and number of the last pack of each rank.
        """
        epoch, pack = max(last)
        self.step += 1
        self.images += images
        self.cursor = Cursor(epoch, pack + 1)

    def save(
        self, folder: Path, model: JEPA, optimizer: torch.optim.Optimizer, ranks: Ranks, facts: dict[str, Any]
    ) -> None:
        """Write a checkpoint into `folder`. All ranks call this, and rank 0 writes.

        Args:
            folder: of the run's checkpoints.
            model, optimizer: of the run.
            ranks: the processes that share the run.
            facts: what else to save, such as the configuration.

        Raises:
            CheckpointError: the checkpoint cannot be written.
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
        """Load the newest checkpoint in `folder`, and return whether there is one.

        Raises:
            CheckpointError: the checkpoint cannot be read.
            ResumeError: the checkpoint is of another plan.
        """
        checkpoint = latest_checkpoint(folder)
        if checkpoint is None:
            return False
        progress = read_progress(checkpoint)
        if progress["plan"] != self.plan:
            raise ResumeError(
                f"Cannot resume {folder.parent}: the images (for example, files were added or removed) or the data "
                "settings have changed since the run was started. Restore them, or start a new run."
            )
        load_checkpoint(checkpoint, model, optimizer)
        self.step, self.images, self.log_bytes = progress["step"], progress["images"], progress["log_bytes"]
        self.cursor = Cursor(*progress["cursor"])
        self.meter.restore(progress["meter"], ranks)
        self.history = History(**progress["monitor"])
        # JSON has turned the row numbers into strings.
        self.unreadable.found |= {int(row): reason for row, reason in progress["unreadable"].items()}
        return True
