"""Test which channels and bits reach the network, and which errors explain why others do not."""

import dataclasses
import io
import logging
import sys
from pathlib import Path

import imagecodecs
import numpy as np
import pytest
import tifffile
import torch
from PIL import Image

from ijepa_enhanced.data import opening
from ijepa_enhanced.data.catalog import open_catalog
from ijepa_enhanced.data.config import AugmentConfig, DataConfig
from ijepa_enhanced.data.decode import decode_views, decode_whole, displayed, picture_of
from ijepa_enhanced.data.loader import PackDataset
from ijepa_enhanced.data.opening import open_image, upright_size
from ijepa_enhanced.data.plan import Plan
from ijepa_enhanced.data.sources.folder import FolderSource
from ijepa_enhanced.data.sources.open import open_source
from ijepa_enhanced.errors import MissingReader, UnreadableImage
from ijepa_enhanced.ops.preprocess import Normalize

EXTRAS = ("tifffile", "imagecodecs", "pillow_heif")
DEEP = np.random.default_rng(0).integers(0, 65536, (24, 32, 6), dtype=np.uint16)


def tiff(pixels: np.ndarray, **options: object) -> bytes:
    buffer = io.BytesIO()
    tifffile.imwrite(buffer, pixels, **{"photometric": "minisblack", "planarconfig": "contig"} | options)
    return buffer.getvalue()


def encode(pixels: np.ndarray, file_format: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, file_format, **options)
    return buffer.getvalue()


def whole(data: bytes, channels: int) -> np.ndarray:
    return decode_whole(open_image(data), 1000, channels)


def first_pack(folder: Path, channels: int, **changes: float) -> tuple[Normalize, PackDataset, Plan]:
    """Return the loader for the images of a folder, and the normalization in front of the network."""
    source = FolderSource(folder)
    catalog = open_catalog(source, cache=False)
    config = DataConfig(str(folder), min_resolution=24, max_resolution=224, channels=channels, tokens_per_pack=4096)
    dataset = PackDataset(source, catalog, 8, changes=AugmentConfig(**changes), channels=channels)
    return Normalize((0.5,) * channels, (0.25,) * channels, 8), dataset, Plan(catalog, config, 8, seed=0)


def test_a_ramp_of_16_bits_reaches_the_network(tmp_path: Path) -> None:
    ramp = np.arange(65536, dtype=np.uint16).reshape(256, 256)
    (tmp_path / "a.png").write_bytes(encode(ramp))
    (tmp_path / "b.png").write_bytes(encode(ramp.T.copy()))
    normalize, dataset, plan = first_pack(tmp_path, 1, flip=0.5, blur=0.5, color=0.5)
    batch = dataset[plan.epoch(0)[0]]
    assert not batch.unreadable
    assert batch.packed.values.dtype == torch.float32
    assert len(normalize(batch.packed, batch.colors).values.unique()) > 10_000


def test_bits_may_be_mixed_and_the_pack_changes_no_view(tmp_path: Path) -> None:
    """uint8, uint16 and floats of one image give one view, and uint8 has the values that it has alone."""
    deep = DEEP[..., :3] // 257 * 257
    images = {
        "a.tif": tiff(deep, photometric="rgb"),
        "b.png": encode((deep // 257).astype(np.uint8)),
        "c.tif": tiff((deep / 65535).astype(np.float32), photometric="rgb"),
    }
    for name, data in images.items():
        (tmp_path / name).write_bytes(data)
    _, dataset, plan = first_pack(tmp_path, 3)
    pack = next(pack for pack in map(plan.epoch(0).__getitem__, range(1)) if len(pack.images) == 3)
    same = dataclasses.replace(pack, boxes=pack.boxes * 0 + [0, 0, 24, 32], grids=pack.grids * 0 + [3, 4])
    views = dict(zip(same.images.tolist(), dataset[same].packed.split(), strict=True))
    assert all(view.dtype == torch.float32 for view in views.values())
    alone = dataset[same.select(np.flatnonzero(same.images == 1))].packed.values
    assert alone.dtype == torch.uint8
    assert torch.equal(views[1], alone.float())
    for number in (0, 2):
        torch.testing.assert_close(views[number], views[1], rtol=0, atol=1e-4)  # rounding of float32 at 255


def test_all_bands_come_through_in_their_order() -> None:
    for data in (
        tiff(DEEP),
        tiff(np.moveaxis(DEEP, 2, 0).copy(), planarconfig="separate", compression="lzw"),
        tiff(DEEP, byteorder=">", compression="deflate", predictor=True, bigtiff=True),
    ):
        np.testing.assert_allclose(whole(data, 6), DEEP / 257, rtol=1e-6)  # float32
    floats = DEEP.astype(np.float32) - 30_000  # far from 0 to 1, where they stay
    np.testing.assert_allclose(whole(tiff(floats), 6), floats * 255, rtol=1e-6)
    small = (DEEP[..., :4] >> 8).astype(np.uint8)
    near_infrared = tiff(small, photometric="rgb", extrasamples=["unspecified"])
    assert whole(near_infrared, 4).dtype == np.uint8
    np.testing.assert_array_equal(whole(near_infrared, 4), small)
    np.testing.assert_array_equal(whole(near_infrared, 3), small[..., :3])  # as Pillow reads it
    # Pillow opens these as gray and as RGB, and would silently leave out bands.
    for data in (
        tiff(np.moveaxis(DEEP, 2, 0).copy(), planarconfig="separate", compression="lzw"),
        tiff((DEEP >> 8).astype(np.uint8), photometric="rgb", extrasamples=["unspecified"] * 3),
    ):
        with pytest.raises(UnreadableImage, match=r"^has 6 channels instead of 3"):
            whole(data, 3)
        assert not np.array_equal(*(picture_of(open_image(data), 100)[..., channel] for channel in (0, 2)))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_files_of_16_bits_are_turned_as_others_are(orientation: int) -> None:
    deep = DEEP[..., :3] // 257 * 257
    exif = Image.Exif()
    exif[0x0112] = orientation
    expected = whole(encode((deep // 257).astype(np.uint8), exif=exif), 3)
    for image in (
        open_image(tiff(deep, photometric="rgb", extratags=[(274, 3, 1, orientation, True)])),
        open_image(_with_exif(imagecodecs.png_encode(deep), exif)),
    ):
        assert upright_size(image) == expected.shape[:2]
        np.testing.assert_array_equal(decode_whole(image, 1000), expected)


def _with_exif(png: bytes, exif: Image.Exif) -> bytes:
    """A PNG with the EXIF data of another, before its pixels."""
    other = encode(np.zeros((1, 1), np.uint8), exif=exif)
    start = other.index(b"eXIf") - 4
    return png[:33] + other[start : start + 12 + int.from_bytes(other[start : start + 4])] + png[33:]


@pytest.mark.parametrize(
    ("mode", "channels", "others"),
    [("1", 1, 2), ("L", 1, 4), ("P", 3, 1), ("RGB", 3, 1), ("RGBA", 4, 1), ("CMYK", 4, 6), ("LA", 2, 1)],
)
def test_images_of_pillow_have_the_channels_of_their_mode(mode: str, channels: int, others: int) -> None:
    image = Image.fromarray((DEEP[..., :3] >> 8).astype(np.uint8)).convert(mode)
    size = np.array([[24, 32]])
    (view,) = decode_views(image, np.array([[0, 0, 24, 32]]), size, channels=channels)
    expected = np.asarray(image.convert({"1": "L", "P": "RGB"}.get(mode, mode))).reshape(24, 32, channels)
    np.testing.assert_array_equal(view, expected)
    s = "" if channels == 1 else "s"
    message = rf"^has {channels} channel{s} instead of {others} \(data\.channels\)$"
    with pytest.raises(UnreadableImage, match=message):
        decode_views(image, np.array([[0, 0, 24, 32]]), size, channels=others)


def test_integers_of_32_bits_are_gray_only_next_to_rgb() -> None:
    data = encode(DEEP[..., 0].astype(np.int32), "TIFF")
    assert whole(data, 3).max() == 255
    with pytest.raises(UnreadableImage, match=r"^has signed integers or more than 16 bits: save the values as"):
        whole(data, 1)


def test_readers_that_are_missing_are_named(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    for name in EXTRAS:
        monkeypatch.setitem(sys.modules, name, None)
    opening._warn_of_8_bits.cache_clear()
    install = r"run pip install 'ijepa-enhanced\[{0}\]', then `ijepa scan SOURCE`$"
    with pytest.raises(
        MissingReader, match=r"^needs the extra 'bands', as it is a TIFF .*: " + install.format("bands")
    ):
        open_image(tiff(DEEP))
    heic = b"\0\0\0\x14ftypheic\0\0\0\0heic" + bytes(200)
    with pytest.raises(
        MissingReader, match=r"^needs the extra 'heic', as it is a HEIC image: " + install.format("heic")
    ):
        open_image(heic)
    # 16-bit colors are still read, with the bits that Pillow keeps.
    for data in (imagecodecs.png_encode(DEEP[..., :3].copy()), tiff(DEEP[..., :3].copy(), photometric="rgb")):
        np.testing.assert_array_equal(whole(data, 3), DEEP[..., :3] >> 8)
    assert len(caplog.messages) == 1
    assert caplog.messages[0].endswith("To read all, run pip install 'ijepa-enhanced[bands]'.")


def test_new_runs_try_again_what_an_extra_was_missing_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.tif").write_bytes(tiff(DEEP))
    (tmp_path / "b.png").write_bytes(encode(DEEP[..., 0]))
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "tifffile", None)
        assert len(open_catalog(open_source(str(tmp_path))).unreadable) == 1
    assert len(open_catalog(open_source(str(tmp_path))).unreadable) == 1
    assert len(open_catalog(open_source(str(tmp_path)), retry=True).unreadable) == 0


def test_an_image_of_other_channels_is_named_and_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    (tmp_path / "a.tif").write_bytes(tiff(DEEP))
    (tmp_path / "b.png").write_bytes(encode(DEEP[..., :3].astype(np.uint8)))
    (tmp_path / "c.tif").write_bytes(tiff(DEEP))
    _, dataset, plan = first_pack(tmp_path, 6)
    batch = dataset[plan.epoch(0)[0]]
    assert batch.unreadable == ((1, "has 3 channels instead of 6 (data.channels)"),)
    assert batch.packed.values.shape[1] == 8 * 8 * 6


def test_pictures_show_the_first_three_channels_stretched() -> None:
    ramp = np.linspace(100, 101, 101, dtype=np.float32)[None, :, None] * np.array([1, 2, 3, 9], np.float32)
    shown = displayed(ramp)
    assert shown.shape == (1, 101, 3)
    for channel in range(3):
        np.testing.assert_array_equal(shown[0, [0, 2, 50, 98, 100], channel], [0, 0, 128, 255, 255])
    pair = np.stack([ramp[..., 0], ramp[..., 3]], axis=2)
    np.testing.assert_array_equal(displayed(pair), shown[..., :1].repeat(3, axis=2))
    small = (DEEP >> 8).astype(np.uint8)
    np.testing.assert_array_equal(displayed(small), small[..., :3])
    assert picture_of(open_image(tiff(DEEP)), 10).shape[2] == 3
