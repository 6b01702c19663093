"""Every command of `ijepa`: what it does, its options, and the function that runs it.

A command is imported when it runs, so that `--help` needs no torch. The docstring of a field is its help.
"""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from ijepa_enhanced.errors import RequestError, did_you_mean
from ijepa_enhanced.evaluate.config import FinetuneConfig
from ijepa_enhanced.train.config import TrainConfig

PROTOCOLS = ("knn", "linear", "linear4", "lowshot", "attentive", "finetune", "dense")
DEFAULT_PROTOCOLS = ("knn", "linear")


@dataclass(frozen=True)
class Command:
    """One command."""

    purpose: str
    """The first line of its help."""
    example: str
    """A line or more that a user can copy."""
    options: type[Common]
    function: str
    """The module in `commands` and the function in it that turns the options into an exit code."""
    ranks: bool = False
    """Whether processes that `torchrun` starts share the work."""

    def run(self, options: Common) -> int:
        """Import the command, run it and return the exit code."""
        module, _, name = self.function.partition(".")
        code: int = getattr(importlib.import_module(f"ijepa_enhanced.commands.{module}"), name)(options)
        return code


@dataclass(frozen=True)
class Group:
    """A name with commands of its own."""

    purpose: str
    commands: Mapping[str, Command | Group]
    kind: str
    """What one of its commands is called."""


def option(default: Any = dataclasses.MISSING, *, metavar: str = "", flag: str = "", positional: bool = False) -> Any:
    """Return a field that is an option, or a positional argument; without a default it must be given.

    Args:
        default: its value if it is not given.
        metavar: what the help calls its value.
        flag: its spelling, if that is not the field's name with dashes.
        positional: whether it is given by its place.
    """
    return dataclasses.field(
        default=default, metadata={"metavar": metavar, "flag": flag, "positional": positional}, kw_only=True
    )


def keys(config: type[Any], prefix: str = "") -> Any:
    """Return a field with the keys of a configuration that were given, each by a flag of its own."""
    return dataclasses.field(default_factory=dict, metadata={"config": config, "prefix": prefix}, kw_only=True)


def at_least(least: int, **values: int | None) -> None:
    """Check options that were given against their smallest value.

    Raises:
        RequestError: a value is too small.
    """
    for name, value in values.items():
        if value is not None and value < least:
            raise RequestError(f"--{name.replace('_', '-')} must be at least {least}, not {value}.")


def check_merge_rate(rate: float) -> None:
    """Raise RequestError if no encoder can merge at this rate."""
    if not 0 <= rate <= 0.5:
        raise RequestError(f"--merge-rate must lie between 0 and 0.5, not {rate}.")


@dataclass(frozen=True)
class Common:
    """Options of every command."""

    json: bool = option(False)
    """End stdout with one line of JSON, for programs."""
    debug: bool = option(False)
    """Show tracebacks and debugging messages."""


@dataclass(frozen=True)
class TrainOptions(Common):
    """Options of `ijepa train`."""

    source: str | None = option(None, metavar="PHOTOS", positional=True)
    """Your images: a folder, tar shards, Parquet files, a list, hf://NAME or synthetic. Without --config, the recipe is
    own-images if there is a GPU, and own-images-cpu if not."""
    config: str | None = option(None, metavar="NAME_OR_FILE")
    """A recipe (RECIPES), or a YAML file. Flags override its values."""
    run: str | None = option(None, metavar="DIR")
    """Folder to create for the run (default: runs/TIME)."""
    resume: str | None = option(None, metavar="RUN")
    """Folder of a run to continue from its newest checkpoint."""
    print_config: bool = option(False, flag="--print_config")
    """Print the configuration as YAML, and do nothing else."""
    given: Mapping[str, Any] = keys(TrainConfig)


@dataclass(frozen=True)
class EncoderOptions(Common):
    """Options of every command that runs an encoder."""

    run: str = option(metavar="RUN", positional=True)
    """A run, or a folder with an encoder."""
    resolution: int | Literal["native"] | None = option(None, metavar="PIXELS")
    """Resize images to this sqrt(height * width), or `native` to keep their size (default: the resolution that the
    encoder was trained at)."""

    def __post_init__(self) -> None:
        at_least(1, resolution=None if self.resolution == "native" else self.resolution)


@dataclass(frozen=True)
class EvaluateOptions(EncoderOptions):
    """Options of `ijepa evaluate`."""

    data: str | None = option(None, metavar="SOURCE")
    """Labelled images, of which the probes learn from 80% and are scored on 20%. The split depends on --seed, and
    keeps the share of each class."""
    train: str | None = option(None, metavar="SOURCE")
    """Labelled images that the probes learn from."""
    val: str | None = option(None, metavar="SOURCE")
    """Labelled images that the probes are scored on."""
    protocols: tuple[str, ...] = option(DEFAULT_PROTOCOLS, metavar="NAME")
    """What to score by: knn, linear, linear4, lowshot, attentive, finetune, dense (docs/evaluation.md)."""
    baselines: bool = option(False)
    """Score the random start and raw 16x16 pixels as well."""
    random_init: bool = option(False)
    """Score the random start of the run instead."""
    merge_rate: float = option(0.0, metavar="SHARE")
    """Share of its tokens that each layer merges, from 0 to 0.5."""
    sweep: tuple[str, ...] = option((), metavar="NAME=VALUES")
    """Score every combination, such as resolution=112,224 merge_rate=0,0.05,0.1, and say which one to choose."""
    out: str | None = option(None, metavar="DIR")
    """Folder for sweep.csv and sweep.png (default: RUN)."""
    seed: int = option(0)
    """Seed of the split, of the few labels and of what is trained."""
    workers: int | None = option(None)
    """Processes that decode images; 0: none besides this one (default: one for each core)."""
    finetune: Mapping[str, Any] = keys(FinetuneConfig, "finetune.")

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(0, seed=self.seed, workers=self.workers)
        check_merge_rate(self.merge_rate)
        for protocol in self.protocols:
            if protocol not in PROTOCOLS:
                raise RequestError(f"No protocol '{protocol}'.{did_you_mean(protocol, list(PROTOCOLS))}")
        self.check_sources()

    def check_sources(self) -> None:
        """Raise RequestError if the images to learn from and to score on are not given once."""
        if self.data is not None and (self.train is not None or self.val is not None):
            raise RequestError("Give --data, or --train and --val: --data is split into both.")
        if self.data is None and self.train is None and self.val is None:
            raise RequestError("No images to score on: give --data SOURCE, or --train SOURCE and --val SOURCE.")
        for missing, there in (("train", "val"), ("val", "train")):
            if self.data is None and getattr(self, missing) is None:
                raise RequestError(f"--{there} needs --{missing} too. Or give --data SOURCE, which is split into both.")
        if self.data is not None and "dense" in self.protocols:
            raise RequestError("--data cannot split label maps: give --train and --val to the protocol dense.")


@dataclass(frozen=True)
class ReportOptions(Common):
    """Options of `ijepa report`."""

    runs: tuple[str, ...] = option(metavar="RUN", positional=True)
    """One run, or several to compare."""
    out: str | None = option(None, metavar="FILE")
    """File to write (default, of one run: RUN/report.html)."""


@dataclass(frozen=True)
class SourceOptions(Common):
    """Options of every command that reads one source."""

    source: str = option(metavar="SOURCE", positional=True)
    """A folder, tar shards, Parquet files, a list, hf://NAME or synthetic."""


@dataclass(frozen=True)
class PrepareOptions(Common):
    """Options of `ijepa prepare`."""

    source: str = option(metavar="SOURCE", positional=True)
    """The images, remote ones too. With --check: a folder that was prepared."""
    out: str | None = option(None, metavar="OUT", positional=True)
    """Folder for the shards."""
    max_resolution: int = option(256)
    """Shrink images to at most this sqrt(height * width) in pixels."""
    quality: int = option(90)
    """Quality of the JPEG files, from 1 to 100."""
    workers: int | None = option(None)
    """Processes that decode and encode; 0: none besides this one (default: one for each core)."""
    shard_size: int = option(128)
    """Megabytes at which a shard is closed."""
    check: bool = option(False)
    """Compare a prepared folder with its checksums."""

    def __post_init__(self) -> None:
        at_least(1, max_resolution=self.max_resolution, shard_size=self.shard_size)
        at_least(0, workers=self.workers)
        if not 1 <= self.quality <= 100:
            raise RequestError(f"--quality must be at least 1 and at most 100, not {self.quality}.")
        if self.out is None and not self.check:
            raise RequestError("OUT is missing: name the folder for the shards after the source.")
        if self.out is not None and self.check:
            raise RequestError("--check takes one folder, the one that was prepared.")


@dataclass(frozen=True)
class PackOptions(Common):
    """Options of `ijepa inspect masks` and `ijepa inspect packing`."""

    source: str = option(metavar="SOURCE", positional=True)
    """A run, or images: a folder, tar shards, Parquet files, a list, hf://NAME or synthetic."""
    out: str = option(metavar="DIR")
    """Folder for the picture."""
    config: str | None = option(None, metavar="NAME_OR_FILE")
    """A recipe (RECIPES), or a YAML file. Flags override its values."""
    given: Mapping[str, Any] = keys(TrainConfig)


@dataclass(frozen=True)
class DataOptions(SourceOptions):
    """Options of `ijepa inspect data`."""

    out: str = option(metavar="DIR")
    """Folder for the pictures."""


@dataclass(frozen=True)
class ImageOptions(EncoderOptions):
    """Options of every picture of what an encoder makes of images."""

    images: tuple[str, ...] = option(metavar="IMAGE", positional=True)
    """Image files."""
    out: str = option(metavar="DIR")
    """Folder for the pictures."""


@dataclass(frozen=True)
class FeatureOptions(ImageOptions):
    """Options of `ijepa inspect features`."""

    patch: tuple[int, int] | None = option(None, metavar="ROW COLUMN")
    """Show what is similar to this patch, counted from 0."""


@dataclass(frozen=True)
class MergeOptions(ImageOptions):
    """Options of `ijepa inspect merges`."""

    merge_rate: float = option(0.1, metavar="SHARE")
    """Share of its tokens that each layer merges, up to 0.5."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_merge_rate(self.merge_rate)
        if self.merge_rate == 0:
            raise RequestError("--merge-rate 0 merges nothing: choose a rate above 0, up to 0.5.")


@dataclass(frozen=True)
class StudyOptions(Common):
    """Options of `ijepa study`."""

    file: str = option(metavar="FILE", positional=True)
    """YAML file with the arms to compare (docs/study.md)."""
    out: str = option(metavar="DIR")
    """Folder for the runs, the table and the page."""


@dataclass(frozen=True)
class BenchmarkOptions(Common):
    """Options of `ijepa benchmark`."""

    theme: Literal["packing", "loader", "attention", "merging", "step", "embed"] = option(
        metavar="THEME", positional=True
    )
    """packing, loader, attention, merging, step or embed."""
    source: str | None = option(None, metavar="SOURCE")
    """Images to measure with (default: synthetic)."""
    csv: bool = option(False)
    """Write benchmarks/results/THEME_HARDWARE_DATE.csv too."""


INSPECT = {
    "data": Command(
        "Draw some images of a source and their sizes; count labels, colour modes and duplicates.",
        "ijepa inspect data photos --out pictures",
        DataOptions,
        "inspect.data",
    ),
    "masks": Command(
        "Draw the first views that a run trains on: what the student sees, and what it must predict.",
        "ijepa inspect masks photos --out pictures",
        PackOptions,
        "inspect.masks",
    ),
    "packing": Command(
        "Draw the first pack that a run trains on, patch by patch.",
        "ijepa inspect packing runs/pets --out pictures",
        PackOptions,
        "inspect.packing",
    ),
    "features": Command(
        "Draw the features of images as colours, and what is similar to one patch.",
        "ijepa inspect features runs/pets cat.jpg dog.jpg --patch 4 6 --out pictures",
        FeatureOptions,
        "inspect.features",
    ),
    "merges": Command(
        "Draw which patches of images become one token, layer after layer.",
        "ijepa inspect merges runs/pets cat.jpg --merge-rate 0.1 --out pictures",
        MergeOptions,
        "inspect.merges",
    ),
}

COMMANDS: dict[str, Command | Group] = {
    "train": Command(
        "Train an image encoder on your own images, without labels.",
        "ijepa train photos --run runs/pets",
        TrainOptions,
        "train.run",
        ranks=True,
    ),
    "evaluate": Command(
        "Score an encoder on labelled images.",
        "ijepa evaluate runs/pets --data labelled-photos --baselines",
        EvaluateOptions,
        "evaluate.run",
        ranks=True,
    ),
    "report": Command(
        "Write a run as one HTML page, or compare several runs.", "ijepa report runs/pets", ReportOptions, "report.run"
    ),
    "scan": Command(
        "List a source of images: how many, how large, which cannot be read.",
        "ijepa scan photos",
        SourceOptions,
        "scan.run",
    ),
    "prepare": Command(
        "Shrink and re-encode images into tar shards, which are small and fast to read.",
        "ijepa prepare photos shards --max-resolution 256",
        PrepareOptions,
        "prepare.run",
    ),
    "inspect": Group("Draw images, masks, packs, features or merges as pictures.", INSPECT, "picture"),
    "study": Command(
        "Compare ways to train, at an equal budget and over several seeds.",
        "ijepa study study.yaml --out studies/rates",
        StudyOptions,
        "study.run",
    ),
    "benchmark": Command("Measure speed.", "ijepa benchmark packing", BenchmarkOptions, "benchmark.run"),
}
