"""The objective on one page: I-JEPA (arXiv 2301.08243) on a packed stream."""

from __future__ import annotations

import copy
import dataclasses
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ijepa_enhanced.batch import MaskedBatch
from ijepa_enhanced.encoder import Encoder
from ijepa_enhanced.losses import nt_xent, variance_covariance
from ijepa_enhanced.models.config import Architecture, PredictorConfig
from ijepa_enhanced.models.predictor import Predictor
from ijepa_enhanced.models.preprocessing import Preprocessing
from ijepa_enhanced.models.vit import VisionTransformer
from ijepa_enhanced.objective import ObjectiveConfig
from ijepa_enhanced.ops.linear import Linear
from ijepa_enhanced.ops.preprocess import Convert, Normalize
from ijepa_enhanced.packed import Packed

PROJECTOR_HIDDEN, PROJECTED = 512, 64
"""Widths of the projector's hidden layer and of its output, the only ones measured (docs/log.md)."""


class Losses(NamedTuple):
    """One pack's share of the loss of a step: float32 scalars. The terms are detached and not weighted."""

    total: Tensor
    """The weighted sum of the terms, to be differentiated."""
    prediction: Tensor
    vicreg: Tensor
    contrastive: Tensor


class StepSize(NamedTuple):
    """Size of a whole step, over all ranks: a pack's loss is its share of the loss of the step."""

    target_tokens: int
    packs: int


class JEPA(nn.Module):
    """Student, teacher and predictor, and the loss between them: `forward` is the objective in five lines.

    Args:
        encoder: architecture of the student, and of the teacher unless one is given.
        predictor: size of the predictor.
        objective: weights of the loss.
        views: masked views of each image, which follow each other in a pack.
        preprocessing: of the student. None: ImageNet's statistics, and the mean of the patches as feature.
        teacher: a trained encoder, on the device of training, that stays as it is. It is not part of the state
            dictionary. None: the teacher starts as a copy of the student and follows it as a moving average.
    """

    def __init__(
        self,
        encoder: Architecture,
        predictor: PredictorConfig,
        objective: ObjectiveConfig,
        views: int = 1,
        preprocessing: Preprocessing | None = None,
        teacher: Encoder | None = None,
    ) -> None:
        super().__init__()
        own = preprocessing or Preprocessing()
        self.objective = objective
        self.views = views
        self.pooling = own.pooling
        self.normalize = Normalize(own.mean, own.std, encoder.patch_size)
        self.student = VisionTransformer(encoder)
        self.frozen = teacher is not None
        self.to_teacher: Convert | None = None
        self.teacher: VisionTransformer
        if teacher is None:
            self.teacher = copy.deepcopy(self.student)
        else:
            object.__setattr__(self, "teacher", teacher.network)  # not a submodule, which checkpoints would contain
            theirs, sizes = teacher.preprocessing, (encoder.patch_size, teacher.config.patch_size)
            self.to_teacher = Convert((own.mean, own.std), (theirs.mean, theirs.std), sizes)
        self.teacher.requires_grad_(False)
        width = self.student.width
        # A term of weight 0 gets no network.
        self.predictor = (
            Predictor(predictor, width, self.teacher.width, encoder.position_grid)
            if objective.prediction_weight
            else None
        )
        self.projector = projector(width) if objective.contrastive_weight else None

    def start_from(self, network: VisionTransformer) -> None:
        """Copy the weights of a network like the student into the student, and into the teacher if it follows it."""
        self.student.load_state_dict(network.state_dict())
        if not self.frozen:
            self.teacher.load_state_dict(network.state_dict())

    def forward(self, batch: MaskedBatch, step: StepSize) -> Losses:
        """Return one pack's share of the loss of a step.

        Args:
            batch: the pack, on the device of the networks. It may have no views.
            step: size of the whole step.
        """
        batch = self.preprocess(batch)
        targets = self.targets(batch)  # [Tq, D] from the teacher, no gradient
        features = self.features(batch)  # [Ts, D] from the student: contexts, then unmasked views
        predicted = self.predict(features, batch)  # [Tq, D]
        return self.losses(predicted, targets, features, batch, step)

    def preprocess(self, batch: MaskedBatch) -> MaskedBatch:
        """Return a batch with recolored, normalized patches instead of uint8 ones."""
        unmasked = None if batch.unmasked is None else self.normalize(batch.unmasked, batch.unmasked_colors)
        return dataclasses.replace(batch, packed=self.normalize(batch.packed, batch.colors), unmasked=unmasked)

    @torch.no_grad()
    def targets(self, batch: MaskedBatch) -> Tensor | None:
        """Return the prediction targets: the teacher's features of the target tokens, after a LayerNorm, [Tq, D].

        Return None, and do not run the teacher, if the prediction loss has weight 0.
        """
        if self.predictor is None:
            return None
        packed = batch.packed if self.to_teacher is None else self.to_teacher(batch.packed)
        features = self.teacher(packed, batch.merge_plan)  # [T, D]: the teacher sees all tokens of masked views
        # A LayerNorm without weights, in float32 under autocast too.
        return F.layer_norm(features[batch.targets.index].float(), features.shape[-1:])

    def features(self, batch: MaskedBatch) -> Tensor:
        """Return the student's features [Ts, D]: of the context of each masked view, then of each unmasked view."""
        seen = batch.packed.select(batch.context)
        if batch.unmasked is not None:
            seen = Packed.concatenate([seen, batch.unmasked], batch.seen)
        features: Tensor = self.student(seen, batch.seen_merge_plan)
        return features

    def predict(self, features: Tensor, batch: MaskedBatch) -> Tensor | None:
        """Return the prediction [Tq, D] of `targets` from the student's `features`; None if the loss has weight 0."""
        if self.predictor is None:
            return None
        context, hidden = batch.packed.select(batch.context), batch.packed.select(batch.targets)
        # Contexts come first in the student's stream; unmasked views, which come after them, predict nothing.
        features = features[: len(context.positions)]
        if batch.in_context is not None:  # a class token and registers have no place that a prediction could refer to
            context, features = context.select(batch.in_context), features[batch.in_context.index]
        predicted: Tensor = self.predictor(features, context, hidden)
        return predicted

    def losses(
        self, predicted: Tensor | None, targets: Tensor | None, features: Tensor, batch: MaskedBatch, step: StepSize
    ) -> Losses:
        """Return one pack's share of the loss of a step. The shares of all packs add up to the loss of the step.

        The prediction loss is a mean over the target tokens of the whole step. The other terms are means over its
        packs. So the loss does not depend on how packs are divided into ranks and accumulation.

        Every trainable parameter gets a gradient, which may be zero. Ranks sum their gradients during the backward
        pass, so all ranks need gradients of the same parameters, whatever images their packs have.

        Args:
            predicted: [Tq, D], from `predict`.
            targets: [Tq, D], from `targets`.
            features: [Ts, D], from `features`.
            batch: the pack.
            step: size of the whole step.
        """
        weights = self.objective
        # [masked views, then unmasked views, D]
        pooled = self.student.pool(features, batch.seen.cu_seqlens, self.pooling)
        prediction = vicreg = contrastive = 0.0 * pooled.sum()
        if predicted is not None and targets is not None:
            # Smooth L1, as in I-JEPA's code; its paper says L2.
            distance = F.smooth_l1_loss(predicted.float(), targets, reduction="sum")
            prediction = distance / targets.shape[1] / step.target_tokens
        masked = len(batch.image_ids)
        images = masked // self.views
        # A single view has no variance, and a single image has no negatives.
        if weights.vicreg_weight and masked > 1:
            vicreg = variance_covariance(pooled[:masked]) / step.packs
        if self.projector is not None and images < 2:
            contrastive = 0.0 * self.projector(pooled.new_zeros(2, pooled.shape[1])).sum()  # BatchNorm needs two rows
        elif self.projector is not None:
            projected = self.projector(pooled)
            # [images, views of an image, K]: the masked views of each image, then its unmasked ones.
            views = [part.unflatten(0, (images, -1)) for part in projected.tensor_split([masked]) if len(part)]
            contrastive = nt_xent(torch.cat(views, dim=1)) / step.packs
        total = (
            weights.prediction_weight * prediction
            + weights.vicreg_weight * vicreg
            + weights.contrastive_weight * contrastive
        )
        return Losses(total, prediction.detach(), vicreg.detach(), contrastive.detach())

    def trainable(self) -> list[nn.Parameter]:
        """Return the parameters to optimize: all but the teacher's."""
        return [parameter for parameter in self.parameters() if parameter.requires_grad]

    @torch.no_grad()
    def update_teacher(self, momentum: float) -> None:
        """Update the moving average: teacher = momentum * teacher + (1 - momentum) * student. A frozen one stays."""
        if self.frozen:
            return
        # A few kernels for all parameters, instead of one for each.
        torch._foreach_lerp_(list(self.teacher.parameters()), list(self.student.parameters()), 1.0 - momentum)


def projector(width: int) -> nn.Sequential:
    """Return the network [V, D] -> [V, K] whose output the contrastive loss compares.

    With it, the encoder need not discard what tells the views of an image apart (SimCLR, arXiv 2002.05709, section
    4.2, which uses one hidden layer too).
    """
    return nn.Sequential(
        Linear(width, PROJECTOR_HIDDEN),
        nn.BatchNorm1d(PROJECTOR_HIDDEN, track_running_stats=False),  # statistics of the pack; never used in inference
        nn.GELU(),
        Linear(PROJECTOR_HIDDEN, PROJECTED),
    )
