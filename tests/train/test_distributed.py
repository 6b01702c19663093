"""Two processes that torchrun starts do what one does, and what they leave goes on in one."""

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from ijepa_enhanced.models.encoder import Encoder
from ijepa_enhanced.train.distributed import Ranks, is_main
from ijepa_enhanced.train.logging import read_log
from ijepa_enhanced.train.loop import Meter, TrainConfig, train

SAME = ("loss", "prediction", "stabilizer", "invariance", "fill", "grad_norm", "rankme", "knn", "best", "epoch")
"""What a log holds about the run, not about the machine."""


@pytest.fixture
def whole(tiny: TrainConfig) -> TrainConfig:
    """Two packs a step, in float32, two views of each image that are to agree."""
    return dataclasses.replace(
        tiny,
        data=dataclasses.replace(tiny.data, views=2),
        objective=dataclasses.replace(tiny.objective, invariance=1.0),
        precision="fp32",
        steps=6,
        checkpoint_every=3,
    )


def torchrun(config: TrainConfig, folder: Path, *flags: str) -> subprocess.CompletedProcess[str]:
    """`ijepa train` on two ranks."""
    file = folder.with_suffix(".yaml")
    file.write_text(yaml.safe_dump(dataclasses.asdict(config), sort_keys=False))
    launcher = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "--")
    command = (*launcher, "ijepa_enhanced", "train", "--config", str(file), *(flags or ("--run", str(folder))))
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)


def assert_same_run(run: Path, other: Path) -> None:
    """Up to the order in which float32 gradients and losses are summed."""
    for line, expected in zip(read_log(run), read_log(other), strict=True):
        assert {name: line[name] for name in SAME if name in line} == pytest.approx(
            {name: expected[name] for name in SAME if name in expected}, rel=1e-4
        )
    weights, expected_weights = (Encoder.from_pretrained(folder).state_dict() for folder in (run, other))
    for name, value in expected_weights.items():
        torch.testing.assert_close(weights[name], value, rtol=1e-4, atol=1e-6)


def test_two_ranks_are_as_one(whole: TrainConfig, tmp_path: Path) -> None:
    done = torchrun(whole, tmp_path / "two")
    assert done.returncode == 0, done.stderr
    train(whole, tmp_path / "one")
    assert len(read_log(tmp_path / "one")) == 3
    assert_same_run(tmp_path / "two", tmp_path / "one")
    assert done.stdout.splitlines().count(str(tmp_path / "two")) == 1, "one of them speaks"
    assert done.stderr.count("Collapse watch: every") == 1
    assert (tmp_path / "two" / "report.html").is_file()


def test_a_run_goes_on_with_another_number_of_ranks(whole: TrainConfig, tmp_path: Path) -> None:
    # The checkpoint of step 5 lies in the middle of a reading of the log.
    config = dataclasses.replace(whole, checkpoint_every=1)
    train(config, tmp_path / "one")
    assert torchrun(config, tmp_path / "two").returncode == 0
    (tmp_path / "two" / "checkpoints" / "step-00000006").rename(tmp_path / "gone")
    assert [path.name for path in (tmp_path / "two" / "checkpoints").iterdir()] == ["step-00000005"]
    train(config, tmp_path / "two", resume=True)
    assert_same_run(tmp_path / "two", tmp_path / "one")


def test_packs_that_ranks_cannot_share_evenly_are_refused(whole: TrainConfig, tmp_path: Path) -> None:
    odd = dataclasses.replace(whole, data=dataclasses.replace(whole.data, packs_per_step=3))
    done = torchrun(odd, tmp_path / "odd")
    assert done.returncode != 0
    assert "ijepa: data.packs_per_step (3) must be a multiple of the 2 ranks." in done.stderr.splitlines()
    assert not (tmp_path / "odd").exists()


def test_states_of_meters_are_one_reading() -> None:
    states = [{"steps": 2, "losses": [[1.0], [2.0]], "tokens": [8, 9]}, {"steps": 2, "losses": [[3.0]], "tokens": [7]}]
    assert Meter.merged(states) == {"steps": 2, "losses": [[1.0], [2.0], [3.0]], "tokens": [8, 9, 7]}


def test_alone_nothing_is_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    alone = Ranks(torch.device("cpu"))
    parameter = torch.nn.Parameter(torch.zeros(2))
    alone.sum_gradients([parameter])
    assert parameter.grad is None
    assert alone.sums([1, 2.5]) == [1, 2.5]
    assert alone.gather("mine") == ["mine"]
    assert alone.any(True)
    assert not alone.any(False)
    assert is_main()
    monkeypatch.setenv("RANK", "1")
    assert not is_main()
