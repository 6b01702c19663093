"""Weights in every layout, written by hand, become ours bit for bit."""

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from ijepa_enhanced import pretrained
from ijepa_enhanced.encoder import Encoder
from ijepa_enhanced.errors import EncoderError
from ijepa_enhanced.models.convert.layouts import convert
from ijepa_enhanced.models.preprocessing import Origin
from ijepa_enhanced.models.vit import VisionTransformer
from released import IJEPA, LAYOUTS, ijepa_checkpoint, network_of, small, transformers_vit, without_keys_bias, write


def assert_same(encoder: Encoder, network: VisionTransformer) -> None:
    assert encoder.config == network.config
    found = encoder.network.state_dict()
    assert found.keys() == network.state_dict().keys()
    for name, value in network.state_dict().items():
        assert torch.equal(found[name], value), name


@pytest.mark.parametrize("layout", LAYOUTS)
def test_weights_in_every_layout_become_ours(layout: str, tmp_path: Path) -> None:
    config, writer = LAYOUTS[layout]
    network = without_keys_bias(network_of(config)) if "dinov3" in layout else network_of(config)
    state, description = writer(network)
    encoder = Encoder.from_pretrained(write(tmp_path / "weights", state, description))
    assert_same(encoder, network)
    assert all(value.untyped_storage().nbytes() == value.nbytes for value in encoder.parameters())
    assert not encoder.training
    assert all(value.requires_grad for value in encoder.parameters())
    assert encoder.preprocessing.pooling == ("cls" if config.class_token else "mean")
    rows, cols = config.position_grid if config.positions != "rope" else (32, 32)
    assert encoder.preprocessing.resolution == round((rows * cols) ** 0.5 * 8)
    encoder.save_pretrained(tmp_path / "ours")
    again = Encoder.from_pretrained(tmp_path / "ours")
    assert_same(again, network)
    assert again.origin == encoder.origin
    assert again.preprocessing == encoder.preprocessing


@pytest.mark.parametrize("which", ["target", "context"])
def test_both_encoders_of_an_ijepa_checkpoint(tmp_path: Path, which: Any) -> None:
    networks = {"target": network_of(IJEPA, 0), "context": network_of(IJEPA, 1)}
    torch.save(ijepa_checkpoint(**networks), tmp_path / "IN1K-vit.ti.8.pth.tar")
    encoder = Encoder.from_pretrained(tmp_path / "IN1K-vit.ti.8.pth.tar", encoder=which)
    assert_same(encoder, networks[which])
    assert encoder.origin == Origin("IN1K-vit.ti.8.pth.tar", "I-JEPA", "cc-by-nc-4.0", which)
    assert encoder.preprocessing.mean == (0.485, 0.456, 0.406)


def test_the_target_encoder_is_the_default(tmp_path: Path) -> None:
    torch.save(ijepa_checkpoint(network_of(IJEPA, 0), network_of(IJEPA, 1)), tmp_path / "a.pth")
    assert_same(Encoder.from_pretrained(str(tmp_path / "a.pth")), network_of(IJEPA, 0))


def test_positions_of_ijepa_are_computed_for_every_grid() -> None:
    """Not squeezed onto the trained grid, nor interpolated."""
    network = network_of(IJEPA)
    places = torch.cartesian_prod(torch.arange(20), torch.arange(3))
    grids, cu_seqlens = torch.tensor([[20, 3]]), torch.tensor([0, 60])
    larger = VisionTransformer(dataclasses.replace(IJEPA, position_grid=(20, 20)))
    assert torch.equal(network.positions(places, grids, cu_seqlens), larger.positions(places, grids, cu_seqlens))


def test_a_context_encoder_alone_names_the_option(tmp_path: Path) -> None:
    checkpoint = ijepa_checkpoint(network_of(IJEPA), network_of(IJEPA))
    del checkpoint["target_encoder"]
    with pytest.raises(EncoderError, match=r"^'target_encoder' is missing\. Load the context encoder: --encoder cont"):
        convert(checkpoint, None, {})


def test_positions_that_are_not_ijepas_are_refused() -> None:
    checkpoint = ijepa_checkpoint(network_of(IJEPA), network_of(IJEPA))
    checkpoint["target_encoder"]["module.pos_embed"][0, 3, 5] += 1e-3
    with pytest.raises(EncoderError, match=r"^The positions in pos_embed are not the sine-cosine positions of I-JEPA"):
        convert(checkpoint, None, {})


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_positions_in_half_precision_are_still_known(dtype: torch.dtype) -> None:
    state, config = transformers_vit(network_of(LAYOUTS["ijepa"][0]), "ijepa")
    found = convert({name: value.to(dtype) for name, value in state.items()}, config, {})
    assert found.architecture == LAYOUTS["ijepa"][0]
    assert {value.dtype for value in found.weights.values()} == {torch.float32}


@pytest.mark.parametrize("model", ["ijepa", "vit", "dinov2"])
def test_a_head_and_its_prefix_are_left_out(model: str) -> None:
    config, writer = LAYOUTS[model]
    state, description = writer(network_of(config))
    expected = convert(state, description, {})
    headed = {f"{model}.{name}": value for name, value in state.items()}
    headed |= {"classifier.weight": torch.zeros(2, 48), "classifier.bias": torch.zeros(2)}
    found = convert(headed, description, {})
    assert all(torch.equal(found.weights[name], value) for name, value in expected.weights.items())


def test_layers_without_a_bias_get_one_of_zeros() -> None:
    config, writer = LAYOUTS["vit"]
    state, description = writer(network_of(config))
    slim = {
        name: value
        for name, value in state.items()
        if not any(name.endswith(f"{end}.bias") for end in ("query", "key", "value"))
    }
    found = convert(slim, description | {"qkv_bias": False}, {})
    assert not found.weights["blocks.layers.1.qkv.bias"].any()
    with pytest.raises(EncoderError, match=r"^The weights do not fit: missing: layers\.0\.attention\.q_proj\.bias, "):
        convert(slim, description, {})


def test_shards_are_put_together(tmp_path: Path) -> None:
    config, writer = LAYOUTS["dinov2"]
    state, description = writer(network_of(config))
    (tmp_path / "config.json").write_text(json.dumps(description))
    files = {name: f"model-0000{number % 2 + 1}-of-00002.safetensors" for number, name in enumerate(state)}
    for file in set(files.values()):
        save_file({name: state[name].contiguous() for name in state if files[name] == file}, tmp_path / file)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": files}))
    assert_same(Encoder.from_pretrained(tmp_path), network_of(config))


@pytest.mark.parametrize("name", ["weights.safetensors", "pytorch_model.bin", "model.pt"])
def test_a_file_with_its_config_beside_it(tmp_path: Path, name: str) -> None:
    config, writer = LAYOUTS["timm vit"]
    state, description = writer(network_of(config))
    write(tmp_path, state, description)
    if name.endswith(".safetensors"):
        (tmp_path / "model.safetensors").rename(tmp_path / name)
    else:
        (tmp_path / "model.safetensors").unlink()
        torch.save(state, tmp_path / name)
    assert_same(Encoder.from_pretrained(tmp_path / name), network_of(config))
    if name == "pytorch_model.bin":
        assert_same(Encoder.from_pretrained(tmp_path), network_of(config))


@pytest.mark.parametrize(
    ("processor", "resolution"),
    [
        ({}, 40),
        ({"size": {"height": 24, "width": 96}}, 48),
        ({"size": {"shortest_edge": 64}, "crop_size": {"height": 32, "width": 32}, "do_center_crop": True}, 32),
        ({"size": {"shortest_edge": 64}, "crop_size": {"height": 32, "width": 32}, "do_center_crop": False}, 64),
        ({"size": 56}, 56),
    ],
)
def test_the_image_processor_gives_resolution_mean_and_std(
    tmp_path: Path, processor: dict[str, Any], resolution: int
) -> None:
    config, writer = LAYOUTS["dinov2"]
    folder = write(tmp_path, *writer(network_of(config)))
    values = {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6]}
    (folder / "preprocessor_config.json").write_text(json.dumps(processor | values))
    found = Encoder.from_pretrained(folder).preprocessing
    assert (found.resolution, found.mean, found.std) == (resolution, (0.1, 0.2, 0.3), (0.4, 0.5, 0.6))


@pytest.mark.parametrize(
    ("layout", "card", "expected"),
    [
        ("dinov2", None, "apache-2.0"),
        ("dinov3", None, "dinov3-license"),
        ("vit", None, None),
        ("timm vit", None, "apache-2.0"),  # from its config.json
        ("vit", "---\nlicense: mit\ntags: [a]\n---\n# Title\n", "mit"),
        ("dinov2", "---\nlicense: other\nlicense_name: my-own\n---\n", "my-own"),
        ("dinov2", "---\nlicense: other\n---\n", "other"),  # not that of DINOv2
        ("vit", "# No header\nlicense: mit\n", None),
        ("vit", "---\nlicense: [\n---\n", None),
    ],
)
def test_the_license_is_kept(tmp_path: Path, layout: str, card: str | None, expected: str | None) -> None:
    config, writer = LAYOUTS[layout]
    folder = write(tmp_path / "weights", *writer(network_of(config)))
    if card is not None:
        (folder / "README.md").write_text(card)
    encoder = Encoder.from_pretrained(folder)
    assert encoder.origin is not None
    assert (encoder.origin.name, encoder.origin.license) == ("weights", expected)
    encoder.save_pretrained(tmp_path / "ours")
    assert json.loads((tmp_path / "ours" / "config.json").read_text())["origin"]["license"] == expected


def test_attention_pooling_is_said_to_be_left_out(caplog: pytest.LogCaptureFixture, tmp_path: Path) -> None:
    config, writer = LAYOUTS["naflexvit"]
    state, description = writer(network_of(config))
    state["attn_pool.q.weight"] = torch.zeros(48, 48)
    encoder = Encoder.from_pretrained(write(tmp_path, state, description | {"global_pool": "map"}))
    assert_same(encoder, network_of(config))
    assert encoder.preprocessing.pooling == "mean"
    assert caplog.messages == [
        f"{tmp_path}: Attention pooling (global_pool: map) is not imported. The feature of an image is the mean of its "
        "patches instead; patch features are exact."
    ]


def damaged(layout: str, **change: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    config, writer = LAYOUTS[layout]
    state, description = writer(network_of(config))
    return state, description | change


def test_all_that_does_not_fit_is_listed_at_once() -> None:
    state, description = damaged("dinov2")
    for number in range(2):
        for name in ("query", "key", "value"):
            del state[f"encoder.layer.{number}.attention.attention.{name}.weight"]
    state["encoder.layer.1.norm1.bias"] = torch.zeros(47)
    state["decoder.weight"] = torch.zeros(1)
    with pytest.raises(EncoderError) as error:
        convert(state, description, {})
    assert str(error.value) == (
        "The weights do not fit: missing: layers.0.attention.q_proj.weight, layers.0.attention.k_proj.weight, "
        "layers.0.attention.v_proj.weight, layers.1.attention.q_proj.weight, layers.1.attention.k_proj.weight and "
        "1 more; wrong shape or type: encoder.layer.1.norm1.bias is [47], not [48]; unknown: decoder.weight."
    )


@pytest.mark.parametrize(
    ("layout", "change", "message"),
    [
        ("vit", {"model_type": "bert"}, "model_type is 'bert' in config.json, but only ijepa, vit, dinov2, "),
        ("vit", {"hidden_act": "gelu_new"}, "hidden_act is 'gelu_new' in config.json, but only 'gelu' can be loaded."),
        ("vit", {"num_channels": 4}, "num_channels is 4 in config.json, but only 3 can be loaded."),
        ("vit", {"patch_size": [8, 4]}, "patch_size is 8 x 4 in config.json, but patches must be squares."),
        ("vit", {"hidden_size": None}, "config.json must give hidden_size as a number, not None."),
        ("vit", {"image_size": "big"}, "config.json must give image_size as one or two integers, not 'big'."),
        ("vit", {"num_attention_heads": 5}, "width (48) must be a multiple of heads (5)."),
        (
            "vit",
            {"image_size": 48},
            "The weights do not fit: wrong shape or type: embeddings.position_embeddings is [1, 26, ",
        ),
        ("vit", {"num_hidden_layers": 1}, "The weights do not fit: unknown: encoder.layer.1."),
        ("dinov3", {"hidden_act": "silu"}, "hidden_act is 'silu' in config.json, but only 'gelu' can be loaded."),
        ("timm vit", {"architecture": "resnet18"}, "The architecture resnet18 of timm cannot be loaded. Those that "),
        ("timm vit", {"architecture": "vit_base_patch16_siglip_gap_256"}, "The architecture vit_base_patch16_siglip"),
        ("timm vit", {"model_args": {"act_layer": "silu"}}, "model_args.act_layer in config.json is not supported."),
        ("timm vit", {"global_pool": "max"}, "global_pool is 'max' in config.json, but only token, avg and map can "),
        ("naflexvit", {"global_pool": "token"}, "global_pool is 'token' in config.json, but only token, avg and map"),
        ("naflexvit", {"model_args": {"pos_embed_interp_mode": "nearest"}}, "model_args.pos_embed_interp_mode in con"),
        ("timm vit", {"pretrained_cfg": {"mean": [0.5]}}, "The mean of the images must be 3 numbers, not [0.5]."),
    ],
)
def test_what_does_not_fit_is_refused(layout: str, change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=r"\.$") as error:
        convert(*damaged(layout, **change), {})
    assert str(error.value).startswith(message)


def test_a_table_of_no_grid_is_refused() -> None:
    state, description = damaged("timm vit", model_args={}, pretrained_cfg={})
    state["pos_embed"] = state["pos_embed"][:, :20]
    with pytest.raises(EncoderError, match=r"^pos_embed has 20 entries, which are the places of no square grid\.$"):
        convert(state, description, {})


def test_weights_of_another_kind_are_refused() -> None:
    state, description = damaged("timm vit")
    del state["patch_embed.proj.weight"]
    with pytest.raises(EncoderError, match=r"^'patch_embed\.proj\.weight' is missing, so these are not weights of"):
        convert(state, description, {})
    with pytest.raises(EncoderError, match=r"^The file is not a state dict, which is a dictionary of tensors\.$"):
        convert({"state_dict": state}, description, {})
    with pytest.raises(EncoderError, match=r"^There is no config\.json beside the file, and it is no checkpoint of"):
        convert(state, None, {})


def test_a_width_that_ijepa_does_not_have_is_refused() -> None:
    other = network_of(small(positions="sincos", position_grid=(2, 2), resampling="none"))
    with pytest.raises(EncoderError, match=r"^The encoder has a width of 48, and I-JEPA's have 192, 384, 768, 1024, "):
        convert(ijepa_checkpoint(other, other), None, {})


@pytest.mark.parametrize(
    ("layout", "name", "message"),
    [
        ("timm vit", "pos_embed", "'pos_embed' is [7], but must have 3 dimensions."),
        ("timm vit with registers", "reg_token", "'reg_token' is [7], but must have 3 dimensions."),
        ("timm vit", "blocks.0.mlp.fc2.weight", "'blocks.0.mlp.fc2.weight' is [7], but must have 2 dimensions."),
        ("naflexvit", "embeds.proj.weight", "'embeds.proj.weight' is [7], but must have 2 or 4 dimensions."),
        ("naflexvit", "embeds.pos_embed", "'embeds.pos_embed' is [7], but must have 4 dimensions."),
        ("naflexvit factorized", "embeds.pos_embed_x", "'embeds.pos_embed_x' is [7], but must have 3 dimensions."),
    ],
)
def test_a_tensor_that_should_give_a_size_and_does_not(layout: str, name: str, message: str) -> None:
    state, description = damaged(layout)
    with pytest.raises(EncoderError, match=re.escape(message)):
        convert(state | {name: torch.zeros(7)}, description, {})


def test_a_checkpoint_with_other_things_than_tensors_is_refused() -> None:
    checkpoint = ijepa_checkpoint(network_of(IJEPA), network_of(IJEPA))
    checkpoint["target_encoder"]["module.norm.weight"] = "ones"
    with pytest.raises(
        EncoderError, match=r"^'target_encoder' is not a state dict, which is a dictionary of tensors\.$"
    ):
        convert(checkpoint, None, {})


@pytest.mark.parametrize(("key", "value"), [("patch_size", 0), ("image_size", -40), ("mlp_ratio", float("inf"))])
def test_numbers_that_no_network_has_are_refused(key: str, value: float, tmp_path: Path) -> None:
    with pytest.raises(EncoderError, match="cannot be loaded: "):
        Encoder.from_pretrained(write(tmp_path, *damaged("dinov2", **{key: value})))


def test_an_image_processor_that_does_not_normalize() -> None:
    state, description = damaged("dinov2")
    found = convert(state, description, {"do_normalize": False, "image_mean": [0.5] * 3}).preprocessing
    assert (found.mean, found.std) == ((0, 0, 0), (1, 1, 1))
    with pytest.raises(ValueError, match="std must be above 0"):
        convert(state, description, {"image_std": [0.0] * 3})


def test_quantized_weights_are_refused() -> None:
    state, description = damaged("vit")
    state["encoder.layer.0.output.dense.weight"] = torch.zeros(48, 64, dtype=torch.int8)
    with pytest.raises(EncoderError, match=r"type: encoder\.layer\.0\.output\.dense\.weight is of type int8\.$"):
        convert(state, description, {})


def test_weights_do_not_depend_on_the_file_once_they_are_loaded(tmp_path: Path) -> None:
    torch.save(ijepa_checkpoint(network_of(IJEPA, 0), network_of(IJEPA, 1)), tmp_path / "a.pth")
    encoder = Encoder.from_pretrained(tmp_path / "a.pth")
    size = (tmp_path / "a.pth").stat().st_size
    (tmp_path / "a.pth").write_bytes(bytes(size))
    assert_same(encoder, network_of(IJEPA, 0))


def test_weights_that_are_larger_than_the_memory_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write(tmp_path / "weights", *LAYOUTS["dinov2"][1](network_of(LAYOUTS["dinov2"][0])))
    size = (folder / "model.safetensors").stat().st_size
    monkeypatch.setattr(pretrained, "free_memory", lambda: {"memory": size})
    Encoder.from_pretrained(folder)
    monkeypatch.setattr(pretrained, "free_memory", lambda: {"memory": size - 1})
    with pytest.raises(EncoderError, match=r"model\.safetensors needs 0 MB of memory, but only 0 MB are free\. Use"):
        Encoder.from_pretrained(folder)
    # Of a checkpoint of I-JEPA, one encoder is loaded.
    checkpoint = tmp_path / "a.pth.tar"
    torch.save(ijepa_checkpoint(network_of(IJEPA), network_of(IJEPA)), checkpoint)
    size = sum(value.nbytes for value in torch.load(checkpoint)["target_encoder"].values())
    assert size < checkpoint.stat().st_size / 2
    monkeypatch.setattr(pretrained, "free_memory", lambda: {"memory": size})
    Encoder.from_pretrained(checkpoint)
    monkeypatch.setattr(pretrained, "free_memory", lambda: {"memory": size - 1})
    with pytest.raises(EncoderError, match=r"a\.pth\.tar needs \d MB of memory"):
        Encoder.from_pretrained(checkpoint)


def test_the_size_of_learned_positions_is_a_trained_one(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """As for DINOv2, whose positions are for 518 px and whose images have 224 px."""
    folder = write(tmp_path / "weights", *LAYOUTS["dinov2"][1](network_of(LAYOUTS["dinov2"][0])))
    (folder / "preprocessor_config.json").write_text(json.dumps({"crop_size": {"height": 16, "width": 16}}))
    encoder = Encoder.from_pretrained(folder)
    assert encoder.preprocessing.resolution == 16
    encoder.check_resolution(60)  # 1.5 times the 40 px of the positions
    assert caplog.messages == []
    encoder.check_resolution(61)
    assert len(caplog.messages) == 1
