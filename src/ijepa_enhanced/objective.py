"""The configuration of the loss."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class ObjectiveConfig:
    """The loss: a weighted sum of three terms. A term of weight 0 is not computed."""

    prediction_weight: float = 1.0
    """Weight of I-JEPA's prediction loss. With 0, training runs neither the teacher nor the predictor."""
    vicreg_weight: float = 0.1
    """Weight of VICReg's variance and covariance terms, which prevent collapse. They are computed on the mean of the
    student's context tokens. 0: plain I-JEPA. In small runs, the features of plain I-JEPA collapsed to fewer dimensions
    (docs/measurements.md)."""
    contrastive_weight: float = 0.0
    """Weight of the contrastive loss (NT-Xent, SimCLR) between the views of an image. It is computed on a projection of
    the student's features, averaged over each view. It needs at least two masked, global or local views per image."""

    def __post_init__(self) -> None:
        names = ("prediction_weight", "vicreg_weight", "contrastive_weight")
        for name in names:
            if not getattr(self, name) >= 0:
                raise ValueError(f"objective.{name} must be at least 0, not {getattr(self, name)}.")
            if math.isinf(getattr(self, name)):
                raise ValueError(f"objective.{name} must be finite, not {getattr(self, name)}.")
        if not any(getattr(self, name) for name in names):
            raise ValueError(
                f"No loss is enabled. Set one of {', '.join(f'objective.{name}' for name in names)} above 0."
            )
