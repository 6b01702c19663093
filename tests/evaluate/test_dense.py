"""The dense probe counts pixels: of patches, of classes, and by the image's own size."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from ijepa_enhanced import Encoder
from ijepa_enhanced.data.catalog import open_catalog
from ijepa_enhanced.data.sources.folder import FolderSource
from ijepa_enhanced.data.sources.open import open_source
from ijepa_enhanced.errors import SourceError, UnreadableImage
from ijepa_enhanced.evaluate import dense as dense_module
from ijepa_enhanced.evaluate import linear
from ijepa_enhanced.evaluate.dense import RawPatches, bootstrap, dense, mean_iou, patch_labels
from ijepa_enhanced.evaluate.label_maps import map_of, open_maps
from ijepa_enhanced.evaluate.tokens import InferenceConfig, LabelledSource, stored_tokens, uncounted
from ijepa_enhanced.models.config import EncoderConfig
from ijepa_enhanced.models.preprocessing import Preprocessing
from ijepa_enhanced.randomness import Purpose, generator

SETTING = InferenceConfig(48, workers=0)


def test_pixels_of_patches_by_hand() -> None:
    labels = np.array([[0, 0, 2, 2, 7], [0, 0, 2, 255, 7], [7, 7, 7, 7, 0]], dtype=np.uint8)
    # Centers at 1/6, 1/2, 5/6 of the height: the middle row belongs to the lower patch. 0.5 of the width likewise.
    found = patch_labels(labels, (2, 2), np.array([0, 2, 7], dtype=np.uint8))
    assert found.tolist() == [[2, 0, 0], [0, 2, 1], [2, 0, 2], [1, 1, 3]]


def test_every_pixel_belongs_to_one_patch() -> None:
    labels = np.random.default_rng(0).integers(0, 3, (37, 53), dtype=np.uint8)
    found = patch_labels(labels, (4, 60), np.arange(3, dtype=np.uint8))
    assert found.sum(dim=0).tolist() == np.bincount(labels.ravel()).tolist()
    assert (found.view(4, 60, 3).sum(dim=(1, 2)) > 450).all()  # about 37 / 4 rows of 53 pixels


def test_mean_iou_by_hand() -> None:
    # 8 pixels of one class and 2 of another; of 7 that were predicted as the first one, 6 were right, and so on.
    areas = np.array([[6, 1, 0], [8, 2, 0], [7, 3, 0]])
    assert mean_iou(areas) == pytest.approx((6 / 9 + 1 / 4) / 2)
    assert mean_iou(np.stack([areas, 0 * areas + [1, 2, 0]])).tolist() == pytest.approx([(6 / 9 + 1 / 4) / 2, 1])


def test_pixels_of_images_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    """One row of two patches, whose classes are predicted as 4 and 6; the label 255 does not count."""
    labels = np.array([[4, 4, 6, 255], [5, 255, 6, 4]], dtype=np.uint8)

    def probe(view: torch.Tensor) -> torch.Tensor:
        return view

    probe.classes = np.array([4, 6], dtype=np.uint8)  # type: ignore[attr-defined]
    monkeypatch.setattr(dense_module, "map_of", lambda maps, row: labels)
    grid, one = torch.tensor([[1, 2]]), torch.tensor([0])
    tokens = SimpleNamespace(values=torch.eye(2), lengths=one + 2, image_ids=one, grids=grid)
    correct, labeled, predicted = dense_module.pixel_counts(*cast(Any, (probe, tokens, None)))[0]
    assert (correct[4], correct[5], correct[6], correct.sum()) == (2, 0, 2, 4)
    assert (labeled[4], labeled[5], labeled[6], labeled.sum()) == (3, 1, 2, 6)
    assert (predicted[4], predicted[6], predicted.sum()) == (3, 3, 6)


def test_the_interval_is_that_of_samples_drawn_one_by_one() -> None:
    """Images of very different sizes, of three classes; ten have no correct pixel, and the last one no label."""
    rng = np.random.default_rng(0)
    labeled = rng.integers(1, 50, (30, 3)) * rng.choice([1, 20], (30, 1))
    correct = (labeled * rng.random((30, 3))).astype(np.int64)
    correct[:10] = labeled[-1] = correct[-1] = 0
    predicted = correct + rng.permuted(labeled - correct, axis=1)
    areas = np.stack([correct, labeled, predicted], axis=1)
    scores = []
    for _ in range(4000):
        drawn = areas[rng.choice(29, 29)].sum(axis=0)
        scores.append(np.mean(drawn[0] / (drawn[1] + drawn[2] - drawn[0])))
    score = mean_iou(areas.sum(axis=0))
    low, high = 2 * score - np.quantile(scores, (0.975, 0.025))
    # Each end has a standard error of 2% of the width, and that of 4,000 samples one of 1%: 10% is four of both.
    assert bootstrap(areas.astype(np.int32), rng) == pytest.approx((low, high), abs=0.1 * (high - low))


def test_an_interval_ends_at_0_and_1() -> None:
    areas = np.zeros((3, 3, 2), dtype=np.int32)
    for correct, end, expected in (((100, 100, 85), 1, 1.0), ((0, 0, 15), 0, 0.0)):
        areas[:, 1, 0], areas[:, 0, 0], areas[:, 2, 0] = 100, correct, correct
        assert bootstrap(areas, np.random.default_rng(0))[end] == expected


@pytest.fixture(scope="module")
def encoder() -> Encoder:
    return Encoder.random(EncoderConfig(variant="Ti", depth=1, patch_size=8).architecture, Preprocessing(32), 0)


@pytest.fixture
def halves(tmp_path: Path) -> Path:
    """Eight images of a dark and a light part, with labels 3 and 8, and a border that does not count."""
    rng = np.random.default_rng(0)
    for name in ("images", "labels"):
        (tmp_path / name).mkdir()
    for number in range(8):
        edge, width = 8 * (2 + number % 4), 48 + 8 * (number % 3)
        pixels = rng.integers(0, 60, (48, width, 3), dtype=np.uint8)
        pixels[:, edge:] += 150
        labels = np.full((48, width), 3, dtype=np.uint8)
        labels[:, edge:] = 8
        labels[:, edge - 2 : edge + 2] = 255
        Image.fromarray(pixels).save(tmp_path / "images" / f"{number}.jpg", quality=95)
        Image.fromarray(labels).save(tmp_path / "labels" / f"{number}.png")
    return tmp_path


def test_light_and_dark_are_told_apart(encoder: Encoder, halves: Path) -> None:
    maps = open_maps(str(halves), "train")
    scores = dict(dense(encoder, maps, maps, SETTING))
    assert list(scores) == [name + end for name in ("dense_miou", "dense_knn") for end in ("", "_low", "_high")]
    assert min(scores.values()) > 0.9


def test_an_interval_is_around_its_score(encoder: Encoder, halves: Path) -> None:
    """The features of an untrained encoder do not tell all these labels apart."""
    for number in range(8):
        path = halves / "labels" / f"{number}.png"
        labels = np.array(Image.open(path))
        labels[:24][labels[:24] < 255] += 1
        Image.fromarray(labels).save(path)
    maps = open_maps(str(halves), "train")
    scores = dict(dense(encoder, maps, maps, SETTING))
    for name in ("dense_miou", "dense_knn"):
        assert scores[f"{name}_low"] < scores[name] < scores[f"{name}_high"]
    assert scores["dense_miou_low"] != scores["dense_knn_low"]


def test_the_features_of_raw_patches_are_their_pixels(encoder: Encoder, tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (16, 24, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    source = open_source(str(tmp_path))
    floor = RawPatches(encoder.network, encoder.preprocessing)
    with stored_tokens(floor, LabelledSource(source, open_catalog(source)), InferenceConfig(None), uncounted) as tokens:
        found = tokens.values.float()
    assert found.shape == (6, floor.width) == (6, 192)
    patches = torch.from_numpy(pixels).view(2, 8, 3, 8, 3).transpose(1, 2).reshape(6, 64, 3)
    mean, std = (torch.tensor(values) for values in (encoder.preprocessing.mean, encoder.preprocessing.std))
    expected = (patches / 255 - mean) / std
    # Stored as bfloat16, which has 8 significant bits.
    torch.testing.assert_close(found.view(6, 64, 3), expected, rtol=2**-8, atol=0)


def photo(folder: Path, width: int, orientation: int) -> np.ndarray:
    """Write a photo of 16 pixels in height with a label map over the upright image, and return that map."""
    labels = np.arange(16 * width, dtype=np.uint8).reshape(16, width) // 60
    stored = {1: labels, 3: labels[::-1, ::-1], 6: np.rot90(labels)}[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    for name in ("images", "labels"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.ascontiguousarray(stored)).convert("RGB").save(folder / "images" / "a.jpg", exif=exif)
    Image.fromarray(labels).save(folder / "labels" / "a.png")
    return labels


@pytest.mark.parametrize(("width", "orientation", "said"), [(24, 1, 0), (24, 6, 0), (24, 3, 1), (16, 6, 1)])
def test_label_maps_lie_over_the_upright_image(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, width: int, orientation: int, said: int
) -> None:
    labels = photo(tmp_path, width, orientation)
    maps = open_maps(str(tmp_path), "train")
    for _ in range(2):
        np.testing.assert_array_equal(map_of(maps, 0), labels)
    assert [message.partition(", and")[0] for message in caplog.messages] == [
        f"a.jpg in {tmp_path}/images is rotated or flipped by its EXIF orientation"
    ] * said


def test_a_label_map_over_the_pixels_as_they_are_stored_is_refused(tmp_path: Path) -> None:
    labels = photo(tmp_path, 24, 6)
    Image.fromarray(np.ascontiguousarray(np.rot90(labels))).save(tmp_path / "labels" / "a.png")
    with pytest.raises(UnreadableImage) as error:
        map_of(open_maps(str(tmp_path), "train"), 0)
    assert str(error.value) == (
        f"The label map of a.jpg in {tmp_path}/images is 24 x 16 px, but its image is 16 x 24 px after its EXIF "
        "orientation (6) is applied."
    )


def test_a_label_map_is_turned_by_its_own_orientation(tmp_path: Path) -> None:
    labels, exif = photo(tmp_path, 24, 1), Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(np.ascontiguousarray(np.rot90(labels))).save(tmp_path / "labels" / "a.png", exif=exif)
    np.testing.assert_array_equal(map_of(open_maps(str(tmp_path), "train"), 0), labels)


def test_a_label_map_of_one_bit(tmp_path: Path) -> None:
    labels = photo(tmp_path, 24, 1) > 2
    Image.fromarray(labels).save(tmp_path / "labels" / "a.png")
    np.testing.assert_array_equal(map_of(open_maps(str(tmp_path), "train"), 0), labels.astype(np.uint8))


def test_no_more_images_are_used_than_are_allowed(
    encoder: Encoder, halves: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fit, seen = dense_module.softmax_regression, []

    def spy(x: torch.Tensor, *arguments: Any, rows: torch.Tensor | None = None) -> torch.Tensor:
        seen.append(len(x) if rows is None else len(rows))
        return fit(x, *arguments, rows=rows)

    monkeypatch.setattr(dense_module, "softmax_regression", spy)
    monkeypatch.setattr(dense_module, "MOST_PATCHES", 150)
    maps = open_maps(str(halves), "train")
    list(dense(encoder, maps, maps, SETTING))
    # Of images of 36 patches each, give or take, four.
    assert 110 < max(seen) <= 150


def test_the_synthetic_images_have_label_maps(encoder: Encoder) -> None:
    maps = open_maps("synthetic", "val")
    labels = maps.label_map(5)
    assert labels.shape == (maps.catalog.heights[5], maps.catalog.widths[5])
    assert maps.catalog.labels is not None
    assert np.unique(labels).tolist() == [0, 1 + maps.catalog.labels[5]]


def test_what_is_no_pair_is_an_error(encoder: Encoder, halves: Path, pictures: Path) -> None:
    with pytest.raises(SourceError) as error:
        open_maps(str(pictures), "train")
    assert str(error.value) == (
        f"{pictures} has no label maps. For the protocol dense, put the images into {pictures}/images and a PNG of the "
        f"same name for each image into {pictures}/labels, or use 'synthetic'."
    )
    known = open_maps(str(halves), "train")
    path = halves / "labels" / "2.png"

    def fails(error: type[Exception], message: str) -> None:
        with pytest.raises(error) as caught:
            list(dense(encoder, known, open_maps(str(halves), "val"), SETTING))
        assert str(caught.value) == message

    labels = np.array(Image.open(path))
    Image.fromarray(labels[:40]).save(path)
    fails(
        UnreadableImage,
        f"The label map of 2.jpg in {halves}/images is 40 x 64 px, but its image is 48 x 64 px.",
    )
    Image.fromarray(labels).convert("RGB").save(path)
    modes = "its image mode must be L (one channel), P (palette) or 1 (one bit), not RGB"
    fails(UnreadableImage, f"{path} is not a label map: {modes}.")
    Image.fromarray(labels.astype(np.uint16) + 256).save(path)
    fails(UnreadableImage, f"{path} is not a label map: {modes.replace('RGB', 'I;16')}.")
    Image.fromarray(labels).save(path)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UnreadableImage, match=f"^The label map {path} cannot be read: "):
        list(dense(encoder, known, open_maps(str(halves), "val"), SETTING))
    path.write_bytes(b"no image")
    fails(
        UnreadableImage,
        f"The label map {path} cannot be read: not a JPEG, PNG, WebP, GIF, BMP, TIFF, AVIF, JPEG 2000, HEIC or NumPy "
        "file.",
    )
    path.unlink()
    fails(UnreadableImage, f"The label map {path} cannot be read: No such file or directory.")


def test_maps_that_label_nothing_are_an_error(encoder: Encoder, halves: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    for name in ("images", "labels"):
        (other / name).mkdir(parents=True)
    (other / "images" / "0.jpg").write_bytes((halves / "images" / "0.jpg").read_bytes())
    Image.new("L", (48, 48), 255).save(other / "labels" / "0.png")
    some, none = open_maps(str(halves), "train"), open_maps(str(other), "train")
    for train, val in ((some, none), (none, some)):
        with pytest.raises(SourceError) as caught:
            list(dense(encoder, train, val, SETTING))
        assert str(caught.value) == (
            f"The label maps of {other}/images have no labels: every pixel is 255, which is ignored."
        )


def test_labels_of_an_image_that_cannot_be_decoded_are_not_enough(
    encoder: Encoder, halves: Path, tmp_path: Path
) -> None:
    other = tmp_path / "other"
    for name in ("images", "labels"):
        (other / name).mkdir(parents=True)
        for path in sorted((halves / name).glob("[01].*")):
            (other / name / path.name).write_bytes(path.read_bytes())
    broken, labels = other / "images" / "0.jpg", np.array(Image.open(other / "labels" / "1.png"))
    broken.write_bytes(broken.read_bytes()[:700])
    Image.fromarray(np.full_like(labels, 255)).save(other / "labels" / "1.png")
    with pytest.raises(SourceError, match=f"^The label maps of {other}/images have no labels"):
        list(dense(encoder, open_maps(str(halves), "train"), open_maps(str(other), "val"), SETTING))


def test_the_strength_is_chosen_by_one_image_of_two(
    encoder: Encoder, halves: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fit, seen = dense_module.softmax_regression, []

    def spy(x: torch.Tensor, *arguments: Any, rows: torch.Tensor | None = None) -> torch.Tensor:
        seen.append(len(x) if rows is None else len(rows))
        return fit(x, *arguments, rows=rows)

    monkeypatch.setattr(dense_module, "softmax_regression", spy)
    monkeypatch.setattr(dense_module, "MOST_PATCHES", 80)
    maps = open_maps(str(halves), "train")
    list(dense(encoder, maps, maps, SETTING))
    assert 25 < seen[0] < seen[1]


def test_images_without_a_label_are_not_held_out(encoder: Encoder, halves: Path) -> None:
    for number in range(2, 8):
        (halves / "images" / f"{number}.jpg").unlink()
    Image.new("L", (48, 48), 255).save(halves / "labels" / "0.png")
    maps = open_maps(str(halves), "train")
    for seed in range(4):
        assert dict(dense(encoder, maps, maps, SETTING, seed=seed))["dense_miou"] > 0.9


def test_a_class_that_the_drawn_images_lack_is_missed(
    encoder: Encoder, halves: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One or two of the eight images are drawn, and the last one to be drawn alone has label 9."""
    monkeypatch.setattr(dense_module, "MOST_PATCHES", 80)
    path = halves / "labels" / f"{generator(0, Purpose.PROTOCOL).permutation(8)[-1]}.png"
    labels = np.array(Image.open(path))
    labels[:4, :4] = 9
    Image.fromarray(labels).save(path)
    maps = open_maps(str(halves), "train")
    # Two classes that are told apart, as above, and one that is never found.
    assert 0.6 < dict(dense(encoder, maps, maps, SETTING))["dense_miou"] <= 2 / 3


@pytest.mark.parametrize("block", [1, 500, 2**22])
def test_logits_in_bands_give_the_classes_of_all_at_once(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear, "BLOCK", block)
    logits = torch.randn(5, 3, 4, generator=torch.Generator().manual_seed(0))
    whole = F.interpolate(logits[None], size=(31, 50), mode="bilinear", align_corners=False)[0]
    assert dense_module.predict(logits, (31, 50)).tolist() == whole.argmax(dim=0).tolist()


def test_maps_may_lie_in_folders_of_splits(halves: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("images", "labels"):
        (halves / name / "train").mkdir()
        for path in (halves / name).glob("*.*"):
            path.rename(halves / name / "train" / path.name)
    maps = open_maps(str(halves), "train")
    assert sorted(np.unique(maps.label_map(0)).tolist()) == [3, 8, 255]
    monkeypatch.setattr(FolderSource, "make_listing", pytest.fail)  # the catalog is there: nothing is listed again
    assert maps.label_map(7).shape == open_maps(str(halves), "train").label_map(7).shape


def test_a_label_that_training_lacks_is_an_error(encoder: Encoder, halves: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    for name, suffix in (("images", "jpg"), ("labels", "png")):
        (other / name).mkdir(parents=True)
        (other / name / f"0.{suffix}").write_bytes((halves / name / f"0.{suffix}").read_bytes())
    path = other / "labels" / "0.png"
    labels = np.array(Image.open(path))
    labels[0, 0] = 9
    Image.fromarray(labels).save(path)
    with pytest.raises(SourceError) as caught:
        list(dense(encoder, open_maps(str(halves), "train"), open_maps(str(other), "val"), SETTING))
    assert str(caught.value) == (
        f"The label map of 0.jpg in {other}/images contains the label 9, which does not occur in {halves}/images. Add "
        "images with that label, or set its pixels to 255 to ignore them."
    )
