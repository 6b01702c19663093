"""The configuration of the data: which images, which views of them, and how views are changed and packed."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Literal

from ijepa_enhanced.masks import MIN_TOKENS

VIEW_SHARE = 8
"""A view may hold 1 / 8 of a pack by default: fewer, larger views leave the packer too little to balance with."""

LOCAL_SCALE = 2
"""How many times smaller the sides of local views are than of others; DINO has 224 / 96 (arXiv 2104.14294)."""


@dataclass(frozen=True)
class DataConfig:
    """The images and how they become packs."""

    source: str = "synthetic"
    """A folder of images, tar shards (`train-{000000..000002}.tar`), Parquet (`train-*.parquet`), `hf://NAME`, a list
    (`.csv`, `.jsonl`), or `synthetic`; or several with weights, `photos@2 + train-*.tar@1`; see docs/data.md."""
    tokens_per_pack: int = 16384
    """Most tokens that one device sees at once: what bounds memory."""
    packs_per_step: int = 1
    """Packs of one optimizer step, over all ranks and accumulated on each."""
    masked_views: int = 1
    """Views drawn of each image; all of them lie in one pack."""
    global_views: int = 0
    """Views of each image that are not masked, besides the masked ones: only the student sees them, and sees them
    whole. Only objective.contrastive_weight uses them."""
    local_views: int = 0
    """Small views of each image that are not masked, besides the others: from 5% of the image to `min_crop`, at half
    the resolution (multi-crop, SwAV, arXiv 2006.09882, section 3.2)."""
    min_resolution: int | None = 112
    """Smallest sqrt(height * width) of a view in pixels, after resizing with its aspect ratio kept."""
    max_resolution: int | None = 224
    """Largest. The resolution is drawn uniformly: resolution, not area, as NaViT found (arXiv 2307.06304, section 3.2).
    Both null: the crop's native size, never enlarged."""
    min_crop: float = 0.3
    """Smallest area of the random crop, at the image's own aspect ratio, as a fraction of the image."""
    max_crop: float = 1.0
    """Largest. I-JEPA draws from 0.3 to 1 (arXiv 2301.08243, appendix A.1)."""
    max_view_tokens: int | None = None
    """Most tokens of a view; larger ones are scaled down. Null: tokens_per_pack / 8."""
    max_unreadable: float = 0.01
    """Fraction of the source's images that may be unreadable before the run stops."""
    workers: int | None = None
    """Processes that decode images; 0 decodes in the training process. Null: as many as suit the cores at hand. The
    number changes no result."""
    cache: Literal["none", "memory"] = "none"
    """`memory` reads all image files, or draws all images of `synthetic`, before training, into memory that the workers
    share. It needs as many bytes as they have (`synthetic`: 241 MB), and is refused if they do not fit."""

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
                f"Views of at most {self.view_limit} tokens cannot be masked: {MIN_TOKENS} are needed. "
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
    """Probabilities, drawn for every view on its own; 0 is never. docs/measurements.md says what each is worth."""

    flip: float = 0.0
    """Mirrored left to right."""
    color: float = 0.0
    """Brightness, contrast, saturation and hue changed."""
    gray: float = 0.0
    """Colours turned into grey."""
    blur: float = 0.0
    """Gaussian blur."""
    solarize: float = 0.0
    """Bright values inverted."""

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            if not 0.0 <= getattr(self, field.name) <= 1.0:
                raise ValueError(f"augment.{field.name} must lie between 0 and 1, not {getattr(self, field.name)}.")
