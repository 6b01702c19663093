"""The monitor detects a collapse, does not change a healthy run, and keeps the best encoder."""

import dataclasses
import itertools
import json
import logging
import re
import signal
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from ijepa_enhanced.batch import MaskedBatch
from ijepa_enhanced.data.catalog import Catalog, open_catalog
from ijepa_enhanced.data.config import DataConfig
from ijepa_enhanced.data.plan import Pack, Plan
from ijepa_enhanced.data.sources.open import open_source
from ijepa_enhanced.devices import autocast, autocast_dtype
from ijepa_enhanced.distributed import Ranks
from ijepa_enhanced.encoder import Encoder
from ijepa_enhanced.evaluate.knn import knn_classify
from ijepa_enhanced.evaluate.rank import lidar, mean_cosine, rankme, spread
from ijepa_enhanced.jepa import JEPA
from ijepa_enhanced.models.config import EncoderConfig, MergeConfig, PredictorConfig
from ijepa_enhanced.models.preprocessing import Preprocessing
from ijepa_enhanced.objective import ObjectiveConfig
from ijepa_enhanced.train.config import MonitorConfig, OptimConfig, TrainConfig
from ijepa_enhanced.train.logging import read_log
from ijepa_enhanced.train.loop import train
from ijepa_enhanced.train.monitor import COST, MOST_PROBES, PASSES, History, default_images, steps_between_probes
from ijepa_enhanced.train.probe import VIEWS, ProbeSet

METRICS = {"rankme", "lidar", "spread", "cosine", "knn"}
FLOAT32 = torch.autocast("cpu", enabled=False)


def small_run(seed: int, **changes: object) -> TrainConfig:
    """30 steps of about 20 views, looked at every 5, with a teacher that follows at once."""
    config = TrainConfig(
        data=DataConfig(
            "synthetic", tokens_per_pack=512, min_resolution=32, max_resolution=48, max_view_tokens=36, workers=0
        ),
        encoder=EncoderConfig("Ti", 8, depth=2),
        predictor=PredictorConfig(32, 1, 2),
        optim=OptimConfig(lr=3e-3, warmup=0.1, ema=0.9),
        monitor=MonitorConfig(every=5, images=32),
        steps=30,
        log_every=5,
        seed=seed,
    )
    return dataclasses.replace(config, **changes)


def with_gradient(model: JEPA, batch: MaskedBatch) -> Tensor:
    """I-JEPA's targets with a gradient through them, so that a constant brings the loss to zero."""
    features = model.student(batch.packed)[batch.targets.index].float()
    return F.layer_norm(features, features.shape[-1:])


def test_the_alarm_fires_when_a_run_collapses(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(JEPA, "targets", with_gradient)
    config = small_run(
        0, objective=ObjectiveConfig(vicreg_weight=0.0), optim=OptimConfig(lr=3e-3, warmup=0.1, ema=0.0, final_ema=0.0)
    )
    with caplog.at_level(logging.INFO):
        train(config, tmp_path / "run")
    log = read_log(tmp_path / "run")
    assert log[-1]["loss"] < log[0]["loss"] / 3  # which looks like success
    alarms = [line["step"] for line in log if line["alarm"]]
    assert alarms[0] <= 25
    assert alarms == list(range(alarms[0], 31, 5))
    first, second, *_ = [message for message in caplog.messages if message.startswith("Monitor at step ")]
    names = ("RankMe", "LiDAR", "spread", "cosine", "kNN accuracy")
    assert re.sub(r" -?\d\S*?(%?)(?=,|$)", r"\1", first) == f"Monitor at step 0: {', '.join(names)}%"
    assert second.endswith("% (best so far)")
    (words,) = [record.message for record in caplog.records if record.levelno == logging.WARNING]
    assert words.startswith("The run is collapsing: in the last 2 checks, ")
    assert "spread and 1 - cosine were below a quarter of their maximum, so the features of different images" in words
    assert words.endswith(
        f"The best encoder (step {log[-1]['best']}) is in best/. In a new run, raise objective.vicreg_weight or lower "
        "optim.lr."
    )
    # Nothing from within the collapse, whatever its nearest neighbors say.
    assert log[-1]["best"] < alarms[0] - 5


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in (1, 2))])
def test_it_never_fires_on_a_healthy_run(seed: int, tmp_path: Path) -> None:
    train(small_run(seed), tmp_path / "run")
    log = read_log(tmp_path / "run")
    assert [line["step"] for line in log] == list(range(5, 31, 5))
    assert [line["alarm"] for line in log] == [0] * 6
    assert all(line.keys() >= METRICS for line in log)


def test_watching_changes_nothing(tiny: TrainConfig, tmp_path: Path) -> None:
    unwatched = dataclasses.replace(tiny, monitor=MonitorConfig(every=0))
    random = torch.get_rng_state()
    train(tiny, tmp_path / "watched")
    after = torch.get_rng_state()
    torch.set_rng_state(random)
    train(unwatched, tmp_path / "unwatched")
    assert torch.equal(after, torch.get_rng_state())
    weights, others = (Encoder.from_pretrained(tmp_path / run).state_dict() for run in ("watched", "unwatched"))
    assert all(torch.equal(weights[name], others[name]) for name in weights)
    learnt = ("step", "loss", "prediction", "vicreg", "fill", "grad_norm")
    watched, alone = (
        [[line[name] for name in learnt] for line in read_log(tmp_path / run)] for run in ("watched", "unwatched")
    )
    assert watched == alone
    assert not (tmp_path / "unwatched" / "best").exists()


def test_looks_are_logged_at_their_steps_and_at_the_end(tiny: TrainConfig, tmp_path: Path) -> None:
    config = dataclasses.replace(tiny, monitor=MonitorConfig(every=5, images=16))
    train(config, tmp_path / "run")
    log = {line["step"]: line for line in read_log(tmp_path / "run")}
    assert list(log) == [2, 4, 5, 6, 8, 10, 12]
    looked = [step for step, line in log.items() if METRICS & line.keys()]
    assert looked == [5, 10, 12]
    for step in looked:
        assert log[step].keys() >= METRICS | {"loss", "alarm", "best", "monitor_seconds"}


def declining(config: TrainConfig) -> TrainConfig:
    """A run of which the last teacher is not the best, by five of 24 images: rounding does not change that."""
    optim = OptimConfig(lr=3e-2, ema=0.0)
    return dataclasses.replace(config, optim=optim, monitor=MonitorConfig(2, 24), steps=20, seed=3)


def test_best_is_the_teacher_of_the_step_that_is_said(
    tiny: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = dataclasses.replace(tiny, monitor=MonitorConfig(2, 24))
    # The probes are at steps 0, 2, ..., 12. Step 6 is made the best, so that rounding has no say in it.
    found = iter([0.1, 0.1, 0.1, 0.9, 0.1, 0.1, 0.1])
    with monkeypatch.context() as patch:
        patch.setattr("ijepa_enhanced.train.probe.knn_of_halves", lambda *_: {"knn": next(found)})
        train(config, tmp_path / "run")
    log = {line["step"]: {name: line[name] for name in (*METRICS, "best")} for line in read_log(tmp_path / "run")}
    assert log[12]["best"] == 6
    probe, cpu = probe_of(config), torch.device("cpu")
    precision = autocast(cpu, autocast_dtype("auto", cpu))
    for folder, step in (("best", 6), ("encoder", 12)):
        metrics = probe.metrics(Encoder.from_pretrained(tmp_path / "run" / folder), precision, Ranks())
        others = [name for name in metrics if name != "knn"]
        assert [metrics[name] for name in others] == [log[step][name] for name in others]
        assert metrics["rankme"] != log[18 - step]["rankme"]  # so it is not the other teacher


def test_a_resumed_run_remembers_what_was_seen(
    tiny: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = declining(tiny)
    train(config, tmp_path / "whole")
    updates, original = itertools.count(1), JEPA.update_teacher

    def stop_at_19(model: JEPA, momentum: float) -> None:
        original(model, momentum)
        if next(updates) == 19:
            signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(JEPA, "update_teacher", stop_at_19)
    assert not train(config, tmp_path / "run").finished
    assert train(config, tmp_path / "run", resume=True).finished
    whole, resumed = (
        [{name: line[name] for name in (*METRICS, "alarm", "best")} for line in read_log(tmp_path / run)]
        for run in ("whole", "run")
    )
    assert resumed == whole
    files = [tmp_path / run / "best" / "model.safetensors" for run in ("whole", "run")]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_a_best_that_a_killed_run_saved_after_its_last_checkpoint_stays_the_best(
    tiny: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = dataclasses.replace(tiny, monitor=MonitorConfig(2, 24), checkpoint_every=4)
    # The probes are at steps 0, 2, 4 and 6; the one of step 8 ends the run, whose last checkpoint is of step 4.
    found = iter([0.1, 0.1, 0.1, 0.9])
    monkeypatch.setattr("ijepa_enhanced.train.probe.knn_of_halves", lambda *_: {"knn": next(found)})
    with pytest.raises(StopIteration):
        train(config, tmp_path / "run")
    best = (tmp_path / "run" / "best" / "model.safetensors").read_bytes()
    found = iter([0.2, 0.2, 0.2, 0.2])  # as on a GPU, where a run does not repeat itself
    train(config, tmp_path / "run", resume=True)
    assert [line["best"] for line in read_log(tmp_path / "run")] == [2, 4, 6, 6, 6, 6]
    assert (tmp_path / "run" / "best" / "model.safetensors").read_bytes() == best


def encoder_of(config: TrainConfig) -> Encoder:
    return Encoder.random(config.encoder.architecture, Preprocessing(), seed=0)


def probe_of(config: TrainConfig) -> ProbeSet:
    source = open_source(config.data.source)
    plan = Plan(open_catalog(source), config.data, config.encoder.patch_size, config.seed)
    return ProbeSet(
        source,
        plan,
        plan.epoch(0).images,
        config.monitor.images or 512,
        config.encoder.architecture,
        config.merging.teacher_rate,
    )


def shown(probe: ProbeSet, packs: list[Pack]) -> list[tuple[int, bytes]]:
    """Each view's row and its patches."""
    return [
        (int(row), view.numpy().tobytes())
        for batch in map(probe.batch, packs)
        for row, view in zip(batch.image_ids, batch.packed.split(), strict=True)
    ]


def test_the_seed_alone_decides_what_is_looked_at(tiny: TrainConfig) -> None:
    first, same = probe_of(tiny), probe_of(tiny)
    assert shown(first, first.images) == shown(same, same.images)
    assert shown(first, first.crops) == shown(same, same.crops)
    other = probe_of(dataclasses.replace(tiny, seed=1))
    assert {row for row, _ in shown(first, first.images)} != {row for row, _ in shown(other, other.images)}
    # The crops of other seeds differ, even those of the same image.
    assert not set(shown(first, first.crops)) & set(shown(other, other.crops))


def test_whole_images_once_and_eight_crops_of_each_object(tiny: TrainConfig) -> None:
    probe = probe_of(tiny)
    rows = [row for row, _ in shown(probe, probe.images)]
    assert len(rows) == len(set(rows)) == 16
    source = probe.dataset.source
    for pack in probe.images:
        for image, box, grid in zip(pack.images, pack.boxes, pack.grids, strict=True):
            assert (*box,) == (0, 0, *source.size(int(probe.dataset.catalog.rows[image])))
            # 48 px are 36 patches of 8 px, of which tokens_per_pack / 8 = 32 are allowed.
            assert 24 <= grid.prod() <= 32
    crops = Counter(row for row, _ in shown(probe, probe.crops))
    assert crops == dict.fromkeys(rows, 8)
    # Crops are drawn apart, but the edges of two of them can be moved to the same pixels.
    assert len({view for _, view in shown(probe, probe.crops)}) >= 8 * 16 - 2
    assert probe.tokens == sum(probe.batch(pack).packed.segments.total for pack in probe.images + probe.crops)
    assert all(pack.grids.prod(axis=1).sum() <= 256 for pack in probe.images + probe.crops)


def test_lidar_has_enough_views_for_the_width() -> None:
    config = small_run(0, monitor=MonitorConfig(every=5, images=512))
    objects = Counter(image for pack in probe_of(config).crops for image in pack.images.tolist())
    assert len(objects) * (VIEWS - 1) > config.encoder.architecture.width
    assert set(objects.values()) == {VIEWS}


def test_signs_are_those_of_the_same_images_looked_at_by_hand(tiny: TrainConfig) -> None:
    config = dataclasses.replace(tiny, data=dataclasses.replace(tiny.data, max_view_tokens=64))
    encoder = encoder_of(config)
    probe = probe_of(config)
    source = probe.dataset.source
    rows = [row for row, _ in shown(probe, probe.images)]
    z = encoder.embed([Path(config.data.source, source.key(row)) for row in rows], resolution=48)
    labels = torch.tensor([source.labels[row] for row in rows])
    predicted = torch.cat([knn_classify(z[8:], labels[8:], z[:8]), knn_classify(z[:8], labels[:8], z[8:])])
    metrics = probe.metrics(encoder, FLOAT32, Ranks())
    lidar_of_crops = metrics.pop("lidar")
    assert metrics == pytest.approx(
        {
            "rankme": rankme(z),
            "spread": spread(z),
            "cosine": mean_cosine(z),
            "knn": float((predicted == labels).double().mean()),
        },
        rel=1e-5,
    )
    views: dict[int, list[torch.Tensor]] = {}
    for batch in map(probe.batch, probe.crops):
        features = encoder(batch.packed).split(batch.packed.segments.lengths)
        for row, feature in zip(batch.image_ids.tolist(), features, strict=True):
            views.setdefault(row, []).append(feature.mean(dim=0))
    by_hand = torch.stack([torch.stack(crops) for crops in views.values()])
    assert by_hand.shape == (16, 8, 192)
    assert lidar_of_crops == pytest.approx(lidar(by_hand), rel=1e-4)


def test_the_teacher_merges_as_in_training(tiny: TrainConfig) -> None:
    merging = dataclasses.replace(tiny, merging=MergeConfig(teacher_rate=0.3))
    encoder = encoder_of(tiny)
    assert probe_of(tiny).metrics(encoder, FLOAT32, Ranks()) != probe_of(merging).metrics(encoder, FLOAT32, Ranks())


def test_unlabelled_images_have_no_knn_and_a_best_all_the_same(tiny: TrainConfig, tmp_path: Path) -> None:
    loose = tmp_path / "loose"
    loose.mkdir()
    for path in Path(tiny.data.source).rglob("*.png"):
        path.rename(loose / path.name)
    config = dataclasses.replace(tiny, data=dataclasses.replace(tiny.data, source=str(loose)))
    train(config, tmp_path / "run")
    log = [line for line in read_log(tmp_path / "run") if "rankme" in line]
    merits = {line["step"]: line["rankme"] * line["lidar"] * line["spread"] * (1 - line["cosine"]) for line in log}
    assert not any("knn" in line for line in log)
    assert log[-1]["best"] == max(merits, key=merits.__getitem__)
    Encoder.from_pretrained(tmp_path / "run" / "best")


def test_one_class_tells_nothing(tiny: TrainConfig) -> None:
    for path in Path(tiny.data.source, "b").iterdir():
        path.unlink()
    assert probe_of(tiny).metrics(encoder_of(tiny), FLOAT32, Ranks()).keys() == METRICS - {"knn"}


def test_images_that_cannot_be_decoded_are_left_out(tiny: TrainConfig) -> None:
    photos = sorted(Path(tiny.data.source).rglob("*.png"))
    for path in photos[2:]:
        path.write_bytes(path.read_bytes()[:-200])  # headers are fine
    probe = probe_of(dataclasses.replace(tiny, monitor=MonitorConfig(4, 24)))
    assert {row for row, _ in shown(probe, probe.images)} == {0, 1}
    assert probe.metrics(encoder_of(tiny), FLOAT32, Ranks()).keys() == METRICS - {"knn"}
    photos[0].write_bytes(b"")
    probe = probe_of(dataclasses.replace(tiny, monitor=MonitorConfig(4, 24)))
    assert probe.metrics(encoder_of(tiny), FLOAT32, Ranks()) == {}


@given(
    look=st.integers(1, 10**6),
    steps=st.integers(1, 10**6),
    step_tokens=st.floats(16, 10**6),
    log_every=st.integers(1, 500),
)
def test_the_watch_costs_no_more_than_it_may(look: int, steps: int, step_tokens: float, log_every: int) -> None:
    every = steps_between_probes(MonitorConfig(), look, steps, step_tokens, log_every)
    paid = COST * PASSES * step_tokens * steps
    if every:
        looks = 1 + len({*range(every, steps + 1, every), steps})
        assert looks * look <= paid * (1 + 1e-9)
        assert looks <= MOST_PROBES + 1
        assert every % log_every == 0
    else:
        assert 2 * look > paid * (1 - 1e-9)


def test_steps_between_probes_by_hand() -> None:
    # 3% of 2 * 1,000 * 1,000 tokens are 60,000, six looks of 10,000: one at the start and five in 1,000 steps.
    assert steps_between_probes(MonitorConfig(), 10_000, 1000, 1000.0, 1) == 200
    assert steps_between_probes(MonitorConfig(), 10_000, 1000, 1000.0, 30) == 210
    assert steps_between_probes(MonitorConfig(), 40_000, 1000, 1000.0, 1) == 0
    assert steps_between_probes(MonitorConfig(every=7), 40_000, 1000, 1000.0, 10) == 7
    assert steps_between_probes(MonitorConfig(), 1, 10**6, 1000.0, 1) == 10**4


def test_a_run_too_short_for_it_says_so(tiny: TrainConfig, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG, logger="ijepa_enhanced"):
        train(dataclasses.replace(tiny, monitor=MonitorConfig(), steps=2), tmp_path / "run")
    assert (
        "Monitoring is off: the run is so short that checks would cost more than 3% of it. "
        "Set monitor.every to monitor it anyway." in caplog.messages
    )
    assert not (tmp_path / "run" / "best").exists()


def found(rankme: float, lidar: float, spread: float, cosine: float, **knn: float) -> dict[str, float]:
    return {"rankme": rankme, "lidar": lidar, "spread": spread, "cosine": cosine, **knn}


def test_the_alarm_takes_two_signs_at_two_looks() -> None:
    history = History()
    assert history.add(0, found(8, 6, 0.4, 0.8)) == []
    assert history.add(1, found(40, 6, 0.4, 0.8)) == []
    assert history.add(2, found(9, 6, 0.4, 0.8)) == ["rankme"]
    assert history.add(3, found(9, 6, 0.4, 0.8)) == ["rankme"]
    assert not history.alarm  # one sign alone misleads
    assert history.add(4, found(9, 6, 0.4, 0.96)) == ["rankme", "1 - cosine"]
    assert not history.alarm
    assert history.add(5, found(40, 6, 0.05, 0.9)) == ["spread"]
    history.add(6, found(9, 1, 0.4, 0.8))
    assert not history.alarm  # not in a row
    history.add(7, found(9, 6, 0.05, 0.8))
    assert history.alarm
    history.add(8, found(40, 6, 0.4, 0.8))
    assert not history.alarm


def test_best_is_the_highest_knn_and_of_equals_the_last() -> None:
    history = History()
    for step, knn in enumerate([0.9, 0.1, 0.3, 0.2, 0.3, 0.25]):
        history.add(step, found(8, 6, 0.4, 0.8, knn=knn), trained=step > 0)
    assert (history.best_step, history.best) == (4, 0.3)
    history.add(6, found(1, 1, 0.01, 0.99, knn=0.5))
    assert history.best_step == 4  # collapsed


def test_best_without_labels_is_the_highest_product() -> None:
    history = History()
    history.add(1, found(10, 5, 0.4, 0.8))
    history.add(2, found(20, 5, 0.1, 0.5))  # 5, where the first is 4
    history.add(3, found(30, 5, 0.1, 0.7))  # 4.5
    assert history.best_step == 2


def test_what_is_remembered_survives_a_checkpoint() -> None:
    history = History()
    for step in range(3):
        history.add(step, found(1 / 3 + step, 0.1, 2 / 7, 0.3, knn=0.7))
    assert History(**json.loads(json.dumps(dataclasses.asdict(history)))) == history


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"every": -1}, "monitor.every must be null or at least 0, not -1."),
        ({"images": 1}, "monitor.images must be at least 2, not 1."),
    ],
)
def test_values_out_of_range_are_refused(values: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}$"):
        MonitorConfig(**values)


@pytest.mark.parametrize(
    ("classes", "images"), [(None, 512), (2, 512), (25, 512), (26, 520), (101, 2020), (1000, 4096)]
)
def test_many_classes_are_looked_at_in_more_images(classes: int | None, images: int) -> None:
    labels = None if classes is None else np.arange(3000) % classes
    sizes = np.full(3000, 64)
    catalog = Catalog(sizes, sizes, np.arange(3000), labels, None, "")
    assert default_images(catalog) == images
