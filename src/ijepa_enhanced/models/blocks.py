"""Building blocks of the encoder and the predictor: pre-norm transformer blocks over packed streams, and positions."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ijepa_enhanced.merge_plan import MergePlan
from ijepa_enhanced.models.config import Architecture
from ijepa_enhanced.ops.attention import attention
from ijepa_enhanced.ops.linear import Linear, pad_rows
from ijepa_enhanced.ops.merging import Merge, match, merge
from ijepa_enhanced.ops.positions import (
    Resampling,
    axis_coordinates,
    axis_weights,
    rotate,
    rotations,
    sincos_2d,
)
from ijepa_enhanced.packed import Segments, segment_ids

LAYER_NORM_EPS = 1e-6
"""As in ViT (arXiv 2010.11929) and I-JEPA's code; PyTorch's default is 1e-5."""


class FeedForward(nn.Module):
    """The second half of a pre-norm transformer block (ViT, arXiv 2010.11929, section 3.1): LayerNorm and MLP.

    Args:
        width: D.
        hidden: width of the MLP's hidden layer.
        eps: of the LayerNorm.
        gated: whether the MLP is SwiGLU (arXiv 2002.05202), whose first layer gives gates, then values.
        layer_scale: whether learned factors scale the branch (CaiT, arXiv 2103.17239, section 2).
    """

    def __init__(
        self, width: int, hidden: int, eps: float = LAYER_NORM_EPS, gated: bool = False, layer_scale: bool = False
    ) -> None:
        super().__init__()
        self.norm2 = nn.LayerNorm(width, eps=eps)
        self.gated = gated
        self.fc1 = Linear(width, hidden * (2 if gated else 1))
        self.fc2 = Linear(hidden, width)
        self.scale2 = nn.Parameter(torch.ones(width)) if layer_scale else None

    def transform(self, x: Tensor) -> Tensor:
        """Transform each token on its own, with a residual connection: [T, D] -> [T, D]."""
        if self.gated:
            gates, values = self.fc1(self.norm2(x)).chunk(2, dim=1)
            hidden = F.silu(gates) * values
        else:
            hidden = self.fc1(self.norm2(x), gelu=True)
        return x + scaled(self.fc2(hidden), self.scale2)


def scaled(x: Tensor, scale: Tensor | None) -> Tensor:
    """Multiply the channels of `x` [T, D] by learned factors [D], if there are any."""
    return x if scale is None else x * scale


class Block(FeedForward):
    """A pre-norm block whose tokens attend to all tokens of their view.

    Args:
        config: the architecture.
    """

    def __init__(self, config: Architecture) -> None:
        width = config.width
        super().__init__(width, config.hidden, config.norm_eps, config.gated, config.layer_scale)
        self.heads = config.heads
        self.norm1 = nn.LayerNorm(width, eps=config.norm_eps)
        self.qkv = Linear(width, 3 * width)
        self.proj = Linear(width, width)
        self.scale1 = nn.Parameter(torch.ones(width)) if config.layer_scale else None

    def forward(
        self,
        x: Tensor,
        segments: Segments,
        sizes: Tensor | None = None,
        plan: MergePlan | None = None,
        layer: int = 0,
        rotation: tuple[Tensor, Tensor] | None = None,
    ) -> tuple[Tensor, Tensor | None, Merge | None]:
        """Attend, merge the tokens that the plan says, and transform each token.

        Merging comes between attention and MLP. Tokens are compared by their keys, averaged over heads (ToMe,
        arXiv 2210.09461, section 3), before these are rotated: by what they show, not by where they lie.

        Args:
            x: [T, D], followed by pad rows on a CPU (`ops.linear.pad_rows`).
            segments: of the T tokens.
            sizes: float32 [T], patches that each token stands for; None: one each.
            plan: the merge plan; None: nothing merges.
            layer: number of this block in the plan.
            rotation: of queries and keys, see `ops.positions.rotations`, pad rows included; None: none.

        Returns:
            [T', D], followed by pad rows; the sizes of the T' tokens, or None if all are 1; and the merges of this
            block, or None if it merges nothing.
        """
        x, keys = self.attend(x, segments, sizes, rotation)
        if plan is None or not plan.active[layer]:
            return self.transform(x), sizes, None
        tokens = plan.totals[layer]  # without pad rows, which must not merge
        merging = match(keys[:tokens].mean(dim=1, dtype=torch.float32), plan, layer)
        sizes = x.new_ones(tokens, dtype=torch.float32) if sizes is None else sizes
        x, sizes = merge(x[:tokens], sizes, merging)
        return self.transform(pad_rows(x)), sizes, merging

    def attend(
        self,
        x: Tensor,
        segments: Segments,
        sizes: Tensor | None = None,
        rotation: tuple[Tensor, Tensor] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Run the first half of the block: [T, D] -> [T, D]. Return also the keys of all tokens, [T, H, K].

        `sizes` is that of `ops.attention.attention`.
        """
        q, k, v = self.qkv(self.norm1(x)).unflatten(1, (3, self.heads, -1)).unbind(1)  # [T, H, K] each
        queries, keys = (q, k) if rotation is None else (rotate(q, rotation), rotate(k, rotation))
        return x + scaled(self.proj(attention(queries, keys, v, segments, sizes).flatten(1)), self.scale1), k


class CrossBlock(FeedForward):
    """A block whose tokens attend to those of another stream, and not to each other.

    Args:
        width: D.
        heads: H, a divisor of D.
        hidden: width of the MLP's hidden layer.
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
        """Let `x` [T, D] attend to `context` [S, D], segment by segment, and transform each token: -> [T, D]."""
        q = self.q(self.norm1(x)).unflatten(1, (self.heads, -1))
        k, v = self.kv(self.norm_context(context)).unflatten(1, (2, self.heads, -1)).unbind(1)
        mixed = attention(q, k, v, segments, keys=context_segments)
        return self.transform(x + self.proj(mixed.flatten(1)))


class Blocks(nn.Module):
    """A stack of blocks and the final LayerNorm.

    Args:
        config: the architecture.
    """

    def __init__(self, config: Architecture) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Block(config) for _ in range(config.depth))
        self.norm = nn.LayerNorm(config.width, eps=config.norm_eps)
        self.norm_pooled = config.norm_pooled
        self.rope = (config.width // config.heads, config.rope_base) if config.positions == "rope" else None
        """Head width and base of rotary positions, if there are any."""
        self.recompute = False
        """Whether the backward pass recomputes the activations inside a block, so that only its input [T, D] is stored
        (activation checkpointing, arXiv 1604.06174)."""

    def forward(
        self,
        x: Tensor,
        segments: Segments,
        plan: MergePlan | None = None,
        count: int = 1,
        coordinates: Tensor | None = None,
    ) -> tuple[list[Tensor], list[Merge | None]]:
        """Run all blocks.

        Args:
            x: [T, D].
            segments: of the T tokens.
            plan: the merge plan; None: nothing merges.
            count: number of last blocks whose outputs to return; all outputs if there are fewer blocks.
            coordinates: [T, 2], see `ops.positions.centered`, for rotary positions; otherwise not read. A merged token
                is at the mean place of its patches.

        Returns:
            The outputs of the last `count` blocks after the final LayerNorm (before it if `norm_pooled`), [T', D] each,
            where T' shrinks as tokens merge; and the merges of each block, None for blocks that merge nothing.
        """
        tokens, sizes = len(x), None
        rotation: tuple[Tensor, Tensor] | None = None
        merging: Merge | None = None
        x = pad_rows(x)
        outputs: list[Tensor] = []
        merges: list[Merge | None] = []
        for number, block in enumerate(self.layers):
            if self.rope is not None and coordinates is not None and (rotation is None or merging is not None):
                rotation = rotations(pad_rows(coordinates), *self.rope)
            call: Callable[..., Any] = block
            if self.recompute and torch.is_grad_enabled():
                # There is no dropout, so no state of the random generator to restore.
                call = partial(checkpoint, block, use_reentrant=False, preserve_rng_state=False)
            before = sizes
            x, sizes, merging = call(x, segments, sizes, plan, number, rotation)
            merges.append(merging)
            if merging is not None and self.rope is not None and coordinates is not None:
                weights = coordinates.new_ones(tokens) if before is None else before
                coordinates, _ = merge(coordinates, weights, merging)
            if plan is not None:
                # The plan's host-side number and not len(x), because pad rows follow the tokens on a CPU.
                segments, tokens = plan.segments[number + 1], plan.totals[number + 1]
            if number >= len(self.layers) - count:
                outputs.append((x if self.norm_pooled else self.norm(x))[:tokens])
        return outputs, merges


class LearnedPositions(nn.Module):
    """What the two kinds of learned positions share: how a view reads a table of another size than its grid.

    Args:
        size: rows and columns of the table.
        resampling: see `ops.positions.axis_weights`.
        square: see `Architecture.square_positions`.
    """

    def __init__(self, size: tuple[int, int], resampling: Resampling, square: bool) -> None:
        super().__init__()
        self.size = size
        self.resampling: Resampling = resampling
        self.square = square

    def weights(self, positions: Tensor, grids: Tensor, cu_seqlens: Tensor) -> list[Tensor]:
        """Return how tokens read the rows and the columns of the table, see `ops.positions.axis_weights`."""
        if self.square:
            grids = grids.amax(dim=1, keepdim=True).expand(-1, 2)
        extents = grids[segment_ids(cu_seqlens, positions.shape[0])]  # [T, 2]
        return [
            axis_weights(positions[:, axis], extents[:, axis], self.size[axis], self.resampling) for axis in range(2)
        ]


class FactorizedPositions(LearnedPositions):
    """The sum of a learnable table for rows and one for columns (NaViT, arXiv 2307.06304, section 2.1).

    Args:
        width: D, a multiple of 4.
        size: entries of the table of rows and of that of columns.
        resampling, square: see `LearnedPositions`.
    """

    def __init__(
        self, width: int, size: tuple[int, int], resampling: Resampling = "squeeze", square: bool = False
    ) -> None:
        super().__init__(size, resampling, square)
        self.rows = nn.Parameter(torch.empty(size[0], width))
        self.cols = nn.Parameter(torch.empty(size[1], width))

    def forward(self, positions: Tensor, grids: Tensor, cu_seqlens: Tensor) -> Tensor:
        """Return the embedding [T, D] of `positions` [T, 2] in the `grids` [V, 2]."""
        rows, cols = self.weights(positions, grids, cu_seqlens)
        # At least float32, under autocast too: the residual stream starts here and keeps this precision.
        dtype = torch.promote_types(torch.float32, self.rows.dtype)
        with torch.autocast(rows.device.type, enabled=False):
            return rows.to(dtype) @ self.rows.to(dtype) + cols.to(dtype) @ self.cols.to(dtype)


class TablePositions(LearnedPositions):
    """A learnable table of all places of a grid, resized to the grid of each view (ViT, arXiv 2010.11929, section 3.2).

    Args:
        width: D, a multiple of 4.
        size: rows and columns of the table.
        resampling, square: see `LearnedPositions`.
    """

    def __init__(self, width: int, size: tuple[int, int], resampling: Resampling, square: bool = False) -> None:
        super().__init__(size, resampling, square)
        self.table = nn.Parameter(torch.empty(*size, width))

    def forward(self, positions: Tensor, grids: Tensor, cu_seqlens: Tensor) -> Tensor:
        """Return the embedding [T, D] of `positions` [T, 2] in the `grids` [V, 2]."""
        rows, cols = self.weights(positions, grids, cu_seqlens)
        dtype = torch.promote_types(torch.float32, self.table.dtype)  # as in `FactorizedPositions`
        with torch.autocast(rows.device.type, enabled=False):
            weights = (rows[:, :, None] * cols[:, None]).flatten(1)  # [T, rows * columns]
            return weights.to(dtype) @ self.table.flatten(0, 1).to(dtype)


class SinCosPositions(nn.Module):
    """Fixed 2-D sine-cosine positions, those of I-JEPA's released weights.

    Args:
        width: D, a multiple of 4.
        size: rows and columns of the grid that longer ones are squeezed onto.
        resampling: squeeze or none; see `Architecture.resampling`.
    """

    def __init__(self, width: int, size: tuple[int, int], resampling: Resampling = "squeeze") -> None:
        super().__init__()
        self.width = width
        self.size = size
        self.squeezes = resampling == "squeeze"

    def forward(self, positions: Tensor, grids: Tensor, cu_seqlens: Tensor) -> Tensor:
        """Return the embedding [T, D] of `positions` [T, 2] in the `grids` [V, 2]."""
        if not self.squeezes:
            return sincos_2d(positions[:, 0], positions[:, 1], self.width)
        extents = grids[segment_ids(cu_seqlens, positions.shape[0])]  # [T, 2]
        rows, cols = (axis_coordinates(positions[:, axis], extents[:, axis], self.size[axis]) for axis in range(2))
        return sincos_2d(rows, cols, self.width)


def make_positions(config: Architecture) -> nn.Module | None:
    """Return the embedding of positions that is added to the patches; None for rotary positions."""
    if config.positions == "rope":
        return None
    if config.positions == "sincos":
        return SinCosPositions(config.width, config.position_grid, config.resampling)
    kind = FactorizedPositions if config.positions == "factorized" else TablePositions
    return kind(config.width, config.position_grid, config.resampling, config.square_positions)


@torch.no_grad()
def init_weights(module: nn.Module) -> None:
    """Initialize weights as I-JEPA does: truncated normal with a standard deviation of 0.02, zero biases.

    The two layers of a block that write into the residual stream are divided by sqrt(2 * layer) (I-JEPA's code, after
    BEiT, arXiv 2106.08254, section 2.5). Learnable positions start as I-JEPA's fixed ones. If they started as small
    random numbers, mask tokens at different positions would be almost equal, and learning would stall (docs/log.md,
    2026-11-24).
    """
    for part in module.modules():
        if isinstance(part, nn.Linear):
            nn.init.trunc_normal_(part.weight, std=0.02)
            if part.bias is not None:
                nn.init.zeros_(part.bias)
        elif isinstance(part, FactorizedPositions):
            # Each table holds its half of the channels and 0 in the other, so that their sum is the fixed embedding.
            width = part.rows.shape[1]
            encodes_column = torch.arange(width) < width // 2
            for table, own in ((part.cols, encodes_column), (part.rows, ~encodes_column)):
                entries = torch.arange(len(table))
                table.copy_(sincos_2d(entries, entries, width) * own)
        elif isinstance(part, TablePositions):
            rows, cols = torch.meshgrid(*map(torch.arange, part.size), indexing="ij")
            part.table.copy_(sincos_2d(rows.flatten(), cols.flatten(), part.table.shape[2]).view(part.table.shape))
    # After the loop above, which sets the weights that are divided here.
    for part in module.modules():
        if isinstance(part, nn.ModuleList):
            for number, layer in enumerate(part, start=1):
                for name in ("proj", "fc2"):
                    layer.get_submodule(name).get_parameter("weight").div_((2.0 * number) ** 0.5)
