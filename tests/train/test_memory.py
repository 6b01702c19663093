"""What a machine is too small or too old for is said before it fails, or in words that say what to set."""

import dataclasses
from pathlib import Path
from typing import Never

import pytest
import torch

from ijepa_enhanced.data import loader
from ijepa_enhanced.data.source import SourceError
from ijepa_enhanced.jepa import JEPA
from ijepa_enhanced.train.loop import RunError, TrainConfig, autocast_dtype, train

CUDA = torch.device("cuda")


def with_data(config: TrainConfig, **changes: int) -> TrainConfig:
    return dataclasses.replace(config, data=dataclasses.replace(config.data, **changes))


def test_a_gpu_that_is_too_small_says_which_settings_fit(
    tiny: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def exhausted(*_: object) -> Never:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setattr(JEPA, "forward", exhausted)
    config = with_data(tiny, tokens_per_pack=600, packs_per_step=2)
    with pytest.raises(RunError) as raised:
        train(config, tmp_path / "run")
    assert str(raised.value) == (
        "The GPU's memory does not hold what a pack of 600 tokens needs. In a new run, set data.tokens_per_pack to 300 "
        "and data.packs_per_step to 4: half as much at once, and as much in a step."
    )


def test_workers_are_refused_what_shared_memory_cannot_hold(
    tiny: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # 2 packs ahead x 65,536 tokens x (8 x 8 x 3 + 32) bytes are 29.4 MB a worker; 64 MiB is what Docker gives.
    monkeypatch.setattr(loader, "free_memory", lambda: {"memory": 10**12, "/dev/shm": 64 * 2**20})
    config = with_data(tiny, tokens_per_pack=65536, workers=3)
    assert config.encoder.patch_size == 8
    with pytest.raises(SourceError) as raised:
        train(config, tmp_path / "run")
    assert str(raised.value) == (
        "3 workers keep up to 88 MB of packs in /dev/shm, and 67 MB are free there: set data.workers to 2, or give it "
        "more (to a container with --shm-size=89m)."
    )
    assert not (tmp_path / "run").exists()
    loader.check_shared_memory(2, 65536, 8)
    monkeypatch.setattr(loader, "free_memory", lambda: {"memory": 10**12})
    loader.check_shared_memory(3, 65536, 8)  # no such limit is known here


def test_an_old_gpu_computes_in_float32_and_is_told_so(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    asked = []
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: asked.append(including_emulation))
    assert autocast_dtype("auto", CUDA) == torch.float32
    assert autocast_dtype("bf16", CUDA) == torch.float32
    told = "This GPU is too old for bfloat16 and flash attention: float32 and dense attention instead."
    assert caplog.messages == [told, told]
    caplog.clear()
    assert autocast_dtype("fp32", CUDA) == torch.float32
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: True)
    assert autocast_dtype("auto", CUDA) == autocast_dtype("bf16", CUDA) == torch.bfloat16
    assert not caplog.messages
    assert not any(asked), "an emulation is no support"
