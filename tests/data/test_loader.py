"""From packs to batches: the right pixels and masks, whoever decodes them and whatever cannot be decoded."""

import dataclasses
import itertools
import os
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image
from torch.utils.data import DataLoader

from ijepa_enhanced.batch import Batch, MaskedBatch
from ijepa_enhanced.data.augment import Changes, channel_means
from ijepa_enhanced.data.catalog import Catalog, open_catalog
from ijepa_enhanced.data.config import AugmentConfig, DataConfig
from ijepa_enhanced.data.decode import unpatchify
from ijepa_enhanced.data.loader import PREFETCH, SHARED_BYTES, PackDataset, make_loader, masked
from ijepa_enhanced.data.plan import Cursor, Pack, Plan
from ijepa_enhanced.data.sources.folder import FolderSource
from ijepa_enhanced.masks import MaskConfig, draw_masks
from ijepa_enhanced.merge_plan import MergePlan
from ijepa_enhanced.packed import Packed
from ijepa_enhanced.randomness import Purpose, generator

PATCH = 8
SEED = 11
CONFIG = DataConfig(tokens_per_pack=512, min_resolution=48, max_resolution=96, masked_views=2, packs_per_step=2)

# One or two processors are enough for these tests; PyTorch warns of more workers than processors.
pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning")


def picture(number: int, height: int, width: int) -> NDArray[np.uint8]:
    """Smooth colors that differ from place to place and from image to image."""
    y, x = np.mgrid[:height, :width]
    waves = [np.sin((number + 2) * y / (31 + c) + (c + 1) * x / 17 + number) for c in range(3)]
    return np.stack([(127 * (wave + 1)).astype(np.uint8) for wave in waves], axis=2)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Twelve images of two classes; row 0 cannot even be indexed, so that rows are not positions in the index."""
    for number in range(12):
        path = tmp_path / "ab"[number % 2] / f"{number:02d}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(picture(number, 60 + 7 * number, 140 - 5 * number)).save(path)
    (tmp_path / "a" / "00.png").write_bytes(b"")
    return tmp_path


class Scene:
    """A source, its index, and the packs of an epoch."""

    def __init__(self, folder: Path, config: DataConfig = CONFIG) -> None:
        self.source = FolderSource(folder)
        self.catalog: Catalog = open_catalog(self.source, cache=False)
        self.plan = Plan(self.catalog, config, PATCH, SEED)
        epoch = self.plan.epoch(3)
        self.packs: list[Pack] = [epoch[number] for number in range(len(epoch))]

    def dataset(self, masks: MaskConfig | None = None, **merging: Any) -> PackDataset:
        return PackDataset(self.source, self.catalog, PATCH, masks, SEED, **merging)


@pytest.fixture
def scene(folder: Path) -> Scene:
    made = Scene(folder)
    assert len(made.catalog.rows) == 11
    assert len(made.packs) > 2
    return made


def flat(value: Any, name: str = "batch") -> Iterator[tuple[str, Any]]:
    """Every leaf of a batch, with its name."""
    if hasattr(value, "__dataclass_fields__"):
        for field in value.__dataclass_fields__:
            yield from flat(getattr(value, field), f"{name}.{field}")
    else:
        yield name, value


def assert_same(one: Batch, other: Batch) -> None:
    assert type(one) is type(other)
    for (name, ours), (same_name, theirs) in zip(flat(one), flat(other), strict=True):
        assert name == same_name
        if isinstance(ours, torch.Tensor):
            assert ours.dtype == theirs.dtype, name
            assert torch.equal(ours, theirs), name
        else:
            assert ours == theirs, name


LOCAL = dataclasses.replace(CONFIG, tokens_per_pack=1024, masked_views=2, local_views=3, min_crop=0.5)

# --- pixels


def test_a_view_is_the_crop_resized_and_cut_into_patches(scene: Scene) -> None:
    pack = scene.packs[1]
    batch = scene.dataset()[pack]
    assert type(batch) is Batch
    assert len(batch.packed.split()) == len(pack.images) > 4
    for number, patches in enumerate(batch.packed.split()):
        row = int(scene.catalog.rows[pack.images[number]])
        top, left, height, width = pack.boxes[number].tolist()
        rows, cols = pack.grids[number].tolist()
        with Image.open(scene.source.root / scene.source.key(row)) as image:
            assert (image.height, image.width) == (scene.catalog.heights[row - 1], scene.catalog.widths[row - 1])
            box = (round(left), round(top), round(left + width), round(top + height))
            pixels = np.asarray(image.crop(box).resize((cols * PATCH, rows * PATCH), Image.Resampling.BICUBIC))
        assert patches.dtype == torch.uint8
        assert patches.shape == (rows * cols, PATCH * PATCH * 3)
        for token, (r, c) in enumerate(itertools.product(range(rows), range(cols))):
            patch = pixels[r * PATCH : (r + 1) * PATCH, c * PATCH : (c + 1) * PATCH]
            # Pillow and PyTorch round weights differently, and to bytes after rows and after columns.
            assert np.abs(patches[token].numpy().astype(int) - patch.ravel()).max() <= 2


def test_a_batch_says_whose_views_it_holds(scene: Scene) -> None:
    for pack in scene.packs:
        batch = scene.dataset()[pack]
        assert batch.image_ids.tolist() == scene.catalog.rows[pack.images].tolist()
        assert batch.image_ids.min() > 0, "rows of the source, whose first cannot be read"
        classes = [scene.source.key(row)[0] for row in batch.image_ids.tolist()]
        assert batch.labels is not None
        assert ["ab"[label] for label in batch.labels.tolist()] == classes
        assert batch.packed.grids.tolist() == pack.grids.tolist()
        assert batch.packed.segments.lengths == tuple(pack.grids.prod(axis=1).tolist())
        assert (batch.cursor, batch.unreadable) == (pack.cursor, ())


def test_a_source_without_labels_gives_none(folder: Path) -> None:
    (folder / "loose.png").write_bytes((folder / "a" / "02.png").read_bytes())
    scene = Scene(folder)
    assert scene.dataset()[scene.packs[0]].labels is None


# --- masks


def test_masks_are_those_of_the_image_s_own_generator(scene: Scene) -> None:
    config = MaskConfig()
    for pack in scene.packs:
        batch = scene.dataset(config)[pack]
        assert isinstance(batch, MaskedBatch)
        whole = {name: getattr(batch, name) for name in Batch.__dataclass_fields__}
        assert_same(Batch(**whole), scene.dataset()[pack])
        expected = []
        for image, view, (rows, cols) in zip(pack.images, pack.views, pack.grids.tolist(), strict=True):
            row = int(scene.catalog.rows[image])
            rng = generator(SEED, Purpose.MASKS, epoch=3, image=row, view=int(view))
            expected.append(draw_masks(rows, cols, config, rng))
        assert pack.views.max() == 1
        assert_same(batch, masked(Batch(**whole), expected))


# --- what changes pixels


def test_every_view_is_changed_by_its_own_generator(folder: Path) -> None:
    config, scene = AugmentConfig(flip=0.5, color=0.5, gray=0.3, solarize=0.3), Scene(folder, LOCAL)
    pack = scene.packs[0]
    plain, batch = scene.dataset()[pack], scene.dataset(changes=config)[pack]
    # Bytes are mirrored; colors come as maps, for the device.
    streams = [(plain.packed, batch.packed, batch.colors, ~pack.unmasked)]
    assert plain.unmasked is not None
    assert batch.unmasked is not None
    streams.append((plain.unmasked, batch.unmasked, batch.unmasked_colors, pack.unmasked))
    flipped = 0
    for before, after, colors, own in streams:
        assert colors is not None
        views = pack.select(own)
        for view, (theirs, ours) in enumerate(zip(before.split(), after.split(), strict=True)):
            rows, cols = views.grids[view].tolist()
            key = (int(scene.catalog.rows[views.images[view]]), int(views.views[view]))
            changes = Changes.draw(config, SEED, 3, [key], views.grids[view : view + 1] * PATCH)
            pixels = unpatchify(theirs.numpy(), rows, cols, PATCH)
            if changes.flip[0]:
                pixels, flipped = pixels[:, ::-1], flipped + 1
            assert np.array_equal(unpatchify(ours.numpy(), rows, cols, PATCH), pixels)
            expected = changes.colors(channel_means(pixels)[None])
            torch.testing.assert_close(colors.affine[view], expected.affine[0])
            assert colors.solarized[view] == expected.solarized[0]
    assert 0 < flipped < len(pack.images)


def test_colors_follow_their_views_past_an_image_that_cannot_be_decoded(folder: Path) -> None:
    config, scene = AugmentConfig(color=1.0, blur=0.5), Scene(folder, LOCAL)
    pack = scene.packs[0]
    image = pack.images[5]
    expected = scene.dataset(changes=config)[pack.select(pack.images != image)]
    damage(scene, int(scene.catalog.rows[image]))
    batch = scene.dataset(changes=config)[pack]
    for ours, theirs in ((batch.colors, expected.colors), (batch.unmasked_colors, expected.unmasked_colors)):
        assert ours is not None
        assert theirs is not None
        assert torch.equal(ours.affine, theirs.affine)
        assert torch.equal(ours.solarized, theirs.solarized)
    assert torch.equal(batch.packed.values, expected.packed.values)


def test_without_changes_of_color_the_device_changes_none(scene: Scene) -> None:
    batch = scene.dataset(changes=AugmentConfig(flip=0.5, blur=0.5))[scene.packs[0]]
    assert batch.colors is None
    assert batch.unmasked_colors is None
    assert not torch.equal(batch.packed.values, scene.dataset()[scene.packs[0]].packed.values)


# --- merging


def test_without_rates_nothing_is_planned(scene: Scene) -> None:
    batch = scene.dataset(MaskConfig(), depth=3)[scene.packs[0]]
    assert isinstance(batch, MaskedBatch)
    assert batch.merge_plan is None
    assert batch.seen_merge_plan is None
    assert scene.dataset()[scene.packs[0]].merge_plan is None


def test_plans_are_of_the_views_and_of_their_contexts(scene: Scene) -> None:
    """The worker makes them, and they come with the batch to the device."""
    dataset = scene.dataset(MaskConfig(), depth=3, merge_rate=0.1, student_merge_rate=0.3)
    (batch,) = make_loader(dataset, scene.packs[:1], workers=1)
    assert isinstance(batch, MaskedBatch)
    for plan, segments, rate in (
        (batch.merge_plan, batch.packed.segments, 0.1),
        (batch.seen_merge_plan, batch.context.segments, 0.3),
    ):
        assert plan is not None
        for (name, ours), (_, theirs) in zip(flat(plan), flat(MergePlan.of(segments.lengths, rate, 3)), strict=True):
            if isinstance(ours, torch.Tensor):
                assert torch.equal(ours, theirs), name
            elif name.endswith("segments"):
                assert [part.lengths for part in ours] == [part.lengths for part in theirs]
            else:
                assert ours == theirs, name
    moved = batch.to("meta")
    assert moved.merge_plan is not None
    assert moved.seen_merge_plan is not None
    assert moved.merge_plan.tiles.device.type == moved.seen_merge_plan.tiles.device.type == "meta"


def test_only_one_of_the_two_may_merge(scene: Scene) -> None:
    for rates in ((0.1, 0.0), (0.0, 0.1)):
        batch = scene.dataset(MaskConfig(), depth=2, merge_rate=rates[0], student_merge_rate=rates[1])[scene.packs[0]]
        assert isinstance(batch, MaskedBatch)
        assert [plan is not None for plan in (batch.merge_plan, batch.seen_merge_plan)] == [r > 0 for r in rates]


def test_global_views_may_merge_at_another_rate_in_each_layer(scene: Scene) -> None:
    plan = scene.dataset(depth=2, merge_rate=[0.0, 0.5])[scene.packs[0]].merge_plan
    assert plan is not None
    assert plan.active == (False, True)


def test_masks_do_not_depend_on_the_pack_but_on_image_view_and_epoch(scene: Scene) -> None:
    dataset = scene.dataset(MaskConfig())
    pack = scene.packs[0]
    chosen = slice(2, 4)
    few = pack.select(chosen)
    whole, alone, later = (
        dataset[one] for one in (pack, *(dataclasses.replace(few, cursor=Cursor(epoch, 9)) for epoch in (3, 4)))
    )
    assert isinstance(whole, MaskedBatch)
    assert isinstance(alone, MaskedBatch)
    assert isinstance(later, MaskedBatch)
    start = int(whole.packed.segments.cu_seqlens[2])
    begin, end = whole.context.segments.cu_seqlens[[2, 4]].tolist()
    assert torch.equal(whole.context.index[begin:end] - start, alone.context.index)
    assert alone.context.index.tolist() != later.context.index.tolist()
    assert torch.equal(alone.packed.values, later.packed.values)


@settings(deadline=None, max_examples=40)
@given(
    st.lists(st.tuples(st.integers(1, 7), st.integers(4, 7)), max_size=5),
    st.integers(1, 5),
    st.integers(0, 2**32),
)
def test_masks_become_indices_as_their_definition_says(grids: list[tuple[int, int]], targets: int, seed: int) -> None:
    tokens = sum(rows * cols for rows, cols in grids)
    packed = Packed.of_grids(np.arange(tokens), np.array(grids, dtype=np.int64).reshape(-1, 2))
    rng = np.random.default_rng(seed)
    config = MaskConfig(targets=targets, max_target_area=0.6)
    drawn = [draw_masks(rows, cols, config, rng) for rows, cols in grids]
    batch = masked(Batch(packed, torch.arange(len(grids)), None, (0, 0), ()), drawn)

    views = packed.split()  # the numbers of each view's tokens in the stream
    contexts = [view[masks.context].tolist() for view, masks in zip(views, drawn, strict=True)]
    hidden = [
        sorted({int(token) for block in masks.targets for token in view[block]})
        for view, masks in zip(views, drawn, strict=True)
    ]
    for selection, expected in ((batch.context, contexts), (batch.targets, hidden)):
        assert selection.index.tolist() == list(itertools.chain(*expected))
        assert selection.segments.lengths == tuple(map(len, expected))
        assert selection.index.dtype == torch.int64


# --- what cannot be decoded


def damage(scene: Scene, row: int) -> None:
    """Cut an image off after its header, so that only decoding finds out."""
    path = scene.source.root / scene.source.key(row)
    path.write_bytes(path.read_bytes()[:200])


@pytest.mark.parametrize("place", ["first", "middle", "last"])
def test_an_image_that_cannot_be_decoded_is_left_out_and_named(scene: Scene, place: str) -> None:
    pack = scene.packs[0]
    images = pack.images[:: CONFIG.masked_views]
    image = images[{"first": 0, "middle": len(images) // 2, "last": -1}[place]]
    row = int(scene.catalog.rows[image])
    without = pack.select(pack.images != image)
    dataset = scene.dataset(MaskConfig())
    expected = dataset[without]
    damage(scene, row)
    batch = dataset[pack]
    ((named, reason),) = batch.unreadable
    assert named == row, "once, though it had two views"
    assert reason.startswith("cannot be decoded: ")
    assert len(batch.image_ids) == len(pack.images) - 2
    for name, value in flat(batch):
        if name != "batch.unreadable":
            theirs = dict(flat(expected))[name]
            assert torch.equal(value, theirs) if isinstance(value, torch.Tensor) else value == theirs, name


@pytest.mark.parametrize("size", [(10, 10), (200, 300)])
def test_an_image_of_another_size_than_at_the_scan_is_left_out_and_named(scene: Scene, size: tuple[int, int]) -> None:
    pack = scene.packs[0]
    image = int(pack.images[0])
    row, height, width = (
        int(values[image]) for values in (scene.catalog.rows, scene.catalog.heights, scene.catalog.widths)
    )
    Image.new("RGB", size[::-1]).save(scene.source.root / scene.source.key(row))
    batch = scene.dataset()[pack]
    reason = (
        f"has changed since the scan, from {height} x {width} px to {size[0]} x {size[1]} px: run `ijepa scan SOURCE` "
        "to scan the images again"
    )
    assert batch.unreadable == ((row, reason),)
    assert row not in batch.image_ids.tolist()


def test_local_views_lie_apart_whole_and_after_the_context_in_what_the_student_sees(folder: Path) -> None:
    scene = Scene(folder, LOCAL)
    pack = scene.packs[0]
    batch = scene.dataset(MaskConfig(), depth=2, student_merge_rate=0.3)[pack]
    assert isinstance(batch, MaskedBatch)
    assert batch.unmasked is not None
    masked, small = pack.select(~pack.unmasked), pack.select(pack.unmasked)
    assert_same_stream(batch.packed, masked.grids)
    assert_same_stream(batch.unmasked, small.grids)
    assert batch.image_ids.tolist() == scene.catalog.rows[masked.images].tolist()
    assert batch.tokens == pack.grids.prod(axis=1).sum()
    # The others are what they would be without them, and every local view is the crop of its own box.
    alone = scene.dataset(MaskConfig())[masked]
    assert isinstance(alone, MaskedBatch)
    assert torch.equal(alone.packed.values, batch.packed.values)
    assert torch.equal(alone.context.index, batch.context.index)
    assert torch.equal(
        scene.dataset()[dataclasses.replace(small, unmasked=~small.unmasked)].packed.values, batch.unmasked.values
    )
    assert batch.seen.lengths == batch.context.segments.lengths + batch.unmasked.segments.lengths
    assert alone.seen is alone.context.segments
    assert alone.unmasked is None
    assert batch.seen_merge_plan is not None
    assert batch.seen_merge_plan.segments[0].lengths == batch.seen.lengths


def assert_same_stream(stream: Packed, grids: NDArray[np.int64]) -> None:
    assert stream.grids.tolist() == grids.tolist()
    assert stream.segments.lengths == tuple(grids.prod(axis=1).tolist())


def test_an_image_that_cannot_be_decoded_takes_its_local_views_with_it(folder: Path) -> None:
    scene = Scene(folder, LOCAL)
    pack = scene.packs[0]
    image = pack.images[5]
    expected = scene.dataset()[pack.select(pack.images != image)]
    damage(scene, int(scene.catalog.rows[image]))
    batch = scene.dataset()[pack]
    assert batch.unmasked is not None
    assert expected.unmasked is not None
    assert torch.equal(batch.unmasked.values, expected.unmasked.values)
    assert torch.equal(batch.packed.values, expected.packed.values)


@pytest.mark.parametrize("masks", [None, MaskConfig()])
def test_a_pack_of_which_nothing_can_be_decoded_is_an_empty_batch(scene: Scene, masks: MaskConfig | None) -> None:
    for row in scene.catalog.rows.tolist():
        damage(scene, row)
    pack = scene.packs[0]
    batch = scene.dataset(masks)[pack]
    assert [row for row, _ in batch.unreadable] == scene.catalog.rows[pack.images[::2]].tolist()
    assert batch.packed.values.shape == (0, PATCH * PATCH * 3)
    assert batch.packed.segments.lengths == ()
    assert batch.packed.grids.shape == (0, 2)
    assert batch.image_ids.tolist() == []
    assert batch.labels is not None
    assert batch.labels.tolist() == []
    if isinstance(batch, MaskedBatch):
        assert len(batch.targets.index) == len(batch.context.index) == 0
        assert batch.packed.select(batch.context).values.shape == (0, PATCH * PATCH * 3)
    else:
        assert masks is None


# --- workers


def test_batches_are_the_same_and_in_order_whoever_makes_them(scene: Scene) -> None:
    damage(scene, int(scene.catalog.rows[scene.packs[0].images[2]]))
    packs = list(itertools.islice(scene.plan.packs(Cursor(0, 0)), 2 * len(scene.packs) + 1))
    assert {pack.cursor.epoch for pack in packs} >= {0, 1}
    dataset = scene.dataset(MaskConfig())
    alone = [dataset[pack] for pack in packs]
    assert any(batch.unreadable for batch in alone)
    for workers in (0, 1, 2):
        loaded = list(make_loader(dataset, packs, workers))
        assert [batch.cursor for batch in loaded] == [pack.cursor for pack in packs]
        for ours, theirs in zip(loaded, alone, strict=True):
            assert_same(ours, theirs)


def test_patches_alone_take_shared_memory(scene: Scene) -> None:
    (batch,) = make_loader(scene.dataset(MaskConfig()), scene.packs[:1], workers=1)
    assert batch.packed.values.nbytes > SHARED_BYTES > batch.packed.positions.nbytes
    tensors = [batch.packed.values, batch.packed.positions, batch.packed.grids, batch.image_ids]
    tensors += [batch.packed.segments.cu_seqlens, batch.context.index, batch.targets.index]
    assert [tensor.is_shared() for tensor in tensors] == [True] + 6 * [False]


class Half(PackDataset):
    """A dataset of what NumPy cannot hold."""

    def __getitem__(self, pack: Pack) -> Any:
        return torch.arange(3, dtype=torch.bfloat16)


def test_tensors_that_numpy_lacks_are_handed_over_too(scene: Scene) -> None:
    (numbers,) = make_loader(Half(scene.source, scene.catalog, PATCH), scene.packs[:1], workers=1)
    assert torch.equal(numbers, torch.arange(3, dtype=torch.bfloat16))


@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
def test_workers_serve_however_they_are_started(scene: Scene, monkeypatch: pytest.MonkeyPatch, method: str) -> None:
    started = partial(DataLoader, multiprocessing_context=method)
    monkeypatch.setattr("ijepa_enhanced.data.loader.DataLoader", started)
    dataset = scene.dataset(MaskConfig())
    for ours, pack in zip(make_loader(dataset, scene.packs, workers=1), scene.packs, strict=True):
        assert_same(ours, dataset[pack])


def test_an_endless_sequence_of_packs_is_loaded_as_it_is_asked_for(scene: Scene) -> None:
    loader = make_loader(scene.dataset(MaskConfig()), scene.plan.packs(Cursor(0, 0)), workers=1)
    cursors = [batch.cursor for batch in itertools.islice(loader, 4)]
    assert cursors == [pack.cursor for pack in itertools.islice(scene.plan.packs(Cursor(0, 0)), 4)]


class _Process(PackDataset):
    def __getitem__(self, pack: Pack) -> Any:
        return os.getpid(), os.getpgrp()


def test_what_is_sent_to_the_trainers_group_does_not_reach_its_workers(scene: Scene) -> None:
    ((process, group),) = make_loader(_Process(scene.source, scene.catalog, PATCH), scene.packs[:1], workers=1)
    assert process != os.getpid()
    assert group != os.getpgrp()


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux has control groups")
def test_what_is_sent_to_all_processes_of_a_job_ends_no_worker_and_the_trainer_does(scene: Scene) -> None:
    packs = scene.plan.packs(Cursor(0, 0))
    batches: Any = iter(make_loader(_Process(scene.source, scene.catalog, PATCH), packs, workers=1))
    process, _ = next(batches)
    for name in ("TERM", "INT"):
        subprocess.run(["sh", "-c", f"kill -{name} {process}"], check=True)
    assert [next(batches)[0] for _ in range(2 * PREFETCH)] == [process] * 2 * PREFETCH
    (worker,) = batches._workers
    worker.terminate()  # as PyTorch and Python do at the end with a worker that is busy
    worker.join(timeout=10)
    assert worker.exitcode == 0
