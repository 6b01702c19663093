"""The pictures of merging show what the encoder merged, where it lies."""

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

from ijepa_enhanced.data.decode import patchify
from ijepa_enhanced.encoder import Encoder
from ijepa_enhanced.errors import UnreadableImage
from ijepa_enhanced.merge_plan import merged_lengths
from ijepa_enhanced.models.config import EncoderConfig
from ijepa_enhanced.models.preprocessing import Preprocessing
from ijepa_enhanced.packed import Packed
from ijepa_enhanced.visualize.merges import CAPTION, DEPTHS, RESOLUTION, draw_merges, regions
from ijepa_enhanced.visualize.views import MARGIN

PATCH, ROWS, COLS = 8, 6, 8
CELL = round(RESOLUTION / (ROWS * COLS) ** 0.5)


@pytest.fixture(scope="module")
def encoder() -> Encoder:
    return Encoder.random(EncoderConfig("Ti", PATCH, 4).architecture, Preprocessing(resolution=64), seed=0)


@pytest.fixture(scope="module")
def image() -> NDArray[np.uint8]:
    """A dark and a light half of noise."""
    pixels = np.random.default_rng(0).integers(0, 40, (ROWS * PATCH, COLS * PATCH, 3), dtype=np.uint8)
    pixels[:, 4 * PATCH :] += 200
    return pixels


def test_regions_are_the_tokens_after_each_layer(encoder: Encoder, image: NDArray[np.uint8]) -> None:
    pixels, stages = regions(encoder, image, "native", 0.25)
    assert np.array_equal(pixels, image)
    expected = merged_lengths([ROWS * COLS], 0.25, 4)[1:, 0]
    for stage, tokens in zip(stages, expected, strict=True):
        assert stage.shape == (ROWS, COLS)
        assert np.array_equal(np.unique(stage), np.arange(tokens))
    # What is one token stays one.
    for before, after in itertools.pairwise(stages):
        for token in range(before.max() + 1):
            assert len(set(after[before == token].tolist())) == 1


def test_patches_of_a_region_have_one_feature(encoder: Encoder, image: NDArray[np.uint8]) -> None:
    (features,) = encoder.feature_maps([image], resolution="native", merge_rate=0.25)
    _, stages = regions(encoder, image, "native", 0.25)
    last = stages[-1]
    for token in range(last.max() + 1):
        assert len(features[torch.from_numpy(last == token)].unique(dim=0)) == 1


def test_regions_follow_the_picture(encoder: Encoder, image: NDArray[np.uint8]) -> None:
    """Even at random weights: a quarter of the tokens is left, and none has patches of both halves."""
    _, stages = regions(encoder, image, "native", 0.3)
    assert stages[-1].max() + 1 == 12
    assert not {*stages[-1][:, :4].ravel().tolist()} & {*stages[-1][:, 4:].ravel().tolist()}


def stage_of(sheet: NDArray[np.uint8], number: int) -> NDArray[np.uint8]:
    """The cells of a picture of the sheet: [rows, cols, CELL, CELL, 3]."""
    left = MARGIN + number * (COLS * CELL + 2 * MARGIN)
    picture = sheet[MARGIN + CAPTION : MARGIN + CAPTION + ROWS * CELL, left : left + COLS * CELL]
    return picture.reshape(ROWS, CELL, COLS, CELL, 3).swapaxes(1, 2)


def test_a_region_has_its_mean_color_and_one_outline(encoder: Encoder, image: NDArray[np.uint8]) -> None:
    sheet = np.asarray(draw_merges(encoder, image, "native", 0.3))
    _, stages = regions(encoder, image, "native", 0.3)
    patches = patchify(image, PATCH).reshape(ROWS, COLS, -1, 3)
    # Of four layers, a third, two thirds and all.
    for shown, layer in enumerate((1, 3, 4), start=1):
        stage, cells = stages[layer - 1], stage_of(sheet, shown)
        for row, col in np.ndindex(ROWS, COLS):
            mean = patches[stage == stage[row, col]].mean(axis=(0, 1)).round()
            assert (cells[row, col, 1:-1, 1:-1] == mean).all(), (layer, row, col)
            line = 255 if mean.mean() < 128 else 0
            for (dy, dx), edge in (
                ((-1, 0), cells[row, col, 0, 1:-1]),
                ((1, 0), cells[row, col, -1, 1:-1]),
                ((0, -1), cells[row, col, 1:-1, 0]),
                ((0, 1), cells[row, col, 1:-1, -1]),
            ):
                beside = (row + dy, col + dx)
                inside = 0 <= beside[0] < ROWS and 0 <= beside[1] < COLS
                same = inside and stage[beside] == stage[row, col]
                assert (edge == (mean if same else line)).all(), (layer, row, col, dy, dx)


def test_the_first_picture_is_the_image_in_its_own_shape(encoder: Encoder, image: NDArray[np.uint8]) -> None:
    sheet = draw_merges(encoder, image, "native", 0.3)
    whole = Image.fromarray(image).resize((COLS * CELL, ROWS * CELL), Image.Resampling.BICUBIC)
    left, top = MARGIN, MARGIN + CAPTION
    assert np.array_equal(np.asarray(sheet)[top : top + ROWS * CELL, left : left + COLS * CELL], np.asarray(whole))


@pytest.mark.parametrize("size", [(8, 400), (400, 8), (8, 8), (5, 7)])
def test_any_shape_can_be_drawn(encoder: Encoder, size: tuple[int, int]) -> None:
    sheet = np.asarray(draw_merges(encoder, np.full((*size, 3), 90, np.uint8), 64, 0.5))
    assert (sheet != 255).any()


def test_fewer_layers_than_stages_are_all_shown() -> None:
    encoder = Encoder.random(EncoderConfig("Ti", PATCH, 2).architecture, Preprocessing(), seed=0)
    image = np.zeros((16, 16, 3), np.uint8)
    assert DEPTHS > 2
    sheet = np.asarray(draw_merges(encoder, image, "native", 0.5))
    large = round(RESOLUTION / 2) * 2
    black = (sheet[MARGIN + CAPTION + 5] == 0).all(axis=1)
    # The image and two stages, without their light outlines.
    assert large * 3 - 20 < black.sum() <= large * 3


def test_what_cannot_be_drawn_is_an_error(encoder: Encoder, tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"")
    with pytest.raises(UnreadableImage, match=r"a\.png: empty file$"):
        draw_merges(encoder, tmp_path / "a.png", 64, 0.1)
    image = np.zeros((16, 16, 3), np.uint8)
    with pytest.raises(ValueError, match=r"^merge_rate must be above 0"):
        draw_merges(encoder, image, 64, 0.0)
    with pytest.raises(ValueError, match=r"^A merge rate must be between 0 and 0.5, not 0.6"):
        draw_merges(encoder, image, 64, 0.6)


def test_a_view_alone_is_the_view_of_the_encoder(encoder: Encoder, image: NDArray[np.uint8]) -> None:
    """Drawn is what happens in a pack, too."""
    packed = Packed.concatenate([Packed.of_grids(patchify(image, PATCH), np.array([[ROWS, COLS]]))] * 2)
    with torch.inference_mode():
        plan = encoder.merge_plan(packed.segments, 0.25)
        _, merges = encoder.network.tokens(encoder.normalize(packed), plan)
    _, stages = regions(encoder, image, "native", 0.25)
    second = merges[0].origin[ROWS * COLS :].numpy() - stages[0].max() - 1
    assert np.array_equal(second.reshape(ROWS, COLS), stages[0])


def test_long_grids_are_squeezed_as_for_features(monkeypatch: pytest.MonkeyPatch) -> None:
    config = EncoderConfig("Ti", 8, depth=2, max_grid=4).architecture
    encoder = Encoder.random(config, Preprocessing(trained_grid=(4, 4)), 0)
    seen = []
    network = type(encoder.network)
    tokens = network.tokens
    monkeypatch.setattr(
        network, "tokens", lambda self, packed, *rest: seen.append(packed) or tokens(self, packed, *rest)
    )
    image = np.random.default_rng(0).integers(0, 256, (64, 80, 3), dtype=np.uint8)
    regions(encoder, image, "native", 0.2)
    encoder.embed([image], "native", 0.2)
    assert torch.equal(seen[0].positions, seen[-1].positions)
    assert seen[0].positions.max().round() == 3
