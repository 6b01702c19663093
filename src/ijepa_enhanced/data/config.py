"""The configuration of the data: which images, which views of them, and how views are changed and packed."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Literal

from ijepa_enhanced.masks import MIN_TOKENS

VIEW_SHARE = 8
"""By default a view has at most 1 / 8 of the tokens of a pack. Packs of fewer, larger views are harder to balance."""

MOST_CHANNELS = 32
"""Most channels of an image. Multispectral satellites have fewer (Sentinel-2 has 13), hyperspectral cameras have
hundreds."""

LOCAL_SCALE = 2
"""Resolution of the other views, divided by that of local views. DINO uses 224 / 96 (arXiv 2104.14294)."""


@dataclass(frozen=True)
class DataConfig:
    """The training images, and how views are cropped, resized and packed."""

    source: str = "synthetic"
    """Training images: a folder, tar shards (`train-{000000..000002}.tar`), Parquet files (`train-*.parquet`), a
    Hugging Face dataset (`hf://NAME`), a list (`.csv`, `.jsonl`), or the built-in images (`synthetic`). Join
    several sources with weights to mix them: `photos@2 + train-*.tar@1` (docs/data.md)."""
    channels: int = 3
    """Number of channels of the images, from 1 to 32. 3: RGB, and gray images become RGB. Images with another number
    of channels are unreadable (docs/data.md). For other numbers, augment.color changes brightness and contrast only."""
    tokens_per_pack: int = 16384
    """Maximum number of tokens (patches) in a pack. A pack is the batch of views that a device processes at once,
    concatenated without padding. Lower it if you run out of memory."""
    packs_per_step: int = 1
    """Number of packs per optimizer step, summed over all processes. A process with several packs accumulates
    gradients."""
    masked_views: int = 1
    """Number of masked views per image. A view is a random crop of an image, resized. All views of an image are in the
    same pack."""
    global_views: int = 0
    """Number of additional unmasked views per image. Only the student processes them. They require
    objective.contrastive_weight > 0."""
    local_views: int = 0
    """Number of additional small unmasked views per image (multi-crop, SwAV, arXiv 2006.09882, section 3.2). Each crop
    covers between 5% and data.min_crop of the image area. Its resolution is drawn as for other views, then halved. They
    require objective.contrastive_weight > 0."""
    min_resolution: int | None = 112
    """Minimum resolution of a view: sqrt(height * width) in pixels after resizing. The aspect ratio is kept."""
    max_resolution: int | None = 224
    """Maximum resolution of a view. Resolutions are drawn uniformly between the two limits, as in NaViT (arXiv
    2307.06304, section 3.2). If both limits are null, crops keep their native size."""
    min_crop: float = 0.3
    """Minimum area of the random crop, as a fraction of the image. Crops have the aspect ratio of the image."""
    max_crop: float = 1.0
    """Maximum area of the random crop. I-JEPA uses crops of 0.3 to 1 (arXiv 2301.08243, appendix A.1)."""
    max_view_tokens: int | None = None
    """Maximum number of tokens in a view. Larger views are scaled down. null: data.tokens_per_pack / 8."""
    max_unreadable: float = 0.01
    """Maximum fraction of unreadable images. Training stops if it is exceeded."""
    workers: int | None = None
    """Number of worker processes that decode images. 0: decode in the training process. null: with a GPU, one worker
    per CPU core; without a GPU, one per six. The processes of a machine share its cores. Images and their order do not
    depend on this number."""
    cache: Literal["none", "memory"] = "none"
    """none: read images from disk in every epoch. memory: load all image files into shared memory first (120 MB for
    `synthetic`); training does not start if they do not fit."""

    def __post_init__(self) -> None:
        for name in ("tokens_per_pack", "packs_per_step", "masked_views"):
            if getattr(self, name) < 1:
                raise ValueError(f"data.{name} must be at least 1, not {getattr(self, name)}.")
        if not 1 <= self.channels <= MOST_CHANNELS:
            raise ValueError(f"data.channels must be between 1 and {MOST_CHANNELS}, not {self.channels}.")
        for name in ("global_views", "local_views"):
            if getattr(self, name) < 0:
                raise ValueError(f"data.{name} must be at least 0, not {getattr(self, name)}.")
        if self.max_view_tokens is not None and self.max_view_tokens < MIN_TOKENS:
            raise ValueError(
                f"data.max_view_tokens must be null or at least {MIN_TOKENS}, not {self.max_view_tokens}: masking "
                f"needs {MIN_TOKENS} tokens."
            )
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
                f"data.min_resolution ({self.min_resolution}) must be at least 1 and at most data.max_resolution "
                f"({self.max_resolution})."
            )
        if not 0.0 < self.min_crop <= self.max_crop <= 1.0:
            raise ValueError(
                f"data.min_crop ({self.min_crop}) and data.max_crop ({self.max_crop}) must be in ascending order, "
                "above 0 and at most 1."
            )
        if not 0.0 <= self.max_unreadable <= 1.0:
            raise ValueError(f"data.max_unreadable must be between 0 and 1, not {self.max_unreadable}.")
        self._check_views()

    def _check_views(self) -> None:
        """Raise ValueError if views cannot be masked, or those of an image do not fit into a pack."""
        if self.view_limit < MIN_TOKENS:
            raise ValueError(
                f"data.tokens_per_pack ({self.tokens_per_pack}) is too small: without data.max_view_tokens, a view has "
                f"at most data.tokens_per_pack / {VIEW_SHARE} = {self.view_limit} tokens, but masking needs at least "
                f"{MIN_TOKENS}. Set it to at least {VIEW_SHARE * MIN_TOKENS}."
            )
        large = self.masked_views + self.global_views
        total = self.view_limit * large + self.local_limit * self.local_views
        if total > self.tokens_per_pack:
            views = f"{large} view{'s' * (large > 1)} of up to {self.view_limit} tokens"
            if self.local_views:
                views += f" and {self.local_views} local view{'s' * (self.local_views > 1)} of up to {self.local_limit}"
            # Without a limit of their own, views grow with the pack.
            advice = f"Raise it to at least {total}, or lower data.max_view_tokens"
            if self.max_view_tokens is None:
                advice = f"Set data.max_view_tokens to less than {self.view_limit}, or use fewer views"
            raise ValueError(
                f"data.tokens_per_pack ({self.tokens_per_pack}) is too small for the views of one image: {views}. "
                f"{advice}."
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
    """Probability of color jitter: brightness, contrast, saturation and hue. If data.channels is not 3, only brightness
    and contrast change."""
    gray: float = 0.0
    """Probability of conversion to grayscale."""
    blur: float = 0.0
    """Probability of Gaussian blur."""
    solarize: float = 0.0
    """Probability of solarization, which inverts bright pixel values."""

    @property
    def recolors(self) -> bool:
        """Return whether colors may change."""
        return max(self.color, self.gray, self.solarize) > 0

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            if not 0.0 <= getattr(self, field.name) <= 1.0:
                raise ValueError(f"augment.{field.name} must be between 0 and 1, not {getattr(self, field.name)}.")
