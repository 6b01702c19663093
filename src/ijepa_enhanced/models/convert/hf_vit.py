"""`IJepaModel` and `ViTModel` of transformers."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from torch import Tensor

from ijepa_enhanced.models.config import Architecture
from ijepa_enhanced.models.convert.imported import Config, Imported, is_sincos, processed, square_patch
from ijepa_enhanced.models.convert.reader import Names, Reader, take_trunk

SHARED_RENAMES = (
    (r"^encoder\.layer\.", "layers."),
    (r"attention\.attention\.query", "attention.q_proj"),
    (r"attention\.attention\.key", "attention.k_proj"),
    (r"attention\.attention\.value", "attention.v_proj"),
    (r"attention\.output\.dense", "attention.o_proj"),
)
"""From the names in files to those in memory since transformers 5, of ViT and of models that follow it."""
RENAMES = (
    (r"^(ijepa|vit)\.", ""),  # of models with a head
    *SHARED_RENAMES,
    (r"intermediate\.dense", "mlp.fc1"),
    (r"(layers\.\d+)\.output\.dense", r"\1.mlp.fc2"),
)
IGNORED = (r"embeddings\.mask_token", r"pooler\.dense\.\w+", r"classifier\.\w+")
QKV = ("attention.q_proj", "attention.k_proj", "attention.v_proj")
NAMES = Names(
    "embeddings.patch_embeddings.projection",
    "layers.{}.",
    "layernorm_before",
    QKV,
    "attention.o_proj",
    "",
    "layernorm_after",
    ("mlp.fc1",),
    "mlp.fc2",
    "",
    "layernorm",
)


def convert(tensors: Mapping[str, Tensor], config: Config, processor: Config) -> Imported:
    """Convert weights with the configuration of the model and of its image processor.

    At other sizes than the native one, transformers interpolates positions bicubically. I-JEPA's are the fixed
    sine-cosine positions of a grid: they are computed for every grid, as the paper's code would.

    Raises:
        EncoderError: something does not fit.
    """
    reader = Reader(tensors, RENAMES, IGNORED)
    kind = config.values["model_type"]
    side = square_patch(config)
    config.must_be("hidden_act", "gelu")
    height, width = config.pair("image_size")
    grid = height // side, width // side
    architecture = Architecture(
        config.number("hidden_size"),
        config.number("num_hidden_layers"),
        config.number("num_attention_heads"),
        config.number("intermediate_size"),
        side,
        positions="table",
        position_grid=grid,
        resampling="bicubic",
        class_token=kind == "vit",
        norm_eps=config.number("layer_norm_eps"),
    )
    unbiased = () if config.values.get("qkv_bias", True) else QKV
    state = take_trunk(reader, architecture, NAMES, unbiased)
    prefix, channels = architecture.prefix, architecture.width
    dtype = reader.peek("embeddings.position_embeddings", 3).dtype
    table = reader.take("embeddings.position_embeddings", 1, prefix + grid[0] * grid[1], channels)[0]
    if prefix:
        state["prefix"] = reader.take("embeddings.cls_token", 1, 1, channels)[0] + table[:1]
    reader.finish()
    state["positions.table"] = table[prefix:].view(*grid, channels).clone()
    if kind == "ijepa" and is_sincos(state["positions.table"], dtype):
        del state["positions.table"]
        architecture = dataclasses.replace(architecture, positions="sincos", resampling="none")
    pooling, default = ("cls", (0.5, 0.5, 0.5)) if prefix else ("mean", None)  # default of ViTImageProcessor
    return Imported(
        architecture, processed(processor, (height, width), pooling, default), state, f"transformers {kind}"
    )
