"""The terms equal their papers' equations, written out."""

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from ijepa_enhanced.losses import nt_xent, variance_covariance


def vicreg(z: NDArray[np.float64]) -> float:
    """Equations 1 to 4 of arXiv 2105.04906 with gamma = 1, epsilon = 1e-4 and mu : nu = 25 : 1."""
    n, d = z.shape
    v = 0.0
    for j in range(d):
        v += max(0.0, 1.0 - math.sqrt(np.var(z[:, j], ddof=1) + 1e-4)) / d
    mean = sum(z) / n
    c_matrix = sum(np.outer(row - mean, row - mean) for row in z) / (n - 1)
    c = sum(c_matrix[i, j] ** 2 for i in range(d) for j in range(d) if i != j) / d
    return v + c / 25.0


@settings(max_examples=40, deadline=None, derandomize=True)
@given(views=st.integers(2, 9), width=st.integers(1, 7), scale=st.sampled_from([0.01, 0.5, 3.0]), seed=st.integers(0))
def test_it_is_the_papers_equations(views: int, width: int, scale: float, seed: int) -> None:
    z = scale * np.random.default_rng(seed).normal(size=(views, width)) + 1.0
    # float32 holds a z near 1 to 6e-8, which is 1e-5 of its spread at the smallest scale; the covariance subtracts its
    # diagonal from all of its squares, which loses what the diagonal is larger by.
    assert variance_covariance(torch.from_numpy(z).float()).item() == pytest.approx(vicreg(z), rel=2e-5)


def test_collapse_costs_one_less_the_epsilon() -> None:
    z = torch.full((5, 8), 3.0)
    # sqrt(1e-4) = 0.01: what keeps the gradient finite. Two roundings of 6e-8.
    assert variance_covariance(z).item() == pytest.approx(0.99, abs=1.2e-7)


def test_the_gradient_at_collapse_is_finite() -> None:
    z = torch.full((5, 8), 3.0, requires_grad=True)
    variance_covariance(z).backward()
    assert z.grad is not None
    assert z.grad.isfinite().all()


def test_spread_and_uncorrelated_dimensions_cost_nothing() -> None:
    # The columns of a Hadamard matrix: variance 4/3 by n - 1, covariance 0.
    z = torch.tensor([[1.0, 1, 1], [-1, 1, -1], [1, -1, -1], [-1, -1, 1]])
    assert variance_covariance(z).item() == 0


def test_copied_dimensions_cost_their_covariance() -> None:
    # Two equal columns of variance 2: no variance term, two off-diagonal entries of 2, squared, by D = 2, by 25.
    z = torch.tensor([[1.0, 1.0], [-1.0, -1.0]])
    assert variance_covariance(z).item() == pytest.approx(4 / 25, rel=1e-6)


def test_half_precision_is_summed_in_float32() -> None:
    z = torch.randn(64, 32, generator=torch.Generator().manual_seed(0)).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        found = variance_covariance(z)
    assert found.dtype == torch.float32
    assert torch.equal(found, variance_covariance(z.float()))


@pytest.mark.parametrize("views", [0, 1])
def test_too_few_views_are_an_error(views: int) -> None:
    with pytest.raises(ValueError, match=rf"^VICReg's variance needs at least 2 views, not {views}\.$"):
        variance_covariance(torch.ones(views, 4))


@settings(max_examples=20, deadline=None, derandomize=True)
@given(images=st.integers(2, 6), views=st.integers(2, 4), seed=st.integers(0))
def test_views_agree_as_nt_xent_says(images: int, views: int, seed: int) -> None:
    """Equation 1 of arXiv 2002.05709 at a temperature of 0.2, pair by pair, against the views of other images."""
    z = np.random.default_rng(seed).normal(size=(images, views, 5))

    def power(one: NDArray[np.float64], other: NDArray[np.float64]) -> float:
        return math.exp(one @ other / np.linalg.norm(one) / np.linalg.norm(other) / 0.2)

    losses = []
    for image in range(images):
        for a, b in itertools.permutations(range(views), 2):
            negatives = [power(z[image, a], view) for other in range(images) if other != image for view in z[other]]
            positive = power(z[image, a], z[image, b])
            losses.append(-math.log(positive / (positive + sum(negatives))))
    # float32 holds a cosine of up to 1 to 6e-8, which over 0.2 is 3e-7 of a logarithm. (2.1e-7 was measured.)
    assert nt_xent(torch.from_numpy(z).float()).item() == pytest.approx(np.mean(losses), rel=1e-6)


def test_views_that_all_look_alike_cost_as_much_as_chance() -> None:
    """One positive among the 4 x 3 views of other images: collapse is no way out."""
    assert nt_xent(torch.ones(5, 3, 8)).item() == pytest.approx(math.log(1 + 4 * 3), rel=1e-6)


def test_views_agree_in_float32_whatever_the_autocast() -> None:
    z = torch.randn(6, 3, 16, generator=torch.Generator().manual_seed(0)).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        found = nt_xent(z)
    assert found.dtype == torch.float32
    assert torch.equal(found, nt_xent(z.float()))


@pytest.mark.parametrize("shape", [(1, 2, 4), (2, 1, 4)])
def test_one_image_or_one_view_is_an_error(shape: tuple[int, ...]) -> None:
    message = f"^The contrastive loss needs at least 2 images and 2 views of each, not {shape[0]} and {shape[1]}\\.$"
    with pytest.raises(ValueError, match=message):
        nt_xent(torch.zeros(shape))
