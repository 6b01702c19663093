"""Preprocessing on the device: from uint8 patches to the normalized patches that a network takes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ijepa_enhanced.packed import Packed

CHANNELS = 3

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
"""Statistics of ImageNet's channels on [0, 1]: the convention of the field, and what released weights expect."""


class Normalize(nn.Module):
    """Normalization of uint8 patches by the mean and standard deviation of each channel.

    Args:
        mean, std: C values each, for pixel values on [0, 1].
        patch_size: P.
    """

    scale: Tensor
    shift: Tensor

    def __init__(self, mean: Sequence[float], std: Sequence[float], patch_size: int) -> None:
        super().__init__()
        deviation = torch.tensor(std)
        # (x / 255 - mean) / std as one multiplication and one addition. Channels vary fastest within a patch.
        # Buffers move to the device once, with the module, instead of with every pack.
        self.register_buffer("scale", (1 / (255 * deviation)).repeat(patch_size**2), persistent=False)
        self.register_buffer("shift", (-torch.tensor(mean) / deviation).repeat(patch_size**2), persistent=False)

    def forward(self, packed: Packed) -> Packed:
        """Normalize uint8 patches [T, P * P * C] into floating-point patches of the same shape."""
        return packed.with_values(packed.values * self.scale + self.shift)
