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
    frozen: bool = False
    """Whether the student does not change in this step."""


def step_settings(config: OptimConfig, step: int, total: int) -> StepSettings:
    """Return learning rate, weight decay and EMA momentum of `step` (from 0) of `total`, and whether it is frozen."""
    return StepSettings(
        warmup_cosine(step, total, round(config.warmup * total), config.lr, config.final_lr),
        cosine(step, total, config.weight_decay, config.final_weight_decay),
        linear(step, total, config.ema, config.final_ema),
        step < round(config.freeze * total),
    )


def make_optimizer(model: JEPA, layer_decay: float = 1.0) -> torch.optim.AdamW:
    """Return AdamW (arXiv 1711.05101) for all trainable parameters.

    Weight decay applies to matrices, and not to biases, norms, positions, the mask token, class tokens and registers.
    It must be decoupled: with Adam's coupled decay, I-JEPA collapses.

    Args:
        model: the networks.
        layer_decay: see `OptimConfig`.
    """
    groups: dict[tuple[bool, bool, float], list[nn.Parameter]] = {}
    for name, value in model.named_parameters():
        if not value.requires_grad:
            continue
        decays = value.ndim >= 2 and not name.endswith(("mask_token", "prefix")) and "positions." not in name
        depth = model.student.config.depth
        student = name.startswith("student.")
        scale = layer_decay ** (depth - block_of(name, depth)) if student else 1.0
        groups.setdefault((decays, student, scale), []).append(value)
    # `set_step` sets learning rate and decay before each step.
    return torch.optim.AdamW(
        [
            {"params": values, "decay": decays, "student": student, "scale": scale}
            for (decays, student, scale), values in groups.items()
        ],
        lr=0.0,
        weight_decay=0.0,
        fused=True,
    )


def block_of(name: str, depth: int) -> int:
    """Return the number of a student's block that a parameter belongs to, from 1.

    0 is what comes before the blocks, such as the patch embedding, and `depth` also what comes after them.
    """
    part = name.removeprefix("student.").split(".")
    if part[0] != "blocks":
        return 0
    return int(part[2]) + 1 if part[1] == "layers" else depth


def set_step(optimizer: torch.optim.Optimizer, settings: StepSettings) -> None:
    """Set the learning rate and weight decay of every parameter group."""
    for group in optimizer.param_groups:
        rests = settings.frozen and group["student"]
        group["lr"] = 0.0 if rests else settings.lr * group["scale"]
        group["weight_decay"] = settings.weight_decay if group["decay"] else 0.0
