"""Check what the ranks of a run must have in common, and find out which rank is missing when a connection is lost."""

from __future__ import annotations

import dataclasses
import hashlib
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import _get_default_store

from ijepa_enhanced.config import flatten
from ijepa_enhanced.distributed import Ranks, lost_connection
from ijepa_enhanced.errors import RankError
from ijepa_enhanced.files import remove_partials
from ijepa_enhanced.train.config import TrainConfig

ANSWER_TIMEOUT = 10.0
"""Seconds that a rank waits for answers of all ranks after it has lost one, so that the error can name the ranks that
do not answer. torchrun ends all ranks 30 seconds after the first error."""


def facts_of(config: TrainConfig, resume: bool) -> dict[str, Any]:
    """Return what all ranks must have in common before they do anything together, for `Ranks.agree`.

    Args:
        config: configuration of the run. The path of the images may differ between machines.
        resume: whether the run resumes.
    """
    settings = flatten(dataclasses.asdict(config))
    files = sorted(Path(__file__).parents[1].rglob("*.py"))
    code = hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()
    facts = {"code of ijepa-enhanced": code, "PyTorch": torch.__version__, "choice of --run or --resume": resume}
    return facts | {f"value of {name}": value for name, value in settings.items() if name != "data.source"}


def check_shared(folder: Path, ranks: Ranks) -> None:
    """Check that all ranks see the same folder: rank 0 writes a file, and the others look for it. All ranks call this.

    Raises:
        RankError: a rank does not see the file. The message names the folder.
    """
    if ranks.world == 1:
        return
    token = folder / f".shared-{ranks.gather(uuid.uuid4().hex)[0]}.partial"
    if ranks.main:
        remove_partials(folder)  # left by killed runs
        token.touch()
    ranks.wait()
    absent = [rank for rank, seen in enumerate(ranks.gather(token.exists())) if not seen]
    if ranks.main:
        token.unlink()
    if absent:
        raise RankError(
            f"Process {', '.join(map(str, absent))} cannot see the files that process 0 writes into {folder}. "
            "All machines need one shared run folder: set --run to a path on shared storage."
        )


@contextmanager
def together(step: int, ranks: Ranks) -> Iterator[None]:
    """If ranks lose each other in the body, raise an error that names this rank, the step, and the silent ranks.

    Raises:
        RankError: another rank is gone or hangs.
    """
    try:
        yield
    except RuntimeError as error:
        # DDP and FSDP communicate during the backward pass, and gloo's errors have no type of their own.
        lost = isinstance(error, RankError | dist.DistError) or "gloo" in str(error)
        if ranks.world == 1 or not lost or isinstance(error, torch.OutOfMemoryError):
            raise
        reason = error if isinstance(error, RankError) else lost_connection(error)
        raise RankError(f"Rank {ranks.rank}, step {step}:{silent(ranks)} {reason}") from error


def silent(ranks: Ranks) -> str:
    """Return a sentence about the ranks that do not call this within `ANSWER_TIMEOUT`. It is empty if all do."""
    said: list[str] = []
    # In a thread, because a store on a machine that hangs never answers.
    asking = threading.Thread(target=lambda: said.append(_silent(ranks)), daemon=True)
    asking.start()
    asking.join(2 * ANSWER_TIMEOUT)
    return said[0] if said else " The machine of rank 0 does not answer."


def _silent(ranks: Ranks) -> str:
    here = [f"lost/{rank}" for rank in range(ranks.world)]
    try:
        # Usually torchrun holds the store, so the store answers even if a rank hangs.
        store = _get_default_store()
        store.set(here[ranks.rank], "")
        end = time.monotonic() + ANSWER_TIMEOUT
        while not store.check(here) and time.monotonic() < end:
            time.sleep(0.1)
        missing = [str(rank) for rank, key in enumerate(here) if not store.check([key])]
    except RuntimeError:  # torchrun has ended too
        return ""
    return f" No answer from rank {', '.join(missing)}." if missing else ""
