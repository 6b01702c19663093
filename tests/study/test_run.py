"""A study runs every arm with every seed once, says what became of each run, and starts nothing if a flag is wrong."""

import csv
import dataclasses
import itertools
import json
import shlex
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image

from ijepa_enhanced.cli import main
from ijepa_enhanced.commands.study import configure
from ijepa_enhanced.errors import RequestError
from ijepa_enhanced.evaluate.features import extract
from ijepa_enhanced.jepa import JEPA
from ijepa_enhanced.study import run as study
from ijepa_enhanced.study.compare import summary
from ijepa_enhanced.study.config import StudyConfig
from ijepa_enhanced.study.rows import read_rows
from ijepa_enhanced.study.run import PACE_STEPS, run_study, seconds_per_step
from ijepa_enhanced.train.config import TrainConfig

TINY = (
    "--data.tokens_per_pack 512 --data.min_resolution 32 --data.max_resolution 48 --data.workers 0 "
    "--encoder.variant Ti "
    "--encoder.patch_size 8 --encoder.depth 1 --predictor.width 32 --predictor.depth 1 --predictor.heads 2 "
    "--steps 4 --log_every 1 --monitor.every 2 --monitor.images 16"
)


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """24 noisy images, half of them dark."""
    folder = tmp_path_factory.mktemp("photos")
    rng = np.random.default_rng(0)
    for number in range(24):
        path = folder / ("dark", "light")[number % 2] / f"{number:02d}.png"
        path.parent.mkdir(exist_ok=True)
        pixels = rng.integers(0, 128, (40, 40 + number, 3)) + 127 * (number % 2)
        Image.fromarray(pixels.astype(np.uint8)).save(path)
    return folder


@pytest.fixture
def plan(photos: Path) -> StudyConfig:
    arms = {"jepa": "", "plain": "--objective.vicreg_weight 0"}
    common = f"{TINY} --data.source {photos}"
    return StudyConfig(arms, str(photos), common, resolution=32, seeds=(0, 1))


def test_every_arm_is_run_with_every_seed_and_scored(plan: StudyConfig, tmp_path: Path) -> None:
    rows = run_study(plan, tmp_path / "out", configure)
    assert [(row.arm, row.seed) for row in rows] == [("jepa", 0), ("jepa", 1), ("plain", 0), ("plain", 1)]
    for row in rows:
        assert (row.outcome, row.steps) == ("finished", 4)
        assert None not in row
        assert row.fall is not None
        assert row.fall >= 0
        config = yaml.safe_load((tmp_path / "out" / f"{row.arm}-{row.seed}" / "config.yaml").read_text())
        assert config["seed"] == row.seed
        assert config["objective"]["vicreg_weight"] == (0.1 if row.arm == "jepa" else 0.0)
    # Arms of one seed and architecture start from the same weights.
    assert rows[0].start_linear == rows[2].start_linear
    with (tmp_path / "out" / "study.csv").open(newline="") as file:
        written = list(csv.DictReader(file))
    assert [float(line["linear"]) for line in written] == [row.linear for row in rows]
    with (tmp_path / "out" / "summary.csv").open(newline="") as file:
        written = list(csv.DictReader(file))
    assert [line["verdict"] for line in written] == [line["verdict"] for line in summary(rows)]


def test_the_arms_come_in_the_order_of_the_file(plan: StudyConfig, tmp_path: Path) -> None:
    """The first one is what the others are compared with, whenever it was run."""
    arms = {"a": "--steps 1", "b": "--steps 1"}
    first = run_study(dataclasses.replace(plan, arms={"b": "--steps 1"}, seeds=(0,)), tmp_path / "out", configure)
    both = run_study(dataclasses.replace(plan, arms=arms, seeds=(0,)), tmp_path / "out", configure)
    assert [row.arm for row in both] == ["a", "b"]
    assert both[1:] == first
    turned = dataclasses.replace(plan, arms=dict(reversed(arms.items())), seeds=(0,))
    assert [row.arm for row in run_study(turned, tmp_path / "out", configure)] == ["b", "a"]


@pytest.mark.parametrize(("resolution", "shown"), [(None, 48), (40, 40), ("native", None)])
def test_scores_are_at_the_resolution_that_the_study_says(
    plan: StudyConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, resolution: int | str | None, shown: int | None
) -> None:
    """Without one it is the resolution that the encoder was trained at: 48 px."""
    seen = []

    def extracted(encoder: Any, images: Any, setting: Any, **options: Any) -> Any:
        seen.append(setting.resolution)
        return extract(encoder, images, setting, **options)

    monkeypatch.setattr(study, "extract", extracted)
    one = dataclasses.replace(plan, arms={"jepa": "--steps 1"}, seeds=(0,), resolution=resolution)
    run_study(one, tmp_path / "out", configure)
    assert set(seen) == {shown}


def test_an_interrupted_study_goes_on_in_the_middle_of_its_run(
    plan: StudyConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = run_study(plan, tmp_path / "whole", configure)
    updates, original = itertools.count(1), JEPA.update_teacher

    def stop_in_the_second_run(model: JEPA, momentum: float) -> None:
        original(model, momentum)
        if next(updates) == 4 + 2:
            signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(JEPA, "update_teacher", stop_in_the_second_run)
    with pytest.raises(KeyboardInterrupt):
        run_study(plan, tmp_path / "out", configure)
    assert [row.arm for row in read_rows(tmp_path / "out" / "study.csv")] == ["jepa"]
    found = run_study(plan, tmp_path / "out", configure)
    assert next(updates) == 4 * 4 + 1, "no step was done twice"
    assert [row._replace(seconds=0.0) for row in found] == [row._replace(seconds=0.0) for row in whole]
    assert read_rows(tmp_path / "out" / "study.csv") == found
    assert run_study(plan, tmp_path / "out", configure) == found
    assert next(updates) == 4 * 4 + 2, "and none again"


def test_an_interrupted_study_says_how_to_continue(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("ijepa_enhanced.commands.study.run_study", interrupted)
    file = tmp_path / "study.yaml"
    file.write_text("val: synthetic\narms: {one: --steps 1, two: --steps 2}\n")
    assert main(["study", str(file), "--out", str(tmp_path / "out")]) == 1
    assert capsys.readouterr().err == "ijepa: Interrupted. To continue, run the same command again.\n"


def test_a_run_that_fails_is_a_line_and_the_others_go_on(
    plan: StudyConfig, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    arms = {"wild": "--optim.lr 1e30 --optim.warmup 0", "jepa": ""}
    rows = run_study(dataclasses.replace(plan, arms=arms, seeds=(0,)), tmp_path / "out", configure)
    assert [row.arm for row in rows] == ["wild", "jepa"]
    assert rows[0].outcome.startswith("Training has diverged: ")
    assert rows[0].knn20 is rows[0].linear is None
    assert rows[1].outcome == "finished"
    assert "wild, seed 0: Training has diverged: " in caplog.text
    assert [(line["arm"], line["failed"]) for line in summary(rows)] == [("wild", 1), ("jepa", 0)]


def test_a_study_without_a_score_fails(plan: StudyConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "study.yaml"
    too_small = {"small": "--data.min_resolution 8 --data.max_resolution 8"}
    file.write_text(yaml.safe_dump({"arms": too_small, "common": plan.common, "val": plan.val, "seeds": [0]}))
    assert main(["study", str(file), "--out", str(tmp_path / "out")]) == 1
    assert "1 failed" in capsys.readouterr().out


def test_what_failed_before_it_began_is_tried_again(plan: StudyConfig, tmp_path: Path) -> None:
    small = dataclasses.replace(plan, seeds=(0,), arms={"jepa": "--data.min_resolution 8 --data.max_resolution 8"})
    (row,) = run_study(small, tmp_path / "out", configure)
    assert row.outcome.startswith("Training needs at least 2 images")
    (row,) = run_study(dataclasses.replace(small, arms={"jepa": ""}), tmp_path / "out", configure)
    assert row.outcome == "finished"


def test_seconds_give_all_runs_of_an_arm_the_steps_that_fit(
    plan: StudyConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The arms are timed in turns, and the steps follow from the median. Runs that are added get the same steps."""
    timed: list[float] = []
    found = iter([0.5, 1.0, 9.0, 1.5, 0.6, 0.1])

    def paced(config: TrainConfig) -> float:
        timed.append(config.objective.vicreg_weight)
        return next(found)

    monkeypatch.setattr(study, "seconds_per_step", paced)
    plan = dataclasses.replace(plan, seconds=3.0, seeds=(0,))
    assert [row.steps for row in run_study(plan, tmp_path / "out", configure)] == [5, 3]
    jepa, plain = 0.1, 0.0
    assert timed == [jepa, plain] * 3
    rows = run_study(dataclasses.replace(plan, seeds=(1,)), tmp_path / "out", configure)
    assert [(row.arm, row.steps) for row in rows] == [("jepa", 5), ("jepa", 5), ("plain", 3), ("plain", 3)]
    found = iter([1.5, 1.5, 1.5])
    rows = run_study(dataclasses.replace(plan, arms=plan.arms | {"new": ""}), tmp_path / "out", configure)
    assert [(row.arm, row.steps) for row in rows][-1] == ("new", 2)
    assert timed == [jepa, plain] * 3 + [jepa] * 3, "arms that have runs are not timed again"


def test_an_arm_that_cannot_be_timed_is_a_line_and_the_others_go_on(
    plan: StudyConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(study, "PACE_STEPS", 4)
    arms = {"wild": "--optim.lr 1e30 --optim.warmup 0", "jepa": ""}
    rows = run_study(dataclasses.replace(plan, arms=arms, seeds=(0,), seconds=0.2), tmp_path / "out", configure)
    assert [row.outcome.partition(":")[0] for row in rows] == ["Training has diverged", "finished"]


def test_a_trial_times_a_step(plan: StudyConfig) -> None:
    start = time.perf_counter()
    found = seconds_per_step(configure(shlex.split(plan.common)))
    assert 0 < found < (time.perf_counter() - start) / (PACE_STEPS / 2)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--optim.lrr 1", "Unknown option '--optim.lrr'. Did you mean '--optim.lr'?"),
        ("--print-config", "--print-config cannot be used in `arms` or `common` of a study."),
        ("--optim.lr fast", "optim.lr must be a number, not 'fast'."),
        ("--seed 3", "--seed cannot be used in `arms` or `common` of a study. Use the key `seeds` instead."),
    ],
)
def test_a_wrong_arm_starts_nothing(plan: StudyConfig, tmp_path: Path, flags: str, message: str) -> None:
    arms = {"jepa": "", "wrong": flags}
    with pytest.raises(RequestError) as error:
        run_study(dataclasses.replace(plan, arms=arms), tmp_path / "out", configure)
    assert str(error.value).endswith(message)
    assert not (tmp_path / "out").exists()


def test_another_study_is_not_taken_for_the_one_that_was_run(plan: StudyConfig, photos: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    plan = dataclasses.replace(plan, seeds=(0,), arms={"jepa": ""})
    rows = run_study(plan, out, configure)

    def refused(**changes: Any) -> str:
        with pytest.raises(RequestError) as error:
            run_study(dataclasses.replace(plan, **changes), out, configure)
        assert read_rows(out / "study.csv") == rows
        return str(error.value)

    assert refused(resolution=40) == (
        f"The runs in {out} used resolution = 32, but the study file now has resolution = 40. "
        "Restore the old value, or choose another --out."
    )
    other = Path(shutil.copytree(photos, tmp_path / "photos"))
    assert refused(train=str(other)).startswith(f"The runs in {out} used train = {photos}, but")
    arms = {"first": f"--data.source {other}", "jepa": ""}  # without `train`, probes learn from the first arm's images
    assert refused(arms=arms).startswith(f"The runs in {out} used train = {photos}, but")
    for changes in ({"arms": {"jepa": "--optim.lr 0.5"}}, {"common": f"{plan.common} --optim.lr 0.5"}):
        assert refused(**changes).startswith(f"{out}/jepa-0 was started with optim.lr = ")
    more = run_study(dataclasses.replace(plan, arms={"other": "", "jepa": ""}), out, configure)
    assert more[1:] == rows
    assert [row.arm for row in more] == ["other", "jepa"]


def test_images_that_changed_are_not_taken_for_those_that_were_scored(
    plan: StudyConfig, photos: Path, tmp_path: Path
) -> None:
    out, val = tmp_path / "out", Path(shutil.copytree(photos, tmp_path / "val"))
    plan = dataclasses.replace(plan, val=str(val), seeds=(0,), arms={"jepa": "--steps 1"})
    rows = run_study(plan, out, configure)
    (val / "dark" / "22.png").unlink()
    with pytest.raises(RequestError) as error:
        run_study(plan, out, configure)
    assert str(error.value) == (
        f"The runs in {out} were scored on other images: those of {photos} or {val} have changed. Choose another --out."
    )
    assert read_rows(out / "study.csv") == rows


def test_the_command_prints_a_table_and_writes_a_page(
    plan: StudyConfig, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "study.yaml"
    file.write_text(yaml.safe_dump(dataclasses.asdict(dataclasses.replace(plan, seeds=[0]))))
    assert main(["study", str(file), "--out", str(tmp_path / "out"), "--json"]) == 0
    out = capsys.readouterr().out
    page = (tmp_path / "out" / "report.html").read_text()
    for arm in ("jepa", "plain"):
        assert arm in out
        assert f"{arm}-0" in page
    section = page.partition('<section id="study">')[2].partition("</section>")[0]
    assert (
        f"Scored on {photos} at a resolution of 32 px. Probes were trained on the training images of the first arm."
        in section
    )
    assert "not tested: only one seed</td>" in section
    rows = json.loads(out.splitlines()[-1])["rows"]
    assert [row["arm"] for row in rows] == ["jepa", "plain"]
    for name in ("study.csv", "summary.csv", "report.html"):
        assert str(tmp_path / "out" / name) in out.splitlines()
