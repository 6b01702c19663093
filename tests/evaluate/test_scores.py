import pytest
import torch

from ijepa_enhanced.evaluate.scores import mean_per_class, top1


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
