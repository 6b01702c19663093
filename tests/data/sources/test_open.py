"""From what the user wrote to a source."""

import io
import pickle
import tarfile
from concurrent.futures import ThreadPoolExecutor

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from ijepa_enhanced.data.sources.open import open_source
from ijepa_enhanced.errors import SourceError


def png(height=4, width=6, colour="red", **options):
    buffer = io.BytesIO()
    Image.new("RGB", (width, height), colour).save(buffer, "PNG", **options)
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


def described(*metadata):
    """Members of one image and its metadata, for every one."""
    members = []
    for number, data in enumerate(metadata):
        members += [(f"{number:04d}.png", png()), (f"{number:04d}.json", data)]
    return members


def keys(source):
    return [*source.listing.keys]


def heights(source):
    return [source.size(row)[0] for row in range(len(source))]


def test_one_image_is_a_source(tmp_path):
    source = open_source(str(write(tmp_path, **{"only.png": png(9, 2)})))
    assert keys(source) == ["only.png"]
    assert source.size(0) == (9, 2)


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
        _ = open_source(str(tmp_path / folder)).listing
    assert str(error.value) == message.format(tmp_path / folder)


def test_paths_may_be_relative(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(tmp_path, **{"folder/a.png": png(5)})
    shard(tmp_path / "x.tar", samples("0"))
    (tmp_path / "classes.txt").write_text("cat\n")
    assert heights(open_source("folder")) == [5]
    for spec in ("x.tar", "."):
        source = open_source(spec)
        assert (keys(source), source.classes, heights(source)) == (["x.tar:0000.png"], ["cat"], [1])


def test_missing_shards(tmp_path):
    shard(tmp_path / "t-0.tar", samples("0"))
    with pytest.raises(SourceError) as error:
        open_source(f"{tmp_path}/t-{{0..3}}.tar")
    assert str(error.value) == (
        f"3 of the 4 files of {tmp_path}/t-{{0..3}}.tar are missing, the first is {tmp_path}/t-1.tar. "
        "Check the pattern, or fetch them."
    )


def test_a_folder_of_shards(tmp_path):
    shard(tmp_path / "b.tar", samples("1"))
    shard(tmp_path / "a.tar", samples("0"))
    assert keys(open_source(str(tmp_path))) == ["a.tar:0000.png", "b.tar:0000.png"]
    shard(tmp_path / "val-0.tar", samples("2"))
    assert keys(open_source(str(tmp_path), "val")) == ["val-0.tar:0000.png"]


def test_images_beside_shards_are_not_passed_over_in_silence(tmp_path, caplog):
    shard(tmp_path / "a.tar", samples("0"))
    write(tmp_path, **{"b.JPG": png(), ".c.png": png()})
    assert keys(open_source(str(tmp_path))) == ["a.tar:0000.png"]
    assert caplog.messages == [f"{tmp_path} holds image files beside a.tar: they are not taken."]


def test_a_folder_of_parts(tmp_path):
    write(tmp_path, **{"train/a/0.png": png(), "train/b/1.png": png(), "validation/b/2.png": png(), ".x/3.png": png()})
    assert keys(open_source(str(tmp_path))) == ["a/0.png", "b/1.png"]
    assert keys(open_source(str(tmp_path), "val")) == ["b/2.png"]
    with pytest.raises(SourceError) as error:
        open_source(str(tmp_path), "test")
    assert str(error.value) == f"{tmp_path} has train and validation, and nothing for test."
    write(tmp_path, **{"truck/4.png": png()})
    assert open_source(str(tmp_path), "val").classes == ["train", "truck", "validation"]


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
        _ = open_source(str(path)).listing
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
    with pytest.raises(SourceError, match=r"a\.parquet has 1 rows, but 0 were loaded"):
        open_source(f"{tmp_path}/a.parquet")
