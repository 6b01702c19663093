"""The mean of each segment, against a loop."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ijepa_enhanced.ops.pooling import segment_first, segment_mean
from ijepa_enhanced.packed import Segments


def test_means_by_hand() -> None:
    x = torch.tensor([[1.0, 0.0], [3.0, 4.0], [5.0, 7.0], [0.0, 1.0], [1.0, 1.0], [2.0, 7.0]])
    means = segment_mean(x, Segments.of([2, 1, 3]).cu_seqlens)
    assert means.tolist() == [[2, 2], [5, 7], [1, 3]]
    assert means.dtype == torch.float32


@settings(deadline=None, max_examples=50)
@given(st.lists(st.integers(1, 50), min_size=1, max_size=10), st.integers(0, 1000))
def test_the_mean_of_a_segment_is_that_of_a_loop(lengths: list[int], seed: int) -> None:
    x = torch.randn(sum(lengths), 5, generator=torch.Generator().manual_seed(seed))
    x.requires_grad_()
    means = segment_mean(x, Segments.of(lengths).cu_seqlens)
    loop = torch.stack([part.double().mean(dim=0) for part in x.split(lengths)])
    # Partial sums of up to 50 numbers stay below 64: 50 roundings of 64 * 2 ** -24 in the worst case, over 50.
    torch.testing.assert_close(means.double(), loop, rtol=0, atol=64 * 2**-24)
    weights = torch.randn(means.shape, generator=torch.Generator().manual_seed(seed + 1))
    (grad,) = torch.autograd.grad(means, x, weights)
    (expected,) = torch.autograd.grad(loop, x, weights.double())
    torch.testing.assert_close(grad, expected, rtol=2**-22, atol=0)  # one division


def test_bfloat16_is_summed_in_float32() -> None:
    # 257 is no bfloat16 number: a sum that was kept in it would stop at 256.
    means = segment_mean(torch.ones(1000, 1, dtype=torch.bfloat16), Segments.of([999, 1]).cu_seqlens)
    assert means.tolist() == [[1], [1]]
    assert means.dtype == torch.float32


def test_no_segment_hears_of_another() -> None:
    x = torch.randn(9, 4, generator=torch.Generator().manual_seed(0))
    cu_seqlens = Segments.of([4, 1, 4]).cu_seqlens
    before = segment_mean(x, cu_seqlens)
    x[4] = torch.nan
    after = segment_mean(x, cu_seqlens)
    assert torch.equal(before[::2], after[::2])
    assert after[1].isnan().all()


@pytest.mark.parametrize("width", [1, 7])
def test_an_empty_stream_has_no_means(width: int) -> None:
    assert segment_mean(torch.empty(0, width), Segments.of([]).cu_seqlens).shape == (0, width)


@settings(deadline=None, max_examples=50)
@given(st.lists(st.integers(1, 20), min_size=1, max_size=6), st.integers(0, 5))
def test_class_tokens_and_registers_are_left_out_of_the_mean_and_of_its_gradient(
    lengths: list[int], prefix: int
) -> None:
    segments = Segments.of([length + prefix for length in lengths])
    x = torch.randn(segments.total, 3, generator=torch.Generator().manual_seed(0)).requires_grad_()
    means = segment_mean(x, segments.cu_seqlens, prefix)
    patches = [part[prefix:] for part in x.split(segments.lengths)]
    # Numbers up to 5, of which 20 are added up.
    torch.testing.assert_close(means, torch.stack([part.mean(dim=0) for part in patches]), rtol=0, atol=5 * 20 * 2**-24)
    (grad,) = torch.autograd.grad(means.sum(), x)
    for part, length in zip(grad.split(segments.lengths), lengths, strict=True):
        assert not part[:prefix].any()
        torch.testing.assert_close(part[prefix:], torch.full((length, 3), 1 / length), rtol=2**-22, atol=0)


def test_a_class_token_that_is_not_finite_does_not_reach_the_mean() -> None:
    x = torch.tensor([[torch.nan], [1.0], [3.0]])
    assert segment_mean(x, Segments.of([3]).cu_seqlens, 1).tolist() == [[2]]


def test_the_first_token_is_the_class_token() -> None:
    x = torch.arange(6.0)[:, None].to(torch.bfloat16)
    first = segment_first(x, Segments.of([2, 3, 1]).cu_seqlens)
    assert first.tolist() == [[0], [2], [5]]
    assert first.dtype == torch.float32
