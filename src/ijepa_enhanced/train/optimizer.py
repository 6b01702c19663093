"""AdamW and everything that changes with the step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import nn

from ijepa_enhanced.schedules import cosine, linear, warmup_cosine


@dataclass(frozen=True)
class OptimConfig:
    """The optimizer and its schedules; every schedule is a function of the step and of the run's fixed length."""

    lr: float = 1e-3
    """Peak learning rate (the original's, arXiv 2301.08243 appendix A.1 and this project's predecessor agree)."""
    final_lr: float = 1e-6
    """Learning rate at the last step, reached on half a cosine."""
    warmup: float = 0.05
    """Fraction of all steps over which the learning rate rises."""
    weight_decay: float = 0.04
    """Decoupled weight decay at the first step, on matrices only."""
    final_weight_decay: float = 0.4
    """Weight decay at the last step (arXiv 2301.08243, appendix A.1), reached on half a cosine as in the paper's code;
    its text has a straight line."""
    ema: float = 0.996
    """Teacher's momentum at the first step."""
    final_ema: float = 1.0
    """Teacher's momentum at the last step, reached on a straight line (arXiv 2301.08243, appendix A.1)."""
    clip: float = 1.0
    """Largest norm of all gradients together; larger ones are scaled down to it."""

    def __post_init__(self) -> None:
        for name in ("lr", "clip"):
            if not getattr(self, name) > 0:
                raise ValueError(f"optim.{name} must be above 0, not {getattr(self, name)}.")
        for name in ("final_lr", "weight_decay", "final_weight_decay"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"optim.{name} must be at least 0, not {getattr(self, name)}.")
        for name in ("warmup", "ema", "final_ema"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"optim.{name} must lie between 0 and 1, not {getattr(self, name)}.")


class StepSettings(NamedTuple):
    """What the schedules say for one step."""

    lr: float
    weight_decay: float
    ema: float


def step_settings(config: OptimConfig, step: int, total: int) -> StepSettings:
    """Learning rate, weight decay and EMA momentum of `step` (from 0) of `total`."""
    return StepSettings(
        warmup_cosine(step, total, round(config.warmup * total), config.lr, config.final_lr),
        cosine(step, total, config.weight_decay, config.final_weight_decay),
        linear(step, total, config.ema, config.final_ema),
    )


def make_optimizer(model: nn.Module) -> torch.optim.AdamW:
    """AdamW (arXiv 1711.05101) on all parameters that learn: matrices decay; biases, norms and tokens do not.

    Decoupled decay matters: with Adam's coupled decay I-JEPA collapses. Learning rate and decay are set each step.
    """
    learned = [(name, value) for name, value in model.named_parameters() if value.requires_grad]
    fixed = {
        name
        for name, value in learned
        if value.ndim < 2 or name.endswith(("mask_token", "positions.rows", "positions.cols"))
    }
    groups = [
        {"params": [value for name, value in learned if name not in fixed], "decay": True},
        {"params": [value for name, value in learned if name in fixed], "decay": False},
    ]
    return torch.optim.AdamW(groups, lr=0.0, weight_decay=0.0, fused=True)


def set_step(optimizer: torch.optim.Optimizer, settings: StepSettings) -> None:
    """Give every group its learning rate and weight decay."""
    for group in optimizer.param_groups:
        group["lr"] = settings.lr
        group["weight_decay"] = settings.weight_decay if group["decay"] else 0.0
