"""Folders of image files: what is listed, and what is said of files that are damaged."""

import io
import os
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ijepa_enhanced.data.sources.base import HEAD
from ijepa_enhanced.data.sources.folder import FolderSource
from ijepa_enhanced.errors import SourceError, UnreadableImage
from source_files import heights, keys, noise_jpeg, png, write


def test_class_folders_are_labels(tmp_path):
    write(
        tmp_path,
        **{"dog/b.png": png(3), "cat/z.JPG": noise_jpeg(8, 8), "dog/deep/er/a.png": png(5), "cat/a.png": png(7)},
    )
    source = FolderSource(tmp_path)
    assert keys(source) == ["cat/a.png", "cat/z.JPG", "dog/b.png", "dog/deep/er/a.png"]
    assert source.classes == ["cat", "dog"]
    assert source.labels is not None
    np.testing.assert_array_equal(source.labels, [0, 0, 1, 1])
    assert source.labels.dtype == np.int64
    assert heights(source) == [7, 8, 3, 5]
    assert source.open(3).size == (6, 5)


def test_a_flat_folder_has_no_labels(tmp_path):
    source = FolderSource(write(tmp_path, **{"b.png": png(2), "a.webp": png(1), "notes.txt": b"x"}))
    assert (keys(source), source.labels, source.classes) == (["a.webp", "b.png"], None, None)


def test_a_folder_with_images_on_both_levels_has_no_labels(tmp_path):
    source = FolderSource(write(tmp_path, **{"dog/b.png": png(), "a.png": png()}))
    assert (keys(source), source.labels, source.classes) == (["a.png", "dog/b.png"], None, None)


def test_hidden_files_and_folders_are_left_out(tmp_path):
    write(tmp_path, **{"a/b.png": png(), "a/._b.png": b"junk", ".trash/c.png": png(), "a/.thumbs/d.png": png()})
    source = FolderSource(tmp_path)
    assert keys(source) == ["a/b.png"]
    assert source.classes == ["a"]


def test_classes_without_images_are_none(tmp_path):
    (tmp_path / "aardvark").mkdir()
    assert FolderSource(write(tmp_path, **{"bee/a.png": png()})).classes == ["bee"]


def test_links_are_followed(tmp_path):
    real = write(tmp_path / "real", **{"a.png": png()})
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "class").symlink_to(real, target_is_directory=True)
    assert keys(FolderSource(tmp_path / "set")) == ["class/a.png"]


def test_links_to_folders_above_are_not_followed(tmp_path):
    write(tmp_path / "set", **{"a.png": png(), "class/b.png": png()})
    for place in ("set/up", "set/class/up", "set/class/top"):
        (tmp_path / place).symlink_to(tmp_path / ("set" if place.endswith("up") else ""), target_is_directory=True)
    assert keys(FolderSource(tmp_path / "set")) == ["a.png", "class/b.png"]


def test_links_from_one_folder_to_another_and_back_end(tmp_path):
    write(tmp_path, **{"a/x.png": png(), "b/y.png": png()})
    (tmp_path / "a" / "to_b").symlink_to(tmp_path / "b", target_is_directory=True)
    (tmp_path / "b" / "to_a").symlink_to(tmp_path / "a", target_is_directory=True)
    assert keys(FolderSource(tmp_path)) == ["a/to_b/y.png", "a/x.png", "b/to_a/x.png", "b/y.png"]


def test_unreadable_files_of_a_folder(tmp_path):
    write(tmp_path, **{"a.png": b"", "b.png": b"text that is no image", "d.png": png()})
    (tmp_path / "c.png").symlink_to(tmp_path / "gone.png")
    source = FolderSource(tmp_path)
    for row, reason in enumerate(
        [
            "empty file",
            "not a JPEG, PNG, WebP, GIF, BMP, TIFF, AVIF, JPEG 2000, HEIC or NumPy file",
            "cannot be read: No such file or directory",
        ]
    ):
        for read in (source.open, source.size):
            with pytest.raises(UnreadableImage) as error:
                read(row)
            assert str(error.value) == reason
    assert source.size(3) == (4, 6)
    assert len(source.fingerprint()) == 64


def test_sizes_are_upright(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    source = FolderSource(write(tmp_path, **{"a.png": png(4, 6, exif=exif)}))
    assert source.size(0) == (6, 4)


def test_headers_longer_than_the_head(tmp_path):
    buffer = io.BytesIO()
    Image.new("RGB", (6, 4)).save(buffer, "JPEG", icc_profile=bytes(2 * HEAD))
    pixels = np.random.default_rng(0).integers(0, 256, (300, 400, 3), dtype=np.uint8)
    webp = io.BytesIO()
    exif = Image.Exif()
    exif[0x0112] = 6
    # The EXIF block of a WebP file lies behind its pixels.
    Image.fromarray(pixels).save(webp, "WEBP", lossless=True, exif=exif)
    assert len(webp.getvalue()) > 2 * HEAD
    source = FolderSource(write(tmp_path, **{"a.jpg": buffer.getvalue(), "b.webp": webp.getvalue()}))
    assert source.size(0) == (4, 6)
    assert source.size(1) == (400, 300)


class Counting(io.FileIO):
    """A file that counts what is read of it."""

    total = 0

    def readinto(self, buffer):
        count = super().readinto(buffer)
        Counting.total += count
        return count


@pytest.mark.parametrize(("name", "reads"), [("a.jpg", 1), ("a.tif", 3)])
def test_only_the_head_of_a_file_is_read_for_its_size(tmp_path, monkeypatch, name, reads):
    Image.open(io.BytesIO(noise_jpeg(400, 500))).save(tmp_path / name)
    assert (tmp_path / name).stat().st_size > 10 * HEAD
    opened = lambda path, mode, buffering: io.BufferedReader(Counting(path, mode), buffering)  # noqa: E731
    monkeypatch.setattr("ijepa_enhanced.data.sources.folder.open", opened, raising=False)
    monkeypatch.setattr(Counting, "total", 0)
    source = FolderSource(tmp_path)
    assert source.size(0) == (400, 500)
    assert 0 < Counting.total <= reads * HEAD


def test_a_disk_that_fails_is_not_a_damaged_image(tmp_path, monkeypatch):
    Image.new("RGB", (6, 4)).save(tmp_path / "a.jpg", icc_profile=bytes(5 * HEAD))  # a header longer than the head
    source = FolderSource(tmp_path)

    class Failing(io.FileIO):
        def readinto(self, buffer):
            raise OSError(5, "Input/output error")

    class FailingLater(io.FileIO):
        def readinto(self, buffer):
            if self.tell():
                raise OSError(5, "Input/output error")
            return super().readinto(buffer)

    for kind in (Failing, FailingLater):
        opened = lambda path, mode, buffering, kind=kind: io.BufferedReader(kind(path, mode), buffering)  # noqa: E731
        monkeypatch.setattr("ijepa_enhanced.data.sources.folder.open", opened, raising=False)
        with pytest.raises(UnreadableImage, match=r"^cannot be read: Input/output error$"):
            source.size(0)


def test_fingerprint_of_a_folder_knows_names_sizes_times_and_bytes(tmp_path):
    first = write(tmp_path / "first", **{"a.png": png(1), "b.png": png(2)})
    os.utime(first / "a.png", ns=(10**9, 10**9))
    before = FolderSource(first).fingerprint()
    assert FolderSource(first).fingerprint() == before
    os.utime(first / "a.png", ns=(10**9, 10**9 + 1))
    later = FolderSource(first).fingerprint()
    os.utime(first / "a.png", ns=(10**9, 10**9))
    (first / "a.png").rename(first / "aa.png")
    renamed = FolderSource(first).fingerprint()
    (first / "aa.png").rename(first / "a.png")
    (first / "a.png").write_bytes(png(1) + b"!")
    os.utime(first / "a.png", ns=(10**9, 10**9))
    longer = FolderSource(first).fingerprint()
    (first / "a.png").write_bytes(png(1, color="blue") + b"!")
    os.utime(first / "a.png", ns=(10**9, 10**9))
    other_bytes = FolderSource(first).fingerprint()
    assert len({before, later, renamed, longer, other_bytes}) == 5


def test_the_fingerprint_of_a_large_folder_reads_few_files_and_knows_what_is_added(tmp_path, monkeypatch):
    monkeypatch.setattr("ijepa_enhanced.data.sources.base.SAMPLE", 3)
    source = FolderSource(write(tmp_path, **{f"{name}/{n}.png": png() for name in "ab" for n in range(5)}))
    before = source.fingerprint()
    (tmp_path / "a" / "1.png").write_bytes(b"overwritten in place, between those that it looks into")
    assert source.fingerprint() == before
    (tmp_path / "b" / "4.png").write_bytes(b"overwritten, the last of them")
    overwritten = source.fingerprint()
    assert overwritten != before
    time.sleep(0.02)  # the clock of a file system may go in steps of 10 ms
    (tmp_path / "a" / "new.png").write_bytes(png())
    assert source.fingerprint() not in (before, overwritten)


def test_a_folder_that_cannot_be_listed(tmp_path, monkeypatch):
    write(tmp_path, **{"a/b.png": png(), "secret/c.png": png()})
    scandir = os.scandir

    def refuse(path):
        if Path(path).name == "secret":
            raise PermissionError(13, "Permission denied", path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(SourceError) as error:
        _ = FolderSource(tmp_path).listing
    assert str(error.value) == f"The folder {tmp_path / 'secret'} cannot be listed: Permission denied."
