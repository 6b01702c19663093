"""The scores of one pair of feature sets, by name."""

import dataclasses

import numpy as np
import pytest
import torch
from torch import Tensor

from ijepa_enhanced.evaluate import protocol
from ijepa_enhanced.evaluate.features import Features
from ijepa_enhanced.evaluate.labelled import share_of_classes
from ijepa_enhanced.evaluate.protocol import Scoring, few_labels, halves, score, score_parts
from ijepa_enhanced.evaluate.rank import rankme
from ijepa_enhanced.evaluate.sweep import sweep_scores


def clusters(images: int, distance: float, seed: int) -> Features:
    """Three classes, their centers `distance` deviations apart, in eight dimensions."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(images) % 3
    values = torch.randn(images, 8, generator=generator) + distance * torch.eye(3, 8)[labels]
    return Features(values, labels, torch.arange(images), {}, 1.0)


def test_separable_features_score_everything_and_noise_scores_chance() -> None:
    separable = score(clusters(120, 20.0, 0), clusters(60, 20.0, 1))
    probe = ["linear", "linear_top5", "linear_mean_per_class", "linear_low", "linear_high"]
    knn = [f"knn{k}{suffix}" for k in (1, 5, 20) for suffix in ("", "_mean_per_class")]
    assert list(separable) == [*knn, *probe, "rankme"]
    # Sixty of sixty; Wilson's lower bound is n / (n + Z^2).
    expected = dict.fromkeys((*knn, *probe), 1.0) | {"linear_low": pytest.approx(0.93983, abs=1e-5)}
    assert {key: separable[key] for key in (*knn, *probe)} == expected
    noise = score(clusters(300, 0.0, 0), clusters(300, 0.0, 1))
    for key in (*knn, "linear", "linear_mean_per_class"):
        # Four standard errors of 300 guesses at one of three.
        assert abs(noise[key] - 1 / 3) < 4 * (1 / 3 * 2 / 3 / 300) ** 0.5


def test_rankme_is_of_the_images_that_are_scored() -> None:
    train, val = clusters(120, 20.0, 0), clusters(60, 2.0, 1)
    assert (score(train, val))["rankme"] == rankme(val.values)
    assert rankme(val.values) != pytest.approx(rankme(train.values), rel=0.01)


def test_mean_per_class_weighs_a_rare_class_like_a_common_one() -> None:
    """Every image of class 2 lies among class 0, and it is 1 of 10 images but 1 of 3 classes."""
    train = clusters(90, 20.0, 0)
    val = clusters(30, 20.0, 1)
    keep = torch.cat([torch.where(val.labels == 0)[0][:9], torch.where(val.labels == 2)[0][:1]])
    assert val.labels is not None
    values, labels = val.values[keep].clone(), val.labels[keep]
    values[-1] = values[0]
    scores = score(train, Features(values, labels, keep, {}, 1.0))
    for key in ("knn20", "linear"):
        assert scores[key] == pytest.approx(0.9)
        assert scores[f"{key}_mean_per_class"] == pytest.approx(0.5)


def test_the_seed_reaches_the_linear_probe_alone() -> None:
    train, val = clusters(40, 0.5, 0), clusters(200, 0.5, 1)
    first, again, *others = (score(train, val, how=Scoring(seed)) for seed in (0, 0, *range(1, 8)))
    assert first == again
    assert any(other["linear"] != first["linear"] for other in others)
    for other in others:
        assert all(other[name] == first[name] for name in first if not name.startswith("linear"))


def layered(features: Features, layers: Tensor) -> Features:
    return dataclasses.replace(features, layers=layers)


def test_the_last_four_layers_are_averaged_and_concatenated() -> None:
    """Layers 0 and 1 hold a code whose sum tells nothing, and layers 2 and 3 nothing at all."""
    train, val = clusters(120, 20.0, 0), clusters(60, 20.0, 1)
    found = []
    for features in (train, val):
        assert features.labels is not None
        code = 20 * torch.eye(3)[features.labels]
        noise = torch.randn(len(code), 4, 3, generator=torch.Generator().manual_seed(2))
        found.append(layered(features, noise + torch.stack([code, -code, 0 * code, 0 * code], dim=1)))
    scores = score(*found, protocols=["linear4"])
    assert scores["linear4_concat"] == 1.0
    assert scores["linear4_average"] < 0.7
    same = [layered(features, features.values[:, None].expand(-1, 4, -1)) for features in (train, val)]
    assert (score(*same, protocols=["linear4"]))["linear4_average"] == 1.0


def test_pixels_have_no_layers() -> None:
    assert list(score(clusters(60, 20.0, 0), clusters(60, 20.0, 1), protocols=["linear4"])) == ["rankme"]


def test_few_labels_are_a_share_of_every_class_and_fixed_by_the_seed() -> None:
    labels = torch.from_numpy(np.random.default_rng(0).permutation(np.repeat([0, 3, 4], [250, 60, 4])))
    ten, one = few_labels(labels, 10, seed=0), few_labels(labels, 1, seed=0)
    assert labels[ten].unique(return_counts=True)[1].tolist() == [25, 6, 1]
    assert labels[one].unique(return_counts=True)[1].tolist() == [2, 1, 1]
    assert ten.unique().tolist() == ten.tolist()
    assert set(one.tolist()) < set(ten.tolist())
    assert torch.equal(ten, few_labels(labels, 10, seed=0))
    assert not torch.equal(ten, few_labels(labels, 10, seed=1))


@pytest.mark.parametrize("from_single", [True, False])
def test_a_share_of_classes_is_that_of_each_class_alone(from_single: bool) -> None:
    rng = np.random.default_rng(0)
    labels, order = rng.permutation(np.repeat([7, 3, 9, 4], [26, 60, 4, 1])), rng.permutation(91)
    expected: list[int] = []
    for label in (3, 4, 7, 9):
        own = order[labels[order] == label]
        expected += own[: max(1, round(len(own) * 0.1)) if from_single or len(own) > 1 else 0].tolist()
    assert share_of_classes(labels, 10, order, from_single).tolist() == sorted(expected)


def test_lowshot_probes_see_only_their_share() -> None:
    """All other images look like the next class, which would cost everything."""
    train, val = clusters(300, 20.0, 0), clusters(60, 20.0, 1)
    assert train.labels is not None
    values = train.values[torch.arange(300) + 1 - 3 * (torch.arange(300) % 3 == 2)]
    few = few_labels(train.labels, 10, seed=0)
    values[few] = train.values[few]
    scores = score(dataclasses.replace(train, values=values), val, protocols=["lowshot", "linear"])
    assert [scores[key] for key in ("lowshot10", "lowshot10_high", "linear")] == [1.0, 1.0, 0.0]


def test_halves_share_every_class_and_are_the_same_for_every_setting() -> None:
    val = clouds(201)
    first, second = halves(val)
    assert sorted([*first.tolist(), *second.tolist()]) == list(range(201))
    assert val.labels is not None
    for one, other in zip(val.labels[first].bincount(), val.labels[second].bincount(), strict=True):
        assert abs(int(one) - int(other)) <= 1
    again = halves(dataclasses.replace(val, values=val.values + 1))
    assert torch.equal(first, again[0])
    assert first.tolist() != list(range(0, 201, 2)), "images that lie next to each other are often alike"


def clouds(images: int) -> Features:
    return clusters(images, 0.5, 1)


def test_parts_have_the_scores_of_their_own_images_from_one_training(monkeypatch: pytest.MonkeyPatch) -> None:
    train, val = clusters(120, 1.0, 0), clusters(90, 1.0, 1)
    trained = []
    probe = protocol.linear_probe
    monkeypatch.setattr(protocol, "linear_probe", lambda *args: trained.append(args) or probe(*args))
    parts = halves(val)
    found = score_parts(train, val, parts)
    assert len(trained) == 1
    for rows, scores in zip(parts, found, strict=True):
        assert val.labels is not None
        alone = Features(val.values[rows], val.labels[rows], val.image_ids[rows], {}, 1.0)
        assert scores == score(train, alone)
    whole = score(train, val)
    assert sum(len(rows) * part["linear"] for rows, part in zip(parts, found, strict=True)) == pytest.approx(
        90 * whole["linear"]
    )


def test_a_sweep_reports_images_that_have_not_chosen() -> None:
    """The half that chooses is right everywhere, the other is mislabelled everywhere."""
    train, val = clusters(120, 20.0, 0), clusters(60, 20.0, 1)
    assert val.labels is not None
    labels = val.labels.clone()
    reported = halves(val)[1]
    # Labels change within the half, so that the halves stay the same: a rotation of the classes.
    values = val.values.clone()
    values[reported] = train.values[(labels[reported] + 1) % 3]
    scores = sweep_scores(train, dataclasses.replace(val, values=values), Scoring())
    assert (scores["choosing_linear"], scores["linear"], scores["knn20"]) == (1.0, 0.0, 0.0)
