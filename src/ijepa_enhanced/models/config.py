"""Configuration of the networks."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from ijepa_enhanced.models.variants import PATCH_SIZES, VARIANTS

if TYPE_CHECKING:
    from ijepa_enhanced.ops.positions import Resampling  # it imports torch, and `--help` must not wait for that


@dataclass(frozen=True)
class Architecture:
    """All that the arithmetic of a Vision Transformer depends on, beside its weights."""

    width: int
    """D."""
    depth: int
    """Number of blocks."""
    heads: int
    """H, a divisor of D."""
    hidden: int
    """Width of the hidden layer of each MLP."""
    patch_size: int = 16
    """P."""
    patch_embed: Literal["linear", "mlp"] = "linear"
    """One linear layer, or two with a GELU in between."""
    positions: Literal["factorized", "table", "sincos", "rope"] = "factorized"
    """factorized: the sum of a learned table for rows and one for columns. table: a learned table of all places of a
    grid. sincos: fixed. rope: queries and keys are rotated by their position (DINOv3)."""
    position_grid: tuple[int, int] = (32, 32)
    """Rows and columns of the learned tables; of the grid that longer ones are squeezed onto, for sincos."""
    resampling: Resampling = "squeeze"
    """How a view reads a learned table of another size than its grid; see `ops.positions.axis_weights`. For sincos,
    squeeze or none: longer grids are squeezed onto `position_grid`, or their positions are computed."""
    square_positions: bool = False
    """Whether a view reads both axes of a learned table as if its grid were the square around it (NaFlexViT), so that
    positions keep the aspect ratio. False: each axis is resampled to its own length."""
    rope_base: float = 100.0
    """Base of the frequencies of rope; DINOv3's is the default."""
    class_token: bool = False
    """Whether a learned token, whose feature stands for the whole view, leads each view."""
    registers: int = 0
    """Number of further learned tokens before the patches (arXiv 2309.16588)."""
    layer_scale: bool = False
    """Whether each branch of a block is scaled by learned factors (CaiT, arXiv 2103.17239, section 2)."""
    gated: bool = False
    """Whether MLPs are SwiGLU (arXiv 2002.05202): silu(a) * b instead of gelu(a)."""
    norm_eps: float = 1e-6
    """Epsilon of every LayerNorm. The default is that of ViT (arXiv 2010.11929) and I-JEPA's code."""
    norm_pooled: bool = False
    """Whether the final LayerNorm is applied to the feature of a view after pooling (timm's `fc_norm`). False: to each
    token before."""
    channels: int = 3
    """C, the number of channels of the images."""

    def __post_init__(self) -> None:
        for name in ("width", "depth", "heads", "hidden", "patch_size", "channels"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}.")
        if self.width % self.heads:
            raise ValueError(f"width ({self.width}) must be a multiple of heads ({self.heads}).")
        if self.registers < 0:
            raise ValueError(f"registers must be at least 0, not {self.registers}.")
        if self.resampling == "none" and self.positions in ("factorized", "table"):
            raise ValueError(f"resampling must not be none for learned positions ({self.positions}).")

    @property
    def prefix(self) -> int:
        """Return the number of tokens before the patches of each view: the class token and the registers."""
        return int(self.class_token) + self.registers


@dataclass(frozen=True)
class EncoderConfig:
    """The options of an encoder that is trained from scratch."""

    variant: str = field(default="S", metadata={"metavar": "|".join(VARIANTS)})
    """Size of the Vision Transformer."""
    patch_size: int = field(default=16, metadata={"metavar": "|".join(map(str, PATCH_SIZES))})
    """Height and width of a patch in pixels."""
    depth: int | None = None
    """Number of transformer blocks. null: the depth of the variant."""
    positions: Literal["factorized", "sincos"] = "factorized"
    """Position embedding. factorized: one learnable table for rows and one for columns (NaViT). sincos: fixed 2-D
    sine-cosine embedding, as in I-JEPA's released weights."""
    max_grid: int = 32
    """Number of rows and columns that the position embedding covers. Positions in larger patch grids are interpolated.
    Set it to about the longest side of a training view, in patches."""
    patch_embed: Literal["linear", "mlp"] = "linear"
    """Patch embedding. linear: one linear layer, as in I-JEPA. mlp: two linear layers with a GELU in between, which
    scored higher on photographs in every run (docs/measurements.md). The default is I-JEPA's; the recipes for
    photographs set mlp."""

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
    def architecture(self) -> Architecture:
        """Return all that follows from these options."""
        variant = VARIANTS[self.variant]
        return Architecture(
            variant.width,
            self.depth or variant.depth,
            variant.heads,
            round(variant.width * variant.mlp_ratio),
            self.patch_size,
            self.patch_embed,
            self.positions,
            (self.max_grid, self.max_grid),
        )


HEAD_MULTIPLE = 8
"""FlashAttention needs a head width that is a multiple of this."""


@dataclass(frozen=True)
class PredictorConfig:
    """The size of the predictor. The defaults suit a ViT-S encoder."""

    width: int = 256
    """Embedding dimension of the predictor. In I-JEPA's ablations (arXiv 2301.08243), a predictor narrower than the
    encoder was better."""
    depth: int = 4
    """Number of transformer blocks."""
    heads: int = 4
    """Number of attention heads. predictor.width / predictor.heads must be a multiple of 8."""

    def __post_init__(self) -> None:
        for name in ("depth", "heads"):
            if getattr(self, name) < 1:
                raise ValueError(f"predictor.{name} must be at least 1, not {getattr(self, name)}.")
        multiple = HEAD_MULTIPLE * self.heads
        if self.width < 1 or self.width % multiple:
            raise ValueError(
                f"predictor.width must be a positive multiple of {multiple} ({HEAD_MULTIPLE} * predictor.heads), "
                f"not {self.width}."
            )


@dataclass(frozen=True)
class MergeConfig:
    """Token merging during training. The predictor receives unmerged features: each patch has that of its token.

    Off by default: merging during training is reported to cost accuracy (arXiv 2508.02829; docs/merging.md).
    """

    student_rate: float = 0.0
    """Fraction of its tokens that each layer of the student merges into similar ones, from 0 (no merging) to 0.5.
    Merging makes deep encoders faster to train, but it is reported to cost accuracy (docs/merging.md)."""
    teacher_rate: float = 0.0
    """Fraction of its tokens that each layer of the teacher merges into similar ones, from 0 (no merging) to 0.5.
    Merging makes deep encoders faster to train, but it is reported to cost accuracy (docs/merging.md)."""

    def __post_init__(self) -> None:
        for name in ("student_rate", "teacher_rate"):
            if not 0 <= getattr(self, name) <= 0.5:
                raise ValueError(f"merging.{name} must be between 0 and 0.5, not {getattr(self, name)}.")
