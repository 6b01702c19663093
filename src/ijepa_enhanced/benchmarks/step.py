"""What a training step costs, part by part and kernel by kernel, and how much the original's method costs.

    python -m ijepa_enhanced.benchmarks.step --source SOURCE --variant S --patch 16

Weights are random: times depend on shapes alone. Matrix products are in bfloat16 where the device has them.
"""

from __future__ import annotations

import argparse
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple, cast

import numpy as np
import torch

from ijepa_enhanced.batch import MaskedBatch
from ijepa_enhanced.benchmarks.ceilings import kernel_rows, matrix_products
from ijepa_enhanced.benchmarks.growth import grow, growth_tokens, print_growth
from ijepa_enhanced.benchmarks.original import ROW, Original, Rows, lay_out
from ijepa_enhanced.benchmarks.table import bar, print_table, write_csv
from ijepa_enhanced.benchmarks.timing import PARTS, Clock, TimedJEPA, Training
from ijepa_enhanced.data.catalog import open_catalog
from ijepa_enhanced.data.config import DataConfig
from ijepa_enhanced.data.loader import PackDataset, masks_of
from ijepa_enhanced.data.plan import Plan
from ijepa_enhanced.data.sources.open import open_source
from ijepa_enhanced.devices import best_device, kind_of, pins_memory
from ijepa_enhanced.errors import RequestError
from ijepa_enhanced.evaluate.cost import interleaved_seconds, peak_bytes
from ijepa_enhanced.evaluate.tokens import LabelledSource
from ijepa_enhanced.masks import MaskConfig
from ijepa_enhanced.models.config import EncoderConfig, PredictorConfig
from ijepa_enhanced.models.flops import step_flops

TURNS = 3
PACKS = 2
"""Packs of a turn. Each timed turn shows packs not seen before, since a run makes new shapes all the time too."""
ORIGINAL = "the original's"
VARIANTS = {"cpu": ("Ti",), "gpu": ("S", "B", "L", "H")}
PATCH = {"cpu": 16, "gpu": 14}
TOKENS = {"cpu": 2048, "gpu": 32768}
"""Tokens of a pack."""
GROWTH_TOKENS = (1024, 2048, 4096, 8192, 16384, 32768, 65536, 131072)
PREDICTORS = {
    "B": PredictorConfig(384, 6, 12),
    "L": PredictorConfig(384, 12, 16),
    "H": PredictorConfig(384, 12, 16),
    "g": PredictorConfig(384, 12, 16),
}
"""I-JEPA's (arXiv 2301.08243, appendix A.1); smaller encoders have our default."""

Tables = tuple[list[dict[str, Any]], list[dict[str, Any]], list[dict[str, Any]]]
"""The parts of our step, its kernels, and whole steps of ours and of the original's method."""


def run(
    source: str = "synthetic",
    csv: bool = False,
    variant: str | None = None,
    patch: int | None = None,
    tokens: int | None = None,
    compiled: bool = False,
) -> dict[str, Any]:
    """Print tables of parts, kernels, methods, and packs of more and more tokens; return the last encoder's figures.

    Args:
        source: the images; those of `synthetic` are drawn, not decoded.
        csv: write the tables.
        variant: the encoder; None: all of `VARIANTS` for this device.
        patch: P; None: that of `PATCH`.
        tokens: of a pack, at least `ROW`; None: those of `TOKENS`.
        compiled: run our networks, and not the original's, through `torch.compile`.

    Returns:
        `images_per_second` and `tokens_per_second` of a step, its `mfu` (model FLOPs utilization: operations for the
        true lengths, over what the device's largest products reach in the same run), `over_original`, how many times as
        fast it is (not a number where the original's method does not fit), and the `time_exponent` and
        `memory_exponent` of tokens with which the first encoder's step grows.
    """
    if tokens is not None and tokens < ROW:
        raise RequestError(f"--tokens must be at least {ROW}, not {tokens}.")
    device = best_device()
    variants = [variant] if variant else VARIANTS[kind_of(device)]
    configs = [EncoderConfig(name, patch or PATCH[kind_of(device)]) for name in variants]
    opened = open_source(source)
    # Not cached: a bare GPU image has nothing to read or write the cache with.
    images = LabelledSource(opened, open_catalog(opened, cache=False))
    parts, kernels, methods = measure_all(configs, images, tokens or TOKENS[kind_of(device)], device, compiled)
    print("Time of each part of a training step, after waiting for the device. Images are decoded before the step.")
    print_table([row | {"": bar(row["over_step"])} for row in parts])
    print("Kernels of one training step, sorted by their time on the device (PyTorch profiler)")
    print_table(kernels)
    print(f"Time of whole training steps on packs of {source}. The methods run in turns.")
    print_table(methods)
    ours = our_training(configs[0], device, compiled)
    growth = grow("pack", growth_tokens(GROWTH_TOKENS, tokens), partial(grown, ours, configs[0], images))
    title = f"A training step of ViT-{configs[0].variant}/{configs[0].patch_size}, by tokens per pack"
    exponents = print_growth(title, growth)
    if csv:
        theme = "step-compiled" if compiled else "step"
        tables = {"": methods, "-parts": parts, "-kernels": kernels, "-growth": growth}
        for name, rows in tables.items():
            print(write_csv(theme + name, rows))
    return last_figures(methods) | exponents


def last_figures(methods: list[dict[str, Any]]) -> dict[str, float]:
    """Return what `run` does of the last encoder's methods: ours, and the original's if it fits."""
    ours, *original = [row for row in methods if row["encoder"] == methods[-1]["encoder"]]
    figures = {name: ours[name] for name in ("images_per_second", "tokens_per_second", "mfu")}
    ratio = ours["images_per_second"] / original[0]["images_per_second"] if original else math.nan
    return figures | {"over_original": ratio}


def measure_all(
    configs: Sequence[EncoderConfig], images: LabelledSource, tokens: int, device: torch.device, compiled: bool
) -> Tables:
    """Measure one encoder after another until one no longer fits into memory.

    Raises:
        torch.OutOfMemoryError: not even the first fits.
    """
    tables: Tables = ([], [], [])
    for config in configs:
        try:
            found = measure(config, images, tokens, device, compiled)
        except torch.OutOfMemoryError:
            if not tables[0]:
                raise
            advice = f" Try --tokens {tokens // 2}." if tokens // 2 >= ROW else ""
            print(f"ViT-{config.variant} does not fit in memory with packs of {tokens:,} tokens.{advice}")
            break
        for rows, more in zip(tables, found, strict=True):
            rows += more
    return tables


class Method(NamedTuple):
    """A way to train, and the packs it is timed on."""

    name: str
    training: Training
    packs: Sequence[Any]
    padding: float
    """Share of the packs' tokens."""


def measure(config: EncoderConfig, images: LabelledSource, tokens: int, device: torch.device, compiled: bool) -> Tables:
    """Measure one encoder with our method and, where it fits, with the original's."""
    training = our_training(config, device, compiled)
    clock = training.clock
    with clock.running():
        batches = list(load(config, images, tokens, PACKS * (2 * TURNS + 1), clock))
    ours = Method("ours, compiled" if compiled else "ours", training, pinned(batches, device), 0.0)
    original = original_method(config, batches, device)
    if original is None:
        print(
            f"The original I-JEPA method does not fit in memory for ViT-{config.variant} with packs of {tokens:,} "
            "tokens."
        )
    compared = [ours] if original is None else [ours, original]
    products, operations = matrix_products(device, training.dtype)
    turns = [in_turn(method.training, method.packs) for method in compared]
    *seconds, limit = interleaved_seconds([*turns, products], device, TURNS)
    with clock.running():
        for _ in range(TURNS):
            turns[0]()
    name = f"{config.variant}/{config.patch_size}"
    work = Work.of(config, batches)
    methods = [
        {"encoder": name} | method_row(method, work, time / PACKS, operations / limit)
        for method, time in zip(compared, seconds, strict=True)
    ]
    kernels = kernel_rows(name, partial(training.steps, ours.packs[:1]), device)
    return part_rows(name, clock, work.images, seconds[0] / PACKS), kernels, methods


def pinned(packs: Sequence[Any], device: torch.device) -> list[Any]:
    """Return packs in the kind of host memory that the loader puts them into for this device."""
    return [pack.pin_memory() if pins_memory(device) else pack for pack in packs]


def in_turn(training: Training, packs: Sequence[Any]) -> Callable[[], None]:
    """Return a function that trains on the next `PACKS` of the packs at each call; after the last come the first."""
    shown = itertools.cycle(packs)
    return lambda: training.steps(itertools.islice(shown, PACKS))


def our_training(config: EncoderConfig, device: torch.device, compiled: bool) -> Training:
    """Return our model of an encoder and its predictor, ready to train."""
    clock = Clock(device)
    with device:  # where the weights of large encoders are drawn much faster
        model = TimedJEPA(config.architecture, PREDICTORS.get(config.variant, PredictorConfig()), clock, compiled)
    return Training(model, device, clock)


def original_method(config: EncoderConfig, batches: Sequence[MaskedBatch], device: torch.device) -> Method | None:
    """Return the original's method on the same packs, or None if it does not fit into memory."""
    rows = [lay_out(batch, masks_of(batch, MaskConfig(), 0), config.architecture) for batch in batches]
    used = sum(len(batch.packed.values) for batch in batches) / sum(row.views.numel() for row in rows)
    packs: list[Rows] = pinned(rows, device)
    try:
        with device:
            model = Original(config.architecture, PREDICTORS.get(config.variant, PredictorConfig()))
        training = Training(model, device, Clock(device))
        # The packs of the turn that only warms up. The second step is the first beside AdamW's own numbers.
        training.steps(packs[:PACKS])
    except torch.OutOfMemoryError:
        return None
    return Method(ORIGINAL, training, packs, 1 - used)


def load(config: EncoderConfig, images: LabelledSource, tokens: int, packs: int, clock: Clock) -> Iterator[MaskedBatch]:
    """Yield the first `packs` packs of training, at the default sizes and masks, from as many epochs as that takes."""
    plan = Plan(images.catalog, DataConfig(tokens_per_pack=tokens, max_view_tokens=ROW), config.patch_size, seed=0)
    planned = (epoch[number] for epoch in map(plan.epoch, itertools.count()) for number in range(len(epoch)))
    dataset = PackDataset(images.source, images.catalog, config.patch_size, MaskConfig())
    for pack in itertools.islice(planned, packs):
        clock.begin("decode")
        batch = dataset[pack]
        clock.begin(None)
        yield cast(MaskedBatch, batch)


class Work(NamedTuple):
    """What a step computes on the mean of some packs."""

    images: float
    tokens: float
    flops: float

    @classmethod
    def of(cls, config: EncoderConfig, batches: Sequence[MaskedBatch]) -> Work:
        """Count it from the true lengths of views."""
        predictor = PREDICTORS.get(config.variant, PredictorConfig())
        flops = 0
        for batch in batches:
            lengths, contexts, targets = (
                part.segments.lengths for part in (batch.packed, batch.context, batch.targets)
            )
            flops += int(step_flops(config.architecture, predictor, lengths, contexts, targets).sum())
        images = sum(len(batch.image_ids) for batch in batches)
        tokens = sum(len(batch.packed.values) for batch in batches)
        return cls(images / len(batches), tokens / len(batches), flops / len(batches))


def method_row(method: Method, work: Work, seconds: float, peak: float) -> dict[str, Any]:
    """Return the row of a method whose step takes so many seconds on a device of `peak` operations a second."""
    training = method.training
    return {
        "method": method.name,
        "precision": str(training.dtype).removeprefix("torch."),
        "images_per_second": work.images / seconds,
        "tokens_per_second": work.tokens / seconds,
        "mfu": work.flops / seconds / peak,
        "peak_TFLOPs": peak / 1e12,
        "peak_MB": peak_bytes(partial(training.steps, method.packs[:1]), training.device) / 1e6,
        "padding": method.padding,
    }


def part_rows(encoder: str, clock: Clock, images: float, step: float) -> list[dict[str, Any]]:
    """Return a row for each part of a step on so many images.

    Args:
        encoder: its name.
        clock: what measured the parts.
        images: of a step.
        step: seconds of a step within which nothing waits for the device.
    """
    means = {part: float(np.mean(clock.seconds[part])) for part in ("decode", *PARTS)}
    return [
        {
            "encoder": encoder,
            "part": part,
            "ms": 1e3 * mean,
            "over_step": mean / step,
            "images_per_second": images / mean,
        }
        for part, mean in means.items()
    ]


def grown(training: Training, config: EncoderConfig, images: LabelledSource, tokens: int) -> dict[str, Any]:
    """Return the row of our step on a pack of so many tokens."""
    packs = list(load(config, images, tokens, 1, training.clock))
    call = partial(training.steps, packs)
    (seconds,) = interleaved_seconds([call], training.device, TURNS)
    shown = len(packs[0].packed.values)
    return {
        "tokens": shown,
        "ms": 1e3 * seconds,
        "peak_MB": peak_bytes(call, training.device) / 1e6,
        "tokens_per_second": shown / seconds,
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", default="synthetic")
    parser.add_argument("--csv", action="store_true")
    parser.add_argument("--variant", help="Ti, S, B, L, H or g; if left out, all that this device is meant for")
    parser.add_argument("--patch", type=int, help="side of a patch in pixels")
    parser.add_argument("--tokens", type=int, help="of a pack")
    parser.add_argument("--compile", action="store_true", dest="compiled", help="run our networks compiled")
    run(**vars(parser.parse_args()))
