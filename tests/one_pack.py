"""The loss of one pack, as `train.step.train_step` computes it, without the optimizer; and colors for its views."""

import torch

from ijepa_enhanced.batch import Colors, MaskedBatch
from ijepa_enhanced.jepa import JEPA, Losses, StepSize


def make_colors(views: int) -> Colors:
    """Other colors for each view; every second one is solarized."""
    noise = torch.randn(views, 3, 4, generator=torch.Generator().manual_seed(views))
    return Colors(torch.eye(3, 4) + 0.1 * noise, torch.arange(views) % 2 == 0)


def pack_losses(model: JEPA, batch: MaskedBatch, target_tokens: int, packs: int = 1) -> Losses:
    """A pack's share of the loss of a step that has so many target tokens and packs."""
    losses: Losses = model(batch, StepSize(target_tokens, packs))
    return losses
