"""What an encoder knows beside its network: how images become its input, and where its weights come from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from ijepa_enhanced.ops.preprocess import CHANNELS, IMAGENET_MEAN, IMAGENET_STD


@dataclass(frozen=True)
class Preprocessing:
    """How an image becomes the input of a network, and how its tokens become one feature."""

    resolution: int | None = None
    """Resolution that the network was trained at, sqrt(height * width) in pixels; if there were several, the largest.
    None: native size."""
    channels: int = CHANNELS
    """C, the number of channels of the images."""
    mean: tuple[float, ...] = IMAGENET_MEAN
    """Mean of each channel, for pixel values on [0, 1]."""
    std: tuple[float, ...] = IMAGENET_STD
    """Standard deviation of each channel, for pixel values on [0, 1]."""
    trained_grid: tuple[int, int] | None = None
    """Rows and columns of the longest grids of training. Longer grids are interpolated onto this size, because
    positions beyond it are untrained. None: no limit, as for fixed positions."""
    pooling: Literal["mean", "cls"] = "mean"
    """The feature of an image. mean: the mean of the features of its patches. cls: the feature of the class token."""

    def __post_init__(self) -> None:
        if not len(self.mean) == len(self.std) == self.channels:
            raise ValueError(
                f"mean and std must have {self.channels} values each, not {len(self.mean)} and {len(self.std)}."
            )
        if not all(value > 0 for value in self.std):
            raise ValueError(f"std must be above 0, not {self.std}.")
        if self.pooling not in ("mean", "cls"):
            raise ValueError(f"pooling must be mean or cls, not '{self.pooling}'.")


@dataclass(frozen=True)
class Origin:
    """The released weights that an encoder was imported from."""

    name: str
    """The Hub id, or the name of the file or folder."""
    layout: str
    """Who wrote them, such as `transformers dinov2`."""
    license: str | None = None
    """Identifier of their license, as in model cards. None: unknown."""
    encoder: Literal["target", "context"] | None = None
    """Which of the two encoders of I-JEPA it is. None: unknown, or the weights are not I-JEPA's."""


@dataclass(frozen=True)
class Record:
    """What is known of how an encoder was made and how good it is, for its model card."""

    training: dict[str, Any] | None = None
    """Facts of the run that trained it, by name; `train.record` makes them. None: unknown."""
    scores: dict[str, Any] | None = None
    """`protocol`: how it was scored, in words. `values`: scores as text, by name. `weights`: hash of the weights that
    were scored. None: unknown."""
    card: str | None = None
    """README.md, if somebody wrote or edited it. None: it is written from what is known."""
