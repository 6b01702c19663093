"""Ranks train like one process, with DDP and FSDP. Any number of ranks can resume their checkpoints."""

import collections
import dataclasses
import itertools
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from ijepa_enhanced.data.catalog import open_catalog
from ijepa_enhanced.data.plan import Cursor, Plan
from ijepa_enhanced.data.sources.open import open_source
from ijepa_enhanced.encoder import Encoder
from ijepa_enhanced.train.config import TrainConfig
from ijepa_enhanced.train.logging import read_log
from ijepa_enhanced.train.loop import train


def in_ranks(task: str, folder: Path, *arguments: object) -> str:
    """Run a task of `ranks.py`, and return its stderr."""
    command = (sys.executable, str(Path(__file__).with_name("ranks.py")), task, str(folder), *map(str, arguments))
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return done.stderr


def assert_equal_to_one_process(folder: Path, world: int, local_world_size: int, *cases: str) -> None:
    in_ranks("compared", folder, world, local_world_size, *cases)
    differences = json.loads((folder / "differences.json").read_text())
    assert len(differences) == 2 * len(cases)
    # Float32 rounds a gradient by some 1e-7 of its size. At a learning rate of 1e-3, and with an epsilon of 1e-4 in the
    # denominator, five steps of AdamW make at most some 1e-6 of it (1.2e-6 was measured).
    assert max(differences.values()) < 5e-6, differences


def test_two_ranks_train_as_one_process_does(tmp_path: Path) -> None:
    assert_equal_to_one_process(tmp_path, 2, 2, "all", "frozen")


@pytest.mark.slow
def test_two_ranks_without_prediction_do_too(tmp_path: Path) -> None:
    assert_equal_to_one_process(tmp_path, 2, 2, "no prediction")


@pytest.mark.slow
@pytest.mark.parametrize("local_world_size", [4, 2], ids=["one machine", "two machines"])
def test_four_ranks_do_too(local_world_size: int, tmp_path: Path) -> None:
    assert_equal_to_one_process(tmp_path, 4, local_world_size, "all", "frozen")


@pytest.mark.slow
def test_four_ranks_continue_as_one_two_or_three(tiny: TrainConfig, tmp_path: Path) -> None:
    data = dataclasses.replace(tiny.data, tokens_per_pack=64, packs_per_step=12)
    monitor, optim = dataclasses.replace(tiny.monitor, every=0), dataclasses.replace(tiny.optim, final_ema=0.996)
    config = dataclasses.replace(tiny, data=data, monitor=monitor, optim=optim, precision="fp32", steps=2)
    write_config(dataclasses.replace(config, checkpoint_every=1), tmp_path)
    in_ranks("continued", tmp_path, "fsdp")
    source = open_source(data.source)
    plan = Plan(open_catalog(source), data, config.encoder.patch_size, config.seed)
    packs = list(itertools.islice(plan.packs(Cursor(0, 0)), 24))
    first, second = (
        collections.Counter(
            (pack.cursor.epoch, int(plan.catalog.rows[image])) for pack in step for image in pack.images
        )
        for step in (packs[:12], packs[12:])
    )
    assert {count for key, count in (first + second).items() if key[0] == 0} == {1}

    def seen(world: int) -> collections.Counter[tuple[int, int]]:
        lines = [line for path in tmp_path.glob(f"seen-{world}.*") for line in path.read_text().splitlines()]
        return collections.Counter((epoch, image) for epoch, image in map(json.loads, lines))

    assert seen(4) == first + second
    last, log = Encoder.from_pretrained(tmp_path / "four").state_dict(), read_log(tmp_path / "four")
    for world in (1, 2, 3):
        assert seen(world) == second
        run = tmp_path / f"continued-{world}"
        assert [line["loss"] for line in read_log(run)] == pytest.approx([line["loss"] for line in log], rel=1e-5)
        for name, value in Encoder.from_pretrained(run).state_dict().items():
            # AdamW divides each gradient by its magnitude, which amplifies rounding errors of small ones.
            torch.testing.assert_close(value, last[name], rtol=1e-4, atol=1e-5)


def write_config(config: TrainConfig, folder: Path) -> None:
    (folder / "run.yaml").write_text(yaml.safe_dump(dataclasses.asdict(config), sort_keys=False))


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 2])
def test_a_rank_that_hangs_is_named_with_the_step(tiny: TrainConfig, rank: int, tmp_path: Path) -> None:
    data = dataclasses.replace(tiny.data, packs_per_step=3)
    write_config(dataclasses.replace(tiny, data=data, monitor=dataclasses.replace(tiny.monitor, every=0)), tmp_path)
    said = in_ranks("hung", tmp_path, rank)
    for other in {0, 1, 2} - {rank}:
        assert f"RankError: Rank {other}, step 4: No answer from rank {rank}. " in said


@pytest.mark.slow
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_torchrun_restarts_from_the_last_checkpoint_after_a_rank_was_killed(
    tiny: TrainConfig, parallel: Any, tmp_path: Path
) -> None:
    monitor = dataclasses.replace(tiny.monitor, every=0)
    config = dataclasses.replace(tiny, monitor=monitor, precision="fp32", steps=60, parallel=parallel)
    write_config(config, tmp_path)
    run, options = tmp_path / "run", ("--standalone", "--nproc-per-node", "2", "--max-restarts", "1", "-m", "--")
    launcher = (sys.executable, "-m", "torch.distributed.run", *options)
    process = subprocess.Popen(
        (*launcher, "ijepa_enhanced", "train", "--config", str(tmp_path / "run.yaml"), "--run", str(run)),
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stderr=subprocess.PIPE,
        text=True,
    )
    log = run / "log.jsonl"
    while process.poll() is None and not (log.exists() and log.read_bytes().count(b"\n") >= 4):
        time.sleep(0.01)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    workers = [int(pid) for pid in children if b"ijepa_enhanced" in Path(f"/proc/{pid}/cmdline").read_bytes()]
    os.kill(workers[-1], signal.SIGKILL)
    _, stderr = process.communicate(timeout=300)
    assert process.returncode == 0, stderr
    assert "resuming after step" in stderr
    train(config, tmp_path / "one")
    lines, expected = read_log(run), read_log(tmp_path / "one")
    assert [line["step"] for line in lines] == list(range(2, 61, 2))
    assert [line["loss"] for line in lines] == pytest.approx([line["loss"] for line in expected], rel=1e-3)


def test_one_process_has_nothing_to_shard(tiny: TrainConfig, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    config = dataclasses.replace(tiny, steps=1, monitor=dataclasses.replace(tiny.monitor, every=0), parallel="fsdp")
    assert train(config, tmp_path / "run").finished
    assert "parallel = fsdp shards nothing, because this run has one process." in caplog.messages
