"""Colors are principal components, similarities are cosines, and the picture shows both in their places."""

from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from ijepa_enhanced.encoder import Encoder
from ijepa_enhanced.models.config import EncoderConfig
from ijepa_enhanced.models.preprocessing import Preprocessing
from ijepa_enhanced.visualize.features import MARK, RAMP, RESOLUTION, draw_features, pca_maps, similarity_map
from ijepa_enhanced.visualize.views import MARGIN

SHAPES = ((5, 8), (7, 3), (1, 6))
PATCH = 8


def correlated(seed: int = 0, width: int = 16) -> list[Tensor]:
    """Maps whose dimensions are mixtures of each other, around a mean far from 0."""
    generator = torch.Generator().manual_seed(seed)
    mixture = torch.randn(width, width, generator=generator) * torch.logspace(0, -2, width)[:, None]
    return [torch.randn(*shape, width, generator=generator) @ mixture + 10 for shape in SHAPES]


@pytest.fixture(scope="module")
def encoder() -> Encoder:
    return Encoder.random(EncoderConfig("Ti", PATCH, depth=1).architecture, Preprocessing(resolution=64), seed=0)


@pytest.fixture(scope="module")
def images() -> list[NDArray[np.uint8]]:
    """64 x 64, and 32 x 128 px: 8 x 8 and 4 x 16 patches at a resolution of 64 px."""
    rng = np.random.default_rng(0)
    return [rng.integers(60, 200, shape, dtype=np.uint8) for shape in ((64, 64, 3), (32, 128, 3))]


def test_colors_are_the_principal_components_of_all_patches() -> None:
    """Against scikit-learn's, whose signs are other ones."""
    pca = pytest.importorskip("sklearn.decomposition").PCA(3)
    maps = correlated()
    scores = pca.fit_transform(torch.cat([features.flatten(0, 1) for features in maps]).double().numpy())
    signs = np.sign(pca.components_[np.arange(3), np.abs(pca.components_).argmax(axis=1)])
    low, high = np.percentile(scores * signs, (2, 98), axis=0)
    expected = 255 * ((scores * signs - low) / (high - low)).clip(0, 1)
    found = np.concatenate([colors.reshape(-1, 3) for colors in pca_maps(maps)])
    assert found.dtype == np.uint8
    np.testing.assert_allclose(found, expected, atol=0.51)


def test_red_green_and_blue_are_the_components_in_the_order_of_their_variance() -> None:
    """Of dimensions that vary by themselves, with the second the most: its largest value is the reddest."""
    features = torch.zeros(20, 20, 4)
    values = torch.linspace(-1, 1, 400)
    for dimension, scale in ((1, 3.0), (3, 2.0), (0, 1.0)):
        order = torch.randperm(400, generator=torch.Generator().manual_seed(dimension))
        features[..., dimension] = scale * values[order].view(20, 20)
    (colors,) = pca_maps([features])
    for channel, dimension in enumerate((1, 3, 0)):
        correlation = np.corrcoef(colors[..., channel].ravel(), features[..., dimension].numpy().ravel())[0, 1]
        assert correlation > 0.98, channel


def test_maps_keep_their_shapes_and_do_not_depend_on_their_order() -> None:
    maps = correlated()
    colors = pca_maps(maps)
    assert [color.shape for color in colors] == [(*shape, 3) for shape in SHAPES]
    for one, other in zip(colors, pca_maps(maps[::-1])[::-1], strict=True):
        assert np.abs(one.astype(int) - other).max() <= 1


def test_equal_features_have_equal_colors_in_all_images() -> None:
    maps = correlated()
    maps[1][4, 2] = maps[0][3, 7]
    colors = pca_maps(maps)
    assert (colors[1][4, 2] == colors[0][3, 7]).all()


def test_the_colors_are_the_same_every_time() -> None:
    for one, other in zip(pca_maps(correlated()), pca_maps(correlated()), strict=True):
        assert (one == other).all()


def test_one_odd_patch_does_not_darken_all_others() -> None:
    maps = correlated()
    maps[0][0, 0] = 1000.0
    rest = np.concatenate([colors.reshape(-1, 3) for colors in pca_maps(maps)])[1:]
    assert np.ptp(rest[:, 0]) == 255


def test_a_component_that_few_patches_have_is_shown() -> None:
    features = torch.zeros(10, 20, 4)
    features[3, 4, 2] = 1.0
    (colors,) = pca_maps([features])
    assert colors[3, 4, 0] == 255
    assert colors[..., 0].sum() == 255


def test_what_does_not_vary_is_gray() -> None:
    line = torch.linspace(0, 1, 12).view(3, 4, 1) * torch.ones(5) + 2
    (colors,) = pca_maps([line])
    assert np.ptp(colors[..., 0]) == 255
    assert (colors[..., 1:] == 128).all()
    (colors,) = pca_maps([torch.full((3, 4, 5), 0.1)])
    assert (colors == 128).all()
    (colors,) = pca_maps([torch.linspace(0, 1, 12).view(3, 4, 1)])
    assert (colors[..., 1:] == 128).all()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_features_that_are_not_finite_are_refused(value: float) -> None:
    maps = correlated()
    maps[2][0, 1, 3] = value
    with pytest.raises(ValueError, match=r"^Some features are NaN or infinite, so the encoder cannot be used\.$"):
        pca_maps(maps)


def test_similarity_is_the_cosine_to_the_patch() -> None:
    features = torch.tensor([[[1.0, 0.0], [3.0, 4.0]], [[-2.0, 0.0], [0.0, 5.0]]])
    assert torch.allclose(similarity_map(features, 0, 0), torch.tensor([[1.0, 0.6], [-1.0, 0.0]]))
    assert torch.allclose(similarity_map(features, 0, 1), torch.tensor([[0.6, 1.0], [-0.6, 0.8]]))


def test_a_patch_is_wholly_similar_to_itself() -> None:
    features = correlated()[0]
    for row in range(features.shape[0]):
        for col in range(features.shape[1]):
            similarity = similarity_map(features, row, col)
            assert similarity.shape == features.shape[:2]
            assert similarity[row, col] == pytest.approx(1, abs=1e-6)
            assert similarity.max() <= 1 + 1e-6


@pytest.mark.parametrize("patch", [(5, 0), (0, 8), (-1, 0), (0, -1)])
def test_a_patch_that_is_not_there_is_refused(patch: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match=rf"^Patch \({patch[0]}, {patch[1]}\) is outside the grid of 5 x 8 patches"):
        similarity_map(correlated()[0], *patch)


def read(path: Path) -> NDArray[np.uint8]:
    with Image.open(path) as image:
        assert image.format == "PNG"
        return np.asarray(image)


def test_the_picture_shows_image_components_and_similarity(
    encoder: Encoder, images: list[NDArray[np.uint8]], tmp_path: Path
) -> None:
    path = tmp_path / "features.png"
    assert draw_features(encoder, images, path, (3, 5), resolution=64) == [(8, 8), (4, 16)]
    assert [file.name for file in tmp_path.iterdir()] == ["features.png"]
    sheet = read(path)
    maps = encoder.feature_maps(images, 64)
    top, cell = MARGIN, RESOLUTION // 8
    for colors, features in zip(pca_maps(maps), maps, strict=True):
        rows, cols = colors.shape[:2]
        width = cols * cell + MARGIN // 2
        parts = [sheet[top : top + rows * cell, MARGIN + n * width :][:, : cols * cell] for n in range(3)]
        assert (parts[1] == colors.repeat(cell, axis=0).repeat(cell, axis=1)).all()
        middle = slice(cell // 2, None, cell)
        centers = parts[2][middle, middle].astype(int)
        brightness = centers.sum(axis=2)
        similarity = similarity_map(features, 3, 5).numpy()
        assert (centers[3, 5] == RAMP[-1]).all()
        assert (centers[np.unravel_index(similarity.argmin(), similarity.shape)] == RAMP[0]).all()
        assert np.corrcoef(brightness.ravel(), similarity.ravel())[0, 1] > 0.9
        for part, marked in zip(parts, (True, False, True), strict=True):
            edges = np.argwhere((part == MARK).all(axis=2))
            assert bool(len(edges)) == marked
            if marked:
                assert edges.min(axis=0).tolist() == [3 * cell, 5 * cell]
                assert edges.max(axis=0).tolist() == [4 * cell - 1, 6 * cell - 1]
        top += rows * cell + MARGIN


def test_the_image_is_what_the_encoder_sees(encoder: Encoder, tmp_path: Path) -> None:
    """Four colors, one a quarter, stay in their quarters."""
    quarters = np.array([[[250, 0, 0], [0, 250, 0]], [[0, 0, 250], [250, 250, 0]]], np.uint8)
    draw_features(encoder, [quarters.repeat(32, axis=0).repeat(32, axis=1)], tmp_path / "features.png", resolution=64)
    size = RESOLUTION // 8 * 8
    shown = read(tmp_path / "features.png")[MARGIN : MARGIN + size, MARGIN : MARGIN + size]
    quarter = slice(size // 4, None, size // 2)
    assert (shown[quarter, quarter] == quarters).all()


def test_without_a_patch_there_is_no_similarity(
    encoder: Encoder, images: list[NDArray[np.uint8]], tmp_path: Path
) -> None:
    draw_features(encoder, images[:1], tmp_path / "features.png", resolution=64)
    sheet = read(tmp_path / "features.png")
    size = RESOLUTION // 8 * 8
    right = MARGIN + 2 * size + MARGIN // 2
    assert (sheet[:, right:] == 255).all()
    assert sheet.shape[1] == right + MARGIN, "no space at the right"
    assert not (sheet[MARGIN : MARGIN + size, right - 1] == 255).all()


def test_the_picture_is_the_same_every_time(encoder: Encoder, images: list[NDArray[np.uint8]], tmp_path: Path) -> None:
    for name in ("a.png", "b.png"):
        draw_features(encoder, images, tmp_path / name, (0, 0), resolution=64)
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


def test_a_patch_outside_one_of_the_images_leaves_no_picture(
    encoder: Encoder, images: list[NDArray[np.uint8]], tmp_path: Path
) -> None:
    with pytest.raises(
        ValueError,
        match=r"^Patch \(6, 0\) is outside the grid of 4 x 16 patches\. Rows go from 0 to 3, columns from 0 to 15\.$",
    ):
        draw_features(encoder, images, tmp_path / "features.png", (6, 0), resolution=64)
    assert not list(tmp_path.iterdir())
