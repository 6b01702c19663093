"""The Ray engine of `ijepa embed`: tasks of a cluster decode packs, actors embed them, the driver writes the files.

The items of the pipeline are numbers: the driver counts the packs of each file, and a task plans the packs of its file
again from its own catalog. So a million images are a few thousand small tasks, and no pack is kept or sent. On a
cluster with GPUs, each has an actor, and all CPUs decode. Without GPUs there is an actor for each CPU that decodes what
it embeds, because Ray fuses steps that ask for the same resources.

Ray starts a task or an actor again when its process or its machine dies. Errors of ours travel as values, because Ray
wraps those that are raised into tracebacks of its own.
"""

from __future__ import annotations

import functools
import logging
import os
import pickle
import socket
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ijepa_enhanced.batch import Batch
from ijepa_enhanced.data.catalog import open_catalog
from ijepa_enhanced.data.loader import PackDataset
from ijepa_enhanced.data.plan import Pack
from ijepa_enhanced.data.sources.open import open_source
from ijepa_enhanced.devices import autocast_dtype, best_device
from ijepa_enhanced.embed.plan import EmbedPlan
from ijepa_enhanced.embed.rows import PackFeatures, features_of
from ijepa_enhanced.embed.run import Engine
from ijepa_enhanced.embed.settings import EmbedSettings, hash_encoder
from ijepa_enhanced.encoder import Encoder
from ijepa_enhanced.errors import RequestError, RunError, UserError
from ijepa_enhanced.evaluate.tokens import LabelledSource, last_outputs
from ijepa_enhanced.models.config import Architecture

logger = logging.getLogger(__name__)

CONNECTION_TIMEOUT = 10.0
"""Seconds in which the head of a cluster must answer. Ray itself tries for two minutes."""

QUIET = {
    "RAY_BACKEND_LOG_LEVEL": "fatal",
    "RAY_enable_output_error_log_if_still_retry": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
}
"""Environment of Ray, unless it is set: no messages of its C++ part, since Ray repairs what they report or raises it in
Python; none about what is tried again; and no usage statistics sent to its makers."""

MOST_TASKS = 4096
"""Tasks of a run, each of one pack or several. Ray 2.60 spends 17 ms on each, and 3 ms of that before the first starts
(12,000 empty tasks, 2 virtual cores of an AMD EPYC, 2026-11-28)."""


@dataclass(frozen=True)
class Work:
    """What every process of the cluster is told."""

    settings: EmbedSettings
    patch_size: int
    """P."""
    network: Architecture
    """Of the encoder."""
    limit: int
    """Most tokens of an image."""
    budget: int
    """Most tokens of a pack, unless one image alone has more."""
    folder: str
    """Where the command runs: relative paths start there."""


@contextmanager
def ray_cluster() -> Iterator[None]:
    """Connect to the cluster at RAY_ADDRESS, or start Ray on this machine; not if the process is connected already.

    Raises:
        RequestError: Ray is not installed, or no cluster answers.
        RunError: Ray has failed in the body.
    """
    try:
        import ray
        import ray.data
    except ImportError as error:
        raise RequestError("--engine ray requires Ray. Install it with: pip install 'ijepa-enhanced[ray]'") from error
    for name in ("ray", "ray.data"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    connected = ray.is_initialized()
    try:
        if not connected:
            connect(os.environ.get("RAY_ADDRESS") or "local")
        yield
    except ray.exceptions.RayError as error:
        reason = str(error).strip().partition("\n")[0].rstrip(".")
        raise RunError(f"Ray has failed: {reason}. When this is solved, run the same command with --resume.") from error
    finally:
        if not connected:
            ray.shutdown()


def connect(address: str) -> None:
    """Connect to a cluster, or start Ray on this machine if the address is `local`.

    Raises:
        RequestError: no cluster answers.
    """
    import ray

    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    more: dict[str, Any] = {"include_dashboard": False} if address == "local" else {}
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if address not in ("local", "auto") and not (host and port.isdecimal()):
        raise RequestError(f"RAY_ADDRESS must be HOST:PORT, for example 127.0.0.1:6379, not {address}.")
    advice = "Correct the address, or unset RAY_ADDRESS to start Ray on this machine."
    try:
        if host:
            socket.create_connection((host, int(port)), CONNECTION_TIMEOUT).close()
    except OSError as error:
        reason = error.strerror or error
        raise RequestError(f"No Ray cluster answers at RAY_ADDRESS={address}: {reason}. {advice}") from error
    try:
        with _silent():  # it also reports which level it was given
            ray.init(address, log_to_driver=False, logging_level=logging.CRITICAL, **more)
    except (OSError, ValueError, RuntimeError) as error:
        reason = str(error).partition("\n")[0].rstrip(".")
        raise RequestError(
            f"Ray cannot connect to RAY_ADDRESS={address}: {reason}. {advice} If the cluster requires a token, set "
            "RAY_AUTH_MODE=token too."
        ) from error


@contextmanager
def _silent() -> Iterator[None]:
    """Drop what is written to the file descriptor of stderr."""
    with open(os.devnull, "w") as nothing:
        before = os.dup(2)
        os.dup2(nothing.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(before, 2)
            os.close(before)


def actors() -> tuple[int, dict[str, Any]]:
    """Return how many actors fit into the cluster, and what each needs: a GPU, or a CPU on a cluster without GPUs.

    An actor with a GPU takes no CPU from the tasks that decode. Ray Data would reserve one for it, and wait for ever
    where there are no more CPUs than GPUs.

    Raises:
        RequestError: the cluster has neither.
    """
    import ray

    resources = ray.cluster_resources()
    if gpus := int(resources.get("GPU", 0)):
        return gpus, {"num_gpus": 1, "num_cpus": 0}
    cpus = int(resources.get("CPU", 0))
    if not cpus:
        raise RequestError("The Ray cluster has no CPU and no GPU to embed with. Add a machine to it.")
    return cpus, {"num_cpus": 1}


def device_of_actors() -> tuple[torch.device, torch.dtype]:
    """Return the kind of device that actors embed on, and the precision of matrix products there; asks one of them."""
    import ray

    number, needs = actors()
    logger.info("Embedding with Ray: %d actor(s) with one %s each.", number, "GPU" if "num_gpus" in needs else "CPU")
    return ray.get(ray.remote(**needs)(_own_device).remote())


def _own_device() -> tuple[torch.device, torch.dtype]:
    device = best_device()
    return device, autocast_dtype("auto", device)


def ray_engine(plan: EmbedPlan, network: Architecture) -> Engine:
    """Return the engine that embeds on all devices of the cluster that this process is connected to.

    Args:
        plan: its settings name the source and the encoder, which every machine of the cluster must find there.
        network: of the encoder.
    """
    work = Work(plan.settings, plan.patch_size, network, plan.limit, plan.budget, os.getcwd())

    def embed(files: Sequence[int]) -> Iterator[PackFeatures]:
        import ray.data

        ends = np.cumsum([len(plan.packs(file)) for file in files])
        if not ends[-1]:  # Ray has no empty range
            return
        number, needs = actors()
        context = ray.data.DataContext.get_current()
        context.enable_progress_bars = False
        context.execution_options.preserve_order = True
        tasks = min(int(ends[-1]), MOST_TASKS)
        packs = ray.data.range(int(ends[-1]), override_num_blocks=tasks)
        batches = packs.map(partial(_read, work, np.array(files), ends))
        pool = ray.data.ActorPoolStrategy(size=min(number, tasks))
        embedder: Any = _Actor  # Ray knows no types of classes
        for row in batches.map(embedder, fn_constructor_args=(work,), compute=pool, **needs).iter_rows():
            yield _received(row["value"])

    return embed


def _read(work: Work, files: NDArray[np.int64], ends: NDArray[np.int64], row: dict[str, int]) -> dict[str, bytes]:
    """Make the batch of a pack; runs in a task.

    Args:
        work: what every process is told.
        files: [F] numbers of the files.
        ends: [F] packs of all files up to each of them.
        row: number of the pack, counted through all files.
    """
    place = int(np.searchsorted(ends, row["id"], side="right"))

    def read() -> Batch:
        images = _images(work)
        dataset = PackDataset(
            images.source,
            images.catalog,
            work.patch_size,
            depth=work.network.depth,
            merge_rate=work.settings.merge_rate,
            prefix=work.network.prefix,
            channels=work.network.channels,
        )
        return dataset[_packs(work, int(files[place]))[row["id"] - int(ends[place])]]  # counted from the file's end

    return _sent(read)


class _Actor:
    """Embeds batches; runs in an actor."""

    def __init__(self, work: Work) -> None:
        self.work = work

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        """Return the features of a batch."""

        def embed() -> PackFeatures:
            batch, settings = _received(row["value"]), self.work.settings
            encoder, source = _encoder(self.work), _images(self.work).source
            precision = getattr(torch, settings.precision)
            moved, outputs = last_outputs(encoder, source, batch, precision, settings.layers)
            return features_of(moved, outputs, settings, encoder, source)

        return _sent(embed)


def _sent(make: Callable[[], Any]) -> dict[str, bytes]:
    """Return a value as bytes, or the exception that making it raises, with the traceback as a note for --debug."""
    try:
        value = make()
    except Exception as error:
        if not hasattr(error, "__notes__"):  # else the task that decodes has sent it
            error.add_note(traceback.format_exc())
        value = error
    return {"value": pickle.dumps(value)}


def _received(data: bytes) -> Any:
    """Return the value, or raise the exception."""
    value = pickle.loads(data)
    if isinstance(value, Exception):
        raise value
    return value


@contextmanager
def _on_node() -> Iterator[None]:
    """Add the name of the machine to a message: not all may find the same files."""
    try:
        yield
    except UserError as error:
        raise type(error)(f"{error} (On the Ray node {socket.gethostname()}.)") from error


@functools.cache
@_on_node()
def _images(work: Work) -> LabelledSource:
    """Open the source, once in a process. The first one on a machine without its catalog scans the images."""
    with suppress(OSError):  # then absolute paths can be found all the same
        os.chdir(work.folder)
    source = open_source(work.settings.source)
    catalog = open_catalog(source)
    if source.listing.hash != work.settings.source_hash:
        raise RequestError(f"{work.settings.source} does not contain the same images here as where the command runs.")
    return LabelledSource(source, catalog)


@functools.cache
@_on_node()
def _encoder(work: Work) -> Encoder:
    """Load the encoder, once in a process."""
    with suppress(OSError):
        os.chdir(work.folder)
    encoder = Encoder.from_pretrained(work.settings.encoder)
    if hash_encoder(encoder) != work.settings.encoder_hash:
        raise RequestError(f"{work.settings.encoder} is not the same encoder here as where the command runs.")
    return encoder.to(best_device())


@functools.lru_cache(maxsize=2)
def _packs(work: Work, file: int) -> list[Pack]:
    """Plan a file, once in a process for tasks that follow each other."""
    catalog = _images(work).catalog
    return EmbedPlan(work.settings, catalog, work.patch_size, work.limit, work.budget).packs(file)
