"""Every command of `ijepa`: what it does, its options, and the function that runs it.

A command is imported when it runs, so that `--help` needs no torch.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass

from ijepa_enhanced.commands.interrupts import raise_at_interrupt
from ijepa_enhanced.commands.options import (
    BenchmarkOptions,
    Common,
    ConvertOptions,
    DataOptions,
    EmbedOptions,
    EvaluateOptions,
    FeatureOptions,
    MergeOptions,
    PackOptions,
    PrepareOptions,
    ProgramOptions,
    ReportOptions,
    ScanOptions,
    SearchOptions,
    ServeOptions,
    StudyOptions,
    TrainOptions,
    TransformersOptions,
)


@dataclass(frozen=True)
class Command:
    """One command."""

    purpose: str
    """The first line of its help."""
    examples: tuple[str, ...]
    """Lines that a user can copy."""
    options: type[Common]
    function: str
    """The module in `commands` and the function in it that turns the options into an exit code."""
    ranks: bool = False
    """Whether processes that `torchrun` starts share the work."""
    usage: str = ""
    """Its arguments in the usage line, if that is not what must be given and [OPTIONS]."""
    note: str = ""
    """What its help says about all of its options."""
    less_memory: str = ""
    """How to make it need less GPU memory, after "or"."""

    def run(self, options: Common) -> int:
        """Import the command, run it and return the exit code."""
        module, _, name = self.function.partition(".")
        function = getattr(importlib.import_module(f"ijepa_enhanced.commands.{module}"), name)
        raise_at_interrupt()
        code: int = function(options)
        return code


@dataclass(frozen=True)
class Group:
    """A name with commands of its own."""

    purpose: str
    examples: tuple[str, ...]
    commands: Mapping[str, Command | Group]
    kind: str
    """What one of its commands is called."""


PACK_NOTE = """\
All training options of `ijepa train` are accepted, but SOURCE replaces --data.source. The options about images, views
and masks are listed below. If SOURCE is a run folder, --config and the training options are ignored."""
STUDY_NOTE = """\
example of FILE, which compares two patch embeddings:
  val: labeled-photos
  common: --config own-images-cpu --data.source photos
  arms: {linear: --encoder.patch_embed linear, mlp: --encoder.patch_embed mlp}"""

INSPECT = {
    "data": Command(
        "Draw a sample of images and their sizes, and count classes, color modes and duplicates.",
        ("ijepa inspect data photos --out pictures",),
        DataOptions,
        "inspect.data",
    ),
    "masks": Command(
        "Draw the masks of the first training views: the visible context and the targets to predict.",
        ("ijepa inspect masks photos --out pictures",),
        PackOptions,
        "inspect.masks",
        note=PACK_NOTE,
    ),
    "packing": Command(
        "Draw the first training batch (pack): the patches of all its views, side by side.",
        ("ijepa inspect packing runs/pets --out pictures",),
        PackOptions,
        "inspect.packing",
        note=PACK_NOTE,
    ),
    "features": Command(
        "Draw patch features as colors and, with --patch, the similarity of all patches to one of them.",
        ("ijepa inspect features runs/pets cat.jpg dog.jpg --patch 4 6 --out pictures",),
        FeatureOptions,
        "inspect.features",
        less_memory="lower --resolution",
    ),
    "merges": Command(
        "Draw which patches each token represents after a third, two thirds and all of the layers.",
        ("ijepa inspect merges runs/pets cat.jpg --merge-rate 0.1 --out pictures",),
        MergeOptions,
        "inspect.merges",
        less_memory="lower --resolution",
    ),
}

EXPORT = {
    "transformers": Command(
        "Write a folder that transformers loads: IJepa, ViT, Dinov2 or DINOv3.",
        ("ijepa export transformers runs/pets pets-transformers",),
        TransformersOptions,
        "export.to_transformers",
    ),
    "onnx": Command(
        "Write an ONNX file for images of any size, or of one size, and check it in ONNX Runtime.",
        (
            "ijepa export onnx runs/pets pets.onnx",
            "ijepa export onnx runs/pets pets.onnx --grid 14x14 --batch 8 --merge-rate 0.05",
        ),
        ProgramOptions,
        "export.to_onnx",
    ),
    "torch": Command(
        "Write a file of torch.export, which runs without this package, and check it.",
        ("ijepa export torch runs/pets pets.pt2",),
        ProgramOptions,
        "export.to_torch",
    ),
}

COMMANDS: dict[str, Command | Group] = {
    "train": Command(
        "Train an image encoder on your own images, without labels.",
        (
            "ijepa train photos --run runs/pets",
            "ijepa train photos --config own-images --optim.lr 0.0003",
            "ijepa train --resume runs/pets",
        ),
        TrainOptions,
        "train.run",
        ranks=True,
        note="The defaults below apply if no recipe is used. A recipe (--config, or the one chosen for SOURCE)\n"
        "may set other values: add --print-config to your command to see them.",
        less_memory="lower --data.tokens_per_pack",
    ),
    "evaluate": Command(
        "Score an encoder on labeled images.",
        (
            "ijepa evaluate runs/pets --data labeled-photos --baselines",
            "ijepa evaluate runs/pets --train photos/train --val photos/val --protocols knn linear attentive",
        ),
        EvaluateOptions,
        "evaluate.run",
        ranks=True,
        usage="RUN (--data SOURCE | --train SOURCE --val SOURCE) [OPTIONS]",
        less_memory="lower --resolution",
    ),
    "embed": Command(
        "Write the features of all images of a source into Parquet, NumPy or CSV files.",
        (
            "ijepa embed photos --weights runs/pets --out embeddings",
            "ijepa embed photos --weights runs/pets --out embeddings --resume",
        ),
        EmbedOptions,
        "embed.run",
        ranks=True,
        less_memory="lower --resolution",
    ),
    "search": Command(
        "Find images that are similar to a query, or near-duplicates, in a folder of `ijepa embed`.",
        (
            "ijepa search embeddings cat.jpg",
            "ijepa search embeddings --key pets/cat1.jpg pets/cat2.jpg --count 5",
            "ijepa search embeddings --duplicates --out duplicates.png",
        ),
        SearchOptions,
        "search.run",
        usage="DIR (QUERY ... | --key KEY ... | --duplicates) [OPTIONS]",
    ),
    "serve": Command(
        "Serve an encoder over HTTP, with a page to look through it.",
        (
            "ijepa serve runs/pets",
            "ijepa serve runs/pets --gallery embeddings --port 9000",
            "ijepa serve facebook/dinov2-small --host 0.0.0.0 --token-file token.txt",
        ),
        ServeOptions,
        "serve.run",
        less_memory="lower --tokens-per-pack",
    ),
    "report": Command(
        "Write an HTML report of one run, or one that compares several runs.",
        ("ijepa report runs/pets", "ijepa report runs/pets runs/pets-mlp --out compare.html"),
        ReportOptions,
        "report.run",
    ),
    "scan": Command(
        "Scan images: count them, summarize their sizes and list unreadable ones.",
        ("ijepa scan photos", "ijepa scan tiles --stats"),
        ScanOptions,
        "scan.run",
    ),
    "prepare": Command(
        "Downscale images and re-encode them as JPEG files in tar shards, for faster reading.",
        ("ijepa prepare photos shards --max-resolution 256", "ijepa prepare shards --check"),
        PrepareOptions,
        "prepare.run",
        usage="SOURCE OUT [OPTIONS]\n       ijepa prepare FOLDER --check",
    ),
    "inspect": Group(
        "Draw the data, the masks, a training batch, or what an encoder sees in images.",
        ("ijepa inspect masks photos --out pictures",),
        INSPECT,
        "subcommand",
    ),
    "convert": Command(
        "Import released weights: I-JEPA, DINOv2, DINOv3, ViT and NaFlexViT.",
        (
            "ijepa convert facebook/dinov2-small weights/dinov2-small",
            "ijepa convert IN1K-vit.h.14-300e.pth.tar weights/ijepa-huge",
        ),
        ConvertOptions,
        "convert.run",
    ),
    "export": Group(
        "Write an encoder as a transformers folder, an ONNX file or a torch.export file.",
        ("ijepa export onnx runs/pets pets.onnx",),
        EXPORT,
        "format",
    ),
    "study": Command(
        "Train several configurations with several seeds each, and compare their scores.",
        ("ijepa study rates.yaml --out studies/rates",),
        StudyOptions,
        "study.run",
        note=STUDY_NOTE,
        less_memory="lower --data.tokens_per_pack in the study file",
    ),
    "doctor": Command(
        "Check this installation and this machine, with advice for what is missing.",
        ("ijepa doctor",),
        Common,
        "doctor.run",
    ),
    "benchmark": Command(
        "Measure the speed of data loading, attention, token merging, a training step, embedding or search.",
        ("ijepa benchmark packing", "ijepa benchmark step --source photos --tokens 8192"),
        BenchmarkOptions,
        "benchmark.run",
    ),
}
