"""`Dinov2Model` and `Dinov2WithRegistersModel` of transformers."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ijepa_enhanced.models.config import Architecture
from ijepa_enhanced.models.convert.hf_vit import QKV, SHARED_RENAMES
from ijepa_enhanced.models.convert.imported import Config, Imported, processed, square_patch
from ijepa_enhanced.models.convert.reader import Names, Reader, take_trunk

RENAMES = (
    (r"^(dinov2|dinov2_with_registers)\.", ""),  # of models with a head
    *SHARED_RENAMES,
    (r"mlp\.weights_out", "mlp.down_proj"),
)
"""From the names in files to those in memory since transformers 5, except SwiGLU, see `names_of`."""
IGNORED = (r"embeddings\.mask_token", r"classifier\.\w+")


def names_of(reader: Reader, gated: bool) -> Names:
    """Return the names of the parts. Files have the two input layers of SwiGLU as one."""
    fc1: tuple[str, ...] = ("mlp.gate_proj", "mlp.up_proj") if gated else ("mlp.fc1",)
    if gated and "layers.0.mlp.weights_in.weight" in reader:
        fc1 = ("mlp.weights_in",)
    return Names(
        "embeddings.patch_embeddings.projection",
        "layers.{}.",
        "norm1",
        QKV,
        "attention.o_proj",
        "layer_scale1.lambda1",
        "norm2",
        fc1,
        "mlp.down_proj" if gated else "mlp.fc2",
        "layer_scale2.lambda1",
        "layernorm",
    )


def convert(tensors: Mapping[str, Tensor], config: Config, processor: Config) -> Imported:
    """Convert weights with the configuration of the model and of its image processor.

    Raises:
        EncoderError: something does not fit.
    """
    reader = Reader(tensors, RENAMES, IGNORED)
    kind = config.values["model_type"]
    gated = bool(config.values.get("use_swiglu_ffn", False))
    side = square_patch(config)
    config.must_be("hidden_act", "gelu")  # SwiGLU does not read it
    height, width = config.pair("image_size")
    grid = height // side, width // side
    architecture = Architecture(
        config.number("hidden_size"),
        config.number("num_hidden_layers"),
        config.number("num_attention_heads"),
        hidden_of(config, gated),
        side,
        positions="table",
        position_grid=grid,
        resampling="bicubic" if kind == "dinov2" else "bicubic-antialias",
        class_token=True,
        registers=config.number("num_register_tokens") if kind == "dinov2_with_registers" else 0,
        layer_scale=True,
        gated=gated,
        norm_eps=config.number("layer_norm_eps"),
    )
    unbiased = () if config.values.get("qkv_bias", True) else QKV
    state = take_trunk(reader, architecture, names_of(reader, gated), unbiased)
    channels = architecture.width
    table = reader.take("embeddings.position_embeddings", 1, 1 + grid[0] * grid[1], channels)[0]
    prefix = [reader.take("embeddings.cls_token", 1, 1, channels)[0] + table[:1]]
    if architecture.registers:  # which have no positions
        prefix.append(reader.take("embeddings.register_tokens", 1, architecture.registers, channels)[0])
    reader.finish()
    state["prefix"] = torch.cat(prefix)
    state["positions.table"] = table[1:].view(*grid, channels).clone()
    return Imported(
        architecture, processed(processor, (height, width), "cls"), state, f"transformers {kind}", license="apache-2.0"
    )


def hidden_of(config: Config, gated: bool) -> int:
    """Return the width of the hidden layer: two thirds, rounded up to a multiple of 8, for SwiGLU."""
    hidden = int(config.number("hidden_size") * config.number("mlp_ratio"))
    return (int(hidden * 2 / 3) + 7) // 8 * 8 if gated else hidden
