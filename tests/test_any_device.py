"""Devices other than CPU and CUDA, such as MPS and XPU, run the same code; devices.py says what they can."""

import json
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from ijepa_enhanced.batch import MaskedBatch
from ijepa_enhanced.devices import autocast_dtype, has_varlen_attention, kind_of, pins_memory

FAKE = Path(__file__).with_name("fake_device.py")


def test_a_device_that_nobody_named_computes_as_the_cpu(make_batch: Callable[..., MaskedBatch], tmp_path: Path) -> None:
    packs = [make_batch([(3, 3), (9, 9), (2, 7), (7, 5)])]
    path = tmp_path / "packs"
    path.write_bytes(pickle.dumps(packs))
    command = [sys.executable, FAKE, path]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert (found["device"], found["name"]) == ("fake", "fake")
    # Attention is another kernel, and float32 rounds at 6e-8, some ten layers and two steps one after another.
    assert max(found["apart"]) < 1e-5


@pytest.mark.parametrize(("kind", "pinned", "bf16"), [("mps", False, False), ("xpu", True, True), ("cpu", False, None)])
def test_what_a_device_can(kind: str, pinned: bool, bf16: bool | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.xpu, "is_bf16_supported", lambda including_emulation: not including_emulation)
    device = torch.device(kind)
    assert not has_varlen_attention(device)
    assert pins_memory(device) == pinned
    assert kind_of(device) == ("cpu" if kind == "cpu" else "gpu")
    if bf16 is not None:
        assert (autocast_dtype("auto", device) == torch.bfloat16) == bf16
    assert autocast_dtype("bf16", device) == torch.bfloat16, "if asked for"
