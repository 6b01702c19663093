"""The step's figures agree with each other, and what does not fit into memory leaves the rest."""

import math
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from ijepa_enhanced.benchmarks import ceilings, growth, step
from ijepa_enhanced.benchmarks.original import Original
from ijepa_enhanced.models.config import EncoderConfig, PredictorConfig


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(ceilings, "PRODUCT_WIDTH", {"cpu": 64})
    monkeypatch.setattr(step, "EncoderConfig", partial(EncoderConfig, depth=2))
    monkeypatch.setattr(step, "PREDICTORS", {"Ti": PredictorConfig(width=32, depth=1, heads=2)})
    monkeypatch.setattr(step, "TURNS", 1)
    monkeypatch.setattr(step, "GROWTH_TOKENS", (256, 512))


@pytest.fixture
def tables(monkeypatch: pytest.MonkeyPatch) -> list[list[dict[str, Any]]]:
    """What is printed, from then on."""
    found: list[list[dict[str, Any]]] = []
    for module in (step, growth):
        monkeypatch.setattr(module, "print_table", found.append)
    return found


def test_the_tables(tables: list[list[dict[str, Any]]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    found = step.run(csv=True, tokens=256)
    parts, kernels, methods, grown = tables
    assert [row["part"] for row in parts] == ["decode", *step.PARTS]
    images = [row["images_per_second"] * row["ms"] for row in parts]
    assert images == pytest.approx([images[0]] * len(images))
    assert all(row["ms"] > 0 for row in parts)
    assert [row[""].count("█") for row in parts] == [round(40 * row["over_step"]) for row in parts]

    assert sum(row["share"] for row in kernels) == pytest.approx(1)
    assert len(kernels) == ceilings.KERNELS + 1
    costs = [row["ms"] for row in kernels[:-1]]
    assert costs == sorted(costs, reverse=True)
    assert costs[-1] > 0
    # Not the first three: with bfloat16 and packs as small as here, conversions cost as much.
    assert any("linear" in row["kernel"] or "mm" in row["kernel"] for row in kernels[:6]), "products cost most"

    ours, original = methods
    assert (ours["encoder"], ours["method"], original["method"]) == ("Ti/16", "ours", "the original's")
    assert ours["padding"] == 0
    assert original["padding"] >= 0.1
    assert found["over_original"] == ours["images_per_second"] / original["images_per_second"]
    # Both show the same images, tokens and operations.
    for cost in ("tokens_per_second", "mfu"):
        assert ours[cost] / original[cost] == pytest.approx(found["over_original"])
        assert ours[cost] > 0
    assert len(grown) == 2
    assert grown[0]["tokens"] < grown[1]["tokens"]
    written = sorted(path.name.partition("_")[0] for path in Path("benchmarks/results").iterdir())
    assert written == ["step", "step-growth", "step-kernels", "step-parts"]


@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")  # torch 2.13's own
def test_compiled_networks_keep_their_tables(tables: list[list[dict[str, Any]]]) -> None:
    # What compiling does is for `tests/test_compile.py`; it takes minutes.
    with torch.compiler.set_stance("force_eager"):
        step.run(tokens=256, compiled=True)
    assert [row["method"] for row in tables[2]] == ["ours, compiled", "the original's"]


def test_an_encoder_that_does_not_fit_leaves_the_others(
    tables: list[list[dict[str, Any]]], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(step, "VARIANTS", {"cpu": ("Ti", "S", "B")})
    measure = step.measure

    def too_large(config: EncoderConfig, *rest: Any) -> Any:
        if config.variant != "Ti":
            raise torch.OutOfMemoryError
        return measure(config, *rest)

    monkeypatch.setattr(step, "measure", too_large)
    step.run(tokens=512)
    assert "ViT-S does not fit in memory with packs of 512 tokens. Try --tokens 256.\n" in capsys.readouterr().out
    assert {row["encoder"] for row in tables[2]} == {"Ti/16"}
    step.run(tokens=256)
    assert "ViT-S does not fit in memory with packs of 256 tokens.\n" in capsys.readouterr().out
    with pytest.raises(torch.OutOfMemoryError):
        step.run(tokens=256, variant="S")


def test_growth_ends_where_memory_does(
    tables: list[list[dict[str, Any]]], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def too_large(training: Any, config: EncoderConfig, images: Any, tokens: int) -> dict[str, Any]:
        if tokens > 256:
            raise torch.OutOfMemoryError
        return {"tokens": tokens, "ms": 1.0, "peak_MB": 1.0}

    monkeypatch.setattr(step, "grown", too_large)
    step.run(tokens=256)
    assert "A pack of 512 tokens does not fit in memory." in capsys.readouterr().out
    assert len(tables[3]) == 1


def test_the_originals_memory_takes_no_figures_of_ours_away(
    tables: list[list[dict[str, Any]]], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    features, calls = Original.features, []

    def too_large(model: Original, rows: Any) -> torch.Tensor:
        calls.append(rows)
        if len(calls) > 1:  # AdamW has its own numbers from then on
            raise torch.OutOfMemoryError
        return features(model, rows)

    monkeypatch.setattr(Original, "features", too_large)
    found = step.run(tokens=256)
    assert (
        "The original I-JEPA method does not fit in memory for ViT-Ti with packs of 256 tokens."
        in capsys.readouterr().out
    )
    assert [row["method"] for row in tables[2]] == ["ours"]
    assert found["images_per_second"] == tables[2][0]["images_per_second"]
    assert math.isnan(found["over_original"])


def test_every_turn_shows_other_packs() -> None:
    shown = []

    class Spy:
        def steps(self, packs: Any) -> None:
            shown.append(list(packs))

    turn: Any = step.in_turn(Spy(), "abcde")  # type: ignore[arg-type]
    for _ in range(3):
        turn()
    assert shown == [["a", "b"], ["c", "d"], ["e", "a"]]
