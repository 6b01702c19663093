"""Runs that start from weights, and runs with a teacher that does not change."""

import dataclasses
import logging
import shutil
import signal
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from ijepa_enhanced.cli import main
from ijepa_enhanced.encoder import Encoder
from ijepa_enhanced.errors import EncoderError
from ijepa_enhanced.models.config import Architecture
from ijepa_enhanced.models.preprocessing import Origin, Preprocessing
from ijepa_enhanced.train import loop
from ijepa_enhanced.train.checkpoint import latest_checkpoint
from ijepa_enhanced.train.config import MonitorConfig, TrainConfig
from ijepa_enhanced.train.loop import train
from ijepa_enhanced.train.monitor import History
from ijepa_enhanced.train.saved import start_of
from ijepa_enhanced.train.start import load_start

WEIGHTS = Architecture(
    48, 2, 3, 96, 8, positions="table", position_grid=(5, 5), resampling="bicubic", class_token=True, layer_scale=True
)
TEACHER = Architecture(32, 1, 2, 64, 14, positions="rope", class_token=True, registers=2, gated=True)


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    """An encoder with a class token and statistics of its own."""
    preprocessing = Preprocessing(40, mean=(0.4, 0.5, 0.6), std=(0.2, 0.3, 0.4), pooling="cls")
    encoder = Encoder.random(WEIGHTS, preprocessing, 3)
    encoder.origin = Origin("somebody/weights", "transformers vit", "cc-by-nc-4.0")
    encoder.save_pretrained(tmp_path / "weights")
    return tmp_path / "weights"


@pytest.fixture
def teacher(tmp_path: Path) -> Path:
    """An encoder of another width, another patch size and with registers."""
    Encoder.random(TEACHER, Preprocessing(40, mean=(0.5, 0.5, 0.5)), 4).save_pretrained(tmp_path / "teacher")
    return tmp_path / "teacher"


def same_weights(a: Path, b: Path) -> bool:
    one, other = (Encoder.from_pretrained(path).network.state_dict() for path in (a, b))
    return one.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in one.items())


def names_in(run: Path) -> list[str]:
    """Names of the tensors in the newest checkpoint of a run."""
    checkpoint = latest_checkpoint(run / "checkpoints")
    assert checkpoint is not None
    return [name for path in checkpoint.glob("*.safetensors") for name in load_file(path)]


def test_scores_are_compared_with_the_weights_that_a_run_started_from(
    tiny: TrainConfig, weights: Path, tmp_path: Path
) -> None:
    train(dataclasses.replace(tiny, init=str(weights), steps=2), tmp_path / "run")
    for folder in ("", "encoder", "start"):
        place = tmp_path / "run" / folder
        start = start_of(Encoder.from_pretrained(place), place)
        expected = Encoder.from_pretrained(weights)
        for name, value in start.state_dict().items():
            assert torch.equal(value, expected.state_dict()[name]), name


def test_a_run_starts_from_weights_and_keeps_their_preprocessing(
    tiny: TrainConfig, weights: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    config = dataclasses.replace(tiny, init=str(weights), steps=4)
    outcome = train(config, tmp_path / "run")
    start, end = (Encoder.from_pretrained(tmp_path / "run" / name) for name in ("start", "encoder"))
    assert same_weights(tmp_path / "run" / "start", weights)
    assert not same_weights(tmp_path / "run" / "encoder", weights)
    assert end.config == WEIGHTS
    assert end.origin == start.origin
    assert "Its license (cc-by-nc-4.0) applies to what is trained from it too." in caplog.text
    assert end.preprocessing == dataclasses.replace(start.preprocessing, resolution=45)
    assert end.record.training is not None
    assert (end.record.training["steps"], end.record.training["images_seen"]) == (4, outcome.images)
    card = (tmp_path / "run" / "encoder" / "README.md").read_text()
    for line in (f"| Images seen | {outcome.images:,} |", "| Initial weights | weights |", "license: cc-by-nc-4.0"):
        assert f"\n{line}\n" in card
    # Adam's steps are at most the learning rate each.
    moved = end.network.blocks.layers[0].qkv.weight - start.network.blocks.layers[0].qkv.weight
    assert 0 < moved.abs().max() <= 4 * config.optim.lr


@pytest.mark.parametrize("role", ["init", "teacher"])
def test_it_resumes_without_the_weights_that_it_was_given(
    role: str, tiny: TrainConfig, weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = dataclasses.replace(tiny, **{role: str(weights)})
    train(config, tmp_path / "whole")
    original, steps = loop.JEPA.update_teacher, []

    def stop(model: loop.JEPA, momentum: float) -> None:
        original(model, momentum)
        steps.append(momentum)
        if len(steps) == 7:
            signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(loop.JEPA, "update_teacher", stop)
    assert not train(config, tmp_path / "run").finished
    shutil.rmtree(weights)
    assert train(config, tmp_path / "run", resume=True).finished
    assert same_weights(tmp_path / "run", tmp_path / "whole")
    assert any(name.startswith("model.teacher.") for name in names_in(tmp_path / "run")) == (role == "init")


def test_a_teacher_does_not_change_and_the_student_is_what_is_saved(
    tiny: TrainConfig, teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    models: list[loop.JEPA] = []
    make = loop.JEPA
    monkeypatch.setattr(loop, "JEPA", lambda *args: models.append(make(*args)) or models[0])
    train(dataclasses.replace(tiny, teacher=str(teacher), steps=4), tmp_path / "run")
    (model,) = models
    before = Encoder.from_pretrained(teacher).network.state_dict()
    assert all(torch.equal(value, before[name]) for name, value in model.teacher.state_dict().items())
    saved = Encoder.from_pretrained(tmp_path / "run")
    assert saved.config == tiny.encoder.architecture
    assert all(
        torch.equal(value, model.student.state_dict()[name]) for name, value in saved.network.state_dict().items()
    )


def test_the_license_of_a_teacher_is_said_and_recorded(
    tiny: TrainConfig, weights: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    train(dataclasses.replace(tiny, teacher=str(weights), steps=1), tmp_path / "run")
    said = "Its license (cc-by-nc-4.0) applies to what is trained from it too."
    assert f"Predicting the features of {weights}. {said}" in caplog.text
    card = (tmp_path / "run" / "encoder" / "README.md").read_text()
    assert "\nlicense: cc-by-nc-4.0\n" in card
    assert "\n| Teacher license | cc-by-nc-4.0 |\n" in card
    # It goes on to what starts from the student.
    start = load_start(TrainConfig(init=str(tmp_path / "run")), tmp_path, resume=False)
    assert start.origin == Origin("run", "ijepa-enhanced", "cc-by-nc-4.0")


def test_the_targets_are_the_teachers_own_features(tiny: TrainConfig, teacher: Path) -> None:
    """Its own statistics and patch size: those of pixels at 14/8 of the size, patch by patch."""
    frozen = Encoder.from_pretrained(teacher)
    same_size = Encoder.random(dataclasses.replace(TEACHER, patch_size=8), frozen.preprocessing, 0)
    student = dataclasses.replace(tiny.encoder.architecture)
    model = loop.JEPA(student, tiny.predictor, tiny.objective, 1, None, same_size)
    packed = next(same_size.packs([torch.randint(0, 256, (3, 40, 56), dtype=torch.uint8)]))
    assert model.to_teacher is not None
    seen = model.to_teacher(model.normalize(packed))
    # Two roundings of float32 instead of one, of values up to 3.
    torch.testing.assert_close(seen.values, same_size.preprocess(packed).values, rtol=0, atol=1e-6)
    model = loop.JEPA(student, tiny.predictor, tiny.objective, 1, None, frozen)
    flat = packed.with_values(torch.full_like(packed.values, 90))
    assert model.to_teacher is not None
    seen = model.to_teacher(model.normalize(flat))
    assert seen.values.shape[1] == 14 * 14 * 3
    expected = (90 / 255 - 0.5) / torch.tensor(frozen.preprocessing.std)
    torch.testing.assert_close(
        seen.values.unflatten(1, (-1, 3)), expected.expand(len(seen.values), 196, 3), rtol=0, atol=1e-6
    )


def test_the_start_can_be_the_best(
    tiny: TrainConfig, weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    scores = iter([0.9, 0.5, 0.4, 0.3])
    monkeypatch.setattr(
        "ijepa_enhanced.train.probe.ProbeSet.metrics",
        lambda *_: {"knn": next(scores), "rankme": 5.0, "lidar": 5.0, "spread": 1.0, "cosine": 0.5},
    )
    config = dataclasses.replace(tiny, init=str(weights), monitor=MonitorConfig(every=4, images=16))
    train(config, tmp_path / "run")
    assert same_weights(tmp_path / "run" / "best", weights)
    assert "The encoder that this run started from scored better than every later one." in caplog.text
    assert History().best_step is None


def test_random_weights_are_never_the_best() -> None:
    history, metrics = History(), {"knn": 0.9, "rankme": 5.0}
    history.add(0, metrics, trained=False)
    assert history.best_step is None
    history.add(4, metrics | {"knn": 0.1})
    assert (history.best_step, history.best) == (4, 0.1)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (
            ["--encoder.depth", "2"],
            "--encoder.depth has no effect with --init, because the weights determine the encoder. Remove it.",
        ),
        (["--init", "nowhere"], "No such file or folder: nowhere."),
        (["--teacher", "nowhere"], "No such file or folder: nowhere."),
        (["--teacher", "nowhere", "--objective.prediction_weight", "0"], "teacher has no effect unless"),
    ],
)
def test_wrong_requests(
    more: list[str], message: str, weights: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    assert main(["train", str(photos), "--run", str(run), "--init", str(weights), *more]) == 2
    assert message in capsys.readouterr().err
    assert not run.exists()


def test_weights_whose_patches_training_does_not_support(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    large = tmp_path / "large"
    Encoder.random(dataclasses.replace(WEIGHTS, patch_size=32), Preprocessing(), 0).save_pretrained(large)
    assert main(["train", str(photos), "--run", str(tmp_path / "run"), "--init", str(large)]) == 2
    assert f"{large} has patches of 32 px. Training supports only 8, 14 or 16 px." in capsys.readouterr().err


def test_a_folder_without_weights_leaves_no_run(tiny: TrainConfig, tmp_path: Path) -> None:
    with pytest.raises(EncoderError, match="No such file or folder"):
        train(dataclasses.replace(tiny, init="nowhere"), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_run_that_was_killed_before_it_kept_its_start_resumes(
    tiny: TrainConfig, weights: Path, tmp_path: Path
) -> None:
    config = dataclasses.replace(tiny, init=str(weights), steps=3)
    train(config, tmp_path / "whole")
    run = tmp_path / "run"
    loop.write_config(config, run)
    (run / "start").mkdir()
    assert train(config, run, resume=True).finished
    assert same_weights(run, tmp_path / "whole")


def test_resolutions_follow_from_the_weights_unless_they_are_set(
    weights: Path, photos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def resolutions(*more: str) -> tuple[int, int]:
        assert main(["train", str(photos), "--init", str(weights), "--print-config", *more]) == 0
        config = yaml.safe_load(capsys.readouterr().out)
        assert config["encoder"]["patch_size"] == WEIGHTS.patch_size
        return config["data"]["min_resolution"], config["data"]["max_resolution"]

    assert resolutions() == (30, 40)
    assert resolutions("--data.min_resolution", "24", "--data.max_resolution", "56") == (24, 56)
    assert resolutions("--config", "own-images-cpu") == (48, 64)
