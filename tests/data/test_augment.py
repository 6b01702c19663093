"""What changes a view does what it says, alone, and as the view's own generator says."""

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image, ImageEnhance, ImageFilter, ImageOps

from ijepa_enhanced.data.augment import BLUR_SIGMA, LUMA, augment, color_map
from ijepa_enhanced.data.config import AugmentConfig

NAMES = ("flip", "color", "gray", "blur", "solarize")


@pytest.fixture
def pixels() -> NDArray[np.uint8]:
    return np.random.default_rng(0).integers(0, 256, (40, 56, 3), dtype=np.uint8)


def changed(pixels: NDArray[np.uint8], seed: int = 0, **probabilities: float) -> NDArray[np.uint8]:
    return augment(pixels, AugmentConfig(**probabilities), np.random.default_rng(seed))


def mapped(pixels: NDArray[np.uint8], *factors: float) -> NDArray[np.float64]:
    matrix, shift = color_map(*factors, float(pixels.mean(axis=(0, 1)) @ LUMA))
    return pixels @ matrix.T + shift


def test_without_probabilities_nothing_changes(pixels: NDArray[np.uint8]) -> None:
    assert np.array_equal(changed(pixels), pixels)


@pytest.mark.parametrize("name", NAMES)
def test_each_changes_something_and_leaves_the_view_as_it_was(pixels: NDArray[np.uint8], name: str) -> None:
    before = pixels.copy()
    after = changed(pixels, **{name: 1.0})
    assert after.shape == pixels.shape
    assert after.dtype == np.uint8
    assert after.flags.c_contiguous
    assert not np.array_equal(after, pixels)
    assert np.array_equal(pixels, before)


@pytest.mark.parametrize("name", NAMES)
def test_a_probability_is_how_often_it_happens(pixels: NDArray[np.uint8], name: str) -> None:
    small = pixels[:16, :16] if name != "blur" else np.tile(pixels, (4, 4, 1))  # a narrow blur leaves it as it is
    happened = sum(not np.array_equal(changed(small, seed, **{name: 0.3}), small) for seed in range(400))
    # 120 are expected, with a standard deviation of 9.
    assert abs(happened - 120) < 45


def test_flip_is_a_mirror_and_solarize_inverts_what_is_bright(pixels: NDArray[np.uint8]) -> None:
    image = Image.fromarray(pixels)
    assert np.array_equal(changed(pixels, flip=1.0), np.asarray(ImageOps.mirror(image)))
    assert np.array_equal(changed(pixels, solarize=1.0), np.asarray(ImageOps.solarize(image, 128)))


def test_gray_is_luma_in_every_channel(pixels: NDArray[np.uint8]) -> None:
    found = changed(pixels, gray=1.0)
    assert (found == found[..., :1]).all()
    # Pillow's whole-number arithmetic rounds otherwise.
    assert np.abs(found[..., 0] - np.asarray(Image.fromarray(pixels).convert("L"), dtype=int)).max() <= 1


def test_blur_is_gaussian_and_its_width_follows_the_view_s_side(pixels: NDArray[np.uint8]) -> None:
    sigma = BLUR_SIGMA[0] + (BLUR_SIGMA[1] - BLUR_SIGMA[0]) * np.random.default_rng(3).random(10)[-1]
    for side in (56, 112):
        view = np.tile(pixels[:28, :28], (side // 28, side // 28, 1))
        expected = Image.fromarray(view).filter(ImageFilter.GaussianBlur(float(sigma) * side / 224))
        assert np.array_equal(changed(view, 3, blur=1.0), np.asarray(expected))


@pytest.mark.parametrize(
    ("enhancer", "place"),
    [(ImageEnhance.Brightness, 0), (ImageEnhance.Contrast, 1), (ImageEnhance.Color, 2)],
)
@pytest.mark.parametrize("factor", [0.6, 1.3])
def test_factors_are_those_of_pillow(pixels: NDArray[np.uint8], enhancer: type, place: int, factor: float) -> None:
    factors = [1.0, 1.0, 1.0, 0.0]
    factors[place] = factor
    expected = np.asarray(enhancer(Image.fromarray(pixels)).enhance(factor), dtype=float)
    # Pillow rounds the gray it blends with, and the result.
    assert np.abs(mapped(pixels, *factors).clip(0, 255) - expected).max() < 1.6


def test_a_third_of_a_turn_makes_red_green(pixels: NDArray[np.uint8]) -> None:
    np.testing.assert_allclose(mapped(pixels, 1, 1, 1, 1 / 3), pixels[..., [2, 0, 1]], atol=1e-9)
    np.testing.assert_allclose(mapped(pixels, 1, 1, 1, 1.0), pixels, atol=1e-9)


def test_grays_keep_their_hue_and_saturation() -> None:
    grays = np.repeat(np.arange(256, dtype=np.uint8)[:, None, None], 3, axis=2)
    np.testing.assert_allclose(mapped(grays, 1, 1, 0.3, 0.1), grays, atol=1e-9)


def test_one_probability_does_not_change_what_another_does(pixels: NDArray[np.uint8]) -> None:
    both = changed(pixels, flip=1.0, color=1.0)
    assert np.array_equal(both, changed(changed(pixels, flip=1.0), color=1.0))


def test_the_generator_decides(pixels: NDArray[np.uint8]) -> None:
    options = dict.fromkeys(NAMES, 0.5)
    assert np.array_equal(changed(pixels, 5, **options), changed(pixels, 5, **options))
    assert len({changed(pixels, seed, color=1.0).tobytes() for seed in range(8)}) == 8


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("value", [-0.1, 1.1])
def test_a_probability_outside_0_and_1_is_an_error(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=rf"^augment\.{name} must be between 0 and 1, not {value}\.$"):
        AugmentConfig(**{name: value})
