"""Configuration of a training run."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

from ijepa_enhanced.data.config import AugmentConfig, DataConfig
from ijepa_enhanced.masks import MaskConfig
from ijepa_enhanced.models.config import EncoderConfig, MergeConfig, PredictorConfig
from ijepa_enhanced.objective import ObjectiveConfig

Parallel = Literal["ddp", "fsdp"]


@dataclass(frozen=True)
class OptimConfig:
    """The optimizer and its schedules, which depend only on the step and on the length of the run."""

    lr: float = 1e-3
    """Peak learning rate (I-JEPA, arXiv 2301.08243, appendix A.1). It is not scaled with the batch size."""
    final_lr: float = 1e-6
    """Learning rate at the last step, reached by cosine decay."""
    warmup: float = 0.05
    """Fraction of all steps used for linear warmup."""
    weight_decay: float = 0.04
    """Weight decay of AdamW at the first step. Biases, norms, the mask token and positions are not decayed."""
    final_weight_decay: float = 0.4
    """Weight decay at the last step (arXiv 2301.08243, appendix A.1), reached by a cosine schedule as in I-JEPA's code.
    The paper describes a linear schedule."""
    ema: float = 0.996
    """EMA momentum of the teacher at the first step."""
    final_ema: float = 1.0
    """EMA momentum at the last step, reached by a linear schedule (arXiv 2301.08243, appendix A.1)."""
    clip: float = 1.0
    """Maximum global gradient norm. Larger gradients are scaled down to it."""

    def __post_init__(self) -> None:
        # `not x > 0` instead of `x <= 0`, so that NaN is refused too.
        for name in ("lr", "clip"):
            if not getattr(self, name) > 0:
                raise ValueError(f"optim.{name} must be above 0, not {getattr(self, name)}.")
        for name in ("final_lr", "weight_decay", "final_weight_decay"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"optim.{name} must be at least 0, not {getattr(self, name)}.")
        for name in ("lr", "final_lr", "weight_decay", "final_weight_decay"):  # clip may be inf: no clipping
            if math.isinf(getattr(self, name)):
                raise ValueError(f"optim.{name} must be finite, not {getattr(self, name)}.")
        for name in ("warmup", "ema", "final_ema"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"optim.{name} must be between 0 and 1, not {getattr(self, name)}.")


@dataclass(frozen=True)
class MonitorConfig:
    """Monitoring of the teacher during training, to detect collapse and to keep the best encoder."""

    every: int | None = None
    """Number of steps between checks of the teacher, which detect collapse on a fixed set of training images. The last
    step is always checked. 0: no checks. null: at most 100 checks, which take at most 3% of the run's compute."""
    images: int | None = None
    """Number of training images that each check uses. null: 20 per class, but at least 512 and at most 4,096. If the
    images have labels, each check computes a kNN accuracy with 20 neighbors. The standard error of this accuracy is at
    most 0.5 / sqrt(images). With fewer than 20 images per class, the accuracy may not rise although the encoder
    improves (docs/log.md)."""

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
    init: str | None = None
    """Encoder that the student and the teacher start from: a run, an encoder folder, or released weights
    (docs/weights.md). It determines the architecture, so that options of the encoder have no effect."""
    teacher: str | None = None
    """Encoder whose features are predicted, instead of a moving average of the student (EMA). It does not change
    (SALT, arXiv 2509.24317). The student sees patches of its own size on the same patch grid."""
    steps: int | None = None
    """Number of optimizer steps. null: train for `epochs` instead."""
    epochs: float = 100.0
    """Number of passes over the images. It is used only if `steps` is null."""
    seed: int = 0
    """Random seed for initial weights, image order, crops and masks."""
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    """Precision of matrix multiplications. Weights and the residual stream stay float32. auto: bf16 if the hardware
    supports it, otherwise fp32."""
    compile: bool = False
    """Compile preprocessing, the student, the teacher and the predictor with `torch.compile`."""
    activation_checkpointing: bool = False
    """Recompute the student's activations in the backward pass. This saves memory and takes more time
    (docs/measurements.md)."""
    parallel: Parallel = "ddp"
    """How the processes of `torchrun` share the networks. ddp: each has all weights. fsdp: each has a part of weights,
    gradients and moments. Use it for networks that do not fit on one GPU; it communicates more (docs/scaling.md). With
    several machines, each machine has all parts."""
    checkpoint_every: int = 1000
    """Number of steps between checkpoints."""
    log_every: int = 10
    """Number of steps between log lines. Each check by the monitor adds a log line (see monitor.every)."""

    def __post_init__(self) -> None:
        for name in ("checkpoint_every", "log_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}.")
        if self.steps is not None and self.steps < 1:
            raise ValueError(f"steps must be at least 1, not {self.steps}.")
        unmasked = {name: getattr(self.data, name) for name in ("global_views", "local_views")}
        if self.objective.contrastive_weight and self.data.masked_views + sum(unmasked.values()) < 2:
            raise ValueError(
                "objective.contrastive_weight > 0 needs at least two views per image. Set data.masked_views to 2, or "
                "set data.global_views or data.local_views above 0."
            )
        for name, count in unmasked.items():
            if count and not self.objective.contrastive_weight:
                raise ValueError(
                    f"data.{name} has no effect unless objective.contrastive_weight > 0. Set data.{name} to 0, or set "
                    "objective.contrastive_weight above 0."
                )
        recoloring = [f"augment.{name}" for name in ("gray", "solarize") if getattr(self.augment, name)]
        if self.data.channels != 3 and recoloring:
            raise ValueError(
                f"{' and '.join(recoloring)} {'change' if len(recoloring) > 1 else 'changes'} red, green and blue, but "
                f"data.channels is {self.data.channels}. Set {'both' if len(recoloring) > 1 else 'it'} to 0."
            )
        if self.teacher is not None and not self.objective.prediction_weight:
            raise ValueError(
                "teacher has no effect unless objective.prediction_weight > 0. Set objective.prediction_weight."
            )
        if self.compile and self.parallel == "fsdp":
            raise ValueError(
                "compile cannot be combined with parallel = fsdp. Set compile to false, or parallel to ddp."
            )
        if not self.epochs > 0:
            raise ValueError(f"epochs must be above 0, not {self.epochs}.")
        if math.isinf(self.epochs):
            raise ValueError(f"epochs must be finite, not {self.epochs}.")
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"seed must be at least 0 and below 2**63, not {self.seed}.")
