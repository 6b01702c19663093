"""Several sources as one: their images, their labels, and how often an epoch shows them."""

import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ijepa_enhanced.cli import main
from ijepa_enhanced.data.catalog import Catalog, open_catalog
from ijepa_enhanced.data.config import DataConfig
from ijepa_enhanced.data.in_memory import InMemory
from ijepa_enhanced.data.loader import PackDataset
from ijepa_enhanced.data.plan import Cursor, Plan
from ijepa_enhanced.data.sources.base import Source
from ijepa_enhanced.data.sources.folder import FolderSource
from ijepa_enhanced.data.sources.mixed import MixedSource
from ijepa_enhanced.data.sources.open import open_source
from ijepa_enhanced.data.sources.synthetic import SyntheticSource
from ijepa_enhanced.errors import PlanError, SourceError
from ijepa_enhanced.masks import MaskConfig
from ijepa_enhanced.train.saved import load_config

CONFIG = DataConfig(tokens_per_pack=512, min_resolution=32, max_resolution=64)


def keys(source: Source) -> list[str]:
    return [*source.listing.keys]


def folder(root: Path, *names: str, start: int = 1) -> Path:
    """Images of 1, 2, 3 and so on pixels in height, of 6 in width."""
    for height, name in enumerate(names, start=start):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (6, height), (height, 0, 0)).save(path)
    return root


@pytest.fixture
def two(tmp_path: Path) -> tuple[Path, Path]:
    """Classes ant, dog; and bee, dog."""
    return (
        folder(tmp_path / "a", "ant/0.png", "dog/0.png", "dog/1.png"),
        folder(tmp_path / "b", "bee/0.png", "dog/0.png", start=4),
    )


def index_of(shares: list[float] | None, count: int = 2000, size: int = 64) -> Catalog:
    """Images all of one size."""
    sides = np.full(count, size, dtype=np.int32)
    drawn = None if shares is None else np.repeat(shares, count // len(shares))
    return Catalog(sides, sides, np.arange(count), None, None, "hash", drawn)


def shown(index: Catalog, epoch: int = 0, seed: int = 0) -> list[int]:
    return sorted(Plan(index, CONFIG, 8, seed).epoch(epoch).images.tolist())


def test_images_are_those_of_the_sources_one_after_another(two: tuple[Path, Path]) -> None:
    source = open_source(f"{two[0]} + {two[1]}")
    assert keys(source) == ["1:ant/0.png", "1:dog/0.png", "1:dog/1.png", "2:bee/0.png", "2:dog/0.png"]
    assert [source.size(row) for row in range(5)] == [(1, 6), (2, 6), (3, 6), (4, 6), (5, 6)]
    assert [source.open(row).getpixel((0, 0)) for row in range(5)] == [(height, 0, 0) for height in range(1, 6)]
    assert [source.length(row) for row in range(5)] == [len(source.read(row)) for row in range(5)]


def test_a_mix_of_kinds_may_be_kept_in_memory(two: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ijepa_enhanced.data.synthetic.IMAGES", {"train": 3, "val": 2})
    source = open_source(f"{two[0]} + synthetic@2", "val")
    assert keys(source)[3:] == ["2:val-00000", "2:val-00001"]
    kept = InMemory(source)
    assert kept.listing.shares is source.listing.shares
    for row in range(5):
        assert np.array_equal(np.asarray(kept.open(row)), np.asarray(source.open(row)))
    assert np.array_equal(np.asarray(source.open(4)), np.asarray(SyntheticSource("val").open(1)))


def test_classes_of_one_name_are_one(two: tuple[Path, Path]) -> None:
    source = open_source(f"{two[0]} + {two[1]}")
    assert source.classes == ["ant", "dog", "bee"]
    assert source.labels is not None
    assert source.labels.tolist() == [0, 1, 1, 2, 1]


def test_numbers_stand_for_themselves_and_a_missing_one_is_missing(two: tuple[Path, Path], tmp_path: Path) -> None:
    for name, labels in (("a", "7,2,"), ("b", ",2,7")):
        rows = zip(["ant/0.png", "dog/0.png", "dog/1.png"], labels.split(","), strict=True)
        (tmp_path / name / "list.csv").write_text("path,label\n" + "".join(f"{path},{label}\n" for path, label in rows))
    source = open_source(f"{tmp_path}/a/list.csv + {tmp_path}/b/list.csv")
    assert source.labels is not None
    assert (source.labels.tolist(), source.classes) == ([7, 2, -1, -1, 2, 7], None)


def test_a_name_that_is_missing_is_missing(two: tuple[Path, Path]) -> None:
    (two[0] / "list.csv").write_text("path,label\nant/0.png,\ndog/0.png,dog\n")
    source = open_source(f"{two[1]} + {two[0]}/list.csv")
    assert source.classes == ["bee", "dog"]
    assert source.labels is not None
    assert source.labels.tolist() == [0, 1, -1, 1]


def test_there_are_no_labels_where_one_source_has_none_or_other_ones(two: tuple[Path, Path], tmp_path: Path) -> None:
    flat = folder(tmp_path / "c", "0.png")
    (two[0] / "list.csv").write_text("path,label\nant/0.png,0\n")
    for other in (flat, two[0] / "list.csv"):
        source = open_source(f"{two[0]} + {other}")
        assert (source.labels, source.classes) == (None, None)


@pytest.mark.parametrize(
    ("spec", "shares"),
    [
        ("{a} + {b}", [1.0, 1.0]),
        ("{a}@2 + {b}@1", [1.0, 0.5]),
        ("{a} + {b}@4", [0.25, 1.0]),
        ("{a}@.5 + {b}@1.5", [1 / 3, 1.0]),
    ],
)
def test_weights_are_shares_of_the_largest(spec: str, shares: list[float], two: tuple[Path, Path]) -> None:
    source = open_source(spec.format(a=two[0], b=two[1]))
    assert source.listing.shares is not None
    assert source.listing.shares.tolist() == pytest.approx(np.repeat(shares, [3, 2]).tolist())


def test_weights_of_patterns_and_names_that_look_like_a_mix(two: tuple[Path, Path], tmp_path: Path) -> None:
    odd = folder(tmp_path / "c + d@3", "0.png")
    assert isinstance(open_source(str(odd)), FolderSource)
    doubled = folder(tmp_path / "photos@2", "0.png")
    source = open_source(f"{doubled} + {two[0]}")
    assert source.listing.shares is not None
    assert source.listing.shares.tolist() == [1.0] * 4
    source = open_source(f"{doubled}@3 + {two[0]}")
    assert source.listing.shares is not None
    assert source.listing.shares.tolist() == pytest.approx([1.0, *[1 / 3] * 3])


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("{a}@0 + {b}", "The weight of {a} is 0. Set a weight above 0, or leave {a} out of the mixture."),
        ("{a} + ", "The source of the images is empty. Set it to a folder, tar shards or 'synthetic'."),
        ("{a} + {a}/gone@2", "No such file or folder: {a}/gone. A source of images can be a folder"),
        ("{a} + {b}@-1", "No such file or folder: {b}@-1. A source of images can be a folder"),
    ],
)
def test_mixes_that_are_refused(spec: str, message: str, two: tuple[Path, Path]) -> None:
    with pytest.raises(SourceError) as error:
        open_source(spec.format(a=two[0], b=two[1]))
    assert str(error.value).startswith(message.format(a=two[0], b=two[1]))


def test_a_fingerprint_changes_with_any_part_and_with_their_order(two: tuple[Path, Path]) -> None:
    a, b = two
    prints = {open_source(f"{a} + {b}").fingerprint(), open_source(f"{b} + {a}").fingerprint()}
    os.utime(b / "bee" / "0.png", ns=(1, 1))
    prints.add(open_source(f"{a} + {b}").fingerprint())
    assert len(prints) == 3
    assert open_source(f"{a} + {b}@2").fingerprint() in prints, "weights are not scanned"
    drawn = open_source(f"{a} + synthetic").fingerprint()
    assert drawn != open_source(f"{a} + synthetic", "val").fingerprint()
    assert drawn not in prints


def test_an_index_knows_shares_of_what_can_be_read(two: tuple[Path, Path]) -> None:
    (two[0] / "ant" / "0.png").write_bytes(b"")
    index = open_catalog(open_source(f"{two[0]} + {two[1]}@2"))
    assert index.shares is not None
    assert index.shares.tolist() == [0.5, 0.5, 1.0, 1.0]
    assert tuple(index.unreadable) == (("1:ant/0.png", "empty file"),)
    hashes = {open_catalog(open_source(f"{two[0]}@{weight} + {two[1]}@2")).hash for weight in (1, 1.5, 2)}
    assert len(hashes) == 3, "a run cannot go on with other weights"
    assert index.select(np.array([3, 0])).shares is None


def test_an_epoch_shows_each_image_at_most_once_and_as_many_as_its_share() -> None:
    index = index_of([1.0, 0.5, 0.1, 1.0])
    for epoch in range(3):
        images = np.array(shown(index, epoch))
        assert len(np.unique(images)) == len(images)
        counts = np.bincount(images // 500, minlength=4).tolist()
        # Four standard deviations of a binomial distribution.
        assert counts[0] == counts[3] == 500
        assert counts[1] == pytest.approx(250, abs=45)
        assert counts[2] == pytest.approx(50, abs=27)


def test_what_an_epoch_shows_is_drawn_anew_and_every_image_has_its_turn() -> None:
    index = index_of([1.0, 0.5], count=400)
    times = np.zeros(400)
    for epoch in range(40):
        times[shown(index, epoch)] += 1
    assert (times[:200] == 40).all()
    assert times[200:].min() > 5
    assert times[200:].max() < 35
    assert shown(index, 7) == shown(index_of([1.0, 0.5], count=400), 7)
    assert shown(index, 7) != shown(index, 7, seed=1)


def test_shares_do_not_change_how_what_is_shown_is_cut() -> None:
    everything, some = (Plan(index_of(shares), CONFIG, 8, 0).epoch(2) for shares in (None, [0.3, 1.0]))
    boxes = dict(zip(everything.images.tolist(), everything.boxes.tolist(), strict=True))
    assert [boxes[image] for image in some.images.tolist()] == some.boxes.tolist()
    assert len(some.images) < 1700


def test_equal_weights_are_the_plan_of_no_weights() -> None:
    plain, equal = (Plan(index_of(shares), CONFIG, 8, 0).epoch(1) for shares in (None, [1.0, 1.0]))
    assert plain.images.tolist() == equal.images.tolist()
    assert plain.boxes.tolist() == equal.boxes.tolist()
    assert plain.offsets.tolist() == equal.offsets.tolist()


def test_what_an_epoch_does_not_show_is_not_counted() -> None:
    index = index_of([1.0, 0.2])
    index.heights[1500:] = index.widths[1500:] = 1
    epoch = Plan(index, DataConfig(tokens_per_pack=512, min_resolution=None, max_resolution=None), 8, 0).epoch(0)
    assert epoch.too_small == pytest.approx(100, abs=36)
    assert len(epoch.images) == pytest.approx(1100, abs=36)


def test_too_few_images_in_an_epoch_are_refused() -> None:
    index = index_of([1.0, 1e-9], count=4, size=64)
    index.heights[:1] = index.widths[:1] = 1
    with pytest.raises(PlanError, match=r"but only 1 of 2 images is large enough\. "):
        Plan(index, DataConfig(tokens_per_pack=512, min_resolution=None, max_resolution=None), 8, 0).epoch(0)


def test_batches_say_which_row_of_the_mix_they_show(two: tuple[Path, Path]) -> None:
    source: Source = MixedSource([FolderSource(two[0]), FolderSource(two[1])], [1, 1], "a mix")
    index = open_catalog(source, cache=False)
    plan = Plan(index, CONFIG, 8, 0)
    batch = PackDataset(source, index, 8, MaskConfig())[next(plan.packs(Cursor(0, 0)))]
    colors = [int(view.float().mean() * 3) for view in batch.packed.split()]
    assert colors == [row + 1 for row in batch.image_ids.tolist()]
    assert batch.labels is not None
    assert batch.labels.tolist() == [[0, 1, 1, 2, 1][row] for row in batch.image_ids.tolist()]


def test_a_run_on_a_mix(pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ijepa_enhanced.data.synthetic.IMAGES", {"train": 8, "val": 8})
    spec = f"{pictures} + synthetic@0.5"
    options = (
        "--data.tokens_per_pack 256 --data.min_resolution 32 --data.max_resolution 48 --data.workers 0 "
        "--encoder.variant Ti "
        "--encoder.patch_size 8 --encoder.depth 1 --predictor.width 32 --predictor.depth 1 --predictor.heads 2 "
        "--steps 2 --data.cache memory"
    )
    run = tmp_path / "run"
    assert main(["train", *options.split(), "--data.source", spec, "--run", str(run)]) == 0
    assert load_config(run).data.source == spec
    assert load_config(run).data.cache == "memory"
    assert main(["train", "--resume", str(run), "--data.cache", "none"]) == 0
