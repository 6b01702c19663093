import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

from ijepa_enhanced.devices import threads
from ijepa_enhanced.evaluate import linear
from ijepa_enhanced.evaluate.cost import peak_bytes
from ijepa_enhanced.evaluate.linear import calibrated_loss, softmax_regression, stratified_split
from ijepa_enhanced.evaluate.scores import top1
from ijepa_enhanced.randomness import Purpose, generator


def linear_probe(*args, **kwargs):
    """The predicted labels."""
    logits, classes = linear.linear_probe(*args, **kwargs)
    return classes[logits.argmax(dim=1)]


def clouds(n, d, classes, noise, seed=0):
    """Train and test images of Gaussian classes: float32 [n, d], int64 [n], twice."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(classes, size=2 * n)
    values = rng.normal(size=(classes, d))[labels] + noise * rng.normal(size=(2 * n, d))
    values, labels = torch.from_numpy(values).float(), torch.from_numpy(labels)
    return values[:n], labels[:n], values[n:], labels[n:]


def digits():
    values, labels = map(torch.from_numpy, load_digits(return_X_y=True))
    order = torch.from_numpy(np.random.default_rng(0).permutation(len(labels)))
    values, labels = values[order].float(), labels[order]
    return values[:900], labels[:900], values[900:], labels[900:]


def best_of_sklearn(train, train_labels, queries, labels):
    """The best test score over C: more than any protocol may choose, so a bound to come near."""
    scaler = StandardScaler().fit(train)
    scores = []
    for c in (1e-3, 1e-2, 1e-1):
        model = LogisticRegression(C=c, max_iter=2000).fit(scaler.transform(train), train_labels)
        scores.append(model.score(scaler.transform(queries), labels))
    return max(scores)


@pytest.mark.parametrize(
    "problem",
    [digits, lambda: clouds(1000, 64, 5, 5.0)],
    ids=["digits", "high-dimensional noise"],
)
def test_as_good_as_scikit_learn(problem):
    train, train_labels, queries, labels = problem()
    score = top1(linear_probe(train, train_labels, queries), labels)
    # One point is ten test images. Half of that was measured over seeds and problems; the rest is for other BLAS.
    assert score > best_of_sklearn(train, train_labels, queries, labels) - 0.01


def test_the_strength_is_chosen_by_images_not_trained_on():
    train, train_labels, queries, labels = clouds(500, 200, 5, 8.0)
    probe = top1(linear_probe(train, train_labels, queries), labels)
    scaler = StandardScaler().fit(train)
    x, q = (torch.from_numpy(scaler.transform(z)).float() for z in (train, queries))
    weakest = softmax_regression(x, F.one_hot(train_labels, 5).float(), [1e-6])[0]
    # Hardly regularized, it learns its images by heart: the training loss cannot but choose that.
    assert ((x @ weakest).argmax(dim=1) == train_labels).all()
    assert probe > top1((q @ weakest).argmax(dim=1), labels) + 0.03


@pytest.mark.parametrize("best", [0, 3, len(linear.STRENGTHS) - 1])
def test_the_chosen_strength_minimizes_the_held_out_loss(monkeypatch, best):
    train, train_labels, queries, _ = clouds(300, 8, 3, 2.0)
    trained, losses = [], iter([1.0 if number == best else 9.0 for number in range(len(linear.STRENGTHS))])
    fit = linear.softmax_regression

    def spy(x, targets, strengths, start=None, rows=None):
        trained.append((len(x) if rows is None else len(rows), strengths))
        return fit(x, targets, strengths, start, rows)

    def loss(logits, y):
        assert logits.shape == (60, 3)
        return torch.tensor([next(losses)])

    monkeypatch.setattr(linear, "softmax_regression", spy)
    monkeypatch.setattr(linear, "losses_by_temperature", loss)
    linear_probe(train, train_labels, queries)
    assert trained == [(240, linear.STRENGTHS), (300, linear.STRENGTHS[best : best + 1])]


def test_same_seed_same_answer_and_no_other_state():
    train, train_labels, queries, _ = clouds(300, 16, 4, 2.5)
    torch.manual_seed(1)
    before, before_numpy = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    first = linear_probe(train, train_labels, queries, seed=3)
    assert torch.equal(torch.get_rng_state(), before)
    assert (np.random.get_state()[1] == before_numpy).all()  # noqa: NPY002
    torch.manual_seed(2)
    assert torch.equal(linear_probe(train, train_labels, queries, seed=3), first)


def test_scores_hardly_depend_on_the_seed():
    train, train_labels, queries, labels = clouds(1000, 32, 5, 3.0)
    scores = [top1(linear_probe(train, train_labels, queries, seed), labels) for seed in range(3)]
    assert max(scores) - min(scores) < 0.01


def test_affine_changes_of_the_features_change_nothing():
    train, train_labels, queries, _ = clouds(300, 16, 4, 2.5)
    expected = linear_probe(train, train_labels, queries)
    scale = 2.0 ** torch.arange(-8, 8)
    assert torch.equal(linear_probe(train * scale, train_labels, queries * scale), expected)
    shifted = linear_probe(train * scale + 10 * scale, train_labels, queries * scale + 10 * scale)
    assert top1(shifted, expected) > 0.99


def test_the_bias_carries_a_shifted_boundary():
    # Nine of ten images are of class 0, with one feature that hardly tells: without a bias it would split the queries.
    rng = np.random.default_rng(0)
    labels = torch.from_numpy((rng.random(1000) < 0.1).astype(np.int64))
    train = torch.from_numpy(rng.normal(size=(1000, 1))) + 0.2 * labels[:, None]
    assert top1(linear_probe(train, labels, train), labels) > 0.85


def test_labels_with_gaps_and_classes_of_one_image():
    train, train_labels, queries, labels = clouds(100, 16, 3, 0.5)
    train = torch.cat([train, torch.full((1, 16), 20.0), torch.full((1, 16), -20.0)])
    train_labels = torch.cat([train_labels * 10 + 4, torch.tensor([1, 77])])
    predicted = linear_probe(train, train_labels, queries)
    assert predicted.dtype == torch.int64
    assert top1(predicted, labels * 10 + 4) > 0.98
    assert linear_probe(train, train_labels, train[-2:]).tolist() == [1, 77]


@pytest.mark.parametrize("n", [1, 2, 4, 6])
def test_a_handful_of_images_one_a_class(n):
    train = torch.eye(n, 6)
    assert linear_probe(train, torch.arange(n) * 3, train).tolist() == [3 * i for i in range(n)]


def test_features_from_inference_mode_in_any_precision():
    train, train_labels, queries, _ = clouds(300, 16, 4, 2.5)
    with torch.inference_mode():
        inference_train, inference_queries = train.bfloat16(), queries.bfloat16()
    expected = linear_probe(train.bfloat16().double(), train_labels, queries.bfloat16().double())
    assert top1(linear_probe(inference_train, train_labels, inference_queries), expected) > 0.99


def test_a_fifth_of_every_class_is_held_out():
    numbers = torch.from_numpy(np.random.default_rng(0).permutation(np.repeat(np.arange(5), [50, 23, 9, 100, 1])))
    fitted, held_out = stratified_split(numbers, generator(0, Purpose.HOLDOUT))
    assert sorted(torch.cat([fitted, held_out]).tolist()) == list(range(183))
    for count, held in zip(numbers.bincount(), numbers[held_out].bincount(minlength=5), strict=True):
        assert count // 5 <= held <= -(-count // 5)
    assert set(held_out.tolist()) != set(stratified_split(numbers, generator(1, Purpose.HOLDOUT))[1].tolist())


@pytest.mark.parametrize(("images", "held"), [(1, 0), (2, 1), (3, 1), (4, 1), (5, 1), (9, 1), (10, 2)])
def test_of_two_images_or_more_one_is_held_out(images, held):
    fitted, held_out = stratified_split(torch.zeros(images, dtype=torch.int64), generator(0, Purpose.HOLDOUT))
    assert (len(fitted), len(held_out)) == (images - held, held)


def test_no_class_is_held_out_whole():
    numbers = torch.cat([torch.arange(20), torch.arange(0, 20, 2)])  # ten classes of one image, ten of two
    fitted, held_out = stratified_split(numbers, generator(0, Purpose.HOLDOUT))
    assert set(numbers[fitted].tolist()) == set(range(20))
    assert len(held_out) == 4, "a fifth of those with two"


def test_one_image_of_each_class_gets_the_middle_strength(monkeypatch):
    trained, fit = [], linear.softmax_regression

    def spy(x, targets, strengths, start=None, rows=None):
        trained.append([*strengths])
        return fit(x, targets, strengths, start, rows)

    monkeypatch.setattr(linear, "softmax_regression", spy)
    train, _, queries, _ = clouds(12, 8, 3, 2.0)
    linear_probe(train, torch.arange(12), queries)
    assert trained[-1] == [pytest.approx(1e-3)]


def test_the_weights_are_scikit_learns():
    x, y, _, _ = clouds(600, 7, 4, 1.0)
    x = F.pad(x, (0, 1), value=1.0)
    found = softmax_regression(x, F.one_hot(y, 4).float(), [0.1, 1e-3])
    for weights, strength in zip(found, (0.1, 1e-3), strict=True):
        # Its loss is the sum over images, times C, and the squares by 2.
        model = LogisticRegression(C=1 / (strength * len(x)), tol=1e-6, max_iter=1000).fit(x[:, :-1], y)
        torch.testing.assert_close(
            weights[:-1].T.double(), torch.from_numpy(model.coef_).double(), rtol=0.01, atol=1e-3
        )
        # One number for all classes makes no difference.
        bias, other = weights[-1].double(), torch.from_numpy(model.intercept_).double()
        torch.testing.assert_close(bias - bias.mean(), other - other.mean(), rtol=0.01, atol=1e-3)


def test_the_start_makes_no_difference():
    x, y, _, _ = clouds(300, 7, 4, 1.0)
    targets = F.one_hot(y, 4).float()
    start = torch.randn(7, 4, generator=torch.Generator().manual_seed(0))
    before = start.clone()
    found = softmax_regression(x, targets, [0.01], start)
    # Probabilities: the same number added to the last weight of all classes changes none.
    expected = softmax_regression(x, targets, [0.01])
    torch.testing.assert_close((x @ found[0]).softmax(1), (x @ expected[0]).softmax(1), rtol=1e-2, atol=1e-3)
    assert torch.equal(start, before)


def test_targets_may_be_shares_of_classes():
    """An image of two classes weighs as one of each."""
    x, y, _, _ = clouds(100, 5, 3, 1.0)
    targets = F.one_hot(y, 3).float()
    mixed = 0.5 * targets + 0.5 * targets.roll(1, dims=1)
    both = softmax_regression(torch.cat([x, x]), torch.cat([targets, targets.roll(1, dims=1)]), [0.01])
    torch.testing.assert_close(softmax_regression(x, mixed, [0.01]), both, rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("rows", [None, torch.arange(0, 600, 2)])
def test_blocks_change_rounding_alone(monkeypatch, soft, rows):
    x, y, _, _ = clouds(600, 7, 4, 1.0)
    targets = F.one_hot(y, 4).float() if soft else y
    whole = softmax_regression(x, targets, [0.1], rows=rows)
    monkeypatch.setattr(linear, "BLOCK", 4 * 37)
    # L-BFGS stops when a step changes the loss by less than 1e-9. The curvature is at least the strength, so each of
    # the two is at most sqrt(2e-9 / 0.1) = 1.4e-4 from the minimum.
    torch.testing.assert_close(softmax_regression(x, targets, [0.1], rows=rows), whole, rtol=1e-3, atol=3e-4)


def test_integer_targets_are_one_hot_targets_bit_for_bit():
    x, y, _, _ = clouds(600, 7, 4, 1.0)
    one_hot = softmax_regression(x, F.one_hot(y, 4).float(), [0.1, 1e-4])
    assert torch.equal(softmax_regression(x, y, [0.1, 1e-4]), one_hot)
    rows = torch.arange(0, 600, 3)
    assert torch.equal(softmax_regression(x, y, [1e-4], rows=rows), softmax_regression(x[rows], y[rows], [1e-4]))


def test_the_number_of_threads_changes_no_bit_unless_products_do():
    """So many logits are summed in parts by several threads."""
    x, y, _, _ = clouds(20000, 4, 10, 1.0)
    found, products = [], []
    for count in (1, 2):
        with threads(count):
            found.append(softmax_regression(x, y, [1e-4]))
            products.append(F.one_hot(y).float().T @ x)
    # MKL shares the sum over the images between threads on AVX-512, but not on AVX2. Each sum is then rounded
    # otherwise, by 6e-8 of values of about 1; 100 iterations follow each other.
    torch.testing.assert_close(*found, rtol=0, atol=0 if torch.equal(*products) else 1e-5)


def test_memory_does_not_grow_with_images_times_classes(monkeypatch):
    """One-hot targets or logits alone would be 80 MB here."""
    monkeypatch.setattr(linear, "BLOCK", 2**18)
    monkeypatch.setattr(linear, "ITERATIONS", 2)
    monkeypatch.setattr(linear, "STRENGTHS", (0.1, 0.01))
    x = torch.randn(20000, 4, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(20000) % 1000
    peak = peak_bytes(lambda: linear.linear_probe(x, labels, x[:1]), torch.device("cpu"))
    assert peak < 20 * 2**20


def test_calibrated_loss_forgets_confidence_and_keeps_order():
    logits = torch.tensor([[2.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.5, 0.0, 0.0]])
    y = torch.tensor([0, 1, 2])
    assert calibrated_loss(4 * logits, y).item() == pytest.approx(calibrated_loss(logits, y).item())
    assert calibrated_loss(logits, y) < 3 * math.log(3)
    assert calibrated_loss(torch.zeros(3, 3), y).item() == pytest.approx(3 * math.log(3))
    # Two right and one wrong beat one right and two wrong, however sure they are.
    assert calibrated_loss(50 * logits, y) < calibrated_loss(logits, torch.tensor([0, 2, 2]))


def test_what_makes_no_sense_is_an_error():
    with pytest.raises(ValueError, match="one is -1"):
        linear_probe(torch.eye(3), torch.tensor([0, 1, -1]), torch.eye(3))
    with pytest.raises(ValueError, match="same nonzero length, not 0 "):
        linear_probe(torch.zeros(0, 3), torch.zeros(0, dtype=torch.int64), torch.eye(3))


def test_logits_are_of_the_labels_that_occur():
    train, train_labels, queries, _ = clouds(100, 16, 3, 0.5)
    logits, classes = linear.linear_probe(train, train_labels * 10 + 4, queries)
    assert logits.shape == (100, 3)
    assert classes.tolist() == [4, 14, 24]
