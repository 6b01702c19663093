"""An encoder as a folder of transformers, in the layout that its released models have."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from torch import Tensor

from ijepa_enhanced.card import header
from ijepa_enhanced.encoder import Encoder
from ijepa_enhanced.errors import RequestError
from ijepa_enhanced.files import make_folder, replacing
from ijepa_enhanced.models.convert.hf_dinov2 import hidden_of
from ijepa_enhanced.models.convert.imported import Config
from ijepa_enhanced.ops.preprocess import CHANNELS
from ijepa_enhanced.packed import Packed

BILINEAR = 2
"""Of Pillow's `Resampling`: the default of ViTImageProcessor."""

MLP_RATIOS = range(1, 17)
"""Of Dinov2; released models have 4."""

OLD_ATTENTION = {
    "qkv": ("attention.attention.query", "attention.attention.key", "attention.attention.value"),
    "proj": ("attention.output.dense",),
}
SCALES = {"scale1": ("layer_scale1.lambda1",), "scale2": ("layer_scale2.lambda1",)}
NORMS = {"norm1": ("norm1",), "norm2": ("norm2",)}
OUTER = {"patch_embed": ("embeddings.patch_embeddings.projection",), "blocks.norm": ("layernorm",)}

VIT = {
    **OLD_ATTENTION,
    "norm1": ("layernorm_before",),
    "norm2": ("layernorm_after",),
    "fc1": ("intermediate.dense",),
    "fc2": ("output.dense",),
}
DINOV2 = NORMS | OLD_ATTENTION | SCALES | {"fc1": ("mlp.fc1",), "fc2": ("mlp.fc2",)}
DINOV2_GATED = DINOV2 | {"fc1": ("mlp.weights_in",), "fc2": ("mlp.weights_out",)}
DINOV3 = (
    NORMS
    | SCALES
    | {
        "qkv": ("attention.q_proj", "attention.k_proj", "attention.v_proj"),
        "proj": ("attention.o_proj",),
        "fc1": ("mlp.up_proj",),
        "fc2": ("mlp.down_proj",),
    }
)
DINOV3_GATED = DINOV3 | {"fc1": ("mlp.gate_proj", "mlp.up_proj")}
"""Names in files of the layers of a block, by ours; several are the rows of one of ours, in this order."""


@dataclass(frozen=True)
class Model:
    """A model of transformers, and which of the parts that networks of ours may have it has."""

    kind: str
    """Its `model_type`."""
    name: str
    needs: frozenset[str]
    allows: frozenset[str] = frozenset()


CLASS_TOKEN, REGISTERS, LAYER_SCALE, SWIGLU, ROPE = (
    "a class token",
    "registers",
    "layer scale",
    "SwiGLU",
    "rotary positions",
)
MODELS = (
    Model("ijepa", "IJepaModel", frozenset()),
    Model("vit", "ViTModel", frozenset({CLASS_TOKEN})),
    Model("dinov2", "Dinov2Model", frozenset({CLASS_TOKEN, LAYER_SCALE}), frozenset({SWIGLU})),
    Model(
        "dinov2_with_registers",
        "Dinov2WithRegistersModel",
        frozenset({CLASS_TOKEN, LAYER_SCALE, REGISTERS}),
        frozenset({SWIGLU}),
    ),
    Model(
        "dinov3_vit",
        "DINOv3ViTModel",
        frozenset({CLASS_TOKEN, LAYER_SCALE, ROPE}),
        frozenset({REGISTERS, SWIGLU}),
    ),
)


def export(encoder: Encoder, folder: Path, grid: tuple[int, int]) -> Model:
    """Write a folder, and return the model of transformers that it is for.

    Args:
        encoder: on the CPU.
        folder: to create.
        grid: rows and columns of the images that it is for. Positions are computed for this grid.

    Raises:
        RequestError: transformers has no such model, or the folder cannot be created.
        OSError: a file cannot be written.
    """
    from safetensors.torch import save_file

    model = model_of(encoder)
    values = configuration(encoder, model, grid)
    with torch.no_grad():
        state = state_of(encoder, model, grid)
    make_folder(folder, new=True)
    with replacing(folder / "model.safetensors") as temporary:
        save_file(state, temporary, metadata={"format": "pt"})
    texts = {
        "preprocessor_config.json": json.dumps(processor(encoder, grid), indent=2),
        "README.md": card(encoder, model, grid),
        "config.json": json.dumps(values, indent=2),  # last: a folder without it is no model
    }
    for name, text in texts.items():
        with replacing(folder / name) as temporary:
            temporary.write_text(text + "\n", encoding="utf-8")
    return model


def model_of(encoder: Encoder) -> Model:
    """Return the model of transformers that computes the same.

    Raises:
        RequestError: transformers has no model for this encoder.
    """
    config = encoder.config
    if config.patch_embed != "linear":
        raise RequestError(
            "transformers cannot run this encoder: its patch embedding has a hidden layer (encoder.patch_embed: mlp)."
        )
    if config.norm_pooled:
        raise RequestError("transformers cannot run this encoder: its final LayerNorm comes after pooling, not before.")
    if config.class_token and encoder.preprocessing.pooling != "cls":
        raise RequestError(
            "transformers cannot run this encoder: it has a class token, but the feature of an image is the mean of "
            "its patches."
        )
    present = {
        CLASS_TOKEN: config.class_token,
        REGISTERS: config.registers > 0,
        LAYER_SCALE: config.layer_scale,
        SWIGLU: config.gated,
        ROPE: config.positions == "rope",
    }
    parts = {name for name, there in present.items() if there}
    for model in MODELS:
        if model.needs <= parts <= model.needs | model.allows:
            return model
    raise RequestError(
        "transformers cannot run this encoder: none of its models has all of these parts and no others: "
        f"{', '.join(name for name in present if name in parts)}."
    )


def configuration(encoder: Encoder, model: Model, grid: tuple[int, int]) -> dict[str, Any]:
    """Return the content of config.json.

    Raises:
        RequestError: the model cannot have these sizes.
    """
    config = encoder.config
    rows, cols = grid
    size = [rows * config.patch_size, cols * config.patch_size]
    values: dict[str, Any] = {
        "architectures": [model.name],
        "model_type": model.kind,
        "hidden_size": config.width,
        "num_hidden_layers": config.depth,
        "num_attention_heads": config.heads,
        "patch_size": config.patch_size,
        "image_size": size[0] if rows == cols else size,
        "num_channels": CHANNELS,
        "hidden_act": "gelu",
        "layer_norm_eps": config.norm_eps,
        "qkv_bias": True,
        "dtype": "float32",
    }
    if config.registers:
        values["num_register_tokens"] = config.registers
    if model.kind.startswith("dinov2"):
        if rows != cols:
            raise RequestError(f"{model.name} has positions of square grids only, not of {rows}x{cols}. Change --grid.")
        values["use_swiglu_ffn"] = config.gated
        # Whole numbers only: transformers refuses others.
        fits = (n for n in MLP_RATIOS if hidden_of(Config(values | {"mlp_ratio": n}), config.gated) == config.hidden)
        values["mlp_ratio"] = next(fits, None)
        if values["mlp_ratio"] is None:
            raise RequestError(
                f"{model.name} cannot have a hidden layer of {config.hidden} at a width of {config.width}: its "
                "mlp_ratio is a whole number."
            )
    else:
        values["intermediate_size"] = config.hidden
    if model.kind == "dinov3_vit":
        names = ("query_bias", "key_bias", "value_bias", "proj_bias", "mlp_bias")
        values |= dict.fromkeys(names, True) | {"num_register_tokens": config.registers}
        values |= {"use_gated_mlp": config.gated, "hidden_act": "silu" if config.gated else "gelu"}
        values["rope_theta"] = config.rope_base
    return values


def state_of(encoder: Encoder, model: Model, grid: tuple[int, int]) -> dict[str, Tensor]:
    """Return the weights with the names that they have in files of transformers."""
    gated, v3 = encoder.config.gated, model.kind == "dinov3_vit"
    if model.kind in ("ijepa", "vit"):
        names = VIT
    elif v3:
        names = DINOV3_GATED if gated else DINOV3
    else:
        names = DINOV2_GATED if gated else DINOV2
    outer = {"patch_embed": ("embeddings.patch_embeddings",), "blocks.norm": ("norm",)} if v3 else OUTER
    found: dict[str, Tensor] = {}
    for name, value in encoder.network.state_dict().items():
        if name.startswith("blocks.layers."):
            _, _, number, layer, *part = name.split(".")
            block, theirs = ("" if v3 else "encoder.") + f"layer.{number}.", names[layer]
        else:
            layer, *part = name.rpartition(".")[::2]
            block, theirs = "", outer.get(layer, ())  # neither prefix nor positions
        for their, rows in zip(theirs, value.chunk(max(1, len(theirs))), strict=False):
            found[".".join([block + their, *part])] = rows.clone()
    patches = f"{outer['patch_embed'][0]}.weight"
    side = encoder.config.patch_size
    found[patches] = found[patches].view(-1, side, side, CHANNELS).permute(0, 3, 1, 2).contiguous()
    return found | tokens_of(encoder, model, grid)


def tokens_of(encoder: Encoder, model: Model, grid: tuple[int, int]) -> dict[str, Tensor]:
    """Return class token, registers and positions; the class token has no position, as in our networks."""
    network, found = encoder.network, {}
    if network.prefix is not None:
        found["embeddings.cls_token"] = network.prefix[None, :1].clone()
        if encoder.config.registers or model.kind == "dinov3_vit":
            found["embeddings.register_tokens"] = network.prefix[None, 1:].clone()
    if model.kind.startswith("dino"):
        mask = (1, 1, network.width) if model.kind == "dinov3_vit" else (1, network.width)
        found["embeddings.mask_token"] = torch.zeros(mask)
    if network.positions is not None:
        pixels = encoder.config.patch_size**2 * CHANNELS
        blank = Packed.of_grids(np.zeros((grid[0] * grid[1], pixels), np.uint8), np.array([grid]))
        packed = encoder.preprocess(blank)
        table = network.positions(packed.positions, packed.grids, packed.segments.cu_seqlens)
        own = table.new_zeros(int(encoder.config.class_token), network.width)
        found["embeddings.position_embeddings"] = torch.cat([own, table])[None]
    return found


def processor(encoder: Encoder, grid: tuple[int, int]) -> dict[str, Any]:
    """Return the content of preprocessor_config.json."""
    height, width = (edge * encoder.config.patch_size for edge in grid)
    return {
        "image_processor_type": "ViTImageProcessor",
        "do_resize": True,
        "size": {"height": height, "width": width},
        "resample": BILINEAR,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(encoder.preprocessing.mean),
        "image_std": list(encoder.preprocessing.std),
    }


def card(encoder: Encoder, model: Model, grid: tuple[int, int]) -> str:
    """Return the content of README.md."""
    origin, pooled = encoder.origin, "[:, 0]" if encoder.config.class_token else ".mean(dim=1)"
    facts = header(origin, encoder.record) | {"library_name": "transformers"}
    height, width = (edge * encoder.config.patch_size for edge in grid)
    computed = "" if model.kind == "dinov3_vit" else ", for which its positions were computed"
    started = f"\n\nThe weights come from `{origin.name}` ({origin.layout})." if origin else ""
    return f"""---
{yaml.safe_dump(facts, sort_keys=False)}---

# Image encoder

`{model.name}` for images of {height} x {width} px{computed}. Exported by ijepa-enhanced.{started}

```python
from transformers import AutoImageProcessor, AutoModel

processor = AutoImageProcessor.from_pretrained(FOLDER)
model = AutoModel.from_pretrained(FOLDER)
tokens = model(**processor(image, return_tensors="pt")).last_hidden_state
feature = tokens{pooled}  # [1, {encoder.width}]
```"""
