"""The configuration of the data: which images, which views of them, and how views are changed and packed."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Literal

from ijepa_enhanced.masks import MIN_TOKENS

VIEW_SHARE = 8
"""By default a view has at most 1 / 8 of the tokens of a pack. Packs of fewer, larger views are harder to balance."""

LOCAL_SCALE = 2
"""Resolution of the other views, divided by that of local views. DINO uses 224 / 96 (arXiv 2104.14294)."""


@dataclass(frozen=True)
class DataConfig:
    """The training images, and how views are cropped, resized and packed."""

    source: str = "synthetic"
    """A folder of images, tar shards (`train-{000000..000002}.tar`), Parquet files (`train-*.parquet`), `hf://NAME`, a
    list (`.csv`, `.jsonl`), `synthetic`, or a weighted mixture (`photos@2 + train-*.tar@1`). See docs/data.md."""
    tokens_per_pack: int = 16384
    """Largest number of tokens in one forward pass of a device. Lower it if memory is short."""
    packs_per_step: int = 1
    """Packs of one optimizer step, over all ranks. A rank with several packs accumulates gradients."""
    masked_views: int = 1
    """Masked views of each image in an epoch. All views of an image are in the same pack."""
    global_views: int = 0
    """Additional views of each image that are not masked. Only the student receives them, and only the contrastive loss
    (objective.contrastive_weight) uses them."""
    local_views: int = 0
    """Additional small views of each image, which are used like global views. They show from 5% of the image's area up
    to `min_crop`, at half the resolution (multi-crop, SwAV, arXiv 2006.09882, section 3.2)."""
    min_resolution: int | None = 112
    """Smallest resolution of a view: sqrt(height * width) in pixels after resizing, which keeps the aspect ratio."""
    max_resolution: int | None = 224
    """Largest resolution of a view. The resolution, not the area, is uniform, as in NaViT (arXiv 2307.06304, section
    3.2). If both are null, crops keep their native size."""
    min_crop: float = 0.3
    """Smallest area of the random crop, as a fraction of the image's area. A crop has the aspect ratio of the image."""
    max_crop: float = 1.0
    """Largest area of the random crop. I-JEPA uses areas from 0.3 to 1 (arXiv 2301.08243, appendix A.1)."""
    max_view_tokens: int | None = None
    """Largest number of tokens of a view. Larger views are scaled down. Null: tokens_per_pack / 8."""
    max_unreadable: float = 0.01
    """The run stops if a larger fraction of the images than this is unreadable."""
    workers: int | None = None
    """Processes that decode images. 0: decode in the training process. Null: chosen by the number of CPU cores. The
    number does not change the result."""
    cache: Literal["none", "memory"] = "none"
    """memory: read all image files (or render all images of `synthetic`) into shared memory before training. This needs
    as much memory as the files have bytes (`synthetic`: 241 MB). The run does not start if they do not fit."""

    def __post_init__(self) -> None:
        for name in ("tokens_per_pack", "packs_per_step", "masked_views"):
            if getattr(self, name) < 1:
                raise ValueError(f"data.{name} must be at least 1, not {getattr(self, name)}.")
        for name in ("global_views", "local_views"):
            if getattr(self, name) < 0:
                raise ValueError(f"data.{name} must be at least 0, not {getattr(self, name)}.")
        if self.max_view_tokens is not None and self.max_view_tokens < 1:
            raise ValueError(f"data.max_view_tokens must be null or at least 1, not {self.max_view_tokens}.")
        if self.workers is not None and self.workers < 0:
            raise ValueError(f"data.workers must be at least 0, not {self.workers}.")
        if (self.min_resolution is None) != (self.max_resolution is None):
            raise ValueError(
                "data.min_resolution and data.max_resolution must both be numbers, or both null for native size."
            )
        if (
            self.min_resolution is not None
            and self.max_resolution is not None
            and not 1 <= self.min_resolution <= self.max_resolution
        ):
            raise ValueError(
                "data.min_resolution and data.max_resolution must satisfy 1 <= min <= max, "
                f"not {self.min_resolution} and {self.max_resolution}."
            )
        if not 0.0 < self.min_crop <= self.max_crop <= 1.0:
            raise ValueError(
                "data.min_crop and data.max_crop must satisfy 0 < min <= max <= 1, "
                f"not {self.min_crop} and {self.max_crop}."
            )
        if not 0.0 <= self.max_unreadable <= 1.0:
            raise ValueError(f"data.max_unreadable must lie between 0 and 1, not {self.max_unreadable}.")
        large = self.masked_views + self.global_views
        if self.view_limit * large + self.local_limit * self.local_views > self.tokens_per_pack:
            local = f", {self.local_views} of up to {self.local_limit}" if self.local_views else ""
            raise ValueError(
                f"data.tokens_per_pack ({self.tokens_per_pack}) cannot hold the views of one image "
                f"({large} of up to {self.view_limit} tokens{local}). Raise it, or lower data.max_view_tokens."
            )
        if self.view_limit < MIN_TOKENS:
            raise ValueError(
                f"Views of at most {self.view_limit} tokens cannot be masked. At least {MIN_TOKENS} are needed. "
                "Raise data.tokens_per_pack or data.max_view_tokens."
            )

    @property
    def view_limit(self) -> int:
        """Most tokens of a view."""
        return self.max_view_tokens or self.tokens_per_pack // VIEW_SHARE

    @property
    def local_limit(self) -> int:
        """Most tokens of a local view."""
        return max(1, self.view_limit // LOCAL_SCALE**2)


@dataclass(frozen=True)
class AugmentConfig:
    """Probabilities of augmentations, applied to each view separately. docs/measurements.md has their effects."""

    flip: float = 0.0
    """Probability of a horizontal flip."""
    color: float = 0.0
    """Probability of color jitter: random brightness, contrast, saturation and hue."""
    gray: float = 0.0
    """Probability of conversion to grayscale."""
    blur: float = 0.0
    """Probability of Gaussian blur."""
    solarize: float = 0.0
    """Probability of solarization, which inverts bright values."""

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            if not 0.0 <= getattr(self, field.name) <= 1.0:
                raise ValueError(f"augment.{field.name} must lie between 0 and 1, not {getattr(self, field.name)}.")
