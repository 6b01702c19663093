"""Positions by hand, a block's parts, and the start of the weights."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from ijepa_enhanced.merge_plan import plan_merges
from ijepa_enhanced.models.blocks import Blocks, FactorizedPositions, SinCosPositions, init_weights
from ijepa_enhanced.models.config import Architecture
from ijepa_enhanced.packed import Packed, Segments


def positions_of(rows: int, cols: int) -> torch.Tensor:
    return torch.cartesian_prod(torch.arange(rows), torch.arange(cols)).int()


@pytest.fixture
def table() -> FactorizedPositions:
    """Row r is 10 r in the first of two dimensions, column c is c in the second."""
    positions = FactorizedPositions(2, (4, 4))
    with torch.no_grad():
        positions.rows.copy_(torch.tensor([[0.0, 0], [10, 0], [20, 0], [30, 0]]))
        positions.cols.copy_(torch.tensor([[0.0, 0], [0, 1], [0, 2], [0, 3]]))
    return positions


def test_positions_are_a_row_and_a_column_added(table: FactorizedPositions) -> None:
    found = table(positions_of(2, 4), torch.tensor([[2, 4]]), Segments.of([8]).cu_seqlens)
    assert found.tolist() == [[10 * row, col] for row in (0, 1) for col in (0, 1, 2, 3)]


def test_a_longer_grid_is_interpolated_axis_by_axis_onto_the_table(table: FactorizedPositions) -> None:
    # Seven rows span the table's four entries: half a step each. Two columns are read as they are.
    found = table(positions_of(7, 2), torch.tensor([[7, 2]]), Segments.of([14]).cu_seqlens)
    # All of these numbers are exact in float32 but for the rounding of 3 / 6 times the row, which is exact too.
    assert found.tolist() == [[5 * row, col] for row in range(7) for col in (0, 1)]


def test_each_view_is_interpolated_by_its_own_grid(table: FactorizedPositions) -> None:
    grids = torch.tensor([[7, 1], [3, 1], [1, 13]])
    positions = torch.cat([positions_of(rows, cols) for rows, cols in grids.tolist()])
    found = table(positions, grids, Segments.of([7, 3, 13]).cu_seqlens)
    expected = [[5 * row, 0] for row in range(7)] + [[10 * row, 0] for row in range(3)]
    expected += [[0, 0.25 * col] for col in range(13)]
    assert found.tolist() == expected


def test_positions_stay_float32_under_autocast(table: FactorizedPositions) -> None:
    with torch.no_grad():
        table.rows.fill_(1 + 2**-12)
    arguments = positions_of(2, 2), torch.tensor([[2, 2]]), Segments.of([4]).cu_seqlens
    with torch.autocast("cpu", torch.bfloat16):
        found = table(*arguments)
    assert found.dtype == torch.float32
    assert torch.equal(found, table(*arguments))


def test_sincos_positions_of_a_long_grid_are_squeezed_onto_the_trained_one() -> None:
    positions = SinCosPositions(8, (3, 3))
    found = positions(positions_of(5, 1), torch.tensor([[5, 1]]), Segments.of([5]).cu_seqlens)
    for row, vector in zip((0, 0.5, 1, 1.5, 2), found, strict=True):
        # Column 0 first: sines of 0, cosines of 0. Then the row with frequencies 1 and 10000 ** (-1 / 2).
        expected = [0, 0, 1, 1, math.sin(row), math.sin(row / 100), math.cos(row), math.cos(row / 100)]
        assert vector.tolist() == pytest.approx(expected, abs=1e-7)  # one rounding of numbers up to 1


def test_a_block_without_its_two_writers_is_the_identity() -> None:
    blocks = Blocks(Architecture(12, 3, 2, 48))
    with torch.no_grad():
        for layer in blocks.layers:
            for part in (layer.proj, layer.fc2):
                part.weight.zero_()
                part.bias.zero_()
    x = torch.randn(5, 12, generator=torch.Generator().manual_seed(0))
    (found,), merges = blocks(x, Segments.of([2, 3]))
    assert torch.equal(found, blocks.norm(x))
    assert merges == [None] * 3


def test_the_start_is_i_jepas() -> None:
    """Deviation 0.02, the two writers of layer l divided by sqrt(2 l), no bias."""
    torch.manual_seed(0)
    module = nn.ModuleDict({"blocks": Blocks(Architecture(192, 4, 3, 768))})
    init_weights(module)
    # A deviation of n numbers is off by 1 / sqrt(2 n): five times that for the smallest of 24,576.
    close = {"rel": 5 / math.sqrt(2 * 24_576)}
    for number, layer in enumerate(module["blocks"].layers, start=1):
        for part in (layer.qkv, layer.fc1):
            assert part.weight.std().item() == pytest.approx(0.02, **close)
        for part in (layer.proj, layer.fc2):
            assert part.weight.std().item() == pytest.approx(0.02 / math.sqrt(2 * number), **close)
        assert not any(part.bias.any() for part in (layer.qkv, layer.proj, layer.fc1, layer.fc2))


def test_learnable_positions_start_as_the_sine_cosine_ones() -> None:
    learnable, fixed = FactorizedPositions(192, (16, 16)), SinCosPositions(192, (16, 16))
    init_weights(learnable)
    arguments = positions_of(16, 9), torch.tensor([[16, 9]]), Segments.of([16 * 9]).cu_seqlens
    # Each number is read from one table and has a zero of the other added; the matrix product rounds once.
    torch.testing.assert_close(learnable(*arguments).detach(), fixed(*arguments), rtol=0, atol=1e-6)
    assert all(value.requires_grad for value in learnable.parameters())


def test_the_epsilon_is_vits() -> None:
    norms = [part for part in Blocks(Architecture(8, 2, 2, 32)).modules() if isinstance(part, nn.LayerNorm)]
    assert {part.eps for part in norms} == {1e-6}


def test_activations_that_are_computed_again_take_less_memory_and_change_not_one_bit(
    make_stream: Callable[..., Packed],
) -> None:
    torch.manual_seed(0)
    stream = make_stream([(6, 5), (3, 8), (4, 4)])
    plan = plan_merges(stream.segments.lengths, 0.2, depth=3)
    blocks = Blocks(Architecture(32, 3, 2, 128))
    init_weights(blocks)
    x = torch.randn(stream.segments.total, 32)

    def gradients() -> tuple[list[Tensor], int]:
        held: dict[int, int] = {}

        def keep(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            held[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            (features,), _ = blocks(x, stream.segments, plan)
        features.square().mean().backward()
        found = [value.grad.clone() for value in blocks.parameters() if value.grad is not None]
        blocks.zero_grad()
        return found, sum(held.values())

    expected, most = gradients()
    blocks.recompute = True
    found, fewer = gradients()
    assert len(found) == len(expected) > 0
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(found, expected, strict=True))
    # Of about 16 numbers of width D that a block keeps for each token, one is left, and the weights.
    assert fewer < most / 2
