"""Scanning, caching, and what the index says of images that cannot be read."""

import csv
import dataclasses
import io
import logging
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ijepa_enhanced.data.catalog import cache_folder, open_catalog, summary
from ijepa_enhanced.data.sources.folder import FolderSource
from ijepa_enhanced.data.sources.open import open_source

DATA = Path(os.environ.get("IJEPA_DATA", Path(__file__).parents[3] / "shared" / "data"))


def names(index):
    return [index.key(position) for position in range(len(index.rows))]


def png(height, width):
    buffer = io.BytesIO()
    Image.new("L", (width, height)).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache folder of the test's own."""
    monkeypatch.setenv("IJEPA_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def folder(tmp_path):
    """Two classes; one image of each cannot be read."""
    files = {
        "ant/a.png": png(10, 40),
        "ant/b.png": b"",
        "ant/c.png": png(20, 20),
        "bee/a.png": png(90, 10),
        "bee/b.png": b"a text, not an image",
    }
    for name, data in files.items():
        path = tmp_path / "images" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return tmp_path / "images"


@pytest.fixture
def scanned(monkeypatch):
    """The rows whose headers are read, as they are read."""
    rows = []
    size = FolderSource.size

    def spy(source, row):
        rows.append(row)
        return size(source, row)

    monkeypatch.setattr(FolderSource, "size", spy)
    return rows


def assert_same(first, second):
    for field in dataclasses.fields(first):
        one, other = getattr(first, field.name), getattr(second, field.name)
        if isinstance(one, np.ndarray):
            np.testing.assert_array_equal(one, other)
            assert one.dtype == other.dtype
        else:
            assert one == other


def test_the_index_of_a_folder(folder):
    index = open_catalog(FolderSource(folder), cache=False)
    assert index.heights.tolist() == [10, 20, 90]
    assert index.widths.tolist() == [40, 20, 10]
    assert index.rows.tolist() == [0, 2, 3]
    assert index.labels.tolist() == [0, 0, 1]
    assert (index.heights.dtype, index.widths.dtype) == (np.int32, np.int32)
    assert (index.rows.dtype, index.labels.dtype) == (np.int64, np.int64)
    assert index.classes == ["ant", "bee"]
    assert names(index) == ["ant/a.png", "ant/c.png", "bee/a.png"]
    assert tuple(index.unreadable) == (
        ("ant/b.png", "empty file"),
        ("bee/b.png", "not a JPEG, PNG, WebP, GIF, BMP, TIFF or AVIF image"),
    )


def test_without_labels(folder):
    index = open_catalog(FolderSource(folder / "ant"), cache=False)
    assert (index.labels, index.classes) == (None, None)
    assert summary(index)["labels"] == 0


def test_a_cached_index_is_the_same_and_reads_no_header(folder, cache, scanned):
    first = open_catalog(FolderSource(folder))
    assert scanned == [0, 1, 2, 3, 4]
    assert [path.suffix for path in cache.iterdir()] == [".parquet"]
    second = open_catalog(FolderSource(folder))
    assert len(scanned) == 5
    assert_same(first, second)
    assert_same(first, open_catalog(FolderSource(folder), cache=False))
    assert len(scanned) == 10


def test_nothing_is_written_without_a_cache(folder, cache):
    open_catalog(FolderSource(folder), cache=False)
    assert not cache.exists()


def test_a_changed_file_is_scanned_again(folder, cache, scanned):
    before = open_catalog(FolderSource(folder))
    (folder / "ant" / "b.png").write_bytes(png(5, 5))
    after = open_catalog(FolderSource(folder))
    assert len(scanned) == 10
    assert after.rows.tolist() == [0, 1, 2, 3]
    assert after.hash != before.hash


def test_a_file_replaced_by_one_of_the_same_length_is_scanned_again(folder, cache):
    before = open_catalog(FolderSource(folder))
    path = folder / "ant" / "a.png"
    assert len(png(10, 40)) == len(png(11, 40))
    path.write_bytes(png(11, 40))
    os.utime(path, ns=(1, 1))
    after = open_catalog(FolderSource(folder))
    assert (before.heights[0], after.heights[0]) == (10, 11)


def test_a_file_that_may_be_read_now_is_scanned_again(folder, cache, scanned, monkeypatch):
    with monkeypatch.context() as closed:
        closed.setattr("os.access", lambda path, mode: False)
        open_catalog(FolderSource(folder))
    scanned.clear()
    open_catalog(FolderSource(folder))
    assert scanned


def test_the_hash_does_not_know_where_the_images_lie(folder, tmp_path, cache):
    moved = shutil.copytree(folder, tmp_path / "elsewhere" / "copy")
    assert open_catalog(FolderSource(moved), cache=False).hash == open_catalog(FolderSource(folder)).hash


@pytest.mark.parametrize("change", ["size", "name", "class", "fewer", "row"])
def test_the_hash_knows_what_the_images_are(folder, change):
    before = open_catalog(FolderSource(folder), cache=False).hash
    if change == "size":
        (folder / "ant" / "a.png").write_bytes(png(40, 10))
    elif change == "name":
        (folder / "ant" / "a.png").rename(folder / "ant" / "aa.png")
    elif change == "class":
        (folder / "bee").rename(folder / "aaa")
    elif change == "row":
        (folder / "ant" / "0.png").write_bytes(b"")  # the rows of all that can be read move on by one
    else:
        (folder / "bee" / "a.png").write_bytes(b"")
    assert open_catalog(FolderSource(folder), cache=False).hash != before


def test_the_hash_knows_the_labels(folder):
    source = FolderSource(folder)
    before = open_catalog(source, cache=False).hash
    source.labels = 1 - source.labels
    assert open_catalog(source, cache=False).hash != before


def test_names_that_are_no_text(folder, cache):
    (folder / "bee" / os.fsdecode(b"\xff.png")).write_bytes(png(3, 3))
    for _ in range(2):
        assert os.fsencode(open_catalog(FolderSource(folder)).keys[-1]) == b"bee/\xff.png"


def test_a_corrupt_cache_is_rebuilt(folder, cache, scanned, caplog):
    first = open_catalog(FolderSource(folder))
    (file,) = cache.iterdir()
    whole = file.read_bytes()
    for damage in (b"", b"no parquet file", whole[: len(whole) // 2]):
        file.write_bytes(damage)
        scanned.clear()
        caplog.clear()
        assert_same(first, open_catalog(FolderSource(folder)))
        assert scanned == [0, 1, 2, 3, 4]
        assert f"The cached index {file} cannot be read and is made anew: " in caplog.text
        scanned.clear()
        open_catalog(FolderSource(folder))
        assert not scanned, "what was rebuilt is cached again"


def test_a_cache_that_cannot_be_written_is_a_warning(folder, cache, caplog):
    cache.write_text("a file where the folder should be")
    index = open_catalog(FolderSource(folder))
    assert names(index) == ["ant/a.png", "ant/c.png", "bee/a.png"]
    (record,) = [record for record in caplog.records if record.levelno == logging.WARNING]
    assert record.getMessage().startswith(f"The index cannot be cached in {cache}: ")


def test_a_failed_write_leaves_nothing_behind(folder, cache, monkeypatch, caplog):
    import pyarrow.parquet

    def fill_the_disk(table, path):
        Path(path).write_bytes(b"PAR1")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(pyarrow.parquet, "write_table", fill_the_disk)
    open_catalog(FolderSource(folder))
    assert list(cache.iterdir()) == []
    assert "No space left on device" in caplog.text


def test_where_the_cache_is(monkeypatch, tmp_path):
    monkeypatch.delenv("IJEPA_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_folder() == tmp_path / ".cache" / "ijepa_enhanced"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_folder() == tmp_path / "xdg" / "ijepa_enhanced"
    monkeypatch.setenv("IJEPA_CACHE", str(tmp_path / "own"))
    assert cache_folder() == tmp_path / "own"


def test_nothing_readable(tmp_path, cache):
    (tmp_path / "a.png").write_bytes(b"")
    for _ in range(2):
        index = open_catalog(FolderSource(tmp_path))
        assert tuple(index.unreadable) == (("a.png", "empty file"),)
        assert summary(index) == {"images": 0, "unreadable": 1, "labels": 0, "side": {}, "aspect": {}}


def test_a_long_scan_says_how_far_it_is(tmp_path, monkeypatch, caplog):
    caplog.set_level("INFO")
    for number in range(3):
        (tmp_path / f"{number}.png").write_bytes(b"")
    monkeypatch.setattr("ijepa_enhanced.data.catalog.PATIENCE", -1.0)
    open_catalog(FolderSource(tmp_path), cache=False)
    assert caplog.messages == [f"Scanning {tmp_path}: {number} of 3 images" for number in (1, 2, 3)]


def test_summary_by_hand(folder):
    # Sides of 20, 20 and 30 px; aspects of 4, 1 and 1 / 9. Quantiles lie on straight lines between them.
    assert summary(open_catalog(FolderSource(folder), cache=False)) == {
        "images": 3,
        "unreadable": 2,
        "labels": 2,
        "side": {"5%": 20.0, "25%": 20.0, "50%": 20.0, "75%": 25.0, "95%": 29.0},
        "aspect": {"5%": 0.2, "25%": 0.556, "50%": 1.0, "75%": 2.5, "95%": 3.7},
    }


@pytest.mark.skipif(not (DATA / "caltech-101").is_dir(), reason=f"no caltech-101 in {DATA} (set IJEPA_DATA)")
def test_caltech_sizes_are_those_of_its_own_table(cache):
    source = open_source(str(DATA / "caltech-101" / "val-000000.tar"))
    index = open_catalog(source)
    assert_same(index, open_catalog(source))
    assert summary(index)["images"] == 1434
    assert tuple(index.unreadable) == ()
    with open(DATA / "caltech-101" / "samples.tsv", newline="") as file:
        table = {line["key"]: line for line in csv.DictReader(file, delimiter="\t")}
    for key, height, width in zip(names(index), index.heights, index.widths, strict=True):
        row = table[key.partition(":")[2].removesuffix(".jpg")]
        assert (int(row["h"]), int(row["w"])) == (height, width)


def test_a_part_of_an_index_is_in_the_order_asked_for(folder):
    whole = open_catalog(open_source(str(folder)), cache=False)
    part = whole.select(np.array([2, 0]))
    assert part.keys == [whole.keys[2], whole.keys[0]]
    for name in ("heights", "widths", "rows", "labels"):
        assert getattr(part, name).tolist() == [getattr(whole, name)[2], getattr(whole, name)[0]]
