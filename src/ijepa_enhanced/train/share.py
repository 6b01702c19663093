"""Count what a rank trains on in a step, and sum these counts over ranks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Self

from ijepa_enhanced.batch import MaskedBatch
from ijepa_enhanced.data.plan import Cursor
from ijepa_enhanced.distributed import Ranks


class Share(NamedTuple):
    """Counts of the packs of a step, for one rank or summed over all ranks."""

    stop: int
    """Number of ranks that a signal has asked to stop."""
    target_tokens: int
    views: int
    """Masked views."""
    unreadable: int
    """Number of images that could not be decoded."""
    epoch: int
    """Epoch of the last pack of the step. Only the last rank has this pack. It is 0 on other ranks."""
    pack: int
    """Number of that pack in its epoch; 0 on other ranks."""

    @classmethod
    def of_all(cls, batches: Sequence[MaskedBatch], stop: bool, ranks: Ranks) -> Self:
        """Return the sums over all ranks. The ranks exchange six numbers once. All ranks call this.

        Args:
            batches: packs of this rank.
            stop: whether a signal has asked this rank to stop.
            ranks: the processes that share the step.
        """
        last = batches[-1].cursor if ranks.rank == ranks.world - 1 else (0, 0)
        own = cls(
            int(stop),
            sum(len(batch.targets.index) for batch in batches),
            sum(len(batch.image_ids) for batch in batches),
            sum(len(batch.unreadable) for batch in batches),
            *last,
        )
        return cls(*map(int, ranks.sums(own)))

    @property
    def next(self) -> Cursor:
        """Return the cursor of the first pack of the next step."""
        return Cursor(self.epoch, self.pack + 1)
