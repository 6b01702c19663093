"""The Vision Transformer over a packed stream of patches."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor, nn

from ijepa_enhanced.merge_plan import MergePlan
from ijepa_enhanced.models.blocks import Blocks, init_weights, make_positions
from ijepa_enhanced.models.config import Architecture
from ijepa_enhanced.ops.linear import Linear, pad_rows
from ijepa_enhanced.ops.merging import Merge, chain, unmerge
from ijepa_enhanced.ops.pooling import pool
from ijepa_enhanced.ops.positions import centered
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
    """A Vision Transformer (arXiv 2010.11929) over a packed stream of normalized patches.

    Args:
        config: the architecture.
    """

    def __init__(self, config: Architecture) -> None:
        super().__init__()
        self.config = config
        embedding = Linear if config.patch_embed == "linear" else PatchMLP
        self.patch_embed = embedding(config.patch_size**2 * config.channels, config.width)
        self.prefix = nn.Parameter(torch.empty(config.prefix, config.width)) if config.prefix else None
        """The class token, if there is one, then the registers."""
        self.positions = make_positions(config)
        self.blocks = Blocks(config)
        init_weights(self)
        if self.prefix is not None:
            nn.init.trunc_normal_(self.prefix, std=0.02)
        if isinstance(self.patch_embed, PatchMLP):
            # He initialization (arXiv 1502.01852): with a standard deviation of 0.02, the layer would start where GELU
            # is almost linear.
            nn.init.kaiming_normal_(self.patch_embed.hidden.weight, nonlinearity="relu")

    @property
    def width(self) -> int:
        """Return D, the width of a feature."""
        return self.config.width

    @property
    def dtype(self) -> torch.dtype:
        """Return the data type of the weights."""
        return self.blocks.norm.weight.dtype

    def forward(self, packed: Packed, plan: MergePlan | None = None) -> Tensor:
        """Return the features [T, D], after the final LayerNorm, of normalized patches [T, P * P * C].

        If the network has a class token or registers, `packed.prefix` rows at the beginning of each view are theirs.

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

    def pool(self, features: Tensor, cu_seqlens: Tensor, pooling: str) -> Tensor:
        """Return the feature of each view, float32 [V, D].

        Args:
            features: [T, D], from `forward`.
            cu_seqlens: int32 [V + 1], boundaries of the views.
            pooling: see `ops.pooling.pool`.
        """
        pooled = pool(features, cu_seqlens, pooling, self.config.prefix)
        if not self.config.norm_pooled:
            return pooled
        # Features that were computed without gradients stay without, though the norm has weights.
        with torch.set_grad_enabled(torch.is_grad_enabled() and features.requires_grad):
            return self.blocks.norm(pooled)

    def tokens(self, packed: Packed, plan: MergePlan | None, count: int = 1) -> tuple[list[Tensor], list[Merge | None]]:
        """Return the merged tokens after each of the last `count` blocks, and the merges; see `Blocks.forward`."""
        x = self.patch_embed(pad_rows(packed.values.to(self.dtype)))[: len(packed.values)]  # [T, D]
        if self.positions is not None:
            x = x + self.positions(packed.positions, packed.grids, packed.segments.cu_seqlens).to(self.dtype)
        if self.prefix is not None:
            starts = packed.segments.cu_seqlens[:-1].long()
            rows = (starts[:, None] + torch.arange(len(self.prefix), device=x.device)).flatten()
            x = x.index_copy(0, rows, self.prefix.to(x.dtype).repeat(len(starts), 1))
        coordinates = None if self.positions is not None else centered(packed)
        return self.blocks(x, packed.segments, plan, count, coordinates)


def patches_to_tokens(merges: list[Merge | None]) -> list[Merge | None]:
    """Return which token holds each patch after each block, or None for blocks before the first merge."""

    def joined(before: Merge | None, merge: Merge | None) -> Merge | None:
        return merge if before is None else before if merge is None else chain(before, merge)

    return list(itertools.accumulate(merges, joined))
