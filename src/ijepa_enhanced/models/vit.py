"""The Vision Transformer over a packed stream of patches."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor, nn

from ijepa_enhanced.merge_plan import MergePlan
from ijepa_enhanced.models.blocks import Blocks, FactorizedPositions, SinCosPositions, init_weights
from ijepa_enhanced.models.config import EncoderConfig
from ijepa_enhanced.ops.linear import Linear, pad_rows
from ijepa_enhanced.ops.merging import Merge, chain, unmerge
from ijepa_enhanced.packed import Packed

CHANNELS = 3

PATCH_MLP_RATIO = 2
"""Width of the hidden layer of a patch embedding over D, the only one measured (docs/recipe.md)."""


class PatchMLP(nn.Module):
    """A patch embedding with a hidden layer.

    Args:
        pixels: values of a patch.
        width: D.
    """

    def __init__(self, pixels: int, width: int) -> None:
        super().__init__()
        self.hidden = Linear(pixels, PATCH_MLP_RATIO * width)
        self.out = Linear(PATCH_MLP_RATIO * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """[T, P * P * C] -> [T, D]."""
        return self.out(self.hidden(x, gelu=True))


class VisionTransformer(nn.Module):
    """A Vision Transformer (arXiv 2010.11929) without class token, over a packed stream of normalized patches."""

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.config = config
        shape = config.shape
        embedding = Linear if config.patch_embed == "linear" else PatchMLP
        self.patch_embed = embedding(config.patch_size**2 * CHANNELS, shape.width)
        positions = FactorizedPositions if config.positions == "factorized" else SinCosPositions
        self.positions = positions(shape.width, config.max_grid)
        self.blocks = Blocks(shape.width, shape.depth, shape.heads, shape.mlp_ratio)
        init_weights(self)
        if isinstance(self.patch_embed, PatchMLP):
            # He's (arXiv 1502.01852): with deviations of 0.02 it would start where GELU is nearly linear.
            nn.init.kaiming_normal_(self.patch_embed.hidden.weight, nonlinearity="relu")

    @property
    def width(self) -> int:
        """D, the width of a feature."""
        return self.config.shape.width

    @property
    def dtype(self) -> torch.dtype:
        """The precision of the weights."""
        return self.blocks.norm.weight.dtype

    def forward(self, packed: Packed, plan: MergePlan | None = None) -> Tensor:
        """Normalized patches [T, P * P * C] -> features [T, D] after the last LayerNorm.

        With a plan, tokens merge on the way. Each patch then gets the feature of the token that holds it, so that a
        mean over patches weighs tokens by their sizes, and targets, maps and pooling need no code for merging.
        """
        return self.last_layers(packed, plan, count=1)[0]

    def last_layers(self, packed: Packed, plan: MergePlan | None, count: int) -> list[Tensor]:
        """Return the outputs of the last `count` blocks, [T, D] each, each as `forward` returns that of the last."""
        outputs, merges = self.tokens(packed, plan, count)
        to_patches = patches_to_tokens(merges)[-len(outputs) :]
        return [x if merge is None else unmerge(x, merge) for x, merge in zip(outputs, to_patches, strict=True)]

    def tokens(self, packed: Packed, plan: MergePlan | None, count: int = 1) -> tuple[list[Tensor], list[Merge | None]]:
        """Return the tokens that patches merged into, and what each block merged; see `Blocks.forward`."""
        x = self.patch_embed(pad_rows(packed.values.to(self.dtype)))[: len(packed.values)]
        x = x + self.positions(packed.positions, packed.grids, packed.segments.cu_seqlens).to(self.dtype)
        return self.blocks(x, packed.segments, plan, count)


def patches_to_tokens(merges: list[Merge | None]) -> list[Merge | None]:
    """Chain the merges of all blocks: after each block, which token holds each patch; None while none has merged."""

    def joined(before: Merge | None, merge: Merge | None) -> Merge | None:
        return merge if before is None else before if merge is None else chain(before, merge)

    return list(itertools.accumulate(merges, joined))
