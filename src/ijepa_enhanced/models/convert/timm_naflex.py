"""`NaFlexVit` of timm, in folders as timm saves them for the Hub."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ijepa_enhanced.models.config import Architecture
from ijepa_enhanced.models.convert.imported import Config, Imported
from ijepa_enhanced.models.convert.reader import Reader, take_trunk
from ijepa_enhanced.models.convert.timm_vit import (
    FOUND_IN_WEIGHTS,
    IGNORED,
    READ,
    WITHOUT_EFFECT,
    image_size,
    imported,
    model_arguments,
    names_of,
    take_prefix,
    trunk,
    unbiased,
)
from ijepa_enhanced.ops.preprocess import CHANNELS

POSITIONS = ("pos_embed", "pos_embed_grid_size", "embed_proj_type", "pos_embed_ar_preserving", "pos_embed_antialias")


def convert(tensors: Mapping[str, Tensor], config: Config) -> Imported:
    """Convert weights with the configuration beside them.

    Raises:
        EncoderError: something does not fit.
    """
    arguments = model_arguments(config, FOUND_IN_WEIGHTS + WITHOUT_EFFECT + READ + POSITIONS)
    reader = Reader(tensors, ignored=IGNORED)
    weight = reader.peek("embeds.proj.weight", 2, 4)
    width = len(weight)
    side = weight.shape[2] if weight.ndim == 4 else math.isqrt(weight.shape[1] // CHANNELS)
    registers = reader.peek("embeds.reg_token", 3).shape[1] if "embeds.reg_token" in reader else 0
    factorized = "embeds.pos_embed_y" in reader
    rows, cols = (
        (reader.peek(f"embeds.pos_embed_{axis}", 3).shape[1] for axis in "yx")
        if factorized
        else reader.peek("embeds.pos_embed", 4).shape[1:3]
    )
    grid = rows, cols
    antialias = arguments.get("pos_embed_antialias", True)
    architecture = Architecture(
        **trunk(reader, config, arguments, width, side),
        positions="factorized" if factorized else "table",
        position_grid=grid,
        resampling="linear" if factorized else "bicubic-antialias" if antialias else "bicubic",
        square_positions=keeps_aspect(config, arguments),
        class_token="embeds.cls_token" in reader,
        registers=registers,
    )
    state = take_trunk(
        reader, architecture, dataclasses.replace(names_of(architecture), patches="embeds.proj"), unbiased(reader)
    )
    if factorized:
        state["positions.rows"] = reader.take("embeds.pos_embed_y", 1, grid[0], width)[0]
        state["positions.cols"] = reader.take("embeds.pos_embed_x", 1, grid[1], width)[0]
    else:
        state["positions.table"] = reader.take("embeds.pos_embed", 1, *grid, width)[0]
    if architecture.prefix:
        state["prefix"] = take_prefix(reader, "embeds.", architecture)
    reader.finish()
    return imported(config, arguments, architecture, state, image_size(config, arguments), "timm naflexvit")


def keeps_aspect(config: Config, arguments: Mapping[str, Any]) -> bool:
    """Return whether positions keep the aspect ratio; names of architectures that do have `par` in them."""
    default = re.search(r"_par(fac)?_", config.values["architecture"]) is not None
    return bool(arguments.get("pos_embed_ar_preserving", default))
