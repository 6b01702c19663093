"""Broken files and wrong requests: what the user sees of each, word for word, and that nothing is left half-written."""

import contextlib
import io
import json
import math
import os
import re
import shutil
import struct
import tarfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from PIL import Image

from ijepa_enhanced.cli import main
from ijepa_enhanced.encoder import Encoder

TINY = {
    "encoder.variant": "Ti",
    "encoder.patch_size": 8,
    "encoder.depth": 1,
    "predictor.width": 32,
    "predictor.depth": 1,
    "predictor.heads": 2,
    "data.tokens_per_pack": 512,
    "data.min_resolution": 32,
    "data.max_resolution": 48,
    "data.workers": 0,
    "steps": 4,
    "log_every": 2,
    "checkpoint_every": 2,
}
"""A run of seconds: all ten pictures fit one pack, and every image is seen in every step."""

PROGRESS = re.compile(r"\d/4  loss .*|Training: 4 steps of .*")


class Answer(NamedTuple):
    """What a command gave back."""

    code: int
    out: list[str]
    err: list[str]
    """Without the lines of progress, of which some hold rates."""


def ijepa(command: str) -> Answer:
    """Run a command; one that starts a training run gets the options of `TINY` in front of its own."""
    name, *rest = command.split()
    new = name == "train" and "--resume" not in rest
    tiny = [f"--{key}={value}" for key, value in TINY.items()] if new else []
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main([name, *tiny, *rest])
    said = [line for line in err.getvalue().splitlines() if not line.startswith(("Images: ", "Classes: "))]
    lines = [line for line in said if not PROGRESS.fullmatch(line)]
    return Answer(code, out.getvalue().splitlines(), lines)


@pytest.fixture(scope="module")
def trained(pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run on `photos` beside it, with checkpoints of steps 2 and 4."""
    folder = tmp_path_factory.mktemp("trained")
    shutil.copytree(pictures, folder / "photos")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert ijepa("train --data.source photos --run run").code == 0
    return folder / "run"


@pytest.fixture
def place(pictures: Path, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder that commands run in: ten good images in `photos`, and `run`, which was trained on them."""
    shutil.copytree(pictures, tmp_path / "photos")
    shutil.copytree(trained, tmp_path / "run")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def files(folder: Path) -> dict[str, tuple[int, int]]:
    """Everything below a folder, with the size and the time of each file; a folder's name ends in a slash."""
    found = {}
    for path in folder.rglob("*"):
        name, status = str(path.relative_to(folder)), path.stat()
        found |= {f"{name}/": (0, 0)} if path.is_dir() else {name: (status.st_size, status.st_mtime_ns)}
    return found


def png_header(width: int, height: int) -> bytes:
    """A PNG of that size without pixels: 57 bytes, whatever it says it is."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b"") + chunk(b"IEND", b"")


def nothing() -> None:
    """The good images and the good run are all there is."""


def empty_folder() -> None:
    Path("images").mkdir()


def damaged_headers() -> None:
    """Three of ten images whose header tells already."""
    Path("photos/dark/0.png").write_bytes(b"")
    Path("photos/dark/1.jpg").write_bytes(b"no image, but words")
    Path("photos/light/4.png").write_bytes(png_header(20000, 20000))


def damaged_body() -> None:
    """One of ten images whose header is whole."""
    path = Path("photos/light/2.png")
    path.write_bytes(path.read_bytes()[:-2000])


def damaged_headers_and_body() -> None:
    damaged_headers()
    damaged_body()


def many_damaged_headers() -> None:
    for number in range(25):
        Path(f"photos/dark/x{number:02}.png").write_bytes(b"")


def no_headers() -> None:
    for path in Path("photos").rglob("*.*"):
        path.write_bytes(b"")


def no_bodies() -> None:
    for path in Path("photos").rglob("*.*"):
        path.write_bytes(png_header(40, 50))


def cut_shard() -> None:
    """A shard of ten images of 10,000 bytes each that ends 100 bytes into the eighth."""
    with tarfile.open("images.tar", "w") as tar:
        for number, path in enumerate(sorted(Path("photos").rglob("*.*"))):
            for name, data in (
                (f"{number}{path.suffix}", path.read_bytes().ljust(10_000, b"\0")),
                (f"{number}.cls", (b"dark", b"light")[number % 2]),
            ):
                member = tarfile.TarInfo(name)
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    with tarfile.open("images.tar") as tar:
        end = tar.getmember("7.png").offset_data + 100
    os.truncate("images.tar", end)


def one_image() -> None:
    shutil.copytree("photos", "images", ignore=lambda folder, names: [name for name in names if name[0] in "1234l"])


def smaller_than_a_patch(count: int = 3) -> None:
    for number in range(count):
        Image.new("RGB", (7, 5)).save(f"photos/dark/small{number}.png")


def only_smaller_than_a_patch() -> None:
    shutil.rmtree("photos")
    Path("photos/dark").mkdir(parents=True)
    smaller_than_a_patch()


def only_long() -> None:
    shutil.rmtree("photos")
    for name, size in (("wide", (4000, 1)), ("tall", (1, 4000))):
        Path("photos", name).mkdir(parents=True)
        Image.new("RGB", size).save(f"photos/{name}/0.png")


def other_class() -> None:
    shutil.copytree("photos/dark", "others/gray")
    shutil.copytree("photos/light", "others/light")


def empty_class() -> None:
    """A class of which validation has images, and training only the name."""
    other_class()
    labelled_shard("dark\nlight\ngray\n", [0, 1])


def labelled_shard(classes: str, labels: list[int]) -> None:
    """A shard of as many images as labels."""
    Path("classes.txt").write_text(classes)
    with tarfile.open("images.tar", "w") as tar:
        for number, label in enumerate(labels):
            tar.add(f"photos/dark/{2 * number}.png", f"{number}.png")
            member = tarfile.TarInfo(f"{number}.cls")
            member.size = 1
            tar.addfile(member, io.BytesIO(b"%d" % label))


def one_class() -> None:
    shutil.rmtree("photos/light")


def label_out_of_range() -> None:
    labelled_shard("dark\nlight\n", [5])


def spoilt_encoder(value: float) -> Callable[[], None]:
    """One weight of the encoder with that value."""

    def spoil() -> None:
        encoder = Encoder.from_pretrained("run")
        with torch.no_grad():
            encoder.network.patch_embed.weight[0, 0] = value
        encoder.save_pretrained("run/encoder")

    return spoil


def older_encoder() -> None:
    """An encoder folder as it was written before preprocessing was recorded."""
    path = Path("run/encoder/config.json")
    path.write_text(json.dumps(json.loads(path.read_text())["architecture"]))


def yaml(content: str) -> Callable[[], None]:
    """A configuration file of that content."""

    def write() -> None:
        Path("mine.yaml").write_text(content)

    return write


def edited_run(before: str, after: str) -> Callable[[], None]:
    """Another text in the configuration of the run."""

    def edit() -> None:
        path = Path("run/config.yaml")
        assert path.read_text().count(before) == 1
        path.write_text(path.read_text().replace(before, after))

    return edit


def other_images() -> None:
    Path("photos/dark/0.png").unlink()


def damaged_checkpoints(steps: str, name: str, size: int) -> Callable[[], None]:
    """Checkpoints of the run with a file cut short."""

    def cut() -> None:
        for path in Path("run/checkpoints").glob(f"step-{steps}/{name}"):
            path.write_bytes(path.read_bytes()[:size])

    return cut


NOWHERE = (
    "No such file or folder: nope. A source of images can be a folder, tar shards such as train-{000000..000002}.tar, "
    "Parquet files, a CSV or JSONL list, hf://NAME, or 'synthetic'."
)
NO_IMAGES = (
    "No images in images. The folder must contain files that end in "
    ".jpg, .jpeg, .jpe, .jfif, .png, .apng, .webp, .gif, .avif, "
    ".bmp, .dib, .tif, .tiff, .jp2, .j2k, .heic, .heif, .npy."
)
TOO_FEW = "Training needs at least 2 images whose views have 4 or more patches of {0} x {0} px, but {1}. Add images{2}."
NO_CLASS = (
    "Class 'gray' of others has no {} in {}. Every validation class must also occur in the training images. Add images "
    "of this class to the training images, or remove the class from the validation images."
)
NO_LABELS = "photos/dark has no labels, but evaluation needs them. Put the images of each class into a subfolder."
CUT = "images.tar is truncated or damaged after 8 images. Images after that point are skipped."
CUT_IMAGE = "images.tar:7.png: truncated: the shard ends after 100 of the image's 10,000 bytes"
EMPTY, WORDS, BOMB, TRUNCATED = (
    "dark/0.png: empty file",
    "dark/1.jpg: not a JPEG, PNG, WebP, GIF, BMP, TIFF, AVIF, JPEG 2000, HEIC or NumPy file",
    "light/4.png: 20000 x 20000 px is above the limit of 89,478,485 px",
    "light/2.png: cannot be decoded: image file is truncated",
)
STARTED = "run was started with {0} = {1} and cannot continue with {2}. Remove --{0}, or start a new run."
EDITED = "run/config.yaml sets {}. Change it back, or start a new run."
OTHER_PLAN = (
    "Cannot resume run: the images (for example, files were added or removed) or the data settings have changed since "
    "the run was started. Restore them, or start a new run."
)
NO_EFFECT = (
    "{0} has no effect unless --objective.contrastive_weight > 0. Set {0} to 0, or set --objective.contrastive_weight "
    "above 0."
)
TRAIN = "train --data.source photos --run new"
FEW = (
    "photos has only {} training images, fewer than the 20 neighbors of knn20. Every prediction uses all of them, so "
    "the score says little. Use more training images."
)
SAME = "photos is used for training and validation, so the scores do not measure generalization."
EVALUATE = "evaluate run --train photos --val photos --resolution 32 --workers 0"

UNWRITABLE = "/proc/new"
"""Not even root can create it: permissions would not stop tests that run as root."""


def no_folder() -> str | None:
    """Why it cannot be created; that depends on the user."""
    try:
        os.mkdir(UNWRITABLE)
    except OSError as error:
        return error.strerror
    raise AssertionError(f"{UNWRITABLE} can be created")


WRONG_REQUESTS = {
    # No such path, and an empty folder, for every command that reads images.
    "train nowhere": (nothing, "train --data.source nope --run new", NOWHERE),
    "scan nowhere": (nothing, "scan nope", NOWHERE),
    "inspect nowhere": (nothing, "inspect masks nope --out new --config own-images-cpu", NOWHERE),
    "options of a protocol that is not asked for": (
        nothing,
        "evaluate run --train photos --val photos --finetune.epochs 2",
        "--finetune.epochs has no effect without --protocols finetune.",
    ),
    "a sweep of an absurd resolution": (
        nothing,
        "evaluate run --data photos --sweep resolution=32,100000",
        "resolution must be at most 1024 px, not 100000: an image may have 16,384 patches of 8 px. In Python, "
        "tokens_per_pack raises this limit.",
    ),
    "evaluate, train nowhere": (nothing, "evaluate run --train nope --val photos", NOWHERE),
    "evaluate, val nowhere": (nothing, "evaluate run --train photos --val nope", NOWHERE),
    "train on an empty folder": (empty_folder, "train --data.source images --run new", NO_IMAGES),
    "scan an empty folder": (empty_folder, "scan images", NO_IMAGES),
    "an empty name": (
        nothing,
        "train --run new --data.source=",
        "The source of the images is empty. Set it to a folder, tar shards or 'synthetic'.",
    ),
    "evaluate no run": (
        nothing,
        "evaluate nope --train photos --val photos",
        "No such file or folder: nope.",
    ),
    "evaluate a folder without an encoder": (
        nothing,
        "evaluate photos --train photos --val photos",
        "photos contains no encoder: config.json and model.safetensors must be in it or in its subfolder 'encoder'.",
    ),
    "resume a folder that is no run": (
        nothing,
        "train --resume photos",
        "photos is not a run folder: it contains no config.yaml.",
    ),
    "resume no run": (nothing, "train --resume nope", "No such folder: nope."),
    # Images that do not do.
    "no label in train": (nothing, "evaluate run --train photos/dark --val photos", NO_LABELS),
    "no label in val": (nothing, "evaluate run --train photos --val photos/dark", NO_LABELS),
    "an unknown class": (
        other_class,
        "evaluate run --train photos --val others",
        NO_CLASS.format("images", "photos"),
    ),
    "an empty class": (
        empty_class,
        "evaluate run --train images.tar --val others",
        NO_CLASS.format("readable images", "images.tar"),
    ),
    "one class": (
        one_class,
        "evaluate run --train photos --val photos",
        "photos has images of only one class, 'dark'. Evaluation needs two or more.",
    ),
    "a label out of range": (
        label_out_of_range,
        "evaluate run --train images.tar --val photos",
        "images.tar has the label '5', which is not in classes.txt. Labels must be names in this file, or all be "
        "numbers from 0 to 1. Correct the label, or add the class to classes.txt.",
    ),
    "an unknown protocol": (
        nothing,
        "evaluate run --train photos --val photos --protocols knn lineer",
        "Unknown protocol 'lineer'. Did you mean 'linear'?",
    ),
    "a sweep by other protocols": (
        nothing,
        "evaluate run --train photos --val photos --sweep resolution=32 --protocols attentive",
        "--sweep supports only the protocols knn and linear. Remove --protocols.",
    ),
    "no label maps": (
        nothing,
        "evaluate run --train photos --val photos --protocols dense",
        "photos has no label maps. For the protocol dense, put the images into photos/images and a PNG of the same "
        "name "
        "for each image into photos/labels, or use 'synthetic'.",
    ),
    "fine-tuning for no epoch": (
        nothing,
        "evaluate run --train photos --val photos --protocols finetune --finetune.epochs 0",
        "--finetune.epochs must be above 0, not 0.",
    ),
    "one image": (one_image, "train --data.source images --run new", TOO_FEW.format(8, "there is only 1", "")),
    "inspect one image": (
        one_image,
        "inspect packing images --out new --config own-images-cpu",
        TOO_FEW.format(8, "there is only 1", ""),
    ),
    "only images smaller than a patch": (
        only_smaller_than_a_patch,
        f"{TRAIN} --data.min_resolution null --data.max_resolution null",
        TOO_FEW.format(8, "only 0 of 3 images are large enough", " or raise data.min_resolution"),
    ),
    # Packs.
    "a pack smaller than the largest view": (
        nothing,
        f"{TRAIN} --data.max_view_tokens 513 --data.masked_views 2",
        "--data.tokens_per_pack (512) is too small for the views of one image: 2 views of up to 513 tokens. "
        "Raise it to at least 1026, or lower --data.max_view_tokens.",
    ),
    "one view to compare": (
        nothing,
        f"{TRAIN} --objective.contrastive_weight 1",
        "--objective.contrastive_weight > 0 needs at least two views per image. Set --data.masked_views to 2, or set "
        "--data.global_views or --data.local_views above 0.",
    ),
    "more channels than there can be": (
        nothing,
        f"{TRAIN} --data.channels 33",
        "--data.channels must be between 1 and 32, not 33.",
    ),
    "channels that the images do not have": (
        nothing,
        f"{TRAIN} --data.channels 6",
        "Most images of photos have 3 channels, but data.channels is 6. Set data.channels to 3.",
    ),
    "changes of RGB for other channels": (
        nothing,
        f"{TRAIN} --data.channels 6 --augment.gray 0.2 --augment.solarize 0.1",
        "--augment.gray and --augment.solarize change red, green and blue, but --data.channels is 6. Set both to 0.",
    ),
    "a recipe for RGB with other channels": (
        nothing,
        f"{TRAIN} --config own-images --data.channels 6 --augment.solarize 0",
        "own-images: augment.gray changes red, green and blue, but data.channels is 6. Set it to 0.",
    ),
    "a recipe without images": (
        nothing,
        "train --config own-images-cpu --run new",
        "own-images-cpu names no images. Add yours: ijepa train SOURCE --config own-images-cpu. For the built-in "
        "images, SOURCE is synthetic.",
    ),
    "global views for nothing": (
        nothing,
        f"{TRAIN} --data.global_views 1",
        NO_EFFECT.format("--data.global_views"),
    ),
    "local views for nothing": (
        nothing,
        f"{TRAIN} --data.local_views 2",
        NO_EFFECT.format("--data.local_views"),
    ),
    "a pack too small for any view": (
        nothing,
        f"{TRAIN} --data.tokens_per_pack 31",
        "--data.tokens_per_pack (31) is too small: without --data.max_view_tokens, a view has at most "
        "--data.tokens_per_pack / 8 = 3 tokens, but masking needs at least 4. Set it to at least 32.",
    ),
    # Unknown names.
    "an unknown option": (
        nothing,
        f"{TRAIN} --optim.lrr 1",
        "Unknown option '--optim.lrr'. Did you mean '--optim.lr'?",
    ),
    "an option without its group": (nothing, f"{TRAIN} --lr=1", "Unknown option '--lr'. Did you mean '--optim.lr'?"),
    "an option of another group": (
        nothing,
        f"{TRAIN} --data.patch_size 8",
        "Unknown option '--data.patch_size'. Did you mean '--encoder.patch_size'?",
    ),
    "an option cut short": (
        nothing,
        f"{EVALUATE} --base",
        "Unknown option '--base'. Did you mean '--baselines'?",
    ),
    "an option like no other": (
        nothing,
        "scan photos --zzz",
        "Unknown option '--zzz'. Available: --stats, --json, --debug, --help.",
    ),
    "a group": (
        yaml("lr: 1\n"),
        f"{TRAIN} --optim mine.yaml",
        "'--optim' is a group of options. Set one of them, such as '--optim.lr'.",
    ),
    "an argument too many": (
        nothing,
        f"{TRAIN} photos photos",
        "Unexpected argument 'photos'. `ijepa train` takes 1 positional argument: SOURCE. Quote a name that contains "
        "spaces.",
    ),
    "the images twice": (
        nothing,
        f"{TRAIN} photos",
        "SOURCE and --data.source both set the images. Use only one of them.",
    ),
    "a pattern that the shell expanded": (
        nothing,
        "scan train-0.tar train-1.tar",
        "Unexpected argument 'train-1.tar'. If you typed a pattern, quote it so that the shell does not expand it: "
        "'train-*.tar'.",
    ),
    "a mixture in several words": (
        nothing,
        "scan photos + photos",
        "Unexpected argument '+'. Quote a source that contains spaces: 'photos + more-photos'.",
    ),
    "an unknown command": (nothing, "trian --run new", "Unknown command 'trian'. Did you mean 'train'?"),
    "an option before the command": (
        nothing,
        "--debug-me scan photos",
        "Put the command first, then its options. Commands: train, evaluate, embed, search, serve, report, scan, "
        "prepare, inspect, convert, export, study, doctor, benchmark.",
    ),
    "an unknown recipe": (
        nothing,
        f"{TRAIN} --config own-image",
        "No file or recipe 'own-image'. Did you mean 'own-images'?",
    ),
    "an unknown key": (
        yaml("optim:\n  lrr: 1\n"),
        f"{TRAIN} --config mine.yaml",
        "mine.yaml: unknown key 'optim.lrr'. Did you mean 'optim.lr'?",
    ),
    "an unknown key, the other spelling of options": (
        yaml("step: 1\n"),
        f"{TRAIN} --config=mine.yaml",
        "mine.yaml: unknown key 'step'. Did you mean 'steps'?",
    ),
    "a group without keys": (
        yaml("optim: 1\n"),
        f"{TRAIN} --config mine.yaml",
        "mine.yaml: 'optim' is a group of keys. Set one of them, such as 'optim.lr'.",
    ),
    "inspect with an unknown key": (
        yaml("masks:\n  target: 1\n"),
        "inspect masks photos --out new --config mine.yaml",
        "mine.yaml: unknown key 'masks.target'. Did you mean 'masks.targets'?",
    ),
    # Values.
    "no whole number": (nothing, f"{TRAIN} --steps 2.5", "--steps must be an integer or null, not '2.5'."),
    "no number": (nothing, f"{TRAIN} --optim.lr fast", "--optim.lr must be a number, not 'fast'."),
    "neither true nor false": (nothing, f"{TRAIN} --compile maybe", "--compile must be true or false, not 'maybe'."),
    "no such precision": (nothing, f"{TRAIN} --precision fp16", "--precision must be auto, bf16 or fp32, not 'fp16'."),
    "null": (nothing, f"{TRAIN} --seed null", "--seed must be an integer, not 'null'."),
    "no value": (
        nothing,
        f"{TRAIN} --seed",
        "--seed needs a value: --seed INT. See `ijepa train --help`.",
    ),
    "a value for a flag": (nothing, f"{TRAIN} --json=1", "--json takes no value."),
    "too few steps": (nothing, f"{TRAIN} --steps 0", "--steps must be at least 1, not 0."),
    "a negative rate": (nothing, f"{TRAIN} --optim.lr -1", "--optim.lr must be above 0, not -1.0."),
    "a predictor without blocks": (
        nothing,
        f"{TRAIN} --predictor.depth 0",
        "--predictor.depth must be at least 1, not 0.",
    ),
    "a predictor without heads": (
        nothing,
        f"{TRAIN} --predictor.heads 0",
        "--predictor.heads must be at least 1, not 0.",
    ),
    "a predictor whose heads do not divide it": (
        nothing,
        f"{TRAIN} --predictor.width 24",
        "--predictor.width must be a positive multiple of 16 (8 * --predictor.heads), not 24.",
    ),
    "no such variant": (
        nothing,
        f"{TRAIN} --encoder.variant XL",
        "--encoder.variant must be one of Ti, S, B, L, H, g, not 'XL'.",
    ),
    "no fraction": (
        nothing,
        f"{TRAIN} --data.max_unreadable 2",
        "--data.max_unreadable must be between 0 and 1, not 2.0.",
    ),
    "resolutions in the wrong order": (
        nothing,
        f"{TRAIN} --data.min_resolution 50",
        "--data.min_resolution (50) must be at least 1 and at most --data.max_resolution (48).",
    ),
    "no number in a file": (
        yaml("optim: {lr: fast}\n"),
        f"{TRAIN} --config mine.yaml",
        "mine.yaml: optim.lr must be a number, not 'fast'.",
    ),
    "true for a number in a file": (
        yaml("steps: true\n"),
        f"{TRAIN} --config mine.yaml",
        "mine.yaml: steps must be an integer or null, not true.",
    ),
    "a number for text in a file": (
        yaml("data: {source: 3}\n"),
        f"{TRAIN} --config mine.yaml",
        "mine.yaml: data.source must be a string, not 3.",
    ),
    "null in a file": (
        yaml("optim:\n  lr:\n"),
        f"{TRAIN} --config mine.yaml",
        "mine.yaml: optim.lr must be a number, not null.",
    ),
    "out of range in a file": (
        yaml("optim: {lr: -1}\n"),
        f"{TRAIN} --config mine.yaml",
        "mine.yaml: optim.lr must be above 0, not -1.0.",
    ),
    "no resolution": (nothing, f"{EVALUATE} --resolution 0", "--resolution must be at least 1, not 0."),
    "a resolution as a word": (
        nothing,
        f"{EVALUATE} --resolution big",
        "--resolution must be an integer or native, not 'big'.",
    ),
    "a negative seed": (nothing, f"{EVALUATE} --seed -1", "--seed must be at least 0, not -1."),
    "negative workers": (nothing, f"{EVALUATE} --workers -1", "--workers must be at least 0, not -1."),
    "no such picture": (
        nothing,
        "inspect maks photos --out new",
        "Unknown subcommand 'maks'. Did you mean 'masks'?",
    ),
    "an option before the picture": (
        nothing,
        "inspect --out new masks photos",
        "Put the subcommand first, then its options. Subcommands: data, masks, packing, features, merges.",
    ),
    "merges of no run": (
        nothing,
        "inspect merges nope photos/dark/0.png --out new",
        "No such file or folder: nope.",
    ),
    "merges of no images": (
        nothing,
        "inspect merges run --out new",
        "Missing: IMAGE. See `ijepa inspect merges --help`.",
    ),
    "merges of an image that is not there": (
        nothing,
        "inspect merges run photos/dark/0.png nope.png --out new",
        "No such file: nope.png.",
    ),
    "merges of a folder": (
        nothing,
        "inspect merges run photos/dark --out new",
        "photos/dark is a folder. Give the paths of image files.",
    ),
    "merges at rate 0": (
        nothing,
        "inspect merges run photos/dark/0.png --out new --merge-rate 0",
        "--merge-rate must be above 0 and at most 0.5, not 0.",
    ),
    "an option of another picture": (
        nothing,
        "inspect masks photos --out new --merge-rate 0.1",
        "`ijepa inspect masks` has no option '--merge-rate'. It is an option of `ijepa evaluate`, `ijepa embed`, "
        "`ijepa inspect merges`, `ijepa export onnx` or `ijepa export torch`.",
    ),
    "a merge rate too high": (
        nothing,
        f"{EVALUATE} --merge-rate 0.7",
        "--merge-rate must be between 0 and 0.5, not 0.7.",
    ),
    "a negative merge rate": (
        nothing,
        "inspect merges run photos/dark/0.png --out new --merge-rate -0.1",
        "--merge-rate must be above 0 and at most 0.5, not -0.1.",
    ),
    "a student's merge rate too high": (
        nothing,
        f"{TRAIN} --merging.student_rate 0.6",
        "--merging.student_rate must be between 0 and 0.5, not 0.6.",
    ),
    "a sweep of nothing": (
        nothing,
        f"{EVALUATE} --sweep",
        "--sweep needs a value: --sweep NAME=VALUES. See `ijepa evaluate --help`.",
    ),
    "a sweep of something else": (
        nothing,
        f"{EVALUATE} --sweep resolution=32 rate=0.1",
        "--sweep accepts resolution=... and merge_rate=..., not 'rate=0.1'.",
    ),
    "a sweep of no numbers": (
        nothing,
        f"{EVALUATE} --sweep resolution=32,big",
        "--sweep expects numbers separated by commas, not 'resolution=32,big'.",
    ),
    "a sweep beyond what can be": (
        nothing,
        f"{EVALUATE} --sweep merge_rate=0,0.6",
        "--sweep merge_rate=... must be between 0 and 0.5, not 0.6.",
    ),
    "a sweep beyond what is": (
        nothing,
        f"{EVALUATE} --sweep resolution=32,0",
        "--sweep resolution=... must be at least 1, not 0.",
    ),
    "a sweep of more than one encoder": (
        nothing,
        f"{EVALUATE} --sweep resolution=32 --baselines",
        "--sweep scores only one encoder. Remove --baselines.",
    ),
    "nothing to evaluate on": (
        nothing,
        "evaluate run",
        "No labeled images were given. Use --data SOURCE, or --train SOURCE and --val SOURCE.",
    ),
    "--train without --val": (
        nothing,
        "evaluate run --train photos",
        "--train requires --val. Or use --data SOURCE, which is split into both.",
    ),
    "--val without --train": (
        nothing,
        "evaluate run --val photos",
        "--val requires --train. Or use --data SOURCE, which is split into both.",
    ),
    "--data and --val": (
        nothing,
        "evaluate run --data photos --val photos",
        "Use either --data, or both --train and --val. --data is split into both.",
    ),
    "label maps to split": (
        nothing,
        "evaluate run --data photos --protocols dense",
        "The protocol dense does not support --data. Use --train and --val instead.",
    ),
    "an encoder of an older version": (
        older_encoder,
        EVALUATE,
        "run/encoder was saved by an older version of ijepa-enhanced. "
        "Train the encoder again, or rewrite config.json as docs/decisions.md describes.",
    ),
    "a source for a theme without images": (
        nothing,
        "benchmark attention --source photos",
        "`ijepa benchmark attention` does not use --source. Remove it.",
    ),
    "tokens for a theme without packs": (
        nothing,
        "benchmark embed --tokens 512",
        "`ijepa benchmark embed` does not use --tokens. Remove it.",
    ),
    "packs too small to time": (
        nothing,
        "benchmark step --tokens 255",
        "--tokens must be at least 256, not 255.",
    ),
    "no such theme": (
        nothing,
        "benchmark speed",
        "BENCHMARK must be packing, loader, attention, merging, step, embed or search, not 'speed'.",
    ),
    "nowhere to prepare to": (
        nothing,
        "prepare photos",
        "The output folder was not given. Add OUT: ijepa prepare SOURCE OUT.",
    ),
    "a quality beyond what can be": (
        nothing,
        "prepare photos new --quality 101",
        "--quality must be at least 1 and at most 100, not 101.",
    ),
    "nothing to scan": (
        nothing,
        "scan",
        "Missing: SOURCE. See `ijepa scan --help`.",
    ),
    # Folders that cannot be made.
    **{
        f"a folder that cannot be written to, {name}": (
            nothing,
            command,
            f"Cannot create the folder {UNWRITABLE}: {no_folder()}.",
        )
        for name, command in {
            "train": f"train --data.source photos --run {UNWRITABLE}",
            "inspect": f"inspect masks photos --out {UNWRITABLE} --config own-images-cpu",
            "sweep": f"evaluate run --data photos --workers 0 --sweep merge_rate=0 --out {UNWRITABLE}",
            "prepare": f"prepare photos {UNWRITABLE} --workers 0",
        }.items()
    },
    "a run below a file": (
        nothing,
        "train --data.source photos --run photos/dark/0.png/new",
        "Cannot create the folder photos/dark/0.png/new: Not a directory.",
    ),
    "a picture below a file": (
        nothing,
        "inspect masks photos --out photos/dark/0.png --config own-images-cpu",
        "Cannot create the folder photos/dark/0.png: it is a file.",
    ),
    # Runs that are there already, and runs that are not what they were.
    "a run that exists": (
        nothing,
        "train --data.source photos --run run",
        "run already exists. To resume it, use --resume run. Otherwise, choose another folder with --run.",
    ),
    "a folder in the run's place": (
        nothing,
        "train --data.source photos --run photos",
        "photos already exists and is not a run folder. Choose another folder with --run.",
    ),
    "a file in the run's place": (
        nothing,
        "train --data.source photos --run run/log.jsonl",
        "run/log.jsonl is a file. Choose another folder with --run.",
    ),
    "resume into another run": (
        nothing,
        "train --resume run --run new",
        "--resume continues in the folder of the run. Remove --run.",
    ),
    "resume with another architecture": (
        nothing,
        "train --resume run --encoder.depth 2",
        STARTED.format("encoder.depth", 1, 2),
    ),
    "resume with another plan": (
        nothing,
        "train --resume run --data.min_resolution 16",
        STARTED.format("data.min_resolution", 32, 16),
    ),
    "resume with an edited architecture": (
        edited_run("variant: Ti", "variant: S"),
        "train --resume run",
        EDITED.format("encoder.variant = S, but the run was trained with Ti"),
    ),
    "resume with an edited plan": (
        edited_run("max_resolution: 48", "max_resolution: 47"),
        "train --resume run",
        EDITED.format("data.max_resolution = 47, but the run was trained with 48"),
    ),
    "resume with an edited optimizer": (
        edited_run("clip: 1.0", "clip: 2.0"),
        "train --resume run",
        EDITED.format("optim.clip = 2.0, but the run was trained with 1.0"),
    ),
    "resume with merging": (
        nothing,
        "train --resume run --merging.student_rate 0.1",
        STARTED.format("merging.student_rate", 0.0, 0.1),
    ),
    "resume with edited merging": (
        edited_run("teacher_rate: 0.0", "teacher_rate: 0.2"),
        "train --resume run",
        EDITED.format("merging.teacher_rate = 0.2, but the run was trained with 0.0"),
    ),
    "resume with an unknown key": (
        edited_run("steps: 4", "step: 4"),
        "train --resume run",
        "run/config.yaml: unknown key 'step'. Did you mean 'steps'?",
    ),
    "resume on other images": (other_images, "train --resume run --data.source photos", OTHER_PLAN),
}


@pytest.mark.parametrize(("prepare", "command", "message"), WRONG_REQUESTS.values(), ids=WRONG_REQUESTS)
def test_a_wrong_request_is_refused(prepare: Callable[[], None], command: str, message: str, place: Path) -> None:
    prepare()
    before = files(place)
    assert ijepa(command) == (2, [], [f"ijepa: {message}"])
    assert files(place) == before


BEGUN = {"new/", "new/config.yaml", "new/log.jsonl"}
"""What is there of a run from its first step on: enough to resume it."""
DAMAGED = "Could not read checkpoint run/checkpoints/step-00000004: {}."
EMPTY_JSON = "progress.json is damaged (Expecting value: line 1 column 1 (char 0))"
RESUMING = "Resuming from run/checkpoints/step-00000002 instead."

TAKE_AWAY = "Remove these images, or raise --data.max_unreadable."

FAILURES: dict[str, tuple[Callable[[], None], str, list[str], set[str]]] = {
    "too many unreadable headers": (
        damaged_headers,
        TRAIN,
        ["ijepa: 3 of 10 images cannot be read, but data.max_unreadable = 0.01 allows only 1%. Unreadable images:"]
        + [f"  {reason}" for reason in (EMPTY, WORDS, BOMB)]
        + [TAKE_AWAY],
        set(),
    ),
    "too many unreadable images": (
        damaged_headers_and_body,
        f"{TRAIN} --data.max_unreadable 0.3",
        ["ijepa: 4 of 10 images cannot be read, but data.max_unreadable = 0.3 allows only 30%. Unreadable images:"]
        + [f"  {reason}" for reason in (EMPTY, WORDS, BOMB, TRUNCATED)]
        + [TAKE_AWAY],
        BEGUN,
    ),
    "a shard cut in the middle": (
        cut_shard,
        "train --data.source images.tar --run new",
        [
            "ijepa: 1 of 8 images cannot be read, but data.max_unreadable = 0.01 allows only 1%. Unreadable images:",
            f"  {CUT_IMAGE}",
            TAKE_AWAY,
        ],
        set(),
    ),
    "nothing to train on": (
        no_bodies,
        f"{TRAIN} --data.max_unreadable 1",
        [
            "ijepa: None of the images of photos could be read in 2 steps, so nothing was trained. The reasons are in "
            "the lines above."
        ],
        BEGUN,
    ),
    "nothing to evaluate": (
        no_bodies,
        EVALUATE,
        ["ijepa: None of the 10 images of photos can be decoded."],
        set(),
    ),
    "weights that are not finite": (
        spoilt_encoder(math.nan),
        EVALUATE,
        [
            "ijepa: The weights patch_embed.weight in run/encoder contain NaN or infinite values, so this encoder "
            "cannot be used. Use an encoder from another run, or RUN/best if the run has one."
        ],
        set(),
    ),
    **{
        f"features that are not finite, {protocol}": (
            spoilt_encoder(3e38),  # times a pixel, it is beyond float32
            f"{EVALUATE} --protocols {protocol}",
            [
                "ijepa: The features of dark/0.png in photos contain NaN or infinite values, so this encoder "
                "cannot be used. Use an encoder from another run, or RUN/best if the run has one."
            ],
            set(),
        )
        for protocol in ("knn", "attentive")
    },
    "fine-tuning that diverges": (
        nothing,
        f"{EVALUATE} --protocols finetune --finetune.epochs 9 --finetune.lr 1e30",
        ["ijepa: Fine-tuning diverged at step 1. Lower --finetune.lr."],
        set(),
    ),
    "no header to evaluate": (
        no_headers,
        EVALUATE,
        ["ijepa: None of the 10 images of photos can be read."],
        set(),
    ),
    "nothing to inspect": (
        no_bodies,
        "inspect packing photos --out new",
        ["ijepa: None of the 10 images of the first training batch can be decoded. The lines above say why."],
        set(),
    ),
    "a loss that is not finite": (
        nothing,
        f"{TRAIN} --optim.lr 1e30",
        [
            "ijepa: The loss or its gradient was NaN or infinite in 2 steps in a row, the last of them step 3. There "
            "is no checkpoint yet, and the images of these steps are listed in new/skipped.jsonl. Start a new run with "
            "a lower --optim.lr or a higher --optim.warmup."
        ],
        BEGUN | {"new/skipped.jsonl"},
    ),
    "merges of what is no image": (
        damaged_headers,
        "inspect merges run photos/light/0.png photos/dark/0.png --out new",
        ["ijepa: photos/dark/0.png: empty file"],
        set(),
    ),
    "merges of a damaged image": (
        damaged_body,
        "inspect merges run photos/light/2.png --out new",
        ["ijepa: photos/light/2.png: cannot be decoded: image file is truncated"],
        set(),
    ),
    "every checkpoint damaged": (
        damaged_checkpoints("*", "progress.json", 0),
        "train --resume run",
        [f"ijepa: {DAMAGED.format(EMPTY_JSON)} No earlier checkpoint can be read. Start a new run."],
        set(),
    ),
}


@pytest.mark.parametrize(("prepare", "command", "message", "leaves"), FAILURES.values(), ids=FAILURES)
def test_a_failed_run_says_why(
    prepare: Callable[[], None], command: str, message: list[str], leaves: set[str], place: Path
) -> None:
    prepare()
    before = files(place)
    answer = ijepa(command)
    assert (answer.code, answer.out, answer.err[-len(message) :]) == (1, [], message)
    assert not any(line.startswith("Traceback") for line in answer.err)
    after = files(place)
    assert {name: after.pop(name) for name in before} == before
    assert {name for name in after if not name.startswith("new/tensorboard")} == leaves


SKIPPED = [f"Skipped {reason}" for reason in (EMPTY, WORDS, BOMB, TRUNCATED)]
SURVIVED: dict[str, tuple[Callable[[], None], str, list[str], dict[str, int]]] = {
    "train on what is readable": (
        damaged_headers_and_body,
        f"{TRAIN} --data.max_unreadable 0.4 --json",
        SKIPPED,
        {"images_seen": 4 * 6},
    ),
    "a checkpoint cut short": (
        damaged_checkpoints("00000004", "*.safetensors", 1000),
        "train --resume run --json",
        [f"{DAMAGED.format('model-00001-of-00001.safetensors has 1000 bytes instead of 8279172')} {RESUMING}"],
        {"steps": 4},
    ),
    "an empty file in a checkpoint": (
        damaged_checkpoints("00000004", "progress.json", 0),
        "train --resume run --json",
        [f"{DAMAGED.format(EMPTY_JSON)} {RESUMING}"],
        {"steps": 4},
    ),
    "train on what a cut shard holds": (
        cut_shard,
        "train --data.source images.tar --run new --data.max_unreadable 0.2 --json",
        [CUT, f"Skipped {CUT_IMAGE}"],
        {"images_seen": 4 * 7},
    ),
    "evaluate what is readable": (
        damaged_headers_and_body,
        f"{EVALUATE} --baselines --json",
        [line.replace(":", " of photos:", 1) for line in SKIPPED]
        + ["Scoring: start", "Scoring: raw pixels", "Scoring: trained", FEW.format(6), SAME],
        {},
    ),
    "evaluate beside many that are not readable": (
        many_damaged_headers,
        f"{EVALUATE} --json",
        [f"Skipped dark/x{number:02}.png of photos: empty file" for number in range(20)]
        + [
            "Skipped 5 more images of photos. Run `ijepa scan photos` to list them.",
            "Scoring: trained",
            FEW.format(10),
            SAME,
        ],
        {},
    ),
    "evaluate what a cut shard holds": (
        cut_shard,
        "evaluate run --train photos --val images.tar --resolution 32 --workers 0 --json",
        [CUT, f"Skipped {CUT_IMAGE}".replace(": ", " of images.tar: ", 1), "Scoring: trained", FEW.format(10)],
        {},
    ),
    "inspect what is readable": (
        damaged_headers_and_body,
        "inspect packing photos --out new --json --config own-images-cpu",
        SKIPPED,
        {},
    ),
    "scan what is readable": (
        damaged_headers_and_body,
        "scan photos --json",
        [],
        {"images": 7, "unreadable": 3, "labels": 2},
    ),
    "scan a cut shard": (cut_shard, "scan images.tar --json", [CUT], {"images": 7, "unreadable": 1, "labels": 2}),
    "scan nothing readable": (no_headers, "scan photos --json", [], {"images": 0, "unreadable": 10, "labels": 0}),
    "enlarge what is smaller than a patch": (
        smaller_than_a_patch,
        f"{TRAIN} --json",
        [],
        {"images_seen": 4 * 13},
    ),
    "leave out what is smaller than a patch": (
        smaller_than_a_patch,
        f"{TRAIN} --data.min_resolution null --data.max_resolution null --json",
        ["Skipped 3 images that are too small (views with fewer than 4 patches)."],
        {"images_seen": 4 * 10},
    ),
    "evaluate what is smaller than a patch": (
        smaller_than_a_patch,
        f"{EVALUATE} --resolution native --json",
        ["Scoring: trained", FEW.format(13), SAME],
        {},
    ),
    "evaluate far from the trained resolution": (
        nothing,
        f"{EVALUATE} --resolution 480 --json",
        [
            "The encoder was trained at a resolution of 48 px but is used at 480 px, where its features may be worse. "
            "Omit the resolution to use the training resolution.",
            "Scoring: trained",
            FEW.format(10),
            SAME,
        ],
        {},
    ),
    "train on 1 x 4000 px": (only_long, f"{TRAIN} --json", [], {"images_seen": 4 * 2}),
    "evaluate 1 x 4000 px": (only_long, f"{EVALUATE} --json", ["Scoring: trained", FEW.format(2), SAME], {}),
}


@pytest.mark.parametrize(("prepare", "command", "said", "found"), SURVIVED.values(), ids=SURVIVED)
def test_damage_is_reported_and_the_rest_is_used(
    prepare: Callable[[], None], command: str, said: list[str], found: dict[str, int], place: Path
) -> None:
    prepare()
    answer = ijepa(command)
    # The order of images is the plan's.
    assert (answer.code, sorted(answer.err)) == (0, sorted(said))
    values = json.loads(answer.out[-1])
    assert {name: values[name] for name in found} == found


def test_a_line_of_pixels_has_as_many_patches_as_any_image(place: Path) -> None:
    """14 x 14 at a resolution of 112 px; were each axis rounded for itself, 1 x 4000 px would have 885."""
    only_long()
    resolution = (
        "--data.min_resolution 112 --data.max_resolution 112 --data.max_view_tokens 1000 --data.tokens_per_pack 2000"
    )
    assert ijepa(f"{TRAIN} {resolution}") == (0, ["new", "new/masks.png", "new/curves.png", "new/report.html"], [])
    for line in Path("new/log.jsonl").read_text().splitlines():
        assert json.loads(line)["fill"] == 2 * 196 / 2000


def test_scan_lists_what_it_cannot_read(place: Path) -> None:
    damaged_headers()
    assert ijepa("scan photos").out[-3:] == [f"unreadable  {reason}" for reason in (EMPTY, WORDS, BOMB)]


def test_a_run_counts_what_it_leaves_out(place: Path) -> None:
    damaged_headers_and_body()
    assert ijepa(f"{TRAIN} --data.max_unreadable 0.4").code == 0
    assert [json.loads(line)["unreadable"] for line in Path("new/log.jsonl").read_text().splitlines()] == [4, 4]


@pytest.mark.parametrize(
    ("saved", "message"),
    [
        (
            ["step-00000002"],
            "Could not save checkpoint run/checkpoints/step-00000004: File too large. "
            "The previous one, run/checkpoints/step-00000002, is intact.",
        ),
        (
            [],
            "Could not save checkpoint run/checkpoints/step-00000002: File too large. There is no earlier one.",
        ),
    ],
    ids=["the second checkpoint", "the first checkpoint"],
)
def test_a_full_disk_leaves_a_run_that_can_go_on(
    saved: list[str], message: str, disk_of: Callable[[int], contextlib.AbstractContextManager[None]], place: Path
) -> None:
    checkpoints = Path("run/checkpoints")
    for checkpoint in checkpoints.iterdir():
        if checkpoint.name not in saved:
            shutil.rmtree(checkpoint)
    without = [] if saved else ["run has no checkpoint yet. Training starts from the first step."]
    with disk_of(100_000):
        assert ijepa("train --resume run") == (1, [], [*without, f"ijepa: {message}"])
    assert [path.name for path in checkpoints.iterdir()] == saved
    assert ijepa("train --resume run").code == 0
    assert [json.loads(line)["step"] for line in Path("run/log.jsonl").read_text().splitlines()] == [2, 4]
    assert sorted(path.name for path in checkpoints.iterdir()) == ["step-00000002", "step-00000004"]
