"""Features of a whole source are the encoder's own, in the source's order, with what could not be read beside them."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ijepa_enhanced import Encoder
from ijepa_enhanced.data.index import build_index
from ijepa_enhanced.data.sources import open_source
from ijepa_enhanced.evaluate.features import extract, thumbnails
from ijepa_enhanced.models.encoder import EncoderConfig

# Norm of the difference by the norm, as in test_encoder.py: float32 rounding in other sizes of pack.
BOUND = 2e-6


@pytest.fixture(scope="module")
def encoder() -> Encoder:
    torch.manual_seed(0)
    return Encoder(EncoderConfig(variant="Ti", depth=2, patch_size=8)).eval()


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


@pytest.mark.parametrize("side", [32, None])
@pytest.mark.parametrize("tokens_per_pack", [64, 16384])
def test_features_are_those_of_embed_in_the_order_of_the_source(
    encoder: Encoder, pictures: Path, side: int | None, tokens_per_pack: int
) -> None:
    source = open_source(str(pictures))
    found = extract(encoder, source, build_index(source), side, tokens_per_pack=tokens_per_pack, workers=0)
    paths = [pictures / name / f"{n}.{'jpg' if n % 2 else 'png'}" for name in ("dark", "light") for n in range(5)]
    expected = encoder.embed(paths, side=side)
    assert found.values.shape == (10, 192)
    assert found.values.dtype == torch.float32
    assert ((found.values - expected).norm(dim=1) < BOUND * expected.norm(dim=1)).all()
    assert found.image_ids.tolist() == list(range(10))
    assert found.labels is not None
    assert found.labels.tolist() == [0] * 5 + [1] * 5
    assert found.unreadable == {}


def test_workers_change_nothing(encoder: Encoder, pictures: Path) -> None:
    source = open_source(str(pictures))
    index = build_index(source)
    alone, beside = (extract(encoder, source, index, 32, tokens_per_pack=64, workers=workers) for workers in (0, 1))
    assert torch.equal(alone.values, beside.values)
    assert torch.equal(alone.image_ids, beside.image_ids)


def test_progress_counts_the_images(encoder: Encoder, pictures: Path) -> None:
    source = open_source(str(pictures))
    done: list[int] = []
    extract(encoder, source, build_index(source), 32, tokens_per_pack=64, workers=0, progress=done.append)
    assert done == sorted(set(done))
    assert len(done) > 1
    assert done[-1] == 10


def test_half_precision_is_close_and_stored_in_float32(encoder: Encoder, pictures: Path) -> None:
    source = open_source(str(pictures))
    index = build_index(source)
    exact, half = (extract(encoder, source, index, 32, dtype, workers=0) for dtype in (torch.float32, torch.bfloat16))
    assert half.values.dtype == torch.float32
    difference = (half.values - exact.values).norm() / exact.values.norm()
    # bfloat16 rounds at 4e-3, and means of 16 tokens and more average it; nothing at all would be float32 in disguise.
    assert 1e-4 < difference < 4e-3


@pytest.mark.parametrize("tokens_per_pack", [32, 16384])
def test_unreadable_images_are_left_out_and_named(encoder: Encoder, damaged: Path, tokens_per_pack: int) -> None:
    """With small packs the damaged image is a pack of its own, which is then empty."""
    source = open_source(str(damaged))
    index = build_index(source)
    found = extract(encoder, source, index, 40, tokens_per_pack=tokens_per_pack, workers=0)
    assert found.image_ids.tolist() == [0, 1, 3, 5]
    assert found.labels is None
    expected = encoder.embed([damaged / f"{number}.png" for number in (0, 1, 3, 5)], side=40)
    assert ((found.values - expected).norm(dim=1) < BOUND * expected.norm(dim=1)).all()
    assert found.unreadable.keys() == {4}
    assert found.unreadable[4].startswith("cannot be decoded: ")


def test_thumbnails_by_hand(tmp_path: Path) -> None:
    """Two flat halves: bicubic reaches two columns across their border, so each half's outer two are its colour."""
    pixels = np.zeros((40, 80, 3), dtype=np.uint8)
    pixels[:, :40] = (255, 0, 51)
    pixels[:, 40:] = (0, 102, 255)
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        Image.fromarray(pixels if name == "a" else pixels[:, ::-1]).save(tmp_path / name / "0.png")
    (tmp_path / "b" / "1.png").write_bytes((tmp_path / "b" / "0.png").read_bytes()[:-60])
    source = open_source(str(tmp_path))
    found = thumbnails(source, build_index(source), side=8)
    left, right = [1.0, 0.0, 0.2], [0.0, 0.4, 1.0]
    assert found.values.shape == (2, 8 * 8 * 3)
    outer = found.values.view(2, 8, 8, 3)[:, :, [0, 1, 6, 7]]
    expected = torch.tensor([[left, left, right, right], [right, right, left, left]])[:, None].expand(2, 8, 4, 3)
    assert torch.equal(outer, expected)
    assert found.labels is not None
    assert found.labels.tolist() == [0, 1]
    assert found.image_ids.tolist() == [0, 1]
    assert found.unreadable.keys() == {2}
