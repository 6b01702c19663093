"""The original's method computes what ours does, token by token, and the step's figures agree with each other."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from ijepa_enhanced.batch import MaskedBatch
from ijepa_enhanced.benchmarks import step
from ijepa_enhanced.data.loader import masks_of
from ijepa_enhanced.encoder import Encoder
from ijepa_enhanced.masks import MaskConfig
from ijepa_enhanced.models.config import EncoderConfig, PredictorConfig

GRIDS = [(5, 7), (12, 15), (3, 3), (9, 9), (16, 16), (2, 11)]
CONFIG = EncoderConfig("Ti", 8, depth=2)
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for name, value in {
        "TURNS": 1,
        "PEAK_SIDE": {"cpu": 64},
        "GROWTH_TOKENS": (256, 512),
    }.items():
        monkeypatch.setattr(step, name, value)


@pytest.fixture
def tables(monkeypatch: pytest.MonkeyPatch) -> list[list[dict[str, Any]]]:
    """What is printed, from then on."""
    found: list[list[dict[str, Any]]] = []
    monkeypatch.setattr(step, "print_table", found.append)
    return found


@pytest.fixture
def batch(make_batch: Callable[..., MaskedBatch]) -> MaskedBatch:
    return make_batch(GRIDS)


@pytest.fixture
def rows(batch: MaskedBatch) -> step.Rows:
    return step.lay_out(batch, masks_of(batch, MaskConfig(), 0), CONFIG)


def test_rows_hold_every_token_once(batch: MaskedBatch, rows: step.Rows) -> None:
    lengths = batch.packed.segments.lengths
    assert torch.bincount(rows.views[rows.views >= 0]).tolist() == list(lengths)
    assert rows.views.shape == (3, 256)
    assert sum(lengths) == 583


def test_rows_are_added_until_a_tenth_is_padding(make_batch: Callable[..., MaskedBatch]) -> None:
    full = make_batch([(16, 16), (16, 16), (16, 15)])
    rows = step.lay_out(full, masks_of(full, MaskConfig(), 0), CONFIG)
    assert rows.views.shape == (4, 256)
    assert (rows.views[3] == -1).all()


def test_rows_hold_contexts_and_target_blocks(batch: MaskedBatch, rows: step.Rows) -> None:
    masks = masks_of(batch, MaskConfig(), 0)
    cols = batch.packed.grids[:, 1]

    def tokens(index: torch.Tensor, views: torch.Tensor, row: int, view: int) -> list[int]:
        """Numbers in the view of what a line of `Rows` lists of it."""
        chosen = index[views == view]
        assert (rows.views[row][chosen] == view).all()
        places = rows.places[row][chosen]
        return (places[:, 0] * cols[view] + places[:, 1]).tolist()

    for view, mask in enumerate(masks):
        row = int((rows.views == view).any(dim=1).nonzero())
        assert tokens(rows.context[row], rows.context_views[row], row, view) == mask.context.tolist()
        for block, target in enumerate(mask.targets):
            line = block * len(rows.views) + row
            assert tokens(rows.targets[line], rows.target_views[line], row, view) == target.tolist()
    assert (rows.target_views >= 0).sum() == sum(len(target) for mask in masks for target in mask.targets)


def test_the_originals_features_are_ours(batch: MaskedBatch, rows: step.Rows) -> None:
    torch.manual_seed(0)
    encoder = Encoder(CONFIG)
    with torch.no_grad():
        theirs = step.encode(encoder, rows.patches, rows.places, rows.views)
        ours = torch.split(encoder(batch.packed), list(batch.packed.segments.lengths))
    for view, features in enumerate(ours):
        # Float32 sums of hundreds of numbers, in another order, of features of size 4.
        torch.testing.assert_close(theirs[rows.views == view], features, rtol=0, atol=2e-5)


def test_padding_changes_nothing(rows: step.Rows) -> None:
    torch.manual_seed(0)
    model = step.OriginalStep(CONFIG, PredictorConfig(width=32, depth=1, heads=2))
    before = model.loss(rows)
    patches = rows.patches.clone()
    patches[rows.views < 0] = 100.0
    torch.testing.assert_close(model.loss(rows._replace(patches=patches)), before)
    before.backward()
    assert all(value.grad is not None for value in model.parameters() if value.requires_grad)


def test_our_step_is_the_products(batch: MaskedBatch) -> None:
    """The clock is on its networks alone: the same loss from the same weights."""
    predictor = PredictorConfig(width=32, depth=1, heads=2)
    torch.manual_seed(0)
    timed = step.OurStep(CONFIG, predictor, step.Clock(CPU), compiled=False)
    torch.manual_seed(0)
    plain = step.JEPA(CONFIG, predictor, step.ObjectiveConfig())
    assert timed.loss(batch).item() == plain(batch, len(batch.targets.index), 1).total.item()


@pytest.mark.parametrize("kind", ["ours", "original"])
def test_steps_learn(batch: MaskedBatch, rows: step.Rows, kind: str) -> None:
    predictor = PredictorConfig(width=32, depth=1, heads=2)
    clock = step.Clock(CPU)
    model: Any = step.OriginalStep(CONFIG, predictor)
    if kind == "ours":
        model = step.OurStep(CONFIG, predictor, clock, compiled=False)
    training = step.Training(model, CPU, clock)
    before = [value.clone() for value in model.parameters()]
    training.steps([batch if kind == "ours" else rows])
    assert clock.seconds == {}
    changed = [not torch.equal(old, new) for old, new in zip(before, model.parameters(), strict=True)]
    assert sum(changed) > 0.9 * len(changed)  # of biases some have no gradient yet


def test_a_clock_measures_while_it_runs() -> None:
    clock = step.Clock(CPU)
    with clock.part("before"):
        pass
    with clock.running():
        for _ in range(2):
            with clock.part("meanwhile"):
                pass
    with clock.part("after"):
        pass
    assert list(clock.seconds) == ["meanwhile"]
    assert len(clock.seconds["meanwhile"]) == 2


def test_the_tables(tables: list[list[dict[str, Any]]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    found = step.run(csv=True, tokens=256)
    parts, kernels, methods, growth = tables
    wanted = ["decode", "copy", "teacher", "student", "predictor", "rest of forward", "backward", "optimizer", "EMA"]
    assert [row["part"] for row in parts] == wanted
    images = [row["images_per_second"] * row["ms"] for row in parts]
    assert images == pytest.approx([images[0]] * len(images))
    assert all(row["ms"] > 0 for row in parts)
    assert [row[""].count("█") for row in parts] == [round(40 * row["over_step"]) for row in parts]

    assert sum(row["share"] for row in kernels) == pytest.approx(1)
    assert len(kernels) == step.KERNELS + 1
    costs = [row["ms"] for row in kernels[:-1]]
    assert costs == sorted(costs, reverse=True)
    assert costs[-1] > 0
    assert any("linear" in row["kernel"] or "mm" in row["kernel"] for row in kernels[:3]), "products cost most"

    ours, original = methods
    assert (ours["encoder"], ours["method"], original["method"]) == ("Ti/16", "ours", "the original's")
    assert ours["padding"] == 0
    assert original["padding"] >= 0.1
    assert found["over_original"] == ours["images_per_second"] / original["images_per_second"]
    # Both show the same images, tokens and operations.
    for cost in ("tokens_per_second", "mfu"):
        assert ours[cost] / original[cost] == pytest.approx(found["over_original"])
        assert ours[cost] > 0
    assert len(growth) == 2
    assert growth[0]["tokens"] < growth[1]["tokens"]
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
    step.run(tokens=256)
    assert "ViT-S does not fit at 256 tokens a pack: try --tokens 128." in capsys.readouterr().out
    assert {row["encoder"] for row in tables[2]} == {"Ti/16"}
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
    assert "A pack of 512 tokens does not fit." in capsys.readouterr().out
    assert len(tables[3]) == 1


def test_the_originals_memory_takes_no_figures_of_ours_away(
    tables: list[list[dict[str, Any]]], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    loss, calls = step.OriginalStep.loss, []

    def too_large(model: Any, rows: Any) -> torch.Tensor:
        calls.append(rows)
        if len(calls) > 1:  # only then has AdamW its own numbers
            raise torch.OutOfMemoryError
        return loss(model, rows)

    monkeypatch.setattr(step.OriginalStep, "loss", too_large)
    found = step.run(tokens=256)
    assert "The original's method does not fit for ViT-Ti at 256 tokens a pack." in capsys.readouterr().out
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
