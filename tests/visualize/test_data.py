"""What is said and drawn of a source."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ijepa_enhanced.cli import main
from ijepa_enhanced.data.catalog import open_catalog
from ijepa_enhanced.data.decode import decode_whole
from ijepa_enhanced.data.sources.folder import FolderSource
from ijepa_enhanced.visualize.data import NEAR, THUMBNAIL_SIZE, class_sizes, perceptual_hash, short_name, survey


def picture(seed, height=150, width=200):
    """Some soft shapes, which are others for every seed."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (6, 8, 3), dtype=np.uint8))
    return coarse.resize((width, height), Image.Resampling.BICUBIC)


@pytest.fixture
def photos(tmp_path):
    """Twenty different pictures of two classes, and seven more: two that are one of them again, and four like one."""
    folder = tmp_path / "photos"
    for seed in range(20):
        path = folder / ("bee" if seed % 4 else "ant") / f"{seed:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        picture(seed).save(path)
    picture(1).save(folder / "bee" / "a copy.png", compress_level=1)
    picture(1).convert("RGBA").save(folder / "bee" / "one more.png")
    picture(2).save(folder / "bee" / "compressed.jpg", quality=30)
    picture(2).convert("L").save(folder / "bee" / "gray.png")
    picture(2).resize((100, 75)).save(folder / "bee" / "small.png")
    picture(2).point(lambda value: value * 0.7 + 20).save(folder / "bee" / "pale.png")
    picture(3).transpose(Image.Transpose.FLIP_LEFT_RIGHT).save(folder / "bee" / "mirrored.png")
    return folder


def named(source, pairs):
    return {(Path(source.key(row)).name, Path(source.key(other)).name) for row, other in pairs}


def test_duplicates(photos):
    source = FolderSource(photos)
    seen = survey(source, open_catalog(source))
    assert seen.rows == list(range(27))
    assert named(source, seen.identical) == {("a copy.png", "01.png"), ("one more.png", "01.png")}
    assert {name for name, _ in named(source, seen.near)} == {"compressed.jpg", "gray.png", "small.png", "pale.png"}
    assert all(
        source.key(other).endswith(("02.png", "compressed.jpg", "gray.png", "pale.png")) for _, other in seen.near
    )


def test_identical_is_the_size_too(tmp_path):
    for side in (300, 600):
        Image.new("RGB", (side, side), "red").save(tmp_path / f"{side}.png")
    source = FolderSource(tmp_path)
    seen = survey(source, open_catalog(source))
    assert (seen.identical, seen.near) == ([], [(1, 0)])


def test_different_pictures_are_not_near():
    """Of 128 bits that are drawn at random 64 differ, with a standard deviation of 5.7: ten is beyond all doubt."""
    hashes = np.array([perceptual_hash(decode_whole(picture(seed), THUMBNAIL_SIZE)) for seed in range(100)])
    apart = np.bitwise_count(hashes[:, None] ^ hashes[None]).sum(axis=2)
    assert apart[~np.eye(100, dtype=bool)].min() > 2 * NEAR


def test_modes_and_what_cannot_be_decoded(photos):
    path = photos / "ant" / "00.png"
    path.write_bytes(path.read_bytes()[:-3000])
    source = FolderSource(photos)
    seen = survey(source, open_catalog(source))
    assert seen.unreadable == [(0, "cannot be decoded: image file is truncated")]
    assert seen.rows == list(range(1, 27))
    assert seen.modes == {"RGB": 24, "RGBA": 1, "L": 1}


def test_classes_are_counted(photos):
    assert class_sizes(open_catalog(FolderSource(photos))) == {"bee": 22, "ant": 5}
    assert class_sizes(open_catalog(FolderSource(photos / "ant"))) == {}


@pytest.mark.parametrize("name", ["c$\\bad$d", "x" * 60, "猫", "ant"])
def test_the_classes_have_any_name(photos, tmp_path, capsys, name):
    pytest.importorskip("matplotlib")
    (photos / "ant").rename(photos / name)
    code, out, _ = ijepa(capsys, "inspect", "data", photos, "--out", tmp_path / "out")
    assert code == 0
    assert f"class {name}" in " ".join(out)
    with Image.open(tmp_path / "out" / "sizes.png") as drawn:
        # The panels keep their height: their frame is drawn from top to bottom.
        frames = (np.asarray(drawn.convert("L")) < 50).sum(axis=0).max()
    assert frames > 0.5 * 300


def test_a_long_name_is_cut_and_not_lost():
    assert short_name("x" * 20) == "x" * 20
    assert short_name("x" * 21) == "x" * 19 + "…"


def test_only_some_of_many_are_looked_at(photos, monkeypatch):
    monkeypatch.setattr("ijepa_enhanced.visualize.data.MOST", 9)
    source = FolderSource(photos)
    seen = survey(source, open_catalog(source))
    assert len(seen.rows) == 9
    assert seen.rows == sorted(set(seen.rows))


def ijepa(capsys, *arguments):
    code = main([*map(str, arguments)])
    said = capsys.readouterr()
    return code, said.out.splitlines(), said.err.splitlines()


def test_the_command(photos, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    (photos / "ant" / "empty.png").write_bytes(b"")
    code, out, err = ijepa(capsys, "inspect", "data", photos, "--out", tmp_path / "out", "--json")
    said = f"Images: {photos}: folder, 28 images, 2 classes"
    assert (code, err) == (0, [said, "Skipped ant/empty.png: empty file"])
    said = json.loads(out[-1])
    assert {name: said[name] for name in ("images", "unreadable", "labels", "looked_at", "identical", "near")} == {
        "images": 27,
        "unreadable": 1,
        "labels": 2,
        "looked_at": 27,
        "identical": 2,
        "near": 4,
    }
    assert said["classes"] == {"bee": 22, "ant": 5}
    assert len(said["duplicates"]) == 6
    kinds = 2 * ["identical"] + 4 * ["near-duplicate"]
    assert [line for line in out if line.startswith(("identical: ", "near-duplicate: "))] == [
        f"{kind}: {copy} of {earlier}" for kind, (copy, earlier) in zip(kinds, said["duplicates"], strict=True)
    ]
    assert [line.split(maxsplit=1) for line in out if line.startswith(("classes", "images decoded", "class bee"))] == [
        ["classes", "2"],
        ["images", "decoded                27"],
        ["class", "bee                     22"],
    ]
    assert [Path(path).name for path in said["pictures"]] == ["images.png", "duplicates.png", "sizes.png"]
    for path in said["pictures"]:
        assert np.asarray(Image.open(path).convert("L")).std() > 5, "something is drawn"
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["duplicates.png", "images.png", "sizes.png"]


def test_images_keep_their_aspect_on_the_sheet(tmp_path, capsys):
    Image.new("RGB", (800, 200), "red").save(tmp_path / "a.png")
    assert ijepa(capsys, "inspect", "data", tmp_path, "--out", tmp_path / "out")[0] == 0
    sheet = np.asarray(Image.open(tmp_path / "out" / "images.png"))
    rows, cols = np.nonzero((sheet == (255, 0, 0)).all(axis=2))
    assert (np.ptp(rows) + 1, np.ptp(cols) + 1) == (64, 256)


def test_nothing_to_look_at(tmp_path, capsys):
    (tmp_path / "a.png").write_bytes(b"")
    code, out, err = ijepa(capsys, "inspect", "data", tmp_path, "--out", tmp_path / "out")
    said = f"ijepa: None of the 1 images of {tmp_path} can be {{}}. The lines above say why."
    assert (code, out, err[-1]) == (1, [], said.format("read"))
    picture(0).save(tmp_path / "a.png")
    (tmp_path / "a.png").write_bytes((tmp_path / "a.png").read_bytes()[:-2000])
    code, out, err = ijepa(capsys, "inspect", "data", tmp_path, "--out", tmp_path / "out")
    assert (code, out, err[-1]) == (1, [], said.format("decoded"))
    assert not (tmp_path / "out").exists()
