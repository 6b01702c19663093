"""What attention within the segments of a packed stream costs: `python -m ijepa_enhanced.benchmarks.attention`.

It compares streams of equal tokens in views of different lengths, then streams of more and more tokens. Heads are those
of ViT-S; precision is bfloat16 on CUDA and float32 on the CPU. Time and memory depend on lengths alone, so it reads no
images.
"""

import argparse
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ijepa_enhanced.benchmarks.growth import grow, growth_tokens, print_growth
from ijepa_enhanced.benchmarks.table import print_table, write_csv
from ijepa_enhanced.devices import autocast_dtype, best_device, kind_of
from ijepa_enhanced.evaluate.cost import interleaved_seconds, peak_bytes
from ijepa_enhanced.ops.attention import attention, dense_attention, padded_attention
from ijepa_enhanced.packed import Segments, segment_ids

TURNS = 3
HEADS, HEAD_WIDTH = 6, 64
TOKENS = {"cpu": 2048, "gpu": 32768}
"""Tokens of a stream: what one dense product has time and memory for."""
VIEWS = (16, 64, 256, 1024, 4096)
"""Tokens of each view; those longer than a stream are left out."""
MIXED = (49, 576)
"""Shortest and longest view of a stream of all lengths: resolutions of 112 to 384 px in patches of 16."""
CASES = ("within a view", "with sizes", "to half as many keys")
GROWTH_TOKENS = tuple(1024 << power for power in range(8))
GROWTH_VIEW = 256

Kernel = Callable[[Tensor, Tensor, Tensor], Tensor]


def run(csv: bool = False, tokens: int | None = None) -> dict[str, Any]:
    """Print two tables and return how many times as long a dense product takes at least, and how cost grows.

    Args:
        csv: write the tables.
        tokens: of a stream of the first table, a power of two; None: those of `TOKENS`.

    Returns:
        `dense_over_ours`, forward and backward, where it is least; `time_exponent` and `memory_exponent` of the number
        of tokens, so that 1 is linear. With few tokens a GPU's time is that of starting kernels, which does not grow.
    """
    device = best_device()
    counts = growth_tokens(GROWTH_TOKENS, tokens)
    tokens = tokens or TOKENS[kind_of(device)]
    streams = {f"{view:,}": [view] * (tokens // view) for view in VIEWS if view <= tokens}
    streams["{}-{}".format(*MIXED)] = mixed_lengths(tokens)
    costs = []
    for case in CASES:
        torch.compiler.reset()  # or FlexAttention would run uncompiled after a few shapes
        costs += [row for views, lengths in streams.items() for row in compare(case, views, lengths, device)]
    print(f"Time and memory of attention on {device.type}: {tokens:,} tokens, {HEADS} heads of width {HEAD_WIDTH}")
    print_table(costs)
    growth = grow("stream", counts, partial(grown, device=device))
    exponents = print_growth(
        f"Attention on views of {GROWTH_VIEW} tokens, forward and backward, by tokens in all", growth
    )
    if csv:
        print(write_csv("attention-kernels", costs))
        print(write_csv("attention-growth", growth))
    return {"dense_over_ours": min(row["over_ours"] for row in costs if row["kernel"] == "dense"), **exponents}


def mixed_lengths(tokens: int) -> list[int]:
    """Return lengths drawn uniformly from `MIXED`, `tokens` in all; the last is what is left."""
    drawn = np.random.default_rng(0).integers(MIXED[0], MIXED[1], tokens // MIXED[0] + 1, endpoint=True)
    ends = np.minimum(np.cumsum(drawn), tokens)
    lengths = np.diff(ends, prepend=0)
    return lengths[lengths > 0].tolist()


def compare(case: str, views: str, lengths: list[int], device: torch.device) -> list[dict[str, Any]]:
    """Return a row for each kernel: one of `CASES` on views of these lengths."""
    queries = Segments.of(lengths).to(device)
    keys, sizes = queries, None
    if case == "with sizes":
        sizes = torch.randint(1, 9, (queries.total,), device=device).float()
    elif case == "to half as many keys":
        keys = Segments.of([max(1, length // 2) for length in lengths]).to(device)
    x = inputs(queries, keys)
    named = kernels(queries, keys, sizes)
    forward = interleaved_seconds([partial(forwards, kernel, x) for kernel in named.values()], device, TURNS)
    both = interleaved_seconds([partial(backwards, kernel, x) for kernel in named.values()], device, TURNS)
    return [
        {
            "attention": case,
            "tokens_per_view": views,
            "kernel": name,
            "forward_ms": 1e3 * there,
            "forward_backward_ms": 1e3 * there_and_back,
            "over_ours": there_and_back / both[0],
            "peak_MB": peak_bytes(partial(backwards, kernel, x), device) / 1e6,
        }
        for (name, kernel), there, there_and_back in zip(named.items(), forward, both, strict=True)
    ]


def inputs(queries: Segments, keys: Segments) -> tuple[Tensor, Tensor, Tensor]:
    """Return random q [T, H, K], and k and v [S, H, K]."""
    device = queries.cu_seqlens.device
    dtype = autocast_dtype("auto", device) if device.type != "cpu" else torch.float32
    q, k, v = (
        torch.randn(segments.total, HEADS, HEAD_WIDTH, device=device, dtype=dtype, requires_grad=True)
        for segments in (queries, keys, keys)
    )
    return q, k, v


@torch.no_grad()
def forwards(kernel: Kernel, x: tuple[Tensor, Tensor, Tensor]) -> None:
    """Run a kernel as the teacher does."""
    kernel(*x)


def backwards(kernel: Kernel, x: tuple[Tensor, Tensor, Tensor]) -> None:
    """Run a kernel and its backward pass, as the student does."""
    out = kernel(*x)
    torch.autograd.grad(out, x, torch.ones_like(out))


def kernels(queries: Segments, keys: Segments, sizes: Tensor | None) -> dict[str, Kernel]:
    """Return what can be compared on this device, ours first."""
    bias = None if sizes is None else sizes.log()
    named: dict[str, Kernel] = {
        "ours": partial(attention, segments=queries, sizes=sizes, keys=keys),
        "padded": partial(padded_attention, segments=queries, keys=keys, bias=bias),
        "dense": partial(dense_attention, segments=queries, keys=keys, bias=bias),
    }
    if queries.cu_seqlens.device.type == "cuda":
        compiled = flex_attention(queries, keys, bias, compiled=True)
        try:
            backwards(compiled, inputs(queries, keys))
            named["FlexAttention"] = compiled
        except RuntimeError as error:  # there is no compiler, or no kernel for this GPU
            print(f"FlexAttention is skipped: {str(error).partition(chr(10))[0]}")
    return named


def flex_attention(queries: Segments, keys: Segments, bias: Tensor | None, compiled: bool) -> Kernel:
    """Return FlexAttention (arXiv 2412.05496); its block mask is made here, so its time leaves that out."""
    from torch.nn.attention import flex_attention as flex

    of_query, of_key = (segment_ids(segments.cu_seqlens, segments.total) for segments in (queries, keys))

    def same_view(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return of_query[query] == of_key[key]

    def biased(score: Tensor, batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        assert bias is not None
        return score + bias[key]

    mask = flex.create_block_mask(same_view, None, None, queries.total, keys.total, device=of_query.device)
    call = torch.compile(flex.flex_attention, dynamic=False) if compiled else flex.flex_attention

    def kernel(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
        out: Tensor = call(q, k, v, score_mod=None if bias is None else biased, block_mask=mask)
        return out[0].transpose(0, 1)

    return kernel


def grown(tokens: int, device: torch.device) -> dict[str, Any]:
    """Return the row of ours on a stream of so many tokens."""
    segments = Segments.of([GROWTH_VIEW] * (tokens // GROWTH_VIEW)).to(device)
    call = partial(backwards, partial(attention, segments=segments), inputs(segments, segments))
    (seconds,) = interleaved_seconds([call], device, TURNS)
    return {
        "tokens": tokens,
        "ms": 1e3 * seconds,
        "peak_MB": peak_bytes(call, device) / 1e6,
        "ns_per_token": 1e9 * seconds / tokens,
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--csv", action="store_true")
    parser.add_argument("--tokens", type=int, help="of a stream, a power of two")
    run(**vars(parser.parse_args()))
