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
    """Print the results as JSON in the last line of stdout."""
    debug: bool = option(False)
    """Show tracebacks and debug messages."""


@dataclass(frozen=True)
class TrainOptions(Common):
    """Options of `ijepa train`."""

    source: str | None = option(None, metavar="PHOTOS", positional=True)
    """Your images: a folder, tar shards, Parquet files, a CSV or JSONL list, hf://NAME or synthetic. Without
    --config, the recipe is own-images if there is a GPU, otherwise own-images-cpu."""
    config: str | None = option(None, metavar="NAME_OR_FILE")
    """A recipe (RECIPES) or a YAML file. Flags override its values."""
    run: str | None = option(None, metavar="DIR")
    """Folder of the new run. It must not exist (default: runs/TIME)."""
    resume: str | None = option(None, metavar="RUN")
    """Folder of a run to resume from its newest checkpoint."""
    print_config: bool = option(False, flag="--print_config")
    """Print the configuration as YAML and exit."""
    given: Mapping[str, Any] = keys(TrainConfig)


@dataclass(frozen=True)
class EncoderOptions(Common):
    """Options of every command that runs an encoder."""

    run: str = option(metavar="RUN", positional=True)
    """Folder of a run, or a folder that contains config.json and model.safetensors."""
    resolution: int | Literal["native"] | None = option(None, metavar="PIXELS")
    """Resolution to resize images to: sqrt(height * width) in pixels. The aspect ratio is kept. `native` keeps the size
    of each image (default: the largest training resolution)."""

    def __post_init__(self) -> None:
        at_least(1, resolution=None if self.resolution == "native" else self.resolution)


@dataclass(frozen=True)
class EvaluateOptions(EncoderOptions):
    """Options of `ijepa evaluate`."""

    data: str | None = option(None, metavar="SOURCE")
    """Labeled images. The probes are trained on 80% and scored on 20%. The split is stratified by class and depends on
    --seed."""
    train: str | None = option(None, metavar="SOURCE")
    """Labeled images to train the probes on. Requires --val."""
    val: str | None = option(None, metavar="SOURCE")
    """Labeled images to score the probes on. Requires --train."""
    protocols: tuple[str, ...] = option(DEFAULT_PROTOCOLS, metavar="NAME")
    """Evaluation protocols: knn, linear, linear4, lowshot, attentive, finetune, dense (docs/evaluation.md)."""
    baselines: bool = option(False)
    """Also score two baselines: the untrained encoder that the run started from (random start), and raw pixels of 16x16
    thumbnails."""
    random_init: bool = option(False)
    """Score the untrained encoder that the run started from instead of the trained one."""
    merge_rate: float = option(0.0, metavar="SHARE")
    """Fraction of tokens that each layer merges into others, from 0 (no merging) to 0.5."""
    sweep: tuple[str, ...] = option((), metavar="NAME=VALUES")
    """Score every combination of these values, such as resolution=112,224 merge_rate=0,0.05,0.1, and recommend one."""
    out: str | None = option(None, metavar="DIR")
    """Output folder for sweep.csv and sweep.png (default: RUN)."""
    seed: int = option(0)
    """Random seed for the split, the low-shot subsets and training."""
    workers: int | None = option(None)
    """Number of worker processes that decode images. 0: decode in the main process (default: one per CPU core)."""
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
            raise RequestError("Give either --data, or --train and --val. --data is split into both parts.")
        if self.data is None and self.train is None and self.val is None:
            raise RequestError("No images to score on. Give --data SOURCE, or --train SOURCE and --val SOURCE.")
        for missing, there in (("train", "val"), ("val", "train")):
            if self.data is None and getattr(self, missing) is None:
                raise RequestError(
                    f"--{there} also needs --{missing}. Or give --data SOURCE, which is split into both."
                )
        if self.data is not None and "dense" in self.protocols:
            raise RequestError("The protocol dense cannot split --data. Give --train and --val instead.")


@dataclass(frozen=True)
class ReportOptions(Common):
    """Options of `ijepa report`."""

    runs: tuple[str, ...] = option(metavar="RUN", positional=True)
    """Folder of a run, or of several runs to compare."""
    out: str | None = option(None, metavar="FILE")
    """HTML file to write. Several runs require it (default for one run: RUN/report.html)."""


@dataclass(frozen=True)
class SourceOptions(Common):
    """Options of every command that reads one source."""

    source: str = option(metavar="SOURCE", positional=True)
    """Images: a folder, tar shards, Parquet files, a CSV or JSONL list, hf://NAME or synthetic."""


@dataclass(frozen=True)
class PrepareOptions(Common):
    """Options of `ijepa prepare`."""

    source: str = option(metavar="SOURCE", positional=True)
    """Images to prepare, local or remote, such as https://... (docs/data.md). With --check: a prepared folder."""
    out: str | None = option(None, metavar="OUT", positional=True)
    """Output folder for the shards."""
    max_resolution: int = option(256)
    """Largest resolution: sqrt(height * width) in pixels. Larger images are shrunk; smaller images keep their size."""
    quality: int = option(90)
    """JPEG quality, from 1 to 100."""
    workers: int | None = option(None)
    """Number of worker processes that decode and encode images. 0: use the main process (default: one per CPU core)."""
    shard_size: int = option(128)
    """Size of a shard in megabytes. When a shard reaches it, the next one begins."""
    check: bool = option(False)
    """Verify the checksums of a prepared folder."""

    def __post_init__(self) -> None:
        at_least(1, max_resolution=self.max_resolution, shard_size=self.shard_size)
        at_least(0, workers=self.workers)
        if not 1 <= self.quality <= 100:
            raise RequestError(f"--quality must be at least 1 and at most 100, not {self.quality}.")
        if self.out is None and not self.check:
            raise RequestError("OUT is missing. Give the output folder: ijepa prepare SOURCE OUT.")
        if self.out is not None and self.check:
            raise RequestError("--check takes only one folder, the prepared one. Remove OUT.")


@dataclass(frozen=True)
class PackOptions(Common):
    """Options of `ijepa inspect masks` and `ijepa inspect packing`."""

    source: str = option(metavar="SOURCE", positional=True)
    """Folder of a run, whose saved configuration is used; or images:
    a folder, tar shards, Parquet files, a CSV or JSONL list, hf://NAME or synthetic."""
    out: str = option(metavar="DIR")
    """Output folder for the picture."""
    config: str | None = option(None, metavar="NAME_OR_FILE")
    """A recipe (RECIPES) or a YAML file. Flags override its values."""
    given: Mapping[str, Any] = keys(TrainConfig)


@dataclass(frozen=True)
class DataOptions(SourceOptions):
    """Options of `ijepa inspect data`."""

    out: str = option(metavar="DIR")
    """Output folder for the pictures."""


@dataclass(frozen=True)
class ImageOptions(EncoderOptions):
    """Options of every picture of what an encoder makes of images."""

    images: tuple[str, ...] = option(metavar="IMAGE", positional=True)
    """Image files."""
    out: str = option(metavar="DIR")
    """Output folder for the pictures."""


@dataclass(frozen=True)
class FeatureOptions(ImageOptions):
    """Options of `ijepa inspect features`."""

    patch: tuple[int, int] | None = option(None, metavar="ROW COLUMN")
    """Also draw the similarity of every patch to this one. Rows and columns start at 0."""


@dataclass(frozen=True)
class MergeOptions(ImageOptions):
    """Options of `ijepa inspect merges`."""

    merge_rate: float = option(0.1, metavar="SHARE")
    """Fraction of tokens that each layer merges into others, up to 0.5."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_merge_rate(self.merge_rate)
        if self.merge_rate == 0:
            raise RequestError("--merge-rate 0 merges nothing. Give a rate above 0, up to 0.5.")


@dataclass(frozen=True)
class StudyOptions(Common):
    """Options of `ijepa study`."""

    file: str = option(metavar="FILE", positional=True)
    """YAML file with the configurations to compare, called arms (docs/study.md)."""
    out: str = option(metavar="DIR")
    """Output folder for the runs, study.csv, summary.csv and report.html."""


@dataclass(frozen=True)
class BenchmarkOptions(Common):
    """Options of `ijepa benchmark`."""

    theme: Literal["packing", "loader", "attention", "merging", "step", "embed"] = option(
        metavar="BENCHMARK", positional=True
    )
    """Which benchmark to run: packing, loader, attention, merging, step (a training step) or embed."""
    source: str | None = option(None, metavar="SOURCE")
    """Images to use (default: synthetic). The attention benchmark uses none."""
    csv: bool = option(False)
    """Also write benchmarks/results/BENCHMARK_HARDWARE_DATE.csv."""


INSPECT = {
    "data": Command(
        "Draw a sample of images and their sizes; count labels, color modes and duplicates.",
        "ijepa inspect data photos --out pictures",
        DataOptions,
        "inspect.data",
    ),
    "masks": Command(
        "Draw the masks of the first training views: the visible context and the targets to predict.",
        "ijepa inspect masks photos --out pictures",
        PackOptions,
        "inspect.masks",
    ),
    "packing": Command(
        "Draw the first training pack, patch by patch.",
        "ijepa inspect packing runs/pets --out pictures",
        PackOptions,
        "inspect.packing",
    ),
    "features": Command(
        "Draw the patch features of images as colors, and their similarity to one patch.",
        "ijepa inspect features runs/pets cat.jpg dog.jpg --patch 4 6 --out pictures",
        FeatureOptions,
        "inspect.features",
    ),
    "merges": Command(
        "Draw which patches each layer merges into one token.",
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
        "Score an encoder on labeled images.",
        "ijepa evaluate runs/pets --data labeled-photos --baselines",
        EvaluateOptions,
        "evaluate.run",
        ranks=True,
    ),
    "report": Command(
        "Write an HTML report of a run, or a comparison of several runs.",
        "ijepa report runs/pets",
        ReportOptions,
        "report.run",
    ),
    "scan": Command(
        "Scan images: count them, summarize their sizes and list unreadable ones.",
        "ijepa scan photos",
        SourceOptions,
        "scan.run",
    ),
    "prepare": Command(
        "Shrink images and re-encode them as JPEG files in tar shards, for faster reading.",
        "ijepa prepare photos shards --max-resolution 256",
        PrepareOptions,
        "prepare.run",
    ),
    "inspect": Group("Draw images, masks, packs, features or token merges.", INSPECT, "subcommand"),
    "study": Command(
        "Compare training configurations over several seeds, at an equal budget.",
        "ijepa study study.yaml --out studies/rates",
        StudyOptions,
        "study.run",
    ),
    "benchmark": Command(
        "Measure the speed of one part, such as data loading, a training step or embedding.",
        "ijepa benchmark packing",
        BenchmarkOptions,
        "benchmark.run",
    ),
}
