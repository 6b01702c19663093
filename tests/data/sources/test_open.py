"""From what the user wrote to a source."""

import logging
import os
import pickle
from concurrent.futures import ThreadPoolExecutor

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ijepa_enhanced.data.catalog import open_catalog, report_unreadable, taken
from ijepa_enhanced.data.sources.names import count_kinds, listed
from ijepa_enhanced.data.sources.open import anchored, open_source
from ijepa_enhanced.errors import SourceError
from source_files import described, heights, keys, png, samples, shard, write


def test_one_image_is_a_source(tmp_path):
    source = open_source(str(write(tmp_path, **{"only.png": png(9, 2)})))
    assert keys(source) == ["only.png"]
    assert source.size(0) == (9, 2)


def test_an_anchored_source_means_the_same_in_any_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/home/me")
    assert anchored("photos@2 + train-{000..003}.tar#label=cls + hf://NAME:train + synthetic@0.5") == (
        f"{tmp_path}/photos@2 + {tmp_path}/train-{{000..003}}.tar#label=cls + hf://NAME:train + synthetic@0.5"
    )
    assert anchored("~/photos") == "/home/me/photos"
    assert [anchored(spec) for spec in ("synthetic", "", "https://host/a.tar")] == [
        "synthetic",
        "",
        "https://host/a.tar",
    ]
    (tmp_path / "a + b").mkdir()
    assert anchored("a + b") == f"{tmp_path}/a + b", "the name of a folder"


@pytest.mark.parametrize(
    ("folder", "message"),
    [
        (
            "empty",
            "No images in {}. The folder must contain files that end in "
            ".jpg, .jpeg, .jpe, .jfif, .png, .apng, .webp, .gif, .avif, "
            ".bmp, .dib, .tif, .tiff, .jp2, .j2k, .heic, .heif, .npy. "
            "It holds 1 .txt.",
        ),
        (
            "gone",
            "No such file or folder: {}. A source of images can be a folder, tar shards such as "
            "train-{{000000..000002}}.tar, "
            "Parquet files, a CSV or JSONL list, hf://NAME, or 'synthetic'.",
        ),
    ],
)
def test_folders_that_are_no_source(tmp_path, folder, message):
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "notes.txt").write_text("no image")
    with pytest.raises(SourceError) as error:
        _ = open_source(str(tmp_path / folder)).listing
    assert str(error.value) == message.format(tmp_path / folder)


def test_paths_may_be_relative(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(tmp_path, **{"folder/a.png": png(5)})
    (tmp_path / "shards").mkdir()
    for folder in (tmp_path, tmp_path / "shards"):
        shard(folder / "x.tar", samples("0"))
        (folder / "classes.txt").write_text("cat\n")
    assert heights(open_source("folder")) == [5]
    for spec in ("x.tar", "shards"):
        source = open_source(spec)
        assert (keys(source), source.classes, heights(source)) == (["x.tar:0000.png"], ["cat"], [1])


def test_missing_shards(tmp_path):
    shard(tmp_path / "t-0.tar", samples("0"))
    with pytest.raises(SourceError) as error:
        open_source(f"{tmp_path}/t-{{0..3}}.tar")
    assert str(error.value) == (
        f"3 of the 4 files of {tmp_path}/t-{{0..3}}.tar are missing, starting with {tmp_path}/t-1.tar. "
        "Check the pattern, or download what is missing."
    )


def test_a_folder_of_shards(tmp_path):
    shard(tmp_path / "b.tar", samples("1"))
    shard(tmp_path / "a.tar", samples("0"))
    assert keys(open_source(str(tmp_path))) == ["a.tar:0000.png", "b.tar:0000.png"]
    for name in ("train_0.tar", "train.tar", "set-VAL-0.tar"):
        shard(tmp_path / name, samples("2"))
    (tmp_path / "a.tar").rename(tmp_path / "trains.tar")
    train, val = open_source(str(tmp_path)), open_source(str(tmp_path), "val")
    assert keys(train) == ["train.tar:0000.png", "train_0.tar:0000.png"]
    assert keys(val) == ["set-VAL-0.tar:0000.png"]
    assert taken(train).endswith("split train (others: val), 2 images, 1 class; ignored: 2 .tar")


def test_shards_of_classes_one_of_which_has_a_name_like_a_split(tmp_path):
    for name in ("boats", "planes", "trains"):
        shard(tmp_path / f"{name}.tar", samples("0"))
    for part in ("train", "val"):
        assert keys(open_source(str(tmp_path), part)) == [
            f"{name}.tar:0000.png" for name in ("boats", "planes", "trains")
        ]
    (tmp_path / "trains.tar").rename(tmp_path / "train.tar")
    for part in ("train", "val"):
        with pytest.raises(SourceError) as error:
            open_source(str(tmp_path), part)
        assert str(error.value) == (
            f"{tmp_path} is ambiguous: 'train' is the name of a split, but boats.tar and planes.tar are not. To use "
            f"only this split, use {tmp_path}/train.tar. To use all files, use {tmp_path}/*.tar."
        )
    assert len(open_source(f"{tmp_path}/*.tar")) == 3


def test_images_beside_shards_are_not_ignored_in_silence(tmp_path):
    shard(tmp_path / "a.tar", samples("0"))
    write(tmp_path, **{"b.JPG": png(), ".c.png": png()})
    source = open_source(str(tmp_path))
    assert keys(source) == ["a.tar:0000.png"]
    assert taken(source) == f"{tmp_path}: tar shards, 1 image, 1 class; ignored: 1 .jpg, 1 hidden file or folder"


def test_a_folder_of_parts(tmp_path):
    write(tmp_path, **{"train/a/0.png": png(), "train/b/1.png": png(), "validation/b/2.png": png(), ".x/3.png": png()})
    assert keys(open_source(str(tmp_path))) == ["a/0.png", "b/1.png"]
    assert keys(open_source(str(tmp_path), "val")) == ["b/2.png"]
    with pytest.raises(SourceError) as error:
        open_source(str(tmp_path), "test")
    assert str(error.value) == (
        f"{tmp_path} has the splits train and validation, but none for test. Choose one, for example {tmp_path}/train."
    )
    write(tmp_path, **{"truck/4.png": png()})
    ignored = "1 folder of images, 1 hidden file or folder"
    assert taken(open_source(str(tmp_path))).endswith(f"2 images, 2 classes; ignored: {ignored}")
    (tmp_path / "validation").rename(tmp_path / "valley")
    for part in ("train", "val"):
        with pytest.raises(SourceError) as error:
            open_source(str(tmp_path), part)
        assert str(error.value) == (
            f"{tmp_path} is ambiguous: 'train' is the name of a split, but truck and valley are not. To use only this "
            f"split, use {tmp_path}/train. If all folders are classes, rename train."
        )
    (tmp_path / "train").rename(tmp_path / "trains")
    assert open_source(str(tmp_path)).classes == ["trains", "truck", "valley"]


STRAYS = {
    "Imagenette's own archive": {"noisy_imagenette.csv": b"path,label\n", ".DS_Store": b""},
    "a zip file of macOS": {"__MACOSX/train/._a.jpg": b"", "._train": b""},
    "an archive beside what was made of it": {"set.tar": b"", "README.md": b"", "a.png": png()},
    "folders without images": {"annotations/a.json": b"{}", "labels/train/a.txt": b""},
}


@pytest.mark.parametrize("strays", STRAYS.values(), ids=STRAYS)
@pytest.mark.parametrize(
    ("train", "val", "test"),
    [("train", "val", "test"), ("Train", "VALID", "Test"), ("train2017", "val2017", "test2017")],
)
def test_what_lies_beside_folders_of_splits_is_ignored(tmp_path, strays, train, val, test):
    write(
        tmp_path, **{f"{split}/{label}/{split}.png": png() for split in (train, val, test) for label in ("cat", "dog")}
    )
    write(tmp_path, **strays)
    for part, split in (("train", train), ("val", val), ("test", test)):
        source = open_source(str(tmp_path), part)
        assert (keys(source), source.classes) == ([f"cat/{split}.png", f"dog/{split}.png"], ["cat", "dog"])
        others = ", ".join(sorted({train, val, test} - {split}))
        said = f"{tmp_path}/{split}: folder, split {split} (others: {others}), 2 images, 2 classes"
        assert taken(source).partition(";")[0] == said
        names = [name for name in strays if "/" not in name or name.startswith("__")]
        counts = listed(count_kinds(name.partition("/")[0] for name in names))
        assert taken(source) == said + (f"; ignored: {counts}" if counts else "")


@pytest.mark.parametrize(
    ("files", "top"),
    [
        (["imagenette2/train/cat/0.png", "imagenette2/val/cat/1.png"], "imagenette2"),  # an archive in its own folder
        (["cat/train/0.png", "cat/test/1.png", "dog/train/2.png", "dog/test/3.png"], "cat"),  # as MVTec AD
    ],
)
def test_splits_one_folder_down_are_not_classes(tmp_path, files, top):
    write(tmp_path, **dict.fromkeys(files, png()))
    with pytest.raises(SourceError) as error:
        _ = open_source(str(tmp_path)).listing
    first, second = sorted(name for name in os.listdir(tmp_path / top))
    assert str(error.value) == (
        f"{tmp_path} is ambiguous: {top}/{first} and {top}/{second} are named after splits. For the splits of {top}, "
        f"use {tmp_path}/{top}. If {top} is a class, move its images to {first}/{top} and {second}/{top}."
    )
    assert len(open_source(str(tmp_path / top))) == 1


def test_folders_below_classes_may_have_a_name_like_a_split(tmp_path):
    write(tmp_path, **{"vehicle/train/0.png": png(), "vehicle/car/1.png": png(), "animal/2.png": png()})
    (tmp_path / "plant").mkdir()
    source = open_source(str(tmp_path))
    assert (source.classes, source.labels.tolist()) == (["animal", "vehicle"], [0, 1, 1])
    assert taken(source).endswith("3 images, 2 classes; ignored: 1 folder without images")


def test_shards_in_folders_of_splits(tmp_path):
    for split in ("train", "val"):
        (tmp_path / split).mkdir()
        shard(tmp_path / split / f"{split}-0.tar", samples("0", "1"))
        shard(tmp_path / split / "rest.tar", samples("0")) if split == "val" else None
    assert keys(open_source(str(tmp_path))) == ["train-0.tar:0000.png", "train-0.tar:0001.png"]
    with pytest.raises(SourceError, match=r"is ambiguous: 'val' is the name of a split, but rest\.tar is not\. "):
        open_source(str(tmp_path), "val")
    shard(tmp_path / "train-9.tar", samples("0"))
    with pytest.raises(SourceError, match=r"train-9\.tar and the folder train are both named after splits"):
        open_source(str(tmp_path))


def test_folders_of_classes_beside_a_shard(tmp_path):
    write(tmp_path, **{f"{label}/{number}.png": png() for label in ("cat", "dog") for number in range(5)})
    shard(tmp_path / "old.tar", samples("0", "1"))
    with pytest.raises(SourceError) as error:
        open_source(str(tmp_path))
    assert str(error.value) == (
        f"{tmp_path} is ambiguous: it contains old.tar and folders with images (cat and dog). For the shards, use "
        f"{tmp_path}/*.tar. For the folders, move the .tar files elsewhere."
    )
    assert len(open_source(f"{tmp_path}/*.tar")) == 2
    (tmp_path / "old.tar").rename(tmp_path / "train-0.tar")
    source = open_source(str(tmp_path))  # a name that leaves no doubt
    assert taken(source) == (f"{tmp_path}: tar shards, split train, 2 images, 2 classes; ignored: 2 folders of images")


def test_two_folders_for_one_part(tmp_path):
    write(tmp_path, **{f"{split}/a/0.png": png() for split in ("train", "dev", "val")})
    said = f"{tmp_path} has several splits for val: dev, val. Choose one, for example {tmp_path}/dev."
    with pytest.raises(SourceError, match=said):
        open_source(str(tmp_path), "val")
    assert keys(open_source(f"{tmp_path}/val", "val")) == ["a/0.png"]


def test_what_was_read_and_what_was_not_is_one_line_for_each_source(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    photos = write(
        tmp_path / "photos",
        **{
            "a/0.png": png(),
            "b/1.PNG": png(),
            "-1/2.png": png(),
            "b/x.txt": b"",
            "b/X.TXT": b"",
            "b/raw": b"",
            ".n": b"",
        },
    )
    (tmp_path / "list.csv").write_text("path,label\nphotos/a/0.png,0\nphotos/b/1.PNG,nan\n")
    members = [("a/b.png", png()), ("a/b.cls", b"7"), ("a/._b.png", b""), ("a/b.txt", b""), ("__MACOSX/c.png", b"")]
    shard(tmp_path / "a.tar", members)
    for _ in range(2):  # from the images, and from the catalog
        caplog.clear()
        report_unreadable(open_catalog(open_source(f"{photos} + {tmp_path}/list.csv + {tmp_path}/a.tar + synthetic")))
        assert caplog.messages[:4] == [
            f"Images: {photos}: folder, 3 images, 2 classes, 1 image without a label; "
            "ignored: 2 .txt, 1 hidden file or folder, 1 file without extension",
            f"Images: {tmp_path}/list.csv: list of files, 2 images, 1 class, 1 image without a label",
            f"Images: {tmp_path}/a.tar: tar shards, 1 image, 1 class; ignored: 2 hidden files or folders, 1 .txt",
            "Images: synthetic: built-in images, split train, 4,096 images, 10 classes",
        ]


def test_sources_can_be_sent_and_shared(tmp_path):
    """A copy as another process gets it, and many threads at once, read the same bytes."""
    shard(tmp_path / "a.tar", [(f"{n}.png", png(n + 1, color=(n, 0, 0))) for n in range(40)])
    folder = write(tmp_path / "folder", **{f"{n:02d}.png": png(n + 1, color=(n, 0, 0)) for n in range(40)})
    for source in (open_source(str(tmp_path / "a.tar")), open_source(str(folder))):
        copy = pickle.loads(pickle.dumps(source))

        def look(row, copy=copy):
            image = copy.open(row)
            return image.height, image.getpixel((0, 0))[0]

        with ThreadPoolExecutor(8) as pool:
            seen = list(pool.map(look, list(range(40)) * 5))
        assert seen == [(n + 1, n) for n in range(40)] * 5


def test_shards_by_asterisk(tmp_path):
    for number in (2, 10, 1):
        shard(tmp_path / f"train-{number:02d}.tar", samples("0"))
    shard(tmp_path / "val-01.tar", samples("0"))
    names = [key.partition(":")[0] for key in keys(open_source(f"{tmp_path}/train-*.tar"))]
    assert names == ["train-01.tar", "train-02.tar", "train-10.tar"]


def test_a_folder_without_the_part(tmp_path):
    shard(tmp_path / "train-0.tar", samples("0"))
    with pytest.raises(SourceError) as error:
        open_source(str(tmp_path), "val")
    assert str(error.value) == (
        f"{tmp_path} has files for the split train, but none for val. Choose the files, for example "
        f"{tmp_path}/train-0.tar."
    )


@pytest.mark.parametrize("name", ["a.tar", "a.parquet"])
def test_shards_that_may_not_be_read(tmp_path, monkeypatch, name):
    path = tmp_path / name
    path.write_bytes(b"")

    def refuse(file, *args, **options):
        raise PermissionError(13, "Permission denied", str(file))

    monkeypatch.setattr("builtins.open" if name == "a.tar" else "pyarrow.parquet.read_metadata", refuse)
    with pytest.raises(SourceError) as error:
        _ = open_source(str(path)).listing
    assert str(error.value) == f"{path} cannot be read: Permission denied."


NO_COLUMNS = "{}: tar shards have no image column. Only label=NAME can follow the #."


NO_CHOICE = "{} has no columns. Remove the # and everything after it."


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


ODD = ["photos[1].tar", "list{v2}.csv", "list{v2,v3}.jsonl", "[ab]/x.parquet", "a*b/x{0..1}.tar", "[ab]/photos?.csv"]
"""Names that are patterns too, some of which match other files."""


def write_one(path, height):
    """Write a source of one image in the format that its name says."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".tar":
        shard(path, [("x.png", png(height))])
    elif path.suffix == ".parquet":
        pq.write_table(pa.table({"image": [png(height)]}), path)
    else:
        (path.parent / f"{height}.png").write_bytes(png(height))
        header = "path\n" if path.suffix == ".csv" else ""
        line = f"{height}.png" if path.suffix == ".csv" else f'{{"path": "{height}.png"}}'
        path.write_text(f"{header}{line}\n")


@pytest.mark.parametrize("name", ODD)
def test_a_path_that_exists_is_never_a_pattern(tmp_path, name):
    others = ["photos1.tar", "listv2.csv", "a/x.parquet", "b/x.parquet", "listv2.jsonl", "a-b/x0.tar", "a/photos1.csv"]
    for number, other in enumerate(others, start=10):
        write_one(tmp_path / other, number)
    write_one(tmp_path / name, 3)
    assert heights(open_source(f"{tmp_path}/{name}")) == [3]


def test_a_pattern_below_a_folder_whose_name_is_a_pattern_too(tmp_path):
    for folder, height in (("a", 9), ("[ab]{1,2}", 3)):
        for number in range(2):
            write_one(tmp_path / folder / f"t-{number}.parquet", height + number)
            write_one(tmp_path / folder / f"[t]-{number}.tar", height + number)
    for pattern in ("t-{0..1}.parquet", "t-*.parquet", "{[t]-0,[t]-1}.tar"):
        assert heights(open_source(f"{tmp_path}/[ab]{{1,2}}/{pattern}")) == [3, 4]
    assert heights(open_source(f"{tmp_path}/[a]/t-0.parquet")) == [9]


def test_rows_that_were_not_loaded_are_an_error(tmp_path, monkeypatch):
    write_one(tmp_path / "a.parquet", 3)
    load = datasets.Dataset.from_parquet
    monkeypatch.setattr(datasets.Dataset, "from_parquet", lambda files: load(files).select([]))
    with pytest.raises(SourceError, match=r"a\.parquet has 1 rows, but the `datasets` library loaded 0\. Clear its"):
        open_source(f"{tmp_path}/a.parquet")
