"""Handle steps that fail: skip them, or tell the user what to change."""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import nn

from ijepa_enhanced.batch import MaskedBatch
from ijepa_enhanced.data.config import DataConfig
from ijepa_enhanced.distributed import Ranks
from ijepa_enhanced.errors import RunError
from ijepa_enhanced.jepa import Losses
from ijepa_enhanced.train.checkpoint import latest_checkpoint
from ijepa_enhanced.train.parallel import local
from ijepa_enhanced.train.unreadable import Unreadable

logger = logging.getLogger(__name__)

MOST_SKIPPED = 10
"""Most steps in a row that are skipped because their loss or gradient is not finite. A damaged image spoils one step in
each epoch. If all steps fail, the weights or the settings are the cause. The number is a guess."""
WORKER_TIMEOUT = 300.0
"""Data workers count as stuck if they need more seconds than this for the next pack. A pack normally takes seconds."""
SKIPPED = "skipped.jsonl"
"""File in a run's folder with the keys of the images of skipped steps."""


def record_skipped(
    folder: Path, step: int, batches: Sequence[MaskedBatch], losses: Sequence[Losses], images: Unreadable, ranks: Ranks
) -> None:
    """Append a line with the keys of the images that a skipped step trained on. All ranks call this.

    The line lists the images of packs whose loss is not finite. If all losses are finite, it lists the images of all
    packs.

    Args:
        folder: of the run.
        step: number of the step, from 1.
        batches: packs of this rank.
        losses: losses of these packs.
        images: source of the keys.
        ranks: the processes that share the step.
    """
    bad = [not loss.total.isfinite() for loss in losses]
    own = [(failed, sorted(set(batch.image_ids.tolist()))) for failed, batch in zip(bad, batches, strict=True)]
    packs = [pack for packs in ranks.gather(own) for pack in packs]
    only_failed = any(failed for failed, _ in packs)
    rows = sorted({row for failed, rows in packs if failed or not only_failed for row in rows})
    logger.warning(
        "Skipped step %d: its loss or gradient is NaN or infinite. The keys of its %d images are in %s.",
        step,
        len(rows),
        folder / SKIPPED,
    )
    if ranks.main:
        line = {"step": step, "keys": [images.key(row) for row in rows]}
        with (folder / SKIPPED).open("a") as file:
            file.write(json.dumps(line) + "\n")


def too_many_skipped(folder: Path, step: int, count: int) -> RunError:
    """Return the error for `count` skipped steps in a row that end with `step`."""
    checkpoint = latest_checkpoint(folder / "checkpoints")
    kept = f"The last good checkpoint is {checkpoint}" if checkpoint else "There is no checkpoint yet"
    return RunError(
        f"The loss or its gradient was NaN or infinite in {count} steps in a row, the last of them step {step}. "
        f"{kept}, and the images of these steps are listed in {folder / SKIPPED}. Start a new run with a lower "
        "--optim.lr or a higher --optim.warmup."
    )


def check_weights(model: nn.Module, step: int, ranks: Ranks) -> None:
    """Check that all weights are finite. All ranks call this.

    Raises:
        RunError: a weight is NaN or infinite.
    """
    bad = sum(not local(value).isfinite().all() for value in model.parameters())
    if ranks.sums([bad])[0]:
        raise RunError(
            f"Weights are NaN or infinite at step {step}. Start a new run with a lower --optim.lr or a higher "
            "--optim.warmup."
        )


@contextmanager
def explaining_workers() -> Iterator[None]:
    """Turn PyTorch's error about a data worker into advice. The error can interrupt the body at any line.

    Raises:
        RunError: a data worker is stuck or has ended.
    """
    try:
        yield
    except RuntimeError as error:
        what = str(error)
        if what.startswith("DataLoader timed out"):
            raise RunError(
                f"The data workers have made no pack for {WORKER_TIMEOUT:.0f} s. One may be stuck reading an image: "
                "check the storage of the images, then resume."
            ) from error
        if what.startswith("DataLoader worker (pid"):
            raise RunError(
                f"A data worker has ended: {what.partition(chr(10))[0]} If it was killed, the machine may be out of "
                "memory: lower --data.workers, then resume."
            ) from error
        raise


@contextmanager
def explaining_memory(config: DataConfig) -> Iterator[None]:
    """Turn an out-of-memory error of the GPU into advice on what to set.

    Raises:
        RunError: the GPU's memory is too small for a pack.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        half, twice = config.tokens_per_pack // 2, 2 * config.packs_per_step
        try:  # check that half the budget is a valid configuration
            dataclasses.replace(config, tokens_per_pack=half, max_view_tokens=config.view_limit)
            advice = (
                f"Start a new run with --data.tokens_per_pack {half} --data.packs_per_step {twice} "
                f"--data.max_view_tokens {config.view_limit}: packs of half the size, with the same number of tokens "
                "per step."
            )
        except ValueError:
            advice = "Start a new run with a smaller encoder, or with smaller or fewer views."
        raise RunError(f"Packs of {config.tokens_per_pack} tokens do not fit in GPU memory. {advice}") from error
