"""`ijepa prepare` as a user meets it."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from ijepa_enhanced.cli import main
from ijepa_enhanced.data.catalog import open_catalog
from ijepa_enhanced.data.prepare import alone
from ijepa_enhanced.data.sources.open import open_source
from ijepa_enhanced.data.sources.tar import TarSource


@pytest.fixture
def place(pictures, tmp_path, monkeypatch):
    """The folder that commands run in: ten good images in `photos`, and what was prepared of them in `done`."""
    shutil.copytree(pictures, tmp_path / "photos")
    monkeypatch.chdir(tmp_path)
    assert main(["prepare", "photos", "done", "--workers", "0"]) == 0
    return tmp_path


def ijepa(capsys, command):
    capsys.readouterr()
    code = main(command.split())
    said = capsys.readouterr()
    return code, said.out.splitlines(), [line for line in said.err.splitlines() if not line.startswith("Images: ")]


def test_counts_and_what_is_skipped(place, capsys):
    Path("photos/dark/0.png").write_bytes(b"")
    path = Path("photos/light/2.png")
    path.write_bytes(path.read_bytes()[:-2000])
    code, out, err = ijepa(capsys, "prepare photos new --max-resolution 32 --workers 1 --json")
    size = Path("new/images-000000.tar").stat().st_size
    assert (code, out[:-1]) == (0, ["images   8", "skipped  2", "shards   1", f"bytes    {size}"])
    assert json.loads(out[-1]) == {"images": 8, "dropped": 2, "shards": 1, "bytes": size}
    assert err == [
        "photos has changed since the last scan. Scanning again.",
        "Skipped dark/0.png: empty file",
        "Skipped light/2.png: cannot be decoded: image file is truncated",
    ]
    code, out, _ = ijepa(capsys, "scan new --json")
    assert json.loads(out[-1])["images"] == 8
    assert json.loads(out[-1])["labels"] == 2


def test_the_catalog_is_there_already(place, monkeypatch):
    monkeypatch.setattr(TarSource, "size", pytest.fail)
    assert len(open_catalog(open_source("done")).rows) == 10


def test_check(place, capsys):
    assert ijepa(capsys, "prepare done --check") == (0, ["done: all checksums match"], [])
    Path("done/images-000000.tar").write_bytes(b"words")
    Path("done/classes.txt").unlink()
    assert ijepa(capsys, "prepare done --check") == (
        1,
        [],
        [
            "ijepa: done has problems:",
            "  images-000000.tar does not match its checksum.",
            "  classes.txt cannot be read: No such file or directory.",
        ],
    )


REFUSED = {
    "prepare photos": "The output folder was not given. Add OUT: ijepa prepare SOURCE OUT.",
    "prepare": "Missing: SOURCE. See `ijepa prepare --help`.",
    "prepare done new --check": "--check takes only the prepared folder. Remove OUT.",
    "prepare photos --check": "photos was not made by `ijepa prepare`: it has no manifest.json.",
    "prepare nope --check": "nope was not made by `ijepa prepare`: it has no manifest.json.",
    "prepare photos photos": (
        "photos is not empty (it contains {}) and was not made by `ijepa prepare`. Use an empty or a new output folder."
    ),
    "prepare photos done --quality 80": (
        "done already contains shards that were prepared with --quality 90, not 80. Use another output folder, or "
        "delete done."
    ),
    "prepare photos new --quality 101": "--quality must be at least 1 and at most 100, not 101.",
    "prepare photos new --max-resolution 0": "--max-resolution must be at least 1, not 0.",
    "prepare photos new --workers -1": "--workers must be at least 0, not -1.",
    "prepare photos new --shard-size 0": "--shard-size must be at least 1, not 0.",
    "prepare photos new --sharts 3": "Unknown option '--sharts'. Did you mean '--shard-size'?",
}


@pytest.mark.parametrize("command", REFUSED)
def test_wrong_requests(place, capsys, command):
    message = REFUSED[command].format(next(Path("photos").iterdir()).name)
    assert ijepa(capsys, command) == (2, [], [f"ijepa: {message}"])
    assert not Path("new").exists()


def test_nothing_that_can_be_decoded(place, capsys):
    for path in Path("photos").rglob("*.*"):
        path.write_bytes(path.read_bytes()[:-900])
    code, out, err = ijepa(capsys, "prepare photos new")
    said = "ijepa: None of the 10 images of photos can be decoded. The lines above say why."
    assert (code, out, err[-1]) == (1, [], said)


def test_remote_images_give_the_same(place, capsys):
    assert ijepa(capsys, f"prepare file://{place}/photos far --workers 0")[0] == 0
    near, far = ({path.name: path.read_bytes() for path in Path(name).iterdir()} for name in ("done", "far"))
    assert near.keys() == far.keys(), "the copies are gone"
    assert json.loads(far.pop("manifest.json"))["source"] == f"file://{place}/photos"
    near.pop("manifest.json")
    assert far == near


def test_remote_images_are_not_copied_in_vain(place, capsys, monkeypatch):
    remote = f"file://{place}/photos"
    assert ijepa(capsys, f"prepare {remote} far --workers 0")[0] == 0
    monkeypatch.setattr("ijepa_enhanced.commands.prepare.fetch", pytest.fail)
    assert ijepa(capsys, f"prepare {remote} far --workers 0")[0] == 0
    assert ijepa(capsys, f"prepare {remote} far --quality 80") == (
        2,
        [],
        [
            "ijepa: far already contains shards that were prepared with --quality 90, not 80. Use another output "
            "folder, or delete far."
        ],
    )
    code, _, err = ijepa(capsys, f"prepare {remote} photos")
    assert (code, err[0].partition(" (")[0]) == (2, "ijepa: photos is not empty")


@pytest.mark.parametrize("name", ["one\ntwo", "a\x85b", "\udce9"])
def test_a_class_whose_name_is_no_line_of_text(place, capsys, name):
    Path("photos/light").rename(Path("photos", name))
    code, out, err = ijepa(capsys, "prepare photos new")
    assert (code, out) == (2, [])
    assert err[-1].startswith(f"ijepa: The class name {name!r} cannot be written to classes.txt")
    assert [*Path("new").iterdir()] == []


def test_one_command_at_a_time(place, capsys):
    busy = "ijepa: Another ijepa prepare is writing to new. Wait until it ends, or name another folder."
    with alone(Path("new")):
        assert ijepa(capsys, "prepare photos new --workers 0") == (2, [], [busy])
    assert ijepa(capsys, "prepare photos new --workers 0")[0] == 0


def test_ctrl_c(tmp_path):
    """To the whole process group, as a terminal sends it, while workers hand over what they made."""
    command = [
        sys.executable,
        "-m",
        "ijepa_enhanced",
        "prepare",
        "synthetic",
        "done",
        "--workers",
        "2",
        "--shard-size",
        "1",
    ]
    process = subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, text=True, start_new_session=True)
    while process.poll() is None and not (tmp_path / "done/images-000000.tar").exists():
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGINT)
    said = "Images: synthetic: built-in images, split train, 4,096 images, 10 classes\n"
    assert process.communicate(timeout=60)[1] == f"{said}ijepa: Interrupted.\n"
    assert process.returncode == 1
