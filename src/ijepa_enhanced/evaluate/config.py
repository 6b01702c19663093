"""What users set about evaluation."""

from __future__ import annotations

from dataclasses import dataclass

from ijepa_enhanced.errors import PlanError


@dataclass(frozen=True)
class FinetuneConfig:
    """Fine-tuning. Epochs, decays, warm-up and drop path are MAE's for ViT-B (arXiv 2111.06377, table 9)."""

    epochs: int = 100
    """Number of passes over the training images."""
    lr: float = 5e-4
    """Peak learning rate of the classification head. It is not scaled with the batch size."""
    packs_per_step: int = 1
    """Number of packs per optimizer step, summed over all processes. A process with several packs accumulates
    gradients."""
    layer_decay: float = 0.75
    """Layer-wise learning rate decay: each layer has this fraction of the learning rate of the next layer (BEiT,
    arXiv 2106.08254, appendix H)."""
    weight_decay: float = 0.05
    """Weight decay of AdamW. Biases, norms and positions are not decayed."""
    warmup: float = 0.05
    """Fraction of all steps used for linear warmup."""
    drop_path: float = 0.1
    """Drop path rate of the last block (stochastic depth, arXiv 1603.09382). The rate grows linearly with depth. The
    attention and the MLP of a block are dropped independently for each image."""
    min_crop: float = 0.3
    """Minimum area of the random crop, as a fraction of the image."""
    flip: float = 0.5
    """Probability of a horizontal flip."""

    def __post_init__(self) -> None:
        if self.packs_per_step < 1:
            raise ValueError(f"finetune.packs_per_step must be at least 1, not {self.packs_per_step}.")
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
                raise ValueError(f"finetune.{name} must be between 0 and 1, not {getattr(self, name)}.")

    def share(self, world: int) -> int:
        """Return how many packs of a step each of `world` ranks processes.

        Raises:
            PlanError: the ranks cannot share the packs evenly.
        """
        share, rest = divmod(self.packs_per_step, world)
        if rest:
            raise PlanError(
                f"finetune.packs_per_step ({self.packs_per_step}) must be a multiple of the number of processes "
                f"({world}), for example {world}."
            )
        return share
