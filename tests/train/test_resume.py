"""A run that was stopped, however it was stopped, goes on as if it had not been."""

import dataclasses
import itertools
import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from ijepa_enhanced.batch import Batch, MaskedBatch
from ijepa_enhanced.data import loader
from ijepa_enhanced.data.catalog import scan
from ijepa_enhanced.data.loader import PackDataset
from ijepa_enhanced.data.plan import Pack
from ijepa_enhanced.data.sources.folder import FolderSource
from ijepa_enhanced.encoder import Encoder
from ijepa_enhanced.errors import ResumeError, RunError, UnreadableImage
from ijepa_enhanced.jepa import Losses
from ijepa_enhanced.train import faults, loop
from ijepa_enhanced.train.checkpoint import latest_checkpoint
from ijepa_enhanced.train.config import TrainConfig
from ijepa_enhanced.train.faults import MOST_SKIPPED
from ijepa_enhanced.train.logging import RunLog, read_log
from ijepa_enhanced.train.loop import train
from ijepa_enhanced.train.meter import Meter
from ijepa_enhanced.train.saved import load_config
from ijepa_enhanced.train.signals import StopSignals

RATES = ("views_per_second", "tokens_per_second", "data_wait", "monitor_seconds", "monitor_share")
"""What a log holds about the machine, not about the run."""


def losses(run: Path) -> list[dict[str, float]]:
    return [{name: value for name, value in line.items() if name not in RATES} for line in read_log(run)]


def same_encoder(run: Path, other: Path) -> bool:
    weights, others = (Encoder.from_pretrained(folder).state_dict() for folder in (run, other))
    return all(torch.equal(weights[name], others[name]) for name in weights)


def start(run: Path, config: TrainConfig, resume: bool) -> subprocess.Popen[bytes]:
    """The same training in a process of its own, in a group of its own."""
    arguments = ["--resume", str(run)]
    if not resume:
        flat = dataclasses.asdict(config)
        arguments = ["--run", str(run)]
        for name, value in flat.items():
            values = value.items() if isinstance(value, dict) else [(None, value)]
            for key, item in values:
                option = f"--{name}.{key}" if key else f"--{name}"
                arguments.append(f"{option}={'null' if item is None else str(item)}")
    # One thread: results are bit-exact at a recorded thread count, and other tests may run beside this one.
    return subprocess.Popen(
        [sys.executable, "-m", "ijepa_enhanced", "train", *arguments],
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        start_new_session=True,
    )


def finish(process: subprocess.Popen[bytes]) -> tuple[int, str]:
    _, stderr = process.communicate(timeout=300)
    return process.returncode, stderr.decode()


def wait_for_lines(run: Path, count: int, process: subprocess.Popen[bytes]) -> None:
    """Until the run has logged `count` lines, or has ended."""
    log = run / "log.jsonl"
    while process.poll() is None and (not log.exists() or log.read_bytes().count(b"\n") < count):
        time.sleep(0.002)


def test_stopping_at_any_step_and_resuming_changes_nothing(
    tiny: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(tiny, tmp_path / "whole")
    original = loop.JEPA.update_teacher
    for stop_after in (1, 5, 9):
        steps = 0

        def stop(model: loop.JEPA, momentum: float, after: int = stop_after) -> None:
            nonlocal steps
            original(model, momentum)
            steps += 1
            if steps == after:
                signal.raise_signal(signal.SIGTERM)

        run = tmp_path / f"stopped-{stop_after}"
        monkeypatch.setattr(loop.JEPA, "update_teacher", stop)
        outcome = train(tiny, run)
        assert (outcome.finished, outcome.steps) == (False, stop_after)
        monkeypatch.setattr(loop.JEPA, "update_teacher", original)
        resumed = train(tiny, run, resume=True)
        assert resumed.finished
        assert same_encoder(run, tmp_path / "whole")
        assert losses(run) == losses(tmp_path / "whole")


def test_only_a_second_ctrl_c_stops_at_once(capfd: pytest.CaptureFixture[str]) -> None:
    ended: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, _: ended.append(number))
    try:
        with StopSignals() as stop:
            for _ in range(3):
                signal.raise_signal(signal.SIGTERM)
                assert stop.requested
            assert capfd.readouterr().err == ""
            signal.raise_signal(signal.SIGINT)
            said = "\nStopping after this step, then saving the run. Press Ctrl-C again to stop at once.\n"
            assert capfd.readouterr().err == said
            with pytest.raises(KeyboardInterrupt):
                signal.raise_signal(signal.SIGINT)
        with StopSignals(speaks=False) as silent:  # a rank that is not the main one
            signal.raise_signal(signal.SIGINT)
            assert silent.requested
        assert ended == []
        assert capfd.readouterr().err == ""
        signal.raise_signal(signal.SIGTERM)
        assert ended == [signal.SIGTERM]
    finally:
        signal.signal(signal.SIGTERM, before)


def test_ctrl_c_writes_into_no_other_file_if_stderr_is_closed(tmp_path: Path) -> None:
    program = """
import os, signal
from ijepa_enhanced.train.signals import StopSignals
with open("other", "w") as other, StopSignals():
    os.dup2(other.fileno(), 2)  # as if it were the first file that was opened after stderr was closed
    signal.raise_signal(signal.SIGINT)
"""
    subprocess.run(f"{sys.executable} -c '{program}' 2>&-", shell=True, cwd=tmp_path, check=True, timeout=60)
    assert (tmp_path / "other").read_text() == ""


def test_stopping_before_the_first_step_changes_nothing(
    tiny: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    train(tiny, tmp_path / "whole")
    original, run = Meter.waiting, tmp_path / "run"

    def stop(meter: Meter) -> Any:
        signal.raise_signal(signal.SIGTERM)
        return original(meter)

    monkeypatch.setattr(Meter, "waiting", stop)
    outcome = train(tiny, run)
    assert (outcome.finished, outcome.steps) == (False, 0)
    monkeypatch.setattr(Meter, "waiting", original)
    assert train(tiny, run, resume=True).finished
    assert f"{run} has no checkpoint yet. Training starts from the first step." in caplog.messages
    assert same_encoder(run, tmp_path / "whole")
    assert losses(run) == losses(tmp_path / "whole")


def test_a_run_survives_being_killed_and_interrupted(tiny: TrainConfig, tmp_path: Path) -> None:
    config = dataclasses.replace(tiny, steps=24)
    assert finish(start(tmp_path / "whole", config, resume=False))[0] == 0
    run = tmp_path / "run"
    for number, (lines, number_of_signal) in enumerate([(1, signal.SIGKILL), (3, signal.SIGTERM), (5, signal.SIGINT)]):
        process = start(run, config, resume=number > 0)
        wait_for_lines(run, lines, process)
        os.killpg(process.pid, number_of_signal)
        code, stderr = finish(process)
        if code == 1:
            assert f"Continue with: ijepa train --resume {run}" in stderr
        else:
            assert code in (0, -signal.SIGKILL), stderr
    code, stderr = finish(start(run, config, resume=True))
    assert code == 0, stderr
    assert same_encoder(run, tmp_path / "whole")
    assert [line["step"] for line in read_log(run)] == list(range(2, 25, 2))
    assert losses(run) == losses(tmp_path / "whole")


@pytest.mark.slow
@pytest.mark.parametrize("number_of_signal", [signal.SIGTERM, signal.SIGKILL])
def test_ten_random_moments(number_of_signal: signal.Signals, tiny: TrainConfig, tmp_path: Path) -> None:
    config = dataclasses.replace(tiny, steps=60)
    before = time.monotonic()
    assert finish(start(tmp_path / "whole", config, resume=False))[0] == 0
    duration = time.monotonic() - before
    run = tmp_path / "run"
    moments = torch.rand(10, generator=torch.Generator().manual_seed(0)).tolist()
    for number, moment in enumerate(moments):
        process = start(run, config, resume=number > 0 and (run / "config.yaml").exists())
        time.sleep(moment * duration)
        os.killpg(process.pid, number_of_signal)
        finish(process)
        checkpoint = latest_checkpoint(run / "checkpoints")
        if checkpoint:
            assert json.loads((checkpoint / "progress.json").read_text())["step"] == int(checkpoint.name[5:])
    resume = (run / "config.yaml").exists()
    code, stderr = finish(start(run, config, resume))
    assert code == 0, stderr
    assert same_encoder(run, tmp_path / "whole")
    assert losses(run) == losses(tmp_path / "whole")


def test_what_diverged_is_not_saved(tiny: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the weights NaN after the fourth step."""
    config = dataclasses.replace(tiny, log_every=100, monitor=dataclasses.replace(tiny.monitor, every=0))
    update, steps = loop.JEPA.update_teacher, []

    def diverge(model: loop.JEPA, momentum: float) -> None:
        update(model, momentum)
        steps.append(momentum)
        if len(steps) == 4:
            with torch.no_grad():
                model.student.blocks.norm.weight.fill_(torch.nan)

    monkeypatch.setattr(loop.JEPA, "update_teacher", diverge)
    with pytest.raises(RunError, match=r"^Weights are NaN or infinite at step 5\. "):
        train(config, tmp_path / "run")
    (checkpoint,) = (tmp_path / "run" / "checkpoints").iterdir()
    assert checkpoint.name == "step-00000003"
    assert all(value.isfinite().all() for value in Encoder.from_pretrained(tmp_path / "run").state_dict().values())


def fail_in(steps: range, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the losses of the second pack of these steps NaN; there are two packs in a step."""
    original, calls = loop.JEPA.losses, itertools.count()

    def losses(model: loop.JEPA, *arguments: Any) -> Losses:
        found = original(model, *arguments)
        step, pack = divmod(next(calls), 2)
        return found._replace(total=found.total * torch.nan) if pack and step + 1 in steps else found

    monkeypatch.setattr(loop.JEPA, "losses", losses)


def test_a_step_whose_loss_is_not_finite_is_skipped_counted_and_named(
    tiny: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = dataclasses.replace(tiny, steps=6, monitor=dataclasses.replace(tiny.monitor, every=0))
    fail_in(range(3, 4), monkeypatch)
    shown: list[MaskedBatch] = []
    step, before = loop.train_step, []

    def recorded(model: loop.JEPA, network: Any, optimizer: Any, batches: Any, *rest: Any) -> Any:
        weights = [value.clone() for value in model.student.parameters()]
        result = step(model, network, optimizer, batches, *rest)
        shown.append(batches[1])
        before.append(all(map(torch.equal, weights, model.student.parameters())))
        return result

    monkeypatch.setattr(loop, "train_step", recorded)
    assert train(config, tmp_path / "run").finished
    assert before == [False, False, True, False, False, False]
    lines = read_log(tmp_path / "run")
    assert [line["skipped"] for line in lines] == [0, 1, 1]
    assert all(math.isfinite(value) for line in lines for value in line.values())
    (line,) = (tmp_path / "run" / "skipped.jsonl").read_text().splitlines()
    source = FolderSource(Path(config.data.source))
    keys = {source.key(row) for row in shown[2].image_ids.tolist()}
    assert json.loads(line) == {"step": 3, "keys": sorted(keys)}


def test_too_many_skipped_steps_in_a_row_stop_the_run(
    tiny: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = dataclasses.replace(tiny, steps=50, monitor=dataclasses.replace(tiny.monitor, every=0))
    fail_in(range(5, 50), monkeypatch)
    with pytest.raises(RunError) as error:
        train(config, tmp_path / "run")
    # Later ones are not saved, because the weights may be why steps fail.
    last = tmp_path / "run" / "checkpoints" / "step-00000003"
    assert str(error.value) == (
        f"The loss or its gradient was NaN or infinite in {MOST_SKIPPED} steps in a row, the last of them step 14. The "
        f"last good checkpoint is {last}, and the images of these steps are listed in "
        f"{tmp_path / 'run' / 'skipped.jsonl'}. Start a new run with a lower --optim.lr or a higher --optim.warmup."
    )


@pytest.mark.parametrize(
    ("ending", "said"),
    [
        ("stuck", "The data workers have made no pack for 1 s. One may be stuck reading an image: check the storage"),
        ("killed", "A data worker has ended: DataLoader worker (pid"),
    ],
)
def test_a_data_worker_that_is_stuck_or_killed_ends_the_run(
    ending: str, said: str, tiny: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = dataclasses.replace(tiny.data, workers=1)
    config = dataclasses.replace(tiny, data=data, monitor=dataclasses.replace(tiny.monitor, every=0))

    def never(*_: object) -> None:
        if ending == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(100)

    monkeypatch.setattr(loader, "decode_views", never)
    for module in (faults, loop):
        monkeypatch.setattr(module, "WORKER_TIMEOUT", 1.0)
    with pytest.raises(RunError) as error:
        train(config, tmp_path / "run")
    assert str(error.value).startswith(said)


def test_a_damaged_checkpoint_is_set_aside_for_the_one_before(
    tiny: TrainConfig, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run, checkpoints = tmp_path / "run", tmp_path / "run" / "checkpoints"
    train(tiny, run)
    before = losses(run)
    (weights,) = (checkpoints / "step-00000012").glob("*.safetensors")
    weights.write_bytes(weights.read_bytes()[:1000])
    assert train(tiny, run, resume=True).finished
    assert losses(run) == before
    assert sorted(path.name for path in checkpoints.iterdir()) == [
        "damaged-step-00000012",
        "step-00000009",
        "step-00000012",
    ]
    (said,) = [message for message in caplog.messages if "Could not read checkpoint" in message]
    assert said.endswith(f"Resuming from {checkpoints / 'step-00000009'} instead.")


def test_a_step_without_readable_images_does_not_count_in_the_mean_loss(
    tiny: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = dataclasses.replace(tiny, steps=1, log_every=1, monitor=dataclasses.replace(tiny.monitor, every=0))
    train(config, tmp_path / "one")
    original = PackDataset.__getitem__

    def spoiled(dataset: PackDataset, pack: Pack) -> Batch:
        if pack.cursor >= (0, 2):  # the first pack of the second step
            monkeypatch.setattr(loader, "decode_views", fails)
        return original(dataset, pack)

    def fails(*_: object) -> None:
        raise UnreadableImage("spoiled")

    monkeypatch.setattr(PackDataset, "__getitem__", spoiled)
    data = dataclasses.replace(config.data, max_unreadable=1.0)
    config = dataclasses.replace(config, data=data)
    train(dataclasses.replace(config, steps=2, log_every=2), tmp_path / "two")
    ((one,), (two,)) = (read_log(tmp_path / name) for name in ("one", "two"))
    assert (two["step"], two["loss"]) == (2, one["loss"])


def test_what_killed_runs_left_half_written_is_removed(tiny: TrainConfig, tmp_path: Path) -> None:
    run = tmp_path / "run"
    train(dataclasses.replace(tiny, steps=4), run)
    for name in ("encoder", "best"):
        (run / name / ".model.safetensors.abc.partial").write_bytes(b"half")
    (run / "checkpoints" / ".step-00000002.partial").mkdir()
    train(tiny, run, resume=True)
    assert not [*run.rglob("*.partial")]


def test_tensorboard_keeps_the_values_of_the_step_that_a_run_continues_from(tmp_path: Path) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    with RunLog(tmp_path, 0, 0) as log:
        log.write(2, {"loss": 1.0})
        offset = log.sync()
        log.write(4, {"loss": 2.0})  # after the checkpoint, so this step runs again
    with RunLog(tmp_path, 2, offset) as log:
        log.write(4, {"loss": 3.0})
    events = accumulator.EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [(2, 1.0), (4, 3.0)]
    assert [(line["step"], line["loss"]) for line in read_log(tmp_path)] == [(2, 1.0), (4, 3.0)]


def test_the_run_keeps_the_configuration_it_was_started_with(tiny: TrainConfig, tmp_path: Path) -> None:
    train(dataclasses.replace(tiny, steps=1), tmp_path / "run")
    assert load_config(tmp_path / "run") == dataclasses.replace(tiny, steps=1)


def test_a_run_resumes_after_a_file_has_vanished(
    tiny: TrainConfig, tmp_path: Path, photos: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The image counts as unreadable and the plan stays, as without a restart. A new scan changes the plan."""
    data = dataclasses.replace(tiny.data, max_unreadable=0.05)
    config = dataclasses.replace(tiny, data=data, monitor=dataclasses.replace(tiny.monitor, every=0))
    train(dataclasses.replace(config, steps=1), tmp_path / "run")
    gone = sorted(photos.rglob("*.png"))[0]
    gone.unlink()
    assert train(config, tmp_path / "run", resume=True).finished
    assert [message for message in caplog.messages if "has changed since the last scan. The run continues" in message]
    assert [message for message in caplog.messages if message.startswith(f"Skipped {gone.relative_to(photos)}: ")]
    assert read_log(tmp_path / "run")[-1]["unreadable"] == 1
    scan(FolderSource(photos))
    with pytest.raises(ResumeError) as error:
        train(config, tmp_path / "run", resume=True)
    assert str(error.value) == (
        f"Cannot resume {tmp_path / 'run'}: the images (for example, files were added or removed) or the data settings "
        "have changed since the run was started. Restore them, or start a new run."
    )
