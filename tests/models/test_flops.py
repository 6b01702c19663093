"""Operations counted from lengths are those that PyTorch's counter sees when a single image runs through dense code."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from ijepa_enhanced.batch import MaskedBatch
from ijepa_enhanced.jepa import JEPA
from ijepa_enhanced.merge_plan import MergePlan
from ijepa_enhanced.models import blocks, predictor, vit
from ijepa_enhanced.models.config import Architecture, EncoderConfig, PredictorConfig
from ijepa_enhanced.models.flops import encoder_flops, predictor_flops, step_flops
from ijepa_enhanced.models.vit import VisionTransformer
from ijepa_enhanced.objective import ObjectiveConfig
from ijepa_enhanced.ops import merging
from ijepa_enhanced.packed import Packed
from one_pack import pack_losses


def dense(q: Tensor, k: Tensor, v: Tensor, *segments: Any, **keys: Any) -> Tensor:
    """Attention of one view, in products that the counter knows."""
    logits = q.transpose(0, 1) @ k.permute(1, 2, 0)
    return (logits.softmax(dim=2) @ v.transpose(0, 1)).transpose(0, 1)


def dense_matches(directions: Tensor, tiles: Tensor, start: int, stop: int) -> Tensor:
    """The matches of one view as one product instead of tiles; which they are does not matter here."""
    directions[::2] @ directions[1::2].T
    best = torch.full(directions.shape[:1], merging.LOW - 2**63)
    best[::2] = merging.LOW - min(1, len(best) - 1)
    return best


@pytest.fixture(autouse=True)
def countable(monkeypatch: pytest.MonkeyPatch) -> None:
    """Products that the counter knows, and no pad rows, which are not counted as work."""
    monkeypatch.setattr(blocks, "attention", dense)
    monkeypatch.setattr(merging, "best_matches", dense_matches)
    for module in (blocks, vit, predictor):
        monkeypatch.setattr(module, "pad_rows", lambda x: x)


@pytest.mark.parametrize("rate", [0.0, 0.3, [0.0, 0.25, 0.5]])
@pytest.mark.parametrize("grid", [(5, 7), (6, 6), (1, 1)])
@pytest.mark.parametrize(
    "config",
    [
        EncoderConfig("Ti", 8, 3, max_grid=7).architecture,
        EncoderConfig("S", 16, 3, "sincos").architecture,
        EncoderConfig("g", 14, 3).architecture,
        EncoderConfig("Ti", 8, 3, patch_embed="mlp").architecture,
    ],
    ids=["factorized", "sincos", "another MLP", "hidden layer"],
)
def test_the_count_is_that_of_pytorchs_counter(
    config: Architecture, grid: tuple[int, int], rate: float | list[float]
) -> None:
    pixels = np.zeros((grid[0] * grid[1], config.patch_size**2 * 3), np.uint8)
    packed = Packed.of_grids(pixels, np.array([grid]))
    plan = MergePlan.of(packed.segments.lengths, rate, 3)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        VisionTransformer(config)(packed.with_values(packed.values.float()), plan)
    assert encoder_flops(config, packed.segments.lengths, rate).tolist() == [counter.get_total_flops()]


@pytest.mark.parametrize("rates", [(0.0, 0.0), (0.3, 0.2)])
@pytest.mark.parametrize(
    ("encoder", "predictor"),
    [
        (EncoderConfig("Ti", 8, 3, max_grid=7).architecture, PredictorConfig(width=64, depth=2, heads=2)),
        (EncoderConfig("S", 8, 2, "sincos").architecture, PredictorConfig(width=32, depth=3, heads=4)),
        (EncoderConfig("Ti", 8, 2, patch_embed="mlp").architecture, PredictorConfig(width=32, depth=1, heads=4)),
    ],
    ids=["factorized", "sincos", "hidden layer"],
)
def test_a_step_is_that_of_pytorchs_counter(
    make_batch: Callable[..., MaskedBatch],
    encoder: Architecture,
    predictor: PredictorConfig,
    rates: tuple[float, float],
) -> None:
    batch = make_batch([(5, 7)], depth=encoder.depth, rates=rates)
    jepa = JEPA(encoder, predictor, ObjectiveConfig())
    with FlopCounterMode(display=False) as counter:
        pack_losses(jepa, batch, len(batch.targets.index)).total.backward()
    lengths = [segments.lengths for segments in (batch.packed.segments, batch.context.segments, batch.targets.segments)]
    assert step_flops(encoder, predictor, *lengths, *rates).tolist() == [counter.get_total_flops()]

    visible, hidden = batch.packed.select(batch.context), batch.packed.select(batch.targets)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        jepa.predictor(torch.zeros(len(visible.values), jepa.student.width), visible, hidden)
    assert predictor_flops(predictor, encoder, *lengths[1:]).tolist() == [counter.get_total_flops()]


def test_a_small_predictor_by_hand() -> None:
    """One layer of width 8 for a Ti: two context tokens, one target."""
    encoder = EncoderConfig("Ti", 8, 1).architecture
    ends = 3 * 2 * 192 * 8 + 3 * 2 * 2 * 32 * 8
    layer = 2 * 2 * 2 * 8 * 8 + 2 * 2 * 8 * 8 + 2 * 2 * 2 * 8 + 2 * 2 * 8 * 32
    assert predictor_flops(PredictorConfig(width=8, depth=1, heads=1), encoder, [2], [1]).tolist() == [ends + layer]


def test_a_step_without_merging_is_nearly_a_teacher_and_three_times_the_rest() -> None:
    """Up to the products with pixels and places, which have one in the backward pass instead of two."""
    encoder, predictor = EncoderConfig("S").architecture, PredictorConfig()
    contexts, targets = [70, 20], [90, 30]
    forward = encoder_flops(encoder, contexts) + predictor_flops(predictor, encoder, contexts, targets)
    found = step_flops(encoder, predictor, [196, 64], contexts, targets) - encoder_flops(encoder, [196, 64])
    assert (0.97 * 3 * forward < found).all()
    assert (found < 3 * forward).all()


def test_a_small_network_by_hand() -> None:
    """Ti/8 of one layer, two patches, half of them merged."""
    embedding = 2 * 2 * 192 * (8 * 8 * 3 + 2 * 32)
    attention = 2 * 2 * (3 + 1) * 192 * 192 + 2 * 2 * 2 * 2 * 192
    matching = 2 * 1 * 1 * 64
    mlp = 1 * 2 * 2 * 192 * 768
    config = EncoderConfig("Ti", 8, 1).architecture
    assert encoder_flops(config, [2], 0.5).tolist() == [embedding + attention + matching + mlp]
    assert encoder_flops(config, [2], 0.0).tolist() == [embedding + attention + 2 * mlp]


def test_views_are_counted_one_by_one() -> None:
    config = EncoderConfig("S").architecture
    lengths = [196, 1, 576, 196]
    assert encoder_flops(config, lengths, 0.1).tolist() == [encoder_flops(config, [n], 0.1)[0] for n in lengths]


def test_a_vit_s_has_the_published_count() -> None:
    """4.6 G multiply-adds at 224 px, with a class token (DeiT-S in Swin, arXiv 2103.14030, table 1)."""
    assert encoder_flops(EncoderConfig("S").architecture, [196])[0] / 2e9 == pytest.approx(4.6, abs=0.06)


def test_nothing_to_count() -> None:
    assert encoder_flops(EncoderConfig("Ti").architecture, []).tolist() == []


def test_a_rate_out_of_range_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"^A merge rate must be between 0 and 0.5, not 0.6"):
        encoder_flops(EncoderConfig("Ti").architecture, [9], 0.6)
