"""Mean and standard deviation of channels, against NumPy, and where they are kept."""

from pathlib import Path

import numpy as np
import pytest

from ijepa_enhanced.data import statistics
from ijepa_enhanced.data.catalog import open_catalog
from ijepa_enhanced.data.sources.base import Source
from ijepa_enhanced.data.sources.open import open_source
from ijepa_enhanced.data.statistics import check_source, statistics_of
from ijepa_enhanced.errors import SourceError


def arrays(folder: Path, count: int, channels: int, seed: int, offset: int = 0) -> np.ndarray:
    """Write images of 16 bits, and return their pixels on [0, 1]: [N, h * w, C]."""
    folder.mkdir()
    rng = np.random.default_rng(seed)
    images = rng.integers(offset, offset + 20_000, (count, 10, 12, channels), dtype=np.uint16)
    for number, image in enumerate(images):
        np.save(folder / f"{number}.npy", image)
    return images.reshape(count, -1, channels) / 65535


def opened(spec: str) -> Source:
    source = open_source(spec)
    open_catalog(source)
    return source


def test_they_are_those_of_all_pixels_and_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pixels = arrays(tmp_path / "a", 5, 4, seed=0)
    found = statistics_of(opened(str(tmp_path / "a")))
    np.testing.assert_allclose(found.mean, pixels.mean(axis=(0, 1)), rtol=1e-6)  # of float32
    np.testing.assert_allclose(found.std, pixels.std(axis=(0, 1)), rtol=1e-6)
    assert found.images == 5
    with monkeypatch.context() as patch:
        patch.setattr(statistics, "_moments", lambda *_: pytest.fail("measured again"))
        assert statistics_of(opened(str(tmp_path / "a")), 4) == found
    np.save(tmp_path / "a" / "more.npy", np.zeros((10, 12, 4), np.uint16))
    assert statistics_of(opened(str(tmp_path / "a"))).images == 6


def test_sources_of_a_mixture_count_as_often_as_they_are_shown(tmp_path: Path) -> None:
    first, second = arrays(tmp_path / "a", 4, 2, seed=1), arrays(tmp_path / "b", 6, 2, seed=2, offset=30_000)
    found = statistics_of(opened(f"{tmp_path / 'a'}@2 + {tmp_path / 'b'}@1"))
    shown = np.concatenate([first, first, second])  # half of the second in each epoch
    np.testing.assert_allclose(found.mean, shown.mean(axis=(0, 1)), rtol=1e-6)
    np.testing.assert_allclose(found.std, shown.std(axis=(0, 1)), rtol=1e-6)


def test_what_cannot_be_normalized_or_measured_is_said(tmp_path: Path) -> None:
    arrays(tmp_path / "a", 3, 2, seed=3)
    for path in (tmp_path / "a").iterdir():
        image = np.load(path)
        image[..., 1] = 700
        np.save(path, image)
    source = opened(str(tmp_path / "a"))
    with pytest.raises(SourceError) as caught:
        statistics_of(source)
    assert str(caught.value) == (
        f"Channel 2 of 2 has the same value everywhere in {tmp_path}/a, so it cannot be normalized. Remove this "
        "channel from the images."
    )
    with pytest.raises(SourceError, match=r"^None of 3 images of .* can be decoded with 5 channels\.$"):
        statistics_of(source, 5)
    check_source(source, 2)
    with pytest.raises(SourceError) as caught:
        check_source(source, 3)
    assert str(caught.value) == (
        f"Most images of {tmp_path}/a have 2 channels, but data.channels is 3. Set data.channels to 2."
    )
