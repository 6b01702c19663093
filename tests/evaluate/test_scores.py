import numpy as np
import pytest
import torch

from ijepa_enhanced.evaluate.scores import classification, interval, mean_per_class, top1


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
        with pytest.raises(ValueError, match="one prediction a label"):
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
        "probe_low": 0.0,
        "probe_high": 0.8,
    }


def test_with_fewer_classes_than_five_all_are_among_the_best():
    scores = dict(classification("x", torch.eye(3), torch.tensor([1, 2, 3]), torch.tensor([2, 3, 1])))
    assert (scores["x"], scores["x_top5"]) == (0.0, 1.0)


@pytest.mark.parametrize(("right", "images"), [(1, 7), (450, 1000), (990, 1000), (9000, 50000)])
def test_the_interval_is_that_of_resampling(right, images):
    rng = np.random.default_rng(0)
    correct = np.arange(images) < right
    drawn = [correct[rng.integers(images, size=images)].mean() for _ in range(2000)]
    # A percentile of 2,000 draws is off by up to some tenth of their deviation, and lies between two images.
    error = 0.2 * np.std(drawn) + 1 / images
    assert interval(right, images) == pytest.approx(np.percentile(drawn, [2.5, 97.5]).tolist(), abs=error)


def test_certain_scores_have_no_interval():
    assert interval(0, 5) == (0.0, 0.0)
    assert interval(5, 5) == (1.0, 1.0)
