"""AdamW, and the settings that change with the step."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import nn

from ijepa_enhanced.jepa import JEPA
from ijepa_enhanced.schedules import cosine, linear, warmup_cosine
from ijepa_enhanced.train.config import OptimConfig


class StepSettings(NamedTuple):
    """Values of the schedules at one step."""

    lr: float
    weight_decay: float
    ema: float


def step_settings(config: OptimConfig, step: int, total: int) -> StepSettings:
    """Return learning rate, weight decay and EMA momentum of `step` (from 0) of `total`."""
    return StepSettings(
        warmup_cosine(step, total, round(config.warmup * total), config.lr, config.final_lr),
        cosine(step, total, config.weight_decay, config.final_weight_decay),
        linear(step, total, config.ema, config.final_ema),
    )


def make_optimizer(model: JEPA) -> torch.optim.AdamW:
    """Return AdamW (arXiv 1711.05101) for all trainable parameters.

    Weight decay applies to matrices, and not to biases, norms, positions, the mask token, class tokens and registers.
    It must be decoupled: with Adam's coupled decay, I-JEPA collapses.
    """
    groups: dict[bool, list[nn.Parameter]] = {True: [], False: []}
    for name, value in model.named_parameters():
        if value.requires_grad:
            decays = value.ndim >= 2 and not name.endswith(("mask_token", "prefix")) and "positions." not in name
            groups[decays].append(value)
    # `set_step` sets learning rate and decay before each step.
    return torch.optim.AdamW(
        [{"params": values, "decay": decays} for decays, values in groups.items()], lr=0.0, weight_decay=0.0, fused=True
    )


def set_step(optimizer: torch.optim.Optimizer, settings: StepSettings) -> None:
    """Set the learning rate and weight decay of every parameter group."""
    for group in optimizer.param_groups:
        group["lr"] = settings.lr
        group["weight_decay"] = settings.weight_decay if group["decay"] else 0.0
