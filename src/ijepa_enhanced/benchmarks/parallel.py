"""Measure the bytes that ranks exchange and the seconds of a step: one sum after the backward pass, DDP and FSDP.

    torchrun --nproc-per-node 4 -m ijepa_enhanced.benchmarks.parallel

It trains ViT-Ti/16 on random packs of 288 tokens, one for each rank. It counts the bytes on the loopback interface of
Linux. So no other program may use this interface, and all ranks must be processes of one machine without GPUs.
"""

from __future__ import annotations

import statistics
import time
from pathlib import Path

import numpy as np
import torch
from torch import nn

from ijepa_enhanced.batch import Batch, MaskedBatch
from ijepa_enhanced.data.loader import masked
from ijepa_enhanced.distributed import Ranks, ranks_of_run
from ijepa_enhanced.jepa import JEPA, StepSize
from ijepa_enhanced.masks import MaskConfig, draw_masks
from ijepa_enhanced.models.config import EncoderConfig, PredictorConfig
from ijepa_enhanced.objective import ObjectiveConfig
from ijepa_enhanced.packed import Packed
from ijepa_enhanced.randomness import Purpose, generator
from ijepa_enhanced.train.optimizer import StepSettings, make_optimizer
from ijepa_enhanced.train.parallel import parallelize
from ijepa_enhanced.train.step import train_step

KINDS = ("sum", "ddp", "fsdp")
GRID, VIEWS, PATCH = (6, 6), 8, 16
TURNS, STEPS = 3, 2


class Summing(nn.Module):
    """A model that sums all gradients over the ranks at once, after the backward pass, when `trainable` is called."""

    def __init__(self, model: JEPA, ranks: Ranks) -> None:
        super().__init__()
        self.model = model
        trainable = model.trainable

        def summed() -> list[nn.Parameter]:
            parameters = trainable()
            ranks.sum_gradients(parameters)
            return parameters

        object.__setattr__(model, "trainable", summed)

    def forward(self, batch: MaskedBatch, size: StepSize) -> object:
        """See `JEPA.forward`."""
        return self.model(batch, size)


def pack(rank: int) -> MaskedBatch:
    """Return a pack of random views."""
    patches = np.random.default_rng(rank).integers(0, 256, (VIEWS * GRID[0] * GRID[1], PATCH**2 * 3), dtype=np.uint8)
    packed = Packed.of_grids(patches, np.array([GRID] * VIEWS))
    masks = [draw_masks(*GRID, MaskConfig(), generator(rank, Purpose.MASKS, image=view)) for view in range(VIEWS)]
    return masked(Batch(packed, torch.arange(VIEWS), None, (0, 0), ()), masks)


def sent() -> int:
    """Return the bytes that went through the loopback interface since the machine started."""
    line = next(line for line in Path("/proc/net/dev").read_text().splitlines() if line.strip().startswith("lo:"))
    return int(line.split()[1])


def main() -> None:
    """Print one line for each kind: milliseconds of a step, and megabytes that each rank sends in it."""
    with ranks_of_run() as ranks:
        batch, size = pack(ranks.rank), StepSize(1000 * ranks.world, ranks.world)
        settings, exact = StepSettings(1e-4, 0.05, 0.99), torch.autocast(ranks.device.type, enabled=False)

        def trainer(kind: str) -> tuple[JEPA, nn.Module, torch.optim.Optimizer]:
            torch.manual_seed(0)
            architecture = EncoderConfig("Ti", PATCH).architecture
            model = JEPA(architecture, PredictorConfig(), ObjectiveConfig()).to(ranks.device)
            network = Summing(model, ranks) if kind == "sum" else parallelize(model, kind, ranks)  # type: ignore[arg-type]
            return model, network, make_optimizer(model)

        trained = {kind: trainer(kind) for kind in KINDS}
        seconds: dict[str, list[float]] = {kind: [] for kind in KINDS}
        megabytes: dict[str, list[float]] = {kind: [] for kind in KINDS}
        for turn in range(TURNS + 1):  # the first one warms up
            for kind, (model, network, optimizer) in trained.items():
                ranks.wait()
                start, before = time.perf_counter(), sent()
                for _ in range(STEPS):
                    train_step(model, network, optimizer, [batch], size, settings, 1.0, exact, ranks.device)
                ranks.wait()
                if turn:
                    seconds[kind].append((time.perf_counter() - start) / STEPS)
                    megabytes[kind].append((sent() - before) / STEPS / ranks.world / 1e6)
        if ranks.main:
            count = sum(value.numel() for value in trained["ddp"][0].trainable()) / 1e6
            print(f"{ranks.world} ranks, {count:.1f} M trainable parameters, {torch.get_num_threads()} threads each")
            for kind in KINDS:
                one = statistics.median(seconds[kind]), statistics.median(megabytes[kind])
                print(f"{kind:5} {1e3 * one[0]:8.0f} ms {one[1]:8.1f} MB")


if __name__ == "__main__":
    main()
