"""Checkpoints: `torch.distributed.checkpoint` into a temporary folder, flushed to disk, then renamed."""

from __future__ import annotations

import json
import os
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import nn
from torch.distributed.checkpoint import state_dict_loader, state_dict_saver
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.optim import Optimizer

from ijepa_enhanced.errors import CheckpointError

KEPT = 2
"""Newest checkpoints kept: one more than needed, should the last one's disk block go bad."""


def save_checkpoint(folder: Path, step: int, model: nn.Module, optimizer: Optimizer, progress: dict[str, Any]) -> Path:
    """Write `folder/step-NNNNNNNN` with the model, the optimizer and `progress` (JSON), and drop all but the newest.

    Nothing under its final name is ever incomplete: all is written beside it, flushed and renamed. A checkpoint
    of that step that is already there is left as it is.

    Raises:
        CheckpointError: the disk is full, say; the previous checkpoints are untouched.
    """
    final = folder / f"step-{step:08d}"
    if final.exists():
        return final
    partial = folder / f".{final.name}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        weights, moments = get_state_dict(model, optimizer)
        with _single_process():
            state_dict_saver.save({"model": weights, "optimizer": moments}, checkpoint_id=partial, no_dist=True)
        (partial / "progress.json").write_text(json.dumps(progress))
        for written in (*partial.iterdir(), partial):
            _flush(written)
        partial.rename(final)
        _flush(folder)
    except (OSError, CheckpointException) as error:
        shutil.rmtree(partial, ignore_errors=True)
        kept = latest_checkpoint(folder)
        survivor = f"The previous one, {kept}, is intact." if kept else "There is no earlier one."
        raise CheckpointError(f"Could not save checkpoint {final}: {_reason(error)}. {survivor}") from error
    for old in _checkpoints(folder)[:-KEPT]:
        shutil.rmtree(old)
    return final


def latest_checkpoint(folder: Path) -> Path | None:
    """The newest complete checkpoint in `folder`, or None."""
    return next(reversed(_checkpoints(folder)), None)


def read_progress(checkpoint: Path) -> dict[str, Any]:
    """What `save_checkpoint` was given as `progress`.

    Raises:
        CheckpointError: it is damaged.
    """
    try:
        progress: dict[str, Any] = json.loads((checkpoint / "progress.json").read_text())
    except (OSError, ValueError) as error:
        raise _unreadable(checkpoint, error) from error
    return progress


def load_checkpoint(checkpoint: Path, model: nn.Module, optimizer: Optimizer) -> None:
    """Load weights and moments in place.

    Raises:
        CheckpointError: it is damaged, or of another architecture.
    """
    weights, moments = get_state_dict(model, optimizer)
    state: dict[str, Any] = {"model": weights, "optimizer": moments}
    try:
        with _single_process():
            state_dict_loader.load(state, checkpoint_id=checkpoint, no_dist=True)
    except (OSError, ValueError, CheckpointException) as error:
        raise _unreadable(checkpoint, error) from error
    set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])


@contextmanager
def _single_process() -> Iterator[None]:
    """Without PyTorch's warning that there is no process group, which is what `no_dist` says already."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")
        yield


def _checkpoints(folder: Path) -> list[Path]:
    return sorted(folder.glob("step-*"))


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _unreadable(checkpoint: Path, error: BaseException) -> CheckpointError:
    others = [path for path in _checkpoints(checkpoint.parent) if path != checkpoint]
    way_out = f"Delete it to go on from {others[-1]}." if others else "There is no other one."
    return CheckpointError(f"Could not read checkpoint {checkpoint}: {_reason(error)}. {way_out}")


def _reason(error: BaseException) -> str:
    """The operating system's own words, which PyTorch wraps in its own."""
    if isinstance(error, CheckpointException):
        error = next(iter(error.failures.values()))[0]
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, OSError):
        cause = cause.__cause__ or cause.__context__
    if isinstance(cause, OSError) and cause.strerror:
        return cause.strerror
    return (str(error) or type(error).__name__).splitlines()[0].removesuffix(".")
