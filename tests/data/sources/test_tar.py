"""Tar shards: members, labels, and what is said of shards that are damaged."""

import os
import tarfile
from pathlib import Path

import numpy as np
import pytest

from ijepa_enhanced.data.catalog import open_catalog
from ijepa_enhanced.data.sources.base import HEAD
from ijepa_enhanced.data.sources.open import open_source
from ijepa_enhanced.data.sources.tar import TarSource
from ijepa_enhanced.errors import SourceError, UnreadableImage
from source_files import described, heights, keys, noise_jpeg, png, samples, shard

DATA = Path(os.environ.get("IJEPA_DATA", Path(__file__).parents[4] / "shared" / "data"))


def test_shards_of_a_pattern(tmp_path):
    shard(tmp_path / "train-000009.tar", samples("1", "0"))
    shard(tmp_path / "train-000010.tar", samples("2", first=2))
    source = open_source(str(tmp_path / "train-{000009..000010}.tar"))
    assert keys(source) == ["train-000009.tar:0000.png", "train-000009.tar:0001.png", "train-000010.tar:0002.png"]
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
    assert keys(source) == ["b/x.tar:0000.png", "a/x.tar:0000.png"]


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
        _ = open_source(f"{tmp_path}/a.tar").listing
    assert str(error.value) == (
        f"{tmp_path}/a.tar has the label '{label}', which is not in classes.txt. Labels must be names in this "
        "file, or all be numbers from 0 to 1. Correct the label, or add the class to classes.txt."
    )


def test_a_classes_txt_that_is_no_text(tmp_path):
    shard(tmp_path / "a.tar", samples("0"))
    (tmp_path / "classes.txt").write_bytes(b"\xff\xd8")
    with pytest.raises(SourceError) as error:
        _ = open_source(f"{tmp_path}/a.tar").listing
    assert str(error.value) == f"{tmp_path}/classes.txt is not valid UTF-8."


def test_an_empty_label_is_none(tmp_path):
    shard(tmp_path / "a.tar", samples("dog", ""))
    assert open_source(f"{tmp_path}/a.tar").labels.tolist() == [0, -1]
    shard(tmp_path / "b.tar", samples("", " "))
    assert open_source(f"{tmp_path}/b.tar").labels is None


def test_shards_without_labels(tmp_path):
    path = shard(tmp_path / "a.tar", [("x.png", png()), ("x.txt", b"a caption"), ("sub/y.JPEG", noise_jpeg(8, 8))])
    source = TarSource([path], "a.tar")
    assert (keys(source), source.labels, source.classes) == (["a.tar:x.png", "a.tar:sub/y.JPEG"], None, None)
    assert source.size(1) == (8, 8)


@pytest.mark.parametrize(
    ("metadata", "labels", "classes"),
    [
        ([b'{"label": 7, "width": 3}', b'{"label": "2"}'], [7, 2], None),
        ([b'{"cls": "dog"}', b'{"cls": "ant", "caption": "\xc3\xbc"}', b'{"cls": " dog "}'], [1, 0, 1], ["ant", "dog"]),
        ([b'{"label": "other", "cls": 3}', b'{"label": 4, "cls": null}'], [3, 4], None),
        # Nothing that could be a class.
        (
            [b'{"label": 0}', b'{"label": [1]}', b'{"label": -1}', b'{"label": {}}', b'{"label": ""}'],
            [0] + 4 * [-1],
            None,
        ),
        ([b'{"label": 0}', b"{", b"[1]", b"\xff", b"", b"[" * 100_000], [0] + 5 * [-1], None),
        ([b'{"key": "a", "height": 4}', b"{}"], None, None),
    ],
)
def test_labels_in_metadata(tmp_path, metadata, labels, classes):
    source = TarSource([shard(tmp_path / "a.tar", described(*metadata))], "a.tar")
    assert keys(source) == [f"a.tar:{number:04d}.png" for number in range(len(metadata))]
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
    assert (source.labels.tolist(), source.classes, source.listing.shares.tolist()) == (
        [0, 1],
        ["dog", "ant"],
        [1, 0.5],
    )


def test_an_index_is_not_that_of_another_key(tmp_path):
    """Labels are in the catalog, and another key has others."""
    shard(tmp_path / "a.tar", described(b'{"class": 0, "kind": 1}', b'{"kind": 2}'))
    spec = f"{tmp_path}/a.tar#label="
    found = [open_catalog(open_source(f"{spec}{key}")).labels.tolist() for key in ("class", "kind", "class")]
    assert found == [[0, -1], [1, 2], [0, -1]]


@pytest.mark.parametrize(
    ("members", "message"),
    [
        (
            described(b'{"width": 6, "class": null, "label": 4}', b'{"class": [1], "a": 0}'),
            "no image has a label under the key 'class' of its .json file. A label is a class name or an integer of at "
            "least 0. The keys of the first .json file are: class, label, width.",
        ),
        (
            [*described(b"{"), ("other.json", b'{"class": 1}')],
            "no image has a label under the key 'class' of its .json file. A label is a class name or an integer of at "
            "least 0. The keys of the first .json file are: none.",
        ),
        (
            samples("0"),
            "#label=class needs a .json file for each image, but the shards contain none. Remove #label=class.",
        ),
    ],
    ids=["other keys", "damaged", "no metadata"],
)
def test_keys_that_no_metadata_have(tmp_path, members, message):
    shard(tmp_path / "a.tar", [("0.png", png())])
    shard(tmp_path / "b.tar", members)
    with pytest.raises(SourceError) as error:
        _ = open_source(f"{tmp_path}/*.tar#label=class").listing
    assert str(error.value) == f"{tmp_path}/*.tar#label=class: {message}"


def test_an_image_without_a_label_is_an_image(tmp_path):
    path = shard(tmp_path / "a.tar", [*samples("0"), ("new.png", png())])
    source = TarSource([path], "a.tar")
    assert source.labels.tolist() == [0, -1]
    assert source.size(1) == (4, 6), "it is an image all the same"


def test_samples_end_at_the_first_dot_and_keep_their_folder(tmp_path):
    members = [("a/1.png", png()), ("a/1.seg.png", png()), ("b/1.png", png()), ("b/1.cls", b"1"), ("a/1.cls", b"0")]
    source = TarSource([shard(tmp_path / "a.tar", members)], "a.tar")
    assert keys(source) == ["a.tar:a/1.png", "a.tar:b/1.png"]
    assert source.labels.tolist() == [0, 1]
    assert source.listing.notes == (
        f"Skipped a/1.seg.png in {tmp_path / 'a.tar'}: WebDataset splits names at the first dot, so the extension must "
        "come right after it.",
    )


@pytest.mark.parametrize("tar_format", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_long_names(tmp_path, tar_format):
    long = "folder/" * 30 + "ü" * 120
    members = [(f"{long}.png", png(5)), (f"{long}.cls", b"3"), ("b.png", png(6)), ("b.cls", b"0")]
    source = TarSource([shard(tmp_path / "a.tar", members, tar_format)], "a.tar")
    assert keys(source) == [f"a.tar:{long}.png", "a.tar:b.png"]
    assert source.labels.tolist() == [3, 0]
    assert heights(source) == [5, 6]


def test_a_shard_cut_within_an_image(tmp_path):
    path = shard(tmp_path / "a.tar", [*samples("0", "1"), ("c.jpg", noise_jpeg(400, 500)), ("c.cls", b"1")])
    with tarfile.open(path) as tar:
        member = tar.getmember("c.jpg")
    # More than the head of the image is still there.
    os.truncate(path, member.offset_data + HEAD + 100)
    source = TarSource([path], "a.tar")
    assert source.listing.notes == (
        f"{path} is truncated or damaged after 3 images. Images after that point are skipped.",
    )
    assert keys(source) == ["a.tar:0000.png", "a.tar:0001.png", "a.tar:c.jpg"]
    assert [source.size(0), source.size(1)] == [(1, 6), (2, 6)]
    for read in (source.open, source.size):
        with pytest.raises(UnreadableImage) as error:
            read(2)
        assert (
            str(error.value) == f"truncated: the shard ends after {HEAD + 100:,} of the image's {member.size:,} bytes"
        )


@pytest.mark.parametrize("place", ["label", "header", "between", "padding"])
def test_a_shard_cut_elsewhere(tmp_path, place):
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
    source = TarSource([path], "a.tar")
    assert source.listing.notes == (
        f"{path} is truncated or damaged after 2 images. Images after that point are skipped.",
    )
    assert (source.labels.tolist(), source.size(0), source.size(1)) == ([0, -1], (1, 6), (2, 6))


def test_a_whole_shard_warns_of_nothing(tmp_path):
    for number, tar_format in enumerate((tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT)):
        assert TarSource([shard(tmp_path / f"{number}.tar", samples("0"), tar_format)], "a.tar").listing.notes == ()


def test_a_damaged_header_in_the_middle_is_told(tmp_path):
    path = shard(tmp_path / "a.tar", samples("0", "1", "2"))
    with tarfile.open(path) as tar:
        offset = tar.getmember("0001.png").offset
    with open(path, "r+b") as file:
        file.seek(offset)
        file.write(b"\xff" * 512)
    source = TarSource([path], "a.tar")
    assert keys(source) == ["a.tar:0000.png"]
    assert source.listing.notes == (
        f"{path} is truncated or damaged after 1 images. Images after that point are skipped.",
    )


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"no tar, but words " * 100, "{} cannot be read as a tar file: "),
        (png(), "{} cannot be read as a tar file: "),
        (b"", "No images in {}."),
        (
            bytes(10240),
            "No images in {}. Members must end in "
            ".jpg, .jpeg, .jpe, .jfif, .png, .apng, .webp, .gif, .avif, "
            ".bmp, .dib, .tif, .tiff, .jp2, .j2k, .heic, .heif, .npy.",
        ),
    ],
)
def test_files_that_are_no_shards(tmp_path, data, message):
    path = tmp_path / "a.tar"
    path.write_bytes(data)
    with pytest.raises(SourceError) as error:
        _ = open_source(str(path)).listing
    assert str(error.value).startswith(message.format(path))


def test_compressed_shards_are_refused(tmp_path):
    with tarfile.open(tmp_path / "a.tar.gz", "w:gz") as tar:
        tar.addfile(tarfile.TarInfo("a.png"))
    with pytest.raises(
        SourceError, match=r"a\.tar\.gz cannot be read as a tar file: .* If it is compressed, decompress it first\.$"
    ):
        _ = open_source(str(tmp_path / "a.tar.gz")).listing


def test_fingerprint_of_shards_knows_times_and_bytes(tmp_path):
    path = shard(tmp_path / "a.tar", samples("0"))
    before = TarSource([path], "a.tar").fingerprint()
    assert TarSource([path], "another name").fingerprint() == before
    os.utime(path, ns=(1, 1))
    later = TarSource([path], "a.tar").fingerprint()
    data = path.read_bytes()
    path.write_bytes(data.replace(b"0000.png", b"0001.png"))  # the same size, and set to the same time
    os.utime(path, ns=(1, 1))
    assert len({before, later, TarSource([path], "a.tar").fingerprint()}) == 3


@pytest.mark.skipif(not (DATA / "caltech-101").is_dir(), reason=f"no caltech-101 in {DATA} (set IJEPA_DATA)")
def test_caltech():
    source = open_source(str(DATA / "caltech-101" / "train-{000000..000002}.tar"))
    assert len(source) == 5722
    assert keys(open_source(str(DATA / "caltech-101"))) == keys(source)
    names = (DATA / "caltech-101" / "classes.txt").read_text().split()
    assert source.classes == names
    # Keys begin with the class name, so they prove that images and labels belong together.
    for key, label in zip(keys(source), source.labels.tolist(), strict=True):
        assert key.partition(":")[2].rpartition("-")[0] == names[label]
    assert len(open_source(str(DATA / "caltech-101"), "val")) == 1434


def linked(path, *links):
    """A shard of one image of class 1, and links to it: (kind, name, what it points to)."""
    shard(path, [("x/a.png", png(height=7)), ("x/a.cls", b"1")])
    with tarfile.open(path, "a") as tar:
        for kind, name, target in links:
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, target
            tar.addfile(info)
    return path


def test_links_are_what_they_point_to(tmp_path):
    """As GNU tar stores files that share their bytes, and links between folders of a data set."""
    path = linked(
        tmp_path / "a.tar",
        (tarfile.LNKTYPE, "x/b.png", "x/a.png"),
        (tarfile.SYMTYPE, "y/c.png", "../x/b.png"),
        (tarfile.SYMTYPE, "y/c.cls", "../x/a.cls"),
        (tarfile.SYMTYPE, "y/d.png", "/elsewhere/d.png"),
        (tarfile.SYMTYPE, "y/e.png", "e.png"),
    )
    source = open_source(str(path))
    assert keys(source) == [f"a.tar:{name}" for name in ("x/a.png", "x/b.png", "y/c.png")]
    assert heights(source) == [7, 7, 7]
    assert source.labels.tolist() == [1, -1, 1]
    assert source.listing.notes == (
        f"Skipped y/d.png and 1 more in {path}: the target of a link must be in the shard.",
    )


def test_sparse_members_are_named(tmp_path):
    path = shard(tmp_path / "a.tar", [("b.png", png()), ("a.bmp", bytes(512))], tarfile.GNU_FORMAT)
    data = bytearray(path.read_bytes())
    with tarfile.open(path) as tar:
        header = tar.getmember("a.bmp").offset
    # One part of 512 bytes at 512 of a file of 1,024 bytes (GNU tar manual, "Storing Sparse Files").
    data[header + 156 : header + 157] = tarfile.GNUTYPE_SPARSE
    data[header + 386 : header + 410] = b"%011o\0%011o\0" % (512, 512)
    data[header + 483 : header + 495] = b"%011o\0" % 1024
    data[header + 148 : header + 156] = b" " * 8
    data[header + 148 : header + 156] = b"%06o\0 " % sum(data[header : header + 512])
    path.write_bytes(data)
    source = open_source(str(path))
    assert keys(source) == ["a.tar:b.png"]
    assert source.listing.notes == (f"Skipped a.bmp in {path}: sparse files cannot be read.",)


def test_archives_appended_to_one_another_are_one_shard(tmp_path):
    first, second = shard(tmp_path / "1.tar", samples("0")), shard(tmp_path / "2.tar", samples("1", first=1))
    path = tmp_path / "a.tar"
    path.write_bytes(first.read_bytes() + second.read_bytes() + b"end")
    source = TarSource([path], "a.tar")
    assert keys(source) == ["a.tar:0000.png", "a.tar:0001.png"]
    assert (heights(source), source.labels.tolist()) == ([1, 2], [0, 1])
    assert source.listing.notes == (f"{path}: 3 bytes after the end of the archive are ignored.",)


def test_empty_shards_among_others_are_named(tmp_path):
    zeros, nothing = tmp_path / "0.tar", tmp_path / "1.tar"
    zeros.write_bytes(bytes(10240))
    nothing.write_bytes(b"")
    source = TarSource([zeros, nothing, shard(tmp_path / "2.tar", samples("0"))], "shards")
    assert keys(source) == ["2.tar:0000.png"]
    assert source.listing.notes == (f"{zeros} contains no images.", f"{nothing} is an empty file.")


def test_two_members_of_one_name(tmp_path):
    path = shard(tmp_path / "a.tar", [*samples("0"), *samples("1")])
    with pytest.raises(SourceError) as error:
        _ = open_source(str(path)).listing
    assert str(error.value) == f"{path} contains 0000.png twice. Give every file in the shard a unique name."
