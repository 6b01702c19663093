"""Checkpoints: written by `torch.distributed.checkpoint` as safetensors, and atomic.

Safetensors files hold numbers only, so loading a checkpoint never executes code, whoever wrote it.
"""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.distributed.checkpoint import state_dict_loader, state_dict_saver
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from torch.optim import Optimizer

from ijepa_enhanced.errors import CheckpointError
from ijepa_enhanced.files import flush, remove_partials

KEPT = 2
"""How many of the newest checkpoints are kept: one more than needed, in case the last one is damaged on disk."""
FLAT = StateDictOptions(flatten_optimizer_state_dict=True)
"""One tensor for each moment, named after its parameter, because safetensors has no nested dictionaries."""


def save_checkpoint(folder: Path, step: int, model: nn.Module, optimizer: Optimizer, progress: dict[str, Any]) -> Path:
    """Write the checkpoint `folder/step-NNNNNNNN`, delete all but the `KEPT` newest, and return its path.

    A folder of that name is never incomplete: it is written under a temporary name, flushed to disk and renamed. If the
    checkpoint of this step already exists, it stays as it is.

    Args:
        folder: of the run's checkpoints.
        step: steps done.
        model, optimizer: their weights and moments are saved.
        progress: what else to save, as JSON; see `read_progress`.

    Raises:
        CheckpointError: the checkpoint cannot be written, for example because the disk is full. The previous
            checkpoints are untouched.
    """
    final = folder / f"step-{step:08d}"
    if final.exists():
        return final
    partial = folder / f".{final.name}.partial"
    remove_partials(folder)
    try:
        partial.mkdir(parents=True)
        with _single_process():
            writer = HuggingFaceStorageWriter(str(partial))
            state_dict_saver.save(_tensors(model, optimizer), storage_writer=writer, no_dist=True)
        (partial / "progress.json").write_text(json.dumps(progress))
        # The files first, then the folder that names them: after a power cut, a renamed folder must have its contents.
        for written in (*partial.iterdir(), partial):
            flush(written)
        partial.rename(final)
        flush(folder)
    except (OSError, CheckpointException, SafetensorError) as error:
        shutil.rmtree(partial, ignore_errors=True)  # frees the disk
        kept = latest_checkpoint(folder)
        survivor = f"The previous one, {kept}, is intact." if kept else "There is no earlier one."
        raise CheckpointError(f"Could not save checkpoint {final}: {_reason(error)}. {survivor}") from error
    for old in _checkpoints(folder)[:-KEPT]:
        shutil.rmtree(old, ignore_errors=True)  # the new one is safe; what is left is deleted after the next save
    return final


def latest_checkpoint(folder: Path) -> Path | None:
    """Return the newest complete checkpoint in `folder`, or None."""
    return next(reversed(_checkpoints(folder)), None)


def read_progress(checkpoint: Path) -> dict[str, Any]:
    """Return the `progress` that `save_checkpoint` was given.

    Raises:
        CheckpointError: the checkpoint is damaged.
    """
    try:
        progress: dict[str, Any] = json.loads((checkpoint / "progress.json").read_text())
    except OSError as error:
        raise _unreadable(checkpoint, _reason(error)) from error
    except ValueError as error:
        raise _unreadable(checkpoint, f"progress.json is damaged ({_reason(error)})") from error
    return progress


def load_checkpoint(checkpoint: Path, model: nn.Module, optimizer: Optimizer) -> None:
    """Load weights and moments into `model` and `optimizer`, in place.

    Raises:
        CheckpointError: the checkpoint is damaged, of another architecture, or of an older version.
    """
    if not any(checkpoint.glob("*.safetensors")):
        raise CheckpointError(
            f"{checkpoint} contains no safetensors files: another version of ijepa-enhanced wrote it. Start a new run."
        )
    tensors = _tensors(model, optimizer)
    try:
        # AdamW has no moments for a parameter that had no gradient yet, such as the projector's before the first pack
        # of several images.
        stored = _stored(checkpoint)
        untouched = [
            name
            for name, parameter in model.named_parameters()
            if parameter.requires_grad and not any(key.startswith(f"optimizer.state.{name}.") for key in stored)
        ]
        for name in untouched:
            for key in [key for key in tensors if key.startswith(f"optimizer.state.{name}.")]:
                del tensors[key]
        with _single_process():
            state_dict_loader.load(tensors, storage_reader=HuggingFaceStorageReader(str(checkpoint)), no_dist=True)
    except (OSError, ValueError, RuntimeError, SafetensorError, CheckpointException) as error:
        raise _unreadable(checkpoint, f"its weights are damaged ({_reason(error)})") from error
    # The loaded tensors go back into the nested form; what is not a tensor keeps its current value.
    weights, moments = _state(model, optimizer)
    for name, value in tensors.items():
        kind, _, name = name.partition(".")
        (weights if kind == "model" else moments)[name] = value
    set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=moments, options=FLAT)
    parameters = dict(model.named_parameters())
    for name in untouched:
        optimizer.state.pop(parameters[name], None)


def _stored(checkpoint: Path) -> list[str]:
    """Return the names of all tensors in a checkpoint."""
    names: list[str] = []
    for path in checkpoint.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            names.extend(file.keys())
    return names


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


def _checkpoints(folder: Path) -> list[Path]:
    """Return the complete checkpoints in `folder`, oldest first."""
    return sorted(folder.glob("step-*"))  # the step has leading zeros, so names sort by step


def _unreadable(checkpoint: Path, reason: str) -> CheckpointError:
    """Return the error of a damaged checkpoint, with the one to go back to."""
    others = [path for path in _checkpoints(checkpoint.parent) if path != checkpoint]
    way_out = (
        f"Delete this folder to resume from {others[-1]}." if others else "There is no other one. Start a new run."
    )
    return CheckpointError(f"Could not read checkpoint {checkpoint}: {reason}. {way_out}")


def _reason(error: BaseException) -> str:
    """Return the message of the operating system, which PyTorch wraps in its own errors."""
    if isinstance(error, CheckpointException):
        error = next(iter(error.failures.values()))[0]  # one failure per rank, and there is one rank
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, OSError):
        cause = cause.__cause__ or cause.__context__
    if isinstance(cause, OSError) and cause.strerror:
        return cause.strerror
    return (str(error) or type(error).__name__).splitlines()[0].removesuffix(".")
