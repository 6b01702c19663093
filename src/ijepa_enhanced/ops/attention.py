"""Attention within the segments of packed streams: one function, three kernels.

- CUDA from Ampere on, half precision: `torch.nn.attention.varlen` (FlashAttention 2, arXiv 2307.08691).
- CPU: PyTorch's flash kernel, once for all segments of one length, behind one custom op, so that a compiled graph
  sees a single node of dynamic length and no Python loop.
- All else on CUDA, which is float32 and GPUs before Ampere: the segments as one batch, padded to the longest; or, where
  one is so long that this would be more, one T x T product under a block-diagonal mask.

After merging (ToMe, arXiv 2210.09461, section 3) a key that stands for s patches counts s times: log(s) is added to
its logits. Varlen has no mask to add it with, so there it travels in additional head channels.
"""

import functools
from typing import NamedTuple, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn

from ijepa_enhanced.packed import Segments, segment_ids

AMPERE = 8
"""The first generation of GPUs, by the major number of its compute capability, that FlashAttention 2 runs on."""


def attention(
    q: Tensor, k: Tensor, v: Tensor, segments: Segments, sizes: Tensor | None = None, keys: Segments | None = None
) -> Tensor:
    """Softmax(q k^T / sqrt(K) + log(sizes)) v within each segment.

    Args:
        q: [T, H, K] queries.
        k: [S, H, K] keys; v: [S, H, K] values. S is T in self-attention. On a CPU rows may follow the last segment
            (`ops.linear.pad_rows`), which are no one's: results and gradients are 0 there.
        segments: of the queries.
        sizes: float32 [S], or without the rows behind the last segment: patches that each key stands for; None where
            all are single ones. No gradient flows to it.
        keys: the segments of keys and values, as many, each at least one token; None: those of the queries.

    Returns:
        [T, H, K].
    """
    bias = None if sizes is None else sizes.log()
    keys = segments if keys is None else keys
    if q.device.type == "cpu":
        out, _ = cpu_attention(q, k, v, segments.cu_seqlens, keys.cu_seqlens, bias)
        return out
    longest, longest_key = segments.max_seqlen, keys.max_seqlen
    if q.dtype in (torch.bfloat16, torch.float16) and torch.cuda.get_device_properties(q.device).major >= AMPERE:
        width = q.shape[2]
        if bias is not None:
            q, k, v = with_bias_channels(q, k, v, bias)
        window = whole_window(segments, keys)
        edges = (segments.cu_seqlens, keys.cu_seqlens)
        out = varlen_attn(q, k, v, *edges, longest, longest_key, scale=width**-0.5, window_size=window)
        return cast(Tensor, out)[:, :, :width]
    if (len(segments.cu_seqlens) - 1) * longest * longest_key > len(q) * len(k):
        return dense_attention(q, k, v, segments, keys, bias)
    return padded_attention(q, k, v, segments, keys, bias)


def whole_window(queries: Segments, keys: Segments) -> tuple[int, int]:
    """Return a window, keys to the left and to the right of a query, that hides nothing.

    It keeps torch 2.14 off cuDNN, which builds a graph for every number of tokens, and no two packs have the same.
    FlashAttention aligns the last query with the last key, so a window must cover the longer of the two on both sides.
    """
    longest = max(queries.max_seqlen, keys.max_seqlen)
    return longest, longest


def dense_attention(
    q: Tensor, k: Tensor, v: Tensor, segments: Segments, keys: Segments, bias: Tensor | None = None
) -> Tensor:
    """`attention` by its definition: O(T S) time, and as many numbers of mask. `bias`: float32 [S], added to each key's
    logits."""
    mask = segment_ids(segments.cu_seqlens, len(q))[:, None] == segment_ids(keys.cu_seqlens, len(k))
    if bias is not None:
        mask = torch.where(mask, bias, -torch.inf).to(q.dtype)
    # As a batch of one: without a batch PyTorch takes none of its fused kernels, and keeps several T x S a head.
    q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)[0].transpose(0, 1)


def padded_attention(
    q: Tensor, k: Tensor, v: Tensor, segments: Segments, keys: Segments, bias: Tensor | None = None
) -> Tensor:
    """`attention` as a batch of V segments, each as long as the longest. `bias` as for `dense_attention`."""
    views, asked, read = len(segments.cu_seqlens) - 1, _places(segments, len(q)), _places(keys, len(k))
    q, k, v = (
        x.new_zeros(views, own.max_seqlen, *x.shape[1:]).index_put(places, x).transpose(1, 2)
        for x, own, places in ((q, segments, asked), (k, keys, read), (v, keys, read))
    )
    bias = q.new_zeros(len(read[0])) if bias is None else bias.to(q.dtype)
    mask = q.new_full((views, keys.max_seqlen), -torch.inf).index_put(read, bias)[:, None, None]
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2)[asked]


def _places(segments: Segments, total: int) -> tuple[Tensor, Tensor]:
    """The segment of every token, and its place in that: int64 [T] each."""
    ids = segment_ids(segments.cu_seqlens, total)
    return ids, torch.arange(total, device=ids.device) - segments.cu_seqlens[ids]


def with_bias_channels(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v of width K + 8 whose product q k^T / sqrt(K) has `bias` float32 [S] of each key in it.

    Three channels hold the bias as the sum of three half-precision numbers, since one rounds by up to 1.5e-2; eight
    are added, as the kernel wants a multiple of that.
    """
    parts, rest = [], bias * q.shape[2] ** 0.5
    for _ in range(3):
        parts.append(rest.to(q.dtype))
        rest = rest - parts[-1].float()
    channels = F.pad(torch.stack(parts, dim=1), (0, 5))[:, None]
    ones = F.pad(channels.new_ones(3), (0, 5))
    return (
        torch.cat([q, ones.expand(*q.shape[:2], 8)], 2),
        torch.cat([k, channels.expand(*k.shape[:2], 8)], 2),
        F.pad(v, (0, 8)),
    )


@torch.library.custom_op("ijepa_enhanced::cpu_attention", mutates_args=())
def cpu_attention(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, cu_keys: Tensor, bias: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """`attention` on the CPU; also returns the log-sum-exp, float32 [T, H], that its backward needs.

    `bias`: float32 [S], added to each key's logits.
    """
    if bias is not None:
        bias = bias.to(torch.promote_types(q.dtype, bias.dtype))  # PyTorch's kernel reads no float32 for float64
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    logsumexp = q.new_empty(q.shape[:2], dtype=torch.float32)
    for rows, keys in _kinds(cu_seqlens, cu_keys):
        found, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            _batch(q, rows), _batch(k, keys), _batch(v, keys), attn_mask=_mask(bias, rows, keys)
        )
        _put(out, rows, found)
        _put(logsumexp, rows, lse)
    out[cu_seqlens[-1] :] = 0
    return out, logsumexp


@cpu_attention.register_fake
def _(q: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    return out, q.new_empty(q.shape[:2], dtype=torch.float32)


@torch.library.custom_op("ijepa_enhanced::cpu_attention_backward", mutates_args=())
def cpu_attention_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    cu_keys: Tensor,
    bias: Tensor | None,
    out: Tensor,
    logsumexp: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `cpu_attention` for q, k and v: [T, H, K] and twice [S, H, K].

    Computed in float32: PyTorch's bfloat16 backward takes 2 to 9 times as long on 40 to 200 tokens (docs/log.md).
    """
    grads = tuple(torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))
    for rows, keys in _kinds(cu_seqlens, cu_keys):
        sides = (rows, rows, keys, keys, rows)
        operands = [_batch(x, side).float() for x, side in zip((grad, q, k, v, out), sides, strict=True)]
        found = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            *operands, _batch(logsumexp, rows), 0.0, False, attn_mask=_mask(bias, rows, keys)
        )
        for whole, part, side in zip(grads, found, (rows, keys, keys), strict=True):
            _put(whole, side, part)
    of_q, of_k, of_v = grads
    of_q[cu_seqlens[-1] :], of_k[cu_keys[-1] :], of_v[cu_keys[-1] :] = 0, 0, 0
    return of_q, of_k, of_v


class _Side(NamedTuple):
    """The queries, or the keys, of all segments of one kind."""

    places: slice | Tensor
    """Where they lie in the stream; int64 [N * length] where they do not lie side by side, segment after segment."""
    segments: int
    """N."""
    length: int
    """Of each."""


def _kinds(cu_seqlens: Tensor, cu_keys: Tensor) -> list[tuple[_Side, _Side]]:
    """All segments of as many queries and as many keys, for every such kind.

    One call of the kernel serves them all: for views of 45 tokens a call costs more than its products (docs/log.md).
    """
    return _kinds_between(tuple(cu_seqlens.tolist()), tuple(cu_keys.tolist()))


@functools.lru_cache(maxsize=16)
def _kinds_between(*edges: tuple[int, ...]) -> list[tuple[_Side, _Side]]:
    """`_kinds`, kept: every layer of a network asks for the same ones."""
    starts = np.array(edges, np.int64)[:, :-1]
    queries, keys = np.diff(edges)
    # Both in one number: pairs would be sorted several times as slowly.
    kinds, number = np.unique(queries << 32 | keys, return_inverse=True)

    def side(which: int, kind: int, length: int) -> _Side:
        own = starts[which, number == kind]
        if (np.diff(own) == length).all():
            return _Side(slice(int(own[0]), int(own[0]) + len(own) * length), len(own), length)
        return _Side(torch.from_numpy(own[:, None] + np.arange(length)).flatten(), len(own), length)

    return [(side(0, kind, both >> 32), side(1, kind, both & 0xFFFFFFFF)) for kind, both in enumerate(kinds.tolist())]


def _batch(x: Tensor, side: _Side) -> Tensor:
    """[T, H, ...] -> [N, H, length, ...], as PyTorch's kernels want it."""
    # x[index] takes several times as long as index_select.
    own = x[side.places] if isinstance(side.places, slice) else x.index_select(0, side.places)
    return own.unflatten(0, (side.segments, side.length)).transpose(1, 2)


def _put(x: Tensor, side: _Side, batch: Tensor) -> None:
    """The inverse of `_batch`: its part of `x`."""
    x[side.places] = batch.transpose(1, 2).flatten(0, 1).to(x.dtype)


def _mask(bias: Tensor | None, rows: _Side, keys: _Side) -> Tensor | None:
    """[N, 1, length, keys], of which only one row a segment is in memory."""
    if bias is None:
        return None
    return bias[keys.places].unflatten(0, (keys.segments, 1, 1, keys.length)).expand(-1, -1, rows.length, -1)


@cpu_attention_backward.register_fake
def _(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, *_: object) -> tuple[Tensor, Tensor, Tensor]:
    empty_q, empty_k, empty_v = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))
    return empty_q, empty_k, empty_v


def _setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    ctx.save_for_backward(*inputs, *output)


def _backward(ctx, grad, _grad_logsumexp):  # type: ignore[no-untyped-def]
    return *cpu_attention_backward(grad, *ctx.saved_tensors), None, None, None


cpu_attention.register_autograd(_backward, setup_context=_setup_context)
