"""What changes a view does what it says, alone, and as the view's own generator says."""

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image, ImageEnhance, ImageOps

from ijepa_enhanced.batch import Colors
from ijepa_enhanced.data.augment import BLUR_SIGMA, LUMA, Changes, channel_means
from ijepa_enhanced.data.config import AugmentConfig
from ijepa_enhanced.data.decode import patchify, unpatchify
from ijepa_enhanced.ops.preprocess import recolor
from ijepa_enhanced.packed import Packed
from ijepa_enhanced.randomness import Purpose, generator

NAMES = ("flip", "color", "gray", "blur", "solarize")
PATCH, SEED, EPOCH = 8, 3, 2


@pytest.fixture
def pixels() -> NDArray[np.uint8]:
    return np.random.default_rng(0).integers(0, 256, (40, 56, 3), dtype=np.uint8)


def draw(views: int, size: tuple[int, int] = (224, 224), seed: int = SEED, **probabilities: float) -> Changes:
    """Changes of views 0, 1, ... of image 5."""
    keys = [(5, view) for view in range(views)]
    return Changes.draw(AugmentConfig(**probabilities), seed, EPOCH, keys, np.array([size] * views))


def unchanged(**values: Any) -> Changes:
    """One view that keeps its colors, except for `values`."""
    kept = {"flip": False, "sigma": 0.0, "recolor": True, "brightness": 1.0, "contrast": 1.0, "saturation": 1.0}
    kept |= {"hue": 0.0, "gray": False, "solarize": False}
    return Changes(**{name: np.array([value]) for name, value in (kept | values).items()})


def shown(pixels: NDArray[np.uint8], colors: Colors) -> NDArray[np.float32]:
    """A view in other colors, as the device makes it."""
    height, width, _ = pixels.shape
    rows, cols = height // PATCH, width // PATCH
    packed = Packed.of_grids(patchify(pixels, PATCH), np.array([[rows, cols]]))
    return unpatchify(recolor(packed, colors).numpy(), rows, cols, PATCH)  # type: ignore[arg-type,return-value]


def changed(pixels: NDArray[np.uint8], **values: Any) -> NDArray[np.float32]:
    return shown(pixels, unchanged(**values).colors(channel_means(pixels)[None]))


def on_the_host(pixels: NDArray[np.uint8], config: AugmentConfig, rng: np.random.Generator) -> NDArray[np.float64]:
    """The colors of a view as workers made them before the device did: rounded to bytes, then solarized."""
    _, color, gray, _, solarize = rng.random(5) < dataclasses.astuple(config)
    brightness, contrast, saturation, hue, _ = rng.random(5)
    matrix, shift = np.eye(3), 0.0
    if color:
        brightness, contrast, saturation = 0.6 + 0.8 * brightness, 0.6 + 0.8 * contrast, 0.8 + 0.4 * saturation
        saturate = saturation * np.eye(3) + (1 - saturation) * LUMA * np.ones((3, 1))
        angle = 2 * np.pi * 0.1 * (2 * hue - 1)
        across = np.array([[0.0, -1.0, 1.0], [1.0, 0.0, -1.0], [-1.0, 1.0, 0.0]])
        turn = np.cos(angle) * np.eye(3) + (1 - np.cos(angle)) / 3 * np.ones((3, 3))
        turn += np.sin(angle) / np.sqrt(3) * across
        matrix = brightness * contrast * turn @ saturate
        shift = (1 - contrast) * brightness * float(pixels.mean(axis=(0, 1)) @ LUMA)
    if gray:
        matrix = LUMA @ matrix * np.ones((3, 1))
    made = np.rint((pixels @ matrix.T + shift).clip(0, 255))
    return np.where(made < 128, made, 255 - made) if solarize else made


def test_colors_are_those_that_workers_made(pixels: NDArray[np.uint8]) -> None:
    config = AugmentConfig(flip=0.5, color=0.7, gray=0.3, blur=0.5, solarize=0.3)
    changes = draw(60, **dataclasses.asdict(config))
    colors = changes.colors(np.repeat(channel_means(pixels)[None], 60, axis=0))
    solarized = 0
    for view in range(60):
        expected = on_the_host(pixels, config, generator(SEED, Purpose.AUGMENT, EPOCH, 5, view))
        found = shown(pixels, colors.select(torch.arange(60) == view))
        # Workers rounded to bytes, and 127.5 to 128 before they inverted it.
        assert np.abs(found - expected).max() < 0.501
        solarized += int(changes.solarize[view])
    assert 5 < solarized < 40


def test_without_probabilities_nothing_changes(pixels: NDArray[np.uint8]) -> None:
    changes = draw(9)
    assert not changes.flip.any()
    assert not changes.sigma.any()
    colors = changes.colors(np.repeat(channel_means(pixels)[None], 9, axis=0))
    for view in range(9):
        assert np.array_equal(shown(pixels, colors.select(torch.arange(9) == view)), pixels)


@pytest.mark.parametrize("name", NAMES)
def test_a_probability_is_how_often_it_happens(name: str) -> None:
    changes = draw(4000, **{name: 0.3})
    happened = {
        "flip": changes.flip,
        "color": changes.recolor,
        "gray": changes.gray,
        "blur": changes.sigma > 0,
        "solarize": changes.solarize,
    }
    for other, views in happened.items():
        # The standard deviation of the mean is 0.007.
        assert abs(views.mean() - 0.3) < 0.03 if other == name else not views.any()


def test_the_width_of_the_blur_follows_the_view_s_resolution() -> None:
    wide = draw(1000, blur=1.0).sigma
    assert BLUR_SIGMA[0] <= wide.min() < BLUR_SIGMA[0] + 0.1
    assert BLUR_SIGMA[1] - 0.1 < wide.max() <= BLUR_SIGMA[1]
    np.testing.assert_allclose(draw(1000, (56, 224), blur=1.0).sigma, wide / 2)


def test_solarize_inverts_what_is_bright(pixels: NDArray[np.uint8]) -> None:
    expected = np.asarray(ImageOps.solarize(Image.fromarray(pixels), 128))
    assert np.array_equal(changed(pixels, solarize=True), expected)


def test_gray_is_luma_in_every_channel(pixels: NDArray[np.uint8]) -> None:
    found = changed(pixels, gray=True)
    assert (found == found[..., :1]).all()
    # Pillow's whole-number arithmetic rounds otherwise.
    assert np.abs(found[..., 0] - np.asarray(Image.fromarray(pixels).convert("L"), dtype=int)).max() <= 1


@pytest.mark.parametrize(
    ("enhancer", "name"),
    [(ImageEnhance.Brightness, "brightness"), (ImageEnhance.Contrast, "contrast"), (ImageEnhance.Color, "saturation")],
)
@pytest.mark.parametrize("factor", [0.6, 1.3])
def test_factors_are_those_of_pillow(pixels: NDArray[np.uint8], enhancer: type, name: str, factor: float) -> None:
    expected = np.asarray(enhancer(Image.fromarray(pixels)).enhance(factor), dtype=float)
    # Pillow rounds the gray it blends with, and the result.
    assert np.abs(changed(pixels, **{name: factor}) - expected).max() < 1.6


def test_a_third_of_a_turn_makes_red_green(pixels: NDArray[np.uint8]) -> None:
    np.testing.assert_allclose(changed(pixels, hue=1 / 3), pixels[..., [2, 0, 1]], atol=1e-3)
    np.testing.assert_allclose(changed(pixels, hue=1.0), pixels, atol=1e-3)


def test_grays_keep_their_hue_and_saturation() -> None:
    grays = np.repeat(np.arange(256, dtype=np.uint8).reshape(16, 16, 1), 3, axis=2)
    np.testing.assert_allclose(changed(grays, saturation=0.3, hue=0.1), grays, atol=1e-3)


def test_one_probability_does_not_change_what_another_does() -> None:
    alone, both = draw(50, color=0.5), draw(50, color=0.5, flip=0.5, blur=0.5)
    for name in ("recolor", "brightness", "contrast", "saturation", "hue"):
        assert np.array_equal(getattr(alone, name), getattr(both, name))


def test_the_generator_decides() -> None:
    assert len({float(draw(1, seed=seed, color=1.0).hue[0]) for seed in range(8)}) == 8
    assert len(set(draw(8, color=1.0).hue.tolist())) == 8


@pytest.mark.parametrize("height", [1, 40, 900])  # 900 rows of 255 are more than 16 bits hold
def test_means_are_those_of_the_channels(height: int) -> None:
    pixels = np.random.default_rng(1).integers(200, 256, (height, 24, 3), dtype=np.uint8)
    np.testing.assert_allclose(channel_means(pixels), pixels.mean(axis=(0, 1)), rtol=1e-12)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("value", [-0.1, 1.1])
def test_a_probability_outside_0_and_1_is_an_error(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=rf"^augment\.{name} must be between 0 and 1, not {value}\.$"):
        AugmentConfig(**{name: value})


def test_other_channels_change_brightness_and_contrast_alone() -> None:
    """Each about its own mean, without an end of the scale; floats may lie below 0 and above 255."""
    pixels = np.random.default_rng(0).normal(100, 300, (40, 56, 6)).astype(np.float32)
    means = channel_means(pixels)
    np.testing.assert_allclose(means, pixels.mean(axis=(0, 1)), rtol=1e-5)
    found = changed(pixels, brightness=1.2, contrast=0.7, saturation=0.5, hue=0.1)
    np.testing.assert_allclose(found, 1.2 * (0.7 * pixels + 0.3 * means), rtol=1e-4, atol=1e-2)  # values up to 1,500
