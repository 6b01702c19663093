"""The catalog: what it says, when it is made again, and how processes share it."""

import csv
import dataclasses
import io
import logging
import os
import pickle
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from ijepa_enhanced.data.catalog import cache_folder, open_catalog, report_unreadable, scan, summary
from ijepa_enhanced.data.listing import FORMAT, map_listing, save_listing
from ijepa_enhanced.data.sources.folder import FolderSource
from ijepa_enhanced.data.sources.open import open_source
from ijepa_enhanced.errors import RunError, UnreadableImage

DATA = Path(os.environ.get("IJEPA_DATA", Path(__file__).parents[3] / "shared" / "data"))


def names(catalog):
    return [catalog.key(position) for position in range(len(catalog.rows))]


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
    size = FolderSource.size  # called by threads, in any order

    def spy(source, row):
        rows.append(row)
        return size(source, row)

    monkeypatch.setattr(FolderSource, "size", spy)
    return rows


def assert_same(first, second):
    for name in ("heights", "widths", "rows", "labels"):
        one, other = getattr(first, name), getattr(second, name)
        np.testing.assert_array_equal(one, other)
        assert one.dtype == other.dtype
    assert (first.classes, first.hash, names(first)) == (second.classes, second.hash, names(second))
    assert [*first.unreadable] == [*second.unreadable]


def test_the_catalog_of_a_folder(folder):
    catalog = open_catalog(FolderSource(folder), cache=False)
    assert catalog.heights.tolist() == [10, 20, 90]
    assert catalog.widths.tolist() == [40, 20, 10]
    assert catalog.rows.tolist() == [0, 2, 3]
    assert catalog.labels.tolist() == [0, 0, 1]
    assert (catalog.heights.dtype, catalog.widths.dtype) == (np.int32, np.int32)
    assert (catalog.rows.dtype, catalog.labels.dtype) == (np.int64, np.int64)
    assert catalog.classes == ["ant", "bee"]
    assert names(catalog) == ["ant/a.png", "ant/c.png", "bee/a.png"]
    assert tuple(catalog.unreadable) == (
        ("ant/b.png", "empty file"),
        ("bee/b.png", "not a JPEG, PNG, WebP, GIF, BMP, TIFF, AVIF, JPEG 2000, HEIC or NumPy file"),
    )


def test_without_labels(folder):
    catalog = open_catalog(FolderSource(folder / "ant"), cache=False)
    assert (catalog.labels, catalog.classes) == (None, None)
    assert summary(catalog)["labels"] == 0


def files(cache):
    return [path for path in cache.iterdir() if not path.name.startswith(".")]


def test_a_catalog_that_is_there_is_the_same_and_reads_no_header(folder, cache, scanned):
    first = open_catalog(FolderSource(folder))
    assert sorted(scanned) == [0, 1, 2, 3, 4]
    assert [path.suffix for path in files(cache)] == [".arrow"]
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


def test_an_image_that_is_added_during_the_scan_is_found_by_the_next(folder, cache, monkeypatch):
    for place in (folder, folder / "ant", folder / "bee"):
        os.utime(place, (1, 1))
    walk = FolderSource._walk

    def walk_and_add(source, times):
        yield from walk(source, times)
        (folder / "ant" / "new.png").write_bytes(png(30, 30))

    monkeypatch.setattr(FolderSource, "_walk", walk_and_add)
    assert len(open_catalog(FolderSource(folder)).rows) == 3
    monkeypatch.setattr(FolderSource, "_walk", walk)
    assert len(open_catalog(FolderSource(folder)).rows) == 4


def test_a_file_replaced_by_one_of_the_same_length_is_scanned_again(folder, cache):
    before = open_catalog(FolderSource(folder))
    path = folder / "ant" / "a.png"
    assert len(png(10, 40)) == len(png(11, 40))
    path.write_bytes(png(11, 40))
    os.utime(path, ns=(1, 1))
    after = open_catalog(FolderSource(folder))
    assert (before.heights[0], after.heights[0]) == (10, 11)


def test_sets_of_the_same_names_sizes_and_times_are_told_apart(tmp_path):
    """Archives and package stores set all times to one value. These images also begin and end with the same bytes."""
    for name, middle in (("one", 0), ("two", 255)):
        (tmp_path / name).mkdir()
        pixels = np.zeros((64, 64, 3), np.uint8)
        pixels[24:40, 24:40] = middle
        path = tmp_path / name / "a.bmp"
        Image.fromarray(pixels).save(path)
        for each in (path, path.parent):
            os.utime(each, ns=(1, 1))
    one, two = (FolderSource(tmp_path / name) for name in ("one", "two"))
    assert open_catalog(one, cache=False).hash == open_catalog(two, cache=False).hash
    assert one.fingerprint() != two.fingerprint(), "cached features are named after it"


def test_what_the_disk_did_not_give_is_tried_again_on_request(folder, cache, scanned, monkeypatch, caplog):
    whole = open_catalog(FolderSource(folder), cache=False)
    size = FolderSource.size

    def fail(source, row):
        if row == 2:
            scanned.append(row)
            raise UnreadableImage("cannot be read: Input/output error")
        return size(source, row)

    with monkeypatch.context() as failing:
        failing.setattr(FolderSource, "size", fail)
        for _ in range(2):
            scanned.clear()
            catalog = open_catalog(FolderSource(folder), retry=True)
            assert ("ant/c.png", "cannot be read: Input/output error") in catalog.unreadable
        assert scanned == [2], "only what the disk did not give is tried again"
    report_unreadable(catalog)
    advice = f"Some images could not be read from the disk or network. Run `ijepa scan {folder}` to try again."
    assert caplog.messages[-1] == advice
    assert "ant/c.png" in dict(open_catalog(FolderSource(folder)).unreadable), "only a new run changes the images"
    for retry in (True, False):
        scanned.clear()
        catalog = open_catalog(FolderSource(folder), retry=retry)
        assert_same(catalog, whole)
    assert scanned == [], "what it gave is kept"
    caplog.clear()
    report_unreadable(catalog)
    assert advice not in caplog.messages


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
    hashes = set()
    for labels in ("0,1", "1,0", "0,"):
        lines = [f"{name},{label}" for name, label in zip(["ant/a.png", "ant/c.png"], labels.split(","), strict=True)]
        (folder / "list.csv").write_text("\n".join(["path,label", *lines]))
        hashes.add(open_catalog(open_source(f"{folder}/list.csv"), cache=False).hash)
    assert len(hashes) == 3


def test_names_that_are_not_text(folder, cache):
    (folder / "bee" / os.fsdecode(b"\xff.png")).write_bytes(png(3, 3))
    for _ in range(2):
        assert os.fsencode(names(open_catalog(FolderSource(folder)))[-1]) == b"bee/\xff.png"


def older(path):
    listing = map_listing(path)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("ijepa_enhanced.data.listing.FORMAT", FORMAT - 1)
        save_listing(listing, path, "")


def foreign(path):
    with pa.ipc.new_file(str(path), pa.schema([("x", pa.int64())])) as writer:
        writer.write_batch(pa.record_batch({"x": [1]}))


DAMAGE = {
    "empty": lambda path: path.write_bytes(b""),
    "words": lambda path: path.write_bytes(b"no Arrow file"),
    "cut off": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "of an older version": older,
    "of another program": foreign,
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_catalog_that_is_damaged_or_old_is_made_again_and_that_is_said_once(folder, cache, scanned, caplog, damage):
    caplog.set_level("INFO")
    first = open_catalog(FolderSource(folder))
    expected = names(first)
    (file,) = files(cache)
    DAMAGE[damage](file)
    scanned.clear()
    again = open_catalog(FolderSource(folder))
    assert (again.hash, names(again), sorted(scanned)) == (first.hash, expected, [0, 1, 2, 3, 4])
    (message,) = caplog.messages
    assert message.startswith(f"Rebuilding the catalog of {folder}: {file} cannot be used (")
    scanned.clear()
    caplog.clear()
    open_catalog(FolderSource(folder))
    assert (scanned, caplog.messages) == ([], []), "what was made again is kept"


def test_images_that_changed_are_scanned_again_and_that_is_said_once(folder, cache, caplog):
    caplog.set_level("INFO")
    open_catalog(FolderSource(folder))
    (folder / "ant" / "a.png").write_bytes(png(7, 7))
    for _ in range(2):
        assert open_catalog(FolderSource(folder)).heights[0] == 7
    assert caplog.messages == [f"{folder} has changed since the last scan. Scanning again."]


def test_another_set_with_the_same_names_sizes_and_times_has_another_catalog(tmp_path, cache):
    """As an archive leaves it that sets all times to one value, unpacked over the first."""
    assert len(png(10, 40)) == len(png(11, 41))
    found = []
    for height in (10, 11):
        (tmp_path / "set").mkdir(exist_ok=True)
        (tmp_path / "set" / "a.png").write_bytes(png(height, height + 30))
        for path in (tmp_path / "set" / "a.png", tmp_path / "set"):
            os.utime(path, ns=(10**9, 10**9))
        found.append(open_catalog(FolderSource(tmp_path / "set")).heights.tolist())
    assert found == [[10], [11]]


def test_a_cache_that_cannot_be_written_is_one_warning(folder, cache, caplog):
    cache.write_text("a file where the folder should be")
    source = FolderSource(folder)
    assert names(open_catalog(source)) == ["ant/a.png", "ant/c.png", "bee/a.png"]
    (message,) = caplog.messages
    assert message.startswith(f"The catalog of {folder} cannot be saved (")
    assert pickle.loads(pickle.dumps(source)).size(0) == (10, 40), "workers can use it all the same"


def test_a_full_disk_leaves_nothing_behind(folder, cache, disk_of, caplog):
    with disk_of(1000):  # the log of the tests may lie on a disk too
        assert len(open_catalog(FolderSource(folder)).rows) == 3
    assert files(cache) == []
    assert "File too large" in caplog.text


def test_a_user_without_a_home(folder, tmp_path, monkeypatch, caplog):
    """As in a container that runs as a number that the system has no user for."""
    for name in ("IJEPA_CACHE", "XDG_CACHE_HOME", "HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("os.path.expanduser", lambda path: path)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    assert cache_folder().parent == tmp_path
    assert len(open_catalog(FolderSource(folder)).rows) == 3
    assert caplog.messages == []


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
        catalog = open_catalog(FolderSource(tmp_path))
        assert tuple(catalog.unreadable) == (("a.png", "empty file"),)
        assert summary(catalog) == {"images": 0, "unreadable": 1, "labels": 0, "resolution": {}, "aspect": {}}


def test_summary_by_hand(folder):
    # Resolutions of 20, 20 and 30 px; aspects of 4, 1 and 1 / 9. Quantiles lie on straight lines between them.
    assert summary(open_catalog(FolderSource(folder), cache=False)) == {
        "images": 3,
        "unreadable": 2,
        "labels": 2,
        "resolution": {"5%": 20.0, "25%": 20.0, "50%": 20.0, "75%": 25.0, "95%": 29.0},
        "aspect": {"5%": 0.2, "25%": 0.556, "50%": 1.0, "75%": 2.5, "95%": 3.7},
    }


@pytest.mark.skipif(not (DATA / "caltech-101").is_dir(), reason=f"no caltech-101 in {DATA} (set IJEPA_DATA)")
def test_caltech_sizes_are_those_of_its_own_table(cache):
    source = open_source(str(DATA / "caltech-101" / "val-000000.tar"))
    catalog = open_catalog(source)
    assert_same(catalog, open_catalog(source))
    assert summary(catalog)["images"] == 1434
    assert tuple(catalog.unreadable) == ()
    with open(DATA / "caltech-101" / "samples.tsv", newline="") as file:
        table = {line["key"]: line for line in csv.DictReader(file, delimiter="\t")}
    for key, height, width in zip(names(catalog), catalog.heights, catalog.widths, strict=True):
        row = table[key.partition(":")[2].removesuffix(".jpg")]
        assert (int(row["h"]), int(row["w"])) == (height, width)


def test_a_part_of_a_catalog_is_in_the_order_asked_for(folder):
    whole = open_catalog(open_source(str(folder)), cache=False)
    part = whole.select(np.array([2, 0]))
    assert names(part) == [whole.key(2), whole.key(0)]
    for name in ("heights", "widths", "rows", "labels"):
        assert getattr(part, name).tolist() == [getattr(whole, name)[2], getattr(whole, name)[0]]


def test_images_without_a_label_are_not_counted_as_a_class(tmp_path):
    for number in range(3):
        (tmp_path / f"{number}.png").write_bytes(png(4, 4))
    (tmp_path / "list.csv").write_text("path,label\n0.png,ant\n1.png,\n2.png,bee\n")
    catalog = open_catalog(open_source(str(tmp_path / "list.csv")), cache=False)
    assert catalog.labels.tolist() == [0, -1, 1]
    assert (summary(catalog)["images"], summary(catalog)["labels"]) == (3, 2)
    assert [catalog.class_name(label) for label in (-1, 0, 1)] == ["no label", "ant", "bee"]


def test_a_scan_makes_the_catalog_again(folder, cache, scanned):
    open_catalog(FolderSource(folder))
    scanned.clear()
    found = scan(FolderSource(folder))
    assert (found, sorted(scanned)) == (summary(open_catalog(FolderSource(folder))), [0, 1, 2, 3, 4])


def test_what_is_missing_is_reported_each_time_it_is_asked_for(tmp_path, cache, caplog):
    shard = tmp_path / "a.tar"
    with tarfile.open(shard, "w") as tar:
        for name in ("a.png", "b.png"):
            member = tarfile.TarInfo(name)
            member.size = len(png(4, 4))
            tar.addfile(member, io.BytesIO(png(4, 4)))
    os.truncate(shard, 1024 + 512 + 10)
    caplog.set_level(logging.INFO, "ijepa_enhanced.data.catalog")
    note = f"{shard} is truncated or damaged after 2 images. Images after that point are skipped."
    reason = f"truncated: the shard ends after 10 of the image's {len(png(4, 4))} bytes"
    for _ in range(2):
        catalog = open_catalog(open_source(str(shard)))
        assert not caplog.messages, "opening says nothing, since a command opens its images more than once"
        report_unreadable(catalog)
        said = f"Images: {shard}: tar shards, 2 images, no labels"
        assert caplog.messages == [said, note, f"Skipped a.tar:b.png: {reason}"]
        caplog.clear()


def test_opening_touches_no_image_and_maps_its_columns(folder, cache, monkeypatch):
    open_catalog(FolderSource(folder))
    monkeypatch.setattr(FolderSource, "make_listing", pytest.fail)
    source = FolderSource(folder)
    catalog = open_catalog(source)
    assert len(catalog.unreadable), "these too cost no memory"
    for values in (catalog.rows, catalog.heights, catalog.widths):
        assert not values.flags.owndata
        assert not values.flags.writeable, "they lie in the file"
    assert len(pickle.dumps(source)) < 500, "a worker gets the path of the catalog"
    assert pickle.loads(pickle.dumps(source)).key(2) == "ant/c.png"


ONE_OF_TWO = """
import sys
from ijepa_enhanced.data.catalog import open_catalog
from ijepa_enhanced.data.sources.folder import FolderSource

size, scanned = FolderSource.size, []
FolderSource.size = lambda source, row: scanned.append(row) or size(source, row)
print("ready", flush=True)
sys.stdin.readline()
catalog = open_catalog(FolderSource(sys.argv[1]))
print(len(scanned), len(catalog.rows), catalog.hash, catalog.heights.flags.owndata)
"""


def test_a_pickled_catalog_is_mapped_again(folder, cache):
    """Other processes share its columns, also with unreadable images; a part of it has columns of its own."""
    catalog = open_catalog(FolderSource(folder))
    constructor, _ = catalog.__reduce__()
    assert constructor is not type(catalog)
    found = pickle.loads(pickle.dumps(catalog))
    assert_same(found, catalog)
    assert found.source.listing.path == catalog.source.listing.path
    part = catalog.select(np.array([2, 0]))
    relabelled = dataclasses.replace(catalog, labels=catalog.labels + 1)
    for other in (part, relabelled):
        assert_same(pickle.loads(pickle.dumps(other)), other)


def test_of_two_processes_one_makes_the_catalog_and_both_map_it(tmp_path, cache):
    (tmp_path / "images").mkdir()
    for number in range(300):
        (tmp_path / "images" / f"{number:03d}.png").write_bytes(png(4, 4 + number))
    start = [sys.executable, "-c", ONE_OF_TWO, str(tmp_path / "images")]
    both = [subprocess.Popen(start, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    for process in both:
        assert process.stdout.readline() == "ready\n"
    for process in both:
        process.stdin.write("go\n")
        process.stdin.flush()
    said = sorted(process.communicate(timeout=60)[0].split() for process in both)
    (scanned_first, *first), (scanned_second, *second) = said
    assert (scanned_first, scanned_second) == ("0", "300")
    assert first == second
    assert first[0::2] == ["300", "False"]


def test_a_worker_that_finds_another_catalog_stops(folder, cache):
    source = FolderSource(folder)
    open_catalog(source)
    sent = pickle.dumps(source)
    (folder / "ant" / "b.png").write_bytes(png(5, 5))
    open_catalog(FolderSource(folder))
    assert len(source) == 5, "this process keeps the one that it has mapped"
    with pytest.raises(RunError, match=r"^Another process scanned the images again, .*\. Run the command again\.$"):
        pickle.loads(sent)
