"""Attention within segments: every kernel against the definition, and no segment hears of another."""

import itertools
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.attention import varlen

from ijepa_enhanced.ops import attention as attention_module
from ijepa_enhanced.ops.attention import (
    attention,
    cpu_attention,
    cpu_attention_backward,
    dense_attention,
    padded_attention,
    whole_window,
    with_bias_channels,
)
from ijepa_enhanced.packed import Segments

LENGTHS = [7, 1, 33, 12, 1, 64]
HEADS, WIDTH = 3, 16

Kernel = Callable[[Tensor, Tensor, Tensor, Segments], Tensor]


def draw(lengths: list[int], seed: int = 0, dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
    """Queries, keys, values and the gradient of the result: four [T, H, K] of standard normal numbers."""
    rng = torch.Generator().manual_seed(seed)
    drawn = torch.randn(4, sum(lengths), HEADS, WIDTH, generator=rng)
    return tuple(drawn.to(dtype).unbind())


def by_definition(q: Tensor, k: Tensor, v: Tensor, lengths: list[int], keys: list[int] | None = None) -> Tensor:
    """Softmax(q k^T / sqrt(K)) v, segment by segment."""
    parts = []
    for qs, ks, vs in zip(q.split(lengths), *(x.split(keys or lengths) for x in (k, v)), strict=True):
        logits = torch.einsum("ihd,jhd->hij", qs, ks) / WIDTH**0.5
        parts.append(torch.einsum("hij,jhd->ihd", logits.softmax(dim=-1), vs))
    return torch.cat(parts)


def with_gradients(function: Callable[[Tensor, Tensor, Tensor], Tensor], *inputs: Tensor) -> list[Tensor]:
    """The result and the gradients of q, k and v."""
    *leaves, grad = (x.detach().clone() for x in inputs)
    for leaf in leaves:
        leaf.requires_grad_()
    out = function(*leaves)
    out.backward(grad)
    return [out.detach(), *(leaf.grad for leaf in leaves if leaf.grad is not None)]


def exact(inputs: tuple[Tensor, ...], lengths: list[int]) -> list[Tensor]:
    return with_gradients(lambda q, k, v: by_definition(q, k, v, lengths), *(x.double() for x in inputs))


def of_cpu(q: Tensor, k: Tensor, v: Tensor, segments: Segments) -> Tensor:
    return attention(q, k, v, segments)


def of_dense(q: Tensor, k: Tensor, v: Tensor, segments: Segments) -> Tensor:
    return dense_attention(q, k, v, segments, segments)


def of_padded(q: Tensor, k: Tensor, v: Tensor, segments: Segments) -> Tensor:
    return padded_attention(q, k, v, segments, segments)


@pytest.mark.parametrize("kernel", [of_cpu, of_dense, of_padded])
def test_float32_agrees_with_the_definition_in_float64(kernel: Kernel) -> None:
    inputs = draw(LENGTHS)
    segments = Segments.of(LENGTHS)
    found = with_gradients(lambda q, k, v: kernel(q, k, v, segments), *inputs)
    assert len(found) == 4
    for ours, theirs in zip(found, exact(inputs, LENGTHS), strict=True):
        assert ours.dtype == torch.float32
        # 16 roundings, one a product of q and k, of numbers of size up to 4: 16 * 6e-8 * 4. (1.3e-6 was measured.)
        torch.testing.assert_close(ours.double(), theirs, rtol=0, atol=4e-6)


SIZES = torch.tensor([float(1 + number % 5) for number in range(sum(LENGTHS))])
"""Patches that each key stands for after merging."""


def of_cpu_sized(q: Tensor, k: Tensor, v: Tensor, segments: Segments) -> Tensor:
    return attention(q, k, v, segments, SIZES)


def dense_sized(q: Tensor, k: Tensor, v: Tensor, segments: Segments) -> Tensor:
    return dense_attention(q, k, v, segments, segments, SIZES.log())


def padded_sized(q: Tensor, k: Tensor, v: Tensor, segments: Segments) -> Tensor:
    return padded_attention(q, k, v, segments, segments, SIZES.log())


def in_channels(q: Tensor, k: Tensor, v: Tensor, segments: Segments) -> Tensor:
    """What the CUDA kernel is handed, by the definition: its scale is that of the width without the channels."""
    q, k, v = with_bias_channels(q, k, v, SIZES.log())
    assert q.shape[2] == k.shape[2] == v.shape[2] == WIDTH + 8
    return by_definition(q, k, v, LENGTHS)[:, :, :WIDTH]


@pytest.mark.parametrize("kernel", [of_cpu_sized, dense_sized, padded_sized, in_channels])
def test_a_key_of_several_patches_counts_as_often(kernel: Kernel) -> None:
    """Proportional attention by another definition: every key and value repeated as many times as it has patches."""
    inputs = draw(LENGTHS)
    segments = Segments.of(LENGTHS)
    repeats = SIZES.long()
    owner = torch.arange(len(SIZES)).repeat_interleave(repeats)

    def repeated(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        parts = []
        for start, stop in itertools.pairwise(segments.cu_seqlens.tolist()):
            keys = owner[(owner >= start) & (owner < stop)]
            logits = torch.einsum("ihd,jhd->hij", q[start:stop], k[keys]) / WIDTH**0.5
            parts.append(torch.einsum("hij,jhd->ihd", logits.softmax(dim=-1), v[keys]))
        return torch.cat(parts)

    found = with_gradients(lambda q, k, v: kernel(q, k, v, segments), *inputs)
    expected = with_gradients(repeated, *(x.double() for x in inputs))
    for ours, theirs in zip(found, expected, strict=True):
        # As above, with the logarithm's and the mask's roundings. (2.0e-6 was measured.)
        torch.testing.assert_close(ours.double(), theirs, rtol=0, atol=6e-6)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_sizes_count_in_any_precision(dtype: torch.dtype) -> None:
    inputs = [x.to(dtype) for x in draw(LENGTHS)]
    segments = Segments.of(LENGTHS)
    found = of_cpu_sized(*inputs[:3], segments)
    expected = padded_sized(*(x.double() for x in inputs[:3]), segments)
    # As below for bfloat16; in float64 the logarithms of the sizes are float32's.
    bounds = {"rtol": 2**-9, "atol": 4 * 2**-9} if dtype == torch.bfloat16 else {"rtol": 0, "atol": 4e-6}
    torch.testing.assert_close(found.double(), expected, **bounds)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_bias_channels_hold_the_bias_to_float32(dtype: torch.dtype) -> None:
    bias = torch.arange(1.0, 2000.0).log()
    empty = torch.zeros(len(bias), 1, 64, dtype=dtype)
    q, k, _ = with_bias_channels(empty, empty, empty, bias)
    logits = (q.double() * k.double()).sum(dim=2)[:, 0] / 64**0.5
    # Three numbers of 8 bits hold 24, float32's; the bias times 8 is below 64, whose last of 24 bits is 4e-6.
    torch.testing.assert_close(logits, bias.double(), rtol=0, atol=4e-6 / 8)


@settings(deadline=None, max_examples=30)
@given(st.lists(st.integers(1, 40), max_size=8), st.integers(0, 1000))
def test_any_segments_agree_with_the_definition(lengths: list[int], seed: int) -> None:
    if not lengths:
        empty, none = torch.empty(0, HEADS, WIDTH), Segments.of([])
        for kernel in (of_cpu, of_dense, of_padded):
            assert kernel(empty, empty, empty, none).shape == (0, HEADS, WIDTH)
        return
    inputs = draw(lengths, seed)
    segments = Segments.of(lengths)
    found = with_gradients(lambda q, k, v: attention(q, k, v, segments), *inputs)
    for ours, theirs in zip(found, exact(inputs, lengths), strict=True):
        torch.testing.assert_close(ours.double(), theirs, rtol=0, atol=4e-6)


def test_bfloat16_rounds_the_weights_and_the_result() -> None:
    inputs = draw(LENGTHS, dtype=torch.bfloat16)
    segments = Segments.of(LENGTHS)
    found = with_gradients(lambda q, k, v: of_cpu(q, k, v, segments), *inputs)
    assert {x.dtype for x in found} == {torch.bfloat16}
    for ours, theirs in zip(found, exact(inputs, LENGTHS), strict=True):
        # bfloat16's 8 bits: the stored number is off by up to 2 ** -9 of it. So is each weight of the softmax, and the
        # weights of values or gradients of up to 4 add up to 1: 4 * 2 ** -9. (2.3 * 2 ** -9 was measured.)
        torch.testing.assert_close(ours.double(), theirs, rtol=2**-9, atol=4 * 2**-9)


def test_all_that_is_returned_is_laid_out_in_order_of_tokens() -> None:
    # q, k and v come as slices of one projection, [T, 3, H, K]: not contiguous.
    inputs = torch.randn(5, 3, HEADS, WIDTH, generator=torch.Generator().manual_seed(0), requires_grad=True)
    out = of_cpu(*inputs.unbind(1), Segments.of([2, 3]))
    assert out.is_contiguous()
    torch.testing.assert_close(out, by_definition(*inputs.unbind(1), [2, 3]), rtol=0, atol=4e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_behind_the_last_segment_are_no_one_s(dtype: torch.dtype) -> None:
    """On a CPU, of queries and of keys: what they hold is not read, and their results and gradients are 0."""
    inputs, keys = draw([5, 9, 5], dtype=dtype), [3, 6, 2]
    q, k, v, grad = inputs[0], inputs[1][:11], inputs[2][:11], inputs[3]
    longer = [torch.cat([x, torch.full((4, HEADS, WIDTH), torch.nan, dtype=dtype)]) for x in (q, k, v, grad)]

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attention(q, k, v, Segments.of([5, 9, 5]), keys=Segments.of(keys))

    expected, found = with_gradients(attend, q, k, v, grad), with_gradients(attend, *longer)
    for ours, theirs in zip(found, expected, strict=True):
        assert torch.equal(ours[:-4], theirs)
        assert not ours[-4:].any()


@pytest.mark.parametrize("kernel", [of_cpu, of_dense, of_padded])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_segment_is_bit_for_bit_the_same_whatever_the_others_hold(kernel: Kernel, dtype: torch.dtype) -> None:
    inputs = draw(LENGTHS, dtype=dtype)
    segments = Segments.of(LENGTHS)
    before = with_gradients(lambda q, k, v: kernel(q, k, v, segments), *inputs)
    for start, stop in itertools.pairwise(segments.cu_seqlens.tolist()):
        changed = tuple(x.clone() for x in inputs)
        for x in changed:
            x[start:stop] = 3 * x[start:stop] + 1
        after = with_gradients(lambda q, k, v: kernel(q, k, v, segments), *changed)
        for old, new in zip(before, after, strict=True):
            assert torch.equal(old[:start], new[:start])
            assert torch.equal(old[stop:], new[stop:])
        for number in (0, 3):  # a single token has no gradient of q and k, before and after
            assert not torch.equal(before[number][start:stop], after[number][start:stop]), "what changed did change"


def test_a_segment_is_bit_for_bit_the_same_alone_and_in_any_pack() -> None:
    inputs = draw(LENGTHS)
    packed = with_gradients(lambda q, k, v: of_cpu(q, k, v, Segments.of(LENGTHS)), *inputs)
    for start, stop in itertools.pairwise(Segments.of(LENGTHS).cu_seqlens.tolist()):
        segments = Segments.of([stop - start])
        own = [x[start:stop] for x in inputs]
        alone = with_gradients(lambda q, k, v, segments=segments: of_cpu(q, k, v, segments), *own)
        for whole, part in zip(packed, alone, strict=True):
            assert torch.equal(whole[start:stop], part)


@pytest.mark.parametrize("kernel", [of_cpu, of_dense, of_padded])
def test_a_single_token_attends_to_itself_alone(kernel: Kernel) -> None:
    inputs = draw([1, 5, 1])
    *_, v, grad = inputs
    segments = Segments.of([1, 5, 1])
    out, q_grad, k_grad, v_grad = with_gradients(lambda q, k, v: kernel(q, k, v, segments), *inputs)
    for token in (0, 6):
        assert torch.equal(out[token], v[token])
        assert torch.equal(v_grad[token], grad[token])
        # Exactly 0, but for the rounding of a row sum that is taken from itself.
        assert max(q_grad[token].abs().max(), k_grad[token].abs().max()) < 4e-6


KEYS = [4, 12, 1, 12, 30, 9]
"""How many tokens each segment of `LENGTHS` attends to in another stream; two pairs of lengths occur twice."""


def crossed(seed: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
    """Queries of `LENGTHS`, keys and values of `KEYS`, and the gradient of the result."""
    q, _, _, grad = draw(LENGTHS, seed, dtype)
    _, k, v, _ = draw(KEYS, seed + 1, dtype)
    return q, k, v, grad


def cross_of_cpu(q: Tensor, k: Tensor, v: Tensor, segments: Segments, keys: Segments) -> Tensor:
    return attention(q, k, v, segments, keys=keys)


def cross_of_dense(q: Tensor, k: Tensor, v: Tensor, segments: Segments, keys: Segments) -> Tensor:
    return dense_attention(q, k, v, segments, keys)


def cross_of_padded(q: Tensor, k: Tensor, v: Tensor, segments: Segments, keys: Segments) -> Tensor:
    return padded_attention(q, k, v, segments, keys)


@pytest.mark.parametrize("kernel", [cross_of_cpu, cross_of_dense, cross_of_padded])
def test_a_segment_attends_to_its_own_of_another_stream(kernel: Callable[..., Tensor]) -> None:
    inputs = crossed(0)
    segments, keys = Segments.of(LENGTHS), Segments.of(KEYS)

    found = with_gradients(lambda q, k, v: kernel(q, k, v, segments, keys), *inputs)
    theirs = with_gradients(lambda q, k, v: by_definition(q, k, v, LENGTHS, KEYS), *(x.double() for x in inputs))
    for ours, exactly in zip(found, theirs, strict=True):
        # As within one stream.
        torch.testing.assert_close(ours.double(), exactly, rtol=0, atol=4e-6)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_varlen_on_cuda_attends_to_another_stream() -> None:
    inputs = tuple(x.cuda() for x in crossed(0, torch.bfloat16))
    segments, keys = Segments.of(LENGTHS).to("cuda"), Segments.of(KEYS).to("cuda")
    found = with_gradients(lambda q, k, v: cross_of_cpu(q, k, v, segments, keys), *inputs)
    theirs = with_gradients(lambda q, k, v: cross_of_padded(q, k, v, segments, keys), *(x.float() for x in inputs))
    bound = 4 * 4 * torch.finfo(torch.bfloat16).eps  # as against padded float32 within one stream
    for ours, exactly in zip(found, theirs, strict=True):
        torch.testing.assert_close(ours.float(), exactly, rtol=0, atol=bound)


@pytest.mark.parametrize(
    ("lengths", "expected"), [([64] * 16, "padded_attention"), ([200] + [8] * 64, "dense_attention")]
)
def test_without_flash_attention_padding_is_never_more_than_dense(
    lengths: list[int], expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    called = []
    for name in ("padded_attention", "dense_attention"):
        monkeypatch.setattr(attention_module, name, lambda *_, name=name: called.append(name))
    segments = Segments.of(lengths)
    # Neither a CPU nor in half precision, as a GPU's float32.
    q, k, v = (torch.empty(segments.total, HEADS, WIDTH, device="meta") for _ in range(3))
    attention(q, k, v, segments)
    assert called == [expected]


@pytest.mark.parametrize(("queries", "keys"), [(5, 5), (3, 9), (9, 3), (1, 8), (8, 1)])
def test_the_window_hides_nothing(queries: int, keys: int) -> None:
    """FlashAttention shows query i the keys from i + keys - queries - left to i + keys - queries + right."""
    left, right = whole_window(Segments.of([queries, 1]), Segments.of([keys, 1]))
    for query, key in itertools.product(range(queries), range(keys)):
        assert query + keys - queries - left <= key <= query + keys - queries + right


def test_large_logits_do_not_overflow() -> None:
    q, k, v, _ = draw([4, 6])
    out = attention(1000 * q, 1000 * k, v, Segments.of([4, 6]))
    # The softmax is one-hot: logits lie thousands apart.
    for start, stop in ((0, 4), (4, 10)):
        best = torch.einsum("ihd,jhd->hij", q[start:stop], k[start:stop]).argmax(dim=-1)
        for head, token in itertools.product(range(HEADS), range(stop - start)):
            assert torch.equal(out[start + token, head], v[start + int(best[head, token]), head])


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")  # torch 2.14's own
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_custom_ops_keep_torch_s_rules(dtype: torch.dtype) -> None:
    # Schema, autograd registration, fake tensors against real ones, and tracing with dynamic shapes.
    q, k, v, grad = (x.detach() for x in draw([3, 1, 4], dtype=dtype))
    cu_seqlens = Segments.of([3, 1, 4]).cu_seqlens
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    assert set(torch.library.opcheck(cpu_attention, (*leaves, cu_seqlens, cu_seqlens)).values()) == {"SUCCESS"}
    out, logsumexp = cpu_attention(q, k, v, cu_seqlens, cu_seqlens)
    backward = (grad, q, k, v, cu_seqlens, cu_seqlens, None, out, logsumexp)
    assert set(torch.library.opcheck(cpu_attention_backward, backward).values()) == {"SUCCESS"}
    sized = (*leaves, cu_seqlens, cu_seqlens, SIZES[:8].log())
    assert set(torch.library.opcheck(cpu_attention, sized).values()) == {"SUCCESS"}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("sized", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_varlen_on_cuda_agrees_with_padded_float32(
    dtype: torch.dtype, sized: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    lengths = [*LENGTHS, 200]  # beyond 128 tokens torch 2.14 would take cuDNN
    inputs = tuple(x.cuda() for x in draw(lengths, dtype=dtype))
    segments = Segments.of(lengths).to("cuda")
    sizes = torch.cat([SIZES, SIZES[:100], SIZES[:100]]).cuda() if sized else None
    bias = None if sizes is None else sizes.log()
    said: list[str] = []
    monkeypatch.setattr(varlen.log, "info", said.append)
    found = with_gradients(lambda q, k, v: attention(q, k, v, segments, sizes), *inputs)
    assert {"Flash Attention" in message for message in said} == {True}
    theirs = with_gradients(
        lambda q, k, v: padded_attention(q, k, v, segments, segments, bias),
        *(x.float() for x in inputs),
    )
    # The kernel rounds the softmax, the result and its gradients to half precision on the way: a few roundings of
    # numbers of size up to 4.
    bound = 4 * 4 * torch.finfo(dtype).eps
    for ours, exactly in zip(found, theirs, strict=True):
        assert ours.dtype == dtype
        torch.testing.assert_close(ours.float(), exactly, rtol=0, atol=bound)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_no_segment_hears_of_another_on_cuda(dtype: torch.dtype) -> None:
    q, k, v, _ = (x.cuda() for x in draw(LENGTHS, dtype=dtype))
    segments = Segments.of(LENGTHS).to("cuda")
    before = attention(q, k, v, segments)
    start, stop = segments.cu_seqlens.tolist()[2:4]
    for x in (q, k, v):
        x[start:stop] = 3 * x[start:stop] + 1
    after = attention(q, k, v, segments)
    assert torch.equal(before[:start], after[:start])
    assert torch.equal(before[stop:], after[stop:])
    assert not torch.equal(before[start:stop], after[start:stop])
