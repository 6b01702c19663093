"""Checkpoints of the official I-JEPA code (github.com/facebookresearch/ijepa, src/train.py)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal

from torch import Tensor

from ijepa_enhanced.errors import EncoderError
from ijepa_enhanced.models.config import Architecture
from ijepa_enhanced.models.convert.imported import Imported, is_sincos, preprocessing
from ijepa_enhanced.models.convert.reader import Names, Reader, is_state_dict, take_trunk
from ijepa_enhanced.models.variants import VARIANTS

NAMES = Names(
    "patch_embed.proj",
    "blocks.{}.",
    "norm1",
    ("attn.qkv",),
    "attn.proj",
    "ls1.gamma",
    "norm2",
    ("mlp.fc1",),
    "mlp.fc2",
    "ls2.gamma",
    "norm",
)
"""Those of timm, which the code of I-JEPA follows."""
PARTS = {"target": "target_encoder", "context": "encoder"}
"""Keys of the two encoders in the file. The paper evaluates the target encoder."""


def is_checkpoint(content: Any) -> bool:
    """Return whether the content of a file is such a checkpoint."""
    return isinstance(content, Mapping) and any(isinstance(content.get(key), Mapping) for key in PARTS.values())


def convert(checkpoint: Mapping[str, Any], encoder: Literal["target", "context"] = "target") -> Imported:
    """Convert one of the two encoders of a checkpoint; predictor and optimizer are not read.

    Raises:
        EncoderError: the encoder is not in the file, or it is not one of I-JEPA's.
    """
    weights: Mapping[str, Tensor] | None = checkpoint.get(PARTS[encoder])
    if not isinstance(weights, Mapping):
        (other,) = set(PARTS) - {encoder}
        raise EncoderError(f"'{PARTS[encoder]}' is missing. Load the {other} encoder: --encoder {other}.")
    if not is_state_dict(weights):
        raise EncoderError(f"'{PARTS[encoder]}' is not a state dict, which is a dictionary of tensors.")
    reader = Reader(weights, [(r"^module\.", "")])
    width, _, side, _ = reader.peek("patch_embed.proj.weight", 4).shape
    heads = {variant.width: variant.heads for variant in VARIANTS.values()}
    if width not in heads:
        known = ", ".join(map(str, heads))
        raise EncoderError(f"The encoder has a width of {width}, and I-JEPA's have {known}.")
    positions = reader.peek("pos_embed", 3)
    grid = math.isqrt(positions.shape[1])
    architecture = Architecture(
        width,
        reader.count(NAMES.block),
        heads[width],
        len(reader.peek("blocks.0.mlp.fc1.weight", 2)),
        side,
        positions="sincos",
        position_grid=(grid, grid),
        resampling="none",
    )
    table = reader.take("pos_embed", 1, grid * grid, width)
    state = take_trunk(reader, architecture, NAMES)
    reader.finish()
    if not is_sincos(table.view(grid, grid, width), positions.dtype):
        raise EncoderError(
            "The positions in pos_embed are not the sine-cosine positions of I-JEPA, so features would differ."
        )
    return Imported(
        architecture, preprocessing((grid * side, grid * side), "mean"), state, "I-JEPA", license="cc-by-nc-4.0"
    )
