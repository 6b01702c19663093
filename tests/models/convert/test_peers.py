"""Outputs equal those of transformers and timm, at the native size and at others. Skipped where they are missing."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from ijepa_enhanced.encoder import Encoder
from ijepa_enhanced.errors import EncoderError
from ijepa_enhanced.models.convert.layouts import convert
from ijepa_enhanced.models.convert.timm_vit import OTHER_ARITHMETIC
from ijepa_enhanced.ops.positions import sincos_2d
from ijepa_enhanced.packed import Packed

# Norm of the difference by the norm: float32 rounds at 6e-8, through two blocks. 1.2e-6 was the largest seen.
BOUND = 2e-6

# Native, smaller, larger; elongated both ways.
SIZES = [(40, 40), (16, 24), (24, 64), (80, 72)]


def patches(x: Tensor, side: int) -> Tensor:
    """Pixels [3, h, w] as patches [tokens, P * P * 3], row by row."""
    channels, height, width = x.shape
    cut = x.view(channels, height // side, side, width // side, side)
    return cut.permute(1, 3, 2, 4, 0).reshape(-1, side * side * channels)


def restless(network: nn.Module) -> nn.Module:
    """Weights as after training: none is 0 or 1, so that each of them takes part."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for value in network.parameters():
            value.add_(0.1 * torch.randn(value.shape, generator=generator))
    return network.eval()


def distance(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


@torch.no_grad()
def assert_equal(
    encoder: Encoder, tokens: Callable[[Tensor], Tensor], pooled: Callable[[Tensor], Tensor] | None
) -> None:
    """Compare all tokens, and the feature of an image, of all sizes in one pack.

    Args:
        encoder: of ours.
        tokens: those of theirs, from pixels [1, 3, h, w] to [prefix + patches, D].
        pooled: the feature of theirs, from their tokens; None: they have another one.
    """
    generator = torch.Generator().manual_seed(1)
    images = [torch.randn(1, 3, *size, generator=generator) for size in SIZES]
    values = torch.cat([patches(image[0], 8) for image in images])
    packed = Packed.of_grids(values.numpy(), np.array(SIZES) // 8, encoder.config.prefix)
    features = encoder.network(packed, encoder.merge_plan(packed.segments, 0.0))
    for image, found, feature in zip(
        images, features.split(packed.segments.lengths), encoder.pool(features, packed), strict=True
    ):
        expected = tokens(image)
        assert distance(found, expected) < BOUND, tuple(image.shape)
        if pooled is not None:
            assert distance(feature, pooled(expected)) < BOUND, tuple(image.shape)


COMMON = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2, "patch_size": 8, "image_size": 40}
DINOV2 = COMMON | {"mlp_ratio": 2}
TRANSFORMERS = {
    "ViTModel": ("ViT", COMMON | {"intermediate_size": 64}),
    "ViTForImageClassification": ("ViT", COMMON | {"intermediate_size": 64, "qkv_bias": False}),
    "IJepaModel": ("IJepa", COMMON | {"intermediate_size": 64, "layer_norm_eps": 1e-6}),
    "IJepaForImageClassification": ("IJepa", COMMON | {"intermediate_size": 64}),
    "Dinov2Model": ("Dinov2", DINOV2),
    "Dinov2ForImageClassification": ("Dinov2", DINOV2 | {"use_swiglu_ffn": True}),
    "Dinov2WithRegistersModel": ("Dinov2WithRegisters", DINOV2 | {"num_register_tokens": 3}),
    "DINOv3ViTModel": ("DINOv3ViT", COMMON | {"intermediate_size": 64, "num_register_tokens": 4}),
    "DINOv3ViTBackbone": (
        "DINOv3ViT",
        COMMON | {"intermediate_size": 64, "use_gated_mlp": True, "hidden_act": "silu", "key_bias": True},
    ),
}


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_transformers(name: str, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers", reason="needs transformers")
    kind, values = TRANSFORMERS[name]
    torch.manual_seed(0)
    model = restless(getattr(transformers, name)(getattr(transformers, f"{kind}Config")(**values)))
    model.save_pretrained(tmp_path)
    if "Backbone" in name:  # it shares its weights with the model
        model = transformers.DINOv3ViTModel.from_pretrained(tmp_path).eval()
    base = getattr(model, kind.lower(), model)
    interpolated = {"interpolate_pos_encoding": True} if kind in ("ViT", "IJepa") else {}
    encoder = Encoder.from_pretrained(tmp_path)
    assert encoder.config.norm_eps == model.config.layer_norm_eps

    def tokens(image: Tensor) -> Tensor:
        found: Tensor = base(image, **interpolated).last_hidden_state[0]
        return found

    assert_equal(encoder, tokens, lambda x: x.mean(dim=0) if kind == "IJepa" else x[0])


@torch.no_grad()
def test_ijepa_at_any_size_has_computed_positions(tmp_path: Path) -> None:
    """Weights with the positions of a 5 x 5 grid, against a model of transformers with those of a 9 x 9 grid."""
    transformers = pytest.importorskip("transformers", reason="needs transformers")
    torch.manual_seed(0)
    values = COMMON | {"intermediate_size": 64}
    small, large = (
        restless(transformers.IJepaModel(transformers.IJepaConfig(**values | {"image_size": size})))
        for size in (40, 72)
    )
    for model, grid in ((small, 5), (large, 9)):
        rows, cols = torch.cartesian_prod(torch.arange(grid), torch.arange(grid)).unbind(1)
        model.embeddings.position_embeddings.copy_(sincos_2d(rows, cols, 48)[None])
    others = {name: value for name, value in small.state_dict().items() if "position" not in name}
    large.load_state_dict(others, strict=False)
    small.save_pretrained(tmp_path)
    encoder = Encoder.from_pretrained(tmp_path)
    assert encoder.config.positions == "sincos"
    for model, size in ((small, 40), (large, 72)):
        image = torch.randn(1, 3, size, size)
        packed = Packed.of_grids(patches(image[0], 8).numpy(), np.array([[size // 8, size // 8]]))
        assert distance(encoder.network(packed), model(image).last_hidden_state[0]) < BOUND


TIMM: dict[str, dict[str, Any]] = {
    "class token": {},
    "patches": {"class_token": False, "global_pool": "avg", "fc_norm": False},
    "norm after pooling": {"global_pool": "avg"},
    "registers": {"reg_tokens": 2, "init_values": 1e-5},
    "registers without positions": {"reg_tokens": 2, "no_embed_class": True},
    "no bias": {"qkv_bias": False, "proj_bias": False},
    "attention pooling": {"global_pool": "map"},
}


def save_timm(folder: Path, model: nn.Module, architecture: str, arguments: dict[str, Any]) -> None:
    """Write a folder as `timm.models.save_for_hf` does."""
    save_file(model.state_dict(), folder / "model.safetensors")
    config = {
        "architecture": architecture,
        "num_features": 48,
        "model_args": {"num_heads": 3} | arguments,
        "pretrained_cfg": {"input_size": [3, 40, 40], "mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5]},
    }
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize("name", TIMM)
def test_timm_vision_transformer(name: str, tmp_path: Path) -> None:
    timm = pytest.importorskip("timm.models.vision_transformer", reason="needs timm")
    arguments = TIMM[name]
    sizes = {"img_size": 40, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3, "mlp_ratio": 2}
    torch.manual_seed(0)
    model = restless(timm.VisionTransformer(**sizes, num_classes=3, dynamic_img_size=True, **arguments))
    save_timm(tmp_path, model, "vit_tiny_patch8", arguments)
    pooled = None if name == "attention pooling" else lambda x: model.forward_head(x[None], pre_logits=True)[0]
    assert_equal(Encoder.from_pretrained(tmp_path), lambda image: model.forward_features(image)[0], pooled)


def test_timm_swiglu(tmp_path: Path) -> None:
    timm = pytest.importorskip("timm", reason="needs timm")
    sizes = {"img_size": 40, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3, "dynamic_img_size": True}
    torch.manual_seed(0)
    model = restless(timm.create_model("vit_giant_patch14_dinov2", num_classes=0, **sizes))
    save_timm(tmp_path, model, "vit_giant_patch14_dinov2", {})
    assert_equal(Encoder.from_pretrained(tmp_path), lambda image: model.forward_features(image)[0], lambda x: x[0])


NAFLEX: dict[str, dict[str, Any]] = {
    "learned": {"class_token": True, "reg_tokens": 1, "global_pool": "token"},
    "learned without antialias": {"pos_embed_antialias": False, "global_pool": "avg", "fc_norm": False},
    "factorized": {"pos_embed": "factorized", "global_pool": "avg", "fc_norm": False},
    "factorized, keeps aspect": {
        "pos_embed": "factorized",
        "pos_embed_ar_preserving": True,
        "global_pool": "avg",
        "fc_norm": True,
        "reg_tokens": 4,
        "init_values": 1e-5,
    },
    "learned, keeps aspect": {"pos_embed_ar_preserving": True, "embed_proj_type": "conv", "global_pool": "avg"},
    "attention pooling": {"reg_tokens": 1},
}


@pytest.mark.parametrize("name", NAFLEX)
def test_timm_naflexvit(name: str, tmp_path: Path) -> None:
    timm = pytest.importorskip("timm.models.naflexvit", reason="needs timm")
    arguments = NAFLEX[name]
    sizes = {
        "patch_size": 8,
        "embed_dim": 48,
        "depth": 2,
        "num_heads": 3,
        "mlp_ratio": 2,
        "pos_embed_grid_size": (5, 5),
    }
    torch.manual_seed(0)
    model = restless(timm.NaFlexVit(timm.NaFlexVitCfg(**sizes, **arguments), num_classes=3))
    save_timm(tmp_path, model, "naflexvit_tiny", {"global_pool": "map"} | arguments)

    def tokens(image: Tensor) -> Tensor:
        found = model.forward_features(image)
        return (found["patches"] if isinstance(found, dict) else found)[0]

    pooled = None if name == "attention pooling" else lambda x: model.forward_head(x[None], pre_logits=True)[0]
    assert_equal(Encoder.from_pretrained(tmp_path), tokens, pooled)


def test_folders_that_timm_writes(tmp_path: Path) -> None:
    timm = pytest.importorskip("timm", reason="needs timm")
    arguments = {"img_size": 40, "patch_size": 8, "embed_dim": 192, "depth": 2}
    model = restless(timm.create_model("vit_tiny_patch16_224", dynamic_img_size=True, **arguments))
    timm.models.save_for_hf(model, tmp_path, model_args=arguments | {"dynamic_img_size": True})
    encoder = Encoder.from_pretrained(tmp_path)
    assert encoder.preprocessing.resolution == 40
    assert encoder.preprocessing.mean == model.pretrained_cfg["mean"]
    assert_equal(encoder, lambda image: model.forward_features(image)[0], lambda x: x[0])


@pytest.mark.slow
def test_no_vit_of_timm_is_taken_for_another() -> None:
    """Whatever converts by the name of its architecture has the heads, activations and norms that we assume."""
    timm = pytest.importorskip("timm", reason="needs timm")
    converted = 0
    for name in timm.list_models(["vit_*", "deit*", "naflexvit_*"]):
        if any(part in name for part in (*OTHER_ARITHMETIC, "sapiens", "lingbot", "_pe_", "relpos")):
            continue  # refused, or of classes whose weights have other names
        with torch.device("meta"):
            model = timm.create_model(name)
            config = {
                "architecture": name,
                "global_pool": model.global_pool,
                "pretrained_cfg": {"input_size": [3, *model.pretrained_cfg["input_size"][1:]]},
            }
            try:
                found = convert(dict(model.state_dict()), config, {}).architecture
            except EncoderError:
                continue
        converted += 1
        block = model.blocks[0]
        assert type(block) is timm.models.vision_transformer.Block, name
        assert not getattr(model, "pool_include_prefix", False), name
        assert (block.attn.num_heads, block.norm1.eps) == (found.heads, found.norm_eps), name
        assert type(block.mlp.act).__name__ == ("SiLU" if found.gated else "GELU"), name
        if name.startswith("naflexvit"):
            assert model.embeds.pos_embed_ar_preserving == found.square_positions, name
    assert converted > 50
