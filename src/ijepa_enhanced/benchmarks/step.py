"""What a training step costs, part by part and kernel by kernel, and beside it the original's method written plainly.

    python -m ijepa_enhanced.benchmarks.step --source SOURCE --variant S --patch 16

Weights are random: times depend on shapes alone. Matrix products are in bfloat16 where the device multiplies it.

The original packed images into rows of 256 tokens of which a tenth was padding, attended under dense masks of 256 x 256
with the softmax written out, and read float patches. It predicted each target block in a sequence of its own after the
whole context, as I-JEPA does (arXiv 2301.08243, section 3). Here it has our widths and runs uncompiled, as it did.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.profiler import ProfilerActivity

from ijepa_enhanced.batch import MaskedBatch
from ijepa_enhanced.benchmarks.attention import exponent, growth_tokens
from ijepa_enhanced.benchmarks.table import bar, print_table, write_csv
from ijepa_enhanced.data.catalog import open_catalog
from ijepa_enhanced.data.config import DataConfig
from ijepa_enhanced.data.loader import PackDataset, masks_of
from ijepa_enhanced.data.plan import Plan
from ijepa_enhanced.data.sources.open import open_source
from ijepa_enhanced.devices import autocast, autocast_dtype, best_device
from ijepa_enhanced.evaluate.cost import peak_bytes, quiet_profiler, seconds_by_turns
from ijepa_enhanced.evaluate.tokens import LabelledSource
from ijepa_enhanced.jepa import JEPA, StepSize
from ijepa_enhanced.masks import MaskConfig, ViewMasks
from ijepa_enhanced.models.blocks import Block, Blocks, FactorizedPositions
from ijepa_enhanced.models.config import EncoderConfig, PredictorConfig
from ijepa_enhanced.models.flops import step_flops
from ijepa_enhanced.models.vit import CHANNELS, VisionTransformer
from ijepa_enhanced.objective import ObjectiveConfig
from ijepa_enhanced.ops.linear import Linear
from ijepa_enhanced.ops.preprocess import IMAGENET_MEAN, IMAGENET_STD

TURNS = 3
PACKS = 2
"""Of a turn. Each timed turn shows packs not seen before: what is made once for a shape is part of a run's cost."""
ORIGINAL = "the original's"
VARIANTS = {"cpu": ("Ti",), "cuda": ("S", "B", "L", "H")}
PATCH = {"cpu": 16, "cuda": 14}
TOKENS = {"cpu": 2048, "cuda": 32768}
"""Of a pack."""
GROWTH_TOKENS = (1024, 2048, 4096, 8192, 16384, 32768, 65536, 131072)
PREDICTORS = {
    "B": PredictorConfig(384, 6, 12),
    "L": PredictorConfig(384, 12, 16),
    "H": PredictorConfig(384, 12, 16),
    "g": PredictorConfig(384, 12, 16),
}
"""I-JEPA's (arXiv 2301.08243, appendix A.1); smaller encoders have our default."""
PEAK_SIDE = {"cpu": 1024, "cuda": 8192}
PEAK_PRODUCTS = 10
KERNELS, KERNEL_NAME = 15, 60
"""Rows of a profile, and the most characters of a name: CUDA's have hundreds."""
ROW = 256
"""Tokens of the original's rows, and here the most of a view."""
PADDING = 0.1
"""Share of its rows."""
EMA = 0.996


def run(
    source: str = "synthetic",
    csv: bool = False,
    variant: str | None = None,
    patch: int | None = None,
    tokens: int | None = None,
    compiled: bool = False,
) -> dict[str, Any]:
    """Print tables of parts, kernels, methods, and packs of ever more tokens; return the last encoder's figures.

    LabelledSource of `synthetic` are drawn, not decoded.

    Args:
        source: the images.
        csv: write the tables.
        variant: the encoder; None: all of `VARIANTS` of this device.
        patch: P; None: that of `PATCH`.
        tokens: of a pack; None: those of `TOKENS`.
        compiled: run our networks, and not the original's, through `torch.compile`.

    Returns:
        `images_per_second` and `tokens_per_second` of a step, its `mfu` (model FLOPs utilisation: operations of the
        true lengths over what the device's largest products reach in the same run), `over_original`, how many times as
        fast it is (not a number where the original's method does not fit), and the `time_exponent` and
        `memory_exponent` of tokens with which the first encoder's step grows.
    """
    device = best_device()
    variants = [variant] if variant else VARIANTS[device.type]
    configs = [EncoderConfig(name, patch or PATCH[device.type]) for name in variants]
    parts: list[dict[str, Any]] = []
    kernels: list[dict[str, Any]] = []
    methods: list[dict[str, Any]] = []
    opened = open_source(source)
    # Uncached, as a bare GPU image has nothing to read or write the cache with.
    images = LabelledSource(opened, open_catalog(opened, cache=False))
    budget = tokens or TOKENS[device.type]
    for config in configs:
        try:
            found = measure(config, images, budget, device, compiled)
        except torch.OutOfMemoryError:
            if not methods:
                raise
            print(f"ViT-{config.variant} does not fit at {budget:,} tokens a pack: try --tokens {budget // 2}.")
            break
        for rows, more in zip((parts, kernels, methods), found, strict=True):
            rows += more
    print("Parts of a step, the device waited for after each; decoding is one process's, beside the step")
    print_table([row | {"": bar(row["over_step"])} for row in parts])
    print("What the device computes in a step, by the time that it takes, as PyTorch's profiler finds it")
    print_table(kernels)
    print(f"Whole steps on packs of {source}, by turns")
    print_table(methods)
    growth = []
    training = our_training(configs[0], device, compiled)
    for count in growth_tokens(GROWTH_TOKENS, tokens):
        try:
            growth.append(grown(training, configs[0], images, count))
        except torch.OutOfMemoryError:
            print(f"A pack of {count:,} tokens does not fit.")
            break
    print(f"A step of ViT-{configs[0].variant}/{configs[0].patch_size} on packs of ever more tokens")
    print_table(growth)
    seconds, memory = (exponent(growth, cost) for cost in ("ms", "peak_MB"))
    print(f"Time grows as tokens ** {seconds:.2f}, memory as tokens ** {memory:.2f}.")
    if csv:
        theme = "step-compiled" if compiled else "step"
        tables = {"": methods, "-parts": parts, "-kernels": kernels, "-growth": growth}
        for name, rows in tables.items():
            print(write_csv(theme + name, rows))
    ours = [row for row in methods if row["method"] != ORIGINAL][-1]
    same = [row for row in methods if row["method"] == ORIGINAL and row["encoder"] == ours["encoder"]]
    return {
        "images_per_second": ours["images_per_second"],
        "tokens_per_second": ours["tokens_per_second"],
        "mfu": ours["mfu"],
        "over_original": ours["images_per_second"] / same[0]["images_per_second"] if same else math.nan,
        "time_exponent": seconds,
        "memory_exponent": memory,
    }


def measure(
    config: EncoderConfig, images: LabelledSource, tokens: int, device: torch.device, compiled: bool
) -> tuple[list[dict[str, Any]], list[dict[str, Any]], list[dict[str, Any]]]:
    """The parts and the kernels of our step, and whole steps of ours and, where it fits, of the original's method."""
    predictor = PREDICTORS.get(config.variant, PredictorConfig())
    ours = our_training(config, device, compiled)
    clock = ours.clock
    with clock.running():
        batches = list(load(config, images, tokens, PACKS * (2 * TURNS + 1), clock))
    pinned = device.type == "cuda"
    rows = [lay_out(batch, masks_of(batch, MaskConfig(), 0), config) for batch in batches]
    used = sum(len(batch.packed.values) for batch in batches) / sum(row.views.numel() for row in rows)
    our_packs = [batch.pin_memory() if pinned else batch for batch in batches]
    their_packs = [row.pin_memory() if pinned else row for row in rows]

    compared: list[tuple[str, Training, Sequence[Any], float]] = [
        ("ours, compiled" if compiled else "ours", ours, our_packs, 0.0)
    ]
    # On those of the turn that only warms up; the second step is the first beside AdamW's own numbers.
    if original := original_training(config, device, their_packs[:PACKS]):
        compared.append((ORIGINAL, original, their_packs, 1 - used))
    else:
        print(f"The original's method does not fit for ViT-{config.variant} at {tokens:,} tokens a pack.")
    products, operations = matrix_products(device, ours.dtype)
    turns = [in_turn(training, packs) for _, training, packs, _ in compared]
    *seconds, limit = seconds_by_turns([*turns, products], device, TURNS)
    peak = operations / limit
    with clock.running():
        for _ in range(TURNS):
            turns[0]()
    views = PACKS * sum(len(batch.image_ids) for batch in batches) / len(batches)
    shown = PACKS * sum(len(batch.packed.values) for batch in batches) / len(batches)
    flops = 0.0
    for batch in batches:
        lengths, contexts, targets = (part.segments.lengths for part in (batch.packed, batch.context, batch.targets))
        flops += int(step_flops(config, predictor, lengths, contexts, targets).sum())
    flops = PACKS * flops / len(batches)
    name = f"{config.variant}/{config.patch_size}"
    methods = [
        {
            "encoder": name,
            "method": method,
            "precision": str(ours.dtype).removeprefix("torch."),
            "images_per_second": views / taken,
            "tokens_per_second": shown / taken,
            "mfu": flops / taken / peak,
            "peak_TFLOPs": peak / 1e12,
            "peak_MB": peak_bytes(partial(training.steps, packs[:1]), device) / 1e6,
            "padding": padding,
        }
        for (method, training, packs, padding), taken in zip(compared, seconds, strict=True)
    ]
    parts = part_rows(name, clock, views / PACKS, seconds[0] / PACKS)
    return parts, kernel_rows(name, partial(ours.steps, our_packs[:1]), device), methods


def in_turn(training: Training, packs: Sequence[Any]) -> Callable[[], None]:
    """Steps on the next `PACKS` of the packs, at each call; after the last come the first."""
    shown = itertools.cycle(packs)
    return lambda: training.steps(itertools.islice(shown, PACKS))


def matrix_products(device: torch.device, dtype: torch.dtype) -> tuple[Callable[[], None], int]:
    """Some large products, whose rate is the most that the device reaches, and their operations."""
    side = PEAK_SIDE[device.type]
    x, layer = torch.randn(side, side, device=device, dtype=dtype), Linear(side, side, device=device, dtype=dtype)

    @torch.no_grad()
    def multiply() -> None:
        for _ in range(PEAK_PRODUCTS):
            layer(x)

    return multiply, PEAK_PRODUCTS * 2 * side**3


def part_rows(encoder: str, clock: Clock, images: float, step: float) -> list[dict[str, Any]]:
    """A row for each part of a step of so many images that takes `step` seconds when nothing waits in between."""
    means = {part: float(np.mean(times)) for part, times in clock.seconds.items()}
    means["rest of forward"] = means.pop("forward") - sum(means[part] for part in ("teacher", "student", "predictor"))
    order = ("decode", "copy", "teacher", "student", "predictor", "rest of forward", "backward", "optimizer", "EMA")
    return [
        {
            "encoder": encoder,
            "part": part,
            "ms": 1e3 * means[part],
            "over_step": means[part] / step,
            "images_per_second": images / means[part],
        }
        for part in order
    ]


def kernel_rows(encoder: str, step: Callable[[], object], device: torch.device) -> list[dict[str, Any]]:
    """What the device spends most of a step on: a row for each kernel, on a CPU operation, and one for all others."""
    quiet_profiler()
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.type == "cuda" else [])]
    with torch.profiler.profile(activities=activities) as profile:
        step()
    time_of = "self_device_time_total" if device.type == "cuda" else "self_cpu_time_total"
    kind = device.type.upper()
    # Ranges that code marks, as the optimizer does, are events of the GPU too, over all kernels in them.
    events = [e for e in profile.key_averages() if e.device_type.name == kind and not e.is_user_annotation]
    events.sort(key=lambda event: getattr(event, time_of), reverse=True)
    total = sum(getattr(event, time_of) for event in events)

    def row(name: str, some: list[Any]) -> dict[str, Any]:
        taken = sum(getattr(event, time_of) for event in some)
        calls = sum(event.count for event in some)
        return {
            "encoder": encoder,
            "kernel": name,
            "calls": calls,
            "ms": taken / 1e3,
            "share": taken / (total or math.nan),
        }

    rows = [row(event.key[:KERNEL_NAME], [event]) for event in events[:KERNELS]]
    return [*rows, row("all others", events[KERNELS:])]


def grown(training: Training, config: EncoderConfig, images: LabelledSource, tokens: int) -> dict[str, Any]:
    """Our step on a pack of so many tokens."""
    packs = list(load(config, images, tokens, 1, training.clock))
    call = partial(training.steps, packs)
    (seconds,) = seconds_by_turns([call], training.device, TURNS)
    shown = len(packs[0].packed.values)
    return {
        "tokens": shown,
        "ms": 1e3 * seconds,
        "peak_MB": peak_bytes(call, training.device) / 1e6,
        "tokens_per_second": shown / seconds,
    }


def our_training(config: EncoderConfig, device: torch.device, compiled: bool) -> Training:
    """Our model of an encoder and its predictor."""
    clock = Clock(device)
    with device:  # weights of large encoders are drawn much faster where they will be
        model = OurStep(config, PREDICTORS.get(config.variant, PredictorConfig()), clock, compiled)
    return Training(model, device, clock)


def load(config: EncoderConfig, images: LabelledSource, tokens: int, packs: int, clock: Clock) -> Iterator[MaskedBatch]:
    """The first `packs` packs of training, at the default sizes and masks."""
    plan = Plan(
        images.catalog, DataConfig(tokens_per_pack=tokens, max_view_tokens=ROW), config.patch_size, seed=0
    ).epoch(0)
    dataset = PackDataset(images.source, images.catalog, config.patch_size, MaskConfig())
    for number in range(min(packs, len(plan))):
        with clock.part("decode"):
            batch = dataset[plan[number]]
        yield cast(MaskedBatch, batch)


def original_training(config: EncoderConfig, device: torch.device, packs: Sequence[Rows]) -> Training | None:
    """The original's, after a step on each of the packs; None where memory does not suffice for these."""
    try:
        with device:
            model = OriginalStep(config, PREDICTORS.get(config.variant, PredictorConfig()))
        training = Training(model, device, Clock(device))
        training.steps(packs)
    except torch.OutOfMemoryError:
        return None
    return training


class Clock:
    """The seconds of parts of a step, while it runs."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.seconds: dict[str, list[float]] = {}
        self.runs = False

    @contextmanager
    def running(self) -> Iterator[None]:
        """Measure all parts inside."""
        self.runs = True
        yield
        self.runs = False

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """A part; the device is waited for at both ends of it, if the clock runs."""
        if not self.runs:
            yield
            return
        start = self._now()
        yield
        self.seconds.setdefault(name, []).append(self._now() - start)

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()


class Timed(nn.Module):
    """A network whose forward pass is a part. (A hook would be compiled with it.)"""

    def __init__(self, network: nn.Module, clock: Clock, name: str) -> None:
        super().__init__()
        self.network = network
        self.clock = clock
        self.name = name

    def forward(self, *args: Any) -> Tensor:
        """As the network's own."""
        with self.clock.part(self.name):
            out: Tensor = self.network(*args)
        return out


class OurStep(JEPA):
    """The product's own model with a clock on its three networks."""

    def __init__(self, encoder: EncoderConfig, predictor: PredictorConfig, clock: Clock, compiled: bool) -> None:
        super().__init__(encoder, predictor, ObjectiveConfig())
        for name in ("teacher", "student", "predictor"):
            network = self.get_submodule(name)
            if compiled:
                network.compile(dynamic=True)
            setattr(self, name, Timed(network, clock, name))

    def loss(self, batch: MaskedBatch) -> Tensor:
        """Of a step of one pack."""
        batch = self.preprocess(batch)
        features = self.features(batch)
        size = StepSize(len(batch.targets.index), 1)
        return self.losses(self.predict(features, batch), self.targets(batch), features, batch, size).total


class Training:
    """A model with its optimizer, as `train.loop` steps it."""

    def __init__(self, model: OurStep | OriginalStep, device: torch.device, clock: Clock) -> None:
        self.model = model.to(device)
        self.device = device
        self.clock = clock
        self.learned = [value for value in model.parameters() if value.requires_grad]
        self.optimizer = torch.optim.AdamW(self.learned, fused=True)
        self.dtype = autocast_dtype("auto", device)

    def steps(self, packs: Iterable[Any]) -> None:
        """One step on each of the packs, which lie on the host."""
        part = self.clock.part
        for pack in packs:
            with part("copy"):
                moved = pack.to(self.device, non_blocking=True)
            with part("forward"), autocast(self.device, self.dtype):
                loss = self.model.loss(moved)
            with part("backward"):
                loss.backward()
            with part("optimizer"):
                nn.utils.clip_grad_norm_(self.learned, 1.0)
                self.optimizer.step()
                self.optimizer.zero_grad()
            with part("EMA"):
                self.model.update_teacher(EMA)


class Rows(NamedTuple):
    """A pack as the original had it: B rows of `ROW` tokens. Tokens of no view are padding, of view -1."""

    patches: Tensor
    """float32 [B, 256, P * P * C], normalised."""
    places: Tensor
    """int64 [B, 256, 2]: row and column in the view's grid."""
    views: Tensor
    """int64 [B, 256]: the view of each token."""
    context: Tensor
    """int64 [B, Lc]: places in the row of what the student sees, padded to the row that has most."""
    context_views: Tensor
    """int64 [B, Lc]"""
    targets: Tensor
    """int64 [M * B, Lt]: of the first block of all rows, then of the second, up to the M-th."""
    target_views: Tensor
    """int64 [M * B, Lt]"""

    def to(self, device: torch.device, non_blocking: bool = False) -> Rows:
        """The same on `device`."""
        return Rows(*(x.to(device, non_blocking=non_blocking) for x in self))

    def pin_memory(self) -> Rows:
        """The same in page-locked memory."""
        return Rows(*(x.pin_memory() for x in self))


def lay_out(batch: MaskedBatch, masks: Sequence[ViewMasks], config: EncoderConfig) -> Rows:
    """Put each view, longest first, into the first row that has room for it; then add rows up to `PADDING`."""
    lengths = np.array(batch.packed.segments.lengths)
    room: list[int] = []
    slots, rows_of = [np.empty(0, np.int64)] * len(lengths), [0] * len(lengths)
    for view in np.argsort(-lengths, kind="stable").tolist():
        length = int(lengths[view])
        row = next((row for row, left in enumerate(room) if left >= length), len(room))
        if row == len(room):
            room.append(ROW)
        slots[view], rows_of[view] = ROW - room[row] + np.arange(length), row
        room[row] -= length
    count = max(len(room), math.ceil(lengths.sum() / ((1 - PADDING) * ROW)))
    where = torch.from_numpy(np.concatenate([ROW * row + slot for row, slot in zip(rows_of, slots, strict=True)]))
    patches = torch.zeros(count * ROW, batch.packed.values.shape[1])
    pixels = batch.packed.values.unflatten(1, (-1, CHANNELS)) / 255
    patches[where] = ((pixels - torch.tensor(IMAGENET_MEAN)) / torch.tensor(IMAGENET_STD)).flatten(1)
    places = torch.zeros(count * ROW, 2, dtype=torch.int64)
    places[where] = batch.packed.positions.long().clamp(max=config.max_grid - 1)
    views = torch.full((count * ROW,), -1)
    views[where] = torch.from_numpy(np.repeat(np.arange(len(lengths)), lengths))

    def chosen(tokens: Sequence[np.ndarray[Any, Any]]) -> list[list[tuple[int, int]]]:
        """Of each row, the places of some tokens of each view, and the view."""
        found: list[list[tuple[int, int]]] = [[] for _ in range(count)]
        for view, own in enumerate(tokens):
            found[rows_of[view]] += [(int(slot), view) for slot in slots[view][own]]
        return found

    nothing = np.empty(0, np.int64)
    blocks = [
        chosen([view.targets[block] if block < len(view.targets) else nothing for view in masks])
        for block in range(max(len(view.targets) for view in masks))
    ]
    return Rows(
        patches.unflatten(0, (count, ROW)),
        places.unflatten(0, (count, ROW)),
        views.unflatten(0, (count, ROW)),
        *padded(chosen([view.context for view in masks])),
        *padded([row for block in blocks for row in block]),
    )


def padded(rows: list[list[tuple[int, int]]]) -> tuple[Tensor, Tensor]:
    """Places and views of rows of different lengths, each int64 [rows, longest]."""
    longest = max(map(len, rows))
    both = torch.tensor([row + [(0, -1)] * (longest - len(row)) for row in rows])
    return both[..., 0], both[..., 1]


class OriginalStep(nn.Module):
    """The original's method with our widths, on `Rows`."""

    def __init__(self, encoder: EncoderConfig, predictor: PredictorConfig) -> None:
        super().__init__()
        self.student = VisionTransformer(encoder)
        self.teacher = copy.deepcopy(self.student).requires_grad_(False)
        self.embed = Linear(self.student.width, predictor.width)
        self.mask_token = nn.Parameter(torch.randn(predictor.width))
        self.positions = FactorizedPositions(predictor.width, encoder.max_grid)
        nn.init.normal_(self.positions.rows)
        nn.init.normal_(self.positions.cols)
        self.predictor = Blocks(predictor.width, predictor.depth, predictor.heads, 4.0)
        self.head = Linear(predictor.width, self.student.width)

    def loss(self, rows: Rows) -> Tensor:
        """The mean over all tokens of all target blocks."""
        with torch.no_grad():
            features = encode(self.teacher, rows.patches, rows.places, rows.views)
            features = F.layer_norm(features.float(), features.shape[-1:])
        places = take(rows.places, rows.context)
        context = encode(self.student, take(rows.patches, rows.context), places, rows.context_views)
        seen = self.embed(context) + look_up(self.positions, places)
        blocks = len(rows.targets) // len(rows.views)
        asked = self.mask_token + look_up(self.positions, take(rows.places.repeat(blocks, 1, 1), rows.targets))
        x = torch.cat([seen.repeat(blocks, 1, 1), asked], dim=1)
        views = torch.cat([rows.context_views.repeat(blocks, 1), rows.target_views], dim=1)
        predicted = self.head(dense(self.predictor, x, views)[:, seen.shape[1] :]).float()
        targets = take(features.repeat(blocks, 1, 1), rows.targets)
        shown = rows.target_views >= 0
        losses = F.smooth_l1_loss(predicted, targets, reduction="none").mean(dim=2)
        return (losses * shown).sum() / shown.sum()

    @torch.no_grad()
    def update_teacher(self, momentum: float) -> None:
        """As `JEPA.update_teacher`."""
        torch._foreach_lerp_(list(self.teacher.parameters()), list(self.student.parameters()), 1.0 - momentum)


def take(x: Tensor, index: Tensor) -> Tensor:
    """[B, T, ...] at [B, L] -> [B, L, ...]."""
    return x[torch.arange(len(x), device=x.device)[:, None], index]


def look_up(positions: FactorizedPositions, places: Tensor) -> Tensor:
    """Factorized positions of whole places no larger than the tables: [B, T, 2] -> [B, T, D]."""
    return positions.rows[places[..., 0]] + positions.cols[places[..., 1]]


def encode(encoder: VisionTransformer, patches: Tensor, places: Tensor, views: Tensor) -> Tensor:
    """Features of padded rows: [B, T, P * P * C] -> [B, T, D]."""
    x = encoder.patch_embed(patches) + look_up(cast(FactorizedPositions, encoder.positions), places)
    return dense(encoder.blocks, x, views)


def dense(blocks: Blocks, x: Tensor, views: Tensor) -> Tensor:
    """Transformer blocks on padded rows [B, T, D], under a mask of T x T that keeps views apart."""
    apart = views[:, None, :, None] != views[:, None, None, :]
    for layer in cast(Iterable[Block], blocks.layers):
        q, k, v = layer.qkv(layer.norm1(x)).unflatten(2, (3, layer.heads, -1)).permute(2, 0, 3, 1, 4)
        logits = (q @ k.transpose(2, 3)) * q.shape[-1] ** -0.5
        weights = logits.masked_fill(apart, -torch.inf).softmax(dim=3)
        x = layer.transform(x + layer.proj((weights @ v).transpose(1, 2).flatten(2)))
    return blocks.norm(x)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", default="synthetic")
    parser.add_argument("--csv", action="store_true")
    parser.add_argument("--variant", help="Ti, S, B, L, H or g; all that this device is meant for if left out")
    parser.add_argument("--patch", type=int, help="side of a patch in pixels")
    parser.add_argument("--tokens", type=int, help="of a pack")
    parser.add_argument("--compile", action="store_true", dest="compiled", help="run our networks compiled")
    run(**vars(parser.parse_args()))
