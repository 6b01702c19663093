"""Folders, tar shards and the synthetic set, and what is said of those that are missing or damaged."""

import io
import logging
import os
import pickle
import tarfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ijepa_enhanced.data import synthetic
from ijepa_enhanced.data.catalog import open_catalog
from ijepa_enhanced.data.sources.base import HEAD
from ijepa_enhanced.data.sources.folder import FolderSource
from ijepa_enhanced.data.sources.open import open_source
from ijepa_enhanced.data.sources.synthetic import SyntheticSource
from ijepa_enhanced.data.sources.tar import TarSource
from ijepa_enhanced.errors import SourceError, UnreadableImage

DATA = Path(os.environ.get("IJEPA_DATA", Path(__file__).parents[3] / "shared" / "data"))


def png(height=4, width=6, colour="red", **options):
    buffer = io.BytesIO()
    Image.new("RGB", (width, height), colour).save(buffer, "PNG", **options)
    return buffer.getvalue()


def noise_jpeg(height, width):
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG")
    return buffer.getvalue()


def write(root, **files):
    """Write files by their paths, folders made as needed."""
    for name, data in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return root


def shard(path, members, tar_format=tarfile.USTAR_FORMAT):
    """A tar file of (name, bytes) members."""
    with tarfile.open(path, "w", format=tar_format) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def samples(*labels, first=0):
    """Members of one image and one label for every label; image n is n + 1 pixels high."""
    members = []
    for number, label in enumerate(labels, start=first):
        members += [(f"{number:04d}.png", png(height=number + 1)), (f"{number:04d}.cls", label.encode())]
    return members


def heights(source):
    return [source.size(row)[0] for row in range(len(source.keys))]


def test_class_folders_are_labels(tmp_path):
    write(
        tmp_path,
        **{"dog/b.png": png(3), "cat/z.JPG": noise_jpeg(8, 8), "dog/deep/er/a.png": png(5), "cat/a.png": png(7)},
    )
    source = FolderSource(tmp_path)
    assert source.keys == ["cat/a.png", "cat/z.JPG", "dog/b.png", "dog/deep/er/a.png"]
    assert source.classes == ["cat", "dog"]
    assert source.labels is not None
    np.testing.assert_array_equal(source.labels, [0, 0, 1, 1])
    assert source.labels.dtype == np.int64
    assert heights(source) == [7, 8, 3, 5]
    assert source.open(3).size == (6, 5)


def test_a_flat_folder_has_no_labels(tmp_path):
    source = FolderSource(write(tmp_path, **{"b.png": png(2), "a.webp": png(1), "notes.txt": b"x"}))
    assert (source.keys, source.labels, source.classes) == (["a.webp", "b.png"], None, None)


def test_a_folder_with_images_on_both_levels_has_no_labels(tmp_path):
    source = FolderSource(write(tmp_path, **{"dog/b.png": png(), "a.png": png()}))
    assert (source.keys, source.labels, source.classes) == (["a.png", "dog/b.png"], None, None)


def test_one_image_is_a_source(tmp_path):
    source = open_source(str(write(tmp_path, **{"only.png": png(9, 2)})))
    assert source.keys == ["only.png"]
    assert source.size(0) == (9, 2)


def test_hidden_files_and_folders_are_left_out(tmp_path):
    write(tmp_path, **{"a/b.png": png(), "a/._b.png": b"junk", ".trash/c.png": png(), "a/.thumbs/d.png": png()})
    source = FolderSource(tmp_path)
    assert source.keys == ["a/b.png"]
    assert source.classes == ["a"]


def test_classes_without_images_are_none(tmp_path):
    (tmp_path / "aardvark").mkdir()
    assert FolderSource(write(tmp_path, **{"bee/a.png": png()})).classes == ["bee"]


def test_links_are_followed(tmp_path):
    real = write(tmp_path / "real", **{"a.png": png()})
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "class").symlink_to(real, target_is_directory=True)
    assert FolderSource(tmp_path / "set").keys == ["class/a.png"]


def test_links_to_folders_above_are_not_followed(tmp_path):
    write(tmp_path / "set", **{"a.png": png(), "class/b.png": png()})
    for place in ("set/up", "set/class/up", "set/class/top"):
        (tmp_path / place).symlink_to(tmp_path / ("set" if place.endswith("up") else ""), target_is_directory=True)
    assert FolderSource(tmp_path / "set").keys == ["a.png", "class/b.png"]


def test_links_from_one_folder_to_another_and_back_end(tmp_path):
    write(tmp_path, **{"a/x.png": png(), "b/y.png": png()})
    (tmp_path / "a" / "to_b").symlink_to(tmp_path / "b", target_is_directory=True)
    (tmp_path / "b" / "to_a").symlink_to(tmp_path / "a", target_is_directory=True)
    assert FolderSource(tmp_path).keys == ["a/to_b/y.png", "a/x.png", "b/to_a/x.png", "b/y.png"]


def test_unreadable_files_of_a_folder(tmp_path):
    write(tmp_path, **{"a.png": b"", "b.png": b"text that is no image", "d.png": png()})
    (tmp_path / "c.png").symlink_to(tmp_path / "gone.png")
    source = FolderSource(tmp_path)
    for row, reason in enumerate(
        [
            "empty file",
            "not a JPEG, PNG, WebP, GIF, BMP, TIFF or AVIF image",
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


def test_only_the_head_of_a_file_is_read_for_its_size(tmp_path, monkeypatch):
    write(tmp_path, **{"a.jpg": noise_jpeg(400, 500)})
    assert (tmp_path / "a.jpg").stat().st_size > HEAD
    source = FolderSource(tmp_path)
    asked = []
    read = source._read
    monkeypatch.setattr(source, "_read", lambda row, limit=-1: asked.append(limit) or read(row, limit))
    assert source.size(0) == (400, 500)
    assert asked == [HEAD]
    (tmp_path / "a.jpg").write_bytes(b"short and no image")
    with pytest.raises(UnreadableImage):
        source.size(0)
    assert asked == [HEAD, HEAD], "what is shorter than the head is not read twice"


def test_fingerprint_of_a_folder_knows_names_sizes_and_times(tmp_path):
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
    assert len({before, later, renamed, longer}) == 4


@pytest.mark.parametrize(
    ("folder", "message"),
    [
        (
            "empty",
            "No images in {}. It must hold files that end in .jpg, .jpeg, .png, .webp, .gif, .bmp, .tif, .tiff, .avif.",
        ),
        (
            "gone",
            "No file or folder {}. Images are a folder, tar shards such as train-{{000000..000002}}.tar, "
            "Parquet files, a list in CSV or JSONL, hf://NAME, or 'synthetic'.",
        ),
    ],
)
def test_folders_that_are_no_source(tmp_path, folder, message):
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "notes.txt").write_text("no image")
    with pytest.raises(SourceError) as error:
        open_source(str(tmp_path / folder))
    assert str(error.value) == message.format(tmp_path / folder)


def test_a_folder_that_cannot_be_listed(tmp_path, monkeypatch):
    write(tmp_path, **{"a/b.png": png(), "secret/c.png": png()})
    scandir = os.scandir

    def refuse(path):
        if Path(path).name == "secret":
            raise PermissionError(13, "Permission denied", path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(SourceError) as error:
        FolderSource(tmp_path)
    assert str(error.value) == f"The folder {tmp_path / 'secret'} cannot be listed: Permission denied."


def test_shards_of_a_pattern(tmp_path):
    shard(tmp_path / "train-000009.tar", samples("1", "0"))
    shard(tmp_path / "train-000010.tar", samples("2", first=2))
    source = open_source(str(tmp_path / "train-{000009..000010}.tar"))
    assert source.keys == ["train-000009.tar:0000.png", "train-000009.tar:0001.png", "train-000010.tar:0002.png"]
    assert source.labels is not None
    np.testing.assert_array_equal(source.labels, [1, 0, 2])
    assert source.classes is None
    assert heights(source) == [1, 2, 3]
    assert source.open(2).size == (6, 3)


def test_shards_of_a_list_in_other_folders(tmp_path):
    for part in "ab":
        (tmp_path / part).mkdir()
        shard(tmp_path / part / "x.tar", samples("0"))
    source = open_source(str(tmp_path / "{b,a}" / "x.tar"))
    assert source.keys == ["b/x.tar:0000.png", "a/x.tar:0000.png"]


def test_paths_may_be_relative(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(tmp_path, **{"folder/a.png": png(5)})
    shard(tmp_path / "x.tar", samples("0"))
    (tmp_path / "classes.txt").write_text("cat\n")
    assert heights(open_source("folder")) == [5]
    for spec in ("x.tar", "."):
        source = open_source(spec)
        assert (source.keys, source.classes, heights(source)) == (["x.tar:0000.png"], ["cat"], [1])


def test_class_names_of_classes_txt(tmp_path):
    shard(tmp_path / "a.tar", samples("1", "0\n"))
    (tmp_path / "classes.txt").write_text("cat\ndog\n")
    source = open_source(str(tmp_path / "a.tar"))
    assert source.classes == ["cat", "dog"]
    assert source.labels is not None
    np.testing.assert_array_equal(source.labels, [1, 0])


def test_labels_may_be_class_names(tmp_path):
    path = shard(tmp_path / "a.tar", samples("dog", "ant", "dog"))
    source = TarSource([path], "a.tar")
    assert (source.classes, source.labels.tolist()) == (["ant", "dog"], [1, 0, 1])
    (tmp_path / "classes.txt").write_text("dog\nbee\nant\n")
    source = TarSource([path], "a.tar")
    assert (source.classes, source.labels.tolist()) == (["dog", "bee", "ant"], [0, 2, 0])


@pytest.mark.parametrize("label", ["2", "dog"])
def test_labels_beyond_classes_txt(tmp_path, label):
    shard(tmp_path / "a.tar", samples("0", label))
    (tmp_path / "classes.txt").write_text("0\n1\n")
    with pytest.raises(SourceError) as error:
        open_source(f"{tmp_path}/a.tar")
    assert str(error.value) == f"{tmp_path}/a.tar has the label '{label}', which is none of the 2 in classes.txt."


def test_a_classes_txt_that_is_no_text(tmp_path):
    shard(tmp_path / "a.tar", samples("0"))
    (tmp_path / "classes.txt").write_bytes(b"\xff\xd8")
    with pytest.raises(SourceError) as error:
        open_source(f"{tmp_path}/a.tar")
    assert str(error.value) == f"{tmp_path}/classes.txt is not text in UTF-8."


def test_an_empty_label_is_none(tmp_path):
    shard(tmp_path / "a.tar", samples("dog", ""))
    assert open_source(f"{tmp_path}/a.tar").labels.tolist() == [0, -1]
    shard(tmp_path / "b.tar", samples("", " "))
    assert open_source(f"{tmp_path}/b.tar").labels is None


def test_shards_without_labels(tmp_path):
    path = shard(tmp_path / "a.tar", [("x.png", png()), ("x.txt", b"a caption"), ("sub/y.JPEG", noise_jpeg(8, 8))])
    source = TarSource([path], "a.tar")
    assert (source.keys, source.labels, source.classes) == (["a.tar:x.png", "a.tar:sub/y.JPEG"], None, None)
    assert source.size(1) == (8, 8)


def described(*metadata):
    """Members of one image and its metadata, for every one."""
    members = []
    for number, data in enumerate(metadata):
        members += [(f"{number:04d}.png", png()), (f"{number:04d}.json", data)]
    return members


@pytest.mark.parametrize(
    ("metadata", "labels", "classes"),
    [
        ([b'{"label": 7, "width": 3}', b'{"label": "2"}'], [7, 2], None),
        ([b'{"cls": "dog"}', b'{"cls": "ant", "caption": "\xc3\xbc"}', b'{"cls": " dog "}'], [1, 0, 1], ["ant", "dog"]),
        ([b'{"label": "other", "cls": 3}', b'{"label": 4, "cls": null}'], [3, 4], None),
        # Nothing that could be a class.
        (
            [b'{"label": 0}', b'{"label": [1]}', b'{"label": -1}', b'{"label": true}', b'{"label": ""}'],
            [0] + 4 * [-1],
            None,
        ),
        ([b'{"label": 0}', b"{", b"[1]", b"\xff", b"", b"[" * 100_000], [0] + 5 * [-1], None),
        ([b'{"key": "a", "height": 4}', b"{}"], None, None),
    ],
)
def test_labels_in_metadata(tmp_path, metadata, labels, classes):
    source = TarSource([shard(tmp_path / "a.tar", described(*metadata))], "a.tar")
    assert source.keys == [f"a.tar:{number:04d}.png" for number in range(len(metadata))]
    assert (None if source.labels is None else source.labels.tolist(), source.classes) == (labels, classes)


def test_names_in_metadata_are_numbered_by_classes_txt(tmp_path):
    path = shard(tmp_path / "a.tar", described(b'{"label": "dog"}', b'{"label": "ant"}'))
    (tmp_path / "classes.txt").write_text("dog\nant\n")
    source = TarSource([path], "a.tar")
    assert (source.classes, source.labels.tolist()) == (["dog", "ant"], [0, 1])


@pytest.mark.parametrize("first", [0, 1])
def test_metadata_say_nothing_where_any_shard_has_labels(tmp_path, first):
    paths = [
        shard(tmp_path / "a.tar", [*described(b'{"label": "dog"}', b'{"cls": 9}'), ("0001.cls", b"5")]),
        shard(tmp_path / "b.tar", described(b'{"label": 6}')),
    ]
    source = TarSource(paths[::-1] if first else paths, "both")
    assert (source.labels.tolist(), source.classes) == ([-1, -1, 5] if first else [-1, 5, -1], None)


def test_metadata_that_are_cut_off_are_no_label(tmp_path):
    path = shard(tmp_path / "a.tar", described(b'{"label": 1}', b'{"label": 2}' + b" " * 5000))
    os.truncate(path, 4 * 1024 + 100)
    assert TarSource([path], "a.tar").labels.tolist() == [1, -1]


@pytest.mark.parametrize("place", ["a.tar", "*.tar", "."])
def test_labels_by_another_key_of_the_metadata(tmp_path, place):
    """Those of `.cls`, `cls` and `label` say nothing then, before the metadata or behind them."""
    metadata = (b'{"class": "dog", "cls": 7}', b'{"label": 8}', b'{"class": " ant "}')
    shard(tmp_path / "a.tar", [("0000.cls", b"5"), *described(*metadata), ("0001.cls", b"6")])
    source = open_source(f"{tmp_path}/{place}#label=class")
    assert (source.labels.tolist(), source.classes) == ([1, -1, 0], ["ant", "dog"])


def test_names_under_another_key_are_numbered_by_classes_txt(tmp_path):
    shard(tmp_path / "a.tar", described(b'{"class": "dog"}', b'{"class": "ant"}'))
    (tmp_path / "classes.txt").write_text("dog\nant\n")
    source = open_source(f"{tmp_path}/a.tar#label=class")
    assert (source.labels.tolist(), source.classes) == ([0, 1], ["dog", "ant"])


def test_labels_of_mixed_shards_by_different_keys(tmp_path):
    shard(tmp_path / "a.tar", described(b'{"class": "dog"}'))
    shard(tmp_path / "b.tar", described(b'{"kind": "ant"}'))
    source = open_source(f"{tmp_path}/a.tar#label=class@2 + {tmp_path}/b.tar#label=kind")
    assert (source.labels.tolist(), source.classes, source.shares.tolist()) == ([0, 1], ["dog", "ant"], [1, 0.5])


def test_an_index_is_not_that_of_another_key(tmp_path):
    """Which images lack a label is in the cache, and another key may have it."""
    shard(tmp_path / "a.tar", described(b'{"class": 0, "kind": 1}', b'{"kind": 2}'))
    spec = f"{tmp_path}/a.tar#label="
    found = [open_catalog(open_source(f"{spec}{key}")).labels.tolist() for key in ("class", "kind", "class")]
    assert found == [[0], [1, 2], [0]]


@pytest.mark.parametrize(
    ("members", "message"),
    [
        (
            described(b'{"width": 6, "class": null, "label": 4}', b'{"class": [1], "a": 0}'),
            "no image has a class, a whole number from 0 or a name, under 'class' of its member KEY.json. "
            "The keys of the first of these are: class, label, width.",
        ),
        (
            [*described(b"{"), ("other.json", b'{"class": 1}')],
            "no image has a class, a whole number from 0 or a name, under 'class' of its member KEY.json. "
            "The keys of the first of these are: none.",
        ),
        (samples("0"), "there are no members KEY.json to take labels from."),
    ],
    ids=["other keys", "damaged", "no metadata"],
)
def test_keys_that_no_metadata_have(tmp_path, members, message):
    shard(tmp_path / "a.tar", [("0.png", png())])
    shard(tmp_path / "b.tar", members)
    with pytest.raises(SourceError) as error:
        open_source(f"{tmp_path}/*.tar#label=class")
    assert str(error.value) == f"{tmp_path}/*.tar#label=class: {message}"


def test_an_image_without_the_label_that_others_have(tmp_path):
    path = shard(tmp_path / "a.tar", [*samples("0"), ("new.png", png())])
    source = TarSource([path], "a.tar")
    assert source.labels.tolist() == [0, -1]
    with pytest.raises(UnreadableImage, match=r"^no label, which others have$"):
        source.size(1)


def test_samples_end_at_the_first_dot_and_keep_their_folder(tmp_path, caplog):
    members = [("a/1.png", png()), ("a/1.seg.png", png()), ("b/1.png", png()), ("b/1.cls", b"1"), ("a/1.cls", b"0")]
    source = TarSource([shard(tmp_path / "a.tar", members)], "a.tar")
    assert source.keys == ["a.tar:a/1.png", "a.tar:b/1.png"]
    assert source.labels.tolist() == [0, 1]
    assert caplog.messages == [
        f"Not taken for images, since the names of samples end at their first dot: a/1.seg.png in {tmp_path / 'a.tar'}."
    ]


@pytest.mark.parametrize("tar_format", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_long_names(tmp_path, tar_format):
    long = "folder/" * 30 + "ü" * 120
    members = [(f"{long}.png", png(5)), (f"{long}.cls", b"3"), ("b.png", png(6)), ("b.cls", b"0")]
    source = TarSource([shard(tmp_path / "a.tar", members, tar_format)], "a.tar")
    assert source.keys == [f"a.tar:{long}.png", "a.tar:b.png"]
    assert source.labels.tolist() == [3, 0]
    assert heights(source) == [5, 6]


def test_a_shard_cut_within_an_image(tmp_path, caplog):
    path = shard(tmp_path / "a.tar", [*samples("0", "1"), ("c.jpg", noise_jpeg(400, 500)), ("c.cls", b"1")])
    with tarfile.open(path) as tar:
        member = tar.getmember("c.jpg")
    # More than the head of the image is still there.
    os.truncate(path, member.offset_data + HEAD + 100)
    with caplog.at_level(logging.WARNING):
        source = TarSource([path], "a.tar")
    assert [record.getMessage() for record in caplog.records] == [
        f"{path} is cut off or damaged after 3 images; any that follow are lost."
    ]
    assert source.keys == ["a.tar:0000.png", "a.tar:0001.png", "a.tar:c.jpg"]
    assert [source.size(0), source.size(1)] == [(1, 6), (2, 6)]
    for read in (source.open, source.size):
        with pytest.raises(UnreadableImage) as error:
            read(2)
        assert str(error.value) == f"cut off: its shard ends after {HEAD + 100:,} of its {member.size:,} bytes"


@pytest.mark.parametrize("place", ["label", "header", "between", "padding"])
def test_a_shard_cut_elsewhere(tmp_path, caplog, place):
    path = shard(tmp_path / "a.tar", samples("0", "class"))
    with tarfile.open(path) as tar:
        label, image = tar.getmember("0001.cls"), tar.getmember("0001.png")
    end = {
        "label": label.offset_data + 2,
        "header": label.offset + 100,
        "between": label.offset,
        "padding": image.offset_data + image.size,
    }[place]
    os.truncate(path, end)
    with caplog.at_level(logging.WARNING):
        source = TarSource([path], "a.tar")
    assert "is cut off or damaged after 2 images" in caplog.text
    assert source.size(0) == (1, 6)
    with pytest.raises(UnreadableImage, match=r"^no label, which others have$"):
        source.open(1)


def test_a_whole_shard_warns_of_nothing(tmp_path, caplog):
    for number, tar_format in enumerate((tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT)):
        TarSource([shard(tmp_path / f"{number}.tar", samples("0"), tar_format)], "a.tar")
    assert not caplog.records


def test_a_damaged_header_in_the_middle_is_told(tmp_path, caplog):
    path = shard(tmp_path / "a.tar", samples("0", "1", "2"))
    with tarfile.open(path) as tar:
        offset = tar.getmember("0001.png").offset
    with open(path, "r+b") as file:
        file.seek(offset)
        file.write(b"\xff" * 512)
    source = TarSource([path], "a.tar")
    assert source.keys == ["a.tar:0000.png"]
    assert f"{path} is cut off or damaged after 1 images; any that follow are lost." in caplog.text


def test_missing_shards(tmp_path):
    shard(tmp_path / "t-0.tar", samples("0"))
    with pytest.raises(SourceError) as error:
        open_source(f"{tmp_path}/t-{{0..3}}.tar")
    assert str(error.value) == (
        f"3 of the 4 files of {tmp_path}/t-{{0..3}}.tar are missing, the first is {tmp_path}/t-1.tar. "
        "Check the pattern, or fetch them."
    )


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"no tar, but words " * 100, "{} is not an uncompressed tar file: "),
        (png(), "{} is not an uncompressed tar file: "),
        (b"", "{} is not an uncompressed tar file: empty file."),
        (
            bytes(10240),
            "No images in {}. Members must end in .jpg, .jpeg, .png, .webp, .gif, .bmp, .tif, .tiff, .avif.",
        ),
    ],
)
def test_files_that_are_no_shards(tmp_path, data, message):
    path = tmp_path / "a.tar"
    path.write_bytes(data)
    with pytest.raises(SourceError) as error:
        open_source(str(path))
    assert str(error.value).startswith(message.format(path))


def test_compressed_shards_are_refused(tmp_path):
    with tarfile.open(tmp_path / "a.tar.gz", "w:gz") as tar:
        tar.addfile(tarfile.TarInfo("a.png"))
    with pytest.raises(SourceError, match=r"a\.tar\.gz is not an uncompressed tar file: "):
        open_source(str(tmp_path / "a.tar.gz"))


def test_a_folder_of_shards(tmp_path):
    shard(tmp_path / "b.tar", samples("1"))
    shard(tmp_path / "a.tar", samples("0"))
    assert open_source(str(tmp_path)).keys == ["a.tar:0000.png", "b.tar:0000.png"]
    shard(tmp_path / "val-0.tar", samples("2"))
    assert open_source(str(tmp_path), "val").keys == ["val-0.tar:0000.png"]


def test_images_beside_shards_are_not_passed_over_in_silence(tmp_path, caplog):
    shard(tmp_path / "a.tar", samples("0"))
    write(tmp_path, **{"b.JPG": png(), ".c.png": png()})
    assert open_source(str(tmp_path)).keys == ["a.tar:0000.png"]
    assert caplog.messages == [f"{tmp_path} holds image files beside a.tar: they are not taken."]


def test_a_folder_of_parts(tmp_path):
    write(tmp_path, **{"train/a/0.png": png(), "train/b/1.png": png(), "validation/b/2.png": png(), ".x/3.png": png()})
    assert open_source(str(tmp_path)).keys == ["a/0.png", "b/1.png"]
    assert open_source(str(tmp_path), "val").keys == ["b/2.png"]
    with pytest.raises(SourceError) as error:
        open_source(str(tmp_path), "test")
    assert str(error.value) == f"{tmp_path} has train and validation, and nothing for test."
    write(tmp_path, **{"truck/4.png": png()})
    assert open_source(str(tmp_path), "val").classes == ["train", "truck", "validation"]


def test_fingerprint_of_shards_knows_times(tmp_path):
    path = shard(tmp_path / "a.tar", samples("0"))
    before = TarSource([path], "a.tar").fingerprint()
    assert TarSource([path], "another name").fingerprint() == before
    os.utime(path, ns=(1, 1))
    assert TarSource([path], "a.tar").fingerprint() != before


def test_sources_can_be_sent_and_shared(tmp_path):
    """A copy as another process gets it, and many threads at once, read the same bytes."""
    shard(tmp_path / "a.tar", [(f"{n}.png", png(n + 1, colour=(n, 0, 0))) for n in range(40)])
    folder = write(tmp_path / "folder", **{f"{n:02d}.png": png(n + 1, colour=(n, 0, 0)) for n in range(40)})
    for source in (open_source(str(tmp_path / "a.tar")), open_source(str(folder))):
        copy = pickle.loads(pickle.dumps(source))

        def look(row, copy=copy):
            image = copy.open(row)
            return image.height, image.getpixel((0, 0))[0]

        with ThreadPoolExecutor(8) as pool:
            seen = list(pool.map(look, list(range(40)) * 5))
        assert seen == [(n + 1, n) for n in range(40)] * 5


def test_synthetic():
    source = open_source("synthetic", "val")
    assert len(source.keys) == len(source.labels) == synthetic.IMAGES["val"]
    assert source.keys[7] == "val-00007"
    assert source.classes == list(synthetic.CLASSES)
    sample = synthetic.render("val", 7)
    assert source.labels[7] == sample.label
    assert source.size(7) == sample.pixels.shape[:2]
    np.testing.assert_array_equal(np.asarray(source.open(7)), sample.pixels)
    assert source.fingerprint() != open_source("synthetic").fingerprint()
    assert len(open_source("synthetic").keys) == synthetic.IMAGES["train"]


def test_synthetic_parts():
    with pytest.raises(SourceError) as error:
        SyntheticSource("test")
    assert str(error.value) == "The synthetic images have the parts train and val, not 'test'."


@pytest.mark.skipif(not (DATA / "caltech-101").is_dir(), reason=f"no caltech-101 in {DATA} (set IJEPA_DATA)")
def test_caltech():
    source = open_source(str(DATA / "caltech-101" / "train-{000000..000002}.tar"))
    assert len(source.keys) == 5722
    assert open_source(str(DATA / "caltech-101")).keys == source.keys
    names = (DATA / "caltech-101" / "classes.txt").read_text().split()
    assert source.classes == names
    # Keys begin with the class name, so they prove that images and labels belong together.
    for key, label in zip(source.keys, source.labels.tolist(), strict=True):
        assert key.partition(":")[2].rpartition("-")[0] == names[label]
    assert len(open_source(str(DATA / "caltech-101"), "val").keys) == 1434


def test_two_members_of_one_name(tmp_path):
    path = shard(tmp_path / "a.tar", [*samples("0"), *samples("1")])
    with pytest.raises(SourceError) as error:
        open_source(str(path))
    assert str(error.value) == f"{path} has two members 0000.png. Give every sample a name of its own."


def test_shards_by_asterisk(tmp_path):
    for number in (2, 10, 1):
        shard(tmp_path / f"train-{number:02d}.tar", samples("0"))
    shard(tmp_path / "val-01.tar", samples("0"))
    names = [key.partition(":")[0] for key in open_source(f"{tmp_path}/train-*.tar").keys]
    assert names == ["train-01.tar", "train-02.tar", "train-10.tar"]


def test_a_folder_without_the_part(tmp_path):
    shard(tmp_path / "train-0.tar", samples("0"))
    with pytest.raises(SourceError) as error:
        open_source(str(tmp_path), "val")
    assert str(error.value) == (
        f"{tmp_path} has files for train, and none for val: name those to take, as {tmp_path}/train*.tar."
    )


@pytest.mark.parametrize("name", ["a.tar", "a.parquet"])
def test_shards_that_may_not_be_read(tmp_path, monkeypatch, name):
    path = tmp_path / name
    path.write_bytes(b"")

    def refuse(file, *args, **options):
        raise PermissionError(13, "Permission denied", str(file))

    monkeypatch.setattr("builtins.open" if name == "a.tar" else "pyarrow.parquet.read_metadata", refuse)
    with pytest.raises(SourceError) as error:
        open_source(str(path))
    assert str(error.value) == f"{path} cannot be read: Permission denied."


NO_COLUMNS = "{} has no columns of images: after # comes label=NAME alone for tar shards."
NO_CHOICE = "There is nothing to choose in {}: leave out what follows #."


@pytest.mark.parametrize(
    ("name", "chosen", "message"),
    [
        ("a.tar", "image=a", NO_COLUMNS),
        ("a.tar", "image=a,label=label", NO_COLUMNS),
        ("folder", "image=a", NO_CHOICE),
        ("folder", "label=label", NO_CHOICE),
        ("list.jsonl", "label=label", NO_CHOICE),
    ],
)
def test_columns_of_what_has_none(tmp_path, name, chosen, message):
    write(tmp_path, **{"folder/a.png": png(), "list.jsonl": b'{"path": "folder/a.png", "label": 0}\n'})
    shard(tmp_path / "a.tar", described(b'{"label": 0}'))
    with pytest.raises(SourceError) as error:
        open_source(f"{tmp_path}/{name}#{chosen}")
    assert str(error.value) == message.format(f"{tmp_path}/{name}")
