"""Checkpoints: written by `torch.distributed.checkpoint` as safetensors, and atomic.

Safetensors files hold numbers only, so loading a checkpoint never executes code, whoever wrote it.
"""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from torch import Tensor, nn
from torch.distributed.checkpoint import state_dict_loader, state_dict_saver
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from torch.optim import Optimizer

from ijepa_enhanced.distributed import ALONE, Ranks
from ijepa_enhanced.errors import CheckpointError
from ijepa_enhanced.files import flush, remove_partials

KEPT = 2
"""How many of the newest checkpoints are kept: one more than needed, in case the last one is damaged on disk."""
FLAT = StateDictOptions(flatten_optimizer_state_dict=True)
"""One tensor for each moment, named after its parameter, because safetensors has no nested dictionaries."""


def save_checkpoint(
    folder: Path,
    step: int,
    model: nn.Module,
    optimizer: Optimizer,
    progress: dict[str, Any],
    ranks: Ranks = ALONE,
) -> Path:
    """Write the checkpoint `folder/step-NNNNNNNN`, delete all but the `KEPT` newest, and return its path.

    All ranks call this, and each writes a part of the tensors. A folder of that name is never incomplete: it is written
    under a temporary name, flushed to disk and renamed. If the checkpoint of this step already exists, it stays as it
    is.

    Args:
        folder: of the run's checkpoints, which all ranks share.
        step: steps done.
        model, optimizer: their weights and moments are saved.
        progress: what else to save, as JSON; see `read_progress`. Only the progress of rank 0 is saved.
        ranks: the processes that share the run.

    Raises:
        CheckpointError: the checkpoint cannot be written, for example because the disk is full. The previous
            checkpoints are untouched.
    """
    final = folder / f"step-{step:08d}"
    # Rank 0 decides, because another machine may not see the folder yet.
    if ranks.gather(final.exists())[0]:
        return final
    partial = folder / f".{final.name}.partial"
    try:
        remove_partials(folder) if ranks.main else None
        _on_rank0(lambda: partial.mkdir(parents=True), ranks)
        with _single_process():
            writer = HuggingFaceStorageWriter(str(partial), save_distributed=ranks.world > 1)
            state_dict_saver.save(
                _tensors(model, optimizer),
                storage_writer=writer,
                process_group=ranks.patient,
                no_dist=ranks.world == 1,
            )
        _on_rank0(lambda: _complete(partial, final, progress), ranks)
    except (OSError, CheckpointException, SafetensorError) as error:
        if ranks.main:
            shutil.rmtree(partial, ignore_errors=True)  # frees the disk
        kept = latest_checkpoint(folder)
        survivor = f"The previous one, {kept}, is intact." if kept else "There is no earlier one."
        raise CheckpointError(f"Could not save checkpoint {final}: {_reason(error)}. {survivor}") from error
    return final


def _complete(partial: Path, final: Path, progress: dict[str, Any]) -> None:
    """Add the progress to a checkpoint, flush and rename it, and delete old ones."""
    sizes = {path.name: path.stat().st_size for path in partial.glob("*.safetensors")}
    (partial / "progress.json").write_text(json.dumps(progress | {"files": sizes}))
    # Flush the files before the folder, so that a renamed folder has its contents after a power cut.
    for written in (*partial.iterdir(), partial):
        flush(written)
    partial.rename(final)
    flush(final.parent)
    for old in newest_first(final.parent)[KEPT:]:
        shutil.rmtree(old, ignore_errors=True)  # the new checkpoint is safe; the next save deletes what is left


def _on_rank0(act: Callable[[], None], ranks: Ranks) -> None:
    """Let rank 0 act while the others wait, and raise its OSError on all ranks."""
    error: OSError | None = None
    if ranks.main:
        try:
            act()
        except OSError as caught:
            error = caught
    error = ranks.gather(error, patient=True)[0]
    if error is not None:
        raise error


def newest_first(folder: Path) -> list[Path]:
    """Return the complete checkpoints in `folder`, newest first."""
    return sorted(folder.glob("step-*"), reverse=True)  # the step has leading zeros, so names sort by step


def latest_checkpoint(folder: Path) -> Path | None:
    """Return the newest complete checkpoint in `folder`, or None."""
    return next(iter(newest_first(folder)), None)


def set_aside(folder: Path, good: Path, ranks: Ranks) -> None:
    """Rename the damaged checkpoints after `good`, so that their steps can be saved again."""
    if ranks.main:
        for checkpoint in newest_first(folder):
            if checkpoint > good:
                damaged = folder / f"damaged-{checkpoint.name}"
                shutil.rmtree(damaged, ignore_errors=True)
                checkpoint.rename(damaged)
    ranks.wait()


def read_progress(checkpoint: Path) -> dict[str, Any]:
    """Return the `progress` that `save_checkpoint` was given.

    Raises:
        CheckpointError: the checkpoint is damaged: this file is, or a file is missing or has another size.
    """
    try:
        progress: dict[str, Any] = json.loads((checkpoint / "progress.json").read_text())
        if not isinstance(progress, dict) or not isinstance(progress.get("files", {}), dict):
            raise ValueError("an object is needed")
    except OSError as error:
        raise _unreadable(checkpoint, _reason(error)) from error
    except (ValueError, RecursionError) as error:
        raise _unreadable(checkpoint, f"progress.json is damaged ({_reason(error)})") from error
    for name, size in progress.pop("files", {}).items():
        path = checkpoint / name
        if not path.is_file() or path.stat().st_size != size:
            found = f"has {path.stat().st_size} bytes instead of {size}" if path.is_file() else "is missing"
            raise _unreadable(checkpoint, f"{name} {found}")
    return progress


def read_together(checkpoint: Path, ranks: Ranks) -> dict[str, Any]:
    """Return the `progress` of a checkpoint, as rank 0 reads it. All ranks call this; errors as for `read_progress`."""
    found: dict[str, Any] | CheckpointError | None = None
    if ranks.main:
        try:
            found = read_progress(checkpoint)
        except CheckpointError as error:
            found = error
    found = ranks.gather(found)[0]
    if isinstance(found, CheckpointError):
        raise found
    assert found is not None
    return found


def newest_progress(folder: Path) -> dict[str, Any] | None:
    """Return the progress of the newest checkpoint in `folder` that can be read, or None."""
    for checkpoint in newest_first(folder):
        with suppress(CheckpointError):
            return read_progress(checkpoint)
    return None


def load_checkpoint(checkpoint: Path, model: nn.Module, optimizer: Optimizer, ranks: Ranks = ALONE) -> None:
    """Load weights and moments into `model` and `optimizer`, in place, whatever number of ranks has saved them.

    Args:
        checkpoint: from `save_checkpoint`.
        model, optimizer: of the same architecture, on this rank.
        ranks: the processes that share the run. All of them call this.

    Raises:
        CheckpointError: the checkpoint is damaged, of another architecture, or of an older version.
    """
    if not any(checkpoint.glob("*.safetensors")):
        raise _unreadable(checkpoint, "it has no safetensors files, so another version of ijepa-enhanced wrote it")
    tensors = _tensors(model, optimizer)
    try:
        with _single_process():
            state_dict_loader.load(
                tensors,
                storage_reader=HuggingFaceStorageReader(str(checkpoint)),
                process_group=ranks.patient,
                no_dist=ranks.world == 1,
            )
    except (OSError, ValueError, RuntimeError, SafetensorError, CheckpointException) as error:
        raise _unreadable(checkpoint, f"its weights are damaged ({_reason(error)})") from error
    # The loaded tensors go back into the nested form; what is not a tensor keeps its current value.
    weights, moments = _state(model, optimizer)
    for name, value in tensors.items():
        kind, _, name = name.partition(".")
        (weights if kind == "model" else moments)[name] = value
    set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=moments, options=FLAT)


def _tensors(model: nn.Module, optimizer: Optimizer) -> dict[str, Tensor]:
    """Return the weights as `model.NAME` and the moments as `optimizer.state.NAME.KIND`.

    Learning rate and weight decay are left out, because the schedules set them at every step.
    """
    weights, moments = _state(model, optimizer)
    named = [("model", *item) for item in weights.items()] + [("optimizer", *item) for item in moments.items()]
    return {f"{kind}.{name}": value for kind, name, value in named if isinstance(value, Tensor)}


def _state(model: nn.Module, optimizer: Optimizer) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the state dictionaries of the model and of the optimizer."""
    weights, moments = get_state_dict(model, optimizer, options=FLAT)
    return dict(weights), dict(moments)


@contextmanager
def _single_process() -> Iterator[None]:
    """Hide PyTorch's warning that there is no process group, since `no_dist` asks for none."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")
        yield


def _unreadable(checkpoint: Path, reason: str) -> CheckpointError:
    """Return the error of a damaged checkpoint."""
    return CheckpointError(f"Could not read checkpoint {checkpoint}: {reason}.")


def _reason(error: BaseException) -> str:
    """Return the message of the operating system, which PyTorch wraps in its own errors."""
    if isinstance(error, CheckpointException):
        error = next(iter(error.failures.values()))[0]  # the error of the first rank that failed
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, OSError):
        cause = cause.__cause__ or cause.__context__
    if isinstance(cause, OSError) and cause.strerror:
        return cause.strerror
    return (str(error) or type(error).__name__).splitlines()[0].removesuffix(".")
