"""All methods compute the same features where they should, peers are there or said not to be, the figures agree."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ijepa_enhanced.benchmarks import ceilings, embed, methods, peers
from ijepa_enhanced.encoder import Encoder
from ijepa_enhanced.errors import RequestError
from ijepa_enhanced.evaluate.knn import knn_classify
from ijepa_enhanced.models.config import EncoderConfig
from ijepa_enhanced.models.flops import encoder_flops
from ijepa_enhanced.models.preprocessing import Preprocessing

CPU = torch.device("cpu")
IMAGES = [
    np.random.default_rng(number).integers(0, 256, (16 * rows, 16 * cols, 3), dtype=np.uint8)
    for number, (rows, cols) in enumerate([(4, 6), (7, 2), (1, 3)])
]


def tiny(patch: int = 16, **options: Any) -> Encoder:
    """Return a random encoder, trained on grids smaller than some of `IMAGES` and larger than others."""
    config = EncoderConfig("Ti", patch, depth=2, max_grid=6, **options).architecture
    # The mean of random weights is not that of ImageNet, so that a peer that assumes the latter is found out.
    grid = None if config.positions == "sincos" else (3, 5)
    return Encoder.random(config, Preprocessing(trained_grid=grid, mean=(0.4, 0.5, 0.6), std=(0.3, 0.2, 0.1)), seed=0)


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(embed, "TURNS", 1)
    monkeypatch.setattr(ceilings, "PRODUCT_WIDTH", {"cpu": 64})


def missing(module: str) -> Any:
    def peer(encoder: Encoder, **options: Any) -> Any:
        raise ModuleNotFoundError(f"No module named '{module}'", name=module)

    return peer


def stand_in(encoder: Encoder, **options: Any) -> peers.Prepare:
    """A peer whose feature is the mean color."""
    return lambda images: lambda: torch.stack([torch.from_numpy(image).float().mean(dim=(0, 1)) for image in images])


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
    encoder = tiny()
    with torch.inference_mode():
        whole = methods.ours(encoder, rate, IMAGES)()
        assert torch.equal(whole, encoder.embed(IMAGES, resolution="native", merge_rate=rate))
        monkeypatch.setattr("ijepa_enhanced.encoder.CPU_TOKENS", 30)  # more packs than one
        torch.testing.assert_close(methods.ours(encoder, rate, IMAGES)(), whole, rtol=0, atol=2e-5)


@pytest.mark.parametrize("positions", ["factorized", "sincos"])
@pytest.mark.parametrize("name", list(peers.PEERS))
def test_a_peer_computes_our_features(name: str, positions: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip(name.split()[0], reason="the other libraries are no dependencies: see docs/measurements.md")
    monkeypatch.setitem(peers.TOKENS, "cpu", 48)  # two batches of timm, one of them padded
    encoder = tiny(positions=positions)
    with torch.inference_mode():
        theirs = peers.PEERS[name](encoder)(IMAGES)()
        # Features are around 1. Rounding differs by the order of sums: up to 1e-6 was seen.
        torch.testing.assert_close(theirs, methods.ours(encoder, 0.0, IMAGES)(), rtol=0, atol=2e-5)


def test_squares_in_batches_are_our_features_of_squares() -> None:
    pytest.importorskip("transformers", reason="the other libraries are no dependencies: see docs/measurements.md")
    encoder = tiny()
    squares = [methods.squashed(image, 64) for image in IMAGES]
    with torch.inference_mode():
        theirs = peers.transformers_ijepa(encoder, tokens=32)(squares)()  # batches of two and one
        torch.testing.assert_close(theirs, methods.ours(encoder, 0.0, squares)(), rtol=0, atol=2e-5)


def test_a_model_of_transformers_is_compared_with_what_it_becomes(
    pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    transformers = pytest.importorskip("transformers", reason="the other libraries are no dependencies")
    torch.manual_seed(0)
    sizes = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2, "patch_size": 8, "image_size": 40}
    transformers.Dinov2Model(transformers.Dinov2Config(**sizes)).save_pretrained(tmp_path)
    encoder = Encoder.from_pretrained(tmp_path)
    images = embed.read(str(pictures), 3, 8, scale=1.0)
    with torch.inference_mode():
        theirs = peers.transformers_model(encoder, str(tmp_path))(images)()
        torch.testing.assert_close(theirs, methods.ours(encoder, 0.0, images)(), rtol=0, atol=2e-5)
    tables: list[list[dict[str, Any]]] = []
    monkeypatch.setattr(embed, "print_table", tables.append)
    embed.run(str(pictures), weights=str(tmp_path), count=3, scale=1.0)
    names = [row["method"] for row in tables[0] if row["precision"] == "float32"]
    assert names == [*["ours"] * 3, "transformers AutoModel", *names[4:]]
    assert len(names) == 6


def test_positions_of_a_padded_batch_are_those_of_each_grid() -> None:
    encoder = tiny()
    grids = [(4, 6), (2, 2)]
    padded = torch.zeros(2, 24, 2, dtype=torch.int64)
    for row, (rows, cols) in enumerate(grids):
        padded[row, : rows * cols] = torch.cartesian_prod(torch.arange(rows), torch.arange(cols))
    found = peers.positions_of(encoder, padded)
    alone = peers.positions_of(encoder, padded[1:, :4])
    assert torch.equal(found[1, :4], alone[0])
    rows, cols = encoder.network.positions.rows, encoder.network.positions.cols  # type: ignore[union-attr]
    assert torch.allclose(alone[0], torch.stack([rows[r] + cols[c] for r in (0, 1) for c in (0, 1)]))
    # The last of 4 rows is squeezed onto the last of 3, and of 6 columns onto the last of 5.
    assert torch.allclose(found[0, -1], rows[2] + cols[4])


def test_weights_get_other_names() -> None:
    names = set(peers.renamed(tiny(), peers.TIMM))
    assert {"embeds.proj.weight", "blocks.1.attn.qkv.bias", "blocks.0.mlp.fc1.weight", "norm.weight"} <= names
    assert not any("positions" in name for name in names)


def test_the_methods_of_an_encoder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(methods, "PEERS", {"timm NaFlexViT": missing("torchvision"), "there": stand_in})
    monkeypatch.setattr(methods, "transformers_ijepa", missing("transformers"))
    found, absent = methods.methods_of(tiny(), patches=250.0)
    assert [(method.name, method.merge_rate) for method in found] == [
        *(("ours", rate) for rate in methods.RATES),
        ("there", 0.0),
    ]
    assert absent == {
        "timm NaFlexViT": "needs torchvision",
        "transformers squares of 224 px": "not installed",
        "transformers squares of 256 px": "not installed",
    }


def test_squares_have_the_patches_of_an_average_image(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(methods, "PEERS", {})
    monkeypatch.setattr(methods, "transformers_ijepa", stand_in)

    def sides(patch: int, patches: float) -> list[int | None]:
        return [method.square for method in methods.methods_of(tiny(patch), patches)[0] if method.square]

    assert sides(16, 250.0) == [224, 256]
    assert sides(14, 250.0) == [224]
    assert sides(16, 0.1) == [16, 224]
    (method,) = [method for method in methods.methods_of(tiny(), 250.0)[0] if method.square == 256]
    assert [image.shape for image in method.shown(IMAGES)] == [(256, 256, 3)] * 3


def test_the_table(
    pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(embed, "autocast_dtype", lambda *_: torch.bfloat16)
    monkeypatch.setattr(methods, "PEERS", {"timm NaFlexViT": missing("timm"), "there": stand_in})
    monkeypatch.setattr(methods, "transformers_ijepa", stand_in)
    tables: list[list[dict[str, Any]]] = []
    monkeypatch.setattr(embed, "print_table", tables.append)
    found = embed.run(str(pictures), csv=True, variant="Ti", patch=8, count=3)
    (rows,) = tables
    images = embed.read(str(pictures), 3, 8)
    squares = [f"transformers squares of {side} px" for side in (96, 224)]
    assert [row["method"] for row in rows] == [*["ours"] * 3, "there", *squares, "timm NaFlexViT"] * 2
    assert [row["precision"] for row in rows] == ["float32"] * 7 + ["bfloat16"] * 7
    assert rows[6]["images_per_second"] == "not installed"
    assert "knn20" not in rows[0]

    first, best = rows[0], rows[3]
    # Squares do not count as a peer: they are other images.
    assert best["over_best_peer"] == 1.0
    assert found["over_best_peer"] == first["over_best_peer"]
    assert first["over_best_peer"] == pytest.approx(first["images_per_second"] / best["images_per_second"])
    assert found["bfloat16_gain"] == rows[7]["images_per_second"] / first["images_per_second"]
    # Utilisation is operations times images a second over one peak, of each method's own operations.
    lengths = methods.patches_of(images, EncoderConfig("Ti", 8).architecture)
    operations = [encoder_flops(EncoderConfig("Ti", 8).architecture, lengths, rate).sum() for rate in methods.RATES]
    operations += [
        encoder_flops(EncoderConfig("Ti", 8).architecture, lengths, 0.0).sum(),
        *(encoder_flops(EncoderConfig("Ti", 8).architecture, [(side // 8) ** 2] * 3, 0.0).sum() for side in (96, 224)),
    ]
    peaks = [count * row["images_per_second"] / row["mfu"] for count, row in zip(operations, rows, strict=False)]
    assert peaks == pytest.approx([peaks[0]] * 6)
    assert [path.name.partition("_")[0] for path in Path("benchmarks/results").iterdir()] == ["embed-Ti8"]
    assert "Embedding 3 images of" in capsys.readouterr().out


def test_scores_are_those_of_each_methods_features(
    pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The mean color tells dark images from light ones; with a constant feature all are of the smallest class."""

    def constant(encoder: Encoder) -> peers.Prepare:
        return lambda images: lambda: torch.ones(len(images), 2)

    def of_squares(encoder: Encoder, tokens: int) -> peers.Prepare:
        return lambda images: lambda: torch.from_numpy(np.stack(images)).float().mean(dim=(1, 2))

    encoder = tiny()
    encoder.save_pretrained(tmp_path)
    monkeypatch.setattr(methods, "PEERS", {"color": stand_in, "constant": constant, "absent": missing("absent")})
    monkeypatch.setattr(methods, "transformers_ijepa", of_squares)
    monkeypatch.setattr(embed, "autocast_dtype", lambda *_: torch.bfloat16)
    monkeypatch.setattr(embed, "CHUNK", 3)  # the last chunk is shorter
    monkeypatch.setattr(embed, "LABELED", 8)
    tables: list[list[dict[str, Any]]] = []
    monkeypatch.setattr(embed, "print_table", tables.append)
    embed.run(str(pictures), weights=str(tmp_path), train=str(pictures), count=2)
    (rows,) = tables
    images = embed.read(str(pictures), 8, 16)
    labels = torch.tensor([0] * 4 + [1] * 4)
    for row, rate in zip(rows, methods.RATES, strict=False):
        z = encoder.embed(images, resolution="native", merge_rate=rate)
        assert row["knn20"] == (knn_classify(z, labels, z) == labels).double().mean()
    assert [row["knn20"] for row in rows[3:7]] == [1.0, 0.5, 1.0, 1.0]
    assert (rows[4]["knn20_low"], rows[4]["knn20_high"]) == pytest.approx((0.2152, 0.7848), abs=1e-4)
    assert rows[0]["knn20_p"] == 1.0
    # Neither the peers that are absent nor the second precision have scores.
    assert {row["knn20"] for row in rows[7:]} == {""}


def test_an_encoder_that_peers_cannot_hold_is_refused(tmp_path: Path) -> None:
    tiny(patch_embed="mlp").save_pretrained(tmp_path)
    with pytest.raises(RequestError, match=r"has encoder.patch_embed 'mlp', which timm and transformers do not have"):
        embed.run(weights=str(tmp_path))


def test_without_peers_there_is_nothing_to_be_ahead_of(pictures: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(methods, "PEERS", {"timm NaFlexViT": missing("timm")})
    monkeypatch.setattr(methods, "transformers_ijepa", missing("transformers"))
    assert embed.run(str(pictures), variant="Ti", count=2)["over_best_peer"] is None


def test_where_bfloat16_is_slow_it_is_not_measured(pictures: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embed, "autocast_dtype", lambda *_: torch.float32)
    monkeypatch.setattr(methods, "PEERS", {})
    monkeypatch.setattr(methods, "transformers_ijepa", missing("transformers"))
    tables: list[list[dict[str, Any]]] = []
    monkeypatch.setattr(embed, "print_table", tables.append)
    assert embed.run(str(pictures), variant="Ti", count=2)["bfloat16_gain"] == 1.0
    assert {row["precision"] for row in tables[0]} == {"float32"}
