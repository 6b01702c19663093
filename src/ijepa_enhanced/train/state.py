"""State of a run: everything that changes from step to step, except weights and moments."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ijepa_enhanced.batch import MaskedBatch
from ijepa_enhanced.data.plan import Cursor
from ijepa_enhanced.distributed import Ranks
from ijepa_enhanced.errors import CheckpointError, ResumeError
from ijepa_enhanced.jepa import JEPA
from ijepa_enhanced.train.checkpoint import (
    load_checkpoint,
    newest_first,
    read_together,
    save_checkpoint,
    set_aside,
)
from ijepa_enhanced.train.meter import Meter
from ijepa_enhanced.train.monitor import History
from ijepa_enhanced.train.step import StepResult
from ijepa_enhanced.train.unreadable import Unreadable

logger = logging.getLogger(__name__)


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
    skipped: int = 0
    """Steps that were skipped because their loss or gradient was not finite."""
    skipped_in_row: int = 0
    """Number of steps that were skipped in a row until now."""
    grad_norm: float = 0.0
    """Norm of all gradients of the last step that was not skipped, before clipping."""
    log_bytes: int = 0
    """Length of `log.jsonl`, in bytes, when the loaded checkpoint was saved."""

    @property
    def epoch(self) -> int:
        """Return the epoch of the last pack shown."""
        return self.cursor.epoch

    def advance(self, images: int, cursor: Cursor) -> None:
        """Count one step.

        Args:
            images: shown in the step.
            cursor: cursor of the first pack of the next step.
        """
        self.step += 1
        self.images += images
        self.cursor = cursor

    def trained(self, batches: Sequence[MaskedBatch], result: StepResult) -> None:
        """Record the results of a step that was not skipped."""
        self.meter.add_step(result.losses, batches)
        self.grad_norm = float(result.grad_norm.read())
        self.skipped_in_row = 0

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
        progress = {
            "step": self.step,
            "images": self.images,
            "cursor": self.cursor,
            "plan": self.plan,
            "meter": Meter.merged(meters),
            "monitor": dataclasses.asdict(self.history),
            "unreadable": self.unreadable.found,
            "skipped": self.skipped,
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
        }
        save_checkpoint(folder, self.step, model, optimizer, progress | facts, ranks)

    def load(self, folder: Path, model: JEPA, optimizer: torch.optim.Optimizer, ranks: Ranks) -> bool:
        """Load the newest checkpoint in `folder` that is not damaged, and return whether there is one.

        A damaged one is renamed, so that the run can write its step again.

        Raises:
            CheckpointError: no checkpoint can be read.
            ResumeError: the checkpoint is of another plan.
        """
        damaged: list[CheckpointError] = []
        # Those that rank 0 sees, because another machine may not see the newest one yet.
        names = ranks.gather([path.name for path in newest_first(folder)])[0]
        for checkpoint in (folder / name for name in names):
            try:
                progress = read_together(checkpoint, ranks)
                self._check_plan(progress, folder)
                load_checkpoint(checkpoint, model, optimizer, ranks)
            except CheckpointError as error:
                damaged.append(error)
                continue
            self._restore(progress, ranks)
            for found in damaged:
                logger.warning("%s Resuming from %s instead.", found, checkpoint)
            if damaged:
                set_aside(folder, checkpoint, ranks)
            return True
        if damaged:
            raise CheckpointError(f"{damaged[0]} No earlier checkpoint can be read. Start a new run.")
        return False

    def _check_plan(self, progress: dict[str, Any], folder: Path) -> None:
        """Raise ResumeError if a checkpoint belongs to another plan."""
        if progress["plan"] != self.plan:
            raise ResumeError(
                f"Cannot resume {folder.parent}: the images (for example, files were added or removed) or the data "
                "settings have changed since the run was started. Restore them, or start a new run."
            )

    def _restore(self, progress: dict[str, Any], ranks: Ranks) -> None:
        """Restore what a checkpoint holds besides weights and moments."""
        self.step, self.images, self.log_bytes = progress["step"], progress["images"], progress["log_bytes"]
        self.cursor = Cursor(*progress["cursor"])
        self.meter.restore(progress["meter"], ranks)
        self.history = History(**progress["monitor"])
        self.skipped = progress["skipped"]
        # JSON has turned the row numbers into strings.
        self.unreadable.found |= {int(row): reason for row, reason in progress["unreadable"].items()}
