"""Preprocessing on the device: from uint8 patches to the normalized patches that a network takes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
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


class Convert(nn.Module):
    """From the normalized patches of one network to those of another.

    Args:
        source, target: mean and standard deviation of each channel, C values each.
        patch_sizes: P of both. Patches are resized one by one, bilinearly, so that both networks see the same grid.
    """

    scale: Tensor
    shift: Tensor

    def __init__(
        self,
        source: tuple[Sequence[float], Sequence[float]],
        target: tuple[Sequence[float], Sequence[float]],
        patch_sizes: tuple[int, int],
    ) -> None:
        super().__init__()
        (source_mean, source_std), (mean, std) = (tuple(map(torch.tensor, values)) for values in (source, target))
        self.before, self.after = patch_sizes
        self.register_buffer("scale", source_std / std, persistent=False)
        self.register_buffer("shift", (source_mean - mean) / std, persistent=False)

    def forward(self, packed: Packed) -> Packed:
        """Convert patches [T, P * P * C] into patches [T, P' * P' * C]."""
        values = packed.values.unflatten(1, (-1, len(self.scale))) * self.scale + self.shift  # [T, P * P, C]
        if self.before != self.after:
            images = values.unflatten(1, (self.before, self.before)).permute(0, 3, 1, 2)  # [T, C, P, P]
            images = F.interpolate(images, (self.after, self.after), mode="bilinear", antialias=True)
            values = images.permute(0, 2, 3, 1).flatten(1, 2)
        return packed.with_values(values.flatten(1))
