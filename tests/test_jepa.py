"""The packed objective equals a plain one: view by view, token by token, in float64, without packed code."""

import copy
import dataclasses
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from ijepa_enhanced.batch import MaskedBatch
from ijepa_enhanced.distributed import Ranks
from ijepa_enhanced.jepa import JEPA
from ijepa_enhanced.losses import nt_xent, variance_covariance
from ijepa_enhanced.masks import MaskConfig, ViewMasks, draw_masks
from ijepa_enhanced.merge_plan import merged_lengths, plan_merges
from ijepa_enhanced.models.blocks import Blocks, FactorizedPositions, FeedForward
from ijepa_enhanced.models.config import EncoderConfig, PredictorConfig
from ijepa_enhanced.models.predictor import Predictor
from ijepa_enhanced.models.vit import VisionTransformer
from ijepa_enhanced.objective import ObjectiveConfig
from ijepa_enhanced.ops.linear import HAS_BF16
from ijepa_enhanced.ops.pooling import segment_mean
from ijepa_enhanced.ops.preprocess import IMAGENET_MEAN, IMAGENET_STD
from ijepa_enhanced.packed import Packed, Segments
from ijepa_enhanced.randomness import Purpose, generator
from ijepa_enhanced.train.meter import Meter
from one_pack import pack_losses

MakeBatch = Callable[..., MaskedBatch]
MakeStream = Callable[..., Packed]

# Norm of the difference by the norm, packed float32 against plain float64: measured 2.2e-7 for the loss and 5.6e-7 for
# the gradients, which is what float32 rounds (6e-8) in a network of some ten layers.
BOUND = 3e-6

HEADS, PREDICTOR_HEADS, MAX_GRID = 3, 2, 6
GRIDS = [(5, 4), (2, 9), (7, 7), (1, 4), (3, 2)]


def make_jepa(vicreg_weight: float) -> JEPA:
    """Student, predictor and a teacher of its own, with weights large enough that every part matters."""
    torch.manual_seed(0)
    encoder = EncoderConfig(variant="Ti", depth=2, patch_size=8, max_grid=MAX_GRID).architecture
    model = JEPA(
        encoder, PredictorConfig(width=32, depth=2, heads=PREDICTOR_HEADS), ObjectiveConfig(vicreg_weight=vicreg_weight)
    )
    with torch.no_grad():
        for name, value in model.named_parameters():
            if value.ndim == 2:
                value.mul_(4.0)
            elif name.endswith("bias"):
                value.normal_(std=0.1)
        for value in model.teacher.parameters():
            value.add_(0.3 * value.std() * torch.randn_like(value) if value.numel() > 1 else 0.0)
    return model


# The plain reference. A dense transformer from torch's own elements, one sequence at a time.


def plain_norm(x: Tensor, layer: torch.nn.LayerNorm) -> Tensor:
    centerd = x - x.mean(dim=1, keepdim=True)
    return centerd / (centerd.square().mean(dim=1, keepdim=True) + 1e-6).sqrt() * layer.weight + layer.bias


def plain_attention(q: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor:
    q, k, v = (part.reshape(len(part), heads, -1).transpose(0, 1) for part in (q, k, v))
    weights = torch.softmax(q @ k.transpose(1, 2) / q.shape[2] ** 0.5, dim=2)
    return (weights @ v).transpose(0, 1).flatten(1)


def plain_second_half(x: Tensor, block: FeedForward) -> Tensor:
    hidden = plain_norm(x, block.norm2) @ block.fc1.weight.T + block.fc1.bias
    gelu = 0.5 * hidden * (1 + torch.erf(hidden / 2**0.5))
    return x + gelu @ block.fc2.weight.T + block.fc2.bias


def plain_blocks(x: Tensor, blocks: Blocks, heads: int) -> Tensor:
    for block in blocks.layers:
        qkv = plain_norm(x, block.norm1) @ block.qkv.weight.T + block.qkv.bias
        mixed = plain_attention(*qkv.chunk(3, dim=1), heads)
        x = plain_second_half(x + mixed @ block.proj.weight.T + block.proj.bias, block)
    return plain_norm(x, blocks.norm)


def plain_position(positions: FactorizedPositions, token: int, rows: int, cols: int) -> Tensor:
    def entry(table: Tensor, place: int, extent: int) -> Tensor:
        at = place if extent <= MAX_GRID else place * (MAX_GRID - 1) / (extent - 1)
        low = min(int(at), MAX_GRID - 2)
        return (1 - (at - low)) * table[low] + (at - low) * table[low + 1]

    return entry(positions.rows, token // cols, rows) + entry(positions.cols, token % cols, cols)


def plain_encoder(encoder: VisionTransformer, patches: Tensor, tokens: list[int], rows: int, cols: int) -> Tensor:
    """The features of some tokens of a view, which see only each other."""
    mean, std = torch.tensor(IMAGENET_MEAN, dtype=torch.float64), torch.tensor(IMAGENET_STD, dtype=torch.float64)
    pixels = (patches.double().unflatten(1, (-1, 3)) / 255 - mean) / std
    x = pixels.flatten(1) @ encoder.patch_embed.weight.T + encoder.patch_embed.bias
    x = x + torch.stack([plain_position(encoder.positions, token, rows, cols) for token in range(rows * cols)])
    return plain_blocks(x[tokens], encoder.blocks, HEADS)


def plain_predictor(
    predictor: Predictor, context: Tensor, tokens: list[int], hidden: int, rows: int, cols: int
) -> Tensor:
    """The answer for one hidden token, asked for by itself."""
    places = torch.stack([plain_position(predictor.positions, token, rows, cols) for token in tokens])
    seen = context @ predictor.embed.weight.T + predictor.embed.bias + places
    x = predictor.mask_token + plain_position(predictor.positions, hidden, rows, cols)
    for block in predictor.layers:
        q = plain_norm(x, block.norm1) @ block.q.weight.T + block.q.bias
        k, v = (plain_norm(seen, block.norm_context) @ block.kv.weight.T + block.kv.bias).chunk(2, dim=1)
        mixed = plain_attention(q, k, v, PREDICTOR_HEADS)
        x = plain_second_half(x + mixed @ block.proj.weight.T + block.proj.bias, block)
    return plain_norm(x, predictor.norm) @ predictor.head.weight.T + predictor.head.bias


def plain_jepa(model: JEPA, patches: list[Tensor], masks: list[ViewMasks]) -> tuple[Tensor, list[Tensor]]:
    """I-JEPA's loss over some views, a mean over all their hidden tokens, and each view's mean context token."""
    total, count, pooled = torch.zeros((), dtype=torch.float64), 0, []
    for (rows, cols), values, mask in zip(GRIDS, patches, masks, strict=True):
        features = plain_encoder(model.teacher, values, list(range(rows * cols)), rows, cols).detach()
        spread = (features.var(dim=1, correction=0, keepdim=True) + 1e-5).sqrt()
        targets = (features - features.mean(dim=1, keepdim=True)) / spread
        tokens = mask.context.tolist()
        context = plain_encoder(model.student, values, tokens, rows, cols)
        pooled.append(context.mean(dim=0))
        for token in {int(token) for block in mask.targets for token in block}:
            predicted = plain_predictor(model.predictor, context, tokens, token, rows, cols)
            error = (predicted - targets[token]).abs()
            total = total + torch.where(error < 1, error.square() / 2, error - 0.5).mean()
            count += 1
    return total / count, pooled


def parts(make_batch: MakeBatch) -> tuple[MaskedBatch, list[Tensor], list[ViewMasks]]:
    batch = make_batch(GRIDS, 3)
    masks = [draw_masks(*grid, MaskConfig(), generator(3, Purpose.MASKS, image=v)) for v, grid in enumerate(GRIDS)]
    return batch, batch.packed.split(), masks


def flat_gradients(model: JEPA) -> Tensor:
    found = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]).double()
    model.zero_grad()
    return found


def distance(found: Tensor, expected: Tensor) -> float:
    return float(((found - expected).norm() / expected.norm()).detach())


@pytest.mark.parametrize("vicreg_weight", [0.0, 0.1])
def test_the_packed_loss_and_its_gradients_are_those_of_the_plain_method(
    make_batch: MakeBatch, vicreg_weight: float
) -> None:
    """In the reference the targets are constants, so a gradient through them would show."""
    model = make_jepa(vicreg_weight)
    batch, patches, masks = parts(make_batch)
    losses = pack_losses(model, batch, len(batch.targets.index), 1)
    losses.total.backward()

    plain = copy.deepcopy(model).double()
    plain.zero_grad()
    prediction, pooled = plain_jepa(plain, patches, masks)
    # The term itself, in numpy, is the matter of test_losses.py; it computes in float32.
    expected = prediction + vicreg_weight * variance_covariance(torch.stack(pooled))
    expected.backward()

    assert distance(losses.prediction, prediction) < BOUND
    assert distance(losses.total, expected) < BOUND
    assert {name for name, value in model.named_parameters() if value.grad is not None} == {
        name for name, value in plain.named_parameters() if value.grad is not None
    }
    assert distance(flat_gradients(model), flat_gradients(plain)) < BOUND


def test_no_gradient_reaches_the_teacher(make_batch: MakeBatch) -> None:
    model = make_jepa(0.1)
    batch = make_batch(GRIDS, 3)
    pack_losses(model, batch, len(batch.targets.index), 1).total.backward()
    assert not any(value.requires_grad or value.grad is not None for value in model.teacher.parameters())
    learned = {name: value for name, value in model.named_parameters() if not name.startswith("teacher.")}
    assert all(value.grad is not None and value.grad.any() for value in learned.values())


def test_targets_are_constants_even_where_the_student_is_its_own_teacher(make_batch: MakeBatch) -> None:
    model = make_jepa(0.0)
    batch = make_batch(GRIDS, 3)
    model.teacher = copy.deepcopy(model.student).requires_grad_(False)
    pack_losses(model, batch, len(batch.targets.index), 1).total.backward()
    expected = flat_gradients(model)
    model.teacher = model.student
    pack_losses(model, batch, len(batch.targets.index), 1).total.backward()
    assert torch.equal(flat_gradients(model), expected)


def test_the_teacher_starts_as_the_student() -> None:
    model = JEPA(EncoderConfig("Ti", 8, 1).architecture, PredictorConfig(32, 1, 2), ObjectiveConfig())
    for teacher, student in zip(model.teacher.parameters(), model.student.parameters(), strict=True):
        assert torch.equal(teacher, student)
        assert teacher is not student


def test_the_teacher_moves_a_tenth_of_the_way_to_the_student() -> None:
    model = make_jepa(0.0)
    before = [value.clone() for value in model.teacher.parameters()]
    students = [value.clone() for value in model.student.parameters()]
    model.update_teacher(0.9)
    for old, student, new in zip(before, students, model.teacher.parameters(), strict=True):
        # Three roundings of float32, 6e-8 each, of numbers up to the larger of the two.
        expected = 0.9 * old.double() + 0.1 * student.double()
        assert ((new - expected).abs() <= 2e-7 * torch.maximum(old.abs(), student.abs())).all()
    for student, now in zip(students, model.student.parameters(), strict=True):
        assert torch.equal(student, now)


@pytest.mark.parametrize(("momentum", "becomes"), [(1.0, "teacher"), (0.0, "student")])
def test_momentum_one_keeps_the_teacher_and_zero_copies_the_student(momentum: float, becomes: str) -> None:
    model = make_jepa(0.0)
    expected = [value.clone() for value in getattr(model, becomes).parameters()]
    model.update_teacher(momentum)
    assert all(torch.equal(*pair) for pair in zip(expected, model.teacher.parameters(), strict=True))


def test_the_shares_of_a_steps_packs_add_up_to_one_pack_of_all(make_batch: MakeBatch) -> None:
    """Packs of very different sizes: a mean of the packs' means would be another number."""
    model = make_jepa(0.0)
    whole = make_batch(GRIDS, 5)
    packs = [make_batch(GRIDS, 5, only=views) for views in ([3], [0, 1, 4], [2])]
    tokens = len(whole.targets.index)
    assert sum(len(pack.targets.index) for pack in packs) == tokens
    expected = pack_losses(model, whole, tokens, 1).total
    expected.backward()
    gradient = flat_gradients(model)
    shares = [pack_losses(model, pack, tokens, len(packs)).total for pack in packs]
    for share in shares:
        share.backward()
    assert distance(torch.stack(shares).sum(), expected) < BOUND
    assert distance(flat_gradients(model), gradient) < BOUND


def test_vicreg_is_a_mean_over_the_packs_of_the_students_mean_context_tokens(make_batch: MakeBatch) -> None:
    model = make_jepa(0.1)
    packs = [make_batch(GRIDS, 5, only=views) for views in ([0, 3], [1, 2, 4])]
    tokens = sum(len(pack.targets.index) for pack in packs)
    by_hand = []
    for pack in packs:
        context = model.student(model.normalize(pack.packed).select(pack.context)).split(pack.context.segments.lengths)
        by_hand.append(variance_covariance(torch.stack([view.mean(dim=0) for view in context])))
    losses = [pack_losses(model, pack, tokens, len(packs)) for pack in packs]
    assert distance(sum(part.vicreg for part in losses), sum(by_hand) / 2) < BOUND
    for part in losses:
        assert distance(part.total, part.prediction + 0.1 * part.vicreg) < BOUND


def test_weight_zero_is_the_plain_method(make_batch: MakeBatch) -> None:
    batch = make_batch(GRIDS, 3)
    plain, stabilized = (pack_losses(make_jepa(weight), batch, len(batch.targets.index), 1) for weight in (0.0, 0.1))
    assert torch.equal(plain.total, plain.prediction)
    assert plain.vicreg == 0
    assert torch.equal(plain.prediction, stabilized.prediction)
    assert stabilized.vicreg > 0


def test_the_contrast_is_of_an_images_own_views_and_a_mean_over_the_packs(make_batch: MakeBatch) -> None:
    """Views 0 and 1, 2 and 3 of a pack belong together."""
    torch.manual_seed(0)
    encoder = EncoderConfig("Ti", 8, 1, max_grid=MAX_GRID).architecture
    model = JEPA(
        encoder, PredictorConfig(32, 1, 2), ObjectiveConfig(vicreg_weight=0.0, contrastive_weight=0.5), views=2
    )
    assert model.projector is not None
    grids = [(5, 4), (2, 9), (7, 7), (4, 4)]
    packs = [make_batch(grids, seed) for seed in (3, 4)]
    tokens = sum(len(pack.targets.index) for pack in packs)
    by_hand = []
    for pack in packs:
        context = model.student(model.normalize(pack.packed).select(pack.context)).split(pack.context.segments.lengths)
        z = model.projector(torch.stack([view.mean(dim=0) for view in context]))
        by_hand.append(nt_xent(torch.stack([z[:2], z[2:]])))
    losses = [pack_losses(model, pack, tokens, 2) for pack in packs]
    assert distance(sum(part.contrastive for part in losses), sum(by_hand) / 2) < BOUND
    for part in losses:
        assert distance(part.total, part.prediction + 0.5 * part.contrastive) < BOUND
    sum(part.total for part in losses).backward()
    assert all(value.grad is not None and value.grad.any() for value in model.projector.parameters())


def with_local(batch: MaskedBatch, local: Packed) -> MaskedBatch:
    seen = Segments.of([*batch.context.segments.lengths, *local.segments.lengths])
    return dataclasses.replace(batch, unmasked=local, seen=seen)


def test_local_views_count_in_the_contrast_and_nowhere_else(make_batch: MakeBatch, make_stream: MakeStream) -> None:
    torch.manual_seed(0)
    model = JEPA(
        EncoderConfig("Ti", 8, 1, max_grid=MAX_GRID).architecture,
        PredictorConfig(32, 1, 2),
        ObjectiveConfig(vicreg_weight=0.1, contrastive_weight=1.0),
        views=2,
    )
    batch = make_batch([(5, 4), (2, 9), (4, 4), (3, 6)])
    grids = [(2, 3), (3, 3), (1, 2), (2, 2), (1, 1), (3, 1)]
    local = make_stream(grids, seed=1)
    tokens = len(batch.targets.index)
    plain = pack_losses(model, batch, tokens, 1)
    assert model.projector is not None
    with torch.no_grad():
        found = pack_losses(model, with_local(batch, local), tokens, 1)
        streams = map(model.normalize, (batch.packed.select(batch.context), local))
        means = [segment_mean(model.student(stream, None), stream.segments.cu_seqlens) for stream in streams]
        contexts, small = model.projector(torch.cat(means)).split([4, 6])
    # Of image 0 the views 0 and 1 and the local views 0, 1 and 2; of image 1 the others.
    expected = nt_xent(
        torch.stack([torch.cat([contexts[2 * i : 2 * i + 2], small[3 * i : 3 * i + 3]]) for i in (0, 1)])
    )
    # The student's products round otherwise when both streams are one.
    for ours, other in ((found.contrastive, expected), (found.prediction, plain.prediction)):
        assert distance(ours, other) < BOUND
    assert distance(found.vicreg, plain.vicreg) < BOUND


def test_the_rate_of_views_counts_local_ones_too(make_batch: MakeBatch, make_stream: MakeStream) -> None:
    batch = with_local(make_batch([(5, 4), (2, 9)]), make_stream([(2, 3), (3, 3), (1, 2)], seed=1))
    model = JEPA(EncoderConfig("Ti", 8, 1).architecture, PredictorConfig(32, 1, 2), ObjectiveConfig())
    meter = Meter()
    meter.add_step([pack_losses(model, batch, len(batch.targets.index), 1)], [batch])
    assert meter.views == 2 + 3


def test_steps_without_a_readable_image_have_no_means(make_batch: MakeBatch) -> None:
    batch = make_batch([(5, 4), (2, 9)])
    model = JEPA(EncoderConfig("Ti", 8, 1).architecture, PredictorConfig(32, 1, 2), ObjectiveConfig())
    meter, ranks = Meter(), Ranks(torch.device("cpu"))
    meter.add_step([], [])
    assert meter.read(100, ranks) == {}
    losses = pack_losses(model, batch, len(batch.targets.index), 1)
    meter.add_step([losses], [batch])
    assert meter.read(100, ranks)["loss"] == losses.total.item()


def test_a_single_view_and_its_local_ones_agree(make_batch: MakeBatch, make_stream: MakeStream) -> None:
    torch.manual_seed(0)
    model = JEPA(
        EncoderConfig("Ti", 8, 1, max_grid=MAX_GRID).architecture,
        PredictorConfig(32, 1, 2),
        ObjectiveConfig(vicreg_weight=0.0, contrastive_weight=1.0),
    )
    batch = make_batch([(5, 4), (2, 9)])
    assert pack_losses(model, with_local(batch, make_stream([(2, 3), (3, 3)], seed=1)), 10, 1).contrastive > 0


def test_views_of_one_image_alone_have_no_contrast(make_batch: MakeBatch) -> None:
    model = JEPA(
        EncoderConfig("Ti", 8, 1).architecture,
        PredictorConfig(32, 1, 2),
        ObjectiveConfig(contrastive_weight=1.0),
        views=2,
    )
    losses = pack_losses(model, make_batch([(4, 4), (3, 5)], 0), 10, 1)
    assert losses.contrastive == 0
    assert losses.vicreg > 0


def test_a_pack_of_one_view_has_no_vicreg_loss(make_batch: MakeBatch) -> None:
    batch = make_batch(GRIDS, 3, only=[2])
    losses = pack_losses(make_jepa(0.1), batch, len(batch.targets.index))
    assert losses.vicreg == 0
    assert torch.isfinite(losses.total)


def test_merging_at_rate_zero_changes_not_one_bit(make_batch: MakeBatch) -> None:
    plain, zero, merged = (
        pack_losses(make_jepa(0.1), make_batch(GRIDS, 3, depth=2, rates=rates), 100).total
        for rates in ((0.0, 0.0), (0, 0), (0.2, 0.2))
    )
    assert torch.equal(plain, zero)
    assert not torch.equal(plain, merged)


class Products(TorchDispatchMode):
    """The sizes of what oneDNN multiplies: in bfloat16 all, in float32 what asks for it."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[int] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        tensors = [x for x in args if isinstance(x, Tensor) and x.ndim == 2]
        half = function.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm)
        if function.overloadpacket == torch.ops.mkldnn._linear_pointwise or (
            half and tensors[0].dtype == torch.bfloat16
        ):
            self.sizes += [size for x in tensors for size in x.shape]
        return function(*args, **(kwargs or {}))


@pytest.mark.skipif(not HAS_BF16, reason="this processor multiplies no bfloat16, or PyTorch has no oneDNN")
@pytest.mark.parametrize("half", [True, False], ids=["bfloat16", "float32"])
@pytest.mark.parametrize("rates", [(0.0, 0.0), (0.25, 0.25)], ids=["plain", "merging"])
def test_products_on_a_cpu_have_sizes_that_come_again(
    make_batch: MakeBatch, rates: tuple[float, float], half: bool
) -> None:
    """oneDNN compiles each. Streams of 97 tokens, their contexts, targets and what is merged of them are rounded up."""
    batch = make_batch(GRIDS, 3, depth=2, rates=rates)
    with Products() as products:
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            loss = pack_losses(make_jepa(0.0), batch, 100).total
        loss.backward()
    assert len(products.sizes) > 100
    assert not [size for size in products.sizes if size % 8]


@pytest.mark.parametrize("rates", [(0.25, 0.0), (0.0, 0.25)], ids=["teacher", "student"])
def test_merged_features_are_back_at_their_patches(make_batch: MakeBatch, rates: tuple[float, float]) -> None:
    """The loss with merging by hand: each network's features of every patch, then the same objective."""
    model = make_jepa(0.0)
    batch = make_batch(GRIDS, 3, depth=2, rates=rates)
    tokens = len(batch.targets.index)
    with torch.no_grad():
        normalized = model.normalize(batch.packed)
        # In each view alone, and with the same plan that the view has in any pack.
        features = torch.cat([encoded(model.teacher, normalized, view, rates[0]) for view in range(len(GRIDS))])
        visible = normalized.select(batch.context)
        context = torch.cat([encoded(model.student, visible, view, rates[1]) for view in range(len(GRIDS))])
        targets = torch.nn.functional.layer_norm(features, features.shape[1:])[batch.targets.index]
        error = (model.predictor(context, visible, batch.packed.select(batch.targets)) - targets).abs()
        expected = torch.where(error < 1, error.square() / 2, error - 0.5).mean(dim=1).sum() / tokens
    assert distance(pack_losses(model, batch, tokens, 1).prediction, expected) < BOUND


def encoded(network: VisionTransformer, packed: Packed, view: int, rate: float) -> Tensor:
    """The features of one view of a pack, merged as `merge_plan.merged_lengths` says."""
    start, stop = packed.segments.cu_seqlens[view : view + 2].tolist()
    alone = Packed(
        packed.values[start:stop],
        packed.positions[start:stop],
        packed.grids[view : view + 1],
        Segments.of([stop - start]),
    )
    features: Tensor = network(alone, plan_merges(alone.segments.lengths, rate, 2))
    assert len(features) == stop - start
    assert len(features.unique(dim=0)) == merged_lengths([stop - start], rate, 2)[-1, 0]
    return features


def test_a_student_that_merges_learns_through_its_means(make_batch: MakeBatch) -> None:
    """The gradient, along itself, is what the loss changes by."""
    model = make_jepa(0.1)
    batch = make_batch(GRIDS, 3, depth=2, rates=(0.2, 0.2))
    tokens = len(batch.targets.index)

    def loss() -> Tensor:
        total: Tensor = pack_losses(model, batch, tokens, 1).total
        return total

    loss().backward()
    learned = [value for value in model.parameters() if value.grad is not None]
    gradient = [value.grad.clone() for value in learned if value.grad is not None]
    slope = sum(float(part.square().sum()) for part in gradient)
    step = 1e-3 / slope  # up and down by a thousandth, of which float32 rounds less than a thousandth
    with torch.no_grad():
        around = []
        for sign in (1, -1):
            torch._foreach_add_(learned, gradient, alpha=sign * step)
            around.append(float(loss()))
            torch._foreach_add_(learned, gradient, alpha=-sign * step)
    assert (around[0] - around[1]) / (2 * step) == pytest.approx(slope, rel=0.01)


@pytest.mark.parametrize(("weight", "rule"), [(-0.1, "at least 0"), (math.nan, "at least 0"), (math.inf, "finite")])
def test_a_weight_that_is_negative_or_not_finite_is_an_error(weight: float, rule: str) -> None:
    with pytest.raises(ValueError, match=rf"^objective\.vicreg_weight must be {rule}, not {weight}\.$"):
        ObjectiveConfig(vicreg_weight=weight)


def test_an_objective_without_any_term_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"^No loss is enabled\. Set one of objective\.prediction_weight, "):
        ObjectiveConfig(prediction_weight=0.0, vicreg_weight=0.0)


def test_without_prediction_neither_teacher_nor_predictor_runs(make_batch: MakeBatch) -> None:
    torch.manual_seed(0)
    objective = ObjectiveConfig(prediction_weight=0.0, contrastive_weight=1.0)
    model = JEPA(
        EncoderConfig("Ti", 8, 1, max_grid=MAX_GRID).architecture, PredictorConfig(32, 1, 2), objective, views=2
    )
    assert model.predictor is None
    model.teacher.register_forward_hook(lambda *_: pytest.fail("the teacher ran"))
    batch = make_batch([(5, 4), (2, 9), (4, 4), (3, 6)])
    losses = pack_losses(model, batch, len(batch.targets.index))
    assert losses.prediction == 0
    assert torch.equal(losses.total, 0.1 * losses.vicreg + losses.contrastive)
    losses.total.backward()
    assert all(value.grad is not None for value in model.trainable())


def test_the_weight_of_the_prediction_scales_its_gradient(make_batch: MakeBatch) -> None:
    batch = make_batch(GRIDS, 3)
    gradients = []
    for weight in (1.0, 4.0):
        torch.manual_seed(0)
        objective = ObjectiveConfig(prediction_weight=weight, vicreg_weight=0.0)
        model = JEPA(EncoderConfig("Ti", 8, 1, max_grid=MAX_GRID).architecture, PredictorConfig(32, 1, 2), objective)
        pack_losses(model, batch, len(batch.targets.index)).total.backward()
        gradients.append(flat_gradients(model))
    assert torch.equal(4 * gradients[0], gradients[1])  # a power of two rounds nothing
