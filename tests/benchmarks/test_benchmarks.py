"""The benchmarks run, print their tables and return what the command line promises."""

import csv
import dataclasses
import json
from functools import partial
from pathlib import Path

import pytest
import torch
import yaml

from ijepa_enhanced.benchmarks import attention, ceilings, embed, loader, merging, methods, packing, search, step, table
from ijepa_enhanced.cli import main
from ijepa_enhanced.config import find_config
from ijepa_enhanced.embed.folder import EmbeddingFolder
from ijepa_enhanced.models.config import EncoderConfig, PredictorConfig


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """ImageNet's 1.28 million images and seven turns are too slow for a test, which is of the CPU."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(packing, "IMAGENET_IMAGES", 3000)
    monkeypatch.setattr(packing, "SAMPLE", 2000)
    monkeypatch.setattr(loader, "TURNS", 1)
    monkeypatch.setattr(loader, "IMAGES", 40)
    for name, value in {
        "TURNS": 1,
        "COST_TOKENS": 120,
        "VIEWS": (10, 40),
        "WIDTHS": (64,),
        "VARIANT": "Ti",
        "RESOLUTION": 64,
        "IMAGES": 3,
        "RATES": (0.0, 0.25),
        "MEMORY_TOKENS": 8192,
    }.items():
        monkeypatch.setattr(merging, name, value)
    for module in (attention, step, embed):
        monkeypatch.setattr(module, "TURNS", 1)
    monkeypatch.setattr(ceilings, "PRODUCT_WIDTH", {"cpu": 64})
    monkeypatch.setattr(attention, "TOKENS", {"cpu": 64})
    monkeypatch.setattr(attention, "GROWTH_TOKENS", (256, 512))
    for module in (step, merging, embed):
        monkeypatch.setattr(module, "EncoderConfig", partial(EncoderConfig, depth=2))
    monkeypatch.setattr(step, "PREDICTORS", {"Ti": PredictorConfig(width=32, depth=1, heads=2)})
    monkeypatch.setattr(step, "TOKENS", {"cpu": 256})
    monkeypatch.setattr(step, "GROWTH_TOKENS", (256, 512))
    monkeypatch.setattr(embed, "IMAGES", {"cpu": 2})
    monkeypatch.setattr(methods, "PEERS", {})
    for name, value in {"VECTORS": 2400, "WIDTH": 24, "WALKS": (4,), "QUERIES": 50}.items():
        monkeypatch.setattr(search, name, value)


def test_packing_counts_no_padding_in_packs_within_the_budget(
    pictures: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = packing.run(str(pictures))
    assert found["padding_tokens"] == 0
    # All ten images fit one pack, so the mean of the packs is their maximum.
    assert found["budget_use"] == 1.0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[:6]] == ["images", "10", "10", "2,000", "2,000", "3,000"]
    assert len({len(line) for line in lines[:6]}) == 1
    assert lines[6] == f"Padding tokens in the packs of {pictures} that were decoded: 0"


def test_sizes_like_imagenets_are(capsys: pytest.CaptureFixture[str]) -> None:
    """The published mean of ImageNet's training set is 469 x 387 px; only the spread is ours."""
    sizes = packing.imagenet_like(20_000)
    assert sizes.widths.mean() == pytest.approx(469, rel=0.1)
    assert sizes.heights.mean() == pytest.approx(387, rel=0.1)
    assert min(sizes.widths.min(), sizes.heights.min()) >= 1


def test_the_parts_of_the_loader_add_up(pictures: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = loader.run(str(pictures))
    assert found.keys() == {"images_per_second", "ratio", "milliseconds"}
    assert found["ratio"] > 0
    bare, *parts = found["milliseconds"].values()
    assert [*found["milliseconds"]] == [
        *("bare loop", "decode", "resize", "flip and blur", "patchify", "masks", "handing over")
    ]
    assert bare > 0
    assert sum(parts) == pytest.approx(1000 / found["images_per_second"])
    out = capsys.readouterr().out.splitlines()
    assert out[0].split() == ["source", "what", "images_per_second", "ms_an_image"]
    assert out[-1] == (
        f"A worker prepares {found['images_per_second']:,.0f} images/s of 6 views, {found['ratio']:.1%} of the bare "
        "loop (median of 1 runs)."
    )


def test_the_loader_s_views_are_those_of_the_recipe() -> None:
    recipe = yaml.safe_load(find_config("own-images").read_text())
    data = dataclasses.asdict(loader.DATA)
    assert {name: data[name] for name in recipe["data"]} == recipe["data"] | {"packs_per_step": 1}
    assert dataclasses.asdict(loader.CHANGES) == recipe["augment"]


def test_the_built_in_images_are_read_from_jpeg_files(capsys: pytest.CaptureFixture[str]) -> None:
    loader.run()
    assert "synthetic, as JPEG" in capsys.readouterr().out


def test_merging_prints_cost_speed_and_memory(pictures: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = merging.run(str(pictures))
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert [line[0] for line in lines[1:4]] == ["tokens_per_view", "10", "40"]
    assert lines[5] == ["merge_rate", "images_per_second", "speedup", "mean_tokens", "share_of_tokens"]
    assert [line[0] for line in lines[6:8]] == ["0", "0.25"]
    assert [float(lines[6][place]) for place in (2, 4)] == [1.0, 1.0]
    assert [" ".join(line[:-2]) for line in lines[10:12]] == ["256 each", "one of 4,096, else 64"]
    # Float32 keys twice and a dozen numbers, and two rounds of tiles of 9 MB that 8,192 tokens hardly share.
    assert 500 < found["bytes_per_token"] < 600 + 18e6 / 8192
    assert found["cost"] > 0
    assert found["speedup"] > 0


def test_search_compares_an_index_with_exact_search(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("usearch")
    # Threads insert vectors in any order, which makes another index each time: 0.976 to 1 were seen.
    assert search.run()["recall"] > 0.95
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert lines[1] == ["walks", "search", "recall", "build_seconds", "seconds_of_all", "seconds_of_one", "MB"]
    assert lines[2][:3] == ["4", "exact", "1"]
    assert lines[3][:2] == ["4", "usearch"]
    # Two bytes for each number, and the graph.
    assert 2 * 24 * 2400 / 1e6 < float(lines[3][-1]) < 2


def test_neighbors_in_a_walk_are_similar(tmp_path: Path) -> None:
    search.write_walks(tmp_path, 4)
    vectors = EmbeddingFolder.open(tmp_path).vectors([*range(2400)])
    cosines = (vectors[:-1] * vectors[1:]).sum(dim=1).view(-1)
    assert cosines[100:599].min() > 0.95
    assert cosines[[599, 1199, 1799]].max() < 0.9  # where the next walk starts


def test_the_mean_of_tokens_by_hand() -> None:
    """Layers that find 8, 4, 2 and leave 4, 2, 1 of a view of 8; one of 2 is down to 1 after the first."""
    assert merging.mean_tokens((8,), 0.5, 3) == (8 + 4 + 2 + 4 + 2 + 1) / 6
    assert merging.mean_tokens((8, 2), 0.5, 3) == (8 + 4 + 2 + 4 + 2 + 1 + 2 + 1 + 1 + 1 + 1 + 1) / 12
    assert merging.mean_tokens((8, 2), 0.0, 3) == 5


def test_the_last_rate_halves_the_mean_tokens() -> None:
    """As the table says of ViT-B at a resolution of 384 px."""
    assert merging.mean_tokens((576,), 0.13, 12) / 576 == pytest.approx(0.49, abs=0.01)


@pytest.mark.parametrize(
    ("theme", "keys"),
    [
        ("packing", ["budget_use", "padding_tokens"]),
        ("loader", ["images_per_second", "ratio", "milliseconds"]),
        ("attention", ["dense_over_ours", "time_exponent", "memory_exponent"]),
        ("merging", ["cost", "speedup", "bytes_per_token"]),
        (
            "step",
            [
                "images_per_second",
                "tokens_per_second",
                "mfu",
                "over_original",
                "time_exponent",
                "memory_exponent",
            ],
        ),
        ("embed", ["images_per_second", "over_best_peer", "bfloat16_gain"]),
        ("search", ["recall"]),
    ],
)
def test_the_last_line_is_json_for_programs(
    pictures: Path, capsys: pytest.CaptureFixture[str], theme: str, keys: list[str]
) -> None:
    if theme == "search":
        pytest.importorskip("usearch")
    source = [] if theme in ("attention", "search") else ["--source", str(pictures)]
    assert main(["benchmark", theme, *source, "--json"]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert list(found) == keys


def test_a_source_is_refused_where_none_is_read(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["benchmark", "attention", "--source", "synthetic"]) == 2
    assert "`ijepa benchmark attention` does not use --source. Remove it." in capsys.readouterr().err


def test_a_csv_holds_the_rows_and_what_they_were_measured_on(
    pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    packing.run(str(pictures), csv=True)
    path = Path(capsys.readouterr().out.splitlines()[-1])
    assert path.parent == table.RESULTS
    assert path.name.startswith(f"packing_{table.hardware()}_")
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["images"] for row in rows] == ["10", "10", "2000", "2000", "3000"]
    assert {"hardware", "commit", "python", "torch", "numpy", "pillow"} <= rows[0].keys()
