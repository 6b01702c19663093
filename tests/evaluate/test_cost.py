"""Peak memory is that of tensors which are alive together; time is a median of turns."""

import subprocess
import sys

import pytest
import torch
from torch import Tensor

from ijepa_enhanced.evaluate.cost import interleaved_seconds, peak_bytes

DEVICES = [
    "cpu",
    pytest.param("cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")]),
]
MEGABYTE = 2**20


def block(megabytes: int, device: str) -> Tensor:
    return torch.zeros(megabytes * MEGABYTE, dtype=torch.uint8, device=device)


@pytest.mark.parametrize("device", DEVICES)
def test_what_is_freed_before_does_not_add(device: str) -> None:
    kept = block(50, device)

    def run() -> Tensor:
        block(30, device)  # freed at once
        held = [block(10, device), block(8, device)]
        del held[0]
        last = block(5, device)
        return last + held[0][: len(last)]

    assert peak_bytes(run, torch.device(device)) == pytest.approx(30 * MEGABYTE, rel=0.001)
    assert peak_bytes(lambda: [run(), block(40, device)], torch.device(device)) == pytest.approx(
        45 * MEGABYTE, rel=0.001
    )
    del kept


@pytest.mark.parametrize("device", DEVICES)
def test_what_allocates_nothing_has_no_peak(device: str) -> None:
    kept = block(5, device)
    assert peak_bytes(lambda: kept.add_(1), torch.device(device)) < 100
    # What was there before is no part of it, though it goes.
    assert peak_bytes(lambda: None, torch.device(device)) == 0


def test_it_says_nothing() -> None:
    """The profiler writes to the process's own stderr, which is the user's."""
    program = (
        "import torch; from ijepa_enhanced.evaluate.cost import peak_bytes\n"
        "peak_bytes(lambda: torch.zeros(3), torch.device('cpu'))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("", "")


def test_all_run_by_turns_and_a_slow_turn_is_outvoted(monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock that stands still but where a run moves it."""
    now, calls = 0.0, []
    monkeypatch.setattr("time.perf_counter", lambda: now)
    # The first is to warm up.
    waits = {"a": iter([9.0, 1.0, 7.0, 2.0]), "b": iter([9.0, 4.0, 3.0, 5.0])}

    def run(name: str) -> None:
        nonlocal now
        calls.append(name)
        now += next(waits[name])

    assert interleaved_seconds([lambda: run("a"), lambda: run("b")], torch.device("cpu"), turns=3) == [2.0, 4.0]
    assert calls == ["a", "b"] * 4
