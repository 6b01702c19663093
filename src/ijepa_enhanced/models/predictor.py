"""The predictor: from the features of the context to the features of the target tokens."""

import torch
from torch import Tensor, nn

from ijepa_enhanced.models.blocks import LAYER_NORM_EPS, CrossBlock, FactorizedPositions, init_weights
from ijepa_enhanced.models.config import PredictorConfig
from ijepa_enhanced.ops.linear import Linear, pad_rows
from ijepa_enhanced.packed import Packed


class Predictor(nn.Module):
    """A narrow transformer that predicts the features at given positions (I-JEPA, arXiv 2301.08243, section 3).

    Mask tokens attend only to the context of their view (CrossMAE, arXiv 2401.14391). They do not attend to each other,
    because a mask token holds nothing but its position. So the prediction at a position does not depend on which others
    are predicted, and the context is processed once for all of them.

    Args:
        config: size of the predictor.
        encoder_width: D, width of the features that it reads.
        target_width: width of the features that it predicts.
        grid: entries of the position table of rows and of that of columns.
    """

    def __init__(self, config: PredictorConfig, encoder_width: int, target_width: int, grid: tuple[int, int]) -> None:
        super().__init__()
        width = config.width
        self.embed = Linear(encoder_width, width)
        self.mask_token = nn.Parameter(torch.empty(1, width))
        self.positions = FactorizedPositions(width, grid)
        self.layers = nn.ModuleList(CrossBlock(width, config.heads, 4 * width) for _ in range(config.depth))
        self.norm = nn.LayerNorm(width, eps=LAYER_NORM_EPS)
        self.head = Linear(width, target_width)
        init_weights(self)
        nn.init.trunc_normal_(self.mask_token, std=0.02)

    def forward(self, features: Tensor, context: Packed, targets: Packed) -> Tensor:
        """Return the predicted features [Tq, D] of the target tokens.

        Args:
            features: [Tc, D], the student's features of the context tokens.
            context, targets: streams of the same V views, whose positions are read and whose values are not.
        """
        seen = self.embed(pad_rows(features)) + pad_rows(self._positions_of(context))  # [Tc, W]
        x = pad_rows(self.mask_token + self._positions_of(targets))  # [Tq, W]
        for layer in self.layers:
            x = layer(x, targets.segments, seen, context.segments)
        return self.head(self.norm(x))[: len(targets.positions)]  # without pad rows

    def _positions_of(self, stream: Packed) -> Tensor:
        return self.positions(stream.positions, stream.grids, stream.segments.cu_seqlens).to(self.mask_token.dtype)
