import json
import os
import pickle
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import pytest
import torch

from ijepa_enhanced.errors import CheckpointError
from ijepa_enhanced.jepa import JEPA
from ijepa_enhanced.models.config import EncoderConfig, PredictorConfig
from ijepa_enhanced.objective import ObjectiveConfig
from ijepa_enhanced.train.checkpoint import latest_checkpoint, load_checkpoint, read_progress, save_checkpoint
from ijepa_enhanced.train.config import OptimConfig
from ijepa_enhanced.train.optimizer import make_optimizer, set_step, step_settings


def trained(seed: int) -> tuple[JEPA, torch.optim.Optimizer]:
    """A model with one optimizer step behind it, so that there are moments to save."""
    torch.manual_seed(seed)
    model = JEPA(EncoderConfig("Ti", 8, depth=1).architecture, PredictorConfig(32, 1, 2), ObjectiveConfig())
    optimizer = make_optimizer(model)
    set_step(optimizer, step_settings(OptimConfig(), 5, 10))
    for value in model.parameters():
        if value.requires_grad:
            value.grad = torch.randn_like(value)
    optimizer.step()
    return model, optimizer


def test_everything_comes_back_bit_for_bit(tmp_path: Path) -> None:
    model, optimizer = trained(seed=1)
    checkpoint = save_checkpoint(tmp_path, 7, model, optimizer, {"step": 7, "cursor": [1, 2]})
    other, other_optimizer = trained(seed=2)
    load_checkpoint(checkpoint, other, other_optimizer)
    for (name, saved), (_, loaded) in zip(model.state_dict().items(), other.state_dict().items(), strict=True):
        assert torch.equal(saved, loaded), name
    for group, other_group in zip(optimizer.param_groups, other_optimizer.param_groups, strict=True):
        assert group["weight_decay"] == other_group["weight_decay"]
        for value, other_value in zip(group["params"], other_group["params"], strict=True):
            for key, moment in optimizer.state[value].items():
                assert torch.equal(moment, other_optimizer.state[other_value][key]), key
    assert read_progress(checkpoint) == {"step": 7, "cursor": [1, 2]}


def test_the_newest_two_are_kept(tmp_path: Path) -> None:
    model, optimizer = trained(seed=1)
    for step in (9, 10, 100):
        save_checkpoint(tmp_path, step, model, optimizer, {})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000010", "step-00000100"]
    assert latest_checkpoint(tmp_path) == tmp_path / "step-00000100"


def test_what_a_killed_run_left_half_written_is_no_checkpoint(tmp_path: Path) -> None:
    model, optimizer = trained(seed=1)
    partial = tmp_path / ".step-00000004.partial"
    partial.mkdir()
    (partial / "progress.json").write_text(json.dumps({"step": 4}))
    other = tmp_path / ".step-00000003.partial"
    other.mkdir()
    assert latest_checkpoint(tmp_path) is None
    checkpoint = save_checkpoint(tmp_path, 4, model, optimizer, {"step": 4})
    assert latest_checkpoint(tmp_path) == checkpoint
    assert not partial.exists()
    assert not other.exists()


def test_a_full_disk_leaves_the_previous_checkpoint(
    disk_of: Callable[[int], AbstractContextManager[None]], tmp_path: Path
) -> None:
    model, optimizer = trained(seed=1)
    previous = save_checkpoint(tmp_path, 3, model, optimizer, {"step": 3})
    with disk_of(100_000), pytest.raises(CheckpointError) as error:
        save_checkpoint(tmp_path, 6, model, optimizer, {"step": 6})
    assert str(error.value) == (
        f"Could not save checkpoint {tmp_path / 'step-00000006'}: File too large. "
        f"The previous one, {previous}, is intact."
    )
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000003"]
    load_checkpoint(previous, *trained(seed=2))


def test_a_checkpoint_that_lost_bytes_or_a_file_is_found_out(tmp_path: Path) -> None:
    checkpoint = save_checkpoint(tmp_path, 3, *trained(seed=1), {"step": 3})
    (file,) = checkpoint.glob("*.safetensors")
    size = file.stat().st_size
    os.truncate(file, size - 1)
    with pytest.raises(CheckpointError) as error:
        read_progress(checkpoint)
    assert str(error.value) == (
        f"Could not read checkpoint {checkpoint}: {file.name} has {size - 1} bytes instead of {size}."
    )
    file.unlink()
    with pytest.raises(CheckpointError, match=rf"{file.name} is missing"):
        read_progress(checkpoint)


class Bomb:
    """Unpickling it writes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return Path.write_text, (self.path, "executed")


def test_a_foreign_checkpoint_executes_nothing(tmp_path: Path) -> None:
    """In each file that a checkpoint has, or had in PyTorch's own format."""
    model, optimizer = trained(seed=1)
    checkpoint = save_checkpoint(tmp_path, 3, model, optimizer, {"step": 3})
    names = [path.name for path in checkpoint.iterdir() if path.name != "progress.json"]
    bomb = pickle.dumps(Bomb(tmp_path / "executed"))
    pickle.loads(bomb)
    assert (tmp_path / "executed").exists()  # the trap works
    (tmp_path / "executed").unlink()
    for foreign in (names, [".metadata", "__0_0.distcp"]):
        for path in checkpoint.iterdir():
            path.unlink()
        (checkpoint / "progress.json").write_text("{}")
        for name in foreign:
            (checkpoint / name).write_bytes(bomb)
        with pytest.raises(CheckpointError):
            load_checkpoint(checkpoint, model, optimizer)
        assert not (tmp_path / "executed").exists()


def test_a_checkpoint_of_another_architecture_is_refused(tmp_path: Path) -> None:
    checkpoint = save_checkpoint(tmp_path, 3, *trained(seed=1), {})
    model = JEPA(EncoderConfig("Ti", 8, depth=2).architecture, PredictorConfig(32, 1, 2), ObjectiveConfig())
    with pytest.raises(CheckpointError, match=r"^Could not read checkpoint "):
        load_checkpoint(checkpoint, model, make_optimizer(model))
