"""The original's method, written plainly: what our step is measured against.

The original packed images into rows of 256 tokens of which a tenth was padding, attended under dense masks of 256 x 256
with the softmax written out, and read float patches. It predicted each target block in a sequence of its own after the
whole context, as I-JEPA does (arXiv 2301.08243, section 3). Here it has our widths and runs uncompiled, as it did.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple, cast

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from ijepa_enhanced.batch import MaskedBatch
from ijepa_enhanced.jepa import JEPA, Losses, StepSize
from ijepa_enhanced.masks import ViewMasks
from ijepa_enhanced.models.blocks import Block, Blocks, FactorizedPositions
from ijepa_enhanced.models.config import Architecture, PredictorConfig
from ijepa_enhanced.models.vit import VisionTransformer
from ijepa_enhanced.ops.linear import Linear
from ijepa_enhanced.ops.preprocess import CHANNELS, IMAGENET_MEAN, IMAGENET_STD

ROW = 256
"""Tokens of a row, and so the most tokens of a view."""
PADDING = 0.1
"""The least share of all rows' tokens that is padding."""


Numbers = NDArray[np.int64]


class Rows(NamedTuple):
    """A pack as the original had it: B rows of `ROW` tokens. Padding belongs to view -1."""

    patches: Tensor
    """float32 [B, 256, P * P * C], normalized."""
    places: Tensor
    """int64 [B, 256, 2]: row and column in the view's grid."""
    views: Tensor
    """int64 [B, 256]: the view of each token."""
    context: Tensor
    """int64 [B, Lc]: where in its row each token that the student sees lies, padded to the longest of the B lists."""
    context_views: Tensor
    """int64 [B, Lc]: the view of each of them."""
    targets: Tensor
    """int64 [M * B, Lt]: the same for the tokens of the first target block of all rows, then of the second, up to the
    M-th."""
    target_views: Tensor
    """int64 [M * B, Lt]: the view of each of them."""

    @property
    def blocks(self) -> int:
        """M, target blocks of a view."""
        return len(self.targets) // len(self.views)

    def to(self, device: torch.device, non_blocking: bool = False) -> Rows:
        """Return a copy on `device`."""
        return Rows(*(x.to(device, non_blocking=non_blocking) for x in self))

    def pin_memory(self) -> Rows:
        """Return a copy in page-locked memory."""
        return Rows(*(x.pin_memory() for x in self))


def lay_out(batch: MaskedBatch, masks: Sequence[ViewMasks], config: Architecture) -> Rows:
    """Return a batch as rows, with `masks` of its views; at least `PADDING` of their tokens is padding."""
    lengths = np.array(batch.packed.segments.lengths)
    rows, slots = assign(lengths)
    count = max(1 + max(rows), math.ceil(lengths.sum() / ((1 - PADDING) * ROW)))
    where = torch.from_numpy(np.concatenate([ROW * row + own for row, own in zip(rows, slots, strict=True)]))
    patches = torch.zeros(count * ROW, batch.packed.values.shape[1])
    pixels = batch.packed.values.unflatten(1, (-1, CHANNELS)) / 255
    patches[where] = ((pixels - torch.tensor(IMAGENET_MEAN)) / torch.tensor(IMAGENET_STD)).flatten(1)
    places = torch.zeros(count * ROW, 2, dtype=torch.int64)
    places[where] = batch.packed.positions.long().clamp(max=min(config.position_grid) - 1)
    views = torch.full((count * ROW,), -1)
    views[where] = torch.from_numpy(np.repeat(np.arange(len(lengths)), lengths))

    def chosen(tokens: Sequence[Numbers]) -> list[list[tuple[int, int]]]:
        """Return for each row the slot and the view of each token that is chosen, from the numbers in their views."""
        found: list[list[tuple[int, int]]] = [[] for _ in range(count)]
        for view, own in enumerate(tokens):
            found[rows[view]] += [(int(slot), view) for slot in slots[view][own]]
        return found

    nothing = np.empty(0, np.int64)
    blocks = [
        chosen([view.targets[block] if block < len(view.targets) else nothing for view in masks])
        for block in range(max(len(view.targets) for view in masks))
    ]
    return Rows(
        patches.unflatten(0, (count, ROW)),
        places.unflatten(0, (count, ROW)),
        views.unflatten(0, (count, ROW)),
        *padded(chosen([view.context for view in masks])),
        *padded([row for block in blocks for row in block]),
    )


def assign(lengths: Numbers) -> tuple[list[int], list[Numbers]]:
    """Put each view, longest first, into the first row with room for it.

    Args:
        lengths: tokens of each of V views, at most `ROW`.

    Returns:
        The row of each view, and the slots of its tokens in that row.
    """
    room: list[int] = []
    rows, slots = [0] * len(lengths), [np.empty(0, np.int64)] * len(lengths)
    for view in np.argsort(-lengths, kind="stable").tolist():
        length = int(lengths[view])
        row = next((row for row, left in enumerate(room) if left >= length), len(room))
        if row == len(room):
            room.append(ROW)
        rows[view], slots[view] = row, ROW - room[row] + np.arange(length)
        room[row] -= length
    return rows, slots


def padded(rows: list[list[tuple[int, int]]]) -> tuple[Tensor, Tensor]:
    """Return slots and views of rows of different lengths as int64 [rows, longest] each."""
    longest = max(map(len, rows))
    both = torch.tensor([row + [(0, -1)] * (longest - len(row)) for row in rows])
    return both[..., 0], both[..., 1]


class Original(nn.Module):
    """The original I-JEPA method with our widths, on `Rows`. It has the methods of `JEPA` that a step calls."""

    def __init__(self, encoder: Architecture, predictor: PredictorConfig) -> None:
        super().__init__()
        self.student = VisionTransformer(encoder)
        self.teacher = copy.deepcopy(self.student).requires_grad_(False)
        self.embed = Linear(self.student.width, predictor.width)
        self.mask_token = nn.Parameter(torch.randn(predictor.width))
        self.positions = FactorizedPositions(predictor.width, encoder.position_grid)
        nn.init.normal_(self.positions.rows)
        nn.init.normal_(self.positions.cols)
        width = predictor.width
        self.predictor = Blocks(Architecture(width, predictor.depth, predictor.heads, 4 * width))
        self.head = Linear(predictor.width, self.student.width)

    def step_size(self, rows: Rows) -> StepSize:
        """Return the size of a step of one pack; a token counts once for each target block that it lies in."""
        return StepSize(int((rows.target_views >= 0).sum()), 1)

    def forward(self, rows: Rows, step: StepSize) -> Losses:
        """Return the loss of the rows; see `JEPA.forward`."""
        return JEPA.forward(cast(JEPA, self), cast(MaskedBatch, rows), step)

    def preprocess(self, rows: Rows) -> Rows:
        """Return the rows as they are, since their patches are normalized."""
        return rows

    @torch.no_grad()
    def targets(self, rows: Rows) -> Tensor:
        """Return the teacher's features of the target tokens after a LayerNorm, float32 [M * B, Lt, D]."""
        features = encode(self.teacher, rows.patches, rows.places, rows.views)
        features = F.layer_norm(features.float(), features.shape[-1:])
        return take(features.repeat(rows.blocks, 1, 1), rows.targets)

    def features(self, rows: Rows) -> Tensor:
        """Return the student's features of the context, [B, Lc, D]."""
        patches, places = take(rows.patches, rows.context), take(rows.places, rows.context)
        return encode(self.student, patches, places, rows.context_views)

    def predict(self, features: Tensor, rows: Rows) -> Tensor:
        """Return the prediction of `targets`: each block after a copy of the whole context, float32 [M * B, Lt, D]."""
        seen = self.embed(features) + look_up(self.positions, take(rows.places, rows.context))
        places = take(rows.places.repeat(rows.blocks, 1, 1), rows.targets)
        x = torch.cat([seen.repeat(rows.blocks, 1, 1), self.mask_token + look_up(self.positions, places)], dim=1)
        views = torch.cat([rows.context_views.repeat(rows.blocks, 1), rows.target_views], dim=1)
        predicted: Tensor = self.head(dense(self.predictor, x, views)[:, seen.shape[1] :])
        return predicted.float()

    def losses(self, predicted: Tensor, targets: Tensor, features: Tensor, rows: Rows, step: StepSize) -> Losses:
        """Return the prediction loss alone: the mean over all tokens of all target blocks."""
        distance = F.smooth_l1_loss(predicted, targets, reduction="none").mean(dim=2)
        loss = (distance * (rows.target_views >= 0)).sum() / step.target_tokens
        zero = torch.zeros_like(loss)
        return Losses(loss, loss.detach(), vicreg=zero, contrastive=zero)

    def trainable(self) -> list[nn.Parameter]:
        """Return the parameters that learn: all except the teacher's."""
        return [parameter for parameter in self.parameters() if parameter.requires_grad]

    @torch.no_grad()
    def update_teacher(self, momentum: float) -> None:
        """teacher = momentum * teacher + (1 - momentum) * student."""
        torch._foreach_lerp_(list(self.teacher.parameters()), list(self.student.parameters()), 1.0 - momentum)


def take(x: Tensor, index: Tensor) -> Tensor:
    """Return the entries of each row at its own indices: [B, T, ...] at [B, L] -> [B, L, ...]."""
    return x[torch.arange(len(x), device=x.device)[:, None], index]


def look_up(positions: FactorizedPositions, places: Tensor) -> Tensor:
    """Look up factorized positions at places within the tables: int64 [B, T, 2] -> [B, T, D]."""
    return positions.rows[places[..., 0]] + positions.cols[places[..., 1]]


def encode(encoder: VisionTransformer, patches: Tensor, places: Tensor, views: Tensor) -> Tensor:
    """Encode padded rows: [B, T, P * P * C] -> [B, T, D]."""
    x = encoder.patch_embed(patches) + look_up(cast(FactorizedPositions, encoder.positions), places)
    return dense(encoder.blocks, x, views)


def dense(blocks: Blocks, x: Tensor, views: Tensor) -> Tensor:
    """Run transformer blocks on padded rows [B, T, D], under a mask of T x T that keeps views apart."""
    apart = views[:, None, :, None] != views[:, None, None, :]
    for layer in cast(Iterable[Block], blocks.layers):
        q, k, v = layer.qkv(layer.norm1(x)).unflatten(2, (3, layer.heads, -1)).permute(2, 0, 3, 1, 4)
        logits = (q @ k.transpose(2, 3)) * q.shape[-1] ** -0.5
        weights = logits.masked_fill(apart, -torch.inf).softmax(dim=3)
        x = layer.transform(x + layer.proj((weights @ v).transpose(1, 2).flatten(2)))
    return blocks.norm(x)
