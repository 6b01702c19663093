"""What the encoder and the predictor are made of: pre-norm transformer blocks over packed streams, and positions."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ijepa_enhanced.merge_plan import MergePlan
from ijepa_enhanced.ops.attention import attention
from ijepa_enhanced.ops.linear import Linear, pad_rows
from ijepa_enhanced.ops.merging import Merge, match, merge
from ijepa_enhanced.ops.positions import axis_coordinates, interpolation_weights, sincos_2d
from ijepa_enhanced.packed import Segments, segment_ids

LAYER_NORM_EPS = 1e-6
"""As in ViT (arXiv 2010.11929) and I-JEPA's code; PyTorch's default is 1e-5."""


class FeedForward(nn.Module):
    """The second half of a pre-norm transformer block (ViT, arXiv 2010.11929, section 3.1).

    Args:
        width: D.
        hidden: width of the MLP between its two layers.
    """

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.norm2 = nn.LayerNorm(width, eps=LAYER_NORM_EPS)
        self.fc1 = Linear(width, hidden)
        self.fc2 = Linear(hidden, width)

    def transform(self, x: Tensor) -> Tensor:
        """Each token for itself: [T, D] -> [T, D]."""
        transformed: Tensor = self.fc2(self.fc1(self.norm2(x), gelu=True))
        return x + transformed


class Block(FeedForward):
    """A pre-norm block whose tokens attend to all tokens of their view.

    Args:
        width: D.
        heads: H, which divides D.
        hidden: width of the MLP between its two layers.
    """

    def __init__(self, width: int, heads: int, hidden: int) -> None:
        super().__init__(width, hidden)
        self.heads = heads
        self.norm1 = nn.LayerNorm(width, eps=LAYER_NORM_EPS)
        self.qkv = Linear(width, 3 * width)
        self.proj = Linear(width, width)

    def forward(
        self, x: Tensor, segments: Segments, sizes: Tensor | None = None, plan: MergePlan | None = None, layer: int = 0
    ) -> tuple[Tensor, Tensor | None, Merge | None]:
        """Attend, merge what the plan says, and transform each token.

        Tokens are merged between attention and MLP by their keys averaged over heads (ToMe, arXiv 2210.09461,
        section 3).

        Args:
            x: [T, D], and pad rows after them on a CPU (`ops.linear.pad_rows`).
            segments: the views of the T tokens.
            sizes: float32 [T], how many patches each token stands for; None: one each.
            plan: None: nothing merges.
            layer: number of this block in the plan.

        Returns:
            [T', D] with its pad rows; the sizes of the T' tokens, None while all are 1; what merged, None if nothing.
        """
        x, keys = self.attend(x, segments, sizes)
        if plan is None or not plan.active[layer]:
            return self.transform(x), sizes, None
        tokens = plan.totals[layer]
        merging = match(keys[:tokens].mean(dim=1, dtype=torch.float32), plan, layer)
        sizes = x.new_ones(tokens, dtype=torch.float32) if sizes is None else sizes
        x, sizes = merge(x[:tokens], sizes, merging)
        return self.transform(pad_rows(x)), sizes, merging

    def attend(self, x: Tensor, segments: Segments, sizes: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The first half: [T, D] -> [T, D], and the keys of all tokens [T, H, K]; `sizes` as for `attention`."""
        q, k, v = self.qkv(self.norm1(x)).unflatten(1, (3, self.heads, -1)).unbind(1)
        return x + self.proj(attention(q, k, v, segments, sizes).flatten(1)), k


class CrossBlock(FeedForward):
    """A block whose tokens attend to those of another stream, and not to each other.

    Args:
        width: D.
        heads: H, which divides D.
        hidden: width of the MLP between its two layers.
    """

    def __init__(self, width: int, heads: int, hidden: int) -> None:
        super().__init__(width, hidden)
        self.heads = heads
        self.norm1 = nn.LayerNorm(width, eps=LAYER_NORM_EPS)
        self.norm_context = nn.LayerNorm(width, eps=LAYER_NORM_EPS)
        self.q = Linear(width, width)
        self.kv = Linear(width, 2 * width)
        self.proj = Linear(width, width)

    def forward(self, x: Tensor, segments: Segments, context: Tensor, context_segments: Segments) -> Tensor:
        """[T, D] and what each segment of it attends to [S, D] -> [T, D]."""
        q = self.q(self.norm1(x)).unflatten(1, (self.heads, -1))
        k, v = self.kv(self.norm_context(context)).unflatten(1, (2, self.heads, -1)).unbind(1)
        mixed = attention(q, k, v, segments, keys=context_segments)
        return self.transform(x + self.proj(mixed.flatten(1)))


class Blocks(nn.Module):
    """A stack of blocks and the final LayerNorm.

    Args:
        width: D.
        depth: number of blocks.
        heads: H, which divides D.
        mlp_ratio: width of the MLPs' hidden layer over D.
    """

    def __init__(self, width: int, depth: int, heads: int, mlp_ratio: float) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Block(width, heads, round(width * mlp_ratio)) for _ in range(depth))
        self.norm = nn.LayerNorm(width, eps=LAYER_NORM_EPS)
        self.recompute = False
        """Whether the backward pass computes what is inside a block again, of which then only the input [T, D] is kept
        (activation checkpointing, arXiv 1604.06174)."""

    def forward(
        self, x: Tensor, segments: Segments, plan: MergePlan | None = None, count: int = 1
    ) -> tuple[list[Tensor], list[Merge | None]]:
        """Run all blocks on [T, D].

        Args:
            x: [T, D].
            segments: the views of the T tokens.
            plan: what merges in each block; None: nothing.
            count: how many blocks' outputs to return; all of them if there are fewer.

        Returns:
            The outputs of the last `count` blocks after the final LayerNorm, [T', D] each, where T' shrinks as tokens
            merge; and what each block merged, None for those that merge nothing.
        """
        tokens, sizes = len(x), None
        x = pad_rows(x)
        outputs: list[Tensor] = []
        merges: list[Merge | None] = []
        for number, block in enumerate(self.layers):
            call: Callable[..., Any] = block
            if self.recompute and torch.is_grad_enabled():
                call = partial(checkpoint, block, use_reentrant=False, preserve_rng_state=False)
            x, sizes, merging = call(x, segments, sizes, plan, number)
            merges.append(merging)
            if plan is not None:
                # A host-side number of the plan, not len(x): on a CPU pad rows follow the tokens.
                segments, tokens = plan.segments[number + 1], plan.totals[number + 1]
            if number >= len(self.layers) - count:
                outputs.append(self.norm(x)[:tokens])
        return outputs, merges


class FactorizedPositions(nn.Module):
    """A learnable table for rows and one for columns, added (NaViT, arXiv 2307.06304, section 2.1).

    Args:
        width: D, a multiple of 4.
        size: entries of each table; a grid longer than that is interpolated, axis by axis.
    """

    def __init__(self, width: int, size: int) -> None:
        super().__init__()
        self.size = size
        self.rows = nn.Parameter(torch.empty(size, width))
        self.cols = nn.Parameter(torch.empty(size, width))

    def forward(self, positions: Tensor, grids: Tensor, cu_seqlens: Tensor) -> Tensor:
        """[T, 2] positions in grids [V, 2] -> [T, D]."""
        coordinates = _coordinates(positions, grids, cu_seqlens, self.size)
        rows, cols = (interpolation_weights(axis, self.size) for axis in coordinates)
        # In float32 at least, under autocast too: the residual stream starts here and keeps this precision.
        dtype = torch.promote_types(torch.float32, self.rows.dtype)
        with torch.autocast(rows.device.type, enabled=False):
            return rows.to(dtype) @ self.rows.to(dtype) + cols.to(dtype) @ self.cols.to(dtype)


class SinCosPositions(nn.Module):
    """Fixed 2-D sine-cosine positions, those of I-JEPA's released weights.

    Args:
        width: D, a multiple of 4.
        size: rows and columns of the grid the weights were trained on; a longer grid is squeezed onto it.
    """

    def __init__(self, width: int, size: int) -> None:
        super().__init__()
        self.width = width
        self.size = size

    def forward(self, positions: Tensor, grids: Tensor, cu_seqlens: Tensor) -> Tensor:
        """[T, 2] positions in grids [V, 2] -> [T, D]."""
        return sincos_2d(*_coordinates(positions, grids, cu_seqlens, self.size), self.width)


def _coordinates(positions: Tensor, grids: Tensor, cu_seqlens: Tensor, size: int) -> tuple[Tensor, Tensor]:
    extents = grids[segment_ids(cu_seqlens, positions.shape[0])]
    rows, cols = (axis_coordinates(positions[:, axis], extents[:, axis], size) for axis in range(2))
    return rows, cols


@torch.no_grad()
def init_weights(module: nn.Module) -> None:
    """I-JEPA's initialisation: truncated normal of deviation 0.02, zero biases.

    The two layers that write into the residual stream are divided by sqrt(2 * layer) (I-JEPA's code,
    after BEiT, arXiv 2106.08254, section 2.5). Learnable positions start as I-JEPA's fixed ones: from small random
    numbers, mask tokens of different places are nearly alike, and learning stalls (docs/log.md, 2026-11-24).
    """
    for part in module.modules():
        if isinstance(part, nn.Linear):
            nn.init.trunc_normal_(part.weight, std=0.02)
            if part.bias is not None:
                nn.init.zeros_(part.bias)
        elif isinstance(part, FactorizedPositions):
            entries = torch.arange(part.size)
            waves = sincos_2d(entries, entries, part.rows.shape[1])
            encodes_column = torch.arange(waves.shape[1]) < waves.shape[1] // 2
            part.cols.copy_(waves * encodes_column)
            part.rows.copy_(waves * ~encodes_column)
    for part in module.modules():
        if isinstance(part, nn.ModuleList):
            for number, layer in enumerate(part, start=1):
                for name in ("proj", "fc2"):
                    layer.get_submodule(name).get_parameter("weight").div_((2.0 * number) ** 0.5)
