"""What a conversion reads and returns."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ijepa_enhanced.errors import EncoderError
from ijepa_enhanced.models.config import Architecture
from ijepa_enhanced.models.preprocessing import Preprocessing
from ijepa_enhanced.ops.positions import sincos_2d
from ijepa_enhanced.ops.preprocess import CHANNELS, IMAGENET_MEAN, IMAGENET_STD


@dataclass(frozen=True)
class Imported:
    """Released weights in our layout."""

    architecture: Architecture
    preprocessing: Preprocessing
    weights: dict[str, Tensor]
    """The state dict of a `VisionTransformer` of this architecture. No tensor is a view of a larger one, because
    `torch.export` would save all of it."""
    layout: str
    """See `Origin.layout`."""
    license: str | None = None
    """License of all weights in this layout. None: it depends on the weights."""
    note: str = ""
    """What the user should know about them, in one or two sentences."""


class Config:
    """The values of a JSON file that describes weights.

    Args:
        values: of the file.
        file: its name, for messages.
    """

    def __init__(self, values: Mapping[str, Any], file: str = "config.json") -> None:
        self.values = values
        self.file = file

    def number(self, key: str) -> Any:
        """Return a number that must be there.

        Raises:
            EncoderError: it is not.
        """
        value = self.values.get(key)
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise EncoderError(f"{self.file} must give {key} as a number, not {value!r}.")
        return value

    def pair(self, key: str) -> tuple[int, int]:
        """Return height and width, which are equal if there is one number.

        Raises:
            EncoderError: it is neither one number nor two.
        """
        value = self.values.get(key)
        pair = (value, value) if isinstance(value, int) else value
        if not isinstance(pair, (list, tuple)) or len(pair) != 2 or not all(isinstance(part, int) for part in pair):
            raise EncoderError(f"{self.file} must give {key} as one or two integers, not {value!r}.")
        return pair[0], pair[1]

    def must_be(self, key: str, *known: Any) -> None:
        """Raise EncoderError if a value is there and is none of the known ones, the first of which is the default."""
        value = self.values.get(key, known[0])
        if value not in known:
            raise EncoderError(f"{key} is {value!r} in {self.file}, but only {known[0]!r} can be loaded.")


def square_patch(config: Config) -> int:
    """Return the patch size.

    Raises:
        EncoderError: patches are not squares, or the images are not RGB.
    """
    height, width = config.pair("patch_size")
    if height != width:
        raise EncoderError(f"patch_size is {height} x {width} in {config.file}, but patches must be squares.")
    config.must_be("num_channels", CHANNELS)
    return height


def preprocessing(size: tuple[int, int] | None, pooling: str, mean: Any = None, std: Any = None) -> Preprocessing:
    """Return the preprocessing of weights that were trained on images of one size.

    Args:
        size: height and width in pixels; None: all sizes.
        pooling: cls or mean.
        mean, std: of each channel; None: those of ImageNet.

    Raises:
        EncoderError: mean and std are not 3 numbers each.
    """
    for name, values in (("mean", mean), ("std", std)):
        numbers = isinstance(values, (list, tuple)) and all(isinstance(value, (int, float)) for value in values)
        if values is not None and not (numbers and len(values) == CHANNELS):
            raise EncoderError(f"The {name} of the images must be {CHANNELS} numbers, not {values!r}.")
    return Preprocessing(
        resolution=None if size is None else round(math.sqrt(size[0] * size[1])),
        mean=IMAGENET_MEAN if mean is None else tuple(mean),
        std=IMAGENET_STD if std is None else tuple(std),
        pooling="cls" if pooling == "cls" else "mean",
    )


def processed(
    processor: Config, native: tuple[int, int], pooling: str, default: tuple[float, ...] | None = None
) -> Preprocessing:
    """Return the preprocessing that an image processor of transformers does.

    Args:
        processor: its configuration; without values if there is none.
        native: height and width in pixels of the table of positions, used if the processor gives no size.
        pooling: cls or mean.
        default: mean and std if the processor gives none; None: those of ImageNet.
    """
    values = processor.values
    crops = "crop_size" in values and values.get("do_center_crop", True)
    size = values.get("crop_size" if crops else "size")
    if isinstance(size, Mapping):
        size = [size.get("height", size.get("shortest_edge")), size.get("width", size.get("shortest_edge"))]
    elif isinstance(size, int):
        size = [size, size]
    if not isinstance(size, list) or len(size) != 2 or not all(isinstance(edge, int) for edge in size):
        size = native
    mean, std = values.get("image_mean", default), values.get("image_std", default)
    if not values.get("do_normalize", True):
        mean, std = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
    return preprocessing((size[0], size[1]), pooling, mean, std)


def is_sincos(table: Tensor, dtype: torch.dtype) -> bool:
    """Return whether a table [rows, columns, D] holds I-JEPA's fixed positions.

    Args:
        table: in float32.
        dtype: in which it was saved, whose rounding is allowed.
    """
    height, width, channels = table.shape
    if channels % 4:
        return False
    rows, cols = torch.cartesian_prod(torch.arange(height), torch.arange(width)).unbind(1)
    fixed = sincos_2d(rows, cols, channels)
    # Angles below 64, rounded to float32 twice; and numbers up to 1 in the type of the file.
    bound = 2 * 64 * 2**-24 + torch.finfo(dtype).eps
    return bool((table.flatten(0, 1) - fixed).abs().max() <= bound)
