"""The objective on one page: I-JEPA (arXiv 2301.08243) on a packed stream."""

from __future__ import annotations

import copy
import dataclasses
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ijepa_enhanced.batch import MaskedBatch
from ijepa_enhanced.losses import nt_xent, variance_covariance
from ijepa_enhanced.models.config import EncoderConfig, PredictorConfig
from ijepa_enhanced.models.predictor import Predictor
from ijepa_enhanced.models.vit import VisionTransformer
from ijepa_enhanced.objective import ObjectiveConfig
from ijepa_enhanced.ops.linear import Linear
from ijepa_enhanced.ops.pooling import segment_mean
from ijepa_enhanced.ops.preprocess import IMAGENET_MEAN, IMAGENET_STD, Normalize
from ijepa_enhanced.packed import Packed

PROJECTOR_HIDDEN, PROJECTED = 512, 64
"""Widths of the projector's hidden layer and of its result, the only ones measured (docs/log.md)."""


@dataclass(frozen=True)
class Losses:
    """The parts of one pack's loss, float32 scalars; `total` is what is differentiated."""

    total: Tensor
    prediction: Tensor
    vicreg: Tensor
    contrastive: Tensor


class StepSize(NamedTuple):
    """What all packs of a step have together, over all ranks: a pack's loss is its share of the step's."""

    target_tokens: int
    packs: int


class JEPA(nn.Module):
    """Student, teacher and predictor, and the loss between them; `train.step.train_step` calls its methods in order.

    Args:
        encoder: the architecture of student and teacher.
        predictor: the predictor's size.
        objective: the loss.
        views: masked views of each image, side by side in a pack.
    """

    def __init__(
        self, encoder: EncoderConfig, predictor: PredictorConfig, objective: ObjectiveConfig, views: int = 1
    ) -> None:
        super().__init__()
        self.objective = objective
        self.views = views
        self.normalize = Normalize(IMAGENET_MEAN, IMAGENET_STD, encoder.patch_size)
        self.student = VisionTransformer(encoder)
        self.teacher = copy.deepcopy(self.student).requires_grad_(False)
        width = self.student.width
        self.predictor = Predictor(predictor, width, encoder.max_grid) if objective.prediction_weight else None
        self.projector = projector(width) if objective.contrastive_weight else None

    def preprocess(self, batch: MaskedBatch) -> MaskedBatch:
        """Return a batch with normalized patches in place of uint8 ones."""
        global_views = None if batch.whole is None else self.normalize(batch.whole)
        return dataclasses.replace(batch, packed=self.normalize(batch.packed), whole=global_views)

    @torch.no_grad()
    def targets(self, batch: MaskedBatch) -> Tensor | None:
        """Return what is to be predicted: the teacher's features of the target tokens, after a LayerNorm, [Tq, D].

        None if the prediction has no weight; the teacher is then not run.
        """
        if self.predictor is None:
            return None
        features = self.teacher(batch.packed, batch.merge_plan)
        return F.layer_norm(features[batch.targets.index].float(), features.shape[-1:])

    def features(self, batch: MaskedBatch) -> Tensor:
        """Return the student's features [Ts, D] of what it sees: the context of masked views, then unmasked views."""
        seen = batch.packed.select(batch.context)
        if batch.whole is not None:
            seen = Packed.concatenate([seen, batch.whole], batch.seen)
        features: Tensor = self.student(seen, batch.seen_merge_plan)
        return features

    def predict(self, features: Tensor, batch: MaskedBatch) -> Tensor | None:
        """Return the prediction [Tq, D] of `targets` from the context's part of `features`, or None as there."""
        if self.predictor is None:
            return None
        context, hidden = batch.packed.select(batch.context), batch.packed.select(batch.targets)
        predicted: Tensor = self.predictor(features[: len(context.positions)], context, hidden)
        return predicted

    def losses(
        self, predicted: Tensor | None, targets: Tensor | None, features: Tensor, batch: MaskedBatch, step: StepSize
    ) -> Losses:
        """Return the share of one pack in the loss of a step; the shares of all its packs add up to the step's loss.

        The prediction loss is a mean over the target tokens of the whole step, the other terms over its packs, so that
        ranks and accumulation agree by construction.
        """
        weights = self.objective
        prediction = vicreg = contrastive = features.new_zeros((), dtype=torch.float32)
        if predicted is not None and targets is not None:
            distance = F.smooth_l1_loss(predicted.float(), targets, reduction="sum")
            prediction = distance / targets.shape[1] / step.target_tokens
        pooled = segment_mean(features, batch.seen.cu_seqlens)
        masked = len(batch.image_ids)
        images = masked // self.views
        if weights.vicreg_weight and masked > 1:
            vicreg = variance_covariance(pooled[:masked]) / step.packs
        if self.projector is not None and images > 1:
            projected = self.projector(pooled)
            # Of each image its masked views, then its unmasked ones.
            views = [part.unflatten(0, (images, -1)) for part in projected.tensor_split([masked]) if len(part)]
            contrastive = nt_xent(torch.cat(views, dim=1)) / step.packs
        total = (
            weights.prediction_weight * prediction
            + weights.vicreg_weight * vicreg
            + weights.contrastive_weight * contrastive
        )
        return Losses(total, prediction.detach(), vicreg.detach(), contrastive.detach())

    def trainable(self) -> list[nn.Parameter]:
        """Return the parameters that learn: all but the teacher's."""
        return [parameter for parameter in self.parameters() if parameter.requires_grad]

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
