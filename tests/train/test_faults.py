"""A fault in a run of two ranks, at any moment, loses only the steps since the last checkpoint."""

import collections
import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, Literal

import pytest
import yaml

from ijepa_enhanced.config import build
from ijepa_enhanced.encoder import Encoder
from ijepa_enhanced.train.config import TrainConfig
from ijepa_enhanced.train.logging import read_log
from ijepa_enhanced.train.saved import read_train_config

MOMENTS = 10
RATES = ("views_per_second", "tokens_per_second", "data_wait", "monitor_seconds", "monitor_share")
"""Values of the log that depend on the machine, not on the run."""


def lost_steps(run: Path) -> int:
    """Check that the run is complete, and return how many steps were made twice."""
    config = build(TrainConfig, read_train_config(run.parent / "run.yaml"))
    assert config.steps is not None
    assert [line["step"] for line in read_log(run)] == list(range(1, config.steps + 1))
    assert not [path for path in run.rglob(".*") if path.is_file() or path.suffix == ".partial"]
    # The newest two. A kill between the last save and the deletion of the oldest one leaves that one too.
    names = sorted(path.name for path in (run / "checkpoints").iterdir())
    assert names[-2:] == ["step-00000006", "step-00000009"]
    assert names[:-2] in ([], ["step-00000003"])
    made = collections.Counter(run.with_suffix(".steps").read_text().split())
    return sum(made.values()) - config.steps


def assert_equal(run: Path, whole: Path) -> None:
    """Bit for bit: the encoders, and what the logs say about training."""
    for name in ("encoder", "best"):
        weights, expected = (Encoder.from_pretrained(folder / name).state_dict() for folder in (run, whole))
        assert all(bool((weights[key] == expected[key]).all()) for key in expected)
    logs = ([{k: v for k, v in line.items() if k not in RATES} for line in read_log(each)] for each in (run, whole))
    assert next(logs) == next(logs)


def check(folder: Path, fault: str, found: dict[str, Any]) -> dict[str, Any]:
    """Check a run that was struck, and return what was lost."""
    run = folder / found["run"]
    lost = lost_steps(run)
    # Those since the last checkpoint, which is made every 3 steps, and the one that was struck before it was logged.
    assert lost <= 3
    # The agent that starts ranks again is gone when all are killed; it goes on by itself after all other faults.
    assert found["codes"] == ([-9, 0] if fault == "all ranks" else [0])
    if fault == "file":
        assert lost == 0
        # None if it vanishes before the scan, or after the run has read it for the last time.
        assert read_log(run)[-1]["unreadable"] in (0, 1)
    else:
        assert_equal(run, folder / "whole")
    return found | {"lost": lost}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fault", "parallel"),
    [(fault, "ddp") for fault in ("one rank", "all ranks", "worker", "save", "disk", "hang", "file")]
    # What FSDP2 does differently is how a checkpoint is saved and loaded.
    + [(fault, "fsdp") for fault in ("one rank", "save")],
)
def test_only_steps_since_the_last_checkpoint_are_lost(
    fault: str, parallel: Literal["ddp", "fsdp"], tiny: TrainConfig, tmp_path: Path
) -> None:
    data = dataclasses.replace(tiny.data, workers=1, max_unreadable=1.0)
    monitor = dataclasses.replace(tiny.monitor, every=6)
    config = dataclasses.replace(tiny, data=data, monitor=monitor, steps=9, log_every=1, precision="fp32")
    config = dataclasses.replace(config, parallel=parallel)
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(dataclasses.asdict(config), sort_keys=False))
    command = (sys.executable, str(Path(__file__).with_name("strikes.py")), fault, str(MOMENTS), "0", str(tmp_path))
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=3600)
    assert done.returncode == 0, done.stderr
    lines = (tmp_path / f"{fault}.jsonl").read_text().splitlines()
    assert len(lines) == MOMENTS
    for line in lines:
        check(tmp_path, fault, json.loads(line))
