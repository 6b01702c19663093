"""The encoder's sizes, its Python face, and its weights in files."""

import dataclasses
import json
import re
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from ijepa_enhanced.data.decode import patchify
from ijepa_enhanced.encoder import Encoder, Resolution
from ijepa_enhanced.errors import EncoderError, NotFiniteError, UnreadableImage
from ijepa_enhanced.models.config import Architecture, EncoderConfig
from ijepa_enhanced.models.preprocessing import Origin, Preprocessing
from ijepa_enhanced.packed import Packed

TINY = EncoderConfig(variant="Ti", depth=2, patch_size=8).architecture
MLP = EncoderConfig("Ti", 16, 1, patch_embed="mlp").architecture
# Heights and widths in pixels: every orientation, one below a patch.
SIZES = [(64, 48), (40, 120), (33, 35), (130, 24), (5, 60)]

# Norm of the difference by the norm: float32 rounds at 6e-8, and an image alone is a matrix product of another number
# of rows. 4.3e-7 was the largest of 400 images.
BOUND = 2e-6


def distance(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


@pytest.fixture(scope="module")
def encoder() -> Encoder:
    return Encoder.random(TINY, Preprocessing(), seed=0)


@pytest.fixture(scope="module")
def images() -> list[Image.Image]:
    rng = np.random.default_rng(0)
    return [Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8)) for size in SIZES]


@pytest.mark.parametrize("resolution", [48, 96, "native"])
def test_embedding_a_mix_of_sizes_is_embedding_each_alone(
    encoder: Encoder, images: list[Image.Image], resolution: Resolution
) -> None:
    together = encoder.embed(images, resolution=resolution)
    assert together.shape == (len(images), 192)
    assert together.dtype == torch.float32
    for image, found in zip(images, together, strict=True):
        assert distance(found, encoder.embed([image], resolution=resolution)[0]) < BOUND


def test_merging_at_rate_zero_is_not_merging(encoder: Encoder, images: list[Image.Image]) -> None:
    expected = encoder.embed(images, resolution=96)
    assert torch.equal(encoder.embed(images, resolution=96, merge_rate=0.0), expected)
    assert torch.equal(encoder.embed(images, resolution=96, merge_rate=[0.0, 0.0]), expected)
    assert not torch.equal(encoder.embed(images, resolution=96, merge_rate=0.2), expected)


def test_merged_patches_share_a_feature_and_the_mean_weighs_it_by_their_number(
    encoder: Encoder, images: list[Image.Image]
) -> None:
    maps = encoder.feature_maps(images, resolution=96, merge_rate=[0.25, 0.25])
    for one, pooled in zip(maps, encoder.embed(images, resolution=96, merge_rate=[0.25, 0.25]), strict=True):
        patches = one.flatten(0, 1)
        # After two layers of a quarter each, 9/16 of the tokens are left, rounded up.
        assert len(patches.unique(dim=0)) == -(-len(patches) * 9 // 16)
        # Two sums of some 150 numbers of size up to 3, whose roundings of 6e-8 each add up like a random walk.
        torch.testing.assert_close(patches.mean(dim=0), pooled, rtol=0, atol=3e-6)


def test_a_merge_rate_out_of_range_is_refused(encoder: Encoder, images: list[Image.Image]) -> None:
    with pytest.raises(ValueError, match=r"^A merge rate must be between 0 and 0.5, not 0.7"):
        encoder.embed(images, merge_rate=0.7)


def test_the_packs_size_changes_nothing(encoder: Encoder, images: list[Image.Image]) -> None:
    # At native size the images have 48, 75, 16, 48 and 8 tokens: one pack, then two.
    expected = encoder.embed(images, resolution="native")
    assert distance(encoder.embed(images, resolution="native", tokens_per_pack=130), expected) < BOUND


def test_a_cpu_takes_less_at_once_and_shrinks_no_image_for_it(encoder: Encoder) -> None:
    small, large = Image.new("RGB", (320, 320)), Image.new("RGB", (528, 528))
    packs = list(encoder.packs([small, small, small, large, small], resolution="native"))
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

    together = encoder.embed(images, resolution=32)
    assert distance(encoder.embed(one_by_one(), resolution=32), together) == 0
    assert len(shown) == len(images)


def test_all_kinds_of_images_are_the_same(encoder: Encoder, images: list[Image.Image], tmp_path: Path) -> None:
    images[0].save(tmp_path / "image.png")
    path = tmp_path / "image.png"
    array = np.asarray(images[0])
    tensor = torch.from_numpy(array.copy()).permute(2, 0, 1)
    with Image.open(path) as opened:
        kinds = [images[0], array, tensor, path, str(path), path.read_bytes(), opened]
        found = encoder.embed(kinds, resolution=64)
    for other in found[1:]:
        assert distance(other, found[0]) < BOUND


def test_a_feature_is_the_mean_of_the_features_of_the_patches(encoder: Encoder) -> None:
    """At native size a whole number of patches is not resized, so nothing but `patchify` stands before the network."""
    pixels = np.random.default_rng(1).integers(0, 256, (24, 40, 3), dtype=np.uint8)
    with torch.no_grad():
        tokens = encoder(Packed.of_grids(patchify(pixels, 8), np.array([[3, 5]])))
    assert distance(encoder.embed([pixels], resolution="native")[0], tokens.mean(dim=0)) < BOUND
    assert distance(encoder.feature_maps([pixels], resolution="native")[0], tokens.view(3, 5, -1)) < BOUND


def test_pixels_are_normalized_channel_by_channel(encoder: Encoder) -> None:
    """ImageNet's mean color is what the network sees as nothing."""
    black, white = (np.full((1, 8 * 8 * 3), value, dtype=np.uint8) for value in (0, 255))
    for values, level in ((black, 0.0), (white, 1.0)):
        seen = torch.from_numpy(values) * encoder.normalize.scale + encoder.normalize.shift
        expected = [(level - mean) / std for mean, std in ((0.485, 0.229), (0.456, 0.224), (0.406, 0.225))]
        assert seen.view(-1, 3) == pytest.approx(np.tile(expected, (64, 1)), rel=1e-6)


def test_a_feature_map_has_rows_then_columns(encoder: Encoder, images: list[Image.Image]) -> None:
    maps = encoder.feature_maps(images, resolution="native")
    assert [found.shape for found in maps] == [(8, 6, 192), (5, 15, 192), (4, 4, 192), (16, 3, 192), (1, 8, 192)]
    pooled = torch.stack([found.mean(dim=(0, 1)) for found in maps])
    assert distance(pooled, encoder.embed(images, resolution="native")) < BOUND


def test_a_feature_map_lies_as_the_image_does(encoder: Encoder) -> None:
    """One odd patch in a plain image stands out where it is."""
    pixels = np.zeros((32, 56, 3), dtype=np.uint8)
    plain = encoder.feature_maps([pixels], resolution="native")[0]
    pixels[8:16, 40:48] = 255
    change = (encoder.feature_maps([pixels], resolution="native")[0] - plain).norm(dim=2)
    assert divmod(int(change.argmax()), change.shape[1]) == (1, 5)


def test_no_images_give_no_features(encoder: Encoder) -> None:
    assert encoder.embed([]).shape == (0, 192)
    assert encoder.feature_maps([]) == []


def test_what_is_no_image_is_an_error(encoder: Encoder, tmp_path: Path) -> None:
    (tmp_path / "notes.jpg").write_text("notes")
    with pytest.raises(
        UnreadableImage,
        match=r"notes\.jpg: not a JPEG, PNG, WebP, GIF, BMP, TIFF, AVIF, JPEG 2000, HEIC or NumPy file$",
    ):
        encoder.embed([tmp_path / "notes.jpg"])


@pytest.mark.parametrize(
    ("images", "message"),
    [
        ("photo.jpg", "images must be a list of images, even for a single image."),
        (Image.new("RGB", (9, 9)), "images must be a list of images, even for a single image."),
        ([np.zeros((9, 9, 3))], "An array must be uint8 or uint16 [height, width, 3], not float64 [9, 9, 3]."),
        ([np.zeros((3, 9, 9), np.uint8)], "An array must be uint8 or uint16 [height, width, 3], not uint8 [3, 9, 9]."),
        ([torch.zeros(3, 9, 9)], "A tensor must be uint8 or uint16 [3, height, width], not torch.float32 [3, 9, 9]."),
        (torch.zeros(3, 9, 9, dtype=torch.uint8), "images must be a list of images, even for a single image."),
        (np.zeros((9, 9, 3), np.uint8), "images must be a list of images, even for a single image."),
        ([3], "An image must be a PIL image, a NumPy array, a tensor, bytes or a path, not int."),
    ],
)
def test_what_cannot_be_embedded_is_said(encoder: Encoder, images: Any, message: str) -> None:
    with pytest.raises(TypeError) as error:
        encoder.embed(images)
    assert str(error.value) == message


def test_images_may_come_one_by_one_and_have_a_resolution(encoder: Encoder, images: list[Image.Image]) -> None:
    assert torch.equal(encoder.embed((image for image in images), resolution=32), encoder.embed(images, resolution=32))
    with pytest.raises(ValueError, match=r"^resolution must be a positive integer \(pixels\), or 'native', not 0\.$"):
        encoder.embed(images, resolution=0)
    # 30 * 30 patches are 900, and 31 * 31 are more than 930.
    side = encoder.config.patch_size
    refused = rf"^resolution must be at most {30 * side} px, not {31 * side}: an image may have 930 patches of "
    with pytest.raises(ValueError, match=refused):
        encoder.embed(images, resolution=31 * side, tokens_per_pack=930)
    assert encoder.embed(images[:1], resolution=30 * side, tokens_per_pack=930).shape[0] == 1


@pytest.mark.parametrize(
    "config",
    [TINY, EncoderConfig("Ti", 14, 1, "sincos", 7).architecture, MLP],
    ids=["factorized", "sincos", "hidden layer"],
)
def test_saved_and_loaded_is_the_same_bit_for_bit(config: Architecture, tmp_path: Path) -> None:
    preprocessing = Preprocessing(resolution=56, mean=(0.1, 0.2, 0.3))
    encoder = Encoder.random(config, preprocessing, seed=0)
    encoder.save_pretrained(tmp_path / "a" / "encoder")
    # A run's folder, and the encoder's own.
    for path in (tmp_path / "a", str(tmp_path / "a" / "encoder")):
        loaded = Encoder.from_pretrained(path)
        assert loaded.config == config
        assert loaded.preprocessing == preprocessing
        assert not loaded.training
        assert loaded.state_dict().keys() == encoder.state_dict().keys()
        for name, value in encoder.state_dict().items():
            assert torch.equal(value, loaded.state_dict()[name]), name
    image = np.random.default_rng(0).integers(0, 256, (30, 50, 3), dtype=np.uint8)
    assert torch.equal(loaded.embed([image]), encoder.embed([image], resolution=56))


@pytest.mark.parametrize("missing", ["folder", "config.json", "model.safetensors"])
def test_a_folder_without_an_encoder_is_an_error(encoder: Encoder, tmp_path: Path, missing: str) -> None:
    folder = tmp_path / "saved"
    if missing != "folder":
        encoder.save_pretrained(folder)
        (folder / missing).unlink()
    with pytest.raises(EncoderError) as error:
        Encoder.from_pretrained(folder)
    needed = "config.json and model.safetensors must be in it or in its subfolder 'encoder'."
    assert str(error.value) == (
        f"No such file or folder: {folder}." if missing == "folder" else f"{folder} contains no encoder: {needed}"
    )


def test_a_large_jpeg_gives_one_feature_however_it_is_given(encoder: Encoder, tmp_path: Path) -> None:
    """It is decoded at a fraction of its size, also when it comes as an image that was opened and not yet loaded."""
    pixels = np.random.default_rng(0).integers(0, 256, (30, 40, 3), dtype=np.uint8)
    path = tmp_path / "large.jpg"
    exif = Image.Exif()
    exif[0x0112] = 6  # orientation: turned by a quarter
    Image.fromarray(pixels).resize((1200, 900)).save(path, exif=exif)
    with Image.open(path) as opened:
        found = encoder.embed([path, path.read_bytes(), opened], resolution=64)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])
    assert encoder.feature_maps([path], resolution=64)[0].shape[:2] == (9, 7)  # turned upright
    with Image.open(path) as loaded:
        loaded.load()
        assert not torch.equal(encoder.embed([loaded], resolution=64)[0], found[0])  # as the docstring says


def test_the_resolution_is_the_trained_one_unless_another_is_given(
    images: list[Image.Image], caplog: pytest.LogCaptureFixture
) -> None:
    encoder = Encoder.random(TINY, Preprocessing(resolution=64), seed=0)
    assert torch.equal(encoder.embed(images), encoder.embed(images, resolution=64))
    assert [maps.shape[:2] for maps in encoder.feature_maps(images[:1])] == [(9, 7)]
    native = Encoder.random(TINY, Preprocessing(resolution=None), seed=0)
    assert torch.equal(native.embed(images), encoder.embed(images, resolution="native"))
    assert caplog.messages == []
    for resolution in (32, 96):
        encoder.embed(images, resolution=resolution)
    assert caplog.messages == []
    for resolution in (31, 97):
        encoder.embed(images, resolution=resolution)
        assert f"trained at a resolution of 64 px but is used at {resolution} px" in caplog.messages[-1]
    encoder.embed(images, resolution=97)
    assert len(caplog.messages) == 2  # once for an encoder and a resolution, not for each call ...
    Encoder.random(TINY, Preprocessing(resolution=64), seed=0).embed(images, resolution=97)
    assert len(caplog.messages) == 3  # ... and not once in a process


def test_results_are_ordinary_tensors_that_a_layer_on_top_can_learn_from(
    encoder: Encoder, images: list[Image.Image]
) -> None:
    head = torch.nn.Linear(encoder.width, 3)
    for features in (encoder.embed(images), encoder.feature_maps(images)[0], encoder.patch_tokens(images)[0]):
        assert not features.is_inference()
        head(features).sum().backward()


def test_a_callers_generator_and_network_are_its_own(encoder: Encoder, images: list[Image.Image]) -> None:
    """The generator runs in the caller's grad mode, and the network can be trained through `forward`."""
    modes = []

    def one_by_one() -> Iterator[Image.Image]:
        for image in images:
            modes.append((torch.is_grad_enabled(), torch.is_inference_mode_enabled()))
            yield image

    encoder.embed(one_by_one())
    assert modes == [(True, False)] * len(images)
    (packed,) = encoder.packs(images[:1])
    encoder(packed).sum().backward()
    assert all(parameter.grad is not None for parameter in encoder.network.parameters())
    encoder.zero_grad()


def test_patch_tokens_are_the_rows_of_the_feature_map(encoder: Encoder, images: list[Image.Image]) -> None:
    for tokens, features in zip(encoder.patch_tokens(images), encoder.feature_maps(images), strict=True):
        assert torch.equal(tokens, features.flatten(0, 1))


def test_precision_is_what_is_asked_for(encoder: Encoder, images: list[Image.Image]) -> None:
    exact = encoder.embed(images)
    assert torch.equal(encoder.embed(images, precision="fp32"), exact)
    with torch.autocast("cpu", torch.bfloat16):
        half = encoder.embed(images)
        assert torch.equal(encoder.embed(images, precision="fp32"), exact)
    assert torch.equal(encoder.embed(images, precision="bf16"), half)
    assert 1e-4 < distance(half, exact) < 2e-2  # bfloat16 rounds at 4e-3
    with pytest.raises(ValueError, match=r"^precision must be auto, fp32 or bf16, not 'half'\.$"):
        encoder.embed(images, precision="half")  # type: ignore[arg-type]


@pytest.mark.parametrize("workers", [0, 2])
def test_embedding_one_by_one_is_embedding_at_once(
    encoder: Encoder, images: list[Image.Image], tmp_path: Path, workers: int
) -> None:
    for number, image in enumerate(images):
        image.save(tmp_path / f"{number}.png")
    expected = encoder.embed(images, resolution="native")
    settings: dict[str, Any] = {"workers": workers, "resolution": "native", "tokens_per_pack": 130}
    paths = [tmp_path / f"{number}.png" for number in range(len(images))]
    for source, keys in (
        (str(tmp_path), [path.name for path in paths]),  # a source
        (paths, [str(path) for path in paths]),
        ((image for image in images), [str(number) for number in range(len(images))]),
    ):
        found = dict(encoder.embed_iter(source, **settings))
        assert list(found) == keys
        for vector, row in zip(found.values(), expected, strict=True):
            assert distance(vector, row) < BOUND


def test_what_cannot_be_decoded_is_raised_skipped_or_not_a_number(
    encoder: Encoder, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("a.png", "c.png"):
        Image.new("RGB", (30, 20), "red").save(tmp_path / name)
    (tmp_path / "b.png").write_bytes((tmp_path / "a.png").read_bytes()[:60])
    (tmp_path / "d.png").write_text("no image")
    with pytest.raises(UnreadableImage, match=r"^b\.png: "):
        list(encoder.embed_iter(tmp_path))
    caplog.clear()
    assert [key for key, _ in encoder.embed_iter(tmp_path, on_error="skip")] == ["a.png", "c.png"]
    left_out = [message.partition(": ")[::2] for message in caplog.messages if message.startswith("Not embedded")]
    assert [name.partition(":")[0] for _, name in left_out] == ["b.png", "d.png"], "each is named"
    found = dict(encoder.embed_iter(tmp_path, on_error="nan"))
    assert {key: bool(vector.isnan().all()) for key, vector in found.items()} == {
        "a.png": False,
        "b.png": True,
        "c.png": False,
        "d.png": True,
    }
    with pytest.raises(ValueError, match=r"^on_error must be raise, skip or nan, not 'ignore'\.$"):
        next(encoder.embed_iter(tmp_path, on_error="ignore"))  # type: ignore[arg-type]


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("on_error", ["raise", "skip"])
def test_what_comes_before_an_error_is_yielded_first(
    encoder: Encoder, images: list[Image.Image], workers: int, on_error: Literal["raise", "skip"]
) -> None:
    def broken() -> Iterator[Any]:
        yield from images
        raise KeyError("no more")

    def damaged() -> Iterator[Any]:
        yield from images
        yield b"no image" if on_error == "raise" else 3
        yield images[0]

    for generator, error in ((broken, KeyError), (damaged, UnreadableImage if on_error == "raise" else TypeError)):
        found = encoder.embed_iter(generator(), workers, on_error)
        assert [next(found)[0] for _ in images] == [str(number) for number in range(len(images))]
        with pytest.raises(error):
            next(found)


def test_a_folder_of_an_older_version_says_so(encoder: Encoder, tmp_path: Path) -> None:
    encoder.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config["architecture"]))  # as it was once
    with pytest.raises(EncoderError, match=r"was saved by an older version of ijepa-enhanced\."):
        Encoder.from_pretrained(tmp_path)


@pytest.mark.parametrize("damage", ["not JSON", "[3]", '{"format": 3}', "weights"])
def test_a_damaged_folder_says_so(encoder: Encoder, tmp_path: Path, damage: str) -> None:
    encoder.save_pretrained(tmp_path)
    if damage == "weights":
        weights = (tmp_path / "model.safetensors").read_bytes()
        (tmp_path / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    else:
        (tmp_path / "config.json").write_text(damage)
    with pytest.raises(EncoderError, match=rf"^The encoder in {tmp_path} cannot be loaded: "):
        Encoder.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("group", "field", "value", "message"),
    [
        ("architecture", "resampling", "lanczos", "must be squeeze, linear, bicubic, bicubic-antialias or none, not"),
        ("architecture", "positions", "alibi", "must be factorized, table, sincos or rope, not 'alibi'."),
        ("architecture", "depth", "three", "must be an integer, not 'three'."),
        ("architecture", "position_grid", [8], "must be two integers, not [8]."),
        ("architecture", "class_token", 2, "must be true or false, not 2."),
        ("architecture", "heads", None, "must be an integer, not null."),
        ("preprocessing", "pooling", "max", "must be mean or cls, not 'max'."),
        ("preprocessing", "mean", [0.5, "x", 0.5], "must be a list of numbers, not [0.5, x, 0.5]."),
        ("preprocessing", "trained_grid", 3, "must be two integers or null, not 3."),
        ("origin", "encoder", "both", "must be target, context or null, not 'both'."),
    ],
)
def test_a_field_of_config_json_with_another_value_is_named(
    group: str, field: str, value: object, message: str, encoder: Encoder, tmp_path: Path
) -> None:
    encoder.origin = Origin("a", "b")
    encoder.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config[group][field] = value
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(EncoderError, match=re.escape(f" cannot be loaded: {group}.{field} {message}")):
        Encoder.from_pretrained(tmp_path)


def test_fields_of_config_json_that_are_unknown_or_missing_are_named(encoder: Encoder, tmp_path: Path) -> None:
    encoder.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    for architecture, message in (
        (config["architecture"] | {"head": 3}, "unknown field 'architecture.head'. Did you mean 'architecture.heads'?"),
        ({"width": 32}, "architecture.depth must be an integer, not null."),
        (3, "config.json must give architecture as an object, not 3."),
    ):
        (tmp_path / "config.json").write_text(json.dumps(config | {"architecture": architecture}))
        with pytest.raises(EncoderError, match=re.escape(message)):
            Encoder.from_pretrained(tmp_path)


def test_weights_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    encoder = Encoder.random(TINY, Preprocessing(), seed=0)
    with torch.no_grad():
        encoder.network.blocks.norm.bias[3] = torch.nan
    encoder.save_pretrained(tmp_path)
    with pytest.raises(NotFiniteError, match=r"^The weights blocks\.norm\.bias in .* contain NaN or infinite values"):
        Encoder.from_pretrained(tmp_path)


def test_positions_that_were_never_trained_are_never_used(images: list[Image.Image]) -> None:
    """In training no grid was longer than 9 rows and 7 columns; at twice the resolution grids are."""
    encoder = Encoder.random(TINY, Preprocessing(resolution=64, trained_grid=(9, 7)), seed=0)
    free = Encoder(encoder.network, Preprocessing(resolution=64))
    assert torch.equal(encoder.embed(images[:1]), free.embed(images[:1]))  # a grid of 9 x 7
    maps = encoder.feature_maps(images, resolution=96)
    assert max(features.shape[0] for features in maps) > 9
    with torch.no_grad():
        encoder.network.positions.cols[7:] = 1e6
        encoder.network.positions.rows[9:] = -1e6
    for found, before in zip(encoder.feature_maps(images, resolution=96), maps, strict=True):
        assert torch.equal(found, before)
    assert not torch.equal(free.embed(images, resolution=96), encoder.embed(images, resolution=96))


def test_a_batch_of_equal_images_is_a_list_of_them(encoder: Encoder) -> None:
    batch = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (2, 3, 24, 40), dtype=np.uint8))
    assert torch.equal(encoder.embed(batch), encoder.embed(list(batch)))


def test_hooks_of_the_network_fire(encoder: Encoder, images: list[Image.Image]) -> None:
    calls = []
    hook = encoder.network.register_forward_hook(lambda *_: calls.append(1))
    encoder.embed(images[:1])
    hook.remove()
    assert calls == [1]


def test_a_later_frame_is_embedded_as_it_is(encoder: Encoder, tmp_path: Path) -> None:
    frames = [Image.new("RGB", (32, 32), color) for color in ("red", "green", "blue")]
    frames[0].save(tmp_path / "film.gif", save_all=True, append_images=frames[1:])
    with Image.open(tmp_path / "film.gif") as film:
        film.seek(2)
        found = encoder.embed([film, film.convert("RGB")])
        kept = dict(encoder.embed_iter([film], workers=0))["0"]
    assert distance(found[0], found[1]) < BOUND
    assert distance(kept, found[1]) < BOUND
    assert distance(encoder.embed([tmp_path / "film.gif"])[0], found[1]) > 0.01


@pytest.mark.parametrize("workers", [0, 1])
def test_opened_images_travel_to_workers_and_their_faults_come_back(
    encoder: Encoder, tmp_path: Path, workers: int
) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (300, 400, 3), dtype=np.uint8)
    for name in ("good.jpg", "cut.jpg", "cut.png"):
        Image.fromarray(noise).save(tmp_path / name)
        if name.startswith("cut"):
            data = (tmp_path / name).read_bytes()
            (tmp_path / name).write_bytes(data[: len(data) // 2])
    opened = [Image.open(tmp_path / name) for name in ("good.jpg", "cut.jpg", "cut.png", "good.jpg")]
    before = torch.get_rng_state()
    found = dict(encoder.embed_iter(opened, workers=workers, on_error="nan", resolution=32))
    assert torch.equal(torch.get_rng_state(), before)
    assert [bool(vector.isnan().any()) for vector in found.values()] == [False, True, True, False]
    assert distance(found["0"], encoder.embed([tmp_path / "good.jpg"], resolution=32)[0]) < BOUND
    with pytest.raises(UnreadableImage, match=r"^cannot be decoded: [^\n]*$"):
        list(encoder.embed_iter([tmp_path / "good.jpg", opened[1]], workers=workers))
    with pytest.raises(FileNotFoundError):
        list(encoder.embed_iter([tmp_path / "gone.jpg"], workers=workers))
    with pytest.raises(TypeError, match=r"^An image must be a PIL image"):
        list(encoder.embed_iter([3], workers=workers, on_error="skip"))  # type: ignore[list-item]
    for image in opened:
        image.close()


def test_requests_that_cannot_be_met_are_refused_at_once(encoder: Encoder, images: list[Image.Image]) -> None:
    with pytest.raises(TypeError, match=r"^images must be a list of images"):
        encoder.embed_iter(images[0])  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"^on_error must be"):
        encoder.embed_iter(images, on_error="ignore")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"^channels must be 3, as in the network, not 1\.$"):
        Encoder(encoder.network, Preprocessing(channels=1, mean=(0.5,), std=(0.2,)))
    with pytest.raises(ValueError, match=r"^mean and std must have 3 values each, not 1 and 3\.$"):
        Preprocessing(mean=(0.5,))


def test_class_token_and_registers_are_left_out_of_maps_and_mean_pooling(images: list[Image.Image]) -> None:
    config = dataclasses.replace(TINY, class_token=True, registers=2)
    encoder = Encoder.random(config, Preprocessing(), seed=0)
    by_class = Encoder(encoder.network, Preprocessing(pooling="cls"))
    for rate in (0.0, 0.2):
        maps = encoder.feature_maps(images, resolution=48, merge_rate=rate)
        pooled = torch.stack([found.mean(dim=(0, 1)) for found in maps])
        assert distance(encoder.embed(images, resolution=48, merge_rate=rate), pooled) < BOUND
        assert [len(found) for found in encoder.patch_tokens(images, 48, rate)] == [
            found.shape[0] * found.shape[1] for found in maps
        ]
        (packed,) = encoder.packs(images, resolution=48)
        with torch.no_grad():
            tokens = encoder(packed, encoder.merge_plan(packed.segments, rate))
        first = torch.stack([view[0] for view in tokens.split(packed.segments.lengths)])
        assert torch.equal(by_class.embed(images, resolution=48, merge_rate=rate), first)
        assert distance(first, pooled) > 0.1
    with torch.no_grad():
        encoder.network.prefix.add_(1)
        assert not torch.equal(encoder(packed), tokens), "patches attend to the class token"


def test_pooling_by_a_class_token_needs_one() -> None:
    with pytest.raises(ValueError, match=r"^pooling must be mean, because the network has no class token\.$"):
        Encoder.random(TINY, Preprocessing(pooling="cls"), seed=0)


def test_the_last_norm_may_follow_pooling(images: list[Image.Image]) -> None:
    encoder = Encoder.random(dataclasses.replace(TINY, norm_pooled=True), Preprocessing(), seed=0)
    with torch.no_grad():
        encoder.network.blocks.norm.weight.uniform_(0.5, 2)
        pooled = torch.stack([found.mean(dim=(0, 1)) for found in encoder.feature_maps(images, resolution=48)])
        expected = encoder.network.blocks.norm(pooled)
    assert distance(encoder.embed(images, resolution=48), expected) < BOUND
    assert distance(pooled, expected) > 0.1
