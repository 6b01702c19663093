"""`DINOv3ViTModel` of transformers."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ijepa_enhanced.models.config import Architecture
from ijepa_enhanced.models.convert.hf_vit import QKV
from ijepa_enhanced.models.convert.imported import Config, Imported, processed, square_patch
from ijepa_enhanced.models.convert.reader import Names, Reader, take_trunk

RENAMES = ((r"^(model\.)?layer\.", "layers."),)
"""From the names in files and from those in memory to one of ours."""
IGNORED = (r"embeddings\.mask_token", r"rope_embeddings\.inv_freq")
BIASES = {
    "query_bias": (True, ("attention.q_proj",)),
    "key_bias": (False, ("attention.k_proj",)),
    "value_bias": (True, ("attention.v_proj",)),
    "proj_bias": (True, ("attention.o_proj",)),
    "mlp_bias": (True, ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")),
}
"""By the name of an option: its default, and the layers that have a bias if it is set."""


def convert(tensors: Mapping[str, Tensor], config: Config, processor: Config) -> Imported:
    """Convert weights with the configuration of the model and of its image processor.

    Raises:
        EncoderError: something does not fit.
    """
    reader = Reader(tensors, RENAMES, IGNORED)
    gated = bool(config.values.get("use_gated_mlp", False))
    side = square_patch(config)
    config.must_be("hidden_act", "silu" if gated else "gelu")
    architecture = Architecture(
        config.number("hidden_size"),
        config.number("num_hidden_layers"),
        config.number("num_attention_heads"),
        config.number("intermediate_size"),
        side,
        positions="rope",
        rope_base=float(config.number("rope_theta")),
        class_token=True,
        registers=config.number("num_register_tokens"),
        layer_scale=True,
        gated=gated,
        norm_eps=config.number("layer_norm_eps"),
    )
    names = Names(
        "embeddings.patch_embeddings",
        "layers.{}.",
        "norm1",
        QKV,
        "attention.o_proj",
        "layer_scale1.lambda1",
        "norm2",
        ("mlp.gate_proj", "mlp.up_proj") if gated else ("mlp.up_proj",),
        "mlp.down_proj",
        "layer_scale2.lambda1",
        "norm",
    )
    unbiased = [
        layer
        for option, (default, layers) in BIASES.items()
        if not config.values.get(option, default)
        for layer in layers
    ]
    state = take_trunk(reader, architecture, names, unbiased)
    width = architecture.width
    prefix = [reader.take("embeddings.cls_token", 1, 1, width)[0]]
    if architecture.registers or "embeddings.register_tokens" in reader:
        prefix.append(reader.take("embeddings.register_tokens", 1, architecture.registers, width)[0])
    reader.finish()
    state["prefix"] = torch.cat(prefix)
    return Imported(
        architecture,
        processed(processor, config.pair("image_size"), "cls"),
        state,
        "transformers dinov3_vit",
        license="dinov3-license",
    )
