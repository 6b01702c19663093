"""The objective on one page: I-JEPA (arXiv 2301.08243) on a packed stream."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ijepa_enhanced.models.encoder import Encoder, EncoderConfig
from ijepa_enhanced.models.predictor import Predictor, PredictorConfig
from ijepa_enhanced.ops.linear import Linear
from ijepa_enhanced.ops.pooling import segment_mean
from ijepa_enhanced.packed import MaskedBatch, Packed
from ijepa_enhanced.regularizers import variance_covariance, views_agree

PROJECTOR_HIDDEN, PROJECTED = 512, 64
"""Widths of the projector's hidden layer and of its result, the only ones measured (docs/log.md)."""


@dataclass(frozen=True)
class ObjectiveConfig:
    """The loss."""

    stabilizer: float = 0.1
    """Weight of VICReg's variance and covariance on the mean of the student's context tokens. 0 is plain I-JEPA,
    under which the rank of small runs' features falls by more than half (docs/evaluation.md)."""

    invariance: float = 0.0
    """Weight of the agreement of an image's views (`regularizers.views_agree`) on a projection of the mean of what the
    student sees of each, the context or a whole view; needs two views, whole and local ones included."""

    def __post_init__(self) -> None:
        for name in ("stabilizer", "invariance"):
            if getattr(self, name) < 0:
                raise ValueError(f"objective.{name} must be at least 0, not {getattr(self, name)}.")


@dataclass(frozen=True)
class Losses:
    """The parts of one pack's loss, float32 scalars; `total` is what is differentiated."""

    total: Tensor
    prediction: Tensor
    stabilizer: Tensor
    invariance: Tensor


class JEPA(nn.Module):
    """Student, teacher and predictor.

    Args:
        encoder: the architecture of student and teacher.
        predictor: the predictor's size.
        objective: the loss.
        views: of each image, side by side in a pack, whole and local ones not counted.
    """

    def __init__(
        self, encoder: EncoderConfig, predictor: PredictorConfig, objective: ObjectiveConfig, views: int = 1
    ) -> None:
        super().__init__()
        self.objective = objective
        self.views = views
        self.student = Encoder(encoder)
        self.teacher = copy.deepcopy(self.student).requires_grad_(False)
        self.predictor = Predictor(predictor, self.student.width, encoder.max_grid)
        self.projector = projector(self.student.width) if objective.invariance else None

    def forward(self, batch: MaskedBatch, step_target_tokens: int, step_packs: int) -> Losses:
        """The share of one pack in the loss of a step; the shares of all its packs add up to the step's loss.

        The prediction loss is a mean over the target tokens of the whole step, the other terms over its packs, so that
        ranks and accumulation agree by construction.

        Args:
            batch: one pack.
            step_target_tokens: target tokens of all packs of the step, over all ranks.
            step_packs: packs of the step, over all ranks.
        """
        with torch.no_grad():
            taught = self.teacher(batch.packed, batch.merge_plan)
            targets = F.layer_norm(taught[batch.targets.index].float(), taught.shape[-1:])
        visible, hidden = batch.packed.select(batch.context), batch.packed.select(batch.targets)
        seen = visible
        if batch.whole is not None:
            seen = Packed.concatenate([visible, batch.whole], batch.seen)
        features = self.student(seen, batch.seen_merge_plan)
        context = features[: visible.segments.total]
        predicted = self.predictor(context, visible, hidden)
        prediction = (
            F.smooth_l1_loss(predicted.float(), targets, reduction="sum") / targets.shape[1] / step_target_tokens
        )

        pooled = segment_mean(features, batch.seen.cu_seqlens)
        masked = len(batch.image_ids)
        images = masked // self.views
        stabilizer = prediction.new_zeros(())
        if self.objective.stabilizer and masked > 1:
            stabilizer = variance_covariance(pooled[:masked]) / step_packs
        invariance = prediction.new_zeros(())
        if self.projector is not None and images > 1:
            projected = self.projector(pooled)
            # Of each image its masked views, then its whole ones.
            views = [part.unflatten(0, (images, -1)) for part in projected.tensor_split([masked]) if len(part)]
            invariance = views_agree(torch.cat(views, dim=1)) / step_packs
        total = prediction + self.objective.stabilizer * stabilizer + self.objective.invariance * invariance
        return Losses(total, prediction.detach(), stabilizer.detach(), invariance.detach())

    @torch.no_grad()
    def update_teacher(self, momentum: float) -> None:
        """teacher = momentum * teacher + (1 - momentum) * student."""
        torch._foreach_lerp_(list(self.teacher.parameters()), list(self.student.parameters()), 1.0 - momentum)


def projector(width: int) -> nn.Sequential:
    """[V, D] -> [V, K]: where views are made alike, so that the encoder need not forget all that tells them apart.

    SimCLR (arXiv 2002.05709, section 4.2) showed why, and with one hidden layer. Its norm's statistics are a pack's.
    """
    return nn.Sequential(
        Linear(width, PROJECTOR_HIDDEN),
        nn.BatchNorm1d(PROJECTOR_HIDDEN, track_running_stats=False),
        nn.GELU(),
        Linear(PROJECTOR_HIDDEN, PROJECTED),
    )
