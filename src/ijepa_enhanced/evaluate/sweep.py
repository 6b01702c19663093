"""Trade accuracy for speed: what each setting of resolution and merge rate costs and gives."""

from __future__ import annotations

import csv
import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch

from ijepa_enhanced.data.catalog import Catalog
from ijepa_enhanced.data.geometry import fit_grids
from ijepa_enhanced.data.packing import cut_into_packs
from ijepa_enhanced.devices import autocast
from ijepa_enhanced.encoder import TOKENS_PER_PACK, Encoder
from ijepa_enhanced.evaluate.cost import interleaved_seconds, peak_bytes
from ijepa_enhanced.evaluate.features import Features
from ijepa_enhanced.evaluate.protocol import Scoring, halves, score_parts
from ijepa_enhanced.files import replacing
from ijepa_enhanced.models.flops import encoder_flops
from ijepa_enhanced.packed import Packed

CLOSE = 0.005
"""Accuracies this close are as good as equal: half a point. The standard error of 70% of 4,000 images is 0.7."""
INTERVAL = 2 * 1.96
"""Width of a 95% interval, in standard errors of a normal distribution."""


@dataclass(frozen=True)
class Point:
    """One setting and what was found with it."""

    resolution: int | None
    """sqrt(height * width) in pixels; None is native size."""
    merge_rate: float
    """Share of its tokens that each layer merges into others."""
    knn20: float
    """Top-1 accuracy of 20 nearest neighbors, a fraction of 1, as all accuracies here. All but `choosing_linear` are of
    the half of the validation images that has no part in the choice."""
    knn20_mean_per_class: float
    choosing_linear: float
    """Top-1 accuracy of a linear layer on the half of the validation images that the choice is made by."""
    linear: float
    """Top-1 accuracy of a linear layer."""
    linear_low: float
    """Lower end of its 95% interval, see `scores.interval`."""
    linear_high: float
    """Upper end."""
    linear_mean_per_class: float
    rankme: float
    images_per_second: float | None
    """Of everything from reading files to features; None if cached features were not all extracted in this way."""
    network_images_per_second: float
    """Of the network alone, images of the mean number of patches: what the setting changes, and decoding would hide."""
    gflops_per_image: float
    """Mean over the images of `encoder_flops`, in 10^9."""
    peak_megabytes: float
    """Most bytes of tensors at once, in 10^6, while the network sees its fullest pack, beside its weights."""


def frontier(points: Sequence[Point], score: str) -> list[Point]:
    """Return the points that no other beats in both `score` and the network's speed, the fastest first."""
    best, kept = -np.inf, []
    for point in sorted(points, key=lambda p: (-p.network_images_per_second, -getattr(p, score))):
        if getattr(point, score) > best:
            best = getattr(point, score)
            kept.append(point)
    return kept


def sweep_scores(train: Features, val: Features, how: Scoring) -> dict[str, float]:
    """Return the scores of a `Point`, from one training of the probes; nothing on other ranks than the main one.

    The linear accuracy of the fastest of several settings that are nearly as good is chosen for being high, so it
    overstates what the setting gives. Hence one half of the validation images chooses (see `protocol.halves`), and the
    other is reported.
    """
    if not how.ranks.main:
        return score_parts(train, val, [torch.empty(0)], how=how)[0]
    by, reported = score_parts(train, val, halves(val), how=how)
    return reported | {"choosing_linear": by["linear"]}


def most_accurate(points: Sequence[Point]) -> Point:
    """Return the point with the highest linear accuracy on the choosing half, the fastest of several."""
    return max(points, key=lambda p: (p.choosing_linear, p.network_images_per_second))


def tolerance(points: Sequence[Point]) -> float:
    """Return by how much accuracies on the choosing half may differ and be as good as equal.

    This is one standard error of the best of them, as when trees are pruned (Breiman et al., "Classification and
    Regression Trees", 1984, section 3.4.3), but at least `CLOSE`. Both halves have as many images, so the interval of
    the other half gives the standard error.
    """
    best = most_accurate(points)
    return max(CLOSE, (best.linear_high - best.linear_low) / INTERVAL)


def choose(points: Sequence[Point]) -> Point:
    """Return the fastest of the points whose linear accuracy on the choosing half is as good as the best there."""
    enough = most_accurate(points).choosing_linear - tolerance(points)
    # A sum of decimals is not exact, and a point at the very edge belongs.
    return max((p for p in points if p.choosing_linear >= enough - 1e-9), key=lambda p: p.network_images_per_second)


def advice(points: Sequence[Point]) -> str:
    """Say which setting to use, with its accuracy on both halves of the validation images."""
    best, chosen = most_accurate(points), choose(points)
    close = f"{100 * tolerance(points):.1f} points"
    if chosen is best:
        reason = f"Linear accuracy {best.choosing_linear:.1%}; no faster setting comes within {close} of it"
    else:
        faster = chosen.network_images_per_second / best.network_images_per_second
        reason = (
            f"Linear accuracy {chosen.choosing_linear:.1%}, {faster:.1f}x as fast as the most accurate setting "
            f"({setting_name(best.resolution, best.merge_rate)}: {best.choosing_linear:.1%}); differences up to "
            f"{close} count as equal"
        )
    return (
        f"Recommended: {setting_name(chosen.resolution, chosen.merge_rate)}. {reason}. This choice used one half of "
        f"the validation images; on the other half, the linear accuracy is {chosen.linear:.1%} (95% confidence "
        f"interval {chosen.linear_low:.1%} to {chosen.linear_high:.1%})."
    )


def setting_name(resolution: int | None, merge_rate: float) -> str:
    """Return what users read as the name of a setting."""
    return f"resolution {'native' if resolution is None else resolution}, merge rate {merge_rate:g}"


@torch.inference_mode()
def network_costs(
    encoder: Encoder, catalogs: Sequence[Catalog], settings: Sequence[tuple[int | None, float]], dtype: torch.dtype
) -> list[dict[str, float]]:
    """Return what the network needs at each setting of resolution and merge rate: the last three fields of `Point`.

    Operations are counted over all images of the sources. Time and memory are those of the fullest pack that `extract`
    makes; its images are black, since both depend on shapes alone. The packs run in turn, several times over, so that
    the speeds compare on a busy machine too.
    """
    device, config = encoder.device, encoder.config
    budget = encoder.at_once(TOKENS_PER_PACK)
    runs, images, gflops = [], [], []
    for resolution, rate in settings:
        grids = [
            fit_grids(each.heights, each.widths, resolution, config.patch_size, TOKENS_PER_PACK) for each in catalogs
        ]
        lengths = np.concatenate(grids).prod(axis=1)
        packs = [part[slice(*run)] for part in grids for run in cut_into_packs(part.prod(axis=1), budget)]
        fullest = max(packs, key=lambda pack: int(pack.prod(axis=1).sum()))
        tokens = int(fullest.prod(axis=1).sum())
        packed = Packed.of_grids(np.zeros((tokens, len(encoder.normalize.scale)), np.uint8), fullest, config.prefix)
        plan = encoder.merge_plan(packed.segments, rate)
        # Entered for each pack, as `extract` does: autocast keeps its copies of the weights for as long.
        runs.append(autocast(device, dtype)(partial(encoder, packed.to(device), plan and plan.to(device))))
        images.append(tokens / lengths.mean())
        gflops.append(encoder_flops(config, lengths, rate).mean() / 1e9)
    seconds = interleaved_seconds(runs, device)
    peaks = [peak_bytes(run, device) for run in runs]
    return [
        {
            "network_images_per_second": float(count / taken),
            "gflops_per_image": float(operations),
            "peak_megabytes": peak / 1e6,
        }
        for count, taken, operations, peak in zip(images, seconds, gflops, peaks, strict=True)
    ]


def write_points(points: Sequence[Point], path: Path) -> None:
    """Write a CSV: a column for each field of `Point`, and whether it is on the frontier of `choosing_linear`."""
    best = frontier(points, "choosing_linear")
    with replacing(path) as temporary, temporary.open("w", newline="") as file:
        writer = csv.DictWriter(file, [*(field.name for field in dataclasses.fields(Point)), "frontier"])
        writer.writeheader()
        writer.writerows(dataclasses.asdict(point) | {"frontier": int(point in best)} for point in points)
