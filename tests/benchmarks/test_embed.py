"""Ours is what `Encoder.embed` does, peers are there or said not to be, and the table's figures agree."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ijepa_enhanced.benchmarks import ceilings, embed
from ijepa_enhanced.encoder import Encoder, Preprocessing
from ijepa_enhanced.models.config import EncoderConfig
from ijepa_enhanced.models.flops import encoder_flops
from ijepa_enhanced.models.vit import VisionTransformer

CPU = torch.device("cpu")
CONFIG = EncoderConfig("Ti", 16, depth=2).architecture
IMAGES = [
    np.random.default_rng(number).integers(0, 256, (16 * rows, 16 * cols, 3), dtype=np.uint8)
    for number, (rows, cols) in enumerate([(4, 6), (7, 2), (1, 3)])
]


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(embed, "TURNS", 1)
    monkeypatch.setattr(ceilings, "PRODUCT_WIDTH", {"cpu": 64})


def missing(module: str) -> Any:
    def peer(*args: Any) -> Any:
        raise ModuleNotFoundError(f"No module named '{module}'", name=module)

    return peer


def test_images_are_twice_as_large_and_whole_patches(pictures: Path) -> None:
    images = embed.read(str(pictures), 4, 8)
    assert len(images) == 4
    assert all(side % 8 == 0 for image in images for side in image.shape[:2])
    # The first is 36 x 56 px.
    assert images[0].shape == (72, 112, 3)
    assert len(embed.read(str(pictures), 100, 8)) == 10


def test_no_image_is_above_the_limit(pictures: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embed, "MOST_TOKENS", 20)
    assert max(image.shape[0] * image.shape[1] for image in embed.read(str(pictures), 10, 8)) <= 20 * 64


@pytest.mark.parametrize("rate", [0.0, 0.25])
def test_ours_is_what_the_encoder_says(rate: float, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    encoder = Encoder(VisionTransformer(CONFIG), Preprocessing()).eval()
    with torch.inference_mode():
        whole = embed.ours(encoder, IMAGES, rate)()
        assert torch.equal(whole, encoder.embed(IMAGES, resolution="native", merge_rate=rate))
        monkeypatch.setattr("ijepa_enhanced.encoder.CPU_TOKENS", 30)  # more packs than one
        torch.testing.assert_close(embed.ours(encoder, IMAGES, rate)(), whole, rtol=0, atol=2e-5)


@pytest.mark.parametrize("name", list(embed.PEERS))
def test_a_peer_embeds_each_image(name: str) -> None:
    pytest.importorskip(name.split()[0])
    with torch.inference_mode():
        assert embed.PEERS[name](CONFIG, IMAGES, CPU)().shape == (3, 192)


def test_the_table(
    pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def peer(config: EncoderConfig, images: embed.Images, device: torch.device) -> embed.Embed:
        return lambda: torch.zeros(len(images), config.width)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(
        embed,
        "PEERS",
        {"timm NaFlexViT": missing("torchvision"), "there": peer, "vit_pytorch NaViT": missing("vit_pytorch")},
    )
    tables: list[list[dict[str, Any]]] = []
    monkeypatch.setattr(embed, "print_table", tables.append)
    found = embed.run(str(pictures), csv=True, variant="Ti", patch=8, count=3)
    (rows,) = tables
    kinds = [(row["method"], row["merge_rate"]) for row in rows[: len(rows) // 2]]
    assert kinds == [
        *(("ours", rate) for rate in embed.RATES),
        ("there", 0.0),
        ("timm NaFlexViT", ""),
        ("vit_pytorch NaViT", ""),
    ]
    assert [row["precision"] for row in rows] == ["float32"] * 6 + ["bfloat16"] * 6
    assert [row["images_per_second"] for row in rows[4:6]] == ["needs torchvision", "not installed"]

    first, best = rows[0], rows[3]
    assert best["over_best_peer"] == 1.0
    assert found["over_best_peer"] == first["over_best_peer"]
    assert first["over_best_peer"] == pytest.approx(first["images_per_second"] / best["images_per_second"])
    assert found["bfloat16_gain"] == rows[6]["images_per_second"] / first["images_per_second"]
    # Utilisation is operations times images a second over one peak, of each rate's own operations.
    lengths = [image.shape[0] * image.shape[1] // 64 for image in embed.read(str(pictures), 3, 8)]
    operations = [encoder_flops(EncoderConfig("Ti", 8).architecture, lengths, rate).sum() for rate in embed.RATES]
    peaks = [count * row["images_per_second"] / row["mfu"] for count, row in zip(operations, rows, strict=False)]
    assert peaks == pytest.approx([peaks[0]] * 3)
    assert [path.name.partition("_")[0] for path in Path("benchmarks/results").iterdir()] == ["embed-Ti8"]
    assert "Embedding 3 images of" in capsys.readouterr().out


def test_without_peers_there_is_nothing_to_be_ahead_of(pictures: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embed, "PEERS", {"timm NaFlexViT": missing("timm")})
    assert embed.run(str(pictures), variant="Ti", count=2)["over_best_peer"] is None
