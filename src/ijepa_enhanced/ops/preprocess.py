"""From the bytes of a packed stream to what a network sees."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ijepa_enhanced.packed import Packed

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
"""ImageNet's statistics on [0, 1], the field's convention, so that imported weights see what they were trained on."""


class Normalize(nn.Module):
    """Shift and scale uint8 patches to the statistics of a data set.

    Args:
        mean, std: of each of C channels, on [0, 1].
        patch_size: P.
    """

    scale: Tensor
    shift: Tensor

    def __init__(self, mean: Sequence[float], std: Sequence[float], patch_size: int) -> None:
        super().__init__()
        deviation = torch.tensor(std)
        # Buffers, so that they move to the device once and not with every pack.
        self.register_buffer("scale", (1 / (255 * deviation)).repeat(patch_size**2), persistent=False)
        self.register_buffer("shift", (-torch.tensor(mean) / deviation).repeat(patch_size**2), persistent=False)

    def forward(self, packed: Packed) -> Packed:
        """uint8 patches [T, P * P * C] -> floating-point patches of the same shape."""
        return packed.with_values(packed.values * self.scale + self.shift)
