"""Token merging against ToMe's definition written down plainly, and what a pack, a tie or a compiler may not change."""

import math
from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ijepa_enhanced.evaluate.cost import peak_bytes
from ijepa_enhanced.merge_plan import MergePlan
from ijepa_enhanced.ops.merging import TILES_AT_ONCE, Merge, best_matches, chain, match, merge, unmerge

# Cosines nearer to each other than this are left to chance by any arithmetic in float32 (roundings of 6e-8, a few for
# the length of a key and one for each of up to 64 products, of which the larger are few).
CLEAR = 1e-6

VIEWS = st.lists(st.integers(1, 300), min_size=1, max_size=6)
FEW = settings(max_examples=25, deadline=None, derandomize=True)


def draw(tokens: int, width: int, seed: int = 0) -> Tensor:
    """Standard normal numbers [tokens, width]."""
    return torch.randn(tokens, width, generator=torch.Generator().manual_seed(seed))


def draw_sizes(tokens: int, seed: int = 0) -> Tensor:
    return torch.randint(1, 9, (tokens,), generator=torch.Generator().manual_seed(seed)).float()


def tome(metric: Tensor, merged: int) -> tuple[list[list[int]], float]:
    """One image by ToMe (arXiv 2210.09461, section 3): what becomes one, and how clear the closest choice was.

    Tokens are dealt in turn to A and B; each of A has one edge, to the token of B with the most similar key; the
    `merged` most similar edges stay, and what they connect becomes one. Ties go to the first.
    """
    keys = F.normalize(metric.double(), dim=1)
    edges, clear = [], [math.inf]
    for number, similarities in enumerate((keys[::2] @ keys[1::2].T).tolist()):
        for nearest, *others in [sorted(similarities, reverse=True)] if similarities else []:
            edges.append((-nearest, 2 * number, 2 * similarities.index(nearest) + 1))
            clear += [nearest - other for other in others[:1]]
    edges.sort()
    if 0 < merged < len(edges):
        clear.append(edges[merged][0] - edges[merged - 1][0])
    groups = {token: [token] for token in range(len(metric))}
    for _, token, partner in edges[:merged]:
        groups[partner] += groups.pop(token)
    return [sorted(groups[token]) for token in sorted(groups)], min(clear)


def groups_of(merging: Merge) -> list[list[int]]:
    """The rows that become each row of the merged stream."""
    groups: list[list[int]] = [[] for _ in range(merging.rows)]
    for row, place in enumerate(merging.origin.tolist()):
        groups[place].append(row)
    return groups


def test_one_view_by_hand() -> None:
    # Places 0, 2 and 4 look for their like among 1 and 3: 0 finds 1 exactly, 4 nearly finds 3, 2 is like neither.
    metric = torch.tensor([[1.0, 0.0], [2.0, 0.0], [0.0, 1.0], [-1.0, -1.0], [-1.0, -0.9]])
    x = torch.tensor([[1.0, 10.0], [4.0, 10.0], [7.0, 0.0], [0.0, 8.0], [2.0, 0.0]])
    sizes = torch.tensor([1.0, 2.0, 1.0, 1.0, 3.0])
    one = match(metric, MergePlan.of([5], 0.2, 1), 0)
    assert (one.origin.tolist(), one.rows) == ([0, 0, 1, 2, 3], 4)
    two = match(metric, MergePlan.of([5], 0.4, 1), 0)
    assert (two.origin.tolist(), two.rows) == ([0, 0, 1, 2, 2], 3)
    means, counts = merge(x, sizes, two)
    torch.testing.assert_close(means, torch.tensor([[3.0, 10.0], [7.0, 0.0], [1.5, 2.0]]))
    assert counts.tolist() == [3, 1, 4]
    assert unmerge(counts, two).tolist() == [3, 3, 1, 4, 4]


def test_hundreds_of_images_merge_as_tome_defines_it() -> None:
    compared = 0
    for case in range(400):
        n, width = (
            int(torch.randint(1, most, (), generator=torch.Generator().manual_seed(case))) for most in (300, 65)
        )
        metric, x, sizes = draw(n, width, case), draw(n, 5, case + 1), draw_sizes(n, case)
        plan = MergePlan.of([n], (0.02, 0.1, 0.3, 0.5)[case % 4], 1)
        expected, clear = tome(metric, n - plan.totals[1])
        if clear < CLEAR:
            continue
        compared += 1
        merging = match(metric, plan, 0)
        assert groups_of(merging) == expected
        means, counts = merge(x, sizes, merging)
        weights = [sizes[group].double() for group in expected]
        assert counts.tolist() == [own.sum() for own in weights]
        sums = [own @ x[group].double() / own.sum() for own, group in zip(weights, expected, strict=True)]
        # Three roundings of shares of numbers below 5, and one an addition.
        torch.testing.assert_close(means.double(), torch.stack(sums), rtol=0, atol=4 * 5 * 2**-24)
    assert compared > 250


@pytest.mark.parametrize("n", [3001, 4096])
def test_a_view_of_several_rounds_merges_as_tome_defines_it(n: int) -> None:
    metric = draw(n, 64, 2)
    plan = MergePlan.of([n], 0.2, 1)
    assert len(plan.tiles) > 2 * TILES_AT_ONCE
    expected, clear = tome(metric, n - plan.totals[1])
    assert clear > CLEAR
    assert groups_of(match(metric, plan, 0)) == expected


@FEW
@given(VIEWS, st.integers(0, 1000), st.sampled_from([0.05, 0.3, 0.5]), st.data())
def test_a_view_merges_the_same_alone_and_in_any_pack(
    lengths: list[int], seed: int, rate: float, data: st.DataObject
) -> None:
    views = [(draw(n, 24, seed + number), draw_sizes(n, seed)) for number, n in enumerate(lengths)]

    def merged(numbers: list[int]) -> dict[int, tuple[list[int], Tensor, Tensor]]:
        """Of each view after two layers: the row of its own that holds each token, features and sizes."""
        plan = MergePlan.of([lengths[number] for number in numbers], rate, 2)
        x, sizes = (torch.cat(parts) for parts in zip(*(views[number] for number in numbers), strict=True))
        first = match(x, plan, 0)
        x, sizes = merge(x, sizes, first)
        second = match(x, plan, 1)
        x, sizes = merge(x, sizes, second)
        before, after = plan.segments[0], plan.segments[2]
        origins = chain(first, second).origin - after.cu_seqlens[:-1].repeat_interleave(torch.diff(before.cu_seqlens))
        parts = [
            [part.tolist() for part in origins.split(before.lengths)],
            x.split(after.lengths),
            sizes.split(after.lengths),
        ]
        return dict(zip(numbers, zip(*parts, strict=True), strict=True))

    packed, moved = merged([*range(len(lengths))]), merged(data.draw(st.permutations(range(len(lengths)))))
    for number in range(len(lengths)):
        alone = merged([number])[number]
        for origin, x, sizes in (packed[number], moved[number]):
            assert origin == alone[0]
            assert torch.equal(x, alone[1]), "to the bit"
            assert torch.equal(sizes, alone[2])


@FEW
@given(VIEWS, st.integers(0, 1000), st.sampled_from([0.05, 0.3, 0.5]), st.data())
def test_another_view_changes_not_one_bit(lengths: list[int], seed: int, rate: float, data: st.DataObject) -> None:
    plan = MergePlan.of(lengths, rate, 1)
    x, sizes = draw(sum(lengths), 16, seed), draw_sizes(sum(lengths), seed)
    changed = data.draw(st.integers(0, len(lengths) - 1))
    other = torch.cat([-3 * part.flip(0) if view == changed else part for view, part in enumerate(x.split(lengths))])
    before, after = (merge(stream, sizes, match(stream, plan, 0)) for stream in (x, other))
    for one, another in zip(before, after, strict=True):
        parts = zip(*(whole.split(plan.segments[1].lengths) for whole in (one, another)), strict=True)
        assert all(torch.equal(*pair) for view, pair in enumerate(parts) if view != changed)


@FEW
@given(VIEWS, st.integers(0, 1000), st.sampled_from([0.05, 0.3, 0.5]))
def test_nothing_is_lost_and_what_is_left_keeps_its_order(lengths: list[int], seed: int, rate: float) -> None:
    plan = MergePlan.of(lengths, rate, 3)
    tokens = draw(sum(lengths), 16, seed)
    x, sizes, total = tokens, torch.ones(len(tokens)), Merge(torch.arange(len(tokens)), len(tokens))
    for layer in range(3):
        merging = match(x, plan, layer)
        view = view_of(plan, layer)
        assert torch.equal(unmerge(view_of(plan, layer + 1), merging), view), "never across views"
        # What a group was merged into stands at an odd place of its view; a token left alone stands anywhere.
        place = torch.arange(len(x)) - plan.segments[layer].cu_seqlens[view]
        heads = [next((row for row in group if place[row] % 2), group[0]) for group in groups_of(merging)]
        assert heads == sorted(heads)
        x, sizes = merge(x, sizes, merging)
        total = chain(total, merging)
    assert torch.equal(sizes, torch.bincount(total.origin, minlength=total.rows).float())
    alone = unmerge(sizes, total) == 1
    assert torch.equal(unmerge(x, total)[alone], tokens[alone]), "to the bit"
    # Merged layer by layer or at once: a few roundings of numbers below 5 in each of three layers.
    torch.testing.assert_close(merge(tokens, torch.ones(len(tokens)), total)[0], x, rtol=0, atol=3 * 4 * 5 * 2**-24)


def view_of(plan: MergePlan, layer: int) -> Tensor:
    lengths = torch.tensor(plan.segments[layer].lengths)
    return torch.arange(len(lengths)).repeat_interleave(lengths)


@pytest.mark.parametrize("width", [8, 24, 37, 64, 80, 128])
@pytest.mark.parametrize("rate", [0.1, 0.5])
def test_equal_tokens_merge_by_place_the_first_ones_into_the_first(width: int, rate: float) -> None:
    # Lengths on both sides of one and more tiles, so that tiles are full, begun and absent.
    lengths = [1, 2, 3, 127, 128, 129, 600]
    plan = MergePlan.of(lengths, rate, 1)
    groups = iter(groups_of(match(draw(1, width).expand(sum(lengths), width), plan, 0)))
    for start, n, left in zip(plan.segments[0].cu_seqlens.tolist(), *(s.lengths for s in plan.segments), strict=False):
        joined = [2 * number for number in range(n - left)]
        alone = [[token] for token in range(n) if token != 1 and token not in joined]
        expected = sorted([*alone, *[sorted([*joined, 1])] * (n > 1)], key=lambda group: 1 if 1 in group else group[0])
        assert [[row - start for row in next(groups)] for _ in range(left)] == expected


def test_similarities_of_nought_are_equal_whatever_their_sign() -> None:
    # Keys of nought times negative ones may be -0.
    metric = torch.tensor([[0.0], [-1.0], [0.0], [1.0], [0.0], [-1.0], [1.0], [-1.0]])
    merging = match(metric, MergePlan.of([8], 0.5, 1), 0)
    assert merging.origin.tolist() == [0, 0, 0, 1, 0, 2, 1, 3]


def test_negative_similarities_are_ordered_too() -> None:
    # Place 0 has no like: -0.6 and -0.8; place 2 is worse off: -0.8 and -1.
    metric = torch.tensor([[1.0, 0.0], [-0.8, 0.6], [0.8, -0.6], [-0.6, 0.8]])
    assert match(metric, MergePlan.of([4], 0.25, 1), 0).origin.tolist() == [2, 0, 1, 2]


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_keys_that_are_not_finite_stay_in_their_view_and_count_as_nought(bad: float) -> None:
    lengths = [10, 9, 12]
    plan = MergePlan.of(lengths, 0.4, 1)
    metric = draw(31, 8)
    nought, broken = metric.clone(), metric.clone()
    nought[12:17] = 0
    broken[12:17, 3] = bad
    assert torch.equal(match(broken, plan, 0).origin, match(nought, plan, 0).origin)


def test_views_with_nothing_to_merge_are_left_as_they_are() -> None:
    lengths = [1, 7, 1, 20, 1]
    x, sizes = draw(30, 4), draw_sizes(30)
    for plan in (MergePlan.of(lengths, 0.3, 1, floor=20), MergePlan.of([1] * 30, 0.5, 1), MergePlan.of([30], 0, 1)):
        merging = match(x, plan, 0)
        assert (merging.origin.tolist(), merging.rows) == ([*range(30)], 30)
        assert [torch.equal(*pair) for pair in zip(merge(x, sizes, merging), (x, sizes), strict=True)] == [True, True]
    some = match(x, MergePlan.of(lengths, 0.3, 1, floor=7), 0)
    assert some.origin[:9].tolist() == [*range(9)]
    assert some.origin[-1] == some.rows - 1 == 23
    nothing = match(x[:0], MergePlan.of([], 0.3, 1), 0)
    assert (nothing.origin.shape, nothing.rows) == ((0,), 0)
    assert merge(x[:0], sizes[:0], nothing)[0].shape == (0, 4)


def test_gradients_of_the_mean_are_those_of_finite_differences() -> None:
    lengths = [6, 1, 9, 4]
    plan = MergePlan.of(lengths, 0.4, 1)
    x, sizes = draw(20, 3).double().requires_grad_(), draw_sizes(20)
    merging = match(x, plan, 0)
    assert any(len(group) > 2 for group in groups_of(merging))
    # Shares are float32, and the same for both derivatives.
    assert torch.autograd.gradcheck(lambda x: unmerge(merge(x, sizes, merging)[0], merging), x)
    counts = merge(x, sizes, merging)[1]
    assert not counts.requires_grad
    assert not merging.origin.requires_grad


def test_whole_numbers_such_as_positions_become_fractions() -> None:
    positions = torch.tensor([[0, 0], [0, 1], [4, 0], [4, 1]], dtype=torch.int32)
    means, sizes = merge(positions, torch.tensor([1.0, 3.0, 1.0, 1.0]), Merge(torch.tensor([0, 0, 1, 2]), 3))
    assert means.dtype == torch.float32
    assert means.tolist() == [[0, 0.75], [4, 0], [4, 1]]
    assert sizes.tolist() == [4, 1, 1]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_the_float32_result_rounded_once(dtype: torch.dtype) -> None:
    plan = MergePlan.of([200, 57], 0.4, 1)
    x, sizes = draw(257, 12).to(dtype), draw_sizes(257)
    merging = match(x, plan, 0)
    assert torch.equal(merging.origin, match(x.float(), plan, 0).origin)
    means, _ = merge(x, sizes, merging)
    assert torch.equal(means, merge(x.float(), sizes, merging)[0].to(dtype))


def test_autocast_does_not_touch_the_similarities() -> None:
    plan = MergePlan.of([200, 57], 0.3, 1)
    metric = draw(257, 32)
    expected = match(metric, plan, 0).origin
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(match(metric, plan, 0).origin, expected)


def test_the_custom_op_keeps_torch_s_rules() -> None:
    plan = MergePlan.of([150, 3, 1], 0.3, 2)
    directions = F.normalize(draw(154, 8), dim=1)
    assert set(torch.library.opcheck(best_matches, (directions, plan.tiles, 0, 5)).values()) == {"SUCCESS"}


@pytest.mark.parametrize("lengths", [[256] * 64, [4096] + [64] * 192, [16384]])
def test_memory_is_a_few_hundred_bytes_a_token_and_no_view_costs_a_block(lengths: list[int]) -> None:
    metric = draw(16384, 64)
    plan = MergePlan.of(lengths, 0.05, 1)
    match(metric, plan, 0)
    # Keys of 64 numbers twice in float32 and a dozen numbers more, and two rounds of tiles of 9 MB. The similarities
    # of one view of 16,384 tokens would be 268 MB.
    assert peak_bytes(lambda: match(metric, plan, 0), metric.device) < 16384 * 600 + 18e6


@pytest.fixture
def fresh() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


# The compiler's own (torch 2.13).
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@pytest.mark.usefixtures("fresh")
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "packs",
    [
        # Among them packs in which some layer merges nothing, in which all do, and of several rounds of tiles.
        [[20, 21, 16], [9, 81, 4, 8, 35], [4, 4, 6], [9] * 9, [24, 24, 25, 6], [300, 5, 4000], [20, 21, 17]],
        # torch compiles anew for a single view, but once: whether a layer has one tile or four is not seen.
        [[150], [140], [100], [40], [300], [5], [2000]],
    ],
)
def test_packs_of_any_shape_run_on_one_compilation_and_agree_with_eager(packs: list[list[int]], backend: str) -> None:
    weight = draw(24, 24) / 24**0.5

    def network(x: Tensor, plan: MergePlan) -> tuple[Tensor, Tensor, Tensor]:
        sizes = torch.ones(x.shape[0])
        total = None
        for layer, active in enumerate(plan.active):
            if active:
                merging = match(x, plan, layer)
                x, sizes = merge(x, sizes, merging)
                total = chain(total, merging) if total else merging
            x = (x @ weight).tanh()
        assert total
        return unmerge(x, total), sizes, total.origin

    compiled = torch.compile(network, dynamic=True, fullgraph=True, backend=backend)
    for number, lengths in enumerate(packs):
        plan = MergePlan.of(lengths, [0.1, 0.1, 0, 0.3], 4)
        x = draw(sum(lengths), 24, number).requires_grad_()
        results = []
        for function, stance in ((network, "default"), (compiled, "fail_on_recompile" if number else "default")):
            with torch.compiler.set_stance(stance):
                out, sizes, origin = function(x, plan)
            (grad,) = torch.autograd.grad(out.square().sum(), x)
            results.append((out, grad, sizes, origin))
        for found, expected in zip(*results, strict=True):
            # Norm of the difference by the norm: fused kernels round in other places.
            assert (found - expected).float().norm() <= 2e-6 * expected.float().norm()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype feature:UserWarning")
def test_cuda_agrees_with_the_cpu_and_never_waits_for_the_device() -> None:
    lengths = [700, 1, 33, 200, 2, 64]
    plan = MergePlan.of(lengths, 0.3, 1)
    metric, x, sizes = draw(1000, 32, 1), draw(1000, 16), draw_sizes(1000)
    before, after = (segments.lengths for segments in plan.segments)
    for view, n, left in zip(metric.split(lengths), before, after, strict=True):
        assert tome(view, n - left)[1] > CLEAR
    expected = match(metric, plan, 0)
    inputs = [each.cuda() for each in (metric, x, sizes)]
    there = plan.to("cuda")
    try:
        torch.cuda.set_sync_debug_mode("error")
        found = match(inputs[0], there, 0)
        means, counts = merge(*inputs[1:], found)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(found.origin.cpu(), expected.origin)
    for ours, theirs in zip((means, counts), merge(x, sizes, expected), strict=True):
        torch.testing.assert_close(ours.cpu(), theirs, rtol=0, atol=4 * 5 * 2**-24)


@pytest.mark.parametrize("rate", [0.1, 0.5])
@FEW
@given(lengths=VIEWS, prefix=st.integers(1, 5), seed=st.integers(0, 100))
def test_class_tokens_and_registers_never_merge_and_patches_merge_as_without_them(
    rate: float, lengths: list[int], prefix: int, seed: int
) -> None:
    without = MergePlan.of(lengths, rate, 1)
    plan = MergePlan.of([length + prefix for length in lengths], rate, 1, prefix=prefix)
    keys = draw(sum(lengths), 8, seed)
    # Class tokens are like the first patch of their view, the most similar token there could be.
    views = [torch.cat([part[:1].expand(prefix, -1), part]) for part in keys.split(lengths)]
    expected = groups_of(match(keys, without, 0))
    found = groups_of(match(torch.cat(views), plan, 0))
    rows = torch.cat([torch.arange(length) + prefix * (view + 1) for view, length in enumerate(lengths)])
    rows += torch.repeat_interleave(torch.tensor([0, *lengths[:-1]]).cumsum(0), torch.tensor(lengths))
    is_patch = torch.zeros(sum(lengths) + prefix * len(lengths), dtype=torch.bool).index_fill(0, rows, True)
    assert [group for group in found if is_patch[group[0]]] == [rows[group].tolist() for group in expected]
    assert all(len(group) == 1 for group in found if not is_patch[group].all())
