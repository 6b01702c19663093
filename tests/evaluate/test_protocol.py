"""The scores of one pair of feature sets, by name."""

import pytest
import torch

from ijepa_enhanced.evaluate.features import Features
from ijepa_enhanced.evaluate.protocol import score
from ijepa_enhanced.evaluate.rank import rankme


def clusters(images: int, distance: float, seed: int) -> Features:
    """Three classes, their centres `distance` deviations apart, in eight dimensions."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(images) % 3
    values = torch.randn(images, 8, generator=generator) + distance * torch.eye(3, 8)[labels]
    return Features(values, labels, torch.arange(images), {}, 1.0)


def test_separable_features_score_everything_and_noise_scores_chance() -> None:
    separable = dict(score(clusters(120, 20.0, 0), clusters(60, 20.0, 1)))
    assert list(separable) == ["knn20", "knn20_mean_per_class", "linear", "linear_mean_per_class", "rankme"]
    assert [separable[key] for key in list(separable)[:4]] == [1.0] * 4
    noise = dict(score(clusters(300, 0.0, 0), clusters(300, 0.0, 1)))
    for key in list(noise)[:4]:
        # Four standard errors of 300 guesses at one of three.
        assert abs(noise[key] - 1 / 3) < 4 * (1 / 3 * 2 / 3 / 300) ** 0.5


def test_rankme_is_of_the_images_that_are_scored() -> None:
    train, val = clusters(120, 20.0, 0), clusters(60, 2.0, 1)
    assert dict(score(train, val))["rankme"] == rankme(val.values)
    assert rankme(val.values) != pytest.approx(rankme(train.values), rel=0.01)


def test_mean_per_class_weighs_a_rare_class_like_a_common_one() -> None:
    """Every image of class 2 lies among class 0, and it is 1 of 10 images but 1 of 3 classes."""
    train = clusters(90, 20.0, 0)
    val = clusters(30, 20.0, 1)
    keep = torch.cat([torch.where(val.labels == 0)[0][:9], torch.where(val.labels == 2)[0][:1]])
    assert val.labels is not None
    values, labels = val.values[keep].clone(), val.labels[keep]
    values[-1] = values[0]
    scores = dict(score(train, Features(values, labels, keep, {}, 1.0)))
    for key in ("knn20", "linear"):
        assert scores[key] == pytest.approx(0.9)
        assert scores[f"{key}_mean_per_class"] == pytest.approx(0.5)


def test_the_seed_reaches_the_linear_probe_alone() -> None:
    train, val = clusters(60, 1.0, 0), clusters(200, 1.0, 1)
    first, again, other = (dict(score(train, val, seed)) for seed in (0, 0, 5))
    assert first == again
    assert first["linear"] != other["linear"]
    del first["linear"], first["linear_mean_per_class"], other["linear"], other["linear_mean_per_class"]
    assert first == other
