"""Operations counted from lengths are those that PyTorch's counter sees when a single image runs through dense code."""

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from ijepa_enhanced.merge_plan import MergePlan
from ijepa_enhanced.models import blocks
from ijepa_enhanced.models.encoder import Encoder, EncoderConfig
from ijepa_enhanced.models.flops import encoder_flops
from ijepa_enhanced.ops import merging
from ijepa_enhanced.packed import Packed


def dense(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_seqlen: int, sizes: Tensor | None = None) -> Tensor:
    """Attention of one view, in products that the counter knows."""
    logits = q.transpose(0, 1) @ k.permute(1, 2, 0)
    return (logits.softmax(dim=2) @ v.transpose(0, 1)).transpose(0, 1)


def dense_matches(directions: Tensor, tiles: Tensor, start: int, stop: int) -> Tensor:
    """The matches of one view as one product instead of tiles; which they are does not matter here."""
    directions[::2] @ directions[1::2].T
    best = torch.full(directions.shape[:1], merging.LOW - 2**63)
    best[::2] = merging.LOW - min(1, len(best) - 1)
    return best


@pytest.mark.parametrize("rate", [0.0, 0.3, [0.0, 0.25, 0.5]])
@pytest.mark.parametrize("grid", [(5, 7), (6, 6), (1, 1)])
@pytest.mark.parametrize(
    "config",
    [EncoderConfig("Ti", 8, 3, max_grid=7), EncoderConfig("S", 16, 3, "sincos"), EncoderConfig("g", 14, 3)],
    ids=["factorized", "sincos", "another MLP"],
)
def test_the_count_is_that_of_pytorchs_counter(
    config: EncoderConfig, grid: tuple[int, int], rate: float | list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(blocks, "attention", dense)
    monkeypatch.setattr(merging, "best_matches", dense_matches)
    pixels = np.zeros((grid[0] * grid[1], config.patch_size**2 * 3), np.uint8)
    packed = Packed.of_grids(pixels, np.array([grid]))
    plan = MergePlan.of(packed.segments.lengths, rate, 3)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        Encoder(config)(packed, plan)
    assert encoder_flops(config, packed.segments.lengths, rate).tolist() == [counter.get_total_flops()]


def test_a_small_network_by_hand() -> None:
    """Ti/8 of one layer, two patches, half of them merged."""
    embedding = 2 * 2 * 192 * (8 * 8 * 3 + 2 * 32)
    attention = 2 * 2 * (3 + 1) * 192 * 192 + 2 * 2 * 2 * 2 * 192
    matching = 2 * 1 * 1 * 64
    mlp = 1 * 2 * 2 * 192 * 768
    config = EncoderConfig("Ti", 8, 1)
    assert encoder_flops(config, [2], 0.5).tolist() == [embedding + attention + matching + mlp]
    assert encoder_flops(config, [2], 0.0).tolist() == [embedding + attention + 2 * mlp]


def test_views_are_counted_one_by_one() -> None:
    config = EncoderConfig("S")
    lengths = [196, 1, 576, 196]
    assert encoder_flops(config, lengths, 0.1).tolist() == [encoder_flops(config, [n], 0.1)[0] for n in lengths]


def test_a_vit_s_has_the_published_count() -> None:
    """4.6 G multiply-adds at 224 px, with a class token (DeiT-S in Swin, arXiv 2103.14030, table 1)."""
    assert encoder_flops(EncoderConfig("S"), [196])[0] / 2e9 == pytest.approx(4.6, abs=0.06)


def test_nothing_to_count() -> None:
    assert encoder_flops(EncoderConfig("Ti"), []).tolist() == []


def test_a_rate_out_of_range_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"^A merge rate must lie between 0 and 0.5, not 0.6"):
        encoder_flops(EncoderConfig("Ti"), [9], 0.6)
