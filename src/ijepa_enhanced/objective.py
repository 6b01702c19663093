"""The configuration of the loss."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ObjectiveConfig:
    """The loss: a weighted sum of three terms. A term of weight 0 is not computed."""

    prediction_weight: float = 1.0
    """Weight of I-JEPA's prediction of hidden features. 0: neither the teacher nor the predictor runs."""
    vicreg_weight: float = 0.1
    """Weight of VICReg's variance and covariance on the mean of the student's context tokens. 0 is plain I-JEPA,
    under which the rank of small runs' features falls by more than half (docs/measurements.md)."""
    contrastive_weight: float = 0.0
    """Weight of the contrast between the views of an image and those of all others (`losses.nt_xent`), on a projection
    of the mean of what the student sees of each. It needs two views of each image, global and local views included."""

    def __post_init__(self) -> None:
        names = ("prediction_weight", "vicreg_weight", "contrastive_weight")
        for name in names:
            if not getattr(self, name) >= 0:
                raise ValueError(f"objective.{name} must be at least 0, not {getattr(self, name)}.")
        if not any(getattr(self, name) for name in names):
            raise ValueError(
                f"There is no loss: set one of {', '.join(f'objective.{name}' for name in names)} above 0."
            )
