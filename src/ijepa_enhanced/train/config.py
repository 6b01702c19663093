"""Configuration of a training run."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from ijepa_enhanced.data.config import AugmentConfig, DataConfig
from ijepa_enhanced.masks import MaskConfig
from ijepa_enhanced.models.config import EncoderConfig, MergeConfig, PredictorConfig
from ijepa_enhanced.objective import ObjectiveConfig


@dataclass(frozen=True)
class OptimConfig:
    """The optimizer and its schedules, which depend only on the step and on the length of the run."""

    lr: float = 1e-3
    """Peak learning rate (I-JEPA, arXiv 2301.08243, appendix A.1)."""
    final_lr: float = 1e-6
    """Learning rate at the last step; it falls along half a cosine."""
    warmup: float = 0.05
    """Fraction of all steps over which the learning rate rises."""
    weight_decay: float = 0.04
    """Weight decay at the first step. It is decoupled from the gradient and applies to matrices only."""
    final_weight_decay: float = 0.4
    """Weight decay at the last step (arXiv 2301.08243, appendix A.1). It changes along half a cosine, as in the paper's
    code; the paper's text says linearly."""
    ema: float = 0.996
    """Momentum of the teacher's moving average at the first step."""
    final_ema: float = 1.0
    """Momentum at the last step; it changes linearly (arXiv 2301.08243, appendix A.1)."""
    clip: float = 1.0
    """Largest norm of all gradients together; larger gradients are scaled down to it."""

    def __post_init__(self) -> None:
        # `not x > 0` instead of `x <= 0`, so that NaN is refused too.
        for name in ("lr", "clip"):
            if not getattr(self, name) > 0:
                raise ValueError(f"optim.{name} must be above 0, not {getattr(self, name)}.")
        for name in ("final_lr", "weight_decay", "final_weight_decay"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"optim.{name} must be at least 0, not {getattr(self, name)}.")
        for name in ("warmup", "ema", "final_ema"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"optim.{name} must lie between 0 and 1, not {getattr(self, name)}.")


@dataclass(frozen=True)
class MonitorConfig:
    """Monitoring of the teacher during training, to detect collapse and to keep the best encoder."""

    every: int | None = None
    """Steps between probes of the teacher; the last step is always probed. 0: never. Null: as often as 3% of the run's
    computing allows, at most 100 times."""
    images: int | None = None
    """Training images in the probe set. The kNN accuracy on them has a standard error of at most 0.5 / sqrt(images).
    Null: 512, or 20 of each class if that is more, and at most 4,096. With fewer images of each class than the 20
    neighbors that vote, the probe can miss what a run learns (docs/log.md)."""

    def __post_init__(self) -> None:
        if self.every is not None and self.every < 0:
            raise ValueError(f"monitor.every must be null or at least 0, not {self.every}.")
        if self.images is not None and self.images < 2:
            raise ValueError(f"monitor.images must be at least 2, not {self.images}.")


@dataclass(frozen=True)
class TrainConfig:
    """Everything that defines a training run."""

    data: DataConfig = field(default_factory=DataConfig)
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    masks: MaskConfig = field(default_factory=MaskConfig)
    encoder: EncoderConfig = field(default_factory=EncoderConfig)
    merging: MergeConfig = field(default_factory=MergeConfig)
    predictor: PredictorConfig = field(default_factory=PredictorConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    monitor: MonitorConfig = field(default_factory=MonitorConfig)
    steps: int | None = None
    """Optimizer steps of the run. Null: as many as `epochs` take."""
    epochs: float = 100.0
    """Passes over the images, if `steps` is null."""
    seed: int = 0
    """Seed of the weights, the order and crops of images, and the masks."""
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    """Precision of matrix products; weights and sums stay float32. auto: bf16 on hardware that has it, else fp32."""
    compile: bool = False
    """Compile student, teacher and predictor with `torch.compile`."""
    activation_checkpointing: bool = False
    """Recompute the student's blocks in the backward pass: less memory, more time (docs/log.md)."""
    checkpoint_every: int = 1000
    """Steps between checkpoints."""
    log_every: int = 10
    """Steps between lines of the log; each probe of the monitor adds one."""

    def __post_init__(self) -> None:
        for name in ("checkpoint_every", "log_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}.")
        if self.steps is not None and self.steps < 1:
            raise ValueError(f"steps must be at least 1, not {self.steps}.")
        unmasked = {name: getattr(self.data, name) for name in ("global_views", "local_views")}
        if self.objective.contrastive_weight and self.data.masked_views + sum(unmasked.values()) < 2:
            raise ValueError(
                "objective.contrastive_weight > 0 needs two views of each image: set data.masked_views to 2, or "
                "data.global_views or data.local_views above 0."
            )
        for name, count in unmasked.items():
            if count and not self.objective.contrastive_weight:
                raise ValueError(f"data.{name} only has an effect when objective.contrastive_weight > 0.")
        if not self.epochs > 0:
            raise ValueError(f"epochs must be above 0, not {self.epochs}.")
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"seed must lie between 0 and 2**63, not {self.seed}.")
