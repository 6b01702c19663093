"""Files are whole or not there."""

import errno
import os
from pathlib import Path

import pytest

from ijepa_enhanced.files import replacing


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def write_half(path: Path, failure: BaseException) -> None:
    with replacing(path) as temporary:
        temporary.write_text("half")
        raise failure


def test_the_file_appears_whole_and_nothing_else_stays(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    with replacing(path) as temporary:
        temporary.write_text("half")
        assert not path.exists(), "nobody sees it before the end"
        temporary.write_text("whole")
    assert path.read_text() == "whole"
    assert names(tmp_path) == ["config.json"]


def test_others_may_read_what_a_library_wrote_for_its_owner_alone(tmp_path: Path) -> None:
    plain, path = tmp_path / "plain", tmp_path / "model.safetensors"
    plain.touch()
    with replacing(path) as temporary:
        temporary.touch(mode=0o600)
    assert path.stat().st_mode == plain.stat().st_mode


def test_it_is_written_beside_the_file_so_that_renaming_cannot_cross_file_systems(tmp_path: Path) -> None:
    with replacing(tmp_path / "a.csv") as temporary:
        temporary.write_text("")
        assert temporary.parent == tmp_path
        assert temporary.name.startswith("."), "no glob of results takes it for one"


def test_two_that_write_one_file_at_once_do_not_share_a_temporary_path(tmp_path: Path) -> None:
    """Processes in two containers that share a folder can have one number."""
    path = tmp_path / "log"
    with replacing(path) as first:
        first.write_text("first")
        with replacing(path) as second:
            assert second != first
            second.write_text("second")
        assert path.read_text() == "second"
    assert path.read_text() == "first"
    assert names(tmp_path) == ["log"]


@pytest.mark.parametrize("mask", [0o022, 0o077, 0o002])
def test_the_file_has_the_mode_of_new_files(tmp_path: Path, mask: int) -> None:
    before = os.umask(mask)
    try:
        with replacing(tmp_path / "log") as temporary:
            temporary.write_text("")
    finally:
        os.umask(before)
    assert (tmp_path / "log").stat().st_mode & 0o777 == 0o666 & ~mask


def test_an_older_file_stays_until_the_new_one_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "log"
    path.write_text("old")
    with replacing(path) as temporary:
        temporary.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new"


@pytest.mark.parametrize("failure", [ValueError, KeyboardInterrupt])
def test_an_error_leaves_the_older_file_and_no_rest(tmp_path: Path, failure: type[BaseException]) -> None:
    path = tmp_path / "log"
    path.write_text("old")
    with pytest.raises(failure, match=r"^stop$"):
        write_half(path, failure("stop"))
    assert path.read_text() == "old"
    assert names(tmp_path) == ["log"]


def test_an_error_before_anything_is_written_is_the_one_that_is_seen(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), replacing(tmp_path / "log"):
        raise ZeroDivisionError
    assert names(tmp_path) == []


@pytest.mark.parametrize("unable", [None, errno.EINVAL])
def test_file_and_folder_are_on_disk_at_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, unable: int | None
) -> None:
    """The file before it has its name, and the folder after that."""
    flushed = []

    def fsync(descriptor: int) -> None:
        flushed.append((os.fstat(descriptor).st_ino, (tmp_path / "log").exists()))
        if unable:
            raise OSError(unable, "Invalid argument")

    monkeypatch.setattr(os, "fsync", fsync)
    with replacing(tmp_path / "log") as temporary:
        temporary.write_text("whole")
    assert flushed == [((tmp_path / "log").stat().st_ino, False), (tmp_path.stat().st_ino, True)]


def test_a_disk_that_fails_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fsync(_: int) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(OSError, match="Input/output error"), replacing(tmp_path / "log") as temporary:
        temporary.write_text("whole")
    assert names(tmp_path) == []


def test_writing_nothing_is_an_error_and_not_an_empty_file(tmp_path: Path) -> None:
    path = tmp_path / "log"
    path.write_text("old")
    with pytest.raises(FileNotFoundError), replacing(path):
        pass
    assert path.read_text() == "old"
