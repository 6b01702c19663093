"""The commands end to end on ten small pictures: what they print where, what they write, and what programs read."""

import contextlib
import csv
import errno
import io
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tarfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from rich.console import Console
from rich.table import Table

from ijepa_enhanced import cli
from ijepa_enhanced.commands.flags import all_commands, examples_of, parse
from ijepa_enhanced.commands.options import PROTOCOLS
from ijepa_enhanced.commands.setup import counting_bars, print_table, share_cores
from ijepa_enhanced.commands.study import configure
from ijepa_enhanced.commands.table import COMMANDS, INSPECT, Command
from ijepa_enhanced.devices import best_device
from ijepa_enhanced.encoder import Encoder
from ijepa_enhanced.errors import (
    EncoderError,
    NotFiniteError,
    RankError,
    RequestError,
    RunError,
    SourceError,
    UserError,
)
from ijepa_enhanced.evaluate.protocol import FEATURE_PROTOCOLS
from ijepa_enhanced.study.config import load_study
from ijepa_enhanced.train.logging import SummaryWriter
from ijepa_enhanced.train.loop import Outcome
from ijepa_enhanced.train.saved import load_config
from ijepa_enhanced.visualize.merges import draw_merges

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


@pytest.fixture(autouse=True)
def terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    """Help and tables are set to the width of the terminal."""
    monkeypatch.setenv("COLUMNS", "100")


class Answer(NamedTuple):
    """What a command gave back; `err` of `ijepa` is without the lines about sources."""

    code: int
    out: list[str]
    err: list[str]

    @property
    def json(self) -> dict[str, Any]:
        """What a program reads."""
        values: dict[str, Any] = json.loads(self.out[-1])
        return values


def ijepa(*arguments: str | Path) -> Answer:
    """Run a command."""
    answer = whole_answer(*arguments)
    return answer._replace(err=[line for line in answer.err if not line.startswith(("Images: ", "Classes: "))])


def whole_answer(*arguments: str | Path) -> Answer:
    """Run a command; `err` is all that it said."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = cli.main([str(argument) for argument in arguments])
    return Answer(code, out.getvalue().splitlines(), err.getvalue().splitlines())


def train(source: Path, run: Path, *arguments: str, **changes: Any) -> Answer:
    """A tiny run."""
    options = TINY | {key.replace("__", "."): value for key, value in changes.items()}
    flags = [f"--{key}={value}" for key, value in options.items()]
    return ijepa("train", f"--data.source={source}", "--run", run, *flags, *arguments)


class Run(NamedTuple):
    """A finished run, and what was printed."""

    folder: Path
    answer: Answer


@pytest.fixture(scope="module")
def run(pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Trained at a rate that moves the encoder in four steps."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    return Run(folder, train(pictures, folder, "--json", optim__lr=0.01, optim__warmup=0))


def lines(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_training_writes_a_run(run: Run) -> None:
    assert run.answer.code == 0
    board = {"tensorboard"} if SummaryWriter else set()
    written = {"config.yaml", "log.jsonl", "checkpoints", "encoder", "masks.png", "curves.png", "report.html"}
    assert {path.name for path in run.folder.iterdir()} == written | board
    assert [line["step"] for line in lines(run.folder / "log.jsonl")] == [2, 4]
    assert {path.name for path in (run.folder / "checkpoints").iterdir()} == {"step-00000002", "step-00000004"}
    assert {path.name for path in (run.folder / "encoder").iterdir()} == {
        "config.json",
        "model.safetensors",
        "README.md",
    }
    for name in ("masks.png", "curves.png"):
        with Image.open(run.folder / name) as picture:
            picture.load()
            assert picture.format == "PNG"


def test_training_prints_where_its_results_are(run: Run, pictures: Path) -> None:
    """Results on stdout, progress on stderr."""
    paths = [run.folder, *(run.folder / name for name in ("masks.png", "curves.png", "report.html"))]
    assert run.answer.out[:-1] == [str(path) for path in paths]
    # Ten images in each of four steps.
    assert run.answer.json == {"run": str(run.folder), "steps": 4, "images_seen": 40}
    begun, progress = run.answer.err
    assert begun == f"Training: 4 steps of 512 tokens on 10 images of {pictures}, 4 epochs."
    assert re.match(r"4/4  loss \d", progress)


def test_json_is_only_printed_when_asked_for(pictures: Path) -> None:
    plain, for_programs = ijepa("scan", pictures), ijepa("scan", pictures, "--json")
    assert for_programs.out[:-1] == plain.out


FEW = (
    "{} has only 10 training images, fewer than the 20 neighbors of knn20. Every prediction uses all of them, so the "
    "score says little. Use more training images."
)
SAME = "{} is used for training and validation, so the scores do not measure generalization."


def evaluate(run: Path, train: Path | str, val: Path | str, *arguments: str) -> Answer:
    sources = ["--train", train, "--val", val]
    return ijepa("evaluate", run, *sources, "--resolution", "40", "--workers", "0", "--json", *arguments)


def scores(answer: Answer) -> dict[str, Any]:
    """All but the rate."""
    assert answer.code == 0, answer.err
    # Not known if the features are in the cache and another number of workers made them.
    assert answer.json["images_per_second"] is None or answer.json["images_per_second"] > 0
    return {name: value for name, value in answer.json.items() if name != "images_per_second"}


def test_evaluating_prints_the_scores(run: Run, pictures: Path) -> None:
    answer = evaluate(run.folder, pictures, pictures)
    found = scores(answer)
    assert {"knn20", "linear", "rankme"} <= found.keys()
    # The classes differ in brightness, and a linear layer finds that after any encoder.
    assert (found["knn20"], found["linear"]) == (1.0, 1.0)
    # Between one direction and one for each image.
    assert 1 < found["rankme"] <= 10
    assert answer.err == [SAME.format(pictures), "Scoring: trained", FEW.format(pictures)]


def test_the_start_is_the_one_that_the_run_had(run: Run, pictures: Path, tmp_path: Path) -> None:
    """A rate too small to change any weight leaves the trained encoder what it was at the start."""
    assert train(pictures, tmp_path / "run", optim__lr=1e-30, optim__final_lr=0, seed=3).code == 0
    untrained = scores(evaluate(tmp_path / "run", pictures, pictures))
    start = scores(evaluate(tmp_path / "run", pictures, pictures, "--start"))
    assert start == untrained
    assert start != scores(evaluate(run.folder, pictures, pictures, "--start")), "the seed is the run's"
    with contextlib.chdir(tmp_path / "run" / "encoder"):
        assert start == scores(evaluate(Path(), pictures, pictures, "--start"))


def test_the_start_is_not_what_was_trained(run: Run, pictures: Path) -> None:
    trained, start = (evaluate(run.folder, pictures, pictures, *more) for more in ([], ["--start"]))
    assert start.json.keys() == trained.json.keys()
    assert start.err == [SAME.format(pictures), "Scoring: start", FEW.format(pictures)]
    # Rounding is 1e-6; four steps change it by 4e-3.
    assert scores(start)["rankme"] != pytest.approx(scores(trained)["rankme"], rel=0.001)


def test_baselines_are_rows_of_the_table(run: Run, pictures: Path) -> None:
    answer = evaluate(run.folder, pictures, pictures, "--baselines")
    rows = [[cell.strip() for cell in line.strip("│").split("│")] for line in answer.out if line.startswith("│")]
    assert [row[0] for row in rows] == ["kNN-1", "kNN-5", "kNN-20", "linear", "", "RankMe"]
    (head,) = [line for line in answer.out if line.startswith("┃")]
    assert [cell.strip() for cell in head.split("┃")[2:5]] == ["start", "raw pixels", "trained"]
    start, trained = (scores(evaluate(run.folder, pictures, pictures, *more)) for more in (["--start"], []))
    for place, expected in ((1, start), (3, trained)):
        # Wilson's interval of 10 of 10 has a line of its own.
        cells = ["100.0% (100.0%)", "100.0% (100.0%)", "[72.2%, 100.0%]", f"{expected['rankme']:.4g}"]
        assert [row[place] for row in rows[2:]] == cells
    assert answer.out[-2] == "Images: 10 for training, 10 for validation."
    # Programs get the scores of what was asked about.
    assert scores(answer) == trained
    assert scores(evaluate(run.folder, pictures, pictures, "--baselines", "--start")) == start


@pytest.mark.parametrize("more", [[], ["--sweep", "merge_rate=0,0.5"]])
def test_scores_that_cannot_be_saved_are_printed(
    more: list[str], run: Run, pictures: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def read_only(path: Path) -> None:
        raise OSError(errno.EROFS, "Read-only file system", str(path))

    for module in ("commands.evaluate", "evaluate.sweep"):
        monkeypatch.setattr(f"ijepa_enhanced.{module}.replacing", read_only)
    answer = evaluate(run.folder, pictures, pictures, *more)
    path = run.folder / ("sweep.csv" if more else "evaluation.json")
    said = f"The scores are only printed, because {path} cannot be written: Read-only file system."
    assert (answer.code, answer.err[-1]) == (0, said)
    assert answer.json["linear"] == 1.0


def test_class_numbers_may_be_any(run: Run, pictures: Path, tmp_path: Path) -> None:
    numbers = {"dark": 7, "light": 10**12}
    lines = [{"path": str(path), "label": numbers[path.parent.name]} for path in sorted(pictures.glob("*/*.*"))]
    images = tmp_path / "list.jsonl"
    images.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    assert scores(evaluate(run.folder, images, images)) == scores(evaluate(run.folder, pictures, pictures))


def test_merging_changes_the_features_that_are_scored(run: Run, pictures: Path) -> None:
    plain, at_zero, merged = (
        scores(evaluate(run.folder, pictures, pictures, *more))
        for more in ([], ["--merge-rate", "0"], ["--merge-rate", "0.5"])
    )
    assert plain == at_zero
    assert plain["rankme"] != merged["rankme"]


def test_every_protocol_scores(run: Run, pictures: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ijepa_enhanced.evaluate.attentive.LEAST_STEPS", 100)
    protocols = ["knn", "linear", "linear4", "lowshot", "attentive", "finetune"]
    names = ["knn20", "linear", "linear4_average", "linear4_concat", "lowshot10", "attentive", "finetune"]
    answer = evaluate(run.folder, pictures, pictures, "--protocols", *protocols, "--finetune.epochs", "30")
    found = scores(answer)
    # Classes that differ in brightness; of a tenth of five images, one a class is left.
    assert {name: found[name] for name in names if name != "lowshot10"} == dict.fromkeys(
        [name for name in names if name != "lowshot10"], 1.0
    )
    assert found["linear_high"] == found["linear_top5"] == 1.0
    # Wilson's interval of 10 of 10: n / (n + z^2).
    assert found["linear_low"] == pytest.approx(10 / (10 + 1.96**2), abs=1e-4)
    named = [line.strip("│").split("│")[0].strip() for line in answer.out if line.startswith("│")]
    assert [name for name in named if name] == [
        *("kNN-1", "kNN-5", "kNN-20", "linear", "linear, last 4 layers (average)"),
        *("linear, last 4 layers (concatenated)", "low-shot 1%", "low-shot 10%", "RankMe"),
        *("attentive probe", "fine-tuned"),
    ]
    kept = json.loads((run.folder / "evaluation.json").read_text())
    assert kept["scores"]["trained"]["finetune"] == 1.0


def test_a_protocol_alone_gives_its_own_scores(run: Run, pictures: Path) -> None:
    answer = evaluate(run.folder, pictures, pictures, "--protocols", "knn")
    assert [name for name in scores(answer) if "_" not in name] == ["knn1", "knn5", "knn20", "rankme"]


def test_the_dense_probe_takes_images_and_label_maps(run: Run, tmp_path: Path) -> None:
    for name in ("images", "labels"):
        (tmp_path / name).mkdir()
    for number in range(6):
        labels = np.zeros((48, 48), dtype=np.uint8)
        labels[:, 16 + 8 * (number % 2) :] = 1
        Image.fromarray(np.stack([200 * labels] * 3, axis=2)).save(tmp_path / "images" / f"{number}.png")
        Image.fromarray(labels).save(tmp_path / "labels" / f"{number}.png")
    answer = evaluate(run.folder, tmp_path, tmp_path, "--protocols", "dense", "--resolution", "48")
    assert (answer.code, answer.err) == (0, ["Scoring: trained"])
    assert answer.json.keys() == {name + end for name in ("dense_miou", "dense_knn") for end in ("", "_low", "_high")}
    assert answer.json["dense_miou"] > 0.9
    answer = evaluate(run.folder, tmp_path, tmp_path, "--protocols", "dense", "--resolution", "48", "--baselines")
    assert answer.err == ["Scoring: start", "Scoring: raw pixels", "Scoring: trained"]
    rows = [line.strip("│").split("│") for line in answer.out if line.startswith("│")]
    # The light part is white and the dark part black: here, pixels suffice.
    assert [row[2].strip() for row in rows] == ["100.0%", "[100.0%, 100.0%]"] * 2


SWEEP = ["--sweep", "resolution=24,40", "merge_rate=0,0.5"]


@pytest.fixture(scope="module")
def swept(run: Run, pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Answer]:
    folder = tmp_path_factory.mktemp("swept") / "new"
    return folder, evaluate(run.folder, pictures, pictures, *SWEEP, "--out", str(folder))


def test_a_sweep_scores_every_combination(run: Run, pictures: Path, swept: tuple[Path, Answer]) -> None:
    _, answer = swept
    assert answer.code == 0, answer.err
    points = answer.json["sweep"]
    assert [(point["resolution"], point["merge_rate"]) for point in points] == [
        (24, 0.0),
        (24, 0.5),
        (40, 0.0),
        (40, 0.5),
    ]
    scoring = [f"Scoring: trained, resolution {px}, merge rate {rate}" for px in (24, 40) for rate in ("0", "0.5")]
    timing = "Timing the network at 4 settings"
    assert answer.err == [SAME.format(pictures), timing, scoring[0], FEW.format(pictures), *scoring[1:]]
    single = scores(evaluate(run.folder, pictures, pictures, "--merge-rate", "0.5"))
    # RankMe is of half of the images in a sweep.
    names = ("knn20", "knn20_mean_per_class", "linear", "linear_mean_per_class")
    assert {name: points[3][name] for name in names} == {name: single[name] for name in names}
    assert points[0]["gflops_per_image"] < points[2]["gflops_per_image"]
    assert points[3]["gflops_per_image"] < points[2]["gflops_per_image"]
    assert points[3]["peak_megabytes"] < points[2]["peak_megabytes"]


def test_a_sweep_says_what_to_take_and_where_its_results_are(swept: tuple[Path, Answer]) -> None:
    folder, answer = swept
    assert answer.out[-3:-1] == [str(folder / "sweep.csv"), str(folder / "sweep.png")]
    (chosen,) = [line for line in answer.out if "<-" in line and line.startswith("│")]
    cells = chosen.split("│")
    taken = f"Recommended: resolution {answer.json['resolution']}, merge rate {answer.json['merge_rate']:g}. "
    assert answer.out[-4].startswith(taken)
    assert [cell.strip() for cell in cells[1:6]] == [
        str(answer.json["resolution"]),
        f"{answer.json['merge_rate']:g}",
        *(f"{answer.json[score]:.1%}" for score in ("choosing_linear", "linear", "knn20")),
    ]
    # Programs find the scores of what to take where those of one encoder are.
    assert {name: value for name, value in answer.json.items() if name != "sweep"} in answer.json["sweep"]
    with (folder / "sweep.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [float(row["linear"]) for row in rows] == [point["linear"] for point in answer.json["sweep"]]
    with Image.open(folder / "sweep.png") as picture:
        assert picture.format == "PNG"


def test_a_sweep_of_one_thing_takes_the_other_from_its_option(run: Run, pictures: Path, tmp_path: Path) -> None:
    shutil.copytree(run.folder / "encoder", tmp_path / "encoder")
    more = ["--merge-rate", "0.25", "--sweep", "resolution=24,native", "--start"]
    answer = evaluate(tmp_path / "encoder", pictures, pictures, *more)
    assert answer.code == 0, answer.err
    points = answer.json["sweep"]
    assert [(point["resolution"], point["merge_rate"]) for point in points] == [(24, 0.25), (None, 0.25)]
    assert answer.err[2] == "Scoring: start, resolution 24, merge rate 0.25"
    assert {path.name for path in (tmp_path / "encoder").iterdir()} >= {"sweep.csv", "sweep.png"}


def shard(path: Path, files: Iterable[Path], label: Callable[[Path], str]) -> Path:
    """A tar file of images and their labels."""
    with tarfile.open(path, "w") as tar:
        for number, file in enumerate(files):
            tar.add(file, f"{number}{file.suffix}")
            text = label(file).encode()
            member = tarfile.TarInfo(f"{number}.cls")
            member.size = len(text)
            tar.addfile(member, io.BytesIO(text))
    return path


def test_classes_go_by_their_names(run: Run, pictures: Path, tmp_path: Path) -> None:
    """Alone, the second class is number 0 of its source."""
    shutil.copytree(pictures / "light", tmp_path / "val" / "light")
    assert scores(evaluate(run.folder, pictures, tmp_path / "val"))["knn20"] == 1.0
    files = sorted(pictures.rglob("*.*"))
    (tmp_path / "named").mkdir()
    named = shard(tmp_path / "named" / "a.tar", files, lambda file: str(["light", "dark"].index(file.parent.name)))
    (tmp_path / "named" / "classes.txt").write_text("light\ndark\n")
    assert scores(evaluate(run.folder, pictures, named))["knn20"] == 1.0
    assert scores(evaluate(run.folder, named, pictures))["knn20"] == 1.0


ADVICE = (
    "Every validation class must also occur in the training images. Add images of this class to the training images, "
    "or remove the class from the validation images."
)


def test_classes_without_names_go_by_their_numbers(run: Run, pictures: Path, tmp_path: Path) -> None:
    numbers = {"dark": "3", "light": "5"}
    files = sorted(pictures.rglob("*.*"))
    both = shard(tmp_path / "both.tar", files, lambda file: numbers[file.parent.name])
    light = shard(tmp_path / "light.tar", files[5:], lambda file: "5")
    other = shard(tmp_path / "other.tar", files, lambda file: "4")
    assert scores(evaluate(run.folder, both, light))["knn20"] == 1.0
    answer = evaluate(run.folder, both, other)
    assert (answer.code, answer.err) == (2, [f"ijepa: Class '4' of {other} has no images in {both}. {ADVICE}"])


def test_a_folder_of_shards_has_its_own_part_for_each_purpose(run: Run, pictures: Path, tmp_path: Path) -> None:
    files = sorted(pictures.rglob("*.*"))
    shard(tmp_path / "train-0.tar", files, lambda file: file.parent.name)
    empty = tmp_path / "elsewhere" / "empty.png"
    empty.parent.mkdir()
    empty.touch()
    shard(tmp_path / "val-0.tar", [*files, empty], lambda file: "dark")
    answer = evaluate(run.folder, tmp_path, tmp_path)
    left_out = f"Skipped val-0.tar:10.png of {tmp_path}: empty file"
    assert answer.err == [left_out, "Scoring: trained", FEW.format(tmp_path)]
    assert scores(answer)["knn20"] == 0.5


def test_commands_say_what_they_read_and_what_they_ignored(run: Run, pictures: Path, tmp_path: Path) -> None:
    """Imagenette's own archive has a list beside its folders."""
    data = tmp_path / "data"
    for split in ("train", "val"):
        shutil.copytree(pictures, data / split)
    (data / "noisy_imagenette.csv").touch()
    (data / "val" / "notes.txt").touch()
    train, val = (
        f"Images: {data}/{split}: folder, split {split} (others: {other}), 10 images, 2 classes; ignored: 1 .csv{more}"
        for split, other, more in (("train", "val", ""), ("val", "train", ", 1 .txt"))
    )
    flags = [f"--{key}={value}" for key, value in TINY.items()]
    trained = whole_answer("train", f"--data.source={data}", "--run", tmp_path / "run", *flags)
    assert (trained.code, trained.err[0]) == (0, train)
    assert whole_answer("scan", data).err == [train]
    assert whole_answer("inspect", "data", data, "--out", tmp_path / "out").err[0] == train
    scored = whole_answer("evaluate", run.folder, "--train", data, "--val", data, "--workers", "0")
    assert scored.err[:3] == [train, val, "Classes: 2, matched by name."]


def test_scanning_counts(pictures: Path) -> None:
    answer = ijepa("scan", pictures, "--json")
    assert answer.code == 0
    assert {name: answer.json[name] for name in ("images", "unreadable", "labels")} == {
        "images": 10,
        "unreadable": 0,
        "labels": 2,
    }
    assert [re.split(r"  +", line)[:2] for line in answer.out[:4]] == [
        ["images", "10"],
        ["unreadable", "0"],
        ["classes", "2"],
        ["resolution (px, percentiles)", f"5%: {answer.json['resolution']['5%']:g}"],
    ]
    assert answer.err == []


@pytest.mark.parametrize("what", ["masks", "packing"])
def test_inspecting_draws(what: str, pictures: Path, tmp_path: Path) -> None:
    folder = tmp_path / "new" / "folder"
    answer = ijepa("inspect", what, pictures, "--out", folder, "--encoder.patch_size", "8", "--json")
    path = folder / f"{what}.png"
    assert (answer.code, answer.out[:-1], answer.json) == (0, [str(path)], {"picture": str(path)}), answer.err
    said = "Using the recipe own-images" + ("-cpu" if best_device().type == "cpu" else "") + ", because"
    assert [line[: len(said)] for line in answer.err] == [said], "the one that training uses"
    assert [file.name for file in folder.iterdir()] == [path.name]
    with Image.open(path) as picture:
        assert picture.format == "PNG"
        # Something is drawn on the white sheet.
        assert len(picture.getcolors(picture.width * picture.height) or []) > 100


def test_a_runs_own_packs_can_be_drawn(run: Run, pictures: Path, tmp_path: Path) -> None:
    options = ("--out", tmp_path / "run")
    assert ijepa("inspect", "packing", run.folder, *options).code == 0
    as_it_was = ("--config", run.folder / "config.yaml", "--out", tmp_path / "source")
    assert ijepa("inspect", "packing", pictures, *as_it_was).code == 0
    drawn, expected = (Image.open(tmp_path / place / "packing.png").tobytes() for place in ("run", "source"))
    assert drawn == expected


def test_inspecting_merges_draws_every_image(run: Run, pictures: Path, tmp_path: Path) -> None:
    folder = tmp_path / "new"
    images = [pictures / "dark" / "0.png", pictures / "light" / "0.png", pictures / "light" / "1.jpg"]
    answer = ijepa("inspect", "merges", run.folder, *images, "--out", folder, "--resolution", "40", "--json")
    paths = [folder / name for name in ("merges-00-0.png", "merges-01-0.png", "merges-02-1.png")]
    assert (answer.code, answer.err) == (0, [])
    assert answer.out[:-1] == [str(path) for path in paths]
    assert answer.json == {"pictures": answer.out[:-1]}
    assert sorted(folder.iterdir()) == paths
    drawn = draw_merges(Encoder.from_pretrained(run.folder), images[1], 40, 0.1)
    with Image.open(paths[1]) as picture:
        assert picture.format == "PNG"
        assert picture.tobytes() == drawn.tobytes()


def test_inspecting_features_draws_a_picture_and_says_how_patches_are_counted(
    run: Run, pictures: Path, tmp_path: Path
) -> None:
    images = [pictures / "dark" / "0.png", pictures / "light" / "1.jpg"]
    answer = ijepa(
        "inspect", "features", run.folder, *images, "--resolution", "40", "--patch", "1", "2", "--out", tmp_path
    )
    assert (answer.code, answer.out) == (0, [str(tmp_path / "features.png")])
    # 36 x 56 and 41 x 53 px at side 40 are 4 x 6 patches of 8 px each.
    assert answer.err == [f"{image}: 4 rows, 6 columns of patches" for image in images]
    with Image.open(tmp_path / "features.png") as picture:
        assert picture.format == "PNG"
    wrong = ijepa(
        "inspect", "features", run.folder, *images, "--resolution", "40", "--patch", "4", "0", "--out", tmp_path
    )
    assert (wrong.code, wrong.out) == (2, [])


def test_an_evaluation_is_kept_and_stands_in_the_report(run: Run, pictures: Path, tmp_path: Path) -> None:
    found = evaluate(run.folder, pictures, pictures, "--baselines")
    kept = json.loads((run.folder / "evaluation.json").read_text())
    assert {"start", "raw pixels", "trained"} <= kept["scores"].keys()
    assert kept["scores"]["trained"]["linear"] == found.json["linear"]
    assert kept["settings"]["train"] == str(pictures)
    card = run.folder / "encoder" / "README.md"
    assert f"\nScored on {pictures.name} at a resolution of " in card.read_text()
    assert f"\n| kNN-20 | {found.json['knn20']:.1%} (" in card.read_text()
    # What is not scored again stays, by subject and by protocol.
    few = evaluate(run.folder, pictures, pictures, "--start", "--protocols", "lowshot")
    now = json.loads((run.folder / "evaluation.json").read_text())
    assert now["scores"].pop("start") == kept["scores"].pop("start") | few.json
    assert now == kept
    assert "| kNN-20 |" in card.read_text()
    # But not beside scores of other settings.
    other = evaluate(run.folder, pictures, pictures, "--resolution", "24")
    now = json.loads((run.folder / "evaluation.json").read_text())
    assert now["settings"]["resolution"] == 24
    assert now["scores"] == {"trained": other.json}
    # Nor of other weights.
    shutil.copytree(run.folder, tmp_path / "copy")
    encoder = Encoder.from_pretrained(run.folder)
    with torch.no_grad():
        encoder.network.blocks.norm.bias += 1
    encoder.save_pretrained(tmp_path / "copy" / "encoder")
    card = tmp_path / "copy" / "encoder" / "README.md"
    assert "Scores" not in card.read_text()
    few = evaluate(tmp_path / "copy", pictures, pictures, "--resolution", "24", "--protocols", "lowshot")
    now = json.loads((tmp_path / "copy" / "evaluation.json").read_text())
    assert now["scores"] == {"trained": few.json}
    assert "| low-shot 10% |" in card.read_text()
    assert "| kNN-20 |" not in card.read_text()
    assert evaluate(run.folder, pictures, pictures, "--baselines").code == 0
    page = tmp_path / "page.html"
    answer = ijepa("report", run.folder, "--out", page, "--json")
    assert (answer.code, answer.out[0], answer.json) == (0, str(page), {"report": str(page)})
    assert "raw pixels" in page.read_text()
    assert ijepa("report", run.folder, run.folder).err == [
        "ijepa: A report of several runs needs an output file. Add --out FILE."
    ]
    assert ijepa("report", pictures).code == 2


def test_resuming_goes_on_from_the_newest_checkpoint(run: Run, pictures: Path, tmp_path: Path) -> None:
    shutil.copytree(run.folder, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step-00000004")
    shutil.rmtree(tmp_path / "run" / "encoder")
    answer = ijepa("train", f"--resume={tmp_path / 'run'}", "--data.max_unreadable", "0.5", "--json")
    assert answer.code == 0, answer.err
    assert answer.json == {"run": str(tmp_path / "run"), "steps": 4, "images_seen": 40}
    # That it goes on as if it had not stopped is proven in train/test_resume.py; here, that it is this run.
    whole, resumed = (lines(folder / "log.jsonl") for folder in (run.folder, tmp_path / "run"))
    assert [line["step"] for line in resumed] == [2, 4]
    assert resumed[-1]["loss"] == whole[-1]["loss"]
    assert (tmp_path / "run" / "encoder" / "model.safetensors").is_file()


def test_a_finished_run_is_left_as_it_is(run: Run) -> None:
    before = lines(run.folder / "log.jsonl")
    answer = ijepa("train", "--resume", run.folder, "--json")
    said = [f"{run.folder} is finished: all 4 steps are done."]
    assert (answer.code, answer.json, answer.err) == (0, run.answer.json, said)
    assert lines(run.folder / "log.jsonl") == before


def test_a_finished_run_without_its_encoder_gets_it_back(run: Run, tmp_path: Path) -> None:
    """As when it was killed between its last checkpoint and the export."""
    shutil.copytree(run.folder, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "encoder")
    assert ijepa("train", "--resume", tmp_path / "run").code == 0
    ours, theirs = (folder / "encoder" / "model.safetensors" for folder in (tmp_path / "run", run.folder))
    assert ours.read_bytes() == theirs.read_bytes()


def test_a_name_that_is_no_text_stands_in_the_report(pictures: Path, tmp_path: Path) -> None:
    shutil.copytree(pictures, tmp_path / "pictures")
    os.rename(tmp_path / "pictures" / "dark" / "0.png", os.fsencode(tmp_path / "pictures" / "dark") + b"/caf\xe9.png")
    assert train(tmp_path / "pictures", tmp_path / "run").code == 0
    assert "caf\\udce9.png" in (tmp_path / "run" / "report.html").read_text()


def test_a_run_whose_pictures_fail_is_a_finished_run(
    pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_room(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("ijepa_enhanced.commands.train.draw_curves", no_room)
    answer = train(pictures, tmp_path / "run", "--json")
    assert (answer.code, answer.json["steps"], answer.out[:-1]) == (0, 4, [str(tmp_path / "run")])
    reason = f"[Errno {errno.ENOSPC}] No space left on device"
    again = f"Run `ijepa report {tmp_path / 'run'}` to try again."
    assert answer.err[-1] == f"The report could not be written ({reason}). {again}"


class Full(io.StringIO):
    """A file on a full disk."""

    def write(self, _: str) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")


def test_a_reader_that_has_enough_is_no_error(pictures: Path) -> None:
    """As `ijepa scan photos | head -1` is."""
    command = [sys.executable, "-m", "ijepa_enhanced", "scan", str(pictures)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        said = process.stderr.read()
    assert "Broken pipe" not in said
    assert "Exception" not in said


def test_a_run_does_not_need_its_stderr(pictures: Path, tmp_path: Path) -> None:
    with contextlib.redirect_stderr(Full()), contextlib.redirect_stdout(io.StringIO()):
        flags = [f"--{key}={value}" for key, value in TINY.items()]
        assert cli.main(["train", str(pictures), "--run", str(tmp_path / "run"), *flags]) == 0
        assert cli.main(["train", "--run", str(tmp_path / "run")]) == 2


@pytest.mark.parametrize("damage", ["weights", "configuration"])
def test_what_is_no_encoder_is_said_in_a_sentence(damage: str, run: Run, pictures: Path, tmp_path: Path) -> None:
    shutil.copytree(run.folder / "encoder", tmp_path / "encoder")
    if damage == "weights":
        with (tmp_path / "encoder" / "model.safetensors").open("rb+") as file:
            file.truncate(1000)
    else:
        (tmp_path / "encoder" / "config.json").write_text('{"architectures": ["IJepaModel"]}')
    answer = evaluate(tmp_path / "encoder", pictures, pictures)
    assert (answer.code, answer.out) == (2, [])
    words = "The encoder in {} cannot be loaded: " if damage == "weights" else "{} contains no encoder that can be "
    assert answer.err[0].startswith(f"ijepa: {words.format(tmp_path / 'encoder')}")


def printed(*arguments: str | Path) -> dict[str, Any]:
    """The configuration, of images that are nowhere: should it train in earnest, that is over at once."""
    answer = ijepa("train", *arguments, "--data.source", "nope", "--print-config")
    assert (answer.code, answer.err) == (0, [])
    values: dict[str, Any] = yaml.safe_load("\n".join(answer.out))
    return values


def test_the_printed_configuration_is_a_configuration_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    first = printed("--optim.lr", "0.5", "--data.min_resolution=null", "--data.max_resolution=null")
    assert (first["optim"]["lr"], first["data"]["min_resolution"]) == (0.5, None)
    Path("mine.yaml").write_text(yaml.safe_dump(first))
    assert printed("--config", "mine.yaml") == first
    assert printed("--config=mine.yaml", "--optim.lr", "0.25")["optim"] == first["optim"] | {"lr": 0.25}
    assert [path.name for path in tmp_path.iterdir()] == ["mine.yaml"], "printing trains nothing"


def test_the_configuration_of_a_run_is_printed_as_it_was_saved(run: Run) -> None:
    saved = yaml.safe_load((run.folder / "config.yaml").read_text())
    saved["data"]["source"] = "nope"
    assert printed("--resume", run.folder) == saved
    assert load_config(run.folder).optim.lr == 0.01


def test_a_recipe_is_found_by_its_name() -> None:
    assert printed("--config", "own-images-cpu") != printed()


def test_a_configuration_file_names_its_run(pictures: Path, tmp_path: Path) -> None:
    """For training; what is looked at with the same file is no run."""
    file = tmp_path / "mine.yaml"
    file.write_text(yaml.safe_dump({"run": str(tmp_path / "run"), "data": {"source": str(pictures)}, "steps": 1}))
    flags = [f"--{key}={value}" for key, value in TINY.items() if key != "steps"]
    assert ijepa("train", *flags, "--config", file).out[0] == str(tmp_path / "run")
    assert ijepa("inspect", "masks", pictures, "--out", tmp_path / "out", "--config", file).code == 0


@pytest.mark.parametrize(("path", "command"), list(all_commands()))
def test_help_says_what_a_command_does_and_gives_examples(path: str, command: Command) -> None:
    answer = ijepa(*path.split()[1:], "--help")
    assert (answer.code, answer.err) == (0, [])
    text = "\n".join(answer.out)
    usage, _, rest = text.partition("\n\n")
    assert usage.startswith(f"usage: {path} ")
    assert rest.startswith(f"{command.purpose}\n\n{examples_of(command)}\n\n")
    assert command.note in text
    assert len(command.purpose) <= 100
    # A whole group is no option, see the table of bad input.
    assert re.search(r"--(data|optim|masks) \[", text) is None
    drawn = path in ("ijepa inspect masks", "ijepa inspect packing")
    for option, listed in {
        "--json": True,
        "--optim.lr FLOAT": path == "ijepa train",
        "--masks.targets INT": path == "ijepa train" or drawn,
        "--merge-rate FLOAT": path.split()[-1] in ("evaluate", "embed", "merges", "onnx", "torch"),
    }.items():
        assert (option in text) == listed, option


@pytest.mark.parametrize(("path", "command"), list(all_commands()))
def test_examples_can_be_run(path: str, command: Command) -> None:
    """As far as their options: their files are the user's."""
    for example in command.examples:
        ran, options = parse(shlex.split(example)[1:])
        assert ran is command
        assert isinstance(options, command.options)


def test_the_study_in_the_help_can_be_read(tmp_path: Path) -> None:
    file = tmp_path / "study.yaml"
    file.write_text(COMMANDS["study"].note.partition("\n")[2])
    study = load_study(file)
    assert list(study.arms) == ["linear", "mlp"]
    for flags in study.arms.values():
        configure(shlex.split(f"{study.common} {flags}"))


def test_a_usage_line_shows_what_is_required() -> None:
    assert ijepa("evaluate", "--help").out[0].endswith("RUN (--data SOURCE | --train SOURCE --val SOURCE) [OPTIONS]")
    assert ijepa("scan", "--help").out[0] == "usage: ijepa scan SOURCE [OPTIONS]"
    assert ijepa("inspect", "merges", "--help").out[0].endswith("RUN IMAGE ... --out DIR [OPTIONS]")


def test_help_shows_a_default_once() -> None:
    text = " ".join(" ".join(ijepa("train", "--help").out).split())
    assert "--optim.lr FLOAT Peak learning rate" in text
    assert text.count("(default: 0.001)") == 1
    assert "null: train for `epochs` instead. (default: null)" in text
    assert "--compile true|false" in text
    assert "--precision auto|bf16|fp32" in text
    assert "--encoder.variant Ti|S|B|L|H|g" in text
    assert "--encoder.patch_size 8|14|16" in text
    assert "a recipe (continue, from-teacher, own-images, own-images-cpu, own-images-no-color" in text
    assert "RECIPES" not in text
    assert "(default: knn linear)" in " ".join(" ".join(ijepa("evaluate", "--help").out).split())


def test_help_of_pictures() -> None:
    """`inspect` has commands of its own, each with its own arguments."""
    answer = ijepa("inspect")
    assert answer == ijepa("inspect", "--help")
    assert (answer.code, answer.err) == (0, [])
    for picture, command in INSPECT.items():
        assert any(re.search(rf"^ +{picture} +{re.escape(command.purpose)}", line) for line in answer.out)


def test_help_lists_the_commands() -> None:
    answer = ijepa()
    assert answer == ijepa("--help")
    assert (answer.code, answer.err) == (0, [])
    for name, command in COMMANDS.items():
        assert any(re.search(rf"{name} +{re.escape(command.purpose)}", line) for line in answer.out)


HEAVY = (
    "torch",
    "PIL",
    "pyarrow",
    "rich",
    "matplotlib",
    "safetensors",
    "huggingface_hub",
    "scipy",
    "pandas",
    "datasets",
    "fsspec",
)


def test_help_imports_no_heavy_library() -> None:
    """Importing torch takes seconds; each command imports its libraries when it runs."""
    program = f"""
import json, sys
from ijepa_enhanced.cli import main
for words in json.loads(sys.argv[1]):
    assert main([*words, "--help"]) == 0
print("loaded:", *sorted({{*{HEAVY!r}}} & {{*sys.modules}}))
"""
    every = [[], ["inspect"], *(path.split()[1:] for path, _ in all_commands())]
    done = subprocess.run(
        [sys.executable, "-c", program, json.dumps(every)], capture_output=True, text=True, check=True, timeout=300
    )
    assert done.stdout.splitlines()[-1] == "loaded:"


def test_protocols_are_those_that_are_written() -> None:
    assert (*FEATURE_PROTOCOLS, "attentive", "finetune", "dense") == PROTOCOLS


def test_version() -> None:
    answer = ijepa("--version")
    assert (answer.code, answer.err) == (0, [])
    assert re.fullmatch(r"ijepa \d+\.\d+\.\d+", answer.out[0])


FAILURES = [
    (["scan", "nope"], 2, "No such file or folder: nope."),
    (["scan", "nope", "--optim.lrr"], 2, "Unknown option '--optim.lrr'."),
]


@pytest.mark.parametrize(("arguments", "code", "words"), FAILURES)
def test_a_traceback_is_for_debugging_only(arguments: list[str], code: int, words: str) -> None:
    quiet, loud = ijepa(*arguments), ijepa(*arguments, "--debug")
    assert quiet.code == loud.code == code
    assert len(quiet.err) == 1
    assert quiet.err[0].startswith(f"ijepa: {words}")
    assert loud.err[0] == "Traceback (most recent call last):"
    assert loud.err[-1:] == quiet.err


def test_an_unexpected_error_is_one_sentence(monkeypatch: pytest.MonkeyPatch, pictures: Path) -> None:
    def fail(options: object) -> int:
        raise ZeroDivisionError("division by zero")

    monkeypatch.setattr("ijepa_enhanced.commands.scan.run", fail)
    assert ijepa("scan", pictures) == (
        1,
        [],
        [
            "ijepa: ZeroDivisionError: division by zero",
            "This is a bug in ijepa-enhanced. Run the command again with --debug and report the traceback.",
        ],
    )
    assert "in fail" in "\n".join(ijepa("scan", pictures, "--debug").err)


@pytest.mark.parametrize("error", [RequestError, SourceError, EncoderError, RunError, NotFiniteError, RankError])
def test_an_error_says_its_own_exit_code(
    error: type[UserError], monkeypatch: pytest.MonkeyPatch, pictures: Path
) -> None:
    def fail(options: object) -> int:
        raise error("This is wrong.")

    monkeypatch.setattr("ijepa_enhanced.commands.scan.run", fail)
    assert ijepa("scan", pictures) == (error.exit_code, [], ["ijepa: This is wrong."])


@pytest.mark.parametrize(
    ("arguments", "advice"),
    [
        (["scan", "photos"], ""),
        (["train", "photos"], ", or lower --data.tokens_per_pack"),
        (["evaluate", "run", "--data", "photos"], ", or lower --resolution"),
    ],
)
def test_the_advice_for_too_little_gpu_memory_is_an_option_of_the_command(
    arguments: list[str], advice: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def too_much(_: Any) -> int:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 16.00 GiB.")

    monkeypatch.setattr(f"ijepa_enhanced.commands.{arguments[0]}.run", too_much)
    said = f"ijepa: The GPU is out of memory. Close other programs that use the GPU{advice}."
    assert ijepa(*arguments) == (1, [], [said])


def test_an_interrupted_command_says_so(monkeypatch: pytest.MonkeyPatch, pictures: Path) -> None:
    monkeypatch.setattr("ijepa_enhanced.commands.scan.run", lambda options: signal.raise_signal(signal.SIGINT))
    assert ijepa("scan", pictures) == (1, [], ["ijepa: Interrupted."])


@pytest.mark.parametrize(("rank", "waited"), [("0", []), ("1", [cli.FIRST_RANK_SECONDS])])
def test_the_first_rank_of_a_machine_tells_of_a_wrong_request(
    rank: str, waited: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "run")
    monkeypatch.setenv("LOCAL_RANK", rank)
    slept: list[float] = []
    monkeypatch.setattr("ijepa_enhanced.cli.time.sleep", slept.append)
    assert ijepa("nothing").code == 2
    assert slept == waited


def test_an_interrupted_import_says_so() -> None:
    """In a process of its own: Ctrl-C then comes in the middle of an import, and Python's first handler is active."""
    program = """
import signal, sys
from ijepa_enhanced.__main__ import main
class Interrupting:
    def find_spec(self, name, *rest):
        if name == "ijepa_enhanced.commands.options":
            signal.raise_signal(signal.SIGINT)
signal.signal(signal.SIGINT, signal.default_int_handler)
sys.meta_path.insert(0, Interrupting())
main()
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (1, "", "ijepa: Interrupted.\n")


def test_a_recipe_for_a_gpu_says_so_on_a_cpu(monkeypatch: pytest.MonkeyPatch, pictures: Path, tmp_path: Path) -> None:
    monkeypatch.setattr("ijepa_enhanced.commands.train.best_device", lambda: torch.device("cpu"))
    monkeypatch.setattr("ijepa_enhanced.commands.train.train", lambda *rest: Outcome(0, 0, finished=True))
    monkeypatch.setattr("ijepa_enhanced.commands.train.draw", lambda *rest: [])
    said = [
        ijepa("train", pictures, "--config", recipe, "--run", tmp_path).err for recipe in ("own-images", "continue")
    ]
    assert said == [
        [
            "No GPU was found, and each step of own-images has 32,768 tokens, which is slow on a CPU. The recipe for a "
            "CPU is own-images-cpu."
        ],
        [],
    ]


def test_torchrun_shares_only_training_evaluation_and_embedding(
    monkeypatch: pytest.MonkeyPatch, pictures: Path
) -> None:
    for name, value in {"TORCHELASTIC_RUN_ID": "1", "WORLD_SIZE": "2", "RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    said = (
        "ijepa: `ijepa scan` does not run under torchrun: only train, evaluate and embed do. Run it without torchrun."
    )
    assert ijepa("scan", pictures) == (2, [], [said])


def test_each_worker_has_a_core_and_torch_has_half_of_them(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    given: list[int] = []
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(8))
    monkeypatch.setattr(torch, "get_num_threads", lambda: 8)
    monkeypatch.setattr(torch, "set_num_threads", given.append)
    monkeypatch.setenv("OMP_NUM_THREADS", "8")
    share_cores(3)
    assert given == []
    monkeypatch.delenv("OMP_NUM_THREADS")
    for workers in (0, 1, 3, 8):
        share_cores(workers)
    assert given == [8, 7, 5, 4]
    assert caplog.messages == []
    share_cores(9)
    assert given[-1] == 4
    assert caplog.messages == [
        "There are more workers (9) than CPU cores (8), so they slow each other down. Set --data.workers to 8."
    ]


def test_a_resolution_far_from_the_trained_one_is_pointed_out_once(run: Run, pictures: Path) -> None:
    """Two images, two encoders: one warning."""
    trained = load_config(run.folder).data.max_resolution
    assert trained is not None
    images = ("inspect", "merges", run.folder, pictures / "dark" / "0.png", pictures / "dark" / "2.png")
    for px, warned in ((trained, False), (4 * trained, True), (trained // 3, True)):
        told = f"The encoder was trained at a resolution of {trained} px but is used at {px} px"
        for answer in (
            ijepa(
                "evaluate", run.folder, "--train", pictures, "--val", pictures, "--resolution", str(px), "--baselines"
            ),
            ijepa(*images, "--resolution", str(px), "--out", run.folder / "merges"),
        ):
            assert answer.code == 0, answer.err
            assert sum(line.startswith(told) for line in answer.err) == warned, answer.err


def test_the_default_resolution_is_the_trained_one(run: Run, pictures: Path, tmp_path: Path) -> None:
    shutil.copytree(run.folder, tmp_path / "run")
    sources = ("--train", pictures, "--val", pictures, "--json", "--workers", "0")
    kept = []
    for more in ((), ("--resolution", "48"), ("--resolution", "native")):
        answer = ijepa("evaluate", tmp_path / "run", *sources, *more)
        record = json.loads((tmp_path / "run" / "evaluation.json").read_text())
        kept.append((record["settings"]["resolution"], scores(answer)))
    assert kept[0] == kept[1]
    assert [resolution for resolution, _ in kept] == [48, 48, None]
    assert kept[2][1] != kept[0][1]


@pytest.mark.parametrize(("gpu", "recipe"), [(True, "own-images"), (False, "own-images-cpu")])
def test_training_on_photos_picks_a_recipe_by_the_machine(
    gpu: bool, recipe: str, monkeypatch: pytest.MonkeyPatch, pictures: Path
) -> None:
    device = torch.device("mps" if gpu else "cpu")
    monkeypatch.setattr("ijepa_enhanced.commands.setup.best_device", lambda: device)
    answer = ijepa("train", pictures, "--steps", "7", "--print-config")
    why = "this machine has a GPU" if gpu else "no GPU was found"
    said = f"Using the recipe {recipe}, because {why}. Use --config NAME for another one."
    assert (answer.code, answer.err) == (0, [said])
    assert yaml.safe_load("\n".join(answer.out)) == printed("--config", recipe, "--steps", "7") | {
        "data": printed("--config", recipe)["data"] | {"source": str(pictures)}
    }


def test_photos_are_only_the_source_if_a_recipe_is_named(pictures: Path, run: Run) -> None:
    answer = ijepa("train", "--config", "own-images-no-color", pictures, "--print-config")
    assert (answer.code, answer.err) == (0, [])
    expected = printed("--config", "own-images-no-color")
    assert yaml.safe_load("\n".join(answer.out)) == expected | {"data": expected["data"] | {"source": str(pictures)}}
    resumed = ijepa("train", pictures, "--resume", run.folder, "--print-config")
    assert (resumed.code, resumed.err) == (0, [])
    assert yaml.safe_load("\n".join(resumed.out)) == yaml.safe_load((run.folder / "config.yaml").read_text())


def test_flags_override_a_recipe_wherever_they_stand() -> None:
    recipe = ("--config", "own-images-cpu")
    before, after = (printed(*flags) for flags in (("--steps", "7", *recipe), (*recipe, "--steps", "7")))
    assert before == after
    assert before["steps"] == 7


def test_one_labelled_source_is_split(run: Run, pictures: Path, tmp_path: Path) -> None:
    """Four of five images of each class are learned from."""
    shutil.copytree(run.folder, tmp_path / "run")
    command = ("evaluate", tmp_path / "run", "--data", pictures, "--workers", "0", "--json")
    answer = ijepa(*command)
    assert {"knn20", "linear", "rankme"} <= scores(answer).keys()
    few = FEW.format(pictures).replace("10", "8")
    assert answer.err == ["Scoring: trained", few]
    settings = json.loads((tmp_path / "run" / "evaluation.json").read_text())["settings"]
    assert (settings["data"], settings["seed"]) == (str(pictures), 0)
    assert "train" not in settings
    assert scores(ijepa(*command)) == scores(answer)


def test_brackets_in_names_are_not_markup(capsys: pytest.CaptureFixture[str]) -> None:
    """rich would read [bold] as a style, and [/] as an error."""
    table = Table("[bold]", "[/]", title=":smiley:")
    table.add_row("[red]pets[/red]", "a[0]")
    print_table(table)
    printed_text = capsys.readouterr().out
    for name in ("[bold]", "[/]", "[red]pets[/red]", "a[0]", ":smiley:"):
        assert name in printed_text
    with counting_bars() as bars:
        bars.add_task("[/] a [bold]class", total=1)
        output = io.StringIO()
        Console(file=output, width=100).print(bars.get_renderable())
    assert "[/] a [bold]class" in output.getvalue()


def test_a_warning_is_shown_once_for_each_event(pictures: Path, run: Run, tmp_path: Path) -> None:
    """An image that two encoders and pictures read again is left out once; in another command, it is again."""
    shutil.copytree(pictures, tmp_path / "photos")
    damaged = tmp_path / "photos" / "light" / "2.png"
    damaged.write_bytes(damaged.read_bytes()[:-2000])
    said = "Skipped light/2.png of {}: cannot be decoded: image file is truncated"
    for _ in range(2):
        answer = evaluate(run.folder, tmp_path / "photos", pictures, "--baselines")
        assert answer.err.count(said.format(tmp_path / "photos")) == 1
    for name in ("one", "two"):
        answer = train(tmp_path / "photos", tmp_path / name, data__max_unreadable=0.5)
        assert answer.code == 0, answer.err
        assert sum("light/2.png" in line for line in answer.err) == 1
