"""What each kind of input gives: docs/inputs.md is the table, and these tests say whether it is true.

`IJEPA_WRITE_TABLE=1 pytest tests/data/test_inputs.py` rewrites the table. Review the diff.
"""

import io
import logging
import os
import re
import tarfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pillow_heif
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from ijepa_enhanced.data.catalog import open_catalog, report_unreadable
from ijepa_enhanced.data.sources.open import open_source
from ijepa_enhanced.errors import UserError
from ijepa_enhanced.evaluate.labelled import labelled_pair
from source_files import png, write

TABLE = Path(__file__).parents[2] / "docs" / "inputs.md"

HEAD = """# Inputs

This page lists typical folders, archives, lists and tables, and what `ijepa` prints for each. The tests check every row
(`tests/data/test_inputs.py`). The rules are in [data.md](data.md). `tests/data/test_zoo.py` does the same for image
file formats. ROOT is the input folder.
"""

Files = dict[str, bytes]
IMAGE = png()


def files(*names: str, **others: bytes) -> Files:
    return dict.fromkeys(names, IMAGE) | others


def tar(*images: str, **members: bytes) -> bytes:
    """A shard of some images, and of other members, whose dot is written as two underscores."""
    buffer = io.BytesIO()
    others = ((name.replace("__", "."), data) for name, data in members.items())
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name, data in (*((image, IMAGE) for image in images), *others):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def npy() -> bytes:
    """A file of `numpy.save`: 4 x 6 px of six channels."""
    buffer = io.BytesIO()
    np.save(buffer, np.zeros((4, 6, 6), np.uint16))
    return buffer.getvalue()


def heic() -> bytes:
    buffer = io.BytesIO()
    pillow_heif.from_pillow(Image.new("RGB", (64, 64))).save(buffer)
    return buffer.getvalue()


def rows(*labels: object) -> bytes:
    """A CSV of a.png, b.png, ... with these labels."""
    lines = [f"{'abcdefghijklmnop'[number]}.png,{label}" for number, label in enumerate(labels)]
    return "\n".join(["path,label", *lines]).encode()


def letters(count: int) -> list[str]:
    return [f"{letter}.png" for letter in "abcdefghijklmnop"[:count]]


def table(**columns: list[object]) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table(columns), sink)
    return sink.getvalue().to_pybytes()


ONE_SOURCE: dict[str, tuple[str, Files]] = {
    "folders of classes": ("ROOT", files("cat/a.png", "dog/b.png")),
    "images without folders": ("ROOT", files("a.png", "b.png")),
    "images beside folders of images": ("ROOT", files("cat/a.png", "dog/b.png", "c.png")),
    "a class without images": ("ROOT", files("cat/a.png", "dog/b.png") | {"fox/notes.txt": b""}),
    "a folder named -1 (images without a label)": ("ROOT", files("cat/a.png", "-1/b.png")),
    "`train` and `val`": ("ROOT", files("train/cat/a.png", "val/cat/b.png")),
    "`train` and `val` beside a stray CSV (Imagenette's archive)": (
        "ROOT",
        files("train/cat/a.png", "val/cat/b.png") | {"noisy_imagenette.csv": b""},
    ),
    "`train` and `val` beside `__MACOSX` (a zip file of macOS)": (
        "ROOT",
        files("train/cat/a.png", "val/cat/b.png", "__MACOSX/train/._a.png"),
    ),
    "`train`, `valid` and `test` (Roboflow)": ("ROOT", files("train/a.png", "valid/b.png", "test/c.png")),
    "`train2017` and `val2017` (COCO)": ("ROOT", files("train2017/a.png", "val2017/b.png")),
    "`train` beside a folder of a class": ("ROOT", files("train/a.png", "truck/b.png")),
    "`val` and `test` without `train`": ("ROOT", files("val/a.png", "test/b.png")),
    "`train` and `Training`": ("ROOT", files("train/a.png", "Training/b.png")),
    "a class `trains`": ("ROOT", files("boats/a.png", "trains/b.png")),
    "splits one folder down (an archive in its own folder)": (
        "ROOT",
        files("pets/train/cat/a.png", "pets/val/cat/b.png"),
    ),
    "splits in each class (MVTec AD)": ("ROOT", files("bottle/train/a.png", "bottle/test/b.png", "cable/train/c.png")),
    "a folder below a class named `train`": ("ROOT", files("vehicle/train/a.png", "vehicle/car/b.png")),
    "folders of classes beside a shard": ("ROOT", files("cat/a.png", "dog/b.png") | {"old.tar": tar("c.png")}),
    "shards `boats`, `planes`, `trains`": (
        "ROOT",
        {f"{name}.tar": tar(f"{name}.png") for name in ("boats", "planes", "trains")},
    ),
    "shards `train-0`, `val-0`": ("ROOT", {f"{name}-0.tar": tar(f"{name}.png") for name in ("train", "val")}),
    "shards `train-0`, `extra`": ("ROOT", {f"{name}.tar": tar(f"{name}.png") for name in ("train-0", "extra")}),
    "shards in `train` and `val`": ("ROOT", {f"{name}/0.tar": tar(f"{name}.png") for name in ("train", "val")}),
    "shards beside `._x.tar` (macOS)": ("ROOT", {"x.tar": tar("a.png"), "._x.tar": b"macOS"}),
    "shards beside images": ("ROOT", {"x.tar": tar("a.png"), "b.png": IMAGE}),
    "`photos[1].tar` beside `photos1.tar`": (
        "ROOT/photos[1].tar",
        {"photos[1].tar": tar("right.png"), "photos1.tar": tar("a.png", "wrong.png")},
    ),
    "a folder `[ab]` beside a folder `a`": (
        "ROOT/[ab]/x.parquet",
        {"[ab]/x.parquet": table(image=[IMAGE]), "a/x.parquet": table(image=[IMAGE, IMAGE])},
    ),
    "`list{v2}.csv` beside `listv2.csv`": (
        "ROOT/list{v2}.csv",
        files("a.png", "b.png") | {"list{v2}.csv": rows(0), "listv2.csv": rows(0, 1)},
    ),
    "a pattern with a missing shard": ("ROOT/t-{0..2}.tar", {"t-0.tar": tar("a.png"), "t-2.tar": tar("b.png")}),
    "endings in capitals, `.jfif`, `.jpe`, `.apng`, `.dib`, `.jp2`": (
        "ROOT",
        files("A.PNG", "b.jfif", "c.jpe", "d.apng", "e.dib", "f.jp2"),
    ),
    "thumbnails of a NAS, `.ipynb_checkpoints`, `._*`, `Thumbs.db`": (
        "ROOT",
        files("cat/a.png", "cat/@eaDir/a.png", "cat/.ipynb_checkpoints/a.png", "cat/._a.png") | {"cat/Thumbs.db": b""},
    ),
    "a folder of other files": ("ROOT", {"report.pdf": b"", "notes.txt": b""}),
    "an empty folder": ("ROOT", {".keep": b""}),
    "an empty image file, and text with an image's name": (
        "ROOT",
        files("a.png") | {"b.png": b"", "c.jpg": b"words"},
    ),
    "a HEIC photo of a phone, with the extra `heic`": ("ROOT", files("a.png") | {"b.heic": heic()}),
    "raw photographs of a camera": ("ROOT", files("a.jpg", "a.NEF", "b.jpg", "b.NEF")),
    "NumPy arrays": ("ROOT", {"a.npy": npy(), "b.npy": npy()}),
    "NumPy arrays beside images": ("ROOT", files("a.png", "b.png") | {"a.npy": npy(), "b.npy": npy()}),
    "NumPy arrays in a shard": ("ROOT/x.tar", {"x.tar": tar(a__npy=npy(), a__cls=b"cat")}),
    "a shard with `.cls`": ("ROOT/x.tar", {"x.tar": tar("a.png", a__cls=b"3")}),
    "a shard with `.json`": ("ROOT/x.tar", {"x.tar": tar("a.png", a__json=b'{"label": "cat"}')}),
    "a shard whose `.cls` names are in `classes.txt` with a byte order mark": (
        "ROOT/x.tar",
        {"x.tar": tar("a.png", a__cls=b"cat"), "classes.txt": "\ufeffcat\ndog\n".encode()},
    ),
    "a label that `classes.txt` lacks": (
        "ROOT/x.tar",
        {"x.tar": tar("a.png", a__cls=b"fox"), "classes.txt": b"cat\ndog\n"},
    ),
    "a shard cut in the middle": ("ROOT/x.tar", {"x.tar": tar("a.png", "b.png")[:1700]}),
    "two shards appended to one another": ("ROOT/x.tar", {"x.tar": tar("a.png") + tar("b.png")}),
    "bytes after the end of a shard": ("ROOT/x.tar", {"x.tar": tar("a.png") + b"some words"}),
    "an empty shard among others": ("ROOT", {"x.tar": tar("a.png"), "y.tar": bytes(10240)}),
    "a shard of 0 bytes among others": ("ROOT", {"x.tar": tar("a.png"), "y.tar": b""}),
    "a compressed shard": ("ROOT/x.tar", {"x.tar": b"\x1f\x8b\x08\0" + bytes(600)}),
    "`a.seg.png` in a shard": ("ROOT/x.tar", {"x.tar": tar("a.png", "a.seg.png")}),
    "two members of one name": ("ROOT/x.tar", {"x.tar": tar("a.png", "a.png")}),
    "a CSV with -1, an empty label and `nan` (all three mean: no label)": (
        "ROOT/list.csv",
        files(*letters(5)) | {"list.csv": rows(0, -1, "", "nan", 1)},
    ),
    "a CSV with `classes.txt`": (
        "ROOT/list.csv",
        files(*letters(2)) | {"list.csv": rows(1, 0), "classes.txt": b"dog\ncat\n"},
    ),
    "a CSV without the column `path`": ("ROOT/list.csv", {"list.csv": b"file,label\na.png,1"}),
    "a CSV that names a missing image": ("ROOT/list.csv", files("a.png") | {"list.csv": rows(0, 1)}),
    "JSONL with a line that is not JSON": ("ROOT/list.jsonl", {"list.jsonl": b'{"path": "a.png"}\nwords'}),
    "Parquet with whole numbers": ("ROOT/x.parquet", {"x.parquet": table(image=[IMAGE] * 3, label=[2, 0, 2])}),
    "Parquet with float labels, one of them missing": (
        "ROOT/x.parquet",
        {"x.parquet": table(image=[IMAGE] * 3, label=[2.0, None, 0.0])},
    ),
    "Parquet with booleans": ("ROOT/x.parquet", {"x.parquet": table(image=[IMAGE] * 2, label=[True, False])}),
    "Parquet with a column `target`": ("ROOT/x.parquet", {"x.parquet": table(image=[IMAGE] * 2, target=[1, 0])}),
    "the same, with `#label=target`": (
        "ROOT/x.parquet#label=target",
        {"x.parquet": table(image=[IMAGE] * 2, target=[1, 0])},
    ),
    "Parquet whose images are structs without bytes": (
        "ROOT/x.parquet",
        {"x.parquet": table(image=[{"bytes": 7}], label=[1])},
    ),
    "Parquet without images": ("ROOT/x.parquet", {"x.parquet": table(text=["words"])}),
    "a source that does not exist": ("ROOT/nothing", {}),
    "an image": ("ROOT/a.png", files("a.png")),
    "the folder of a run": ("ROOT", files("masks.png") | {"config.yaml": b"", "log.jsonl": b""}),
    "class names with a line break and in composed and decomposed Unicode": (
        "ROOT",
        files("a\nb/a.png", "\u00e9/b.png", "e\u0301/c.png"),
    ),
}

PAIRS: dict[str, tuple[tuple[str, Files], tuple[str, Files]]] = {
    "a CSV of 0 to 11 and folders `0` to `11`": (
        ("ROOT/list.csv", files(*letters(12)) | {"list.csv": rows(*range(12))}),
        ("ROOT", files(*(f"{number}/{name}" for number, name in enumerate(letters(12))))),
    ),
    "a CSV of 0 to 11 and one of 0.0 to 11.0 with a missing label": (
        ("ROOT/list.csv", files(*letters(12)) | {"list.csv": rows(*range(12))}),
        ("ROOT/list.csv", files(*letters(13)) | {"list.csv": rows(*(float(n) for n in range(12)), "")}),
    ),
    "a CSV of numbers and folders of names": (
        ("ROOT/list.csv", files(*letters(2)) | {"list.csv": rows(0, 1)}),
        ("ROOT", files("cat/a.png", "dog/b.png")),
    ),
    "two lists of the same classes in different orders": (
        ("ROOT/list.csv", files(*letters(2)) | {"list.csv": rows(0, 1), "classes.txt": b"dog\ncat"}),
        ("ROOT/list.csv", files(*letters(2)) | {"list.csv": rows(1, 0), "classes.txt": b"cat\ndog"}),
    ),
    "equal lists of classes that have one name twice (ImageNet's crane)": (
        ("ROOT/list.csv", files(*letters(3)) | {"list.csv": rows(0, 1, 2), "classes.txt": b"crane\nfox\ncrane"}),
        ("ROOT/list.csv", files(*letters(3)) | {"list.csv": rows(0, 1, 2), "classes.txt": b"crane\nfox\ncrane"}),
    ),
    "different lists of classes that have one name twice": (
        ("ROOT/list.csv", files(*letters(3)) | {"list.csv": rows(0, 1, 2), "classes.txt": b"crane\nfox\ncrane"}),
        ("ROOT/list.csv", files(*letters(2)) | {"list.csv": rows(0, 1), "classes.txt": b"fox\ncrane"}),
    ),
    "a class name in composed and in decomposed Unicode": (
        ("ROOT", files("\u00e9/a.png", "fox/b.png")),
        ("ROOT", files("e\u0301/a.png", "fox/b.png")),
    ),
    "a class that training lacks": (
        ("ROOT", files("cat/a.png", "dog/b.png")),
        ("ROOT", files("cat/a.png", "fox/b.png")),
    ),
    "images without labels": (("ROOT", files("cat/a.png", "dog/b.png")), ("ROOT", files("a.png", "b.png"))),
    "a list without labels": (
        ("ROOT", files("cat/a.png", "dog/b.png")),
        ("ROOT/list.csv", files("a.png") | {"list.csv": b"path,category\na.png,cat"}),
    ),
    "a table without labels": (
        ("ROOT", files("cat/a.png", "dog/b.png")),
        ("ROOT/x.parquet", {"x.parquet": table(image=[IMAGE], target=[1])}),
    ),
}


def said(lines: list[str], root: Path) -> str:
    """The lines of a cell of the table: paths as ROOT, and no sign that Markdown reads."""
    text = "<br>".join(line.replace(str(root), "ROOT").replace("\n", "\\n") for line in lines)
    return re.sub(r"([|*_])", r"\\\1", text)


def one(root: Path, caplog: pytest.LogCaptureFixture, spec: str) -> str:
    """What `ijepa scan` and `ijepa train` say of a source, or why they refuse it."""
    caplog.clear()
    try:
        report_unreadable(open_catalog(open_source(spec.replace("ROOT", str(root))), cache=False))
    except UserError as error:
        return said([f"error: {error}"], root)
    return said([message for message in caplog.messages if not message.startswith("Scanning")], root)


def two(root: Path, caplog: pytest.LogCaptureFixture, specs: list[str]) -> str:
    """How the classes of two sources are matched, and whether images of one name have one class, or why not."""
    caplog.clear()
    try:
        pair = labelled_pair(*specs)
    except UserError as error:
        return said([f"error: {error}"], root)
    found = []
    for images in pair:
        labels = images.catalog.labels
        assert labels is not None
        found.append({Path(images.catalog.key(place)).name: int(label) for place, label in enumerate(labels)})
    same = sum(found[0].get(name) == label for name, label in found[1].items())
    lines = [message for message in caplog.messages if message.startswith("Classes")]
    counts = f"{same} of {len(found[1])}"
    agree = f"{counts} validation images have the same class as the training image with the same file name."
    return said([*lines, agree], root)


@pytest.fixture(scope="module")
def written() -> dict[str, str]:
    """The right cell of each row of docs/inputs.md by its left cell."""
    rows = re.findall(r"^\| (.*?) \| (.*) \|$", TABLE.read_text() if TABLE.exists() else "", re.MULTILINE)
    return dict(rows)


@pytest.fixture(scope="module", autouse=True)
def table_of_results() -> Iterator[dict[str, str]]:
    """What was found; written to docs/inputs.md at the end if that is asked for."""
    found: dict[str, str] = {}
    yield found
    if os.environ.get("IJEPA_WRITE_TABLE"):
        parts = [HEAD]
        for title, names in (("One source", ONE_SOURCE), ("Training and validation", PAIRS)):
            parts += [f"\n## {title}\n", "| Input | Result |", "| --- | --- |"]
            parts += [f"| {name} | {found[name]} |" for name in names]
        TABLE.write_text("\n".join([parts[0].rstrip(), *parts[1:], ""]))


@pytest.mark.parametrize("name", [*ONE_SOURCE, *PAIRS])
def test_what_an_input_gives_is_what_the_table_says(
    name: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    written: dict[str, str],
    table_of_results: dict[str, str],
) -> None:
    monkeypatch.chdir(tmp_path)
    caplog.set_level(logging.INFO)
    if name in ONE_SOURCE:
        spec, contents = ONE_SOURCE[name]
        root = tmp_path / "root"
        root.mkdir()
        write(root, **contents)
        result = one(root, caplog, spec)
    else:
        specs = []
        for place, (spec, pair) in zip(("train", "val"), PAIRS[name], strict=True):
            write(tmp_path / place, **pair)
            specs.append(spec.replace("ROOT", str(tmp_path / place)))
        result = two(tmp_path, caplog, specs)
    table_of_results[name] = result
    if not os.environ.get("IJEPA_WRITE_TABLE"):
        assert result == written.get(name)


def test_the_table_has_no_other_rows(written: dict[str, str]) -> None:
    assert {*written} - {"Input", "---"} == {*ONE_SOURCE, *PAIRS}
    assert len(ONE_SOURCE) + len(PAIRS) >= 60
