import math

import numpy as np
import pytest
import torch

from ijepa_enhanced.evaluate.rank import lidar, mean_cosine, rankme, spread


def orthogonal(rows, columns, seed):
    noise = torch.randn(rows, columns, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return torch.linalg.qr(noise).Q


def with_spectrum(spectrum, rows=50):
    spectrum = torch.tensor(spectrum, dtype=torch.float64)
    d = len(spectrum)
    return orthogonal(rows, d, 0) * spectrum @ orthogonal(d, d, 1).T


@pytest.mark.parametrize(("rows", "columns"), [(40, 12), (12, 40), (1, 1)])
def test_equal_singular_values_count_the_smaller_side(rows, columns):
    z = orthogonal(max(rows, columns), min(rows, columns), 0)
    z = 3.7 * (z if rows >= columns else z.T)
    assert rankme(z) == pytest.approx(min(rows, columns), rel=1e-4)


def test_rank_one_is_one():
    z = torch.outer(torch.arange(1.0, 30), torch.linspace(-1, 2, 16))
    # Each of the 15 empty directions still adds -1e-7 log 1e-7 of entropy.
    assert rankme(z) == pytest.approx(math.exp(15 * -1e-7 * math.log(1e-7)), rel=1e-6)


def test_known_spectrum():
    # p = 1/2, 1/4, 1/8, 1/8: entropy 1.75 bits. Squared singular values would give 1.11 bits.
    assert rankme(with_spectrum([4.0, 2.0, 1.0, 1.0])) == pytest.approx(2**1.75, rel=1e-5)


def test_epsilon_is_added_to_each_share():
    p = [1 + 1e-7 - 1e-4, 1e-4 + 1e-7, 1e-7]
    expected = math.exp(-sum(share * math.log(share) for share in p))
    assert rankme(with_spectrum([1 - 1e-4, 1e-4, 0.0])) == pytest.approx(expected, rel=1e-9)


def test_scale_does_not_matter_and_the_mean_does():
    z = with_spectrum([4.0, 2.0, 1.0, 1.0])
    assert rankme(1000 * z) == pytest.approx(rankme(z), rel=1e-9)
    assert rankme(z + 100) < 1.1


def test_half_precision_is_computed_in_float64():
    z = with_spectrum([4.0, 2.0, 1.0, 1.0]).bfloat16()
    assert rankme(z) == rankme(z.double())


@pytest.mark.parametrize(
    ("z", "problem"),
    [
        (torch.zeros(4, 4), "are empty or all zero"),
        (torch.zeros(0, 4), "are empty or all zero"),
        (torch.ones(4), r"must have shape \[N, D\], not \[4\]"),
        (torch.tensor([[1.0, torch.nan]]), "contain NaN or infinite values"),
    ],
    ids=str,
)
def test_what_has_no_spectrum_is_an_error(z, problem):
    with pytest.raises(ValueError, match=rf"^RankMe features {problem}\.$"):
        rankme(z)


def smooth_rank(shares):
    return math.exp(-sum(p * math.log(p) for p in shares))


def test_lidar_by_hand():
    # Means (+-1, 0) and (0, +-2): between is diag(1/2, 2). Views 1 and 2 off: within is diag(1, 4) + 1e-4.
    means = torch.tensor([[-1.0, 0.0], [1.0, 0.0], [0.0, -2.0], [0.0, 2.0]], dtype=torch.float64)
    offsets = torch.tensor([[1.0, 2.0], [-1.0, -2.0], [1.0, -2.0], [-1.0, 2.0]], dtype=torch.float64)
    eigenvalues = [0.5 / 1.0001, 2 / 4.0001]
    shares = [value / sum(eigenvalues) + 1e-7 for value in eigenvalues]
    assert lidar(means[:, None] + offsets) == pytest.approx(smooth_rank(shares), rel=1e-12)


@pytest.mark.parametrize(("objects", "views", "width"), [(40, 8, 16), (5, 2, 16), (30, 3, 1), (16, 8, 64)])
def test_lidar_is_the_paper_transcribed(objects, views, width):
    rng = np.random.default_rng(0)
    z = rng.normal(size=(objects, 1, width)) * np.linspace(0.1, 2, width) + rng.normal(size=(objects, views, width))
    between, within = np.zeros((width, width)), np.zeros((width, width))
    center = np.mean([z[i].mean(axis=0) for i in range(objects)], axis=0)
    for i in range(objects):
        mean = z[i].mean(axis=0)
        between += np.outer(mean - center, mean - center) / objects
        for j in range(views):
            within += np.outer(z[i, j] - mean, z[i, j] - mean) / (objects * views)
    values, vectors = np.linalg.eigh(within + 1e-4 * np.eye(width))
    root = vectors @ np.diag(values**-0.5) @ vectors.T
    eigenvalues = np.linalg.eigvalsh(root @ between @ root).clip(min=0)
    p = eigenvalues / eigenvalues.sum() + 1e-7
    p = p[-min(objects, width) :]  # the rest has no share but the epsilon
    assert lidar(torch.from_numpy(z)) == pytest.approx(math.exp(-(p * np.log(p)).sum()), rel=1e-9)


def test_lidar_does_not_count_what_only_views_differ_in():
    generator = torch.Generator().manual_seed(0)
    objects = torch.randn(200, 1, 4, dtype=torch.float64, generator=generator)
    noise = torch.randn(200, 8, 12, dtype=torch.float64, generator=generator)
    z = torch.cat([objects.expand(-1, 8, -1) + noise[..., :4] / 10, 10 * noise[..., 4:]], dim=2)
    assert rankme(z.flatten(0, 1)) > 8
    assert 3.9 < lidar(z) < 4.1


def test_lidar_of_objects_that_are_all_alike_is_one():
    views = torch.randn(8, 6, generator=torch.Generator().manual_seed(0))
    assert lidar(views.expand(5, 8, 6)) == 1.0
    assert lidar(torch.ones(5, 8, 6)) == 1.0


@pytest.mark.parametrize(
    ("z", "problem"),
    [
        (torch.ones(4, 4), "must have shape"),
        (torch.ones(1, 4, 4), "must have shape"),
        (torch.ones(4, 1, 4), "must have shape"),
        (torch.full((4, 4, 4), torch.nan), "contain NaN or infinite values"),
    ],
    ids=["no views", "one object", "one view", "nan"],
)
def test_what_has_no_scatter_is_an_error(z, problem):
    with pytest.raises(ValueError, match=f"^LiDAR features {problem}"):
        lidar(z)


def test_spread_by_hand():
    # Deviations 1 and 3 about the means 5 and 0.
    assert spread(torch.tensor([[4.0, 3.0], [6.0, -3.0]])) == 2.0
    assert spread(torch.full((4, 4), 7.0).bfloat16()) == 0.0


def test_cosine_is_the_mean_over_all_pairs():
    z = torch.randn(20, 5, generator=torch.Generator().manual_seed(0)) + 1
    pairs = [float(a @ b / a.norm() / b.norm()) for i, a in enumerate(z.double()) for b in z.double()[i + 1 :]]
    assert mean_cosine(z) == pytest.approx(sum(pairs) / len(pairs), rel=1e-12)


def test_cosine_of_known_directions():
    assert mean_cosine(torch.tensor([[3.0, 0.0], [0.0, 0.1]])) == pytest.approx(0.0, abs=1e-15)
    assert mean_cosine(torch.tensor([[1.0, 0.0], [-5.0, 0.0], [2.0, 0.0]])) == pytest.approx(-1 / 3)
    assert mean_cosine(torch.full((4, 4), 7.0)) == pytest.approx(1.0)
