"""What counts as an image, by its name, in every kind of source."""

import io
import tarfile
from pathlib import Path

import pytest
from PIL import Image

from ijepa_enhanced.data.catalog import open_catalog, taken
from ijepa_enhanced.data.sources.open import open_source

FORMATS = {
    ".jpg": "JPEG",
    ".jpeg": "JPEG",
    ".jpe": "JPEG",
    ".jfif": "JPEG",
    ".png": "PNG",
    ".apng": "PNG",
    ".webp": "WEBP",
    ".gif": "GIF",
    ".bmp": "BMP",
    ".dib": "BMP",
    ".tif": "TIFF",
    ".tiff": "TIFF",
    ".avif": "AVIF",
    ".jp2": "JPEG2000",
    ".j2k": "JPEG2000",
}
IMAGES = {
    f"cat/{number:02d}{extension}": format_name
    for number, extension in enumerate([*FORMATS, *map(str.upper, FORMATS)])
    for format_name in [FORMATS[extension.lower()]]
}
NOT_IMAGES = {
    "cat/._00.jpg": "a file that macOS adds",
    "cat/.hidden.png": "a hidden file",
    "cat/@eaDir/00.jpg/SYNOPHOTO_THUMB_M.jpg": "a thumbnail of a storage device",
    "cat/.ipynb_checkpoints/00-checkpoint.jpg": "a copy that Jupyter makes",
    "__MACOSX/cat/00.jpg": "of a zip file of macOS",
    "cat/Thumbs.db": "thumbnails of Windows",
    "cat/notes.txt": "no image",
    "cat/scan.dcm": "a format that is not read",
}


def image(format_name: str) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (16, 12), "red").save(buffer, format_name)
    return buffer.getvalue()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("photos")
    for name in (*IMAGES, *NOT_IMAGES):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(image(IMAGES.get(name, "JPEG")))
    return root


def test_images_in_folders(folder: Path) -> None:
    source = open_source(str(folder))
    assert [*source.listing.keys] == sorted(IMAGES)
    assert source.classes == ["cat"]
    catalog = open_catalog(source, cache=False)
    assert [*catalog.unreadable] == []
    assert {*catalog.heights.tolist()} == {12}
    assert taken(source).endswith("30 images, 1 class; ignored: 6 hidden files or folders, 1 .dcm, 1 .txt")


def test_images_in_shards(folder: Path, tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        for name in (*IMAGES, *NOT_IMAGES):
            tar.add(folder / name, name)
    for name in ("._x.tar", ".DS_Store", "Thumbs.db"):  # beside the shard
        (tmp_path / name).write_bytes(b"\0\5\26\7")
    (tmp_path / "@eaDir" / "x.tar").mkdir(parents=True)
    (tmp_path / "@eaDir" / "x.tar" / "thumb.jpg").write_bytes(image("JPEG"))
    source = open_source(str(tmp_path))
    assert sorted(source.listing.keys) == sorted(f"x.tar:{name}" for name in IMAGES)
    assert [*open_catalog(source, cache=False).unreadable] == []
    assert source.listing.notes == ()
    assert taken(source).endswith("30 images, no labels; ignored: 10 hidden files or folders, 1 .dcm, 1 .txt")
