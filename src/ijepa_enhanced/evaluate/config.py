"""What users set about evaluation."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class FinetuneConfig:
    """Fine-tuning. Epochs, decays, warm-up and drop path are MAE's for ViT-B (arXiv 2111.06377, table 9)."""

    epochs: int = 100
    """Passes over the training images."""
    lr: float = 5e-4
    """Peak learning rate of the last layer. A step is one pack, so it does not scale with a batch."""
    layer_decay: float = 0.75
    """Learning rate of a layer, divided by that of the layer above it (BEiT, arXiv 2106.08254, appendix H)."""
    weight_decay: float = 0.05
    """Decoupled, on matrices only."""
    warmup: float = 0.05
    """Fraction of all steps over which the learning rate rises."""
    drop_path: float = 0.1
    """Chance that a view skips half of the last block; that of earlier blocks rises to it on a straight line from 0
    (stochastic depth, arXiv 1603.09382)."""
    min_crop: float = 0.3
    """Smallest area of the random crop, as a fraction of the image."""
    flip: float = 0.5
    """Chance that a crop is mirrored left to right."""

    def __post_init__(self) -> None:
        for name in ("epochs", "lr"):
            if not getattr(self, name) > 0:
                raise ValueError(f"finetune.{name} must be above 0, not {getattr(self, name)}.")
        if not self.weight_decay >= 0:
            raise ValueError(f"finetune.weight_decay must be at least 0, not {self.weight_decay}.")
        for name in ("layer_decay", "min_crop"):
            if not 0 < getattr(self, name) <= 1:
                raise ValueError(f"finetune.{name} must be above 0 and at most 1, not {getattr(self, name)}.")
        if not 0 <= self.drop_path < 1:
            raise ValueError(f"finetune.drop_path must be at least 0 and below 1, not {self.drop_path}.")
        for name in ("warmup", "flip"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"finetune.{name} must lie between 0 and 1, not {getattr(self, name)}.")
