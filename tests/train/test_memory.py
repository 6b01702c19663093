"""What a machine is too small or too old for is said before it fails, or in words that say what to set."""

import dataclasses
from contextlib import nullcontext
from pathlib import Path
from typing import Never

import pytest
import torch

from ijepa_enhanced.data.loader import check_shared_memory
from ijepa_enhanced.devices import autocast_dtype, say_too_old
from ijepa_enhanced.errors import RunError, SourceError
from ijepa_enhanced.jepa import JEPA
from ijepa_enhanced.train import images
from ijepa_enhanced.train.config import TrainConfig
from ijepa_enhanced.train.loop import train

CUDA = torch.device("cuda")


def with_data(config: TrainConfig, **changes: int) -> TrainConfig:
    return dataclasses.replace(config, data=dataclasses.replace(config.data, **changes))


def test_a_gpu_that_is_too_small_says_which_settings_fit(
    tiny: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def exhausted(*_: object) -> Never:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setattr(JEPA, "features", exhausted)
    config = with_data(tiny, tokens_per_pack=600, packs_per_step=2)
    with pytest.raises(RunError) as raised:
        train(config, tmp_path / "run")
    assert str(raised.value) == (
        "Packs of 600 tokens do not fit in GPU memory. Start a new run with --data.tokens_per_pack 300 "
        "--data.packs_per_step 4 --data.max_view_tokens 75: packs of half the size, with the same number of tokens per "
        "step."
    )
    with pytest.raises(RunError, match=r"Start a new run with a smaller encoder, or with smaller or fewer views\.$"):
        train(with_data(config, masked_views=2, max_view_tokens=200), tmp_path / "other")


def test_networks_that_a_gpu_cannot_hold(tiny: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def exhausted(*_: object) -> Never:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setattr(JEPA, "to", exhausted)
    with pytest.raises(RunError, match=r"^Student, teacher and predictor do not fit in GPU memory"):
        train(tiny, tmp_path / "run")


def test_workers_are_refused_what_shared_memory_cannot_hold(
    tiny: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A pack of 65,536 tokens x (8 x 8 x 3 + 32) bytes is 14.7 MB. 3 workers have 2 each, and the trainer, with 2 packs
    # a step, has 4. 96 MiB are free, which is enough for 6 packs, so for one worker.
    monkeypatch.setattr(images, "free_memory", lambda: {"memory": 10**12, "/dev/shm": 96 * 2**20})
    config = with_data(tiny, tokens_per_pack=65536, workers=3)
    assert (config.encoder.patch_size, config.data.packs_per_step) == (8, 2)
    with pytest.raises(SourceError) as raised:
        train(config, tmp_path / "run")
    assert str(raised.value) == (
        "With 3 workers, packs need up to 147 MB in /dev/shm, but only 101 MB are free. Set data.workers to 1, or "
        "make /dev/shm larger (for a container, with --shm-size=147m)."
    )
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("workers", "held", "ranks", "free", "fits"),
    [
        (3, 4, 1, 10 * 14680064, True),
        (3, 4, 1, 10 * 14680064 - 1, False),
        (3, 0, 1, 6 * 14680064, True),
        (1, 0, 4, 8 * 14680064, True),
        (1, 0, 4, 8 * 14680064 - 1, False),
        (0, 4, 1, 0, True),
        (3, 4, 1, None, True),
    ],
)
def test_shared_memory_is_enough_or_not(workers: int, held: int, ranks: int, free: int | None, fits: bool) -> None:
    with nullcontext() if fits else pytest.raises(SourceError):
        check_shared_memory(workers, 65536, 8, held, free, ranks)


def test_an_old_gpu_computes_in_float32_and_says_so_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    asked = []
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: asked.append(including_emulation))
    say_too_old.cache_clear()
    assert autocast_dtype("auto", CUDA) == torch.float32
    assert autocast_dtype("bf16", CUDA) == torch.float32
    told = (
        "This GPU does not support bfloat16 and FlashAttention. Using float32 and attention on padded batches instead, "
        "which is slower and needs more memory."
    )
    assert caplog.messages == [told]
    caplog.clear()
    assert autocast_dtype("fp32", CUDA) == torch.float32
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: True)
    assert autocast_dtype("auto", CUDA) == autocast_dtype("bf16", CUDA) == torch.bfloat16
    assert not caplog.messages
    assert not any(asked), "an emulation is no support"
