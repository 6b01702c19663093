"""`benchmarks/gpu.sh` runs every part whatever fails, within its time, and says how it went."""

import os
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "gpu.sh"


@pytest.fixture
def python(tmp_path: Path) -> Path:
    """In place of the interpreter: it says how it was called, and fails on embedding."""
    path = tmp_path / "python"
    path.write_text('#!/bin/sh\necho "called $*"\ncase "$*" in *embed*) exit 3;; esac\n')
    path.chmod(0o755)
    return path


def run(python: Path, *arguments: str, **settings: str) -> tuple[int, list[str]]:
    environment = {name: value for name, value in os.environ.items() if name not in ("SMALL", "LIMIT")}
    done = subprocess.run(
        ["bash", str(SCRIPT), *arguments],
        env=environment | {"PYTHON": str(python)} | settings,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stderr == ""
    return done.returncode, done.stdout.splitlines()


def test_it_runs_every_part_and_reports_failures(python: Path) -> None:
    code, lines = run(python, "IMAGES")
    calls = [line.removeprefix("called ") for line in lines if line.startswith("called ")]
    assert calls == [
        "-m pytest -q -m gpu tests/evaluate/test_cost.py tests/ops/test_attention.py "
        "tests/ops/test_merging.py tests/test_gpu.py",
        "-m ijepa_enhanced.benchmarks.attention --csv",
        "-m ijepa_enhanced.benchmarks.step --csv --source IMAGES",
        "-m ijepa_enhanced.benchmarks.embed --csv --source IMAGES",
        "-m ijepa_enhanced.benchmarks.embed --csv --source IMAGES --variant H --patch 14 --images 64",
        "-m ijepa_enhanced.benchmarks.merging --csv --source IMAGES",
        "-m ijepa_enhanced.benchmarks.packing --csv --source IMAGES",
        "-m ijepa_enhanced.benchmarks.step --csv --source IMAGES --variant L --compile",
    ]
    assert code == 1
    assert lines[-5].startswith("embed --source IMAGES: failed, code 3, ")
    assert sum(": done, " in line for line in lines[-8:]) == 6


def test_small_needs_no_gpu(python: Path) -> None:
    python.write_text('#!/bin/sh\necho "called $*"\n')
    code, lines = run(python, SMALL="1")
    assert code == 0
    assert [line.split()[2].rpartition(".")[2] for line in lines if line.startswith("called ")] == [
        *("pytest", "attention", "step", "embed", "packing")
    ]


def test_what_is_out_of_time_is_left_out(python: Path) -> None:
    code, lines = run(python, LIMIT="0")
    assert code == 1
    assert not [line for line in lines if line.startswith("called ")]
    assert sum("left out, no time" in line for line in lines) == 8
    python.write_text("#!/bin/sh\nsleep 60\n")
    code, lines = run(python, LIMIT="3")  # the shell counts whole seconds, and the first of them may be nearly over
    assert code == 1
    assert "stopped, no time" in lines[-8]
