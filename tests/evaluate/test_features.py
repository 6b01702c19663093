"""Features of a whole source are the encoder's own, in the source's order, with what could not be read beside them."""

import copy
import dataclasses
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ijepa_enhanced import Encoder
from ijepa_enhanced.data.catalog import Catalog, open_catalog
from ijepa_enhanced.data.sources.base import Source
from ijepa_enhanced.data.sources.folder import FolderSource
from ijepa_enhanced.data.sources.open import open_source
from ijepa_enhanced.errors import NotFiniteError, RequestError
from ijepa_enhanced.evaluate import cache as cache_module
from ijepa_enhanced.evaluate import features
from ijepa_enhanced.evaluate.features import Features, extract, thumbnails
from ijepa_enhanced.evaluate.tokens import InferenceConfig, LabelledSource
from ijepa_enhanced.models.config import EncoderConfig
from ijepa_enhanced.models.preprocessing import Preprocessing

# Norm of the difference by the norm, as in test_encoder.py: float32 rounding in other sizes of pack.
BOUND = 2e-6
SMALL = InferenceConfig(32, tokens_per_pack=64, workers=0)
"""Several packs of few images."""


@pytest.fixture(scope="module")
def encoder() -> Encoder:
    return Encoder.random(EncoderConfig(variant="Ti", depth=2, patch_size=8).architecture, Preprocessing(32), 0)


@pytest.fixture
def damaged(tmp_path: Path) -> Path:
    """Six images; the third has no readable header, the fifth no readable pixels."""
    rng = np.random.default_rng(0)
    for number in range(6):
        pixels = rng.integers(0, 256, (32 + 8 * number, 40, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{number}.png")
    (tmp_path / "2.png").write_bytes(b"")
    whole = (tmp_path / "4.png").read_bytes()
    (tmp_path / "4.png").write_bytes(whole[: len(whole) // 2])
    return tmp_path


@pytest.mark.parametrize("resolution", [32, None])
@pytest.mark.parametrize("tokens_per_pack", [64, 16384])
def test_features_are_those_of_embed_in_the_order_of_the_source(
    encoder: Encoder, pictures: Path, resolution: int | None, tokens_per_pack: int
) -> None:
    source = open_source(str(pictures))
    found = extract(
        encoder,
        LabelledSource(source, open_catalog(source)),
        InferenceConfig(resolution, tokens_per_pack=tokens_per_pack, workers=0),
    )
    paths = [pictures / name / f"{n}.{'jpg' if n % 2 else 'png'}" for name in ("dark", "light") for n in range(5)]
    expected = encoder.embed(paths, resolution or "native")
    assert found.values.shape == (10, 192)
    assert found.values.dtype == torch.float32
    assert ((found.values - expected).norm(dim=1) < BOUND * expected.norm(dim=1)).all()
    assert found.image_ids.tolist() == list(range(10))
    assert found.labels is not None
    assert found.labels.tolist() == [0] * 5 + [1] * 5
    assert found.unreadable == {}


def test_workers_change_nothing(encoder: Encoder, pictures: Path) -> None:
    source = open_source(str(pictures))
    index = open_catalog(source)
    alone, beside = (
        extract(encoder, LabelledSource(source, index), dataclasses.replace(SMALL, workers=workers))
        for workers in (0, 1)
    )
    assert torch.equal(alone.values, beside.values)
    assert torch.equal(alone.image_ids, beside.image_ids)


def test_progress_counts_the_images(encoder: Encoder, pictures: Path) -> None:
    source = open_source(str(pictures))
    done: list[int] = []
    extract(encoder, LabelledSource(source, open_catalog(source)), SMALL, progress=done.append)
    assert done == sorted(set(done))
    assert len(done) > 1
    assert done[-1] == 10


def test_half_precision_is_close_and_stored_in_float32(encoder: Encoder, pictures: Path) -> None:
    source = open_source(str(pictures))
    index = open_catalog(source)
    exact, half = (
        extract(encoder, LabelledSource(source, index), InferenceConfig(32, dtype, workers=0))
        for dtype in (torch.float32, torch.bfloat16)
    )
    assert half.values.dtype == torch.float32
    difference = (half.values - exact.values).norm() / exact.values.norm()
    # bfloat16 rounds at 4e-3, and means of 16 tokens and more average it; nothing at all would be float32 in disguise.
    assert 1e-4 < difference < 4e-3


@pytest.mark.parametrize("tokens_per_pack", [32, 16384])
def test_unreadable_images_are_left_out_and_named(encoder: Encoder, damaged: Path, tokens_per_pack: int) -> None:
    """With small packs the damaged image is a pack of its own, which is then empty."""
    source = open_source(str(damaged))
    index = open_catalog(source)
    found = extract(
        encoder, LabelledSource(source, index), InferenceConfig(40, tokens_per_pack=tokens_per_pack, workers=0)
    )
    assert found.image_ids.tolist() == [0, 1, 3, 5]
    assert found.labels is None
    expected = encoder.embed([damaged / f"{number}.png" for number in (0, 1, 3, 5)], resolution=40)
    assert ((found.values - expected).norm(dim=1) < BOUND * expected.norm(dim=1)).all()
    assert found.unreadable.keys() == {4}
    assert found.unreadable[4].startswith("cannot be decoded: ")


@pytest.mark.parametrize("workers", [0, 2])
def test_thumbnails_by_hand(tmp_path: Path, workers: int) -> None:
    """Two flat halves: bicubic reaches two columns across their border, so each half's outer two are its color."""
    pixels = np.zeros((40, 80, 3), dtype=np.uint8)
    pixels[:, :40] = (255, 0, 51)
    pixels[:, 40:] = (0, 102, 255)
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        Image.fromarray(pixels if name == "a" else pixels[:, ::-1]).save(tmp_path / name / "0.png")
    (tmp_path / "b" / "1.png").write_bytes((tmp_path / "b" / "0.png").read_bytes()[:-60])
    source = open_source(str(tmp_path))
    found = thumbnails(LabelledSource(source, open_catalog(source)), workers, side=8)
    left, right = [1.0, 0.0, 0.2], [0.0, 0.4, 1.0]
    assert found.values.shape == (2, 8 * 8 * 3)
    outer = found.values.view(2, 8, 8, 3)[:, :, [0, 1, 6, 7]]
    expected = torch.tensor([[left, left, right, right], [right, right, left, left]])[:, None].expand(2, 8, 4, 3)
    assert torch.equal(outer, expected)
    assert found.labels is not None
    assert found.labels.tolist() == [0, 1]
    assert found.image_ids.tolist() == [0, 1]
    assert found.unreadable.keys() == {2}


@pytest.mark.parametrize("merge_rate", [0.0, 0.3])
def test_a_layer_counts_as_if_it_were_the_last(pictures: Path, merge_rate: float) -> None:
    """Each of the last four layers pools to what an encoder pools to that ends there."""
    encoder = Encoder.random(EncoderConfig(variant="Ti", depth=6, patch_size=8).architecture, Preprocessing(32), 0)
    source = open_source(str(pictures))
    found = extract(
        encoder,
        LabelledSource(source, open_catalog(source)),
        InferenceConfig(40, workers=0, merge_rate=merge_rate),
        layers=4,
    )
    assert found.layers is not None
    assert found.layers.shape == (10, 4, 192)
    assert torch.equal(found.layers[:, -1], found.values)
    for place, depth in enumerate((3, 4, 5, 6)):
        ended = copy.deepcopy(encoder)
        ended.network.config = dataclasses.replace(encoder.config, depth=depth)
        ended.network.blocks.layers = ended.network.blocks.layers[:depth]
        expected = ended.embed([source.open(row) for row in range(10)], 40, merge_rate)
        assert ((found.layers[:, place] - expected).norm(dim=1) < BOUND * expected.norm(dim=1)).all()


class CountedSource(FolderSource):
    """Counts how often an image is opened for its pixels."""

    opened = 0

    def open(self, row: int) -> Image.Image:
        self.opened += 1
        return super().open(row)


@pytest.fixture
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache for one test, outside the folder of images, with one file per pack."""
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("IJEPA_CACHE", str(folder))
    monkeypatch.setattr(features, "PACKS_PER_PART", 1)
    return folder / "features"


def cached(
    encoder: Encoder, source: Source, catalog: Catalog, resolution: int = 32, rate: float = 0.0, layers: int = 1
) -> Features:
    setting = dataclasses.replace(SMALL, resolution=resolution, merge_rate=rate)
    return extract(encoder, LabelledSource(source, catalog), setting, cache=True, layers=layers)


def test_what_was_extracted_is_not_extracted_again(encoder: Encoder, damaged: Path, cache: Path) -> None:
    (damaged / "a").mkdir()
    for path in damaged.glob("*.png"):
        path.rename(damaged / "a" / path.name)
    source = CountedSource(damaged)
    index = open_catalog(source)
    first = cached(encoder, source, index)
    opened = source.opened
    second = cached(encoder, source, index)
    assert source.opened == opened > 0
    assert len(list(cache.glob("*/*.safetensors"))) > 1
    for name in ("values", "labels", "image_ids"):
        assert torch.equal(getattr(first, name), getattr(second, name))
    assert (first.unreadable, first.seconds) == (second.unreadable, second.seconds)
    assert second.unreadable.keys() == {4}


def test_features_of_anything_else_are_not_taken_for_these(encoder: Encoder, pictures: Path, cache: Path) -> None:
    source = open_source(str(pictures))
    index = open_catalog(source)
    cached(encoder, source, index)
    other = copy.deepcopy(encoder)
    with torch.no_grad():
        other.network.patch_embed.bias[0] += 1e-3  # one number of all the weights
    deeper = copy.deepcopy(encoder)
    deeper.network.config = dataclasses.replace(encoder.config, position_grid=(31, 31))
    cases = [
        (other, index, 32, 0.0),
        (deeper, index, 32, 0.0),
        (encoder, index.select(np.array([1, 2, 3])), 32, 0.0),
        (encoder, index, 40, 0.0),
        (encoder, index, 32, 0.25),
    ]
    for number, (network, some, resolution, rate) in enumerate(cases, start=2):
        found = cached(network, source, some, resolution, rate)
        fresh = extract(
            network, LabelledSource(source, some), dataclasses.replace(SMALL, resolution=resolution, merge_rate=rate)
        )
        assert torch.equal(found.values, fresh.values)
        assert len(list(cache.iterdir())) == number
    extract(encoder, LabelledSource(source, index), dataclasses.replace(SMALL, dtype=torch.bfloat16), cache=True)
    assert len(list(cache.iterdir())) == len(cases) + 2


@pytest.mark.parametrize("version", ["torch.__version__", "PIL.__version__"])
def test_features_of_another_version_are_not_taken_for_these(
    encoder: Encoder, pictures: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, version: str
) -> None:
    source = CountedSource(pictures)
    catalog = open_catalog(source)
    cached(encoder, source, catalog)
    monkeypatch.setattr(version, "0.1")
    cached(encoder, source, catalog)
    assert source.opened == 20


def test_the_time_of_another_machine_is_not_told(
    encoder: Encoder, pictures: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = CountedSource(pictures)
    images = LabelledSource(source, open_catalog(source))
    first = extract(encoder, images, SMALL, cache=True)
    assert first.seconds is not None
    more_workers = extract(encoder, images, dataclasses.replace(SMALL, workers=1), cache=True)
    monkeypatch.setattr("platform.node", lambda: "another")
    elsewhere = extract(encoder, images, SMALL, cache=True)
    assert (more_workers.seconds, elsewhere.seconds, source.opened) == (None, None, 10)


def test_an_image_that_changed_is_read_again(encoder: Encoder, damaged: Path, cache: Path) -> None:
    source = open_source(str(damaged))
    before = cached(encoder, source, open_catalog(source))
    rng = np.random.default_rng(1)
    Image.fromarray(rng.integers(0, 256, (32, 40, 3), dtype=np.uint8)).save(damaged / "0.png", compress_level=0)
    after = cached(encoder, source, open_catalog(source))
    assert not torch.equal(before.values[0], after.values[0])
    assert torch.equal(before.values[1:], after.values[1:])


def test_an_interrupted_extraction_goes_on_where_it_stopped(encoder: Encoder, pictures: Path, cache: Path) -> None:
    source = CountedSource(pictures)
    index = open_catalog(source)
    whole = extract(encoder, LabelledSource(source, index), SMALL)
    source.opened = 0

    def interrupt(images: int) -> None:
        if images >= 6:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        extract(encoder, LabelledSource(source, index), SMALL, progress=interrupt, cache=True)
    files = list(cache.glob("*/*"))
    assert all(path.name.endswith(".safetensors") and not path.name.startswith(".") for path in files)
    before, source.opened = source.opened, 0
    done: list[int] = []
    found = extract(encoder, LabelledSource(source, index), SMALL, progress=done.append, cache=True)
    # Only the pack that was being counted is lost.
    assert 10 - before <= source.opened < 10
    assert done == sorted(set(done))
    assert done[-1] == 10
    assert torch.equal(found.values, whole.values)
    assert torch.equal(found.image_ids, whole.image_ids)


def test_a_damaged_cache_is_made_anew(
    encoder: Encoder, pictures: Path, cache: Path, caplog: pytest.LogCaptureFixture
) -> None:
    source = open_source(str(pictures))
    index = open_catalog(source)
    first = cached(encoder, source, index)
    path = min(cache.glob("*/*"))
    whole = path.read_bytes()
    path.write_bytes(whole[:100])
    again = cached(encoder, source, index)
    assert torch.equal(first.values, again.values)
    assert f"The cached features {path} cannot be read and are computed again: " in caplog.text
    caplog.clear()
    cached(encoder, source, index)
    assert caplog.text == ""


def test_a_cache_that_cannot_be_written_is_a_warning(
    encoder: Encoder, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    source = open_source(str(pictures))
    index = open_catalog(source)
    (tmp_path / "file").touch()
    monkeypatch.setenv("IJEPA_CACHE", str(tmp_path / "file"))
    monkeypatch.setattr(features, "PACKS_PER_PART", 1)
    assert len(cached(encoder, source, index).values) == 10
    assert caplog.text.count("The features cannot be cached in ") == 1, "once, though each of several parts fails"


def test_what_is_no_number_is_an_error_and_not_cached(encoder: Encoder, pictures: Path, cache: Path) -> None:
    spoilt = copy.deepcopy(encoder)
    with torch.no_grad():
        spoilt.network.patch_embed.bias[0] = torch.inf
    source = open_source(str(pictures))
    with pytest.raises(
        NotFiniteError, match=f"The features of dark/0.png in {pictures} contain NaN or infinite values"
    ):
        cached(spoilt, source, open_catalog(source))
    assert not list(cache.glob("*/*"))


@pytest.mark.parametrize(("first", "second", "again"), [(4, 1, False), (1, 1, False), (1, 4, True)])
def test_cached_layers_serve_a_request_for_fewer(
    encoder: Encoder, damaged: Path, cache: Path, first: int, second: int, again: bool
) -> None:
    """The encoder has two layers, so four are two."""
    source = CountedSource(damaged)
    catalog = open_catalog(source)
    cached(encoder, source, catalog, layers=first)
    before, source.opened = source.opened, 0
    found = cached(encoder, source, catalog, layers=second)
    assert source.opened == (before if again else 0)
    fresh = extract(encoder, LabelledSource(source, catalog), SMALL, layers=second)
    assert torch.equal(found.values, fresh.values)
    if second == 1:
        assert found.layers is None
    else:
        assert found.layers is not None
        assert fresh.layers is not None
        assert found.layers.shape == (4, 2, 192)
        assert torch.equal(found.layers, fresh.layers)


def test_only_the_layers_that_are_asked_for_are_stored(encoder: Encoder, pictures: Path, cache: Path) -> None:
    source = open_source(str(pictures))
    sizes = []
    for layers in (1, 4):
        cached(encoder, source, open_catalog(source), layers=layers)
        sizes.append(sum(path.stat().st_size for path in cache.glob("*/*")))
    # Ten images of 192 float32 more. The rest of a file is its header, which names times of any number of digits.
    assert abs(sizes[1] - sizes[0] - 10 * 192 * 4) < 100


@pytest.fixture
def folders(cache: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Path]:
    """Cached folders of 1 MB each, used one after the other, by other processes."""
    found = {name: cache / name for name in ("oldest", "older", "newest")}
    for second, folder in enumerate(found.values()):
        folder.mkdir(parents=True)
        (folder / "00000.safetensors").write_bytes(bytes(10**6))
        os.utime(folder, (second, second))
    monkeypatch.setattr(cache_module, "_in_use", set())
    return found


def test_what_was_used_longest_ago_is_deleted_first(
    encoder: Encoder, pictures: Path, folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("IJEPA_CACHE_GB", "0.0021")
    source = open_source(str(pictures))
    os.utime(folders["oldest"])  # as if used now
    cached(encoder, source, open_catalog(source))
    assert [name for name, folder in folders.items() if folder.exists()] == ["oldest", "newest"]


def test_what_an_evaluation_uses_stays_whatever_the_limit(
    encoder: Encoder, pictures: Path, folders: dict[str, Path], cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("IJEPA_CACHE_GB", "0")
    source = CountedSource(pictures)
    catalog = open_catalog(source)
    for resolution in (32, 40):
        cached(encoder, source, catalog, resolution)
    assert not any(folder.exists() for folder in folders.values())
    assert len(list(cache.iterdir())) == 2
    source.opened = 0
    cached(encoder, source, catalog)
    assert not source.opened


def test_reading_from_the_cache_counts_as_use(
    encoder: Encoder, pictures: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = open_source(str(pictures))
    cached(encoder, source, open_catalog(source))
    (folder,) = cache.iterdir()
    os.utime(folder, (1, 1))
    cached(encoder, source, open_catalog(source))
    assert folder.stat().st_mtime > 1


@pytest.mark.parametrize("limit", ["much", "-1", "nan"])
def test_a_limit_that_is_not_a_number_is_an_error(
    encoder: Encoder, pictures: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, limit: str
) -> None:
    monkeypatch.setenv("IJEPA_CACHE_GB", limit)
    source = CountedSource(pictures)
    with pytest.raises(RequestError) as caught:
        cached(encoder, source, open_catalog(source))
    assert str(caught.value) == f"IJEPA_CACHE_GB must be a number of gigabytes, at least 0, not '{limit}'."
    assert not source.opened
