"""Networks of ours, written as the files of I-JEPA, transformers and timm are; their layouts by hand."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from ijepa_enhanced.models.config import Architecture
from ijepa_enhanced.models.vit import VisionTransformer

State = dict[str, Tensor]


def network_of(config: Architecture, seed: int = 0) -> VisionTransformer:
    """A network of multiples of 1 / 64, whose sums are exact."""
    network = VisionTransformer(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for value in network.parameters():
            value.copy_(torch.randint(-64, 65, value.shape, generator=generator) / 64)
    return network


def renamed(network: VisionTransformer, block: str, names: dict[str, list[str]], outer: dict[str, str]) -> State:
    """All but prefix and positions.

    Args:
        network: of ours.
        block: how names of a block start, with {} for its number.
        names: of the layers of a block, in which one of ours may be several.
        outer: names of the patch embedding and of the last norm.
    """
    found: State = {}
    for name, value in network.state_dict().items():
        if name.startswith("blocks.layers."):
            _, _, number, layer, *part = name.split(".")
            for theirs, chunk in zip(names[layer], value.chunk(len(names[layer])), strict=True):
                found[".".join([block.format(number), theirs, *part])] = chunk.clone()
        elif name.rpartition(".")[0] in outer:
            layer, _, part = name.rpartition(".")
            found[f"{outer[layer]}.{part}"] = value.clone()
    return found


def as_convolution(state: State, name: str, side: int) -> None:
    weight = state[f"{name}.weight"]
    state[f"{name}.weight"] = weight.view(len(weight), side, side, 3).permute(0, 3, 1, 2).contiguous()


def table_and_class_token(network: VisionTransformer) -> tuple[Tensor, Tensor]:
    """Positions [1, 1 + places, D] of a class token and patches, and the class token [1, 1, D] that this leaves."""
    own = torch.full_like(network.prefix[:1], 0.5)
    table = torch.cat([own, network.positions.table.flatten(0, 1)])[None]
    return table.detach(), (network.prefix[None, :1] - own).detach()


def sizes(network: VisionTransformer) -> dict[str, Any]:
    """The values that config.json of every model of transformers has."""
    config = network.config
    rows, cols = config.position_grid
    assert rows == cols
    return {
        "hidden_size": config.width,
        "num_hidden_layers": config.depth,
        "num_attention_heads": config.heads,
        "patch_size": config.patch_size,
        "image_size": rows * config.patch_size,
        "layer_norm_eps": config.norm_eps,
        "num_channels": 3,
    }


OLD_ATTENTION = {
    "qkv": [f"attention.attention.{name}" for name in ("query", "key", "value")],
    "proj": ["attention.output.dense"],
}
NEW_ATTENTION = {"qkv": [f"attention.{name}_proj" for name in "qkv"], "proj": ["attention.o_proj"]}
SCALES = {"scale1": ["layer_scale1.lambda1"], "scale2": ["layer_scale2.lambda1"]}
HF_OUTER = {"patch_embed": "embeddings.patch_embeddings.projection", "blocks.norm": "layernorm"}


def transformers_vit(network: VisionTransformer, kind: str, old: bool = True) -> tuple[State, dict[str, Any]]:
    """`IJepaModel` or `ViTModel`, with the names of files, or with those in memory."""
    norms = {"norm1": ["layernorm_before"], "norm2": ["layernorm_after"]}
    mlp = {"fc1": ["intermediate.dense"], "fc2": ["output.dense"]} if old else {"fc1": ["mlp.fc1"], "fc2": ["mlp.fc2"]}
    attention = OLD_ATTENTION if old else NEW_ATTENTION
    state = renamed(network, "encoder.layer.{}" if old else "layers.{}", norms | attention | mlp, HF_OUTER)
    as_convolution(state, "embeddings.patch_embeddings.projection", network.config.patch_size)
    if kind == "vit":
        table, state["embeddings.cls_token"] = table_and_class_token(network)
        state["pooler.dense.weight"] = torch.zeros(network.width, network.width)
    elif network.config.positions == "table":
        table = network.positions.table.detach().flatten(0, 1)[None]
    else:
        places = torch.cartesian_prod(*map(torch.arange, network.config.position_grid))
        table = network.positions(places, torch.empty(0), torch.empty(0))[None]
    state["embeddings.position_embeddings"] = table
    config = {"model_type": kind, "hidden_act": "gelu", "intermediate_size": network.config.hidden, "qkv_bias": True}
    return state, sizes(network) | config


def transformers_dinov2(network: VisionTransformer, kind: str, old: bool = True) -> tuple[State, dict[str, Any]]:
    """`Dinov2Model` or `Dinov2WithRegistersModel`."""
    gated = network.config.gated
    mlp = {"fc1": ["mlp.fc1"], "fc2": ["mlp.fc2"]}
    if gated and old:
        mlp = {"fc1": ["mlp.weights_in"], "fc2": ["mlp.weights_out"]}
    elif gated:
        mlp = {"fc1": ["mlp.gate_proj", "mlp.up_proj"], "fc2": ["mlp.down_proj"]}
    names = {"norm1": ["norm1"], "norm2": ["norm2"]} | SCALES | mlp | (OLD_ATTENTION if old else NEW_ATTENTION)
    state = renamed(network, "encoder.layer.{}", names, HF_OUTER)
    as_convolution(state, "embeddings.patch_embeddings.projection", network.config.patch_size)
    state["embeddings.position_embeddings"], state["embeddings.cls_token"] = table_and_class_token(network)
    state["embeddings.mask_token"] = torch.zeros(1, network.width)
    config = {"model_type": kind, "hidden_act": "gelu", "use_swiglu_ffn": gated}
    # SwiGLU keeps two thirds of the hidden layer, rounded up to a multiple of 8.
    config["mlp_ratio"] = network.config.hidden / network.width * (3 / 2 if gated else 1)
    if kind == "dinov2_with_registers":
        state["embeddings.register_tokens"] = network.prefix.detach()[None, 1:].clone()
        config["num_register_tokens"] = network.config.registers
    return state, sizes(network) | config


def transformers_dinov3(network: VisionTransformer, old: bool = True) -> tuple[State, dict[str, Any]]:
    """`DINOv3ViTModel`, whose keys have no bias."""
    config = network.config
    fc1 = ["mlp.gate_proj", "mlp.up_proj"] if config.gated else ["mlp.up_proj"]
    names = {"norm1": ["norm1"], "norm2": ["norm2"], "fc1": fc1, "fc2": ["mlp.down_proj"]} | SCALES | NEW_ATTENTION
    outer = {"patch_embed": "embeddings.patch_embeddings", "blocks.norm": "norm"}
    state = renamed(network, "layer.{}" if old else "model.layer.{}", names, outer)
    state = {name: value for name, value in state.items() if not name.endswith("k_proj.bias")}
    as_convolution(state, "embeddings.patch_embeddings", config.patch_size)
    state["embeddings.mask_token"] = torch.zeros(1, 1, config.width)
    state["embeddings.cls_token"] = network.prefix.detach()[None, :1].clone()
    state["embeddings.register_tokens"] = network.prefix.detach()[None, 1:].clone()
    return state, sizes(network) | {
        "model_type": "dinov3_vit",
        "hidden_act": "silu" if config.gated else "gelu",
        "intermediate_size": config.hidden,
        "use_gated_mlp": config.gated,
        "num_register_tokens": config.registers,
        "rope_theta": config.rope_base,
    }


TIMM = {
    "norm1": ["norm1"],
    "qkv": ["attn.qkv"],
    "proj": ["attn.proj"],
    "scale1": ["ls1.gamma"],
    "norm2": ["norm2"],
    "fc1": ["mlp.fc1"],
    "fc2": ["mlp.fc2"],
    "scale2": ["ls2.gamma"],
}


def timm_config(network: VisionTransformer, architecture: str) -> dict[str, Any]:
    config = network.config
    size = [side * config.patch_size for side in config.position_grid]
    return {
        "architecture": architecture,
        "num_features": config.width,
        "global_pool": "token" if config.class_token else "avg",
        "model_args": {"num_heads": config.heads, "img_size": size},
        "pretrained_cfg": {"input_size": [3, *size], "mean": [0.5] * 3, "std": [0.25] * 3, "license": "apache-2.0"},
    }


def timm_vit(network: VisionTransformer, prefix_in_table: bool = True) -> tuple[State, dict[str, Any]]:
    """`VisionTransformer` of timm. All prefix tokens have a position, or none."""
    norm = "fc_norm" if network.config.norm_pooled else "norm"
    state = renamed(network, "blocks.{}", TIMM, {"patch_embed": "patch_embed.proj", "blocks.norm": norm})
    as_convolution(state, "patch_embed.proj", network.config.patch_size)
    table = network.positions.table.detach().flatten(0, 1)
    state |= {"pos_embed": table[None], "head.weight": torch.zeros(2, network.width), "head.bias": torch.zeros(2)}
    if network.prefix is not None:
        own = torch.full_like(network.prefix, 0.5 if prefix_in_table else 0.0)
        if prefix_in_table:
            state["pos_embed"] = torch.cat([own, table])[None]
        tokens = (network.prefix - own).detach()[None]
        if network.config.class_token:
            state["cls_token"] = tokens[:, :1].clone()
        if network.config.registers:
            state["reg_token"] = tokens[:, int(network.config.class_token) :].clone()
    return state, timm_config(network, "vit_tiny_patch8")


def timm_naflexvit(network: VisionTransformer) -> tuple[State, dict[str, Any]]:
    """`NaFlexVit` of timm, with a linear patch embedding."""
    config = network.config
    norm = "fc_norm" if config.norm_pooled else "norm"
    state = renamed(network, "blocks.{}", TIMM, {"patch_embed": "embeds.proj", "blocks.norm": norm})
    if config.positions == "factorized":
        state["embeds.pos_embed_y"] = network.positions.rows.detach()[None]
        state["embeds.pos_embed_x"] = network.positions.cols.detach()[None]
    else:
        state["embeds.pos_embed"] = network.positions.table.detach()[None]
    if config.registers:
        state["embeds.reg_token"] = network.prefix.detach()[None]
    return state, timm_config(network, "naflexvit_tiny" + ("_par_gap" if config.square_positions else ""))


def ijepa_checkpoint(target: VisionTransformer, context: VisionTransformer) -> dict[str, Any]:
    """What the official code saves, with the names of DistributedDataParallel and the state of an optimizer."""

    def encoder(network: VisionTransformer) -> State:
        state = renamed(network, "blocks.{}", TIMM, {"patch_embed": "patch_embed.proj", "blocks.norm": "norm"})
        as_convolution(state, "patch_embed.proj", network.config.patch_size)
        places = torch.cartesian_prod(*map(torch.arange, network.config.position_grid))
        state["pos_embed"] = network.positions(places, torch.empty(0), torch.empty(0))[None]
        return {f"module.{name}": value for name, value in state.items()}

    return {
        "encoder": encoder(context),
        "predictor": {"module.mask_token": torch.zeros(1, 1, 384)},
        "target_encoder": encoder(target),
        "opt": {"state": {0: {"step": torch.tensor(1.0)}}, "param_groups": [{"lr": 0.001, "betas": (0.9, 0.999)}]},
        "scaler": {"scale": 65536.0},
        "epoch": 300,
        "loss": 0.1,
        "batch_size": 128,
        "world_size": 16,
        "lr": 1e-06,
    }


def small(**parts: Any) -> Architecture:
    """A small architecture."""
    return Architecture(**{"width": 48, "depth": 2, "heads": 2, "hidden": 64, "patch_size": 8} | parts)


TABLE = {"positions": "table", "position_grid": (5, 5), "resampling": "bicubic"}
ANTIALIASED = TABLE | {"resampling": "bicubic-antialias"}
DINO = {"class_token": True, "layer_scale": True}
FIXED = {"positions": "sincos", "position_grid": (5, 5), "resampling": "none"}

LAYOUTS: dict[str, tuple[Architecture, Callable[[VisionTransformer], tuple[State, dict[str, Any]]]]] = {
    "ijepa": (small(**FIXED, norm_eps=1e-12), lambda network: transformers_vit(network, "ijepa")),
    "ijepa in memory": (small(**FIXED), lambda network: transformers_vit(network, "ijepa", old=False)),
    "ijepa with other positions": (small(**TABLE), lambda network: transformers_vit(network, "ijepa")),
    "vit": (small(**TABLE, class_token=True, norm_eps=1e-12), lambda network: transformers_vit(network, "vit")),
    "vit in memory": (small(**TABLE, class_token=True), lambda network: transformers_vit(network, "vit", old=False)),
    "dinov2": (small(**TABLE, **DINO), lambda network: transformers_dinov2(network, "dinov2")),
    "dinov2 in memory": (small(**TABLE, **DINO), lambda network: transformers_dinov2(network, "dinov2", old=False)),
    "dinov2 gated": (small(**TABLE, **DINO, gated=True), lambda network: transformers_dinov2(network, "dinov2")),
    "dinov2 gated in memory": (
        small(**TABLE, **DINO, gated=True),
        lambda network: transformers_dinov2(network, "dinov2", old=False),
    ),
    "dinov2 with registers": (
        small(**ANTIALIASED, **DINO, registers=4),
        lambda network: transformers_dinov2(network, "dinov2_with_registers"),
    ),
    "dinov3": (small(positions="rope", **DINO, registers=4, norm_eps=1e-5), transformers_dinov3),
    "dinov3 gated in memory": (
        small(positions="rope", **DINO, registers=1, gated=True, rope_base=50.0),
        lambda network: transformers_dinov3(network, old=False),
    ),
    "timm vit": (small(**ANTIALIASED, class_token=True), timm_vit),
    "timm vit with registers": (small(**ANTIALIASED, **DINO, registers=2), timm_vit),
    "timm vit without positions of registers": (
        small(**ANTIALIASED, **DINO, registers=2),
        lambda network: timm_vit(network, prefix_in_table=False),
    ),
    "timm vit of patches": (small(**ANTIALIASED, norm_pooled=True), timm_vit),
    "timm vit of a wide grid": (small(**ANTIALIASED | {"position_grid": (3, 7)}, class_token=True), timm_vit),
    "timm vit gated": (small(**ANTIALIASED, class_token=True, gated=True), timm_vit),
    "naflexvit": (small(**ANTIALIASED | {"position_grid": (4, 6)}, registers=4, layer_scale=True), timm_naflexvit),
    "naflexvit factorized": (
        small(positions="factorized", position_grid=(4, 6), resampling="linear", norm_pooled=True),
        timm_naflexvit,
    ),
    "naflexvit that keeps the aspect ratio": (
        small(positions="factorized", position_grid=(6, 6), resampling="linear", square_positions=True),
        timm_naflexvit,
    ),
}
"""Architecture and writer of every layout that has a config.json."""


def write(folder: Path, state: State, config: dict[str, Any]) -> Path:
    """Write a folder as transformers and timm do."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file({name: value.contiguous() for name, value in state.items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def without_keys_bias(network: VisionTransformer) -> VisionTransformer:
    """The network with keys that have no bias, as those of DINOv3."""
    with torch.no_grad():
        for block in network.blocks.layers:
            block.qkv.bias[network.width : 2 * network.width] = 0
    return network


IJEPA = dataclasses.replace(small(**FIXED), width=192, heads=3, hidden=768)
"""Of a checkpoint of the official code, which does not say how many heads there are: those of a width that is known."""
