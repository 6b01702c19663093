"""The configuration in a run's folder: read it, and check that the run can resume with it."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from ijepa_enhanced.config import build, flatten, read_config
from ijepa_enhanced.distributed import Ranks, is_restarted, launch_id
from ijepa_enhanced.encoder import Encoder
from ijepa_enhanced.errors import RequestError
from ijepa_enhanced.files import replacing
from ijepa_enhanced.train.checkpoint import newest_progress
from ijepa_enhanced.train.config import TrainConfig
from ijepa_enhanced.train.start import START

LAUNCH = "launch.txt"
"""File with the name of the torchrun job that created a run."""

FREE_ON_RESUME = (
    "data.source",
    "data.max_unreadable",
    "data.workers",
    "data.cache",
    "compile",
    "activation_checkpointing",
    "parallel",
    "checkpoint_every",
    "log_every",
)
"""Keys that may change when a run resumes: the location of the images, and settings that do not change the result."""


def read_train_config(path: Path) -> dict[str, Any]:
    """Return the values of a training configuration in a YAML file, by their dotted names.

    `run`, which may be among them, is the folder that `ijepa train` makes.

    Raises:
        RequestError: the file is not YAML, or has an unknown key or a value of the wrong type; the message names it.
    """
    return read_config(path, TrainConfig, {"run": str | None})


def config_of_run(folder: Path) -> Path:
    """Return the path of a run's configuration file.

    Raises:
        RequestError: there is no such folder, or it has no configuration file.
    """
    path = folder / "config.yaml"
    if not folder.exists():
        raise RequestError(f"No such folder: {folder}.")
    if not path.is_file():
        raise RequestError(f"{folder} is not a run folder: it contains no config.yaml.")
    return path


def load_config(folder: Path) -> TrainConfig:
    """Return the configuration of a run.

    Raises:
        RequestError: the folder has no configuration file, or one that another version of this program wrote.
    """
    return build(TrainConfig, read_config(config_of_run(folder), TrainConfig, {}))


def resumes(config: TrainConfig, folder: Path, asked: bool, ranks: Ranks) -> bool:
    """Return whether a run resumes, either on request or because torchrun has started its own run again.

    All ranks call this, because torchrun counts a restart only on the machine on which a process has failed, and does
    not count one to replace a machine.

    Args:
        config: of the run.
        folder: of the run.
        asked: whether the command says so.
        ranks: the processes that share it.

    Raises:
        RequestError: the folder of a new run exists, or the restarted run had another configuration.
    """
    restarted = any(ranks.gather(is_restarted()))
    if asked:
        return True
    exists = (folder / "config.yaml").is_file()
    if ranks.gather(exists and launched_here(folder, restarted))[0]:
        check_resumable(load_config(folder), config, folder)
        check_unchanged(folder)
        return True
    if ranks.main and (exists or not restarted):
        check_new(folder)
    return False


def launched_here(folder: Path, restarted: bool) -> bool:
    """Return whether the torchrun of this process has created a run.

    Without `--rdzv-id`, all jobs have the same name, so it must also have restarted.
    """
    path, own = folder / LAUNCH, launch_id()
    return own is not None and (own != "none" or restarted) and path.is_file() and path.read_text() == own


def keep_launch(folder: Path) -> None:
    """Write the name of the torchrun job that creates a run. Do nothing without torchrun."""
    if (own := launch_id()) is not None:
        with replacing(folder / LAUNCH) as temporary:
            temporary.write_text(own)


def check_new(folder: Path) -> None:
    """Check that the folder of a new run does not exist yet.

    Raises:
        RequestError: the folder exists.
    """
    if (folder / "config.yaml").is_file():
        raise RequestError(
            f"{folder} already exists. To resume it, use --resume {folder}. Otherwise, choose another folder with "
            "--run."
        )
    if folder.is_dir():
        raise RequestError(f"{folder} already exists and is not a run folder. Choose another folder with --run.")
    if folder.exists():
        raise RequestError(f"{folder} is a file. Choose another folder with --run.")


def check_resumable(saved: TrainConfig, asked: TrainConfig, folder: Path) -> None:
    """Check that resuming the run does not change a setting that its result depends on.

    Args:
        saved: the configuration that the run was started with.
        asked: the configuration that it would resume with.
        folder: of the run.

    Raises:
        RequestError: it does; the message names the key.
    """
    for key, before, after in _changes(saved, asked):
        # The schedules of the learning rate and the teacher depend on the number of steps.
        more = f" from its weights: --init {folder} --run NEW" if key in ("steps", "epochs") else ""
        raise RequestError(
            f"{folder} was started with {key} = {_yaml(before)} and cannot continue with {_yaml(after)}. "
            f"Remove --{key}, or start a new run{more}."
        )


def check_unchanged(folder: Path) -> None:
    """Check that a run's config.yaml is the configuration that its newest checkpoint was trained with.

    Raises:
        RequestError: it is not; the message names the key.
    """
    progress = newest_progress(folder / "checkpoints")
    if progress is None:
        return
    trained = build(TrainConfig, flatten(progress["config"]))
    for key, before, after in _changes(trained, load_config(folder)):
        raise RequestError(
            f"{config_of_run(folder)} sets {key} = {_yaml(after)}, but the run was trained with {_yaml(before)}. "
            "Change it back, or start a new run."
        )


def _yaml(value: Any) -> str:
    """Return a value as it is written in a configuration: null, not None."""
    return yaml.safe_dump(value, default_flow_style=True).split("\n")[0]


def _changes(before: TrainConfig, after: TrainConfig) -> Iterator[tuple[str, Any, Any]]:
    """Yield the key and both values of each setting that differs and may not change when a run resumes."""
    values = flatten(dataclasses.asdict(before))
    for key, value in flatten(dataclasses.asdict(after)).items():
        if value != values[key] and key not in FREE_ON_RESUME:
            yield key, values[key], value


def start_of(encoder: Encoder, run: Path) -> Encoder:
    """Return the encoder that a run started from, on the device of `encoder`: untrained, or the weights of `--init`.

    Args:
        encoder: the trained encoder, whose architecture and preprocessing an untrained one has.
        run: folder of the run, or of an encoder in it. If it is no run, the encoder is untrained with seed 0.

    Raises:
        EncoderError: the weights that the run started from cannot be loaded.
    """
    run = run.resolve()  # "." has no name
    # A run keeps its encoders in these folders.
    folder = run.parent if run.name in ("encoder", "best", START) else run
    if (folder / START).is_dir():
        return Encoder.from_pretrained(folder / START).to(encoder.device)
    seed = load_config(folder).seed if (folder / "config.yaml").is_file() else 0
    return Encoder.random(encoder.config, encoder.preprocessing, seed).to(encoder.device)
