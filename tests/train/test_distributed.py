"""Two processes that torchrun starts do what one does, and what they leave goes on in one."""

import dataclasses
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from ijepa_enhanced.cli import main
from ijepa_enhanced.data.in_memory import InMemory
from ijepa_enhanced.data.sources.folder import FolderSource
from ijepa_enhanced.distributed import (
    START_TIMEOUT,
    STEP_TIMEOUT,
    WORK_TIMEOUT,
    Ranks,
    is_main,
    ranks_of_run,
)
from ijepa_enhanced.encoder import Encoder
from ijepa_enhanced.errors import RankError, SourceError
from ijepa_enhanced.train import agreement
from ijepa_enhanced.train.agreement import check_shared
from ijepa_enhanced.train.config import TrainConfig
from ijepa_enhanced.train.logging import read_log
from ijepa_enhanced.train.loop import Outcome, train
from ijepa_enhanced.train.meter import Meter
from ijepa_enhanced.train.saved import LAUNCH, launched_here

SAME = ("loss", "prediction", "vicreg", "contrastive", "fill", "grad_norm", "rankme", "knn", "best", "epoch")
"""What a log holds about the run, not about the machine."""


@pytest.fixture
def whole(tiny: TrainConfig) -> TrainConfig:
    """Two packs a step, in float32, two views of each image that are to agree."""
    return dataclasses.replace(
        tiny,
        data=dataclasses.replace(tiny.data, masked_views=2),
        objective=dataclasses.replace(tiny.objective, contrastive_weight=1.0),
        precision="fp32",
        steps=6,
        checkpoint_every=3,
    )


def torchrun(config: TrainConfig, folder: Path, resume: bool = False) -> subprocess.Popen[str]:
    """`ijepa train` on two ranks."""
    file = folder.with_suffix(".yaml")
    file.write_text(yaml.safe_dump(dataclasses.asdict(config), sort_keys=False))
    launcher = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "--")
    what = ("--resume", str(folder)) if resume else ("--config", str(file), "--run", str(folder))
    return subprocess.Popen(
        (*launcher, "ijepa_enhanced", "train", *what),
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    stdout, stderr = process.communicate(timeout=300)
    return process.returncode, stdout, stderr


def assert_same_run(run: Path, other: Path) -> None:
    """Up to the order in which float32 gradients and losses are summed."""
    for line, expected in zip(read_log(run), read_log(other), strict=True):
        assert {name: line[name] for name in SAME if name in line} == pytest.approx(
            {name: expected[name] for name in SAME if name in expected}, rel=1e-4
        )
    weights, expected_weights = (Encoder.from_pretrained(folder).state_dict() for folder in (run, other))
    for name, value in expected_weights.items():
        # AdamW divides each gradient by its magnitude, which amplifies rounding errors of small ones. Measured: 4e-6.
        torch.testing.assert_close(weights[name], value, rtol=1e-4, atol=1e-5)


def without_last_checkpoint(run: Path) -> None:
    (run / "checkpoints" / "step-00000006").rename(run.with_suffix(".gone"))
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["step-00000005"]


def test_two_ranks_are_as_one_and_each_goes_on_as_the_other(whole: TrainConfig, tmp_path: Path) -> None:
    # The checkpoint of step 5 lies in the middle of a reading of the log.
    config = dataclasses.replace(whole, checkpoint_every=1)
    code, stdout, stderr = finish(torchrun(config, tmp_path / "two"))
    assert code == 0, stderr
    train(config, tmp_path / "one")
    assert len(read_log(tmp_path / "one")) == 3
    assert_same_run(tmp_path / "two", tmp_path / "one")
    assert stdout.splitlines().count(str(tmp_path / "two")) == 1, "one of them speaks"
    assert stderr.count("The monitor checks the teacher every") == 1
    assert (tmp_path / "two" / "report.html").is_file()

    (tmp_path / "one").rename(tmp_path / "first")
    train(config, tmp_path / "one")
    without_last_checkpoint(tmp_path / "two")
    without_last_checkpoint(tmp_path / "one")
    train(config, tmp_path / "two", resume=True)
    assert_same_run(tmp_path / "two", tmp_path / "first")
    code, _, stderr = finish(torchrun(config, tmp_path / "one", resume=True))
    assert code == 0, stderr
    assert_same_run(tmp_path / "one", tmp_path / "first")


def spoil(folder: Path, count: int) -> None:
    """Leave the header of the first images, and cut off their pixels."""
    for path in sorted(folder.rglob("*.png"))[:count]:
        path.write_bytes(path.read_bytes()[:500])


def test_what_cannot_be_read_is_counted_and_named_as_by_one(whole: TrainConfig, photos: Path, tmp_path: Path) -> None:
    spoil(photos, 14)
    tolerant = dataclasses.replace(whole, data=dataclasses.replace(whole.data, max_unreadable=0.9))
    code, _, stderr = finish(torchrun(tolerant, tmp_path / "two"))
    assert code == 0, stderr
    train(tolerant, tmp_path / "one")
    assert_same_run(tmp_path / "two", tmp_path / "one")
    counts = [read_log(tmp_path / run)[-1]["unreadable"] for run in ("one", "two")]
    assert counts == [14, 14]
    assert stderr.count("Skipped ") == 14
    code, _, stderr = finish(torchrun(whole, tmp_path / "strict"))
    assert code == 1
    assert "images cannot be read, but data.max_unreadable = 0.01 allows only 1%. Unreadable images:" in stderr


def test_a_signal_stops_all_ranks_after_the_same_step(whole: TrainConfig, tmp_path: Path) -> None:
    data = dataclasses.replace(whole.data, workers=1)
    long = dataclasses.replace(whole, data=data, steps=100_000, checkpoint_every=100_000, log_every=1)
    process = torchrun(long, tmp_path / "run")
    log = tmp_path / "run" / "log.jsonl"
    while process.poll() is None and not (log.exists() and log.read_bytes().count(b"\n") >= 3):
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    _, _, stderr = finish(process)
    lines = read_log(tmp_path / "run")
    (checkpoint,) = (tmp_path / "run" / "checkpoints").iterdir()
    assert checkpoint.name == f"step-{lines[-1]['step']:08d}"
    assert "DataLoader worker" not in stderr


def test_states_of_meters_are_one_reading() -> None:
    states = [{"steps": 2, "losses": [[1.0], [2.0]], "tokens": [8, 9]}, {"steps": 2, "losses": [[3.0]], "tokens": [7]}]
    assert Meter.merged(states) == {"steps": 2, "losses": [[1.0], [2.0], [3.0]], "tokens": [8, 9, 7]}


class Others(Ranks):
    """Two ranks, of which the other has what it is made with."""

    other: object = None

    def gather(self, value: object, patient: bool = False) -> list[object]:
        return [value, self.other]


def test_ranks_that_differ_are_told_in_what() -> None:
    ranks = Others(torch.device("cpu"), world=2)
    object.__setattr__(ranks, "other", {"plan": "abc", "checkpoint": 3})
    ranks.agree({"plan": "abc", "checkpoint": 3})
    with pytest.raises(
        RankError, match=r"^The processes of this run do not have the same checkpoint\. All machines need"
    ):
        ranks.agree({"plan": "abc", "checkpoint": 4})


def test_a_store_that_does_not_answer_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    """If rank 0 holds the store and its machine hangs, each call to the store blocks."""
    release = threading.Event()

    def blocked() -> None:
        release.wait()
        raise RuntimeError

    monkeypatch.setattr(agreement, "ANSWER_TIMEOUT", 0.05)
    monkeypatch.setattr(agreement, "_get_default_store", blocked)
    assert agreement.silent(Ranks(rank=1, world=2)) == " The machine of rank 0 does not answer."
    release.set()


def test_a_run_folder_that_ranks_do_not_share_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ranks = Others(torch.device("cpu"), world=2)
    object.__setattr__(ranks, "other", False)
    monkeypatch.setattr(torch.distributed, "barrier", lambda _: None)
    with pytest.raises(RankError) as error:
        check_shared(tmp_path, ranks)
    assert str(error.value) == (
        f"Process 1 cannot see the files that process 0 writes into {tmp_path}. All machines need one shared run "
        "folder: set --run to a path on shared storage."
    )
    assert not [*tmp_path.iterdir()]
    object.__setattr__(ranks, "other", True)
    check_shared(tmp_path, ranks)


def test_alone_nothing_is_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")  # as other launchers set it, which this does not follow
    assert is_main()
    with ranks_of_run() as alone:
        assert (alone.rank, alone.world, alone.main) == (0, 1, True)
    parameter = torch.nn.Parameter(torch.zeros(2))
    alone.sum_gradients([parameter])
    assert parameter.grad is None
    assert alone.gather("mine") == ["mine"]
    assert alone.sums([1, 2.5]) == [1, 2.5]


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> None:
    """As torchrun sets it, of the second of four processes."""
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")
    for name, value in {"TORCHELASTIC_RUN_ID": "run", **dict(zip(names, "1144", strict=True))}.items():
        monkeypatch.setenv(name, value)


@pytest.fixture
def single(monkeypatch: pytest.MonkeyPatch) -> None:
    """As torchrun sets it, of one process."""
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_PORT")
    values = {"TORCHELASTIC_RUN_ID": "run", "MASTER_ADDR": "localhost", **dict(zip(names, "00110", strict=True))}
    for name, value in values.items():
        monkeypatch.setenv(name, value)


@pytest.mark.usefixtures("single")
def test_ranks_are_patient_only_where_one_works_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    with ranks_of_run() as ranks:
        groups: Any = (torch.distributed.group.WORLD, ranks.patient)
        timeouts = [group._get_backend(ranks.device).options._timeout for group in groups]
        dataclasses.replace(ranks, world=2).expect_steps()
        timeouts += [group._get_backend(ranks.device).options._timeout for group in groups]
    assert timeouts == [START_TIMEOUT, WORK_TIMEOUT, STEP_TIMEOUT, START_TIMEOUT]
    waited: list[object] = []
    monkeypatch.setattr(torch.distributed, "barrier", waited.append)
    with dataclasses.replace(ranks, world=2).one_first():
        pass
    assert waited == [ranks.patient] * 2


@pytest.mark.usefixtures("single")
def test_a_new_run_that_torchrun_starts_again_resumes(
    tiny: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file, run = tmp_path / "run.yaml", tmp_path / "run"
    file.write_text(yaml.safe_dump(dataclasses.asdict(dataclasses.replace(tiny, steps=3))))
    command = ["train", "--config", str(file), "--run", str(run)]
    assert main(command) == 0
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "another job")
    for count in "01":  # a job that is started again has still not created the run
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", count)
        assert main(command) == 2
        torch.distributed.destroy_process_group()  # the end of a process does this
        assert f"ijepa: {run} already exists." in capsys.readouterr().err
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "run")
    # torchrun does not count that it starts processes again because another machine was replaced.
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "0")
    assert main([*command, "--seed", "1"]) == 2
    torch.distributed.destroy_process_group()
    assert f"ijepa: {run} was started with seed = 0 and cannot continue with 1." in capsys.readouterr().err
    assert main(command) == 0
    assert f"{run} is finished: all 3 steps are done." in capsys.readouterr().err
    (run / LAUNCH).write_text("none")  # what all jobs without --rdzv-id are called
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    assert [launched_here(run, restarted) for restarted in (False, True)] == [False, True]


@pytest.mark.usefixtures("launched")
@pytest.mark.parametrize(("finished", "code"), [(True, 0), (False, 1)])
def test_a_rank_that_was_stopped_has_not_succeeded(
    finished: bool, code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torchrun would take the work of its machine as done."""
    assert not is_main()
    monkeypatch.setattr("ijepa_enhanced.commands.train.train", lambda *rest: Outcome(3, 9, finished))
    assert main(["train", "synthetic", "--run", str(tmp_path / "run")]) == code


@pytest.mark.usefixtures("launched")
def test_more_processes_than_gpus_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not is_main()
    monkeypatch.setattr("ijepa_enhanced.distributed.best_device", lambda: torch.device("xpu"))
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 2)
    with pytest.raises(RankError) as error, ranks_of_run():
        pass
    assert str(error.value) == (
        "torchrun started 4 processes on this machine. Each needs its own GPU, but the machine has only 2. "
        "Use torchrun --nproc-per-node 2."
    )


@pytest.mark.usefixtures("launched")
def test_torchrun_is_for_training_evaluation_and_embedding_alone(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ijepa_enhanced.cli.FIRST_RANK_SECONDS", 0.0)
    assert main(["scan", "synthetic"]) == 2
    assert capsys.readouterr().err == (
        "ijepa: `ijepa scan` does not run under torchrun: only train, evaluate and embed do. Run it without torchrun.\n"
    )


def test_the_ranks_of_a_machine_keep_one_copy_in_memory(photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second machine of two, with two ranks each."""
    source = FolderSource(photos)
    total = sum(source.length(row) for row in range(len(source)))
    sent: list[Any] = []

    def gather(ranks: Ranks, value: Any, patient: bool = False) -> list[Any]:
        assert patient, "one rank reads all images"
        sent.append(value)
        return [None, None, sent[0], None]

    monkeypatch.setattr(Ranks, "gather", gather)
    first = InMemory(source, {"memory": 2 * total}, Ranks(rank=2, world=4))
    monkeypatch.setattr(FolderSource, "length", None)  # the other rank reads nothing
    second = InMemory(source, {}, Ranks(rank=3, world=4, local_rank=1))
    assert sent[1] is None
    first.memory[0] = 7
    assert second.memory[0] == 7
    for row in range(len(source)):
        assert second.read(row) == first.read(row)
    monkeypatch.undo()
    with pytest.raises(SourceError, match=r"but a run can use only 80% of the .* that are free in memory\."):
        InMemory(source, {"memory": total}, Ranks(rank=2, world=4))


def test_what_a_failed_exchange_said_is_passed_on(monkeypatch: pytest.MonkeyPatch) -> None:
    pair = Ranks(world=2)
    error: RuntimeError = RuntimeError("NCCL error: no space left on /dev/shm\nThis may be due to ...")

    def fails(*_: object) -> None:
        raise error

    monkeypatch.setattr(torch.distributed, "all_gather_object", fails)
    with pytest.raises(RankError, match=r"^Lost the connection .* process: NCCL error: no space left on /dev/shm$"):
        pair.gather(1)
    error = torch.OutOfMemoryError("CUDA out of memory.")
    with pytest.raises(torch.OutOfMemoryError):
        pair.gather(1)
