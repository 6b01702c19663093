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
from ijepa_enhanced.ops.preprocess import CHANNELS
from ijepa_enhanced.packed import Packed

PATCH_MLP_RATIO = 2
"""Width of the hidden layer of `PatchMLP`, divided by D: the only ratio measured (docs/measurements.md)."""


class PatchMLP(nn.Module):
    """A patch embedding with one hidden layer.

    Args:
        pixels: values in a patch, P * P * C.
        width: D.
    """

    def __init__(self, pixels: int, width: int) -> None:
        super().__init__()
        self.hidden = Linear(pixels, PATCH_MLP_RATIO * width)
        self.out = Linear(PATCH_MLP_RATIO * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Embed patches: [T, P * P * C] -> [T, D]."""
        return self.out(self.hidden(x, gelu=True))


class VisionTransformer(nn.Module):
    """A Vision Transformer (arXiv 2010.11929) without class token, over a packed stream of normalized patches.

    Args:
        config: the architecture.
    """

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
            # He initialization (arXiv 1502.01852): with a standard deviation of 0.02, the layer would start where GELU
            # is almost linear.
            nn.init.kaiming_normal_(self.patch_embed.hidden.weight, nonlinearity="relu")

    @property
    def width(self) -> int:
        """Return D, the width of a feature."""
        return self.config.shape.width

    @property
    def dtype(self) -> torch.dtype:
        """Return the data type of the weights."""
        return self.blocks.norm.weight.dtype

    def forward(self, packed: Packed, plan: MergePlan | None = None) -> Tensor:
        """Return the features [T, D], after the final LayerNorm, of normalized patches [T, P * P * C].

        With a plan, tokens merge on the way, and each patch gets the feature of the token that holds it. So a mean over
        patches weighs tokens by their sizes, and targets, maps and pooling need no code for merging.
        """
        return self.last_layers(packed, plan, count=1)[0]

    def last_layers(self, packed: Packed, plan: MergePlan | None, count: int) -> list[Tensor]:
        """Return the outputs of the last `count` blocks, [T, D] each; the last one is the result of `forward`."""
        outputs, merges = self.tokens(packed, plan, count)
        # For each output, which token holds each patch.
        to_patches = patches_to_tokens(merges)[-len(outputs) :]
        return [x if merge is None else unmerge(x, merge) for x, merge in zip(outputs, to_patches, strict=True)]

    def tokens(self, packed: Packed, plan: MergePlan | None, count: int = 1) -> tuple[list[Tensor], list[Merge | None]]:
        """Return the merged tokens after each of the last `count` blocks, and the merges; see `Blocks.forward`."""
        x = self.patch_embed(pad_rows(packed.values.to(self.dtype)))[: len(packed.values)]  # [T, D]
        x = x + self.positions(packed.positions, packed.grids, packed.segments.cu_seqlens).to(self.dtype)
        return self.blocks(x, packed.segments, plan, count)


def patches_to_tokens(merges: list[Merge | None]) -> list[Merge | None]:
    """Return which token holds each patch after each block, or None for blocks before the first merge."""

    def joined(before: Merge | None, merge: Merge | None) -> Merge | None:
        return merge if before is None else before if merge is None else chain(before, merge)

    return list(itertools.accumulate(merges, joined))
