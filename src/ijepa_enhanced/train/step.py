"""One optimizer step of I-JEPA (arXiv 2301.08243, section 3)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ijepa_enhanced.batch import MaskedBatch
from ijepa_enhanced.distributed import Ranks
from ijepa_enhanced.jepa import JEPA, Losses, StepSize
from ijepa_enhanced.train.optimizer import StepSettings, set_step


def train_step(
    model: JEPA,
    optimizer: torch.optim.Optimizer,
    batches: Sequence[MaskedBatch],
    size: StepSize,
    settings: StepSettings,
    clip: float,
    autocast: torch.autocast,
    ranks: Ranks,
) -> StepResult:
    """Run one optimizer step on this rank's packs. A rank without packs still takes part in the sum of gradients.

    Args:
        model: student, teacher and predictor.
        optimizer: of the model, from `make_optimizer`.
        batches: packs on the host.
        size: of the whole step, over all ranks.
        settings: values of the schedules at this step.
        clip: largest norm of all gradients together. Larger gradients are scaled down to it.
        autocast: precision of matrix products.
        ranks: the processes that share the step.
    """
    set_step(optimizer, settings)
    losses = []
    for batch in batches:  # their gradients add up: each loss is a share of the loss of the step
        with autocast:
            batch = model.preprocess(batch.to(ranks.device, non_blocking=True))
            targets = model.targets(batch)  # [Tq, D] from the teacher, no gradient
            features = model.features(batch)  # [Ts, D] from the student: contexts, then unmasked views
            predicted = model.predict(features, batch)  # [Tq, D]
            loss = model.losses(predicted, targets, features, batch, size)
        # A pack of one view or image has no VICReg or contrastive loss, so without prediction it has no loss at all.
        if loss.total.requires_grad:
            loss.total.backward()
        losses.append(loss)
    trainable = model.trainable()
    ranks.sum_gradients(trainable)
    grad_norm = nn.utils.clip_grad_norm_(trainable, clip)
    optimizer.step()
    optimizer.zero_grad()
    model.update_teacher(settings.ema)
    return StepResult(losses, grad_norm)


class StepResult(NamedTuple):
    """Results of a step, still on the device, so that the host does not wait for it."""

    losses: list[Losses]
    """The losses of each pack of this rank."""
    grad_norm: Tensor
    """Norm of all gradients together, before clipping."""
