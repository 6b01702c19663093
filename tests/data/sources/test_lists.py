"""Lists of images in CSV and JSONL."""

import os

import pytest
from PIL import Image

from ijepa_enhanced.data.catalog import open_catalog
from ijepa_enhanced.data.sources.open import open_source
from ijepa_enhanced.errors import SourceError


def keys(source):
    return [*source.listing.keys]


def names(index):
    return [index.key(position) for position in range(len(index.rows))]


@pytest.fixture
def folder(tmp_path):
    """Three images of 1, 2 and 3 pixels in height, in two folders, and one elsewhere of 4 pixels."""
    for height, name in enumerate(["photos/a/1.png", "photos/a/2.png", "photos/3.png", "elsewhere.png"], start=1):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (6, height)).save(path)
    return tmp_path / "photos"


def heights(source):
    return [source.size(row)[0] for row in range(len(source))]


def opened(folder, name, text):
    (folder / name).write_text(text, encoding="utf-8")
    return open_source(str(folder / name))


def test_csv(folder):
    source = opened(
        folder, "list.csv", f"path,label\n3.png,dog\na/1.png,ant\n../elsewhere.png,dog\n{folder}/a/2.png,bee\n"
    )
    assert heights(source) == [3, 1, 4, 2]
    assert keys(source) == ["3.png", "a/1.png", "../elsewhere.png", f"{folder}/a/2.png"]
    assert (source.labels.tolist(), source.classes) == ([2, 0, 2, 1], ["ant", "bee", "dog"])


def test_columns_are_found_by_name_and_text_is_quoted_as_spreadsheets_do(folder):
    (folder / "a, b.png").write_bytes((folder / "3.png").read_bytes())
    source = opened(folder, "list.csv", '\ufefflabel,note,path\r\n1,"x\ny","a, b.png"\r\n0,,a/1.png\r\n')
    assert (heights(source), source.labels.tolist(), source.classes) == ([3, 1], [1, 0], None)


def test_jsonl(folder):
    lines = '{"path": "3.png", "label": 12}\n\n{"label": "7", "path": "a/1.png", "size": [1, 2]}\n'
    source = opened(folder, "list.jsonl", lines)
    assert (heights(source), source.labels.tolist(), source.classes) == ([3, 1], [12, 7], None)


@pytest.mark.parametrize(("name", "text"), [("l.csv", "path\n3.png\na/1.png\n"), ("l.jsonl", '{"path": "3.png"}')])
def test_labels_may_be_left_out(folder, name, text):
    source = opened(folder, name, text)
    assert (source.size(0), source.labels, source.classes) == ((3, 6), None, None)


def test_what_is_missing_is_unreadable(folder):
    source = opened(folder, "list.csv", "path,label\n3.png,dog\nnope.png,dog\na/1.png,\n")
    index = open_catalog(source, cache=False)
    assert names(index) == ["3.png", "a/1.png"]
    assert index.labels.tolist() == [0, -1], "an image without a label is an image"
    assert tuple(index.unreadable) == (("nope.png", "cannot be read: No such file or directory"),)


def test_what_cannot_be_a_path_is_unreadable(folder):
    source = opened(folder, "list.jsonl", '{"path": "a\\u0000.png"}\n{"path": "3.png"}\n')
    assert tuple(open_catalog(source).unreadable) == (("a\0.png", "cannot be read: embedded null byte"),)


def test_a_list_or_an_image_that_changed_is_indexed_anew(folder):
    assert open_catalog(opened(folder, "list.csv", "path,label\n3.png,\na/1.png,0\n")).labels.tolist() == [-1, 0]
    source = opened(folder, "list.csv", "path,label\n3.png,0\na/1.png,0\n")
    assert open_catalog(source).labels.tolist() == [0, 0]
    Image.new("RGB", (6, 9)).save(folder / "3.png")
    os.utime(folder / "3.png", (1, 1))
    assert open_catalog(source).heights.tolist() == [9, 1]


REFUSED = {
    "no column path": (
        "l.csv",
        b"file,label\na/1.png,0\n",
        "Row 1 of {} has no value for 'path'. Its columns are: file, label. Every row needs a path. If the column "
        "has another name, rename it to 'path'.",
    ),
    "no header": (
        "l.csv",
        b"a/1.png,0\n3.png,1\n",
        "Row 1 of {} has no value for 'path'. Its columns are: a/1.png, 0. Every row needs a path. If the column "
        "has another name, rename it to 'path'.",
    ),
    "a line without a path": (
        "l.csv",
        b"label,path\n0,3.png\n1\n",
        "Row 2 of {} has no value for 'path'. Its columns are: label, path. Every row needs a path.",
    ),
    "empty": (
        "l.csv",
        b"",
        "No images in {}. List one image per line. A CSV file must start with the line path,label.",
    ),
    "a header alone": (
        "l.csv",
        b"path,label\n",
        "No images in {}. List one image per line. A CSV file must start with the line path,label.",
    ),
    "not text": ("l.csv", b"path\n\xff\xd8\xff\xe0", "{} is not valid UTF-8."),
    "not JSON": (
        "l.jsonl",
        b'{"path": "3.png"}\n3.png\n',
        "Line 2 of {} is not valid JSON: Extra data at column 2.",
    ),
    "not an object": ("l.jsonl", b'["3.png"]\n', 'Line 1 of {} is not of the form {{"path": ..., "label": ...}}.'),
    "a label beyond int64": (
        "l.csv",
        b"path,label\n3.png,99999999999999999999\n",
        "{} has the label 99999999999999999999, which does not fit in 64 bits.",
    ),
    "an object without a path": (
        "l.jsonl",
        b'{"file": "3.png"}\n',
        "Row 1 of {} has no value for 'path'. Its columns are: file. Every row needs a path. If the column "
        "has another name, rename it to 'path'.",
    ),
}


@pytest.mark.parametrize(("name", "data", "message"), REFUSED.values(), ids=REFUSED)
def test_lists_that_are_refused(folder, name, data, message):
    (folder / name).write_bytes(data)
    with pytest.raises(SourceError) as error:
        _ = open_source(str(folder / name)).listing
    assert str(error.value) == message.format(folder / name)


def test_a_list_that_may_not_be_read(folder, monkeypatch):
    (folder / "l.csv").write_text("path\n3.png\n")
    opens = open

    def refuse(path, *args, **options):
        if str(path).endswith("l.csv"):
            raise PermissionError(13, "Permission denied", str(path))
        return opens(path, *args, **options)

    monkeypatch.setattr("builtins.open", refuse)
    with pytest.raises(SourceError) as error:
        _ = open_source(str(folder / "l.csv")).listing
    assert str(error.value) == f"{folder}/l.csv cannot be read: Permission denied."
