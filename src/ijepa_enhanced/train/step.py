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
    """Train on this rank's packs of one step; a rank without any still takes part in the sum of gradients.

    Args:
        model, optimizer: as `make_optimizer` pairs them.
        batches: packs on the host.
        size: of the whole step, over all ranks.
        settings: what the schedules say for this step.
        clip: largest norm of all gradients together; larger ones are scaled down to it.
        autocast: the precision of matrix products.
        ranks: the processes that share the step.
    """
    set_step(optimizer, settings)
    losses = []
    for batch in batches:
        with autocast:
            batch = model.preprocess(batch.to(ranks.device, non_blocking=True))
            targets = model.targets(batch)  # [Tq, D] from the teacher, no gradient
            features = model.features(batch)  # [Ts, D] from the student: contexts, then unmasked views
            predicted = model.predict(features, batch)  # [Tq, D]
            loss = model.losses(predicted, targets, features, batch, size)
        # A pack of one image has neither variance nor contrast: without prediction it has no loss.
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
    """What a step leaves to be logged; nothing of it has been read from the device."""

    losses: list[Losses]
    """Of each pack of this rank."""
    grad_norm: Tensor
    """Norm of all gradients together, before clipping."""
