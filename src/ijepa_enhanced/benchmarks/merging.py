"""What merging tokens costs, and what it buys: `python -m ijepa_enhanced.benchmarks.merging --source SOURCE`.

Weights are random: neither times nor memory depend on them. Precision is float32 on the CPU, bfloat16 on CUDA.
"""

import argparse
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ijepa_enhanced.benchmarks.table import print_table, write_csv
from ijepa_enhanced.data.catalog import open_catalog
from ijepa_enhanced.data.sources.open import open_source
from ijepa_enhanced.devices import autocast, autocast_dtype, best_device
from ijepa_enhanced.encoder import Encoder
from ijepa_enhanced.evaluate.cost import interleaved_seconds, peak_bytes
from ijepa_enhanced.merge_plan import MergePlan, merged_lengths
from ijepa_enhanced.models.blocks import Block
from ijepa_enhanced.models.config import Architecture, EncoderConfig
from ijepa_enhanced.models.preprocessing import Preprocessing
from ijepa_enhanced.models.vit import VisionTransformer
from ijepa_enhanced.ops.merging import match, merge
from ijepa_enhanced.packed import Packed

TURNS = 3
COST_TOKENS, COST_RATE = 16384, 0.05
VIEWS, WIDTHS = (196, 576, 4096), (384, 768)
"""Tokens of each view, and widths of a block with heads of 64."""
VARIANT, RESOLUTION, IMAGES = "B", 384, 6
RATES = (0.0, 0.02, 0.05, 0.08, 0.12, 0.13)
"""At the last, a view of 576 tokens has half of them on average over 12 layers."""
MEMORY_TOKENS = 65536


def run(source: str = "synthetic", csv: bool = False) -> dict[str, Any]:
    """Print three tables and return the largest share of a block, the last rate's speed-up, and bytes per token."""
    device = best_device()
    dtype = autocast_dtype("auto", device) if device.type != "cpu" else torch.float32
    with torch.inference_mode(), autocast(device, dtype):
        costs = [cost(view, width, device) for view in VIEWS for width in WIDTHS]
        print(f"Time of one block with {COST_TOKENS:,} tokens, with merging computed but not applied (ms)")
        print_table(costs)
        speeds = speed(source, device)
        print(f"Speed of ViT-{VARIANT}/16 alone on {IMAGES} images of {source}, at a resolution of {RESOLUTION} px")
        print_table(speeds)
        memory = [memory_of(views, device) for views in ("256 each", "one of 4,096, else 64")]
        print(f"Peak memory of matching {MEMORY_TOKENS:,} tokens with keys of dimension 64")
        print_table(memory)
    if csv:
        for theme, rows in (("merging-cost", costs), ("merging-speed", speeds), ("merging-memory", memory)):
            print(write_csv(theme, rows))
    return {
        "cost": max(row["share"] for row in costs),
        "speedup": speeds[-1]["speedup"],
        "bytes_per_token": max(row["bytes_per_token"] for row in memory),
    }


def cost(view: int, width: int, device: torch.device) -> dict[str, Any]:
    """Return the row of what matching and averaging add to a transformer block that runs on all tokens."""
    lengths = [view] * (COST_TOKENS // view)
    plan = MergePlan.of(lengths, COST_RATE, 1).to(device)
    tokens, segments = plan.totals[0], plan.segments[0]
    block = Block(Architecture(width, 1, width // 64, 4 * width)).to(device)
    x, sizes = torch.randn(tokens, width, device=device), torch.ones(tokens, device=device)
    _, keys = block.attend(x, segments)
    merging = match(keys.mean(dim=1, dtype=torch.float32), plan, 0)

    def forward() -> Tensor:
        return block.transform(block.attend(x, segments)[0])

    whole, matching, averaging = interleaved_seconds(
        [
            forward,
            lambda: match(keys.mean(dim=1, dtype=torch.float32), plan, 0),
            lambda: merge(x, sizes, merging),
        ],
        device,
        TURNS,
    )
    return {
        "tokens_per_view": view,
        "width": width,
        "block_ms": 1e3 * whole,
        "match_ms": 1e3 * matching,
        "merge_ms": 1e3 * averaging,
        "share": (matching + averaging) / whole,
    }


def speed(source: str, device: torch.device) -> list[dict[str, Any]]:
    """Return a row for each of `RATES`."""
    opened = open_source(source)
    rows = open_catalog(opened).rows
    images = [opened.open(row) for row in rows[np.linspace(0, len(rows) - 1, IMAGES).astype(int)].tolist()]
    encoder = Encoder(VisionTransformer(EncoderConfig(VARIANT).architecture), Preprocessing()).eval().to(device)
    packed = Packed.concatenate(list(encoder.packs(images, RESOLUTION)))
    plans = [encoder.merge_plan(packed.segments, rate) for rate in RATES]
    moved = [plan and plan.to(device) for plan in plans]
    stream = packed.to(device)
    seconds = interleaved_seconds([lambda plan=plan: encoder(stream, plan) for plan in moved], device, TURNS)  # type: ignore[misc]
    lengths, depth = packed.segments.lengths, encoder.config.depth
    return [
        {
            "merge_rate": rate,
            "images_per_second": len(lengths) / taken,
            "speedup": seconds[0] / taken,
            "mean_tokens": mean_tokens(lengths, rate, depth),
            "share_of_tokens": mean_tokens(lengths, rate, depth) / mean_tokens(lengths, 0.0, depth),
        }
        for rate, taken in zip(RATES, seconds, strict=True)
    ]


def mean_tokens(lengths: tuple[int, ...], rate: float, depth: int) -> float:
    """Return the mean tokens of a view, over views and over each layer's attention and MLP; they merge in between."""
    table = merged_lengths(lengths, rate, depth)
    return float((table[:-1].mean() + table[1:].mean()) / 2)


def memory_of(views: str, device: torch.device) -> dict[str, Any]:
    """Return the row of the peak memory of matching."""
    lengths = [256] * (MEMORY_TOKENS // 256)
    if views != "256 each":
        lengths = [4096] + [64] * ((MEMORY_TOKENS - 4096) // 64)
    plan = MergePlan.of(lengths, COST_RATE, 1).to(device)
    metric = torch.randn(plan.totals[0], 64, device=device)
    peak = peak_bytes(lambda: match(metric, plan, 0), device)
    return {"views": views, "peak_MB": peak / 1e6, "bytes_per_token": peak / plan.totals[0]}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--source", default="synthetic")
    parser.add_argument("--csv", action="store_true")
    run(**vars(parser.parse_args()))
