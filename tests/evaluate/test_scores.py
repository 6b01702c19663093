import numpy as np
import pytest
import torch

from ijepa_enhanced.evaluate.scores import classification, interval, mcnemar, mean_per_class, top1


def test_imbalanced_by_hand():
    labels = torch.tensor([0] * 8 + [5] * 2 + [1000])
    predicted = torch.tensor([0] * 6 + [5, 1] + [5, 0] + [0])
    assert top1(predicted, labels) == pytest.approx(7 / 11)
    assert mean_per_class(predicted, labels) == pytest.approx((6 / 8 + 1 / 2 + 0) / 3)


def test_classes_that_only_occur_in_predictions_do_not_count():
    assert mean_per_class(torch.tensor([1, 2, 9, 9]), torch.tensor([1, 2, 2, 2])) == pytest.approx((1 + 1 / 3) / 2)


def test_the_last_class_all_wrong_still_counts():
    assert mean_per_class(torch.tensor([0, 0]), torch.tensor([0, 3])) == 0.5


def test_extremes():
    labels = torch.tensor([2, 0, 2, 7])
    assert (top1(labels, labels), mean_per_class(labels, labels)) == (1.0, 1.0)
    assert (top1(labels + 1, labels), mean_per_class(labels + 1, labels)) == (0.0, 0.0)


@pytest.mark.parametrize("score", [top1, mean_per_class])
def test_what_cannot_be_compared_is_an_error(score):
    for predicted, labels in [((0,), (0,)), ((3,), (2,)), ((1,), (2,)), ((2, 2), (2, 2))]:
        with pytest.raises(ValueError, match="predicted and labels must have the same nonzero length"):
            score(torch.zeros(predicted, dtype=torch.int64), torch.zeros(labels, dtype=torch.int64))


def test_a_classifier_by_hand():
    classes = torch.tensor([0, 2, 3, 5, 8, 9])
    logits = torch.eye(6)[[0, 1, 2, 3]] + torch.tensor([0.6, 0.5, 0.4, 0.3, 0.2, 0.1])
    # Right; right; second; the least likely; the prediction of a class that is not there is wrong.
    logits = torch.cat([logits, logits[:1]])
    scores = dict(classification("probe", logits, classes, torch.tensor([0, 2, 0, 9, 7])))
    assert scores == {
        "probe": 2 / 5,
        "probe_top5": pytest.approx(3 / 5),
        "probe_mean_per_class": pytest.approx((1 / 2 + 1 + 0 + 0) / 4),
        "probe_low": pytest.approx(0.1176, abs=1e-4),
        "probe_high": pytest.approx(0.7693, abs=1e-4),
    }


def test_with_fewer_classes_than_five_all_are_among_the_best():
    scores = dict(classification("x", torch.eye(3), torch.tensor([1, 2, 3]), torch.tensor([2, 3, 1])))
    assert (scores["x"], scores["x_top5"]) == (0.0, 1.0)


@pytest.mark.parametrize("right", [0, 1, 7, 19, 20])
def test_the_interval_is_the_shares_that_the_images_do_not_reject(right):
    """Wilson's: the shares p with |right / n - p| at most Z standard errors, the error being that under p itself."""
    images = 20
    shares = np.linspace(0, 1, 200001)
    with np.errstate(divide="ignore", invalid="ignore"):
        kept = shares[np.abs(right / images - shares) <= 1.959964 * np.sqrt(shares * (1 - shares) / images)]
    # The grid's step.
    assert interval(right, images) == pytest.approx((kept.min(), kept.max()), abs=5e-6)


def test_certain_scores_have_an_interval_too():
    low, high = interval(20, 20)
    # n / (n + Z^2)
    assert (low, high) == (pytest.approx(0.83887, abs=1e-5), 1.0)
    assert interval(0, 20) == (0.0, pytest.approx(1 - low))
    assert interval(50000, 50000)[0] > 0.9999


def test_the_interval_holds_the_truth_as_often_as_it_says():
    """Also near the ends, where the interval of resampling holds it far less often."""
    for share in (0.5, 0.97):
        right = np.random.default_rng(0).binomial(50, share, size=4000)
        held = [low <= share <= high for low, high in (interval(int(count), 50) for count in right)]
        # The number of right images is discrete, so coverage swings about 95% by a few points.
        assert 0.92 < np.mean(held) < 0.99


def test_mcnemar_by_hand():
    """Of 10 images, both are right on 2 and wrong on 2; of the other six, one classifier is right on five."""
    right = torch.tensor([1, 1, 0, 0, 1, 1, 1, 1, 1, 0]).bool()
    others = torch.tensor([1, 1, 0, 0, 0, 0, 0, 0, 0, 1]).bool()
    # 1 and 6 of the 64 ways in which six coins can fall have no or one head; two-sided.
    assert mcnemar(right, others) == mcnemar(others, right) == 2 * (1 + 6) / 64


def test_mcnemar_of_equals():
    right = torch.tensor([True, False, True])
    assert mcnemar(right, right) == 1.0
    # As many favor one as the other: twice the tail would be more than 1.
    assert mcnemar(torch.tensor([True, False]), torch.tensor([False, True])) == 1.0
