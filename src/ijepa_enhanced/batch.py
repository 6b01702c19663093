"""The batch that the loader yields: a pack, and everything that depends on its lengths, made in the worker."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from torch import Tensor

from ijepa_enhanced.merge_plan import MergePlan
from ijepa_enhanced.packed import Movable, Packed, Segments, Selection


@dataclass(frozen=True)
class Colors(Movable):
    """Changes of the colors of V views, which the device applies to their patches (`ops.preprocess.recolor`)."""

    affine: Tensor
    """float32 [V, C, C + 1]: pixel values x become affine[:, :C] @ x + affine[:, C], cut off at 0 and 255."""
    solarized: Tensor
    """bool [V]: whether bright values x then become 255 - x."""

    def select(self, views: Tensor) -> Colors:
        """Return those of some views: bool [V]."""
        return Colors(self.affine[views], self.solarized[views])


@dataclass(frozen=True)
class Batch(Movable):
    """One pack as the loader yields it. V is 0 if no image of the pack could be read."""

    packed: Packed
    """Pixel patches [T, P * P * C] with values from 0 to 255. They are uint8, or float32 if an image of the pack has
    more than 8 bits. The device changes their colors and normalizes them."""
    image_ids: Tensor
    """int64 [V]: the row of each view's image in the source."""
    labels: Tensor | None
    """int64 [V], or None if the source has no labels."""
    cursor: tuple[int, int]
    """Epoch of the pack, and its number in the plan of that epoch."""
    unreadable: tuple[tuple[int, str], ...]
    """(row, reason) of each image of this pack that could not be decoded."""
    unmasked: Packed | None = dataclasses.field(default=None, kw_only=True)
    """Pixel patches of the unmasked views (global and local) of the same images. Only the student sees these views.
    None if the images have no unmasked views."""
    colors: Colors | None = dataclasses.field(default=None, kw_only=True)
    """Changes of the colors of the views of `packed`; None if they keep their colors."""
    unmasked_colors: Colors | None = dataclasses.field(default=None, kw_only=True)
    """The same of `unmasked`."""
    merge_plan: MergePlan | None = dataclasses.field(default=None, kw_only=True)
    """How the encoder (in training, the teacher) merges the tokens of `packed`; None if it does not merge."""

    @property
    def tokens(self) -> int:
        """Return the number of patches of all views, unmasked ones included."""
        streams = [self.packed] if self.unmasked is None else [self.packed, self.unmasked]
        return sum(stream.segments.total - stream.prefix * len(stream.segments) for stream in streams)


@dataclass(frozen=True)
class MaskedBatch(Batch):
    """A batch with I-JEPA's masks for every view of `packed`."""

    context: Selection
    """The Tc tokens of `packed` that the student sees: visible patches, and the class token and registers."""
    targets: Selection
    """The Tq tokens of the target blocks, each once, whose features the predictor predicts."""
    seen: Segments
    """Segments of the student's stream: the context of each masked view, then each unmasked view."""
    in_context: Selection | None = dataclasses.field(default=None, kw_only=True)
    """Which tokens of `context` are patches, as rows of that stream; None if all are."""
    seen_merge_plan: MergePlan | None = dataclasses.field(default=None, kw_only=True)
    """How the student merges the tokens of its stream; None if it does not merge."""
