"""AdamW and everything that changes with the step."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import nn

from ijepa_enhanced.schedules import cosine, linear, warmup_cosine
from ijepa_enhanced.train.config import OptimConfig


class StepSettings(NamedTuple):
    """What the schedules say for one step."""

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


def make_optimizer(model: nn.Module) -> torch.optim.AdamW:
    """Return AdamW (arXiv 1711.05101) for all trainable parameters: matrices decay; biases, norms and tokens do not.

    Decoupled decay matters: with Adam's coupled decay I-JEPA collapses. Learning rate and decay are set each step.
    """
    trainable = [(name, value) for name, value in model.named_parameters() if value.requires_grad]
    fixed = {
        name
        for name, value in trainable
        if value.ndim < 2 or name.endswith(("mask_token", "positions.rows", "positions.cols"))
    }
    groups = [
        {"params": [value for name, value in trainable if name not in fixed], "decay": True},
        {"params": [value for name, value in trainable if name in fixed], "decay": False},
    ]
    return torch.optim.AdamW(groups, lr=0.0, weight_decay=0.0, fused=True)


def set_step(optimizer: torch.optim.Optimizer, settings: StepSettings) -> None:
    """Give every group its learning rate and weight decay."""
    for group in optimizer.param_groups:
        group["lr"] = settings.lr
        group["weight_decay"] = settings.weight_decay if group["decay"] else 0.0
