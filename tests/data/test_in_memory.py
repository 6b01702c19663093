"""Images in shared memory: the same pixels, one copy, and nothing left behind."""

import dataclasses
import importlib
import itertools
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from ijepa_enhanced.cli import main
from ijepa_enhanced.data import in_memory, synthetic
from ijepa_enhanced.data.catalog import open_catalog
from ijepa_enhanced.data.config import DataConfig
from ijepa_enhanced.data.in_memory import InMemory
from ijepa_enhanced.data.loader import PackDataset, make_loader
from ijepa_enhanced.data.plan import Cursor, Plan
from ijepa_enhanced.data.sources.base import Source
from ijepa_enhanced.data.sources.folder import FolderSource
from ijepa_enhanced.data.sources.open import open_source
from ijepa_enhanced.data.sources.synthetic import SyntheticSource
from ijepa_enhanced.data.sources.tables import TableSource
from ijepa_enhanced.errors import UnreadableImage
from ijepa_enhanced.masks import MaskConfig
from ijepa_enhanced.train import images

CONFIG = DataConfig(tokens_per_pack=512, min_resolution=32, max_resolution=64)
PATCH = 8

pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning")


@pytest.fixture
def few_images(monkeypatch: pytest.MonkeyPatch) -> None:
    """A built-in set of 40 and 10 images."""
    monkeypatch.setattr(synthetic, "IMAGES", {"train": 40, "val": 10})


def batches(source: Source, workers: int, count: int = 6) -> list[Any]:
    """The first of a run's."""
    index = open_catalog(source, cache=False)
    dataset = PackDataset(source, index, PATCH, MaskConfig())
    packs = Plan(index, CONFIG, PATCH, 3).packs(Cursor(0, 0))
    return list(make_loader(dataset, list(itertools.islice(packs, count)), workers))


def assert_same(ours: list[Any], theirs: list[Any]) -> None:
    for one, other in zip(ours, theirs, strict=True):
        assert one.cursor == other.cursor
        assert torch.equal(one.packed.values, other.packed.values)
        assert torch.equal(one.image_ids, other.image_ids)
        assert torch.equal(one.labels, other.labels)
        assert torch.equal(one.context.index, other.context.index)
        assert torch.equal(one.targets.index, other.targets.index)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("kind", ["folder", "synthetic"])
@pytest.mark.usefixtures("few_images")
def test_batches_are_equal_bit_for_bit(kind: str, workers: int, pictures: Path) -> None:
    source = open_source(str(pictures) if kind == "folder" else kind)
    assert_same(batches(InMemory(source), workers), batches(source, workers))


@pytest.mark.usefixtures("few_images")
def test_the_plan_and_the_index_do_not_change(pictures: Path) -> None:
    for source in (SyntheticSource(), FolderSource(pictures)):
        index, kept = open_catalog(source, cache=False), open_catalog(InMemory(source), cache=False)
        assert index.hash == kept.hash
        in_memory = dataclasses.replace(CONFIG, cache="memory")
        assert Plan(index, CONFIG, PATCH, 3).hash == Plan(kept, in_memory, PATCH, 3).hash
        assert InMemory(source).fingerprint() == source.fingerprint()


def test_an_image_is_drawn_once(few_images: None, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[int] = []
    render = synthetic.render
    monkeypatch.setattr(synthetic, "render", lambda part, row: drawn.append(row) or render(part, row))
    batches(InMemory(SyntheticSource()), workers=0, count=20)
    assert sorted(drawn) == list(range(40))


def test_a_file_is_read_once(pictures: Path, tmp_path: Path) -> None:
    source = open_source(str(pictures))
    expected = [np.asarray(source.open(row)) for row in range(10)]
    kept = InMemory(source)
    source.root = tmp_path  # type: ignore[attr-defined]  # where none of them is
    for row in range(10):
        assert np.array_equal(np.asarray(kept.open(row)), expected[row])
    with pytest.raises(UnreadableImage):
        source.open(0)


OVERWRITE = """
import os

class Overwrite:
    def __init__(self, source):
        self.source = source

    def __getitem__(self, place):
        self.source.memory[place] = 77
        return os.getpid()
"""


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_all_workers_share_one_copy(
    method: str, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = InMemory(FolderSource(pictures))
    assert kept.memory[5] != 77
    # A module of its own, which a spawned worker can import.
    (tmp_path / "overwriting_worker.py").write_text(OVERWRITE)
    monkeypatch.syspath_prepend(tmp_path)
    dataset = importlib.import_module("overwriting_worker").Overwrite(kept)
    loader = DataLoader(dataset, sampler=[5], batch_size=None, num_workers=1, multiprocessing_context=method)
    assert list(loader) != [os.getpid()]
    assert kept.memory[5] == 77, "what a worker wrote is seen here"


def test_what_cannot_be_read_is_as_unreadable_as_before(pictures: Path, tmp_path: Path) -> None:
    for number, path in enumerate(sorted(pictures.rglob("*.png"))):
        (tmp_path / f"{number}.png").write_bytes(path.read_bytes())
    (tmp_path / "1.png").write_bytes(b"")
    (tmp_path / "2.png").unlink()
    (tmp_path / "2.png").symlink_to(tmp_path / "gone.png")
    source = FolderSource(tmp_path)
    kept = InMemory(source)
    index = open_catalog(kept, cache=False)
    assert [*index.unreadable] == [*open_catalog(source, cache=False).unreadable]
    assert len(index.unreadable) == 2
    for row in index.rows.tolist():
        assert np.array_equal(np.asarray(kept.open(row)), np.asarray(source.open(row)))


def test_a_file_that_grew_since_it_was_measured_is_left_to_the_source(
    pictures: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = FolderSource(pictures)
    real = source.length
    monkeypatch.setattr(source, "length", lambda row: real(row) - 9 * (row == 3))
    kept = InMemory(source)
    for row in range(10):
        assert np.array_equal(np.asarray(kept.open(row)), np.asarray(source.open(row)))


def test_lengths_are_those_of_what_is_read(pictures: Path, tmp_path: Path) -> None:
    import datasets

    file = next(pictures.rglob("*.png"))
    cells = [{"bytes": file.read_bytes(), "path": None}, {"bytes": None, "path": str(file)}]
    rows = datasets.Dataset.from_dict({"image": cells}, features=datasets.Features({"image": datasets.Image()}))
    subprocess.run(["tar", "cf", tmp_path / "a.tar", "-C", pictures, "."], check=True)
    for source in (
        SyntheticSource(),
        FolderSource(pictures),
        open_source(str(tmp_path / "a.tar")),
        TableSource(rows, "rows", {}),
    ):
        for row in range(min(10, len(source))):
            assert source.length(row) == len(source.read(row)) > 0


def test_the_memory_it_takes_is_that_of_the_files(pictures: Path) -> None:
    files = sum(path.stat().st_size for path in pictures.rglob("*.*"))
    assert len(InMemory(FolderSource(pictures)).memory) == files


def test_the_documented_size_of_the_synthetic_set() -> None:
    source = SyntheticSource()
    total = sum(source.length(row) for row in range(len(source)))
    text = " ".join(Path(sys.modules[DataConfig.__module__].__file__ or "").read_text().split())
    assert f"({total / 1e6:.0f} MB for `synthetic`)" in text


@pytest.mark.parametrize("place", ["memory", "/dev/shm"])
def test_what_does_not_fit_is_refused_before_anything_is_made(
    place: str, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    # Room for exactly the images, and for one byte less.
    size = sum(path.stat().st_size for path in pictures.rglob("*.*"))
    free = {"memory": 10**12, "/dev/shm": 10**12}
    monkeypatch.setattr(in_memory, "SHARE", 0.5)
    monkeypatch.setattr(in_memory, "free_memory", lambda: free | {place: 2 * size})
    assert len(InMemory(FolderSource(pictures)).memory) == size
    monkeypatch.setattr(images, "free_memory", lambda: free | {place: 2 * size - 1})
    monkeypatch.setattr(torch.Tensor, "share_memory_", lambda _: pytest.fail("memory was taken"))
    options = (
        "--data.tokens_per_pack 512 --data.min_resolution 32 --data.max_resolution 48 --data.workers 0 "
        "--encoder.patch_size 8"
    )
    run = tmp_path / "run"
    code = main(
        ["train", *options.split(), "--data.source", str(pictures), "--data.cache", "memory", "--run", str(run)]
    )
    assert code == 2
    assert not run.exists()
    assert capsys.readouterr().err.splitlines()[-1] == (
        f"ijepa: The images of {pictures} need 0 MB, but a run can use only 50% of the 0 MB that are free in "
        f"{place}. Set data.cache to none, or shrink the images with ijepa prepare."
    )


PROGRAM = """
import sys
from ijepa_enhanced.data.in_memory import InMemory
from ijepa_enhanced.data.catalog import open_catalog
from ijepa_enhanced.data.loader import PackDataset, make_loader
from ijepa_enhanced.data.config import DataConfig
from ijepa_enhanced.data.plan import Cursor, Plan
from ijepa_enhanced.data.sources.folder import FolderSource

source = InMemory(FolderSource(sys.argv[1]))
index = open_catalog(source, cache=False)
plan = Plan(index, DataConfig(tokens_per_pack=512, min_resolution=32, max_resolution=64), 8, 0)
for number, batch in enumerate(make_loader(PackDataset(source, index, 8), plan.packs(Cursor(0, 0)), 1)):
    if number == 1:
        print("ready", flush=True)
"""


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="Linux tells where memory lies")
@pytest.mark.parametrize("by", [signal.SIGTERM, signal.SIGKILL])
def test_nothing_is_left_in_shared_memory_however_it_ends(by: signal.Signals, pictures: Path) -> None:
    process = subprocess.Popen([sys.executable, "-c", PROGRAM, str(pictures)], stdout=subprocess.PIPE, text=True)
    with process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        maps = Path(f"/proc/{process.pid}/maps").read_text().splitlines()
        process.send_signal(by)
        assert process.wait(timeout=60) == -by
    # A file without a name is freed by the system with the last process that has it.
    shared = [line for line in maps if "/dev/shm/" in line]
    assert shared
    assert all(line.endswith(" (deleted)") for line in shared)
    assert not [name for name in os.listdir("/dev/shm") if f"_{process.pid}_" in name]


def test_a_picture_of_one_pixel(tmp_path: Path) -> None:
    Image.new("RGB", (1, 1), "red").save(tmp_path / "a.png")
    assert InMemory(FolderSource(tmp_path)).open(0).getpixel((0, 0)) == (255, 0, 0)
