"""Parquet files and Hugging Face data sets: the same rows and labels as `datasets` and `pyarrow` read."""

import io
import os
import pickle
import shutil
import sys

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from ijepa_enhanced.data.catalog import open_catalog
from ijepa_enhanced.data.sources.open import open_source
from ijepa_enhanced.errors import SourceError, UnreadableImage

SPECIES = ["dog", "ant", "cat"]


def keys(source):
    return [*source.listing.keys]


def png(height, width=6):
    buffer = io.BytesIO()
    Image.new("RGB", (width, height), (height, 0, 0)).save(buffer, "PNG")
    return buffer.getvalue()


def cells(first, count):
    """Images of `first` + 1, `first` + 2, ... pixels in height, as structs."""
    return [{"bytes": png(first + number + 1), "path": f"{first + number}.png"} for number in range(count)]


def parquet(path, **columns):
    """A plain Parquet file, without any word of Hugging Face in it, in row groups of two."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), path, row_group_size=2)
    return path


def dataset(first=0, labels=(0, 2, 1), **columns):
    """What people push to the Hub: an Image column and a ClassLabel column."""
    features = {"image": datasets.Image(), "label": datasets.ClassLabel(names=SPECIES)}
    features |= {name: datasets.Value("string") for name in columns}
    rows = {"image": cells(first, len(labels)), "label": list(labels), **columns}
    return datasets.Dataset.from_dict(rows, features=datasets.Features(features))


@pytest.fixture
def splits(tmp_path):
    """A folder laid out as the Hub's: two files of three training rows, one of two validation rows."""
    folder = tmp_path / "data-set"
    (folder / "data").mkdir(parents=True)
    dataset(0).to_parquet(folder / "data" / "train-00000-of-00002.parquet")
    dataset(3).to_parquet(folder / "data" / "train-00001-of-00002.parquet")
    dataset(6, labels=(1, 1)).to_parquet(folder / "data" / "validation-00000-of-00001.parquet")
    return folder


def test_a_folder_whose_name_datasets_reads_as_a_pattern(splits, tmp_path):
    for name in ("sets", "set[s]"):
        shutil.copytree(splits, tmp_path / name)
    spec = f"hf://{tmp_path}/set[s]"
    with pytest.raises(SourceError) as error:
        open_source(spec)
    assert str(error.value) == (
        f"{spec}: the `datasets` library reads the name of this folder as a pattern. Rename it, without *, ? and "
        "brackets."
    )


def test_a_configuration_of_the_hub_is_named_after_the_data_set(tmp_path):
    folder = tmp_path / "several"
    folder.mkdir()
    lines = ["configs:"]
    for name, first in (("small", 0), ("large", 3)):
        dataset(first).to_parquet(folder / f"{name}.parquet")
        lines += [f"- config_name: {name}", f"  data_files: {name}.parquet"]
    (folder / "README.md").write_text("\n".join(["---", *lines, "---", ""]))
    assert heights(open_source(f"hf://{folder}#config=large")) == [4, 5, 6]
    assert heights(open_source(f"hf://{folder}#config=small,label=label")) == [1, 2, 3]
    with pytest.raises(SourceError) as error:
        open_source(f"hf://{folder}")
    named = f"hf://{folder}"
    assert str(error.value) == (
        f"{named} has several configurations: small, large. Choose one, for example {named}#config=small."
    )
    with pytest.raises(SourceError, match=r"only image=COLUMN, label=COLUMN or both"):
        open_source(f"{folder}/small.parquet#config=small")


def heights(source):
    return [source.size(row)[0] for row in range(len(source))]


def test_a_parquet_file(tmp_path):
    path = tmp_path / "a.parquet"
    dataset().to_parquet(path)
    source = open_source(str(path))
    assert keys(source) == ["a.parquet:0", "a.parquet:1", "a.parquet:2"]
    assert source.classes == SPECIES, "the names keep the order that the file gives them"
    np.testing.assert_array_equal(source.labels, [0, 2, 1])
    assert source.labels.dtype == np.int64
    assert heights(source) == [1, 2, 3]
    assert source.open(2).getpixel((0, 0)) == (3, 0, 0)


def test_the_parts_of_a_folder(splits):
    train, val = open_source(str(splits)), open_source(str(splits), "val")
    assert heights(train) == [1, 2, 3, 4, 5, 6]
    assert train.key(3) == "train-00001-of-00002.parquet:0"
    assert (heights(val), val.labels.tolist()) == ([7, 8], [1, 1])
    assert heights(open_source(str(splits / "data"), "val")) == [7, 8]


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("train-*.parquet", [1, 2, 3, 4, 5, 6]),
        ("train-{00001,00000}-of-00002.parquet", [4, 5, 6, 1, 2, 3]),
        ("{validation,train}-*0-of-*.parquet", [7, 8, 1, 2, 3]),
    ],
)
def test_patterns(splits, pattern, expected):
    for part in ("train", "val"):
        assert heights(open_source(f"{splits}/data/{pattern}", part)) == expected


@pytest.mark.parametrize(
    ("split", "part", "expected"),
    [
        ("", "train", [1, 2, 3, 4, 5, 6]),
        ("", "val", [7, 8]),
        (":validation", "train", [7, 8]),
        (":train[2:4]", "train", [3, 4]),
    ],
)
def test_a_data_set_of_the_hub(splits, split, part, expected):
    source = open_source(f"hf://{splits}{split}", part)
    assert heights(source) == expected
    assert source.classes == SPECIES
    assert source.key(0) == f"{split[1:] or {'val': 'validation'}.get(part, part)}:0"


def test_saved_data_sets(tmp_path):
    dataset(2).save_to_disk(tmp_path / "one")
    pair = datasets.DatasetDict({"train": dataset(), "validation": dataset(4, labels=(2,))})
    pair.save_to_disk(tmp_path / "pair")
    assert heights(open_source(str(tmp_path / "one"), "val")) == [3, 4, 5]
    assert heights(open_source(str(tmp_path / "pair"))) == [1, 2, 3]
    source = open_source(str(tmp_path / "pair"), "val")
    assert (heights(source), source.labels.tolist(), source.classes) == ([5], [2], SPECIES)
    assert heights(open_source(str(tmp_path / "pair" / "validation"))) == [5]


def test_only_rows_that_are_kept_are_saved(tmp_path):
    dataset().select([2, 0]).save_to_disk(tmp_path / "some")
    source = open_source(str(tmp_path / "some"))
    assert (heights(source), source.labels.tolist()) == ([3, 1], [1, 0])


def test_columns_without_the_types_of_datasets(tmp_path):
    source = open_source(str(parquet(tmp_path / "a.parquet", photo=cells(0, 3), label=[7, -7, 3])))
    assert ([source.size(0), source.size(2)], source.labels.tolist(), source.classes) == (
        [(1, 6), (3, 6)],
        [7, -1, 3],
        None,
    )
    bare = [png(5), png(4)]
    source = open_source(str(parquet(tmp_path / "b.parquet", image=bare, other=bare, id=[1, 2])))
    assert (heights(source), source.labels, source.classes) == ([5, 4], None, None)


def test_string_labels_are_numbered_in_the_order_of_the_alphabet(tmp_path):
    source = open_source(str(parquet(tmp_path / "a.parquet", image=cells(0, 3), label=["dog", "ant", "dog"])))
    assert (source.labels.tolist(), source.classes) == ([1, 0, 1], ["ant", "dog"])


def test_rows_without_a_label_are_images(tmp_path):
    some = open_source(str(parquet(tmp_path / "a.parquet", image=cells(0, 3), label=["dog", None, "ant"])))
    assert some.labels.tolist() == [1, -1, 0]
    catalog = open_catalog(some, cache=False)
    assert (len(catalog.unreadable), catalog.labels.tolist()) == (0, [1, -1, 0])
    dataset(labels=(-1, -1)).to_parquet(tmp_path / "b.parquet")
    none = open_source(str(tmp_path / "b.parquet"))
    assert (none.labels, none.classes, heights(none)) == (None, None, [1, 2])


def test_a_chosen_column(tmp_path):
    rows = {"front": cells(0, 2), "back": cells(5, 2), "coarse": ["b", "a"], "fine": [1, 0]}
    path = parquet(tmp_path / "a.parquet", **rows)
    source = open_source(f"{path}#image=back,label=coarse")
    assert (heights(source), source.labels.tolist()) == ([6, 7], [1, 0])
    assert (source.name, source.fingerprint()) != (path, open_source(f"{path}#image=front").fingerprint())
    assert open_source(f"{path}#image=front").labels is None


def test_images_beside_the_table(tmp_path):
    (tmp_path / "there.png").write_bytes(png(9))
    paths = [str(tmp_path / "there.png"), str(tmp_path / "gone.png"), None]
    image = pa.array([{"bytes": None, "path": path} for path in paths[:2]] + [None])
    source = open_source(str(parquet(tmp_path / "a.parquet", image=image)))
    assert source.size(0) == (9, 6)
    unreadable = dict(open_catalog(source, cache=False).unreadable)
    assert unreadable == {
        "a.parquet:1": "cannot be read: No such file or directory",
        "a.parquet:2": "no image in this row",
    }


def test_damaged_rows_are_unreadable(tmp_path):
    image = [{"bytes": data, "path": None} for data in (b"", b"words", png(3)[:30], png(3))]
    source = open_source(str(parquet(tmp_path / "a.parquet", image=image)))
    assert source.size(3) == (3, 6)
    for row, reason in enumerate(["empty file", "not a JPEG", "damaged header"]):
        for read in (source.open, source.size):
            with pytest.raises(UnreadableImage, match=f"^{reason}"):
                read(row)


def test_nothing_is_written_beside_the_data(splits):
    before = sorted(path for path in splits.rglob("*"))
    open_catalog(open_source(str(splits)), cache=False)
    open_catalog(open_source(f"hf://{splits}"), cache=False)
    assert sorted(path for path in splits.rglob("*")) == before


def test_a_changed_file_is_read_anew(tmp_path):
    path = tmp_path / "a.parquet"
    dataset().to_parquet(path)
    before = open_source(str(path))
    dataset(7).to_parquet(path)
    os.utime(path, (1, 1))
    after = open_source(str(path))
    assert (heights(before), heights(after)) == ([1, 2, 3], [8, 9, 10])
    assert before.fingerprint() != after.fingerprint()
    assert open_catalog(after).heights.tolist() == [8, 9, 10]


def test_slices_of_one_file_are_different_sources(splits):
    first, second = (open_source(f"hf://{splits}:train[{rows}]") for rows in (":2", "2:4"))
    assert first.fingerprint() != second.fingerprint()
    assert open_catalog(first).heights.tolist() == [1, 2]
    assert open_catalog(second).heights.tolist() == [3, 4]


def test_a_copy_for_another_process_is_small_and_reads_the_same(splits):
    source = open_source(str(splits))
    sent = pickle.dumps(source)
    assert len(sent) < 4000, "the images stay in the memory map"
    assert heights(pickle.loads(sent)) == [1, 2, 3, 4, 5, 6]


NO_PACKAGE = (
    "Parquet files and Hugging Face datasets can be read only with the `datasets` package. Install it with: "
    "pip install 'ijepa-enhanced[data]'"
)


def test_without_the_package(splits, tmp_path, monkeypatch):
    dataset().save_to_disk(tmp_path / "saved")
    monkeypatch.setitem(sys.modules, "datasets", None)
    for spec in (str(splits), f"{splits}/data/train-*.parquet", f"hf://{splits}", str(tmp_path / "saved")):
        with pytest.raises(SourceError) as error:
            open_source(spec)
        assert str(error.value) == NO_PACKAGE


REFUSED = {
    "a struct whose field bytes holds no bytes": (
        {"photo": [{"bytes": 7, "path": "a.png"}], "label": [1]},
        "",
        "{0} has no image column (type Image or binary, or a struct whose field 'bytes' is binary). "
        "Its columns are: photo (struct), label (int64).",
    ),
    "no image column": (
        {"photo": ["a.png"], "label": [1]},
        "",
        "{0} has no image column (type Image or binary, or a struct whose field 'bytes' is binary). "
        "Its columns are: photo (string), label (int64).",
    ),
    "several image columns": (
        {"front": cells(0, 1), "back": cells(0, 1)},
        "",
        "{0} has several image columns: front, back. Choose one, for example {0}#image=front.",
    ),
    "a column that is none": (
        {"front": cells(0, 1), "back": cells(0, 1), "size": [3]},
        "#image=size",
        "{0} has no image column 'size'. Its image columns are: front, back.",
    ),
    "a label column that is none": (
        {"image": cells(0, 1), "weight": [[0.5]]},
        "#label=weight",
        "{0} has no label column 'weight', nor any other label column.",
    ),
    "another word": (
        {"image": cells(0, 1)},
        "#picture=image",
        "{0}#picture=image: only image=COLUMN, label=COLUMN or both, separated by a comma, can follow the #. hf:// "
        "datasets also accept config=NAME. Tar shards accept only label=NAME.",
    ),
    "no rows": ({"image": pa.array([], pa.binary())}, "", "No images in {0}: it has no rows."),
}


@pytest.mark.parametrize(("columns", "chosen", "message"), REFUSED.values(), ids=REFUSED)
def test_tables_that_are_refused(tmp_path, columns, chosen, message):
    path = parquet(tmp_path / "a.parquet", **columns)
    with pytest.raises(SourceError) as error:
        open_source(f"{path}{chosen}")
    assert str(error.value) == message.format(path)


def test_several_label_columns(tmp_path):
    names = datasets.ClassLabel(names=["a", "b"])
    features = datasets.Features({"img": datasets.Image(), "fine": names, "coarse": names})
    path = tmp_path / "a.parquet"
    datasets.Dataset.from_dict({"img": cells(0, 1), "fine": [1], "coarse": [0]}, features).to_parquet(path)
    with pytest.raises(SourceError) as error:
        open_source(str(path))
    assert str(error.value) == (
        f"{path} has several label columns: fine, coarse. Choose one, for example {path}#label=fine."
    )
    assert open_source(f"{path}#label=coarse").labels.tolist() == [0]


def test_files_that_are_no_parquet(tmp_path):
    path = tmp_path / "a.parquet"
    path.write_bytes(b"words, not columns")
    with pytest.raises(SourceError) as error:
        open_source(str(path))
    assert str(error.value) == f"{path} is not a Parquet file, or is damaged."


def test_files_of_different_columns(tmp_path):
    parquet(tmp_path / "a.parquet", image=cells(0, 1), label=[1])
    parquet(tmp_path / "b.parquet", image=cells(0, 1), name=["x"])
    with pytest.raises(SourceError) as error:
        open_source(str(tmp_path))
    assert str(error.value) == (
        f"The files of {tmp_path} have different columns: a.parquet has image, label, but b.parquet has image, name. "
        "Choose files with the same columns."
    )


def test_a_file_damaged_within(tmp_path):
    path = parquet(tmp_path / "a.parquet", image=[np.random.default_rng(row).bytes(900) for row in range(9)])
    data = bytearray(path.read_bytes())
    data[100:2000] = bytes(1900)
    path.write_bytes(data)
    with pytest.raises(SourceError, match=rf"^{path} cannot be loaded: "):
        open_source(str(path))


def test_a_part_that_a_folder_lacks(splits):
    (splits / "data" / "validation-00000-of-00001.parquet").rename(splits / "data" / "test-0.parquet")
    with pytest.raises(SourceError) as error:
        open_source(str(splits), "val")
    assert str(error.value) == (
        f"{splits} has files for the splits train and test, but none for val. Choose the files, for example "
        f"{splits}/data/train-0000*.parquet."
    )


def test_a_split_that_a_data_set_lacks(splits, tmp_path):
    pair = datasets.DatasetDict({"train": dataset(), "test": dataset()})
    pair.save_to_disk(tmp_path / "pair")
    with pytest.raises(SourceError) as error:
        open_source(str(tmp_path / "pair"), "val")
    where = tmp_path / "pair"
    assert str(error.value) == (
        f"{where} has the splits train, test, but none for val. Choose one, for example {where}/train."
    )
    with pytest.raises(SourceError) as error:
        open_source(f"hf://{splits}", "test")
    assert str(error.value) == (
        f"hf://{splits} has the splits train, validation, but none for test. Choose one, for example hf://{splits}:train."
    )
    with pytest.raises(SourceError) as error:
        open_source(f"hf://{splits}:dev")
    assert str(error.value) == (
        f"hf://{splits}:dev cannot be loaded: Unknown split \"dev\". Should be one of ['train', 'validation']."
    )


def test_a_data_set_of_one_split_does_not_stand_for_another_part(splits):
    (splits / "data" / "validation-00000-of-00001.parquet").unlink()
    assert heights(open_source(f"hf://{splits}")) == [1, 2, 3, 4, 5, 6]
    with pytest.raises(SourceError) as error:
        open_source(f"hf://{splits}", "val")
    assert str(error.value) == (
        f"hf://{splits} has the split train, but none for val. Choose one, for example hf://{splits}:train."
    )


def test_a_label_too_large_for_int64_is_an_error(tmp_path):
    path = parquet(tmp_path / "a.parquet", image=cells(0, 1), label=pa.array([2**63], pa.uint64()))
    with pytest.raises(SourceError) as error:
        _ = open_source(str(path)).listing
    assert str(error.value) == f"{path} has the label {2**63}, which does not fit in 64 bits."


def test_an_empty_string_is_no_label(tmp_path):
    pq.write_table(pa.table({"image": [b"x"] * 3, "label": ["b", "", "a"]}), tmp_path / "a.parquet")
    source = open_source(str(tmp_path / "a.parquet"))
    assert (source.labels.tolist(), source.classes) == ([1, -1, 0], ["a", "b"])


def test_labels_that_have_no_name(tmp_path):
    path = tmp_path / "a.parquet"
    dataset().to_parquet(path)
    table = pq.read_table(path)
    numbers = pa.array([0, 1, len(SPECIES)], table.schema.field("label").type)
    pq.write_table(table.set_column(1, table.schema.field("label"), numbers), path)
    with pytest.raises(SourceError) as error:
        _ = open_source(str(path)).listing
    assert str(error.value) == f"{path} has the label 3, but only 3 class names, for the labels 0 to 2."


def test_a_slice_without_rows(splits):
    with pytest.raises(SourceError) as error:
        open_source(f"hf://{splits}:train[:0]")
    assert str(error.value).startswith(f"hf://{splits}:train[:0] cannot be loaded: ")


def test_saved_data_sets_that_are_empty_or_damaged(tmp_path):
    dataset(labels=()).save_to_disk(tmp_path / "empty")
    with pytest.raises(SourceError, match=rf"^{tmp_path}/empty cannot be loaded: "):
        open_source(str(tmp_path / "empty"))
    dataset().save_to_disk(tmp_path / "saved")
    (tmp_path / "saved" / "data-00000-of-00001.arrow").unlink()
    with pytest.raises(SourceError, match=rf"^{tmp_path}/saved cannot be loaded: .*data-00000-of-00001\.arrow"):
        open_source(str(tmp_path / "saved"))


def test_a_data_set_that_the_hub_lacks_or_that_cannot_be_reached():
    with pytest.raises(SourceError, match=r"^hf://nobody/nothing cannot be loaded: Couldn't reach 'nobody/nothing'"):
        open_source("hf://nobody/nothing")


def test_imagenette(real_data, tmp_path):
    folder = real_data / "imagenette-224"
    copies = tmp_path / "imagenette"
    copies.mkdir()
    for file in sorted(folder.glob("val-*.parquet")):
        shutil.copy(file, copies)
    source = open_source(str(copies), "val")
    read = datasets.Dataset.from_parquet([str(file) for file in sorted(copies.glob("*.parquet"))])
    assert len(source) == len(read) == 3925
    assert source.classes == read.features["label"].names
    np.testing.assert_array_equal(source.labels, read["label"][:])
    assert source.classes == (folder / "classes.txt").read_text().splitlines()
    table = pa.concat_tables([pq.read_table(file) for file in sorted(copies.glob("*.parquet"))])
    np.testing.assert_array_equal(source.labels, table["label"].to_numpy())
    for row in np.random.default_rng(0).choice(len(read), 50, replace=False).tolist():
        assert source.read(row) == table["image"][row]["bytes"].as_py()
        np.testing.assert_array_equal(np.asarray(source.open(row)), np.asarray(read[row]["image"]))
