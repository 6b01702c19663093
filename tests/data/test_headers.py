"""Scans of headers: what is kept of one that was stopped, and how it goes on."""

import io
import threading
from pathlib import Path

import pytest
from PIL import Image

from ijepa_enhanced.data import headers
from ijepa_enhanced.data.catalog import Catalog, open_catalog
from ijepa_enhanced.data.sources.folder import FolderSource
from ijepa_enhanced.errors import UnreadableImage

COUNT = 50


def png(height: int, width: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("L", (width, height)).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("IJEPA_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Images that are one pixel higher each; every seventh is damaged."""
    folder = tmp_path / "images"
    folder.mkdir()
    for number in range(COUNT):
        (folder / f"{number:02d}.png").write_bytes(png(number + 1, 9) if number % 7 else b"words")
    return folder


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(headers, "CHUNK", 2)
    monkeypatch.setattr(headers, "BLOCK", 10)


class StoppedSource(FolderSource):
    """Ctrl-C comes as it reads the header of row `stop`; it notes all rows that it reads."""

    def __init__(self, folder: Path, stop: int | None = None) -> None:
        super().__init__(folder)
        self.stop = stop
        self.seen: list[int] = []

    def size(self, row: int) -> tuple[int, int]:
        if row == self.stop:
            raise KeyboardInterrupt
        self.seen.append(row)
        return super().size(row)


def stopped(folder: Path, stop: int) -> None:
    with pytest.raises(KeyboardInterrupt):
        open_catalog(StoppedSource(folder, stop))


def resumed(folder: Path) -> tuple[Catalog, list[int]]:
    source = StoppedSource(folder)
    return open_catalog(source), sorted(source.seen)


def test_a_scan_that_was_stopped_goes_on_and_gives_the_same(folder: Path, cache: Path) -> None:
    whole = open_catalog(FolderSource(folder), cache=False)
    stopped(folder, 37)
    stopped(folder, 45)
    catalog, seen = resumed(folder)
    assert seen == list(range(40, COUNT)), "blocks that were done are not read again"
    assert catalog.hash == whole.hash
    assert [*catalog.unreadable] == [*whole.unreadable]
    assert [path.suffix for path in cache.iterdir() if path.name[0] != "."] == [".arrow"], "the parts are gone"


def test_what_a_killed_scan_had_kept_is_used(folder: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It saves a part from time to time, here after every block, and nothing when it is killed."""
    monkeypatch.setattr(headers, "PATIENCE", -1.0)
    keep, parts = headers.Unfinished.keep, []

    def killed(self: headers.Unfinished, source: FolderSource, part: headers.Sizes, start: int) -> None:
        parts.append(start)
        if len(parts) > 2:
            raise KeyboardInterrupt
        keep(self, source, part, start)

    with monkeypatch.context() as patch:
        patch.setattr(headers.Unfinished, "keep", killed)
        with pytest.raises(KeyboardInterrupt):
            open_catalog(FolderSource(folder))
    assert resumed(folder)[1] == list(range(20, COUNT))


def test_parts_of_images_that_changed_are_not_used(folder: Path, cache: Path) -> None:
    stopped(folder, 25)
    (folder / "03.png").write_bytes(png(99, 9))
    catalog, seen = resumed(folder)
    assert seen == list(range(COUNT))
    assert 99 in catalog.heights


def test_parts_after_one_that_is_damaged_are_not_used(
    folder: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = open_catalog(FolderSource(folder), cache=False)
    monkeypatch.setattr(headers, "PATIENCE", -1.0)
    stopped(folder, 35)
    (partial,) = cache.glob("*.partial")
    assert len([*partial.glob("sizes-*")]) == 3
    (partial / "sizes-000000000010.arrow").write_bytes(b"words")
    catalog, seen = resumed(folder)
    assert seen == list(range(10, COUNT))
    assert catalog.hash == whole.hash


def test_a_scan_that_cannot_keep_anything_still_scans(
    folder: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    cache.write_text("a file where the folder should be")
    monkeypatch.setattr(headers, "PATIENCE", -1.0)
    whole = open_catalog(FolderSource(folder), cache=False)
    caplog.clear()
    assert open_catalog(FolderSource(folder)).hash == whole.hash
    warnings = [record for record in caplog.records if record.levelname == "WARNING"]
    assert len(warnings) == 1, "one warning, however many parts"


def test_a_long_scan_says_how_far_it_is(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    monkeypatch.setattr(headers, "PATIENCE", -1.0)
    open_catalog(FolderSource(folder), cache=False)
    assert caplog.messages == [f"Scanning {folder}: {count} of {COUNT} images" for count in range(10, COUNT + 1, 10)]


def test_headers_are_read_by_many_threads(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each waits until three are at work, as on a disk that answers slowly."""
    monkeypatch.setattr(headers, "BLOCK", COUNT)
    working = threading.Barrier(3, timeout=30)
    waited: set[int] = set()

    class Slow(FolderSource):
        def size(self, row: int) -> tuple[int, int]:
            if len(waited) < 3 and threading.get_ident() not in waited:
                waited.add(threading.get_ident())
                working.wait()
            return super().size(row)

    open_catalog(Slow(folder), cache=False)
    assert len(waited) >= 3


def test_errors_other_than_those_of_images_are_raised(folder: Path, cache: Path) -> None:
    class Broken(FolderSource):
        def size(self, row: int) -> tuple[int, int]:
            raise ZeroDivisionError if row == 5 else UnreadableImage("so")

    with pytest.raises(ZeroDivisionError):
        open_catalog(Broken(folder))
