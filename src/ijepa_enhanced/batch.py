"""What the loader yields: a pack with everything that depends on lengths, made in the worker."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from torch import Tensor

from ijepa_enhanced.merge_plan import MergePlan
from ijepa_enhanced.packed import Movable, Packed, Segments, Selection


@dataclass(frozen=True)
class Batch(Movable):
    """One pack as the loader yields it. V may be 0 when no image of the pack could be read."""

    packed: Packed
    """uint8 patches; normalised on the device."""
    image_ids: Tensor
    """int64 [V]: the row of each view's image in the source."""
    labels: Tensor | None
    """int64 [V], or None where the source has none."""
    cursor: tuple[int, int]
    """Epoch and number of the pack in the plan."""
    unreadable: tuple[tuple[int, str], ...]
    """(row, reason) of each image that the plan put in this pack and that could not be decoded."""
    whole: Packed | None = dataclasses.field(default=None, kw_only=True)
    """uint8 patches of the views of the same images that the student sees whole and the teacher never; None where there
    are none."""
    merge_plan: MergePlan | None = dataclasses.field(default=None, kw_only=True)
    """How the encoder, in training the teacher, merges the tokens of `packed`; None where it does not."""

    @property
    def tokens(self) -> int:
        """Of all views, the whole ones included."""
        return self.packed.segments.total + (0 if self.whole is None else self.whole.segments.total)


@dataclass(frozen=True)
class MaskedBatch(Batch):
    """A batch with the masks of I-JEPA drawn on every view but the whole ones."""

    context: Selection
    """The Tc tokens of `packed` that the student sees."""
    targets: Selection
    """The Tq tokens of the target blocks, each once, whose features are predicted."""
    seen: Segments
    """Of all that the student sees: the context of every masked view, then every whole view."""
    seen_merge_plan: MergePlan | None = dataclasses.field(default=None, kw_only=True)
    """How the student merges these tokens; None where it does not."""
