"""The predictor: from the context's features to those of the hidden blocks."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ijepa_enhanced.models.blocks import Blocks, FactorizedPositions, init_weights
from ijepa_enhanced.packed import Queries


@dataclass(frozen=True)
class PredictorConfig:
    """The predictor's size; defaults are those of the original for ViT-S (width 256, depth 4)."""

    width: int = 256
    """Width of its tokens: narrower than the encoder's is better (I-JEPA, arXiv 2301.08243, ablations)."""
    depth: int = 4
    """Number of blocks."""
    heads: int = 4
    """Attention heads, which divide the width."""

    def __post_init__(self) -> None:
        if min(self.width, self.depth, self.heads) < 1 or self.width % self.heads or self.width % 4:
            raise ValueError(
                f"predictor.width must be a positive multiple of 4 and of predictor.heads, not {self.width} with "
                f"{self.heads} heads, and predictor.depth at least 1, not {self.depth}."
            )


class Predictor(nn.Module):
    """A narrow Vision Transformer with positions of its own (I-JEPA, arXiv 2301.08243, section 3).

    Args:
        config: its size.
        encoder_width: D, the width of what it reads and of what it predicts.
        max_grid: entries of each axis's position table.
    """

    def __init__(self, config: PredictorConfig, encoder_width: int, max_grid: int) -> None:
        super().__init__()
        self.embed = nn.Linear(encoder_width, config.width)
        self.mask_token = nn.Parameter(torch.empty(1, config.width))
        self.positions = FactorizedPositions(config.width, max_grid)
        self.blocks = Blocks(config.width, config.depth, config.heads, mlp_ratio=4.0)
        self.head = nn.Linear(config.width, encoder_width)
        init_weights(self)
        nn.init.trunc_normal_(self.mask_token, std=0.02)

    def forward(self, context: Tensor, queries: Queries) -> Tensor:
        """The student's features of the context [Tc, D] -> predicted features [Tq, D], one for each of the answers."""
        cu_seqlens = queries.segments.cu_seqlens
        embedded = self.embed(context)
        rows = torch.cat([embedded, self.mask_token.to(embedded.dtype)])
        x = rows[queries.source] + self.positions(queries.positions, queries.grids, cu_seqlens)
        x, _ = self.blocks(x, queries.segments)
        predicted: Tensor = self.head(x[queries.answers])
        return predicted
