"""Start runs of two ranks, cause a fault at a random moment, and let them continue or resume them.

Run as a script, in a process that has started no threads yet: `python strikes.py FAULT MOMENTS SEED FOLDER`. The ranks
are forked by torchrun's own agent, because each import takes seconds. The folder holds `run.yaml`; each moment leaves a
run in it, and a line in `FAULT.jsonl`. Moments are spread over the run: a random one in each of `MOMENTS` equal parts.
"""

import dataclasses
import json
import os
import random
import resource
import signal
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from ijepa_enhanced import distributed
from ijepa_enhanced.cli import StderrHandler, logger
from ijepa_enhanced.config import build
from ijepa_enhanced.train import loop
from ijepa_enhanced.train.config import TrainConfig
from ijepa_enhanced.train.saved import read_train_config

WORLD = 2
HUNG_SECONDS = 20.0
"""How long ranks wait here for one that hangs. It must be longer than a step, even on a busy machine."""
FULL_BYTES = 100_000
"""Largest file on the full disk, in bytes: larger than a log, smaller than a rank's part of a checkpoint."""


class Struck:
    """A run that torchrun's agent has started.

    Args:
        folder: of the run.
        resume: whether it exists.
        restarts: how often the agent starts its ranks again.
        hangs: whether a rank will hang.
    """

    def __init__(self, folder: Path, resume: bool = False, restarts: int = 0, hangs: bool = False) -> None:
        self.folder = folder
        self.agent = os.fork()
        if not self.agent:
            with (folder.parent / f"{folder.name}.txt").open("a") as said:
                os.dup2(said.fileno(), 2)
            logger.handlers = [StderrHandler()]
            config = LaunchConfig(1, 1, WORLD, None, "run", rdzv_endpoint="127.0.0.1:0", rdzv_backend="c10d")
            config = dataclasses.replace(config, max_restarts=restarts, start_method="fork")
            try:
                elastic_launch(config, work)(str(folder), resume, hangs)
            except BaseException as error:
                print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
                os._exit(1)
            os._exit(0)

    @property
    def ranks(self) -> list[int]:
        """Return the process numbers of the living ranks."""
        return [pid for pid in children(self.agent) if alive(pid)]

    def lines(self) -> int:
        """Steps in the log."""
        log = self.folder / "log.jsonl"
        return log.read_bytes().count(b"\n") if log.exists() else 0

    def until(self, condition: Callable[[], Any], seconds: float = 120.0) -> float:
        """Wait until a condition holds or the agent has ended, and return the seconds."""
        start = time.monotonic()
        while not condition() and alive(self.agent):
            time.sleep(0.005)
            assert time.monotonic() < start + seconds, f"{self.folder}: waited {seconds} s for {condition}"
        return time.monotonic() - start

    def wait(self) -> int:
        """Return the exit code of the agent when it ends."""
        return os.waitstatus_to_exitcode(os.waitpid(self.agent, 0)[1])


def work(folder: str, resume: bool, hangs: bool) -> None:
    """Train as one rank, and write the number of each step that begins beside the run."""
    torch.set_num_threads(1)
    if hangs:
        distributed.STEP_TIMEOUT = distributed.START_TIMEOUT = timedelta(seconds=HUNG_SECONDS)
    run, original = Path(folder), loop.Run.step

    def recorded(self: loop.Run, state: Any, *rest: Any) -> None:
        if os.environ["RANK"] == "0":
            with run.with_suffix(".steps").open("a") as file:
                print(state.step + 1, file=file)
        original(self, state, *rest)

    loop.Run.step = recorded  # type: ignore[assignment, method-assign]
    config = build(TrainConfig, read_train_config(run.parent / "run.yaml"))
    loop.train(config, run, resume)


def children(pid: int) -> list[int]:
    """Return the processes that a process has started."""
    with suppress(OSError):
        tasks = Path(f"/proc/{pid}/task").iterdir()
        return sorted(int(child) for task in tasks for child in (task / "children").read_text().split())
    return []


def alive(pid: int) -> bool:
    """Return whether a process is alive."""
    with suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


def kill(pids: list[int], number: int = signal.SIGKILL) -> None:
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, number)


def strike(fault: str, run: Struck, rng: random.Random, photos: Path) -> float | None:
    """Strike a run, and return the seconds until it was noticed; None if the run need not notice it."""
    ranks = run.ranks
    one = rng.choice(ranks)
    others = [pid for pid in ranks if pid != one]
    if fault == "one rank" or fault == "save":
        kill([one])
        return run.until(lambda: not any(map(alive, others)))
    if fault == "all ranks":
        kill([run.agent, *ranks])
        return None
    if fault == "worker":
        run.until(lambda: children(one))
        kill(children(one)[-1:])
        return run.until(lambda: not alive(one))
    if fault == "disk":
        resource.prlimit(one, resource.RLIMIT_FSIZE, (FULL_BYTES, FULL_BYTES))
        return run.until(lambda: not alive(one))
    if fault == "hang":
        kill([one], signal.SIGSTOP)
        seconds = run.until(lambda: not any(map(alive, others)))
        kill([one])  # torchrun does this after 30 s
        return seconds
    assert fault == "file"
    rng.choice(sorted(photos.rglob("*.png"))).unlink()
    return None


def strike_at(moment: float, fault: str, folder: Path, rng: random.Random) -> dict[str, Any]:
    """Start a run, strike it after so many steps, and let it finish."""
    run = Struck(folder, restarts=0 if fault == "all ranks" else 1, hangs=fault == "hang")
    steps = int(moment)
    if fault == "hang":
        steps = max(1, steps)  # ranks may take long for the first step
    if fault == "save":
        steps = 3 * max(1, round(moment / 3))
    run.until(lambda: len(run.ranks) == WORLD and run.lines() >= steps - 1)
    seconds = run.until(lambda: run.lines() >= steps)
    if fault == "save":
        run.until(lambda: any((folder / "checkpoints").glob(".*.partial")) or run.lines() > steps)
    time.sleep(max(seconds, 0.1) * rng.random())
    logged, half = run.lines(), [path.name for path in (folder / "checkpoints").glob(".*.partial")]
    noticed = strike(fault, run, rng, folder.parent / "photos")
    codes = [run.wait()]
    if codes[0]:
        codes.append(Struck(folder, (folder / "config.yaml").is_file()).wait())
    return {"run": folder.name, "logged": logged, "half": half, "noticed": noticed, "codes": codes}


def main(fault: str, moments: int, seed: int, folder: Path) -> None:
    rng = random.Random(seed)
    steps = build(TrainConfig, read_train_config(folder / "run.yaml")).steps
    assert steps is not None
    if not (folder / "whole").exists():
        assert Struck(folder / "whole").wait() == 0
    for number in range(moments):
        moment = (number + rng.random()) / moments * steps
        found = strike_at(moment, fault, folder / f"{fault.replace(' ', '-')}-{number}", rng)
        with (folder / f"{fault}.jsonl").open("a") as file:
            print(json.dumps(found), file=file)


if __name__ == "__main__":
    torch.set_num_threads(1)
    name, count, number, place = sys.argv[1:]
    main(name, int(count), int(number), Path(place))
