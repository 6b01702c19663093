"""The encoder's sizes, its Python face, and its weights in files."""

import dataclasses
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from ijepa_enhanced import Encoder
from ijepa_enhanced.data.decode import patchify
from ijepa_enhanced.errors import UnreadableImage
from ijepa_enhanced.merge_plan import MergePlan
from ijepa_enhanced.models.blocks import SinCosPositions
from ijepa_enhanced.models.config import EncoderConfig
from ijepa_enhanced.models.vit import PatchMLP
from ijepa_enhanced.ops.merging import match, merge
from ijepa_enhanced.packed import Packed

TINY = EncoderConfig(variant="Ti", depth=2, patch_size=8)
# Heights and widths in pixels: every orientation, one below a patch.
SIZES = [(64, 48), (40, 120), (33, 35), (130, 24), (5, 60)]

# Norm of the difference by the norm: float32 rounds at 6e-8, and an image alone is a matrix product of another number
# of rows. 4.3e-7 was the largest of 400 images.
BOUND = 2e-6


def distance(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


@pytest.fixture(scope="module")
def encoder() -> Encoder:
    torch.manual_seed(0)
    return Encoder(TINY).eval()


@pytest.fixture(scope="module")
def images() -> list[Image.Image]:
    rng = np.random.default_rng(0)
    return [Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8)) for size in SIZES]


@pytest.mark.parametrize(
    ("variant", "width", "depth"),
    [("S", 384, 12), ("B", 768, 12)],
)
def test_parameters_are_counted_by_hand(variant: str, width: int, depth: int) -> None:
    block = 2 * 2 * width  # two LayerNorms
    block += 3 * width * width + 3 * width  # queries, keys and values
    block += width * width + width  # after attention
    block += width * 4 * width + 4 * width + 4 * width * width + width  # MLP
    patches = 16 * 16 * 3 * width + width
    positions = 2 * 32 * width
    expected = patches + positions + depth * block + 2 * width
    with torch.device("meta"):
        encoder = Encoder(EncoderConfig(variant=variant, patch_size=16))
    assert sum(value.numel() for value in encoder.parameters()) == expected
    # The published 22 and 86 million of DeiT and ViT have a class token and a head as well.
    assert round(expected / 1e6) == {"S": 22, "B": 86}[variant]


@pytest.mark.parametrize("side", [48, 96, None])
def test_embedding_a_mix_of_sizes_is_embedding_each_alone(
    encoder: Encoder, images: list[Image.Image], side: int | None
) -> None:
    together = encoder.embed(images, side=side)
    assert together.shape == (len(images), 192)
    assert together.dtype == torch.float32
    for image, found in zip(images, together, strict=True):
        assert distance(found, encoder.embed([image], side=side)[0]) < BOUND


def test_merging_at_rate_zero_is_not_merging(encoder: Encoder, images: list[Image.Image]) -> None:
    expected = encoder.embed(images, side=96)
    assert torch.equal(encoder.embed(images, side=96, merge_rate=0.0), expected)
    assert torch.equal(encoder.embed(images, side=96, merge_rate=[0.0, 0.0]), expected)
    assert not torch.equal(encoder.embed(images, side=96, merge_rate=0.2), expected)


def test_merged_patches_share_a_feature_and_the_mean_weighs_it_by_their_number(
    encoder: Encoder, images: list[Image.Image]
) -> None:
    maps = encoder.feature_maps(images, side=96, merge_rate=[0.25, 0.25])
    for one, pooled in zip(maps, encoder.embed(images, side=96, merge_rate=[0.25, 0.25]), strict=True):
        patches = one.flatten(0, 1)
        # After two layers of a quarter each, 9/16 of the tokens are left, rounded up.
        assert len(patches.unique(dim=0)) == -(-len(patches) * 9 // 16)
        # Two sums of some 150 numbers of size up to 3, whose roundings of 6e-8 each add up like a random walk.
        torch.testing.assert_close(patches.mean(dim=0), pooled, rtol=0, atol=3e-6)


def test_merging_happens_after_attention_and_before_the_mlp(
    encoder: Encoder, make_stream: Callable[..., Packed]
) -> None:
    """One layer with merging, by hand: `match` and `merge` are tested in tests/ops/test_merging.py."""
    packed = make_stream([(4, 5), (3, 3)], 0)
    plan = MergePlan.of(packed.segments.lengths, [0.3, 0.0], 2)
    first, second = encoder.blocks.layers
    with torch.no_grad():
        found, merges = encoder.merged(packed, plan)
        x = encoder.patch_embed(packed.values * encoder.pixel_scale + encoder.pixel_shift)
        x = x + encoder.positions(packed.positions, packed.grids, packed.segments.cu_seqlens)
        x, keys = first.attend(x, packed.segments)
        merging = match(keys.mean(dim=1), plan, 0)
        x, sizes = merge(x, torch.ones(29), merging)
        x = first.transform(x)
        x, _ = second.attend(x, plan.segments[1], sizes)
        x = encoder.blocks.norm(second.transform(x))
    assert len(merges) == 1
    assert torch.equal(merges[0].origin, merging.origin)
    assert sizes.max() > 1
    torch.testing.assert_close(found, x, rtol=0, atol=1e-6)


def test_a_merge_rate_out_of_range_is_refused(encoder: Encoder, images: list[Image.Image]) -> None:
    with pytest.raises(ValueError, match=r"^A merge rate must lie between 0 and 0.5, not 0.7"):
        encoder.embed(images, merge_rate=0.7)


def test_the_packs_size_changes_nothing(encoder: Encoder, images: list[Image.Image]) -> None:
    # At native size the images have 48, 75, 16, 48 and 8 tokens: one pack, then two.
    expected = encoder.embed(images, side=None)
    assert distance(encoder.embed(images, side=None, tokens_per_pack=130), expected) < BOUND


def test_a_cpu_takes_less_at_once_and_shrinks_no_image_for_it(encoder: Encoder) -> None:
    small, large = Image.new("RGB", (320, 320)), Image.new("RGB", (528, 528))
    packs = list(encoder.packs([small, small, small, large, small], side=None))
    # 4,800 tokens are more than a pack's 4,096, 4,356 are one image.
    assert [packed.segments.lengths for packed in packs] == [(1600, 1600), (1600,), (4356,), (1600,)]


def test_images_are_held_no_longer_than_they_are_needed(encoder: Encoder, images: list[Image.Image]) -> None:
    """Of a generator one at a time, each let go when the next is asked for."""
    shown: list[weakref.ref[Image.Image]] = []

    def one_by_one() -> Iterator[Image.Image]:
        for image in images:
            copy = image.copy()
            assert not any(earlier() for earlier in shown[:-1])
            shown.append(weakref.ref(copy))
            yield copy

    together = encoder.embed(images, side=32)
    assert distance(encoder.embed(one_by_one(), side=32), together) == 0
    assert len(shown) == len(images)


def test_images_arrays_and_paths_are_the_same(encoder: Encoder, images: list[Image.Image], tmp_path: Path) -> None:
    images[0].save(tmp_path / "image.png")
    kinds = [images[0], np.asarray(images[0]), tmp_path / "image.png", str(tmp_path / "image.png")]
    found = encoder.embed(kinds, side=64)
    for other in found[1:]:
        assert distance(other, found[0]) < BOUND


def test_a_feature_is_the_mean_of_the_features_of_the_patches(encoder: Encoder) -> None:
    """At native size a whole number of patches is not resized, so nothing but `patchify` stands before the network."""
    pixels = np.random.default_rng(1).integers(0, 256, (24, 40, 3), dtype=np.uint8)
    with torch.no_grad():
        tokens = encoder(Packed.of_grids(patchify(pixels, 8), np.array([[3, 5]])))
    assert distance(encoder.embed([pixels], side=None)[0], tokens.mean(dim=0)) < BOUND
    assert distance(encoder.feature_maps([pixels], side=None)[0], tokens.view(3, 5, -1)) < BOUND


def test_pixels_are_normalised_channel_by_channel(encoder: Encoder) -> None:
    """ImageNet's mean colour is what the network sees as nothing."""
    black, white = (np.full((1, 8 * 8 * 3), value, dtype=np.uint8) for value in (0, 255))
    for values, level in ((black, 0.0), (white, 1.0)):
        seen = torch.from_numpy(values) * encoder.pixel_scale + encoder.pixel_shift
        expected = [(level - mean) / std for mean, std in ((0.485, 0.229), (0.456, 0.224), (0.406, 0.225))]
        assert seen.view(-1, 3) == pytest.approx(np.tile(expected, (64, 1)), rel=1e-6)


def test_a_feature_map_has_rows_then_columns(encoder: Encoder, images: list[Image.Image]) -> None:
    maps = encoder.feature_maps(images, side=None)
    assert [found.shape for found in maps] == [(8, 6, 192), (5, 15, 192), (4, 4, 192), (16, 3, 192), (1, 8, 192)]
    pooled = torch.stack([found.mean(dim=(0, 1)) for found in maps])
    assert distance(pooled, encoder.embed(images, side=None)) < BOUND


def test_a_feature_map_lies_as_the_image_does(encoder: Encoder) -> None:
    """One odd patch in a plain image stands out where it is."""
    pixels = np.zeros((32, 56, 3), dtype=np.uint8)
    plain = encoder.feature_maps([pixels], side=None)[0]
    pixels[8:16, 40:48] = 255
    change = (encoder.feature_maps([pixels], side=None)[0] - plain).norm(dim=2)
    assert divmod(int(change.argmax()), change.shape[1]) == (1, 5)


def test_no_images_give_no_features(encoder: Encoder) -> None:
    assert encoder.embed([]).shape == (0, 192)
    assert encoder.feature_maps([]) == []


def test_what_is_no_image_is_an_error(encoder: Encoder, tmp_path: Path) -> None:
    (tmp_path / "notes.jpg").write_text("notes")
    with pytest.raises(UnreadableImage, match=r"notes\.jpg: not a JPEG, PNG, WebP, GIF, BMP, TIFF or AVIF image$"):
        encoder.embed([tmp_path / "notes.jpg"])


@pytest.mark.parametrize(
    ("images", "message"),
    [
        ("photo.jpg", "One image alone: put it into a list."),
        (Image.new("RGB", (9, 9)), "One image alone: put it into a list."),
        ([np.zeros((9, 9, 3))], "An array must be uint8 [height, width, 3], not float64 [9, 9, 3]."),
        ([np.zeros((3, 9, 9), np.uint8)], "An array must be uint8 [height, width, 3], not uint8 [3, 9, 9]."),
        ([torch.zeros(3, 9, 9)], "An image is a PIL image, an array or a path, not Tensor."),
    ],
)
def test_what_cannot_be_embedded_is_said(encoder: Encoder, images: Any, message: str) -> None:
    with pytest.raises(TypeError) as error:
        encoder.embed(images)
    assert str(error.value) == message


def test_images_may_come_one_by_one_and_have_a_side(encoder: Encoder, images: list[Image.Image]) -> None:
    assert torch.equal(encoder.embed((image for image in images), side=32), encoder.embed(images, side=32))
    with pytest.raises(ValueError, match=r"^side must be at least 1, not 0\.$"):
        encoder.embed(images, side=0)


@pytest.mark.parametrize(
    "config",
    [TINY, EncoderConfig("Ti", 14, 1, "sincos", 7), EncoderConfig("Ti", 16, 1, patch_embed="mlp")],
    ids=["factorized", "sincos", "hidden layer"],
)
def test_saved_and_loaded_is_the_same_bit_for_bit(config: EncoderConfig, tmp_path: Path) -> None:
    encoder = Encoder(config)
    encoder.save_pretrained(tmp_path / "a" / "encoder")
    # A run's folder, and the encoder's own.
    for path in (tmp_path / "a", str(tmp_path / "a" / "encoder")):
        loaded = Encoder.from_pretrained(path)
        assert loaded.config == config
        assert not loaded.training
        assert loaded.state_dict().keys() == encoder.state_dict().keys()
        for name, value in encoder.state_dict().items():
            assert torch.equal(value, loaded.state_dict()[name]), name
    image = np.random.default_rng(0).integers(0, 256, (30, 50, 3), dtype=np.uint8)
    assert torch.equal(loaded.embed([image], side=28), encoder.embed([image], side=28))


@pytest.mark.parametrize("missing", ["folder", "config.json", "model.safetensors"])
def test_a_folder_without_an_encoder_is_an_error(encoder: Encoder, tmp_path: Path, missing: str) -> None:
    folder = tmp_path / "saved"
    if missing != "folder":
        encoder.save_pretrained(folder)
        (folder / missing).unlink()
    with pytest.raises(FileNotFoundError) as error:
        Encoder.from_pretrained(folder)
    assert str(error.value) == (
        f"No encoder in {folder}: expected config.json and model.safetensors there or in its folder 'encoder'."
    )


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"variant": "XL"}, "encoder.variant must be one of Ti, S, B, L, H, g, not 'XL'."),
        ({"patch_size": 7}, "encoder.patch_size must be 8, 14 or 16, not 7."),
        ({"positions": "none"}, "encoder.positions must be factorized or sincos, not 'none'."),
        ({"patch_embed": "conv"}, "encoder.patch_embed must be linear or mlp, not 'conv'."),
        ({"depth": 0}, "encoder.depth must be at least 1, not 0."),
        ({"max_grid": 0}, "encoder.max_grid must be at least 1, not 0."),
    ],
)
def test_a_wrong_setting_is_an_error(settings: dict[str, str | int], message: str) -> None:
    with pytest.raises(ValueError, match=r"^encoder\.") as error:
        EncoderConfig(**settings)  # type: ignore[arg-type]
    assert str(error.value) == message


def test_a_variants_depth_can_be_changed_alone() -> None:
    shape = EncoderConfig("g").shape
    assert (shape.width, shape.depth, shape.heads, round(shape.width * shape.mlp_ratio)) == (1408, 40, 16, 6144)
    assert EncoderConfig("g", depth=3).shape == dataclasses.replace(shape, depth=3)


def test_sincos_positions_learn_nothing(encoder: Encoder) -> None:
    fixed = Encoder(dataclasses.replace(TINY, positions="sincos"))
    assert isinstance(fixed.positions, SinCosPositions)
    lost = {name for name, _ in encoder.named_parameters()} - {name for name, _ in fixed.named_parameters()}
    assert lost == {"positions.rows", "positions.cols"}


def test_a_patch_embedding_may_have_a_hidden_layer() -> None:
    torch.manual_seed(0)
    encoder = Encoder(dataclasses.replace(TINY, patch_embed="mlp"))
    names = {name for name, _ in encoder.named_parameters() if name.startswith("patch_embed.")}
    assert names == {f"patch_embed.{layer}.{part}" for layer in ("hidden", "out") for part in ("weight", "bias")}
    layers = encoder.patch_embed
    assert isinstance(layers, PatchMLP)
    with torch.no_grad():
        x = torch.randn(1000, 8 * 8 * 3)
        hidden = layers.hidden(x)
        # He's start for unit variance; 384 units of 192 weights each leave less than 1% to chance.
        assert float(hidden.std()) == pytest.approx(2**0.5, rel=0.01)
        torch.testing.assert_close(layers(x), torch.nn.functional.gelu(hidden) @ layers.out.weight.T)
