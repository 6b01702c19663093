"""One optimizer step of I-JEPA (arXiv 2301.08243, section 3)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import nn

from ijepa_enhanced.batch import MaskedBatch
from ijepa_enhanced.devices import HostCopy
from ijepa_enhanced.jepa import JEPA, Losses, StepSize
from ijepa_enhanced.train.optimizer import StepSettings, set_step
from ijepa_enhanced.train.parallel import sync_gradients, whole_tensor


def train_step(
    model: JEPA,
    network: nn.Module,
    optimizer: torch.optim.Optimizer,
    batches: Sequence[MaskedBatch],
    size: StepSize,
    settings: StepSettings,
    clip: float,
    autocast: torch.autocast,
    device: torch.device,
) -> StepResult:
    """Run one optimizer step on this rank's packs. All ranks call this with the same number of packs.

    A step whose loss or gradient is not finite changes neither weights nor moments.

    Args:
        model: student, teacher and predictor.
        network: the module that computes the loss of a pack and sums gradients over ranks, from `parallelize`.
        optimizer: of the model, from `make_optimizer`.
        batches: packs on the host. A pack without readable images has a gradient of zero.
        size: of the whole step, over all ranks.
        settings: values of the schedules at this step.
        clip: largest norm of all gradients together. Larger gradients are scaled down to it.
        autocast: precision of matrix products.
        device: of this rank.
    """
    set_step(optimizer, settings)
    losses = []
    # Gradients add up, because each loss is a share of the loss of the step.
    for number, batch in enumerate(batches, start=1):
        sync_gradients(network, number == len(batches))
        with autocast:
            loss = network(batch.to(device, non_blocking=True), size)
        # The factor is 1 if the loss is finite, else NaN. NaN makes the gradients NaN too, on all ranks.
        loss.total.backward(0.0 * loss.total.detach() + 1.0)
        losses.append(loss)
    grad_norm = whole_tensor(nn.utils.clip_grad_norm_(model.trainable(), clip))
    # The fused optimizer reads this on the device and then skips the update, so the host does not wait.
    optimizer.found_inf = (~grad_norm.isfinite()).float()  # type: ignore[attr-defined]
    optimizer.step()
    optimizer.zero_grad()
    model.update_teacher(settings.ema)
    return StepResult(losses, HostCopy(grad_norm))


class StepResult(NamedTuple):
    """Results of a step, which the host does not wait for."""

    losses: list[Losses]
    """The losses of each pack of this rank, on the device."""
    grad_norm: HostCopy
    """Norm of all gradients together, before clipping. If it is not finite, the step was skipped."""
