"""The predictor: from the context's features to those of the hidden tokens."""

import torch
from torch import Tensor, nn

from ijepa_enhanced.models.blocks import LAYER_NORM_EPS, CrossBlock, FactorizedPositions, init_weights
from ijepa_enhanced.models.config import PredictorConfig
from ijepa_enhanced.ops.linear import Linear, pad_rows
from ijepa_enhanced.packed import Packed


class Predictor(nn.Module):
    """A narrow transformer that is asked for the features at some positions (I-JEPA, arXiv 2301.08243, section 3).

    Mask tokens attend to the context of their view alone (CrossMAE, arXiv 2401.14391): they hold nothing but their own
    position, so they have nothing to tell each other. A position's answer is the same whichever others are asked for,
    and the context is read once for all of them.

    Args:
        config: its size.
        encoder_width: D, the width of what it reads and of what it predicts.
        max_grid: entries of each axis's position table.
    """

    def __init__(self, config: PredictorConfig, encoder_width: int, max_grid: int) -> None:
        super().__init__()
        width = config.width
        self.embed = Linear(encoder_width, width)
        self.mask_token = nn.Parameter(torch.empty(1, width))
        self.positions = FactorizedPositions(width, max_grid)
        self.layers = nn.ModuleList(CrossBlock(width, config.heads, 4 * width) for _ in range(config.depth))
        self.norm = nn.LayerNorm(width, eps=LAYER_NORM_EPS)
        self.head = Linear(width, encoder_width)
        init_weights(self)
        nn.init.trunc_normal_(self.mask_token, std=0.02)

    def forward(self, features: Tensor, context: Packed, targets: Packed) -> Tensor:
        """The student's features [Tc, D] of the context's tokens -> predicted features [Tq, D] of the targets' tokens.

        Of the streams `context` and `targets`, of the same V views, only places are read.
        """
        seen = self.embed(pad_rows(features)) + pad_rows(self._places(context))
        x = pad_rows(self.mask_token + self._places(targets))
        for layer in self.layers:
            x = layer(x, targets.segments, seen, context.segments)
        return self.head(self.norm(x))[: len(targets.positions)]

    def _places(self, stream: Packed) -> Tensor:
        return self.positions(stream.positions, stream.grids, stream.segments.cu_seqlens)
