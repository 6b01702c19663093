"""Re-encoding into shards: what they hold, and that being killed changes nothing."""

import json
import os
import select
import shutil
import signal
import subprocess
import sys
import tarfile

import numpy as np
import pytest
from PIL import Image

from ijepa_enhanced.data.catalog import open_catalog
from ijepa_enhanced.data.decode import decode_views
from ijepa_enhanced.data.prepare import MANIFEST, check, prepare
from ijepa_enhanced.data.sources.folder import FolderSource
from ijepa_enhanced.data.sources.open import open_source
from ijepa_enhanced.errors import RunError, SourceError, UnreadableImage

COUNT = 44


def smooth(rng, height, width):
    """A picture that JPEG keeps."""
    coarse = Image.fromarray(rng.integers(0, 256, (3, 4, 3), dtype=np.uint8))
    return coarse.resize((width, height), Image.Resampling.BICUBIC)


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Two classes of noise, 44 readable images of 100 KB or so when encoded, and three that are not."""
    folder = tmp_path_factory.mktemp("photos")
    rng = np.random.default_rng(0)
    for number in range(COUNT):
        path = folder / ("bee" if number % 3 else "ant") / f"{number:02d}.png"
        path.parent.mkdir(exist_ok=True)
        pixels = rng.integers(0, 256, (200 + number, 300 - number, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(path, compress_level=0)
    (folder / "ant" / "empty.png").write_bytes(b"")
    for name in ("bee/02a.png", "bee/43z.png"):
        (folder / name).write_bytes((folder / "bee" / "02.png").read_bytes()[:5000])
    return folder


DROPPED = [
    {"key": "ant/empty.png", "reason": "empty file"},
    {"key": "bee/02a.png", "reason": "cannot be decoded: image file is truncated"},
    {"key": "bee/43z.png", "reason": "cannot be decoded: image file is truncated"},
]


@pytest.fixture(scope="module")
def prepared(photos, tmp_path_factory):
    """What an undisturbed run makes of them."""
    folder = tmp_path_factory.mktemp("prepared")
    prepare(FolderSource(photos), folder, max_resolution=240, shard_size=1)
    return folder


@pytest.fixture
def copy(prepared, tmp_path):
    """A copy of it to spoil."""
    return shutil.copytree(prepared, tmp_path / "copy")


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def load(folder):
    return json.loads((folder / MANIFEST).read_text())


def test_it_is_a_source_with_the_same_images_and_labels(photos, prepared):
    before, after = FolderSource(photos), open_source(str(prepared), "val")
    assert after.classes == before.classes == ["ant", "bee"]
    kept = [row for row, key in enumerate(before.listing.keys) if key not in {image["key"] for image in DROPPED}]
    assert len(kept) == COUNT
    np.testing.assert_array_equal(after.labels, before.labels[kept])
    assert [key.partition(":")[2] for key in after.listing.keys] == [f"{row:09d}.jpg" for row in kept]
    assert load(prepared)["dropped"] == DROPPED
    assert load(prepared)["complete"]


def test_the_origin_of_an_image_stands_beside_it(photos, prepared):
    source = FolderSource(photos)
    with tarfile.open(prepared / "images-000001.tar") as tar:
        members = tar.getmembers()
        for image, origin in zip(members[::3], members[1::3], strict=True):
            row = int(image.name.removesuffix(".jpg"))
            height, width = source.size(row)
            values = json.load(tar.extractfile(origin))
            assert values == {"key": source.key(row), "height": height, "width": width}


def test_images_are_shrunk_to_the_side_and_never_enlarged(tmp_path):
    rng = np.random.default_rng(0)
    sizes = {"large": (300, 1200), "small": (50, 20), "line": (1, 70_000)}
    for name, (height, width) in sizes.items():
        (tmp_path / name).mkdir()
        smooth(rng, height, width).save(tmp_path / name / "0.png")
    prepare(FolderSource(tmp_path), tmp_path / "out", max_resolution=120, quality=95)
    source = open_source(str(tmp_path / "out"))
    assert [source.size(row) for row in range(3)] == [(60, 240), (1, 31_749), (50, 20)]
    box, size = np.array([[0, 0, 300, 1200]]), np.array([[60, 240]])
    expected = decode_views(Image.open(tmp_path / "large" / "0.png"), box, size)[0]
    shown = np.asarray(source.open(0)).astype(int)
    assert np.abs(shown - expected).mean() < 2


def test_the_number_of_workers_changes_nothing(photos, prepared, tmp_path):
    done = []
    prepare(FolderSource(photos), tmp_path, 240, workers=2, shard_size=1, progress=lambda *counts: done.append(counts))
    assert contents(tmp_path) == contents(prepared)
    assert done[-1] == (COUNT + 2, COUNT + 2)


def test_nothing_of_the_day_or_the_machine_is_in_it(prepared):
    shards = sorted(prepared.glob("*.tar"))
    assert len(shards) == 3
    for path in shards:
        with tarfile.open(path) as tar:
            facts = {(member.mtime, member.uid, member.gid, member.uname, member.gname, member.mode) for member in tar}
        assert facts == {(0, 0, 0, "", "", 0o644)}
        # A shard is closed by the first image that fills it.
        assert path.stat().st_size < 1_000_000 + 110_000


KILLED = """
import os, signal, sys
from pathlib import Path
from ijepa_enhanced.data.prepare import prepare
from ijepa_enhanced.data.sources.folder import FolderSource

def die(done, total):
    if done == int(last):
        os.kill(os.getpid(), signal.SIGKILL)

photos, folder, workers, last = sys.argv[1:]
prepare(FolderSource(photos), Path(folder), 240, workers=int(workers), shard_size=1, progress=die)
"""


@pytest.mark.parametrize(("workers", "kills"), [(0, [1, 30, 46]), (2, [30])])
def test_killed_and_gone_on_with_it_is_the_same(photos, prepared, tmp_path, workers, kills):
    for last in kills:
        alive, inherited = os.pipe()
        command = [sys.executable, "-c", KILLED, photos, tmp_path, str(workers), str(last)]
        assert subprocess.run(command, pass_fds=[inherited], check=False).returncode == -signal.SIGKILL
        os.close(inherited)
        assert select.select([alive], [], [], 30)[0], "a worker outlives it"
        os.close(alive)
        assert not load(tmp_path)["complete"]
        assert any(path.name.endswith(".partial") for path in tmp_path.iterdir()), "it was killed at work"
    done = sum(shard["images"] for shard in load(tmp_path)["shards"])
    seen = []
    prepare(FolderSource(photos), tmp_path, 240, shard_size=1, progress=lambda *counts: seen.append(counts[0]))
    assert seen[0] > done > 0, "what is done is not done again"
    assert contents(tmp_path) == contents(prepared)


@pytest.mark.parametrize("last", [0, 2])
def test_killed_between_a_shard_and_the_manifest(photos, prepared, copy, last):
    manifest = load(copy)
    manifest["shards"] = manifest["shards"][:last]
    manifest["dropped"] = DROPPED[: 2 if last else 1]
    manifest["complete"] = False
    (copy / MANIFEST).write_text(json.dumps(manifest))
    (copy / "classes.txt").unlink()
    prepare(FolderSource(photos), copy, 240, shard_size=1)
    assert contents(copy) == contents(prepared)


def test_what_the_disk_does_not_give_for_a_moment_is_not_dropped(photos, prepared, tmp_path, monkeypatch):
    source = FolderSource(photos)

    def fail(row):
        if row == 30:
            raise UnreadableImage("cannot be read: Input/output error")
        return FolderSource.open(source, row)

    monkeypatch.setattr(source, "open", fail)
    with pytest.raises(RunError) as error:
        prepare(source, tmp_path, 240, shard_size=1)
    assert str(error.value) == (
        f"{source.key(30)} cannot be read: Input/output error. Run the same command again to continue."
    )
    prepare(FolderSource(photos), tmp_path, 240, shard_size=1)
    assert contents(tmp_path) == contents(prepared)


def test_what_is_complete_is_left_alone(photos, copy):
    times = {path: path.stat().st_mtime_ns for path in copy.iterdir()}
    prepare(FolderSource(photos), copy, 240, shard_size=1, progress=pytest.fail)
    assert {path: path.stat().st_mtime_ns for path in copy.iterdir()} == times


def test_images_without_labels(tmp_path):
    smooth(np.random.default_rng(0), 9, 12).save(tmp_path / "0.png")
    prepare(FolderSource(tmp_path), tmp_path / "out")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["images-000000.tar", MANIFEST]
    source = open_source(str(tmp_path / "out"))
    assert (source.labels, source.classes, source.size(0)) == (None, None, (9, 12))


def test_the_synthetic_images(tmp_path, monkeypatch):
    monkeypatch.setattr("ijepa_enhanced.data.synthetic.IMAGES", {"train": 1, "val": 12})
    source = open_source("synthetic", "val")
    prepare(source, tmp_path)
    after = open_source(str(tmp_path))
    np.testing.assert_array_equal(after.labels, source.labels)
    assert [after.size(row) for row in range(12)] == [source.size(row) for row in range(12)]


def test_check(copy):
    assert check(copy) == []
    path = copy / "images-000001.tar"
    data = bytearray(path.read_bytes())
    data[700] ^= 1
    path.write_bytes(data)
    (copy / "images-000002.tar").unlink()
    (copy / "classes.txt").write_text("bee\nant\n")
    manifest = load(copy)
    manifest["complete"] = False
    (copy / MANIFEST).write_text(json.dumps(manifest))
    assert check(copy) == [
        "The folder is incomplete. Run `ijepa prepare` with the same arguments to continue.",
        "images-000001.tar does not match its checksum.",
        "images-000002.tar cannot be read: No such file or directory.",
        "classes.txt does not match its checksum.",
    ]


def damage(folder):
    (folder / MANIFEST).write_text('{"format": 1, "sha')


def another_version(folder):
    (folder / MANIFEST).write_text('{"format": 99}')


def no_manifest(folder):
    (folder / MANIFEST).unlink()
    for path in folder.glob("*.tar"):
        path.unlink()


def lacking(name):
    def leave_out(folder):
        manifest = json.loads((folder / MANIFEST).read_text())
        for part in (manifest, *manifest["shards"]):
            part.pop(name, None)
        (folder / MANIFEST).write_text(json.dumps(manifest))

    return leave_out


def nothing(folder):
    pass


OTHERWISE = "{{0}} already contains shards that were prepared {}. Use another output folder, or delete {{0}}."
REFUSED = {
    "other images": (nothing, {}, OTHERWISE.format("from other images")),
    "another side": (nothing, {"max_resolution": 100}, OTHERWISE.format("with --max-resolution 240, not 100")),
    "another quality": (nothing, {"quality": 80}, OTHERWISE.format("with --quality 90, not 80")),
    "another size of shards": (nothing, {"shard_size": 2}, OTHERWISE.format("with --shard-size 1, not 2")),
    "something else": (
        no_manifest,
        {},
        "{} is not empty (it contains classes.txt) and was not made by `ijepa prepare`. Use an empty or a new output "
        "folder.",
    ),
    "a damaged manifest": (damage, {}, "{0}/manifest.json is damaged. Delete {0} and prepare the images again."),
    "a manifest that lacks a key": (
        lacking("dropped"),
        {},
        "{0}/manifest.json is damaged. Delete {0} and prepare the images again.",
    ),
    "a shard that lacks a key": (
        lacking("sha256"),
        {},
        "{0}/manifest.json is damaged. Delete {0} and prepare the images again.",
    ),
    "another version": (
        another_version,
        {},
        "{} was prepared by an incompatible version of ijepa-enhanced. Delete it and prepare the images again.",
    ),
}


@pytest.mark.parametrize(("spoil", "settings", "message"), REFUSED.values(), ids=REFUSED)
def test_folders_that_are_refused(photos, copy, spoil, settings, message):
    spoil(copy)
    before = contents(copy)
    source = FolderSource(photos / "bee" if "other images" in message else photos)
    with pytest.raises(SourceError) as error:
        prepare(source, copy, **{"max_resolution": 240, "shard_size": 1, **settings})
    assert str(error.value) == message.format(copy)
    assert contents(copy) == before


def test_no_image_that_can_be_read(tmp_path):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a.png").write_bytes(b"")
    with pytest.raises(SourceError) as error:
        prepare(FolderSource(tmp_path / "photos"), tmp_path / "out")
    assert str(error.value) == f"None of the 1 images of {tmp_path}/photos can be read."
    assert not (tmp_path / "out").exists()


def test_a_folder_that_was_not_prepared(tmp_path):
    with pytest.raises(SourceError) as error:
        check(tmp_path)
    assert str(error.value) == f"{tmp_path} was not made by `ijepa prepare`: it has no manifest.json."


@pytest.mark.parametrize("labels", [["ant", "", "bee", ""], ["0", "", "1", ""]])
def test_images_without_a_label_stay_without_one(tmp_path, labels):
    lines = [f"{number}.png,{label}" for number, label in enumerate(labels)]
    (tmp_path / "list.csv").write_text("\n".join(["path,label", *lines]))
    for number in range(4):
        smooth(np.random.default_rng(number), 30, 40).save(tmp_path / f"{number}.png")
    prepare(open_source(str(tmp_path / "list.csv")), tmp_path / "out")
    assert open_catalog(open_source(str(tmp_path / "out"))).labels.tolist() == [0, -1, 1, -1]
