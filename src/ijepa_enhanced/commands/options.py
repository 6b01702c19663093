"""The options of every command of `ijepa`. The docstring of a field is its help."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from ijepa_enhanced.errors import RequestError, unknown
from ijepa_enhanced.evaluate.config import FinetuneConfig
from ijepa_enhanced.serve.config import Limits
from ijepa_enhanced.train.config import TrainConfig

PROTOCOLS = ("knn", "linear", "linear4", "lowshot", "attentive", "finetune", "dense")
DEFAULT_PROTOCOLS = ("knn", "linear")


def option(default: Any = dataclasses.MISSING, *, metavar: str = "", positional: bool = False) -> Any:
    """Return a field that is an option, or a positional argument; without a default it must be given.

    Args:
        default: its value if it is not given.
        metavar: what the help calls its value.
        positional: whether it is given by its place.
    """
    return dataclasses.field(default=default, metadata={"metavar": metavar, "positional": positional}, kw_only=True)


def keys(config: type[Any], prefix: str = "", shown: tuple[str, ...] = ("",), hidden: tuple[str, ...] = ()) -> Any:
    """Return a field with the keys of a configuration that were given, each by a flag of its own.

    Args:
        config: the dataclass that has the keys.
        prefix: of the flags, after the dashes.
        shown: the help lists the keys that start with one of these.
        hidden: keys that it does not list nevertheless.
    """
    return dataclasses.field(
        default_factory=dict,
        metadata={"config": config, "prefix": prefix, "shown": shown, "hidden": hidden},
        kw_only=True,
    )


def at_least(least: int, **values: float | None) -> None:
    """Check options that were given against their smallest value.

    Raises:
        RequestError: a value is too small.
    """
    for name, value in values.items():
        if value is not None and value < least:
            raise RequestError(f"--{name.replace('_', '-')} must be at least {least}, not {value}.")


def check_merge_rate(rate: float, option: str = "--merge-rate") -> None:
    """Raise RequestError if no encoder can merge at the rate that an option gives."""
    if not 0 <= rate <= 0.5:
        raise RequestError(f"{option} must be between 0 and 0.5, not {rate}.")


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

    source: str | None = option(None, metavar="SOURCE", positional=True)
    """Your images: a folder, tar shards, Parquet files, a CSV or JSONL list, hf://NAME or synthetic. If --config is
    not given, settings come from the recipe continue (with --init), from-teacher (with --teacher), own-images (with a
    GPU) or own-images-cpu (without). If SOURCE is also omitted, the defaults below apply, with the built-in synthetic
    images."""
    config: str | None = option(None, metavar="NAME_OR_FILE")
    """Settings to start from: a recipe (RECIPES) or a YAML file. Other options override them."""
    run: str | None = option(None, metavar="DIR")
    """Folder to create for this run: configuration, log, checkpoints, encoder and report. It must not exist.
    (default: runs/TIME)"""
    resume: str | None = option(None, metavar="RUN")
    """Folder of an interrupted run. Training continues from its newest checkpoint."""
    print_config: bool = option(False)
    """Print the configuration as YAML and exit."""
    given: Mapping[str, Any] = keys(TrainConfig)


@dataclass(frozen=True)
class ResolutionOptions(Common):
    """Options of every command that shows images to an encoder."""

    resolution: int | Literal["native"] | None = option(None, metavar="PIXELS")
    """Resolution to resize images to: sqrt(height * width) in pixels. The aspect ratio is kept. `native` keeps the size
    of each image. (default: the maximum training resolution)"""

    def __post_init__(self) -> None:
        at_least(1, resolution=None if self.resolution == "native" else self.resolution)


@dataclass(frozen=True)
class InferenceOptions(ResolutionOptions):
    """Options of every command that runs an encoder over a whole source."""

    merge_rate: float = option(0.0)
    """Fraction of its tokens that each layer merges into similar ones, from 0 (no merging) to 0.5. Merging makes the
    encoder faster (docs/merging.md)."""
    workers: int | None = option(None)
    """Number of worker processes that decode images. 0: decode in the main process. (default: one per CPU core)"""

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(0, workers=self.workers)
        check_merge_rate(self.merge_rate)


@dataclass(frozen=True)
class EncoderOptions(ResolutionOptions):
    """Options of every command that takes the encoder as its argument."""

    run: str = option(metavar="RUN", positional=True)
    """A run, a folder with an encoder, or released weights: a folder, a file or a Hub id (docs/weights.md)."""


@dataclass(frozen=True)
class EvaluateOptions(EncoderOptions, InferenceOptions):
    """Options of `ijepa evaluate`."""

    data: str | None = option(None, metavar="SOURCE")
    """Labeled images. Classifiers (probes) are trained on the features of 80% of them and scored on the other 20%. The
    split is stratified by class and depends on --seed."""
    train: str | None = option(None, metavar="SOURCE")
    """Labeled images to train the probes on. Requires --val."""
    val: str | None = option(None, metavar="SOURCE")
    """Labeled images to score the probes on. Requires --train."""
    protocols: tuple[str, ...] = option(DEFAULT_PROTOCOLS, metavar="NAME")
    """Evaluation protocols: knn, linear (linear probe), linear4 (linear probes on the last four layers), lowshot
    (linear probes with 1% and 10% of the labels), attentive (attention probe), finetune (train the whole encoder),
    dense (segmentation). See docs/evaluation.md."""
    baselines: bool = option(False)
    """Also score two baselines: the encoder that the run started from, called start (untrained, or the weights of
    --init), and raw pixels (16x16 thumbnails; for dense, patches)."""
    start: bool = option(False)
    """Score the encoder that the run started from instead of the trained one."""
    sweep: tuple[str, ...] = option((), metavar="NAME=VALUES")
    """Score every combination of values of resolution and merge_rate, and recommend one. Example:
    --sweep resolution=112,224 merge_rate=0,0.05,0.1"""
    out: str | None = option(None, metavar="DIR")
    """Output folder for sweep.csv and sweep.png. (default: RUN)"""
    seed: int = option(0)
    """Random seed for the split, the low-shot subsets and training."""
    finetune: Mapping[str, Any] = keys(FinetuneConfig, "finetune.")

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(0, seed=self.seed)
        for protocol in self.protocols:
            if protocol not in PROTOCOLS:
                raise RequestError(unknown("protocol", protocol, list(PROTOCOLS)))
        if self.finetune and "finetune" not in self.protocols:
            raise RequestError(f"--finetune.{next(iter(self.finetune))} has no effect without --protocols finetune.")
        self.check_sources()

    def check_sources(self) -> None:
        """Raise RequestError if the images to learn from and to score on are not given once."""
        if self.data is not None and (self.train is not None or self.val is not None):
            raise RequestError("Use either --data, or both --train and --val. --data is split into both.")
        if self.data is None and self.train is None and self.val is None:
            raise RequestError("No labeled images were given. Use --data SOURCE, or --train SOURCE and --val SOURCE.")
        for missing, there in (("train", "val"), ("val", "train")):
            if self.data is None and getattr(self, missing) is None:
                raise RequestError(f"--{there} requires --{missing}. Or use --data SOURCE, which is split into both.")
        if self.data is not None and "dense" in self.protocols:
            raise RequestError("The protocol dense does not support --data. Use --train and --val instead.")


@dataclass(frozen=True)
class ReportOptions(Common):
    """Options of `ijepa report`."""

    runs: tuple[str, ...] = option(metavar="RUN", positional=True)
    """One or more run folders. Several runs are compared on one page."""
    out: str | None = option(None, metavar="FILE")
    """HTML file to write. Required for several runs. (default for one run: RUN/report.html)"""


@dataclass(frozen=True)
class SourceOptions(Common):
    """Options of every command that reads one source."""

    source: str = option(metavar="SOURCE", positional=True)
    """Images: a folder, tar shards, Parquet files, a CSV or JSONL list, hf://NAME or synthetic."""


@dataclass(frozen=True)
class ScanOptions(SourceOptions):
    """Options of `ijepa scan`."""

    stats: bool = option(False)
    """Also measure the mean and standard deviation of each channel, in at most 4,096 images. `ijepa train` needs them
    if data.channels is not 3, and measures them itself if they are not in the catalog."""


@dataclass(frozen=True)
class EmbedOptions(SourceOptions, InferenceOptions):
    """Options of `ijepa embed`."""

    weights: str = option(metavar="RUN")
    """A run, a folder with an encoder, or released weights: a folder, a file or a Hub id (docs/weights.md)."""
    out: str = option(metavar="DIR")
    """Output folder. Each file in it holds the rows of 1,024 images or more."""
    format: Literal["parquet", "npy", "csv"] = option("parquet")
    """parquet: one column with the feature of each image. npy: arrays [images, D], and a CSV file with the other
    columns. csv: a column for each number of a feature."""
    dtype: Literal["float32", "float16"] = option("float32")
    """Data type of the stored features."""
    layers: int = option(1)
    """Number of last layers to store. 1: only the last one. Others get columns of their own, such as layer_11."""
    tokens: bool = option(False)
    """Also store the feature of every patch, as float16. Requires --format parquet."""
    shard: str | None = option(None, metavar="I/N")
    """Write only the I-th of N parts of the files, I from 1 to N. Several processes or machines can so share the work,
    without communication, and with the same DIR."""
    resume: bool = option(False)
    """Continue in a folder that contains some of the files, or start if it contains none."""
    engine: Literal["local", "ray"] = option("local")
    """local: this machine, or all processes of torchrun. ray: the actors of a Ray cluster (docs/scaling.md)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(1, layers=self.layers)
        if not self.out:
            raise RequestError("--out must not be empty.")
        if self.engine == "ray" and self.workers is not None:
            raise RequestError("--workers has no effect with --engine ray: the CPUs of the cluster decode. Remove it.")
        if self.tokens and self.format != "parquet":
            raise RequestError(f"--tokens requires --format parquet, not {self.format}.")
        self.part()

    def part(self) -> tuple[int, int]:
        """Return I and N of --shard.

        Raises:
            RequestError: it is not written as I/N, or I is not from 1 to N.
        """
        if self.shard is None:
            return 1, 1
        number, _, count = self.shard.partition("/")
        if not (number.isdecimal() and count.isdecimal()) or not 1 <= int(number) <= int(count):
            raise RequestError(f"--shard must be I/N with I from 1 to N, for example 1/4, not {self.shard}.")
        return int(number), int(count)


@dataclass(frozen=True)
class SearchOptions(Common):
    """Options of `ijepa search`."""

    folder: str = option(metavar="DIR", positional=True)
    """Output folder of `ijepa embed`, with Parquet files."""
    queries: tuple[str, ...] = option((), metavar="QUERY", positional=True)
    """Image files to find similar images of. They are embedded with the settings of DIR."""
    key: tuple[str, ...] = option((), metavar="KEY")
    """Keys of images in DIR to find similar images of."""
    count: int | None = option(None)
    """Number of matches of each query. (default: 10)"""
    duplicates: bool = option(False)
    """List near-duplicates: each image that is similar to an earlier one, with the most similar earlier one."""
    threshold: float | None = option(None, metavar="COSINE")
    """Lowest cosine similarity of near-duplicates, above 0 and at most 1 (docs/tasks/search.md). (default: 0.998)"""
    index: bool = option(False)
    """Use an approximate index, which is built once and stored in DIR. It is always used for more than 1,000,000
    images. Requires usearch."""
    weights: str | None = option(None, metavar="RUN")
    """Folder of the encoder that DIR was made with, if it has moved."""
    out: str | None = option(None, metavar="FILE")
    """Contact sheet to write, a PNG file. (default: DIR/_search.png)"""

    def __post_init__(self) -> None:
        at_least(1, count=self.count)
        if not (self.queries or self.key or self.duplicates):
            raise RequestError("Nothing to search for. Give QUERY images, --key or --duplicates.")
        if self.duplicates and (self.queries or self.key):
            raise RequestError("--duplicates compares all images of DIR. Remove QUERY and --key, or --duplicates.")
        if self.threshold is not None and not 0 < self.threshold <= 1:
            raise RequestError(f"--threshold must be above 0 and at most 1, not {self.threshold:g}.")
        for name, given, needs, met in (
            ("threshold", self.threshold, "--duplicates", self.duplicates),
            ("count", self.count, "QUERY or --key", not self.duplicates),
            ("weights", self.weights, "QUERY images", bool(self.queries)),
        ):
            if given is not None and not met:
                raise RequestError(f"--{name} only has an effect with {needs}. Remove it.")
        if self.out is not None and not self.out.lower().endswith(".png"):
            raise RequestError(f"--out must be a PNG file, not {self.out}.")


@dataclass(frozen=True)
class ServeOptions(Common):
    """Options of `ijepa serve`."""

    weights: str = option(metavar="WEIGHTS", positional=True)
    """A run, a folder with an encoder, or released weights: a folder, a file or a Hub id (docs/weights.md)."""
    port: int = option(8000)
    """Port to listen on. 0: any free port."""
    host: str = option("127.0.0.1")
    """Address to listen on. By default, only this machine can connect. 0.0.0.0: all addresses."""
    gallery: str | None = option(None, metavar="DIR")
    """Output folder of `ijepa embed`, made with the same encoder. The page then shows similar images from it."""
    token_file: str | None = option(None, metavar="FILE")
    """File with a secret token. Clients must send it: `Authorization: Bearer TOKEN`."""
    cors: tuple[str, ...] = option((), metavar="ORIGIN")
    """Other web pages that may use the service, such as https://example.org."""
    max_bytes: int = option(Limits.max_bytes)
    """Largest size of a request, in bytes."""
    max_pixels: int = option(Limits.max_pixels)
    """Largest size of an image, in pixels (width * height)."""
    max_images: int = option(Limits.max_images)
    """Largest number of images in a request."""
    timeout: float = option(Limits.timeout, metavar="SECONDS")
    """Longest time that a request may take. Slower ones are cancelled."""
    queue: int = option(Limits.queue)
    """Largest number of images that wait or are processed. Requests beyond it are told to try again later."""
    tokens_per_pack: int | None = option(Limits.tokens_per_pack)
    """Largest number of patches that the encoder processes at once. Larger images are shrunk to it.
    (default: 4096 on a CPU, 16384 on a GPU)"""
    max_wait: float = option(Limits.max_wait, metavar="MILLISECONDS")
    """Longest time that an idle encoder waits for more images."""

    def __post_init__(self) -> None:
        at_least(1, max_bytes=self.max_bytes, max_pixels=self.max_pixels, max_images=self.max_images)
        at_least(1, timeout=self.timeout, queue=self.queue, tokens_per_pack=self.tokens_per_pack)
        at_least(0, port=self.port, max_wait=self.max_wait)
        if self.port > 65535:
            raise RequestError(f"--port must be at most 65535, not {self.port}.")
        if self.queue < self.max_images:
            raise RequestError(
                f"--queue must be at least --max-images ({self.max_images}), not {self.queue}: a full request would "
                "never have room."
            )
        for origin in self.cors:
            if not re.fullmatch(r"https?://[^/*\s]+", origin):
                raise RequestError(f"--cors needs origins such as https://example.org, not '{origin}'.")

    def limits(self) -> Limits:
        """Return the limits of the service."""
        return Limits(**{field.name: getattr(self, field.name) for field in dataclasses.fields(Limits)})


@dataclass(frozen=True)
class ConvertOptions(Common):
    """Options of `ijepa convert`."""

    weights: str = option(metavar="IN", positional=True)
    """Released weights: a folder of transformers or timm, a checkpoint of I-JEPA's own code, a file of weights with its
    config.json beside it, or a Hub id such as facebook/dinov2-small."""
    out: str = option(metavar="OUT", positional=True)
    """Folder to write config.json and model.safetensors to."""
    encoder: Literal["target", "context"] = option("target")
    """Which encoder of an I-JEPA checkpoint. The paper evaluates the target encoder."""


@dataclass(frozen=True)
class ExportOptions(Common):
    """Options of every `ijepa export`."""

    weights: str = option(metavar="WEIGHTS", positional=True)
    """A run, a folder with an encoder, or released weights: a folder, a file or a Hub id (docs/weights.md)."""
    out: str = option(metavar="OUT", positional=True)
    """File to write. It must not exist."""
    grid: str | None = option(None, metavar="ROWSxCOLUMNS")
    """Size of the images in patches, such as 14x14. (default: any height and width)"""

    def __post_init__(self) -> None:
        self.rows_and_columns()

    def rows_and_columns(self) -> tuple[int, int] | None:
        """Return the numbers of --grid, or None if it is not given.

        Raises:
            RequestError: it is not written as ROWSxCOLUMNS, or one of them is 0.
        """
        if self.grid is None:
            return None
        rows, _, columns = self.grid.partition("x")
        if not (rows.isdecimal() and columns.isdecimal() and int(rows) and int(columns)):
            raise RequestError(f"--grid must be ROWSxCOLUMNS, both at least 1, for example 14x14, not {self.grid}.")
        return int(rows), int(columns)


@dataclass(frozen=True)
class ProgramOptions(ExportOptions):
    """Options of `ijepa export onnx` and `ijepa export torch`."""

    batch: int = option(1)
    """Number of images at once, all of the same height and width."""
    merge_rate: float = option(0.0)
    """Fraction of its tokens that each layer merges into similar ones, from 0 (no merging) to 0.5. Requires --grid."""

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(1, batch=self.batch)
        check_merge_rate(self.merge_rate)
        if self.merge_rate and self.grid is None:
            raise RequestError(
                "--merge-rate requires --grid ROWSxCOLUMNS, because how many tokens merge depends on the size."
            )


@dataclass(frozen=True)
class TransformersOptions(ExportOptions):
    """Options of `ijepa export transformers`."""

    out: str = option(metavar="OUT", positional=True)
    """Folder to create."""
    grid: str | None = option(None, metavar="ROWSxCOLUMNS")
    """Size of the images in patches, such as 14x14, that positions are computed for. (default: a square of the trained
    resolution)"""


@dataclass(frozen=True)
class PrepareOptions(Common):
    """Options of `ijepa prepare`."""

    source: str = option(metavar="SOURCE", positional=True)
    """Images to prepare: a source as for `ijepa train`, or a remote one such as https://host/train-{000..099}.tar
    (docs/data.md). With --check: a prepared folder."""
    out: str | None = option(None, metavar="OUT", positional=True)
    """Output folder for the shards."""
    max_resolution: int = option(256)
    """Maximum resolution, sqrt(height * width) in pixels. Larger images are downscaled; smaller images keep their
    size."""
    quality: int = option(90)
    """JPEG quality, from 1 to 100."""
    workers: int | None = option(None)
    """Number of worker processes that decode and encode images. 0: use the main process.
    (default: one per CPU core)"""
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
            raise RequestError("The output folder was not given. Add OUT: ijepa prepare SOURCE OUT.")
        if self.out is not None and self.check:
            raise RequestError("--check takes only the prepared folder. Remove OUT.")


@dataclass(frozen=True)
class PackOptions(Common):
    """Options of `ijepa inspect masks` and `ijepa inspect packing`."""

    source: str = option(metavar="SOURCE", positional=True)
    """A run folder, whose saved configuration is used, or images: a folder, tar shards, Parquet files, a CSV or JSONL
    list, hf://NAME or synthetic."""
    out: str = option(metavar="DIR")
    """Output folder for masks.png (`inspect masks`) or packing.png (`inspect packing`)."""
    config: str | None = option(None, metavar="NAME_OR_FILE")
    """Settings to start from: a recipe (RECIPES) or a YAML file. Other options override them. If it is not given, the
    recipe is the one that `ijepa train SOURCE` uses."""
    given: Mapping[str, Any] = keys(
        TrainConfig, shown=("data.", "augment.", "masks.", "encoder.patch_size", "seed"), hidden=("data.source",)
    )


@dataclass(frozen=True)
class DataOptions(SourceOptions):
    """Options of `ijepa inspect data`."""

    out: str = option(metavar="DIR")
    """Output folder for images.png, sizes.png and duplicates.png."""


@dataclass(frozen=True)
class ImageOptions(EncoderOptions):
    """Options of every picture of what an encoder makes of images."""

    images: tuple[str, ...] = option(metavar="IMAGE", positional=True)
    """Image files."""


@dataclass(frozen=True)
class FeatureOptions(ImageOptions):
    """Options of `ijepa inspect features`."""

    out: str = option(metavar="DIR")
    """Output folder for features.png."""
    patch: tuple[int, int] | None = option(None, metavar="ROW COLUMN")
    """Also draw the similarity of every patch to this one. Rows and columns start at 0."""


@dataclass(frozen=True)
class MergeOptions(ImageOptions):
    """Options of `ijepa inspect merges`."""

    out: str = option(metavar="DIR")
    """Output folder for a picture of each image, merges-NN-NAME.png."""
    merge_rate: float = option(0.1)
    """Fraction of its tokens that each layer merges into similar ones, above 0 and at most 0.5. Merging makes the
    encoder faster (docs/merging.md)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.merge_rate <= 0.5:
            raise RequestError(f"--merge-rate must be above 0 and at most 0.5, not {self.merge_rate:g}.")


@dataclass(frozen=True)
class StudyOptions(Common):
    """Options of `ijepa study`."""

    file: str = option(metavar="FILE", positional=True)
    """YAML file with the configurations to compare, called arms (docs/tasks/study.md)."""
    out: str = option(metavar="DIR")
    """Output folder for the runs, study.csv, summary.csv and report.html."""


@dataclass(frozen=True)
class BenchmarkOptions(Common):
    """Options of `ijepa benchmark`."""

    theme: Literal["packing", "loader", "attention", "merging", "step", "embed", "search"] = option(
        metavar="BENCHMARK", positional=True
    )
    """Benchmark to run: packing (padding and use of the token budget), loader (data loading), attention (attention
    kernels), merging (token merging), step (training step), embed (feature extraction) or search (similar images)."""
    source: str | None = option(None, metavar="SOURCE")
    """Images to use. The attention and search benchmarks use none. (default: synthetic)"""
    tokens: int | None = option(None)
    """Number of tokens in a pack. Only the step benchmark uses it. (default: 2048 on a CPU, 32768 on a GPU)"""
    csv: bool = option(False)
    """Also write benchmarks/results/BENCHMARK_HARDWARE_DATE.csv in the current folder."""

    def __post_init__(self) -> None:
        if self.tokens is not None and self.theme != "step":
            raise RequestError(f"`ijepa benchmark {self.theme}` does not use --tokens. Remove it.")
