import numpy as np
import pytest
import torch

from ijepa_enhanced.evaluate import knn
from ijepa_enhanced.evaluate.cost import peak_bytes
from ijepa_enhanced.evaluate.knn import knn_classify, knn_votes
from ijepa_enhanced.evaluate.standardize import standardize


def brute_force(train, labels, queries, k, temperature):
    """The protocol by hand, one query at a time, in float64."""
    mean, std = train.mean(axis=0), train.std(axis=0)
    train, queries = (train - mean) / std, (queries - mean) / std
    answers = []
    for query in queries:
        similarity = train @ query / np.linalg.norm(train, axis=1) / np.linalg.norm(query)
        votes = {}
        for image in np.argsort(-similarity)[:k]:
            votes[labels[image]] = votes.get(labels[image], 0) + np.exp(similarity[image] / temperature)
        answers.append(max(votes, key=votes.get))
    return answers


def problem(n=300, m=200, d=8, seed=0):
    rng = np.random.default_rng(seed)
    labels = np.array([3, 0, 17, 9])[rng.integers(4, size=n)]
    # Classes overlap, and dimensions differ in offset and scale: what the standardization is there for.
    train = (rng.normal(size=(n, d)) + 0.1 * labels[:, None]) * np.arange(1, d + 1) ** 2 + 5
    return train, labels, rng.normal(size=(m, d)) * 2 * np.arange(1, d + 1) ** 2 + 10


@pytest.mark.parametrize(("k", "temperature"), [(1, 0.07), (5, 0.07), (20, 0.07), (20, 1.0), (50, 0.02), (300, 0.3)])
def test_agrees_with_brute_force(k, temperature):
    train, labels, queries = problem()
    predicted = knn_classify(*map(torch.from_numpy, (train, labels, queries)), k=k, temperature=temperature)
    assert predicted.dtype == torch.int64
    assert predicted.tolist() == brute_force(train, labels, queries, k, temperature)


def test_defaults_are_dinos():
    train, labels, queries = problem(seed=1)
    predicted = knn_classify(*map(torch.from_numpy, (train, labels, queries)))
    assert predicted.tolist() == brute_force(train, labels, queries, 20, 0.07)


def test_a_near_neighbor_outvotes_a_far_majority_only_at_low_temperature():
    train = torch.tensor([[1.0, 0.1], [0.4, 1.0], [0.4, 1.1], [-1.0, -0.1], [-0.4, -1.0], [-0.4, -1.1]])
    labels = torch.tensor([5, 2, 2, 7, 7, 7])
    query = torch.tensor([[1.0, 0.1]])
    assert knn_classify(train, labels, query, k=3, temperature=0.07).tolist() == [5]
    assert knn_classify(train, labels, query, k=3, temperature=100.0).tolist() == [2]


@pytest.mark.parametrize(("queries_at_once", "images_at_once"), [(7, 300), (200, 11), (13, 40), (1, 1)])
def test_chunks_do_not_change_the_answer(monkeypatch, queries_at_once, images_at_once):
    train, labels, queries = map(torch.from_numpy, problem())
    whole = knn_votes(train, labels, queries, (1, 5, 20))
    monkeypatch.setattr(knn, "QUERIES", queries_at_once)
    monkeypatch.setattr(knn, "IMAGES", images_at_once)
    for one, other in zip(whole, knn_votes(train, labels, queries, (1, 5, 20)), strict=True):
        assert torch.equal(one, other)


def test_several_k_in_one_pass_are_those_of_each(monkeypatch):
    train, labels, queries = map(torch.from_numpy, problem(n=500))
    passes = []
    nearest = knn._nearest
    monkeypatch.setattr(knn, "_nearest", lambda *args: passes.append(args) or nearest(*args))
    together = knn_votes(train, labels, queries, (1, 5, 20, 600))
    assert len(passes) == 1
    for k, found in zip((1, 5, 20, 600), together, strict=True):
        assert torch.equal(found, knn_classify(train, labels, queries, k))
        if k < 600:  # in exact arithmetic a sum over all images depends on no order either
            assert found.tolist() == brute_force(train.numpy(), labels.numpy(), queries.numpy(), k, 0.07)


def test_ties_beyond_the_list_vote_from_every_block(monkeypatch):
    """Each of 60 images is there three times or more, in blocks of 7, so the k-th has equals in other blocks."""
    rng = np.random.default_rng(0)
    points = rng.normal(size=(60, 8))
    copies = np.concatenate([np.arange(60)] * 3 + [np.arange(0, 60, 2)] * 30)
    labels = rng.integers(4, size=len(copies)) * 5
    queries = rng.normal(size=(50, 8))
    monkeypatch.setattr(knn, "IMAGES", 7)
    mean, std = points[copies].mean(axis=0), points[copies].std(axis=0)
    unit = (points - mean) / std
    unit /= np.linalg.norm(unit, axis=1, keepdims=True)
    counted = dict.fromkeys((1, 5, 20), 0)
    found = knn_votes(*map(torch.from_numpy, (points[copies], labels, queries)), tuple(counted))
    for k, predicted in zip(counted, found, strict=True):
        for query, answer in zip((queries - mean) / std, predicted.tolist(), strict=True):
            similarity = (unit @ query / np.linalg.norm(query))[copies]
            kth = np.sort(similarity)[-k]
            voters = similarity >= kth - 1e-9
            counted[k] += voters.sum() > 21
            votes = [np.exp(similarity[voters & (labels == label)] / 0.07).sum() for label in np.unique(labels)]
            assert answer == np.unique(labels)[int(np.argmax(votes))]
    assert min(counted.values()) > 5, "more images vote than are listed"


@pytest.mark.parametrize("collapsed", [False, True])
def test_memory_does_not_grow_with_images_times_classes(collapsed):
    """One-hot votes and all similarities would be 480 MB here."""
    generator = torch.Generator().manual_seed(0)
    train = torch.zeros(20000, 4) if collapsed else torch.randn(20000, 4, generator=generator)
    labels = torch.arange(20000) % 1000
    queries = torch.randn(5000, 4, generator=generator)
    peak = peak_bytes(lambda: knn_votes(train, labels, queries, (1, 5, 20)), torch.device("cpu"))
    # 64 MiB of similarities, as much for the next block or a comparison, and a few votes [1024, 1000] of 4 MB.
    assert peak < 3 * 2**26


def test_k_beyond_all_images_means_all():
    train, labels, queries = map(torch.from_numpy, problem(n=30))
    assert torch.equal(knn_classify(train, labels, queries, k=1000), knn_classify(train, labels, queries, k=30))


def test_affine_changes_of_the_features_change_nothing():
    train, labels, queries = problem()
    scale, shift = 10.0 ** np.arange(-4, 4), np.arange(8) * 100.0 * 10.0 ** np.arange(-4, 4)
    changed = knn_classify(*map(torch.from_numpy, (train * scale + shift, labels, queries * scale + shift)))
    assert changed.tolist() == brute_force(train, labels, queries, 20, 0.07)


def test_a_dimension_constant_in_training_is_ignored_whatever_the_queries_hold():
    train, labels, queries = map(torch.from_numpy, problem())
    # 0.1 is no binary fraction: its mean in float32 is off by rounding, which a division by the standard deviation
    # would blow up to the size of a real feature.
    more_train = torch.cat([train, torch.full((len(train), 1), 0.1)], dim=1)
    more_queries = torch.cat([queries, torch.randn(len(queries), 1, generator=torch.Generator().manual_seed(0))], dim=1)
    standardized, standardized_queries, _, _ = standardize(more_train, labels, more_queries)
    assert not standardized[:, -1].any()
    assert not standardized_queries[:, -1].any()
    assert torch.equal(knn_classify(more_train, labels, more_queries), knn_classify(train, labels, queries))


def test_standardized_over_train_alone():
    train, labels, queries = map(torch.from_numpy, problem())
    standardized, standardized_queries, classes, numbers = standardize(train, labels, queries)
    torch.testing.assert_close(standardized.mean(0), torch.zeros(8), atol=1e-5, rtol=0)
    torch.testing.assert_close(standardized.square().mean(0), torch.ones(8), atol=1e-4, rtol=0)
    expected = (queries - train.mean(0)) / train.std(0, correction=0)
    torch.testing.assert_close(standardized_queries, expected.float(), atol=1e-4, rtol=1e-4)
    assert classes.tolist() == [0, 3, 9, 17]
    assert torch.equal(classes[numbers], labels)


def test_ties_do_not_depend_on_the_order_of_images():
    train = torch.tensor([[1.0, 0.0]] * 5 + [[-1.0, 0.0]] * 3)
    labels = torch.tensor([4, 4, 1, 1, 1, 6, 6, 2])
    queries = torch.tensor([[2.0, 0.0], [-2.0, 0.0]])
    for seed in range(10):
        order = torch.randperm(8, generator=torch.Generator().manual_seed(seed))
        assert knn_classify(train[order], labels[order], queries, k=1).tolist() == [1, 6]


def test_equal_votes_go_to_the_smallest_label():
    train = torch.tensor([[1.0, 0.0], [1.0, 0.0], [-1.0, 0.0], [-1.0, 0.0]])
    assert knn_classify(train, torch.tensor([8, 3, 5, 9]), train[[0, 2]], k=2).tolist() == [3, 5]


def test_collapsed_features_give_the_largest_class():
    labels = torch.tensor([0] * 30 + [1] * 40 + [2] * 30)
    predicted = knn_classify(torch.full((100, 4), 0.1), labels, torch.full((3, 4), 0.1))
    assert predicted.tolist() == [1, 1, 1]


def test_a_low_temperature_does_not_overflow():
    train, labels, queries = map(torch.from_numpy, problem())
    cold = knn_classify(train, labels, queries, temperature=1e-4)
    assert torch.equal(cold, knn_classify(train, labels, queries, k=1))


def test_half_precision_and_no_queries():
    train, labels, queries = map(torch.from_numpy, problem())
    rounded, rounded_queries = train.bfloat16(), queries.bfloat16()
    expected = knn_classify(rounded.double(), labels, rounded_queries.double())
    assert torch.equal(knn_classify(rounded, labels, rounded_queries), expected)
    assert knn_classify(train, labels, queries[:0]).shape == (0,)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"train": torch.zeros(0, 2), "train_labels": torch.zeros(0, dtype=torch.int64)},
            "same nonzero length, not 0 ",
        ),
        ({"train": torch.zeros(3)}, r"\[N, D\]"),
        ({"queries": torch.zeros(1, 3)}, r"\[1, 3\]"),
        ({"train_labels": torch.tensor([0, 1])}, r"same nonzero length, not 3 and \[2\]"),
        ({"train_labels": torch.tensor([0, -1, 1])}, "one is -1"),
        ({"queries": torch.tensor([[0.0, torch.nan]])}, "NaN or infinite"),
        ({"train": torch.full((3, 2), torch.inf)}, "NaN or infinite"),
        ({"k": 0}, "must be positive, not 0"),
        ({"temperature": 0.0}, r"must be positive.* 0\.0"),
    ],
)
def test_what_makes_no_sense_is_an_error(change, message):
    arguments = {"train": torch.eye(3, 2), "train_labels": torch.arange(3), "queries": torch.ones(1, 2)}
    with pytest.raises(ValueError, match=message):
        knn_classify(**arguments | change)
