"""What users set about networks."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Literal

from ijepa_enhanced.models.variants import PATCH_SIZES, VARIANTS, Variant


@dataclass(frozen=True)
class EncoderConfig:
    """What defines an encoder's architecture."""

    variant: str = "S"
    """Width, depth, heads by name: Ti, S, B, L, H or g."""
    patch_size: int = 16
    """Side of a square patch in pixels: 8, 14 or 16."""
    depth: int | None = None
    """Number of blocks, if not the variant's: for studies on small machines."""
    positions: Literal["factorized", "sincos"] = "factorized"
    """Factorized learnable tables (NaViT), or the fixed 2-D sine-cosine of I-JEPA's released weights."""
    max_grid: int = 32
    """Entries of each axis's position table. Longer grids are interpolated onto it: set it near the longest
    side, in patches, of the training views."""
    patch_embed: Literal["linear", "mlp"] = "linear"
    """What makes a token of a patch: one linear layer, as in I-JEPA's released weights, or two with GELU between them,
    which learned more of photographs in every run (docs/recipe.md)."""

    def __post_init__(self) -> None:
        if self.variant not in VARIANTS:
            raise ValueError(f"encoder.variant must be one of {', '.join(VARIANTS)}, not '{self.variant}'.")
        if self.patch_size not in PATCH_SIZES:
            raise ValueError(f"encoder.patch_size must be 8, 14 or 16, not {self.patch_size}.")
        if self.depth is not None and self.depth < 1:
            raise ValueError(f"encoder.depth must be at least 1, not {self.depth}.")
        for name, choices in (("positions", ("factorized", "sincos")), ("patch_embed", ("linear", "mlp"))):
            if getattr(self, name) not in choices:
                raise ValueError(f"encoder.{name} must be {' or '.join(choices)}, not '{getattr(self, name)}'.")
        if self.max_grid < 1:
            raise ValueError(f"encoder.max_grid must be at least 1, not {self.max_grid}.")

    @property
    def shape(self) -> Variant:
        """The variant with its depth as configured."""
        variant = VARIANTS[self.variant]
        return dataclasses.replace(variant, depth=self.depth or variant.depth)


HEAD_MULTIPLE = 8
"""What FlashAttention wants the width of a head to be a multiple of."""


@dataclass(frozen=True)
class PredictorConfig:
    """The predictor's size; defaults are those of the original for ViT-S (width 256, depth 4)."""

    width: int = 256
    """Width of its tokens: narrower than the encoder's is better (I-JEPA, arXiv 2301.08243, ablations)."""
    depth: int = 4
    """Number of blocks."""
    heads: int = 4
    """Attention heads, each of a width that is a multiple of 8."""

    def __post_init__(self) -> None:
        if min(self.width, self.depth, self.heads) < 1 or self.width % (HEAD_MULTIPLE * self.heads):
            raise ValueError(
                f"predictor.width must be a positive multiple of {HEAD_MULTIPLE} * predictor.heads, not {self.width} "
                f"with {self.heads} heads, and predictor.depth at least 1, not {self.depth}."
            )


@dataclass(frozen=True)
class MergeConfig:
    """Merging in training: targets and context features return to their patches' places before the predictor.

    Off, because merging while training is reported to cost accuracy (arXiv 2508.02829 among others; docs/merging.md).
    """

    student_rate: float = 0.0
    """Share of its tokens that each layer of the student merges into others, from 0 to 0.5."""
    teacher_rate: float = 0.0
    """The same of the teacher."""

    def __post_init__(self) -> None:
        for name in ("student_rate", "teacher_rate"):
            if not 0 <= getattr(self, name) <= 0.5:
                raise ValueError(f"merging.{name} must lie between 0 and 0.5, not {getattr(self, name)}.")
