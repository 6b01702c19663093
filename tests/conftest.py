"""What all tests share."""

import os
import resource
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ijepa_enhanced.batch import Batch, MaskedBatch
from ijepa_enhanced.data.loader import masked
from ijepa_enhanced.masks import MaskConfig, draw_masks
from ijepa_enhanced.merge_plan import plan_merges
from ijepa_enhanced.packed import Packed
from ijepa_enhanced.randomness import Purpose, generator

# Two, as on the smallest machine we promise to run on; fewer where the caller asks for fewer.
torch.set_num_threads(min(2, int(os.environ.get("OMP_NUM_THREADS", "2"))))

DATA = Path(os.environ.get("IJEPA_DATA", Path(__file__).parents[2] / "shared" / "data"))

MakeStream = Callable[..., Packed]
MakeBatch = Callable[..., MaskedBatch]
DiskOf = Callable[[int], AbstractContextManager[None]]


def pytest_configure(config: pytest.Config) -> None:
    """Hide GPUs, from fixtures and child processes too, unless asked for by `-m gpu`: bit for bit is for the CPU."""
    if "gpu" not in config.option.markexpr.replace("not gpu", ""):
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


@pytest.fixture(scope="session", autouse=True)
def index_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """No test reads or writes the user's own cache of indices."""
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("IJEPA_CACHE", str(folder))
        yield folder


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder with Caltech-101 and Imagenette as tar shards."""
    if not DATA.is_dir():
        pytest.skip(f"no images in {DATA}: set IJEPA_DATA to the folder that holds caltech-101 and imagenette-224")
    return DATA


@pytest.fixture(scope="session")
def disk_of() -> DiskOf:
    """With `disk_of(size)`, no file can grow beyond `size` bytes, as on a full disk."""

    @contextmanager
    def limited(size: int) -> Iterator[None]:
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
            signal.signal(signal.SIGXFSZ, handler)

    return limited


@pytest.fixture(scope="session")
def make_stream() -> MakeStream:
    """Streams of random patches of 8 px; what a view shows depends on (seed, its place among the grids).

    `prefix` is that of `Packed`.
    """

    def make(grids: Sequence[tuple[int, int]], seed: int = 0, prefix: int = 0) -> Packed:
        patches = [
            np.random.default_rng([seed, view]).integers(0, 256, (rows * cols, 8 * 8 * 3), dtype=np.uint8)
            for view, (rows, cols) in enumerate(grids)
        ]
        return Packed.of_grids(np.concatenate(patches), np.array(grids), prefix)

    return make


@pytest.fixture(scope="session")
def make_batch(make_stream: MakeStream) -> MakeBatch:
    """A pack of the given views of random patches, or, with `only`, of those of them alone, in that order.

    A view's patches and masks depend on (seed, its place among all the grids), not on the pack it is in. `rates` are
    those at which teacher and student merge in encoders of `depth` layers, with `prefix` tokens before each view.
    """

    def make(
        grids: Sequence[tuple[int, int]],
        seed: int = 0,
        only: Sequence[int] | None = None,
        depth: int = 0,
        rates: tuple[float, float] = (0.0, 0.0),
        prefix: int = 0,
    ) -> MaskedBatch:
        views = range(len(grids)) if only is None else only
        patches = make_stream(grids, seed).split()
        chosen = torch.cat([patches[view] for view in views]).numpy()
        packed = Packed.of_grids(chosen, np.array(grids)[list(views)], prefix)
        masks = [draw_masks(*grids[view], MaskConfig(), generator(seed, Purpose.MASKS, image=view)) for view in views]
        plan = plan_merges(packed.segments.lengths, rates[0], depth, prefix)
        batch = Batch(packed, torch.tensor(list(views)), None, (0, 0), (), merge_plan=plan)
        return masked(batch, masks, rates[1], depth, prefix)

    return make


@pytest.fixture(scope="session")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two classes, `dark` and `light`, of five small images each, PNG and JPEG, all of different sizes."""
    folder = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(0)
    for name, low in (("dark", 0), ("light", 128)):
        (folder / name).mkdir()
        for number in range(5):
            pixels = rng.integers(low, low + 128, (36 + 5 * number, 56 - 3 * number, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{number}.{'jpg' if number % 2 else 'png'}")
    return folder
