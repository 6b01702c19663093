"""`VisionTransformer` of timm, in folders as timm saves them for the Hub."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor

from ijepa_enhanced.errors import EncoderError
from ijepa_enhanced.models.config import Architecture
from ijepa_enhanced.models.convert.ijepa_checkpoint import NAMES
from ijepa_enhanced.models.convert.imported import Config, Imported, preprocessing
from ijepa_enhanced.models.convert.reader import Reader, take_trunk
from ijepa_enhanced.models.variants import VARIANTS

IGNORED = (r"head\.\w+", r"attn_pool\..+")
FOUND_IN_WEIGHTS = (
    *("embed_dim", "depth", "patch_size", "mlp_ratio", "qkv_bias", "proj_bias", "init_values", "class_token"),
    *("reg_tokens", "no_embed_class", "fc_norm", "in_chans"),
)
WITHOUT_EFFECT = (
    *("num_classes", "dynamic_img_size", "dynamic_img_pad", "strict_img_size", "weight_init", "fix_init"),
    *("drop_rate", "pos_drop_rate", "patch_drop_rate", "proj_drop_rate", "attn_drop_rate", "drop_path_rate"),
)
READ = ("img_size", "num_heads", "global_pool")
OTHER_ARITHMETIC = ("clip", "siglip", "beit3", "rpn", "rope", "dinov3")
"""Parts of the names of architectures whose activations, norms or positions differ. Weights do not always show it."""
HEADS = {variant.width: variant.heads for variant in VARIANTS.values()} | {1152: 16, 1664: 16}
"""Number of heads by width. Other architectures have heads of 64 channels."""
HEADS_BY_NAME = {"vit_base_patch16_gap_224": 16}
POOLING = {"token": "cls", "avg": "mean", "map": ""}
"""By what timm calls it; '' cannot be imported."""


def convert(tensors: Mapping[str, Tensor], config: Config) -> Imported:
    """Convert weights with the configuration beside them.

    Raises:
        EncoderError: something does not fit.
    """
    arguments = model_arguments(config, FOUND_IN_WEIGHTS + WITHOUT_EFFECT + READ)
    reader = Reader(tensors, ignored=IGNORED)
    width, _, side, _ = reader.peek("patch_embed.proj.weight", 4).shape
    table = reader.peek("pos_embed", 3)
    class_token = "cls_token" in reader
    registers = reader.peek("reg_token", 3).shape[1] if "reg_token" in reader else 0
    prefix = int(class_token) + registers
    size = image_size(config, arguments)
    grid, in_table = grid_of(table.shape[1], prefix, size and (size[0] // side, size[1] // side))
    architecture = Architecture(
        **trunk(reader, config, arguments, width, side),
        positions="table",
        position_grid=grid,
        resampling="bicubic-antialias",
        class_token=class_token,
        registers=registers,
    )
    table = reader.take("pos_embed", 1, in_table + grid[0] * grid[1], width)[0]
    state = take_trunk(reader, architecture, names_of(architecture), unbiased(reader))
    if prefix:
        state["prefix"] = take_prefix(reader, "", architecture)
        state["prefix"][:in_table] += table[:in_table]
    reader.finish()
    state["positions.table"] = table[in_table:].view(*grid, width).clone()
    return imported(config, arguments, architecture, state, size, "timm vit")


def model_arguments(config: Config, known: Collection[str]) -> dict[str, Any]:
    """Return the arguments of the model that were saved with it.

    Raises:
        EncoderError: the architecture cannot be loaded, or an argument is not one of the `known` ones.
    """
    name = str(config.values.get("architecture"))
    kind = name.partition("_")[0]
    if kind not in ("vit", "deit", "deit3", "naflexvit") or any(part in name for part in OTHER_ARITHMETIC):
        raise EncoderError(
            f"The architecture {name} of timm cannot be loaded. Those that start with vit, deit or naflexvit can, "
            f"except {', '.join(OTHER_ARITHMETIC)}."
        )
    arguments: dict[str, Any] = config.values.get("model_args") or {}
    strange = [name for name, value in arguments.items() if name not in known and value not in (None, False, "")]
    if strange:
        raise EncoderError(f"model_args.{strange[0]} in {config.file} is not supported.")
    return arguments


def image_size(config: Config, arguments: Mapping[str, Any]) -> tuple[int, int] | None:
    """Return height and width of the images that a model was trained on, or None if they are not known."""
    if arguments.get("img_size") is not None:
        return Config(arguments, "model_args").pair("img_size")
    size = pretrained(config).get("input_size")
    return (size[1], size[2]) if isinstance(size, list) and len(size) == 3 else None


def pretrained(config: Config) -> Mapping[str, Any]:
    """Return the values that describe the images; old folders have them beside the others."""
    return config.values.get("pretrained_cfg") or config.values


def grid_of(entries: int, prefix: int, expected: tuple[int, int] | None) -> tuple[tuple[int, int], int]:
    """Return the grid of a table of positions, and how many of its entries are for prefix tokens.

    Args:
        entries: of the table.
        prefix: class token and registers. The table has entries for all of them or for none.
        expected: the grid of the images, if it is known.

    Raises:
        EncoderError: the table is that of no grid.
    """
    counts = [(entries - others, others) for others in dict.fromkeys((prefix, 0))]
    for places, others in counts:
        if expected is not None and places == expected[0] * expected[1]:
            return expected, others
    for places, others in counts:
        root = math.isqrt(max(places, 0))
        if root and root * root == places:
            return (root, root), others
    raise EncoderError(f"pos_embed has {entries} entries, which are the places of no square grid.")


def trunk(reader: Reader, config: Config, arguments: Mapping[str, Any], width: int, side: int) -> dict[str, Any]:
    """Return the part of the architecture that all models of timm have in common."""
    name = str(config.values.get("architecture"))
    heads = arguments.get("num_heads") or HEADS_BY_NAME.get(name) or HEADS.get(width, max(1, width // 64))
    out = reader.peek("blocks.0.mlp.fc2.weight", 2)
    hidden = out.shape[1]
    return {
        "width": width,
        "depth": reader.count(NAMES.block),
        "heads": heads,
        "hidden": hidden,
        "patch_size": side,
        "layer_scale": "blocks.0.ls1.gamma" in reader,
        "gated": len(reader.peek("blocks.0.mlp.fc1.weight", 2)) == 2 * hidden,
        "norm_pooled": "fc_norm.weight" in reader,
    }


def names_of(architecture: Architecture) -> Any:
    """Return the names of the parts."""
    return dataclasses.replace(NAMES, norm="fc_norm") if architecture.norm_pooled else NAMES


def unbiased(reader: Reader) -> list[str]:
    """Return the layers that have no bias, told by the first block."""
    layers = (*NAMES.qkv, NAMES.proj, *NAMES.fc1, NAMES.fc2)
    return [layer for layer in layers if f"blocks.0.{layer}.bias" not in reader]


def take_prefix(reader: Reader, folder: str, architecture: Architecture) -> Tensor:
    """Return the class token and the registers: [prefix, D]."""
    tokens = [("cls_token", int(architecture.class_token)), ("reg_token", architecture.registers)]
    return torch.cat([reader.take(folder + name, 1, count, architecture.width)[0] for name, count in tokens if count])


def imported(
    config: Config,
    arguments: Mapping[str, Any],
    architecture: Architecture,
    state: dict[str, Tensor],
    size: tuple[int, int] | None,
    layout: str,
) -> Imported:
    """Return a model of timm that was converted.

    Raises:
        EncoderError: its pooling is not one of ours.
    """
    name = arguments.get("global_pool") or config.values.get("global_pool") or pretrained(config).get("global_pool")
    default = "cls" if architecture.class_token else "mean"
    pooling = POOLING.get(name) if name else default
    if pooling is None or (pooling == "cls" and not architecture.class_token):
        raise EncoderError(f"global_pool is '{name}' in {config.file}, but only token, avg and map can be loaded.")
    note = (
        ""
        if pooling
        else (
            f"Attention pooling (global_pool: map) is not imported. The feature of an image is "
            f"{'its class token' if default == 'cls' else 'the mean of its patches'} instead; patch features are exact."
        )
    )
    images = pretrained(config)
    return Imported(
        architecture,
        preprocessing(size, pooling or default, images.get("mean"), images.get("std")),
        state,
        layout,
        images.get("license"),
        note,
    )
