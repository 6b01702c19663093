"""One pack of images through the encoder, and what comes out for each of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ijepa_enhanced.devices import autocast, autocast_dtype
from ijepa_enhanced.encoder import Encoder
from ijepa_enhanced.merge_plan import MergePlan
from ijepa_enhanced.models.vit import patches_to_tokens
from ijepa_enhanced.ops.merging import Merge, unmerge
from ijepa_enhanced.packed import Packed


@dataclass(frozen=True)
class Maps:
    """What the encoder makes of the patches of an image, on the host."""

    features: NDArray[np.float32]
    """[rows, columns, D]"""
    regions: NDArray[np.int64]
    """[layers, rows, columns]: the token that holds each patch after each layer, numbered from 0 in each of them. No
    layers if nothing merges."""


@dataclass(frozen=True)
class Output:
    """What comes out for one image."""

    vector: NDArray[np.float32]
    """[D], as from `Encoder.embed`."""
    grid: tuple[int, int]
    """Rows and columns of patches."""
    tokens: tuple[int, ...]
    """Tokens that stand for patches, before the first layer and after each layer."""
    maps: Maps | None
    """None if they were not asked for."""


@torch.inference_mode()
def run_pack(encoder: Encoder, packed: Packed, merge_rate: float, mapped: Sequence[bool]) -> list[Output]:
    """Return the outputs of the V views of a pack.

    Args:
        encoder: in evaluation mode.
        packed: uint8 patches, on the CPU.
        merge_rate: share of its tokens that each layer merges, for all views.
        mapped: V times whether a view needs `Maps`.

    Raises:
        ValueError: the merge rate is out of range.
    """
    plan = encoder.merge_plan(packed.segments, merge_rate)
    moved = packed.to(encoder.device)
    # As `Encoder.embed`: float32 on a CPU.
    dtype = torch.float32 if encoder.device.type == "cpu" else autocast_dtype("auto", encoder.device)
    with autocast(encoder.device, dtype):
        (tokens,), merges = encoder.network.tokens(encoder.preprocess(moved), plan and plan.to(encoder.device))
    holders = patches_to_tokens(merges)
    features = (tokens if holders[-1] is None else unmerge(tokens, holders[-1])).float()
    vectors = encoder.pool(features, moved).cpu().numpy()
    stages = [segments.lengths for segments in plan.segments] if plan else [packed.segments.lengths]
    grids = [(rows, cols) for rows, cols in packed.grids.tolist()]
    outputs = []
    for view, (grid, wanted) in enumerate(zip(grids, mapped, strict=True)):
        lengths = tuple(stage[view] - packed.prefix for stage in stages)
        maps = maps_of(view, packed, features, holders, plan) if wanted else None
        outputs.append(Output(vectors[view], grid, lengths, maps))
    return outputs


def maps_of(
    view: int, packed: Packed, features: Tensor, holders: Sequence[Merge | None], plan: MergePlan | None
) -> Maps:
    """Return the maps of one view of a pack.

    Args:
        view: its number.
        packed: the pack.
        features: float32 [T, D] of its tokens, after merged ones are spread over their patches.
        holders: for each layer, the token that holds each patch after it, see `patches_to_tokens`.
        plan: how the pack merged.
    """
    stop = sum(packed.segments.lengths[: view + 1])
    patches = slice(stop - packed.segments.lengths[view] + packed.prefix, stop)
    rows, cols = packed.grids[view].tolist()
    regions = np.empty((0, rows, cols), np.int64)
    if plan is not None:
        first = [sum(segments.lengths[:view]) + packed.prefix for segments in plan.segments[1:]]
        layers = [
            merge.origin[patches].cpu().numpy() - start
            for merge, start in zip(holders, first, strict=True)
            if merge is not None
        ]
        regions = np.stack(layers).reshape(-1, rows, cols)
    return Maps(features[patches].cpu().numpy().reshape(rows, cols, -1), regions)
