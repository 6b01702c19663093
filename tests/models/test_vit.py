"""The network: its sizes, its settings, merging in its blocks, and what it returns."""

import copy
import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ijepa_enhanced.merge_plan import MergePlan
from ijepa_enhanced.models.blocks import SinCosPositions
from ijepa_enhanced.models.config import Architecture, EncoderConfig
from ijepa_enhanced.models.vit import PatchMLP, VisionTransformer
from ijepa_enhanced.ops.merging import match, merge
from ijepa_enhanced.packed import Packed

TINY = EncoderConfig(variant="Ti", depth=2, patch_size=8).architecture


@pytest.mark.parametrize(
    ("variant", "width", "depth"),
    [("S", 384, 12), ("B", 768, 12)],
)
def test_parameters_are_counted_by_hand(variant: str, width: int, depth: int) -> None:
    block = 2 * 2 * width  # two LayerNorms
    block += 3 * width * width + 3 * width  # queries, keys and values
    block += width * width + width  # after attention
    block += width * 4 * width + 4 * width + 4 * width * width + width  # MLP
    patches = 16 * 16 * 3 * width + width
    positions = 2 * 32 * width
    expected = patches + positions + depth * block + 2 * width
    with torch.device("meta"):
        network = VisionTransformer(EncoderConfig(variant=variant, patch_size=16).architecture)
    assert sum(value.numel() for value in network.parameters()) == expected
    # The published 22 and 86 million of DeiT and ViT have a class token and a head as well.
    assert round(expected / 1e6) == {"S": 22, "B": 86}[variant]


@pytest.fixture(scope="module")
def network() -> VisionTransformer:
    torch.manual_seed(0)
    return VisionTransformer(TINY).eval()


def stream(make_stream: Callable[..., Packed], grids: Sequence[tuple[int, int]]) -> Packed:
    """Random normalized patches."""
    packed = make_stream(grids, 0)
    return packed.with_values(packed.values / 127.5 - 1)


def test_merging_happens_after_attention_and_before_the_mlp(
    network: VisionTransformer, make_stream: Callable[..., Packed]
) -> None:
    """One layer with merging, by hand: `match` and `merge` are tested in tests/ops/test_merging.py."""
    packed = stream(make_stream, [(4, 5), (3, 3)])
    plan = MergePlan.of(packed.segments.lengths, [0.3, 0.0], 2)
    first, second = network.blocks.layers
    with torch.no_grad():
        (found,), merges = network.tokens(packed, plan)
        x = network.patch_embed(packed.values)
        x = x + network.positions(packed.positions, packed.grids, packed.segments.cu_seqlens)
        x, keys = first.attend(x, packed.segments)
        merging = match(keys.mean(dim=1), plan, 0)
        x, sizes = merge(x, torch.ones(29), merging)
        x = first.transform(x)
        x, _ = second.attend(x, plan.segments[1], sizes)
        x = network.blocks.norm(second.transform(x))
    assert merges[0] is not None
    assert merges[1] is None
    assert torch.equal(merges[0].origin, merging.origin)
    assert sizes.max() > 1
    torch.testing.assert_close(found, x, rtol=0, atol=1e-6)


@pytest.mark.parametrize("rate", [0.0, 0.2])
def test_the_last_layers_end_with_the_networks_output(
    network: VisionTransformer, make_stream: Callable[..., Packed], rate: float
) -> None:
    packed = stream(make_stream, [(4, 5), (3, 3)])
    plan = MergePlan.of(packed.segments.lengths, rate, 2) if rate else None
    with torch.no_grad():
        first, last = network.last_layers(packed, plan, count=4)  # all there are
        assert torch.equal(last, network(packed, plan))
        shallow = copy.deepcopy(network)
        shallow.blocks.layers = shallow.blocks.layers[:1]
        shallow_plan = MergePlan.of(packed.segments.lengths, rate, 1) if rate else None
        assert torch.equal(first, shallow(packed, shallow_plan))


def test_blocks_are_called_as_modules(network: VisionTransformer, make_stream: Callable[..., Packed]) -> None:
    """What hooks, profilers, activation checkpointing and `fully_shard` need."""
    called: list[nn.Module] = []
    hooks = [block.register_forward_hook(lambda module, *_: called.append(module)) for block in network.blocks.layers]
    network(stream(make_stream, [(2, 3)]))
    for hook in hooks:
        hook.remove()
    assert called == list(network.blocks.layers)


@pytest.mark.parametrize("positions", ["factorized", "sincos"])
@pytest.mark.parametrize(
    ("dtype", "bound"),
    # Norm of the difference to float32 by the norm; rounding is 2 ** -8, 2 ** -11 and none, through two blocks.
    [(torch.bfloat16, 2e-2), (torch.float16, 3e-3), (torch.float64, 2e-6)],
)
def test_the_networks_precision_is_that_of_its_weights(
    make_stream: Callable[..., Packed], positions: str, dtype: torch.dtype, bound: float
) -> None:
    torch.manual_seed(0)
    network = VisionTransformer(dataclasses.replace(TINY, positions=positions)).eval()
    packed = stream(make_stream, [(4, 5), (3, 3)])
    plan = MergePlan.of(packed.segments.lengths, 0.1, 2)
    with torch.no_grad():
        expected = network(packed, plan)
        found = copy.deepcopy(network).to(dtype)(packed, plan)
    assert found.dtype == dtype
    assert float((found.float() - expected).norm() / expected.norm()) < bound


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"variant": "XL"}, "encoder.variant must be one of Ti, S, B, L, H, g, not 'XL'."),
        ({"patch_size": 7}, "encoder.patch_size must be 8, 14 or 16, not 7."),
        ({"positions": "none"}, "encoder.positions must be factorized or sincos, not 'none'."),
        ({"patch_embed": "conv"}, "encoder.patch_embed must be linear or mlp, not 'conv'."),
        ({"depth": 0}, "encoder.depth must be at least 1, not 0."),
        ({"max_grid": 0}, "encoder.max_grid must be at least 1, not 0."),
    ],
)
def test_a_wrong_setting_is_an_error(settings: dict[str, str | int], message: str) -> None:
    with pytest.raises(ValueError, match=r"^encoder\.") as error:
        EncoderConfig(**settings)  # type: ignore[arg-type]
    assert str(error.value) == message


def test_a_variants_depth_can_be_changed_alone() -> None:
    whole = EncoderConfig("g").architecture
    assert (whole.width, whole.depth, whole.heads, whole.hidden) == (1408, 40, 16, 6144)
    assert EncoderConfig("g", depth=3).architecture == dataclasses.replace(whole, depth=3)


def test_sincos_positions_learn_nothing(network: VisionTransformer) -> None:
    fixed = VisionTransformer(dataclasses.replace(TINY, positions="sincos"))
    assert isinstance(fixed.positions, SinCosPositions)
    lost = {name for name, _ in network.named_parameters()} - {name for name, _ in fixed.named_parameters()}
    assert lost == {"positions.rows", "positions.cols"}


def test_a_patch_embedding_may_have_a_hidden_layer() -> None:
    torch.manual_seed(0)
    network = VisionTransformer(dataclasses.replace(TINY, patch_embed="mlp"))
    names = {name for name, _ in network.named_parameters() if name.startswith("patch_embed.")}
    assert names == {f"patch_embed.{layer}.{part}" for layer in ("hidden", "out") for part in ("weight", "bias")}
    layers = network.patch_embed
    assert isinstance(layers, PatchMLP)
    with torch.no_grad():
        x = torch.randn(1000, 8 * 8 * 3)
        hidden = layers.hidden(x)
        # He's start for unit variance; 384 units of 192 weights each leave less than 1% to chance.
        assert float(hidden.std()) == pytest.approx(2**0.5, rel=0.01)
        torch.testing.assert_close(layers(x), torch.nn.functional.gelu(hidden) @ layers.out.weight.T)


def plain(network: VisionTransformer, patches: Tensor, grid: tuple[int, int]) -> Tensor:
    """One view, by the formulas of the papers: [patches, P * P * 3] -> [prefix + patches, D]."""
    config, x = network.config, network.patch_embed(patches)
    rows, cols = torch.cartesian_prod(torch.arange(grid[0]), torch.arange(grid[1])).unbind(1)
    if config.positions == "table":  # of this grid
        x = x + network.positions.table[rows, cols]
    x = torch.cat([network.prefix, x])

    def turned(heads: Tensor) -> Tensor:
        """Queries or keys [tokens, H, K], rotated if the architecture says so; a class token is not."""
        if config.positions != "rope":
            return heads
        width = heads.shape[2]
        frequencies = config.rope_base ** -(torch.arange(width // 4) / (width // 4))
        places = [2 * math.pi * (2 * (axis + 0.5) / size - 1) for axis, size in zip((rows, cols), grid, strict=True)]
        angles = torch.cat([place[:, None] * frequencies for place in places], dim=1)[:, None]  # [patches, 1, K / 2]
        turn = torch.polar(torch.ones_like(angles), angles)
        first, second = heads[config.prefix :].chunk(2, dim=2)
        moved = torch.complex(first, second) * turn
        return torch.cat([heads[: config.prefix], torch.cat([moved.real, moved.imag], dim=2)])

    for block in network.blocks.layers:
        q, k, v = block.qkv(block.norm1(x)).unflatten(1, (3, config.heads, -1)).unbind(1)
        logits = torch.einsum("ihk,jhk->hij", turned(q), turned(k)) / q.shape[2] ** 0.5
        x = x + block.scale1 * block.proj(torch.einsum("hij,jhk->ihk", logits.softmax(dim=2), v).flatten(1))
        hidden = block.fc1(block.norm2(x))
        if config.gated:
            gate, value = hidden.chunk(2, dim=1)
            hidden = gate * gate.sigmoid() * value
        else:
            hidden = hidden * (1 + torch.erf(hidden / 2**0.5)) / 2
        x = x + block.scale2 * block.fc2(hidden)
    return network.blocks.norm(x)


@pytest.mark.parametrize(
    "parts", [{"positions": "table", "position_grid": (3, 5)}, {"positions": "rope", "gated": True}]
)
def test_the_network_is_that_of_the_papers(make_stream: Callable[..., Packed], parts: dict[str, Any]) -> None:
    config = Architecture(
        *(64, 3, 2, 96, 8),
        resampling="bicubic",
        class_token=True,
        registers=2,
        layer_scale=True,
        norm_eps=1e-3,
        **parts,
    )
    torch.manual_seed(0)
    network = VisionTransformer(config).eval()
    with torch.no_grad():
        for value in network.parameters():  # as after training: nothing is 0 or 1
            value.add_(torch.randn_like(value) * 0.2)
        packed = make_stream([(3, 5), (2, 2)], 0, config.prefix)
        packed = packed.with_values(packed.values / 127.5 - 1)
        found = network(packed)[: 3 + 15]
        expected = plain(network, packed.values[3 : 3 + 15], (3, 5))
    # Norm of the difference by the norm: three blocks of sums of up to 192 numbers, each rounded at 6e-8.
    assert float((found - expected).norm() / expected.norm()) < 5e-6
