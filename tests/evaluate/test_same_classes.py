"""Two sources that are scored against each other: their classes mean the same, however each one writes them."""

import csv
import io
import itertools
import json
import logging
import tarfile
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from ijepa_enhanced.data.sources.open import open_source
from ijepa_enhanced.errors import RequestError, SourceError
from ijepa_enhanced.evaluate.labelled import labelled_pair

NUMBERS = [str(number) for number in range(12)]
NAMES = ["dog", "Bee", "ant", "crane 2", "zebra", "élan", "cat", "fox", "owl", "emu", "yak", "koi"]
Rows = list[tuple[bytes, str]]
"""Image and label of every image."""


def png(value: int) -> bytes:
    """Return an image whose red value says which one it is."""
    buffer = io.BytesIO()
    Image.new("RGB", (6, 4), (value, 0, 0)).save(buffer, "PNG")
    return buffer.getvalue()


def rows_of(labels: list[str]) -> Rows:
    return [(png(number), label) for number, label in enumerate(labels)]


def folders(root: Path, rows: Rows) -> str:
    for number, (image, label) in enumerate(rows):
        (root / label).mkdir(parents=True, exist_ok=True)
        (root / label / f"{number}.png").write_bytes(image)
    return str(root)


def files(root: Path, rows: Rows) -> list[str]:
    root.mkdir(parents=True)
    for number, (image, _) in enumerate(rows):
        (root / f"{number}.png").write_bytes(image)
    return [f"{number}.png" for number in range(len(rows))]


def csv_list(root: Path, rows: Rows, suffix: str = "") -> str:
    names = files(root, rows)
    with open(root / "list.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["path", "label"])
        writer.writerows([name, label + suffix] for name, (_, label) in zip(names, rows, strict=True))
    return str(root / "list.csv")


def csv_of_pandas(root: Path, rows: Rows) -> str:
    """Write whole numbers as 3.0, as pandas does if a label is missing."""
    return csv_list(root, rows, ".0" if rows[0][1].isdecimal() else "")


def json_lines(root: Path, rows: Rows) -> str:
    names = files(root, rows)
    lines = [
        json.dumps({"path": name, "label": int(label) if label.isdecimal() else label})
        for name, (_, label) in zip(names, rows, strict=True)
    ]
    (root / "list.jsonl").write_text("\n".join(lines))
    return str(root / "list.jsonl")


def shard(root: Path, rows: Rows, member: Callable[[str], tuple[str, bytes]]) -> str:
    root.mkdir(parents=True)
    with tarfile.open(root / "a.tar", "w") as tar:
        for number, (image, label) in enumerate(rows):
            for extension, data in ((".png", image), member(label)):
                info = tarfile.TarInfo(f"{number:04d}{extension}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    return str(root / "a.tar")


def cls(root: Path, rows: Rows) -> str:
    return shard(root, rows, lambda label: (".cls", label.encode()))


def metadata(root: Path, rows: Rows) -> str:
    return shard(root, rows, lambda label: (".json", json.dumps({"label": label}).encode()))


def classes_txt(root: Path, rows: Rows) -> str:
    """Number the classes in the order of a list that is not sorted."""
    names = [*dict.fromkeys(label for _, label in rows)][::-1]
    path = shard(root, rows, lambda label: (".cls", str(names.index(label)).encode()))
    (root / "classes.txt").write_text("\n".join([*names, ""]), encoding="utf-8-sig")
    return path


def csv_with_classes(root: Path, rows: Rows) -> str:
    """Number the classes in a list, by a list of names that is not sorted."""
    names = [*dict.fromkeys(label for _, label in rows)][::-1]
    path = csv_list(root, [(image, str(names.index(label))) for image, label in rows])
    (root / "classes.txt").write_text("\n".join(names), encoding="utf-8")
    return path


def parquet(root: Path, rows: Rows, convert: Callable[[list[str]], "pa.Array"]) -> str:
    root.mkdir(parents=True)
    table = pa.table({"image": [image for image, _ in rows], "label": convert([label for _, label in rows])})
    pq.write_table(table, root / "a.parquet")
    return str(root / "a.parquet")


def strings(root: Path, rows: Rows) -> str:
    return parquet(root, rows, pa.array)


def categories(root: Path, rows: Rows) -> str:
    return parquet(root, rows, lambda labels: pa.array(labels).dictionary_encode())


def integers(root: Path, rows: Rows) -> str:
    return parquet(root, rows, lambda labels: pa.array([int(label) for label in labels]))


def floats(root: Path, rows: Rows) -> str:
    return parquet(root, rows, lambda labels: pa.array([float(label) for label in labels]))


WAYS = (folders, csv_list, csv_of_pandas, json_lines, cls, metadata, classes_txt, csv_with_classes, strings, categories)
WAYS_OF_NUMBERS = (*WAYS, integers, floats)


def classes_of(train: str, val: str) -> list[dict[int, int]]:
    """Return the class of every image of two sources as the scorers see it, by the red value of the image."""
    found = []
    for images in labelled_pair(train, val):
        assert images.catalog.labels is not None
        reds = [images.source.open(row).getpixel((0, 0))[0] for row in images.catalog.rows.tolist()]  # type: ignore[index]
        found.append(dict(zip(reds, images.catalog.labels.tolist(), strict=True)))
    return found


@pytest.mark.parametrize(("labels", "ways"), [(NUMBERS, WAYS_OF_NUMBERS), (NAMES, WAYS)], ids=["numbers", "names"])
def test_however_a_set_is_written_its_images_have_the_same_classes(
    tmp_path: Path, labels: list[str], ways: tuple[Callable[[Path, Rows], str], ...]
) -> None:
    rows = rows_of([*labels, *labels])
    specs = [way(tmp_path / way.__name__, rows) for way in ways]
    for train, val in itertools.product(specs, specs):
        of_train, of_val = classes_of(train, val)
        assert len(of_train) == 24
        assert of_train == of_val, (train, val)
        assert len({*of_train.values()}) == 12
        assert all(of_train[red] == of_train[red + 12] for red in range(12))


@pytest.mark.parametrize(
    ("train", "val", "rule"),
    [(folders, csv_list, "number"), (csv_list, integers, "number"), (folders, folders, "number")],
)
def test_one_line_says_how_classes_were_matched(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, train: Callable[..., str], val: Callable[..., str], rule: str
) -> None:
    caplog.set_level(logging.INFO)
    labelled_pair(train(tmp_path / "a", rows_of(NUMBERS)), val(tmp_path / "b", rows_of(NUMBERS)))
    assert f"Classes: 12, matched by {rule}." in caplog.messages
    labelled_pair(cls(tmp_path / "c", rows_of(NAMES)), folders(tmp_path / "d", rows_of(NAMES[:3])))
    assert "Classes: 12, matched by name." in caplog.messages


@pytest.mark.parametrize("way", WAYS)
def test_numbers_are_not_matched_with_names(tmp_path: Path, way: Callable[[Path, Rows], str]) -> None:
    named, numbered = way(tmp_path / "a", rows_of(NAMES)), csv_list(tmp_path / "b", rows_of(NUMBERS))
    for pair in ((named, numbered), (numbered, named)):
        with pytest.raises(RequestError) as error:
            labelled_pair(*pair)
        assert str(error.value).startswith(f"{numbered} has class numbers (0, 1, 2, ...) and {named} has class names (")
        assert "Use names in both" in str(error.value)


@pytest.mark.parametrize("none", ["-1", "", "nan", "NaN", "null", "-1.0", "-7"])
@pytest.mark.parametrize("way", [csv_list, json_lines, cls, metadata, strings])
def test_no_label_is_no_label_in_every_kind_of_source(
    tmp_path: Path, way: Callable[[Path, Rows], str], none: str
) -> None:
    for name, labels in (("numbers", ["0", none, "1", "2"]), ("names", ["ant", none, "bee", "fox"])):
        source = open_source(way(tmp_path / name, rows_of(labels)))
        assert source.labels is not None
        assert source.labels.tolist() == [0, -1, 1, 2]
        assert source.classes == (None if name == "numbers" else ["ant", "bee", "fox"])


def test_no_label_in_columns_of_numbers_and_in_the_names_of_folders(tmp_path: Path) -> None:
    image = [png(0)] * 3
    for number, labels in enumerate(([1, -1, 0], [1.0, float("nan"), 0.0], [1, None, 0])):
        path = tmp_path / f"{number}.parquet"
        pq.write_table(pa.table({"image": image, "label": labels}), path)
        source = open_source(str(path))
        assert (source.labels, source.classes) == (pytest.approx([1, -1, 0]), None)
    source = open_source(folders(tmp_path / "folders", rows_of(["-1", "dog", "cat"])))
    assert source.labels is not None
    assert (source.labels.tolist(), source.classes) == ([-1, 0, 1], ["cat", "dog"])


def write_classes(root: Path, names: list[str], labels: list[str]) -> str:
    path = cls(root, rows_of(labels))
    (root / "classes.txt").write_text("\n".join(names))
    return path


def test_a_name_that_a_list_has_twice(tmp_path: Path) -> None:
    """ImageNet's public lists have crane, maillot, missile and sunglasses twice."""
    twice = ["crane", "fox", "crane"]
    train, val = (write_classes(tmp_path / name, twice, ["2", "1", "0"]) for name in "ab")
    assert classes_of(train, val) == [{0: 2, 1: 1, 2: 0}] * 2
    other = write_classes(tmp_path / "c", ["fox", "crane"], ["0", "1"])
    for pair in ((train, other), (other, train)):
        with pytest.raises(RequestError, match="has more than one class 'crane'"):
            labelled_pair(*pair)
    # Where nobody asks about them, they do no harm.
    assert classes_of(train, write_classes(tmp_path / "d", ["fox"], ["0"]))[1] == {0: 1}
    with pytest.raises(SourceError, match=r"has the label 'crane', but classes\.txt contains that name more than once"):
        _ = open_source(write_classes(tmp_path / "e", twice, ["crane", "fox"])).listing


def test_a_mixture_of_numbers_and_of_folders_that_are_named_after_numbers(tmp_path: Path) -> None:
    specs = [way(tmp_path / way.__name__, rows_of(NUMBERS)) for way in (folders, csv_list, floats)]
    mixture = " + ".join(specs)
    assert {*classes_of(specs[1], mixture)[1].items()} == {(number, number) for number in range(12)}
    names = folders(tmp_path / "names", rows_of(NAMES))
    source = open_source(f"{names} + {specs[1]}")
    assert source.labels is None
    assert [*source.listing.notes] == [
        f"{source.name} has no labels: some of its sources have class names, and others have class numbers."
    ]
