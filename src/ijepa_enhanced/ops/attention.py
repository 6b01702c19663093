"""Attention within the segments of packed streams: one function, several kernels.

- CUDA, half precision, Ampere or later: `torch.nn.attention.varlen` (FlashAttention 2, arXiv 2307.08691).
- CPU: PyTorch's flash kernel, called once for all segments of the same length. It is wrapped in one custom op, so that
  a compiled graph holds a single node of dynamic length and no Python loop.
- Otherwise (CUDA with float32 or before Ampere, and any other device): the segments as one batch, padded to the
  longest. If padding would take more memory than the full attention matrix, one T x S product with a block-diagonal
  mask instead.

After merging (ToMe, arXiv 2210.09461, section 3), a key that stands for s patches counts s times: log(s) is added to
its logits. The varlen kernel takes no mask, so there the bias is encoded in additional head channels.
"""

import functools
from typing import NamedTuple, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn

from ijepa_enhanced.devices import has_varlen_attention
from ijepa_enhanced.packed import Segments, segment_ids


def attention(
    q: Tensor, k: Tensor, v: Tensor, segments: Segments, sizes: Tensor | None = None, keys: Segments | None = None
) -> Tensor:
    """Return softmax(q k^T / sqrt(K) + log(sizes)) v, computed within each segment: [T, H, K].

    On a CPU, pad rows may follow the last segment (`ops.linear.pad_rows`). Results and gradients are 0 there.

    Args:
        q: [T, H, K] queries.
        k: [S, H, K] keys. S is T in self-attention.
        v: [S, H, K] values.
        segments: of the queries.
        sizes: float32 [S], pad rows optional: patches that each key stands for; None: one each. No gradient flows to
            it.
        keys: segments of the keys and values, as many as of the queries; None: those of the queries.
    """
    bias = None if sizes is None else sizes.log()
    keys = segments if keys is None else keys
    if q.device.type == "cpu":
        out, _ = cpu_attention(q, k, v, segments.cu_seqlens, keys.cu_seqlens, bias)
        return out
    longest, longest_key = segments.max_seqlen, keys.max_seqlen
    if q.dtype in (torch.bfloat16, torch.float16) and has_varlen_attention(q.device):
        width = q.shape[2]
        if bias is not None:
            q, k, v = with_bias_channels(q, k, v, bias)
        # `scale` is that of the K original channels, and the additional ones are cut off at the end.
        window = whole_window(segments, keys)
        edges = (segments.cu_seqlens, keys.cu_seqlens)
        out = varlen_attn(q, k, v, *edges, longest, longest_key, scale=width**-0.5, window_size=window)
        return cast(Tensor, out)[:, :, :width]
    # Take whichever has fewer logits: V padded segments, or the whole stream at once.
    if (len(segments.cu_seqlens) - 1) * longest * longest_key > len(q) * len(k):
        return dense_attention(q, k, v, segments, keys, bias)
    return padded_attention(q, k, v, segments, keys, bias)


def whole_window(queries: Segments, keys: Segments) -> tuple[int, int]:
    """Return an attention window (keys to the left, keys to the right of a query) that hides nothing.

    With a window, PyTorch 2.14 does not choose cuDNN. cuDNN builds a graph for every number of tokens, and hardly any
    two packs have the same number. FlashAttention aligns the last query with the last key, so the window covers the
    longer of the two on both sides.
    """
    longest = max(queries.max_seqlen, keys.max_seqlen)
    return longest, longest


def dense_attention(
    q: Tensor, k: Tensor, v: Tensor, segments: Segments, keys: Segments, bias: Tensor | None = None
) -> Tensor:
    """Compute `attention` over the whole stream under a block-diagonal mask, in O(T S) time and memory.

    Args:
        q, k, v, segments, keys: as for `attention`.
        bias: float32 [S], added to the logits of each key.
    """
    mask = segment_ids(segments.cu_seqlens, len(q))[:, None] == segment_ids(keys.cu_seqlens, len(k))  # [T, S]
    if bias is not None:
        mask = torch.where(mask, bias, -torch.inf).to(q.dtype)
    # A batch of one: without a batch dimension PyTorch uses no fused kernel and keeps several T x S tensors per head.
    q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)[0].transpose(0, 1)


def padded_attention(
    q: Tensor, k: Tensor, v: Tensor, segments: Segments, keys: Segments, bias: Tensor | None = None
) -> Tensor:
    """Compute `attention` as a batch of V segments, padded to the longest; arguments as for `dense_attention`."""
    views, of_q, of_k = len(segments.cu_seqlens) - 1, _padded_index(segments, len(q)), _padded_index(keys, len(k))
    # [T, H, K] -> [V, H, longest, K]
    q, k, v = (
        x.new_zeros(views, own.max_seqlen, *x.shape[1:]).index_put(index, x).transpose(1, 2)
        for x, own, index in ((q, segments, of_q), (k, keys, of_k), (v, keys, of_k))
    )
    bias = q.new_zeros(len(of_k[0])) if bias is None else bias.to(q.dtype)
    # [V, 1, 1, longest]: the bias of each key, and minus infinity for padding. Padded queries are dropped at the end.
    mask = q.new_full((views, keys.max_seqlen), -torch.inf).index_put(of_k, bias)[:, None, None]
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2)[of_q]


def _padded_index(segments: Segments, total: int) -> tuple[Tensor, Tensor]:
    """Return the place of every token in a padded batch: its segment, and its number in the segment, int64 [T] each."""
    ids = segment_ids(segments.cu_seqlens, total)
    return ids, torch.arange(total, device=ids.device) - segments.cu_seqlens[ids]


def with_bias_channels(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return q, k and v of width K + 8, such that q k^T / sqrt(K) includes the `bias`, float32 [S], of each key.

    Three channels hold the bias as the sum of three half-precision numbers, because a single one rounds by up to
    1.5e-2. The other five are 0: the kernel needs a multiple of eight channels.
    """
    parts, rest = [], bias * q.shape[2] ** 0.5  # the kernel divides all logits by sqrt(K)
    for _ in range(3):
        parts.append(rest.to(q.dtype))
        rest = rest - parts[-1].float()  # what rounding has left over
    channels = F.pad(torch.stack(parts, dim=1), (0, 5))[:, None]  # [S, 1, 8], for all heads
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
    """Compute `attention` on the CPU. Return also the log-sum-exp, float32 [T, H], which the backward pass needs.

    Args:
        q, k, v: as for `attention`.
        cu_seqlens, cu_keys: int32 [V + 1], boundaries of the queries and of the keys, see `Segments`.
        bias: float32 [S], added to the logits of each key.
    """
    if bias is not None:
        bias = bias.to(torch.promote_types(q.dtype, bias.dtype))  # for float64, PyTorch's kernel takes no float32 mask
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    logsumexp = q.new_empty(q.shape[:2], dtype=torch.float32)
    for queries, keys in _length_groups(cu_seqlens, cu_keys):
        group_out, group_logsumexp = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            _gather(q, queries), _gather(k, keys), _gather(v, keys), attn_mask=_mask(bias, queries, keys)
        )
        _scatter(out, queries, group_out)
        _scatter(logsumexp, queries, group_logsumexp)
    out[cu_seqlens[-1] :] = 0  # pad rows
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
    """Compute the gradients of `cpu_attention` for q, k and v: [T, H, K], [S, H, K] and [S, H, K].

    The arithmetic is float32, because PyTorch's backward pass in bfloat16 takes several times as long (docs/log.md).
    """
    grads = tuple(torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))
    for queries, keys in _length_groups(cu_seqlens, cu_keys):
        groups = (queries, queries, keys, keys, queries)
        operands = [_gather(x, group).float() for x, group in zip((grad, q, k, v, out), groups, strict=True)]
        group_grads = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            *operands, _gather(logsumexp, queries), 0.0, False, attn_mask=_mask(bias, queries, keys)
        )
        for x_grad, group_grad, group in zip(grads, group_grads, (queries, keys, keys), strict=True):
            _scatter(x_grad, group, group_grad)
    q_grad, k_grad, v_grad = grads
    q_grad[cu_seqlens[-1] :], k_grad[cu_keys[-1] :], v_grad[cu_keys[-1] :] = 0, 0, 0  # pad rows
    return q_grad, k_grad, v_grad


class _Group(NamedTuple):
    """The queries, or the keys, of N segments of the same length."""

    rows: slice | Tensor
    """Their rows in the stream: a slice if the segments follow each other, else int64 [N * length]."""
    segments: int
    """N."""
    length: int
    """Tokens of each segment."""


def _length_groups(cu_seqlens: Tensor, cu_keys: Tensor) -> list[tuple[_Group, _Group]]:
    """Group the segments by their numbers of queries and of keys.

    One call of the kernel serves a group: for short views, a call costs more than its products (docs/log.md).
    """
    return _cached_length_groups(tuple(cu_seqlens.tolist()), tuple(cu_keys.tolist()))


# All layers of a network need the same groups. With merging, each of up to 40 (ViT-g) has its own, and needs them again
# in the backward pass.
@functools.lru_cache(maxsize=64)
def _cached_length_groups(*edges: tuple[int, ...]) -> list[tuple[_Group, _Group]]:
    starts = np.array(edges, np.int64)[:, :-1]
    queries, keys = np.diff(edges)
    # Both lengths in one integer, since sorting pairs is several times slower.
    pairs, pair_of = np.unique(queries << 32 | keys, return_inverse=True)

    def group(which: int, index: int, length: int) -> _Group:
        own = starts[which, pair_of == index]
        if (np.diff(own) == length).all():
            return _Group(slice(int(own[0]), int(own[0]) + len(own) * length), len(own), length)
        return _Group(torch.from_numpy(own[:, None] + np.arange(length)).flatten(), len(own), length)

    return [
        (group(0, index, pair >> 32), group(1, index, pair & 0xFFFFFFFF)) for index, pair in enumerate(pairs.tolist())
    ]


def _gather(x: Tensor, group: _Group) -> Tensor:
    """Return the rows of a group as a batch, the layout of PyTorch's kernels: [T, H, ...] -> [N, H, length, ...]."""
    # index_select is several times faster than x[index]. A slice copies nothing.
    rows = x[group.rows] if isinstance(group.rows, slice) else x.index_select(0, group.rows)
    return rows.unflatten(0, (group.segments, group.length)).transpose(1, 2)


def _scatter(x: Tensor, group: _Group, batch: Tensor) -> None:
    """Write a batch into the rows of its group in `x`: the inverse of `_gather`."""
    x[group.rows] = batch.transpose(1, 2).flatten(0, 1).to(x.dtype)


def _mask(bias: Tensor | None, queries: _Group, keys: _Group) -> Tensor | None:
    """Return the bias as a mask [N, 1, queries, keys], expanded: memory holds one row for each segment."""
    if bias is None:
        return None
    return bias[keys.rows].unflatten(0, (keys.segments, 1, 1, keys.length)).expand(-1, -1, queries.length, -1)


@cpu_attention_backward.register_fake
def _(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, *_: object) -> tuple[Tensor, Tensor, Tensor]:
    empty_q, empty_k, empty_v = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))
    return empty_q, empty_k, empty_v


def _setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    ctx.save_for_backward(*inputs, *output)


def _backward(ctx, grad, _grad_logsumexp):  # type: ignore[no-untyped-def]
    return *cpu_attention_backward(grad, *ctx.saved_tensors), None, None, None  # none for cu_seqlens, cu_keys, bias


cpu_attention.register_autograd(_backward, setup_context=_setup_context)
