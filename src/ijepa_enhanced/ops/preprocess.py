"""Preprocess on the device: recolor and normalize patches of pixels for a network."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ijepa_enhanced.batch import Colors
from ijepa_enhanced.packed import Packed, segment_ids

CHANNELS = 3
"""Number of channels of images, unless `data.channels` says otherwise: red, green and blue."""

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
"""Statistics of ImageNet's channels on [0, 1]: the convention of the field, and what released weights expect."""


def recolor(packed: Packed, colors: Colors) -> Tensor:
    """Return the patches of V views in their changed colors: float32 [T, P * P * C] on [0, 255], not rounded.

    If C is not 3, only the diagonals of the maps are used. Values are then neither clipped nor solarized, because
    floats can have any value.
    """
    views = segment_ids(packed.segments.cu_seqlens, len(packed.values))  # of each token
    channels = colors.affine.shape[1]
    pixels = packed.values.float().unflatten(1, (-1, channels))  # [T, P * P, C]
    maps = colors.affine[views].unsqueeze(1)  # [T, 1, C, C + 1]
    if channels != CHANNELS:
        scales = maps[..., :channels].diagonal(dim1=2, dim2=3)  # [T, 1, C]
        return torch.addcmul(maps[..., channels], pixels, scales).flatten(1)
    # A sum of products instead of a matrix product, which autocast would round to bfloat16.
    changed = maps[..., channels]
    for channel in range(channels):
        changed = torch.addcmul(changed, pixels[..., channel : channel + 1], maps[..., channel])
    changed = changed.flatten(1).clamp_(0, 255)
    # Below the middle x is less than 255 - x and stays; 510 - x is never less.
    top = torch.where(colors.solarized, 255.0, 510.0)[views].unsqueeze(1)
    return torch.minimum(changed, top - changed)


class Normalize(nn.Module):
    """Normalization of patches of pixels by the mean and standard deviation of each channel.

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

    def forward(self, packed: Packed, colors: Colors | None = None) -> Packed:
        """Normalize patches [T, P * P * C] of pixels on [0, 255] into floating-point patches of the same shape.

        Args:
            packed: V views.
            colors: of each view, changed before. None: they stay.
        """
        if colors is None:
            return packed.with_values(packed.values * self.scale + self.shift)
        return packed.with_values(recolor(packed, colors).mul_(self.scale).add_(self.shift))


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
