"""The central property: a view gives the same result alone, in any pack, at any place in the pack."""

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from ijepa_enhanced.batch import MaskedBatch
from ijepa_enhanced.encoder import Encoder
from ijepa_enhanced.jepa import JEPA
from ijepa_enhanced.masks import MIN_TOKENS
from ijepa_enhanced.models.blocks import Block
from ijepa_enhanced.models.config import Architecture, EncoderConfig, PredictorConfig
from ijepa_enhanced.models.preprocessing import Preprocessing
from ijepa_enhanced.models.vit import VisionTransformer
from ijepa_enhanced.objective import ObjectiveConfig
from ijepa_enhanced.packed import Packed, Segments
from one_pack import pack_losses

# Norm of the difference by the norm. A matrix product of another number of rows adds in another order, so bitwise
# equality cannot be had; float32 rounds at 6e-8. The largest over 400 random packs were 6.1e-7 for a view's features,
# 3.2e-7 for their gradients, 2.3e-7 for the loss and 4.1e-7 for its gradients.
BOUND = 2e-6

CONFIG = EncoderConfig(variant="Ti", depth=2, patch_size=8, max_grid=6).architecture
LEARNED = Architecture(
    *(64, 2, 2, 128, 8),
    positions="table",
    position_grid=(6, 5),
    resampling="bicubic-antialias",
    class_token=True,
    registers=2,
    layer_scale=True,
)
"""All parts of DINOv2 with registers."""
ROTARY = Architecture(*(64, 2, 2, 96, 8), positions="rope", class_token=True, registers=1, gated=True, layer_scale=True)
"""All parts of DINOv3."""
# Grids on both sides of max_grid, so that interpolated positions take part.
GRIDS = st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), min_size=1, max_size=6)
MASKABLE = st.lists(
    st.tuples(st.integers(1, 9), st.integers(1, 9)).filter(lambda grid: grid[0] * grid[1] >= MIN_TOKENS),
    min_size=1,
    max_size=5,
)
SEEDS = st.integers(0, 2**16)
FEW = settings(max_examples=25, deadline=None, derandomize=True)


def distance(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


def gradients(module: nn.Module) -> dict[str, Tensor]:
    """The parameters' gradients, which are cleared."""
    found = {name: value.grad.clone() for name, value in module.named_parameters() if value.grad is not None}
    module.zero_grad()
    return found


def whole(grads: dict[str, Tensor]) -> Tensor:
    return torch.cat([value.flatten() for value in grads.values()])


def assert_same_gradients(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    assert distance(whole(found), whole(expected)) < BOUND


@pytest.fixture(scope="module", params=[CONFIG, LEARNED, ROTARY], ids=["factorized", "table", "rope"])
def encoder(request: pytest.FixtureRequest) -> Encoder:
    torch.manual_seed(0)
    encoder = Encoder(VisionTransformer(request.param), Preprocessing())
    livelier(encoder)
    return encoder


@pytest.fixture(scope="module", params=["without prefix and merging", "with both"])
def jepa(request: pytest.FixtureRequest) -> JEPA:
    torch.manual_seed(1)
    config = LEARNED if request.param == "with both" else CONFIG
    jepa = JEPA(config, PredictorConfig(width=32, depth=2, heads=2), ObjectiveConfig(vicreg_weight=0.0))
    livelier(jepa)
    return jepa


@torch.no_grad()
def livelier(module: nn.Module) -> None:
    """Weights as after training: at their small start attention is nearly a mean, and a view hardly sees another."""
    for name, value in module.named_parameters():
        if value.ndim == 2:
            value.mul_(4.0)
        elif name.endswith("bias"):
            value.normal_(std=0.1)


def alone(packed: Packed, view: int) -> Packed:
    patches = packed.split()[view][packed.prefix :]
    return Packed.of_grids(patches.numpy(), packed.grids[view : view + 1].numpy(), packed.prefix)


def run(encoder: Encoder, packed: Packed, rate: float) -> Tensor:
    features: Tensor = encoder(packed, encoder.merge_plan(packed.segments, rate))
    return features


# Matches within a rounding of each other could go either way; random patches have none (docs/merging.md).
@pytest.mark.parametrize("rate", [0.0, 0.2])
@FEW
@given(grids=GRIDS, seed=SEEDS)
def test_the_encoders_features_and_gradients_do_not_depend_on_the_pack(
    encoder: Encoder, make_stream: Callable[..., Packed], rate: float, grids: list[tuple[int, int]], seed: int
) -> None:
    packed = make_stream(grids, seed, encoder.config.prefix)
    weights = torch.randn(packed.segments.total, encoder.width, generator=torch.Generator().manual_seed(seed))
    features = run(encoder, packed, rate)
    (features * weights).sum().backward()
    in_pack = gradients(encoder)
    views = zip(features.detach().split(packed.segments.lengths), weights.split(packed.segments.lengths), strict=True)
    for view, (expected, weight) in enumerate(views):
        found = run(encoder, alone(packed, view), rate)
        assert distance(found.detach(), expected) < BOUND
        (found * weight).sum().backward()
    assert_same_gradients(gradients(encoder), in_pack)


@FEW
@given(grids=GRIDS.filter(lambda grids: len(grids) > 1), seed=SEEDS, data=st.data())
def test_the_encoders_features_do_not_depend_on_the_place_in_the_pack(
    encoder: Encoder, make_stream: Callable[..., Packed], grids: list[tuple[int, int]], seed: int, data: st.DataObject
) -> None:
    order = data.draw(st.permutations(range(len(grids))))
    packed = make_stream(grids, seed, encoder.config.prefix)
    moved = Packed.concatenate([alone(packed, view) for view in order])
    with torch.no_grad():
        features = encoder(packed).split(packed.segments.lengths)
        for view, found in zip(order, encoder(moved).split(moved.segments.lengths), strict=True):
            assert distance(found, features[view]) < BOUND


@FEW
@given(grids=GRIDS.filter(lambda grids: len(grids) > 1), seed=SEEDS, data=st.data())
def test_another_views_pixels_change_not_one_bit(
    encoder: Encoder, make_stream: Callable[..., Packed], grids: list[tuple[int, int]], seed: int, data: st.DataObject
) -> None:
    """The same shapes are added in the same order, so here equality is exact."""
    changed = data.draw(st.integers(0, len(grids) - 1))
    packed = make_stream(grids, seed, encoder.config.prefix)
    start, stop = packed.segments.cu_seqlens[changed : changed + 2].tolist()
    values = packed.values.clone()
    values[start:stop] = 255 - values[start:stop]
    with torch.no_grad():
        before = encoder(packed)
        after = encoder(packed.with_values(values))
    assert torch.equal(before[:start], after[:start])
    assert torch.equal(before[stop:], after[stop:])
    assert not torch.equal(before[start:stop], after[start:stop])


def loss_and_gradients(model: JEPA, batch: MaskedBatch, step_target_tokens: int) -> float:
    losses = pack_losses(model, batch, step_target_tokens, 1)
    losses.total.backward()
    return losses.total.item()


@FEW
@given(grids=MASKABLE, seed=SEEDS, data=st.data())
def test_the_loss_of_jepa_and_its_gradients_do_not_depend_on_the_pack(
    jepa: JEPA,
    make_batch: Callable[..., MaskedBatch],
    grids: list[tuple[int, int]],
    seed: int,
    data: st.DataObject,
) -> None:
    config = jepa.student.config
    rates = (0.2, 0.3) if config.prefix else (0.0, 0.0)  # of teacher and student
    order = data.draw(st.permutations(range(len(grids))))

    def batch_of(views: list[int]) -> MaskedBatch:
        return make_batch(grids, seed, views, config.depth, rates, config.prefix)

    pack = batch_of(list(range(len(grids))))
    tokens = len(pack.targets.index)
    expected = loss_and_gradients(jepa, pack, tokens)
    in_pack = gradients(jepa)

    found = sum(loss_and_gradients(jepa, batch_of([view]), tokens) for view in range(len(grids)))
    # As many roundings of 6e-8 as there are views, and the sums themselves.
    assert found == pytest.approx(expected, rel=1e-6)
    assert_same_gradients(gradients(jepa), in_pack)

    assert loss_and_gradients(jepa, batch_of(order), tokens) == pytest.approx(expected, rel=1e-6)
    assert_same_gradients(gradients(jepa), in_pack)


def test_the_bound_catches_a_thousandth_of_a_leak(
    encoder: Encoder, make_stream: Callable[..., Packed], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the bound is worth: of what two views would make of each other, it notices a thousandth."""
    packed = make_stream([(3, 4), (4, 3)], 0, encoder.config.prefix)
    with torch.no_grad():
        features = encoder(packed)
        attend = Block.attend
        one = Segments.of([packed.segments.total])
        monkeypatch.setattr(Block, "attend", lambda self, x, _, *rest: attend(self, x, one, *rest))
        leaked = encoder(packed)
    assert distance(features + 1e-3 * (leaked - features), features) > 10 * BOUND
